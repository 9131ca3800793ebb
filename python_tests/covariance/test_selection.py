from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from powerkernels import select_cov_band, select_top_cov, token_covariance
from python_tests.covariance import expected
from python_tests.covariance.expected import Batch, bounds_of, packed, random_batch

pytestmark = pytest.mark.filterwarnings(expected.IGNORE_LARGE_RATIO)

SELECT = {select_top_cov: expected.top, select_cov_band: expected.band}
WIDE = {"lb": -math.inf, "ub": math.inf}
# Lengths around those of vectors; one with several keys to a bin; one with many.
SIZES = (1, 2, 3, 7, 31, 32, 33, 64, 257, 1000, 4099, 100_003)


def check(device: str, function: Any, batch: Batch, **options: Any) -> Tensor:
    """A selection against the sort; returns it."""
    got = function(*batch.to(device), **expected.to_device(options, device))
    assert got.dtype == torch.bool
    assert got.device.type == device
    wanted = SELECT[function](*batch, **options)
    assert torch.equal(got.cpu(), wanted), (options, got.sum(), wanted.sum())
    return got.cpu()


def numbers(count: int) -> list[dict[str, Any]]:
    """How many of `count` tokens."""
    if count > 10_000:
        return [{"k": count // 3}, {"ratio": 2e-4}, {"ratio": 0.01}]
    ks = sorted({0, 1, 2, count // 3, count - 1, count, count + 5} - {-1})
    return [{"k": k} for k in ks] + [{"ratio": ratio} for ratio in (2e-4, 0.01, 0.37, 1.0)]


@functools.cache
def sorted_by_truth(size: int, ties: bool) -> tuple[Batch, list[tuple[dict[str, Any], Tensor]]]:
    """Kept, because every backend wants the same."""
    generator = torch.Generator().manual_seed(size)
    batch = random_batch((1, size), generator, ties=ties)
    how = numbers(int(batch.mask.sum()))
    return batch, [(number, expected.top(*batch, **number)) for number in how]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_top_is_that_of_a_sort(backend, size, ties):
    batch, answers = sorted_by_truth(size, ties)
    for number, wanted in answers:
        assert torch.equal(select_top_cov(*batch, **number), wanted), number


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_top_of_other_dtypes(backend, dtype, generator):
    batch = random_batch((5, 211), generator, dtype=dtype)
    check("cpu", select_top_cov, batch, k=70)
    check("cpu", select_top_cov, batch._replace(advantages=batch.advantages.float()), k=70)


@pytest.mark.parametrize(
    ("count", "ratio", "number"),
    [
        (100, 0.29, 28),  # 28.999999999999996 in float64, 29 in float32
        (100, 0.57, 56),
        (1000, 0.001, 1),
        (1000, 0.0009999, 1),  # at least one
        (10, 0.3, 3),
        (4999, 0.0002, 1),
        (10000, 0.0002, 2),
        (7, 1e-300, 1),
        (7, 1, 7),
    ],
)
def test_number_of_a_ratio(backend, count, ratio, number, generator):
    log_prob, advantages = torch.randn(2, 2, count, generator=generator)
    mask = torch.tensor([[1], [0]]).expand(2, count)
    for selected in (
        select_top_cov(log_prob, advantages, mask, ratio=ratio),
        select_cov_band(log_prob, advantages, mask, ratio=ratio, seed=1, **WIDE),
    ):
        assert selected.sum() == number
        assert not selected[1].any()


def test_excluded_tokens_count_and_are_not_taken(backend, generator):
    batch = random_batch((6, 150), generator)
    exclude = torch.rand(6, 150, generator=generator) < 0.5
    for marks in (exclude, exclude.int(), exclude * -0.5):
        for number in ({"k": 30}, {"ratio": 0.2}, {"ratio": 0.9}):
            check("cpu", select_top_cov, batch, exclude=marks, **number)
            check("cpu", select_cov_band, batch, exclude=marks, lb=0.1, ub=2, seed=4, **number)
    all_of_them = torch.ones(6, 150)
    assert not check("cpu", select_top_cov, batch, exclude=all_of_them, k=30).any()


@pytest.mark.parametrize("constant", ["log_prob", "advantages"])
@pytest.mark.parametrize("value", [0.0, -0.7, 1e4])
def test_nothing_is_chosen_where_all_covariances_are_zero(backend, constant, value, generator):
    batch = random_batch((3, 60), generator)._replace(**{constant: torch.full((3, 60), value)})
    assert not select_top_cov(*batch, ratio=0.5).any()
    assert not select_cov_band(*batch, ratio=0.5, lb=-1, ub=1, seed=3).any()


def test_nothing_is_chosen_where_only_excluded_tokens_have_a_covariance(backend):
    log_prob = torch.tensor([[-1.0, 1.0, 0.0, 0.0]])  # covariances 1, 1, 0, 0
    exclude = torch.tensor([[1, 1, 0, 0]])
    assert not select_top_cov(log_prob, log_prob, k=2, exclude=exclude).any()
    assert not select_cov_band(log_prob, log_prob, k=2, exclude=exclude, seed=0, **WIDE).any()


def test_one_token_is_not_chosen(backend):
    one = torch.tensor([[-1.5]])
    assert not select_top_cov(one, one, k=1).any()
    assert not select_cov_band(one, one, k=1, seed=0, **WIDE).any()


def test_zeros_of_either_sign_are_equal(backend):
    # The means are 0; covariances are 4 and then zeros with signs.
    log_prob = torch.tensor([[-2.0, -1.0, 1.0, -1.0, 1.0, 2.0, 0.0, -0.0]])
    advantages = torch.tensor([[-2.0, 0.0, 0.0, -0.0, -0.0, 2.0, -0.0, 0.0]])
    order = [0, 5, 1, 2, 3, 4, 6, 7]
    for k in range(9):
        got = select_top_cov(log_prob, advantages, k=k)
        assert got[0].nonzero().flatten().tolist() == sorted(order[:k])


@pytest.mark.parametrize("scale", [2.0**-64, 2.0**-62, 2.0**60, 2.0**64])
def test_denormal_and_infinite_covariances(backend, scale, generator):
    integers = torch.randint(-9, 10, (2, 4, 90), generator=generator)
    log_prob, advantages = integers * scale
    batch = Batch(log_prob, advantages, torch.ones(4, 90))
    cov = token_covariance(*batch).cov
    np.testing.assert_array_equal(cov.flatten(), expected.covariance(*batch).cov)
    for k in (1, 7, 100, 200, 359):
        check("cpu", select_top_cov, batch, k=k)
        check("cpu", select_cov_band, batch, k=k, seed=k, **WIDE)
        check("cpu", select_cov_band, batch, k=k, seed=k, lb=0, ub=scale)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_nothing_is_chosen_beside_a_nonfinite_token(backend, which, bad, generator):
    batch = random_batch((3, 60), generator)
    batch[which][1, 7] = bad
    batch.mask[1, 7] = True
    exclude = torch.zeros(3, 60)
    exclude[1, 7] = 1
    for options in ({}, {"exclude": exclude}):
        assert not select_top_cov(*batch, k=9, **options).any()
        assert not select_cov_band(*batch, k=9, seed=3, **WIDE, **options).any()


@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf, 3e38])
def test_masked_out_places_may_hold_anything(backend, rubbish, generator):
    log_prob, advantages, mask = random_batch((3, 111), generator)
    clean = log_prob.where(mask, 0), advantages.where(mask, 0), mask
    dirty = log_prob.where(mask, rubbish), advantages.where(mask, rubbish), mask
    band = {"k": 20, "lb": 0.1, "ub": 2.0, "seed": 5}
    assert torch.equal(select_top_cov(*dirty, k=20), select_top_cov(*clean, k=20))
    assert torch.equal(select_cov_band(*dirty, **band), select_cov_band(*clean, **band))


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (2, 0, 3), (3, 4)])
def test_no_token(backend, shape):
    empty = torch.ones(shape), torch.ones(shape), torch.zeros(shape)
    for got in (
        select_top_cov(*empty, ratio=0.5),
        select_cov_band(*empty, ratio=0.5, seed=1, **WIDE),
    ):
        assert got.shape == shape
        assert not got.any()


