from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from powerkernels import covariance_table, token_covariance
from python_tests.covariance import expected
from python_tests.covariance.expected import bounds_of, packed, random_batch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MASK_DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)
# One token; less than a vector; one short of and one more than one; many vectors and a rest.
SHAPES = ((1, 1), (1, 7), (3, 5), (1, 16), (1, 17), (4, 50), (13, 777), (2, 20011))


def check_covariance(
    device: str, log_prob: Tensor, advantages: Tensor, mask: Tensor | None = None, **options: Any
) -> None:
    """Every field against the definition; of float64 up to a rounding of the exact mean."""
    exact = expected.covariance(log_prob, advantages, mask, **options)
    moved = [None if value is None else value.to(device) for value in (log_prob, advantages, mask)]
    got = token_covariance(*moved, **expected.to_device(options, device))
    assert got.cov.dtype == torch.float32
    assert got.cov.shape == log_prob.shape
    assert got.cov.device.type == device
    cov = got.cov.cpu().flatten().numpy()
    rtol = 2**-22 if torch.float64 in (log_prob.dtype, advantages.dtype) else 0
    np.testing.assert_allclose(cov, exact.cov, rtol=rtol, atol=1e-15 if rtol else 0)
    assert got.count.item() == exact.count
    assert got.mean_log_prob.item() == pytest.approx(exact.mean_log_prob, rel=2e-16, nan_ok=True)
    assert got.mean_advantage.item() == pytest.approx(
        exact.mean_advantage, rel=2e-16, abs=1e-19, nan_ok=True
    )
    scale = float(np.abs(exact.cov).sum()) / max(1, exact.count)
    assert got.covariance.item() == pytest.approx(exact.covariance, abs=1e-12 * scale, nan_ok=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_covariance_is_its_definition(backend, dtype, shape, generator):
    check_covariance("cpu", *random_batch(shape, generator, dtype=dtype))


@pytest.mark.parametrize("log_prob_dtype", DTYPES)
@pytest.mark.parametrize("advantages_dtype", DTYPES)
def test_mixed_dtypes(backend, log_prob_dtype, advantages_dtype, generator):
    log_prob, advantages, mask = random_batch((3, 67), generator)
    check_covariance("cpu", log_prob.to(log_prob_dtype), advantages.to(advantages_dtype), mask)


@pytest.mark.parametrize("mask_dtype", MASK_DTYPES)
def test_a_token_counts_where_the_mask_is_not_zero(backend, mask_dtype, generator):
    log_prob, advantages, mask = random_batch((3, 67), generator)
    values = torch.tensor([1.0, 2.0, 0.5, -3.0])[torch.arange(201).view(3, 67) % 4]
    if not mask_dtype.is_floating_point:
        values = values.abs().ceil()
    marks = torch.where(mask, values, 0).to(mask_dtype)
    got = token_covariance(log_prob, advantages, marks)
    wanted = token_covariance(log_prob, advantages, mask)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    check_covariance("cpu", log_prob, advantages, marks)


@pytest.mark.parametrize("shape", [(23,), (3, 4, 9), (2, 1, 3, 11), (5, 1)])
def test_any_number_of_dimensions(backend, shape, generator):
    log_prob, advantages, mask = random_batch(shape, generator)
    check_covariance("cpu", log_prob, advantages, mask)
    check_covariance("cpu", log_prob, advantages)
    if len(shape) > 1:
        check_covariance("cpu", log_prob, advantages[..., 0], mask)
        check_covariance("cpu", log_prob, advantages[..., :1], mask)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("lengths", [[5, 0, 7, 1], [0, 0, 4], [64, 65], [4, 0], [0]])
def test_packed(backend, lengths, index_dtype, generator):
    batch = random_batch((len(lengths), 70), generator)
    cu_seqlens = bounds_of(lengths, index_dtype)
    log_prob, advantages, mask = (packed(value, lengths) for value in batch)
    check_covariance("cpu", log_prob, advantages, mask, cu_seqlens=cu_seqlens)
    check_covariance("cpu", log_prob, batch.advantages[:, 0], mask, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("shape", [(1, 3), (3, 1)], ids=["tokens", "sequences"])
def test_packed_advantages_of_as_many_tokens_as_sequences(backend, shape):
    log_prob, advantages = torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([1.0, 2.0, -1.0])
    bounds = torch.tensor([0, 2, 2, 3])
    check_covariance("cpu", log_prob, advantages.view(shape), cu_seqlens=bounds)


def test_packed_without_sequences(backend):
    nothing = torch.empty(0)
    check_covariance("cpu", nothing, nothing, cu_seqlens=torch.tensor([0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(backend, dtype, generator):
    base = random_batch((6, 8, 90), generator, dtype=dtype)
    for view in (
        lambda x: x[:, 0],
        lambda x: x[0].T,
        lambda x: x[..., ::2],
        lambda x: x[1:, 1:-1, 3:],
        lambda x: x.permute(2, 0, 1),
        lambda x: x[0, :, 5],
        lambda x: x[:1, :1].expand(4, 3, -1),
    ):
        log_prob, advantages, mask = (view(value) for value in base)
        check_covariance("cpu", log_prob, advantages, mask)
        check_covariance("cpu", log_prob, advantages.contiguous(), mask)
    lengths = [20, 0, 25]
    log_prob, advantages, mask = (value[0, 0, ::2] for value in base)
    for a in (advantages, base.advantages[::2, 0, 0], base.advantages[0, 0, :1].expand(3)):
        check_covariance("cpu", log_prob, a, mask, cu_seqlens=bounds_of(lengths))


@pytest.mark.parametrize("offsets", [(1e4, 0.0), (0.0, 1e6), (-1e4, 1e6)])
def test_a_large_common_offset_costs_nothing(backend, offsets, generator):
    log_prob, advantages, mask = random_batch((7, 300), generator)
    log_prob, advantages = log_prob + offsets[0], advantages + offsets[1]
    got = token_covariance(log_prob, advantages, mask).cov[mask].tolist()
    x = [Fraction(value) for value in log_prob[mask].tolist()]
    a = [Fraction(value) for value in advantages[mask].tolist()]
    mean_x, mean_a = sum(x) / len(x), sum(a) / len(a)
    for cov, value, advantage in zip(got, x, a, strict=True):
        dx, da = value - mean_x, advantage - mean_a
        # The result's rounding to float32 and the means' to float64.
        allowed = abs(dx * da) * 2**-24 + (abs(da * mean_x) + abs(dx * mean_a)) * 2**-51 + 2**-60
        assert abs(Fraction(cov) - dx * da) <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf, 6e4])
def test_masked_out_places_may_hold_anything(backend, rubbish, dtype, generator):
    log_prob, advantages, mask = random_batch((5, 123), generator, dtype=dtype)
    results = [
        token_covariance(log_prob.where(mask, x), advantages.where(mask, y), mask)
        for x, y in ((0.0, 0.0), (rubbish, 1.0), (0.0, rubbish), (rubbish, rubbish))
    ]
    for found in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, results[0], strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nonfinite_token_makes_all_nan(backend, dtype, which, bad, generator):
    batch = random_batch((5, 123), generator, dtype=dtype)
    batch[which][2, 5] = bad
    batch.mask[2, 5] = True
    got = token_covariance(*batch)
    assert got.cov[batch.mask].isnan().all()
    assert (got.cov[~batch.mask] == 0).all()
    assert got.count == batch.mask.sum()
    for value in (got.covariance, got.mean_log_prob, got.mean_advantage):
        assert value.isnan()


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3), (3, 4)])
def test_no_token(backend, shape):
    got = token_covariance(torch.ones(shape), torch.ones(shape), torch.zeros(shape))
    assert got.cov.shape == shape
    assert (got.cov == 0).all()
    assert got.count == 0
    for value in (got.covariance, got.mean_log_prob, got.mean_advantage):
        assert value.isnan()