def check_layouts(device: str, generator: torch.Generator, length: int) -> None:
    """Dimensions, strides, packed sequences, advantages of sequences: top and band."""
    base = random_batch((3, 4, length), generator)
    band = {"lb": 0.05, "ub": 3.0, "seed": 8}
    for view in (
        lambda x: x,
        lambda x: x[0],
        lambda x: x[0].T,
        lambda x: x[..., ::2],
        lambda x: x[:, 1, 3:],
        lambda x: x[0, 0],
    ):
        batch = Batch(*(view(value) for value in base))
        check(device, select_top_cov, batch, k=7)
        check(device, select_cov_band, batch, k=7, **band)
        if batch.log_prob.ndim > 1:
            batch = batch._replace(advantages=batch.advantages[..., 0])
            check(device, select_top_cov, batch, ratio=0.1)
            check(device, select_cov_band, batch, ratio=0.1, **band)
    lengths = [length - 2, 0, length - 5, 1]
    flat = Batch(*(packed(value[0], lengths) for value in base))
    for advantages in (flat.advantages, base.advantages[1, :, 2]):
        batch = flat._replace(advantages=advantages)
        cu_seqlens = bounds_of(lengths)
        check(device, select_top_cov, batch, k=9, cu_seqlens=cu_seqlens)
        check(device, select_cov_band, batch, k=9, cu_seqlens=cu_seqlens.int(), **band)


def test_layouts(backend, generator):
    check_layouts("cpu", generator, 67)


SEEDS = (0, 7, -1, -(2**63), 2**63, 2**64 - 1, 0x123456789ABCDEF)


def check_band(device: str, batch: Batch, seed: int, **options: Any) -> None:
    """Against the truth, and by the promises themselves."""
    got = check(device, select_cov_band, batch, seed=seed, **options)
    cov = token_covariance(*batch.to(device)).cov.cpu()
    eligible = batch.mask & (cov > options["lb"]) & (cov < options["ub"])
    assert not (got & ~eligible).any()
    number = expected.number_of_tokens(
        int(batch.mask.sum()), options.get("ratio"), options.get("k")
    )
    assert got.sum() == min(number, int(eligible.sum()))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "bounds", [(0.25, 1.5), (-0.5, 0.5), (0.5, math.inf), (-math.inf, 0), (-math.inf, math.inf)]
)
def test_band_has_the_largest_numbers(backend, bounds, seed, generator):
    batch = random_batch((7, 97), generator)
    for number in ({"k": 0}, {"k": 1}, {"k": 60}, {"ratio": 0.01}, {"ratio": 1.0}):
        check_band("cpu", batch, seed, lb=bounds[0], ub=bounds[1], **number)


@pytest.mark.parametrize("size", SIZES)
def test_band_of_any_size(backend, size, generator):
    batch = random_batch((1, size), generator)
    check("cpu", select_cov_band, batch, ratio=0.2, lb=-0.5, ub=1.0, seed=size)


def test_bounds_are_exclusive(backend):
    check_exclusive_bounds("cpu")


def check_exclusive_bounds(device: str) -> None:
    # The means are 0; covariances are 1, 4, 0.1 as float32, 0 and as often their negatives.
    log_prob = torch.tensor([[1.0, 2, 1, 0, -1, -2, -1, 0]], device=device)
    advantages = torch.tensor([[1.0, 2, 0.1, 0, -1, -2, -0.1, 0]], device=device)
    cov = token_covariance(log_prob, advantages).cov.cpu()
    assert cov.tolist() == torch.tensor([[1, 4, 0.1, 0, 1, 4, 0.1, 0]]).tolist()
    for lb, ub in itertools.combinations((-0.0, 0.1, 1.0, 4.0, math.inf), 2):
        got = select_cov_band(log_prob, advantages, k=8, lb=lb, ub=ub, seed=2).cpu()
        bounds = torch.tensor([lb, ub])
        assert torch.equal(got, (cov > bounds[0]) & (cov < bounds[1])), (lb, ub)


def test_seeds(backend, generator):
    batch = random_batch((4, 80), generator)
    options = {"k": 40, "lb": -1.0, "ub": 1.0}

    def chosen(seed: int | Tensor) -> Tensor:
        return select_cov_band(*batch, seed=seed, **options)

    for seed in (0, 5, -3, 2**62):
        assert torch.equal(chosen(seed), chosen(torch.tensor(seed)))
        assert torch.equal(chosen(seed), chosen(torch.tensor([[seed]])))
    assert torch.equal(chosen(-1), chosen(2**64 - 1))
    assert torch.equal(chosen(-(2**63)), chosen(2**63))
    different = [chosen(seed) for seed in (0, 1, 2**32, 2**63, -1)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(different, 2))


def test_every_token_and_pair_of_a_band_is_chosen_equally_often(compiled_backend):
    # 10 eligible tokens in two sequences, 4 to be chosen; a masked-out one and two out of the band.
    log_prob = torch.tensor([[-1.0, 0, 1, 2, 3, 4, 9], [-1.5, 0.5, 1.5, 2.5, 3.5, 4.5, -9]])
    advantages = torch.tensor([[1.0], [2.0]]).expand(2, 7) + log_prob.square() / 10
    mask = torch.ones(2, 7)
    mask[0, 3] = 0
    cov = token_covariance(log_prob, advantages, mask).cov
    lb, ub = sorted(cov[mask > 0].tolist())[1:12:10]
    eligible = ((cov > lb) & (cov < ub) & (mask > 0)).flatten().nonzero().flatten()
    assert len(eligible) == 9
    trials, number = 6000, 4
    chosen = torch.stack(
        [
            select_cov_band(log_prob, advantages, mask, k=number, lb=lb, ub=ub, seed=seed)
            for seed in range(trials)
        ]
    )
    counts = chosen.view(trials, -1)[:, eligible].double()
    assert (counts.sum(-1) == number).all()
    together = counts.T @ counts
    tokens = len(eligible)
    # Counts of a draw without replacement vary less than those of independent ones.
    share = number / tokens
    statistic = (together.diagonal() - trials * share).square().sum() / (trials * share)
    statistic /= (1 - share) * tokens / (tokens - 1)
    assert 0.001 < stats.chi2.sf(statistic.item(), tokens - 1) < 0.999
    pairs = together[torch.triu_indices(tokens, tokens, 1).unbind()]
    share *= (number - 1) / (tokens - 1)
    deviation = (pairs - trials * share) / math.sqrt(trials * share * (1 - share))
    assert deviation.abs().max() < stats.norm.isf(0.001 / len(pairs))