def test_one_token_has_covariance_zero(backend):
    got = token_covariance(
        torch.tensor([[-1.25, 7.0]]), torch.tensor([3.5]), torch.tensor([[1, 0]])
    )
    assert got.cov.tolist() == [[0.0, 0.0]]
    assert [float(value) for value in got[1:]] == [0.0, -1.25, 3.5, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_of_tokens_changes_no_bit(backend, dtype, generator):
    log_prob, advantages, mask = random_batch((60, 333), generator, dtype=dtype)
    log_prob = log_prob * 10 ** torch.linspace(-6, 3, 333)  # of all sizes: a sum would round
    got = token_covariance(log_prob, advantages, mask)
    for order in (
        torch.randperm(log_prob.numel(), generator=generator),
        torch.arange(19979, -1, -1),
    ):
        shuffled = [
            value.reshape(-1)[order].view(60, 333) for value in (log_prob, advantages, mask)
        ]
        again = token_covariance(*shuffled)
        assert torch.equal(again.mean_log_prob, got.mean_log_prob)
        assert torch.equal(again.mean_advantage, got.mean_advantage)
        assert torch.equal(again.cov.view(-1), got.cov.view(-1)[order])


def test_same_bits_for_any_threads(backend, generator, restore_threads):
    batch = random_batch((17, 5003), generator)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(token_covariance(*batch))
    for found in results[1:]:
        assert torch.equal(found.cov, results[0].cov)
        assert torch.equal(found.mean_log_prob, results[0].mean_log_prob)
        assert torch.equal(found.mean_advantage, results[0].mean_advantage)
        torch.testing.assert_close(found.covariance, results[0].covariance, rtol=1e-12, atol=0)


def test_nothing_has_a_gradient(backend, generator):
    log_prob, advantages, mask = random_batch((2, 9), generator)
    got = token_covariance(log_prob.requires_grad_(), advantages.requires_grad_(), mask)
    assert not any(value.requires_grad for value in got)


def check_table(device: str, batch: expected.Batch, shares: tuple[float, ...]) -> None:
    truth = expected.covariance(*batch)
    got = covariance_table(*batch.to(device), shares=shares)
    assert got.share.tolist() == list(shares)
    ordered = np.sort(truth.cov[truth.kept])[::-1].astype(np.float64)
    for place, share in enumerate(shares):
        number = max(1, math.floor(truth.count * share))
        assert got.quantile[place].item() == ordered[number - 1]
        scale = float(np.abs(ordered[:number]).sum()) / number
        mean = math.fsum(ordered[:number]) / number
        assert got.mean_cov[place].item() == pytest.approx(mean, abs=1e-12 * scale)


@pytest.mark.parametrize("ties", [False, True])
def test_table(backend, ties, generator):
    shares = (0.0002, 0.002, 0.02, 0.2, 0.5, 1.0)
    check_table("cpu", random_batch((7, 2003), generator, ties=ties), shares)
    check_table("cpu", random_batch((3, 11), generator, ties=ties), (1.0, 0.29, 1e-9))


def test_table_of_packed_sequences(backend, generator):
    batch = random_batch((3, 40), generator)
    lengths = [40, 0, 13]
    flat = [packed(value, lengths) for value in batch]
    got = covariance_table(*flat, cu_seqlens=bounds_of(lengths))
    wanted = covariance_table(*(value[None] for value in flat))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_table_is_nan_where_there_is_nothing_to_say(backend):
    ones = torch.ones(2, 3)
    for log_prob, mask in (
        (ones, ones * 0),
        (ones[:, :0], ones[:, :0]),
        (torch.tensor([[0.0, 1.0, math.nan]]).expand(2, 3), ones),
    ):
        got = covariance_table(log_prob, torch.ones_like(log_prob), mask)
        assert got.mean_cov.isnan().all()
        assert got.quantile.isnan().all()


@pytest.mark.parametrize("backend", ["reference", "cpp-baseline"], indirect=True)
def test_opcheck(backend, generator):
    log_prob, advantages, mask = random_batch((2, 9), generator)
    op = torch.ops.powerkernels.token_covariance.default
    torch.library.opcheck(op, (log_prob, advantages, mask, None, ""))
    flat = (log_prob.bfloat16().view(-1), advantages[:, 0].clone(), None)
    torch.library.opcheck(op, (*flat, torch.tensor([0, 7, 18]), ""))