def test_padding_changes_nothing(backend, generator):
    lengths = [40, 0, 13, 57, 1]
    batch = random_batch((5, 60), generator)
    inside = torch.arange(60) < torch.tensor(lengths)[:, None]
    band = {"k": 20, "lb": 0.1, "ub": 2.0, "seed": 11}
    flat = [packed(value, lengths) for value in batch]
    for select, options in ((select_top_cov, {"k": 20}), (select_cov_band, band)):
        got = select(*flat, cu_seqlens=bounds_of(lengths), **options)
        for length in (57, 60):
            padded = [value[:, :length] for value in batch._replace(mask=batch.mask & inside)]
            assert torch.equal(select(*padded, **options)[inside[:, :length]], got)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_numbered_sequences_may_come_in_any_order(backend, index_dtype, generator):
    batch = random_batch((9, 31), generator)
    names = torch.tensor([5, 0, -4, 12345, 2**31 - 1, 7, 8, 9, -(2**31)], dtype=index_dtype)
    if index_dtype == torch.int64:
        names[3:5] = torch.tensor([2**40 + 1, -(2**63)])
    options = {"k": 20, "lb": 0.1, "ub": 2.0, "seed": 11}
    got = check("cpu", select_cov_band, batch, sequence_index=names, **options)
    order = torch.randperm(9, generator=generator)
    shuffled = [value[order] for value in batch]
    again = select_cov_band(*shuffled, sequence_index=names[order], **options)
    assert torch.equal(again, got[order])
    in_packs = [value.reshape(-1) for value in shuffled]
    cu_seqlens = bounds_of([31] * 9)
    again = select_cov_band(
        *in_packs, sequence_index=names[order], cu_seqlens=cu_seqlens, **options
    )
    assert torch.equal(again, got[order].view(-1))


def test_numbers_of_sequences_count_through_unless_given(backend, generator):
    options = {"k": 12, "lb": 0.1, "ub": 2.0, "seed": 3}
    for shape in ((6, 20), (2, 3, 20), (120,)):
        batch = random_batch(shape, generator)
        leading = shape[:-1] if len(shape) > 1 else shape
        names = torch.arange(math.prod(leading)).view(leading)
        assert torch.equal(
            select_cov_band(*batch, **options),
            select_cov_band(*batch, sequence_index=names, **options),
        )


def test_equal_random_numbers_go_by_index(backend, generator):
    batch = random_batch((40, 5), generator)
    names = torch.zeros(40, dtype=torch.int64)  # five different numbers in all
    for k in range(0, 80, 7):
        check("cpu", select_cov_band, batch, k=k, seed=k, sequence_index=names, **WIDE)


def test_same_for_any_threads(backend, generator, restore_threads):
    batch = random_batch((17, 2003), generator, ties=True)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        band = select_cov_band(*batch, ratio=0.05, seed=1, lb=0.0, ub=2.0)
        results.append((select_top_cov(*batch, ratio=0.05), band))
    for found in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, results[0], strict=True))


@pytest.mark.parametrize("backend", ["reference", "cpp-baseline"], indirect=True)
@pytest.mark.parametrize("band", [False, True])
def test_opcheck(backend, band, generator):
    log_prob, advantages, mask = random_batch((2, 9), generator)
    op = torch.ops.powerkernels.select_cov.default
    seed = torch.tensor([3]) if band else None
    names = torch.tensor([4, 2]) if band else None
    old = log_prob + 0.2 if band else None
    rest = (names, seed, band, 0.2, -1, -0.5, 0.5, 0.8, 1.2, "")
    torch.library.opcheck(op, (log_prob, advantages, mask, ~mask, old, None, *rest))
    flat = (log_prob.bfloat16().view(-1), advantages[:, 0].clone(), None, None, None)
    torch.library.opcheck(op, (*flat, torch.tensor([0, 7, 18]), *rest))
