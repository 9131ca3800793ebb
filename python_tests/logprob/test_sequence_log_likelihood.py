from __future__ import annotations

import math

import pytest
import torch

from powerkernels import sequence_log_likelihood

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 7), (1, 100_000), (40, 3000), (0, 5), (5, 0)])
def test_padded(backend, dtype, shape, generator):
    log_prob = -torch.rand(shape, generator=generator).to(dtype)
    got = sequence_log_likelihood(log_prob, alpha=4)
    exact = 4 * log_prob.double().sum(-1)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # The sum is in float64: only the last rounding is left.
    torch.testing.assert_close(got, exact.to(got.dtype), rtol=2**-23, atol=0)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32, torch.bfloat16])
def test_masked_places_may_hold_anything(backend, mask_dtype, generator):
    log_prob = -torch.rand(4, 50, generator=generator)
    mask = torch.rand(4, 50, generator=generator) < 0.5
    mask[1] = False
    expected = torch.where(mask, log_prob.double(), 0.0).sum(-1)
    log_prob[~mask] = torch.tensor([math.nan, -math.inf, math.inf, 1e30]).repeat(200)[
        : (~mask).sum()
    ]
    got = sequence_log_likelihood(log_prob, mask=mask.to(mask_dtype))
    torch.testing.assert_close(got, expected.float(), rtol=2**-23, atol=0)
    assert got[1] == 0


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_packed(backend, index_dtype, generator):
    lengths = [3, 0, 5, 1, 0]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(index_dtype)
    log_prob = -torch.rand(9, generator=generator)
    log_prob[4] = -torch.inf
    got = sequence_log_likelihood(log_prob, alpha=2, cu_seqlens=bounds)
    expected = torch.stack([2 * part.double().sum() for part in log_prob.split(lengths)]).float()
    torch.testing.assert_close(got, expected, rtol=2**-23, atol=0)
    assert got.tolist()[1] == 0
    assert got.tolist()[2] == -math.inf


def test_no_sequences(backend):
    assert sequence_log_likelihood(torch.zeros(0), cu_seqlens=torch.tensor([0])).shape == (0,)


def test_strides(backend, generator):
    base = -torch.rand(8, 3, 60, generator=generator)
    mask = torch.rand(60, 8, generator=generator) < 0.5
    for log_prob in (base[:, 1], base[:, 1, 5:30], base[:, 1, ::2], base[:, 0].T):
        expected = log_prob.double().sum(-1).float()
        torch.testing.assert_close(sequence_log_likelihood(log_prob), expected, rtol=2**-23, atol=0)
    got = sequence_log_likelihood(base[:, 0], mask=mask.T)
    expected = (base[:, 0].double() * mask.T).sum(-1).float()
    torch.testing.assert_close(got, expected, rtol=2**-23, atol=0)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 4.0])
def test_what_is_impossible_stays_so(backend, alpha):
    log_prob = torch.tensor([[-1.0, -math.inf], [-1.0, math.nan]])
    got = sequence_log_likelihood(log_prob, alpha=alpha)
    assert got[0] == -math.inf
    assert got[1].isnan()


def test_same_bits_for_any_number_of_threads(backend, generator, restore_threads):
    log_prob = -torch.rand(50, 5000, generator=generator)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(sequence_log_likelihood(log_prob))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_gradient(backend):
    log_prob = torch.zeros(2, 3, requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    sequence_log_likelihood(log_prob, alpha=4, mask=mask).sum().backward()
    assert torch.equal(log_prob.grad, 4.0 * mask)


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(backend, packed):
    flat, bounds = torch.zeros(6), torch.tensor([0, 2, 6])
    padded, mask = torch.zeros(2, 3), torch.ones(2, 3)
    arguments = (flat, 2.0, None, bounds) if packed else (padded, 2.0, mask, None)
    torch.library.opcheck(torch.ops.powerkernels.sequence_log_likelihood.default, arguments)


def test_compiles_as_one_graph(backend, generator):
    log_prob, mask = -torch.rand(3, 5, generator=generator), torch.ones(3, 5)

    def total(log_prob, mask):
        return sequence_log_likelihood(log_prob * 2, alpha=4, mask=mask) + 1

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(log_prob, mask), total(log_prob, mask))


FLAT, PADDED = torch.zeros(6), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("log_prob", "options", "error", "names"),
    [
        (FLAT, {}, ValueError, r"log_prob.*\[B, T\]"),
        (PADDED, {"cu_seqlens": torch.tensor([0, 6])}, ValueError, "log_prob.*flat"),
        (PADDED.long(), {}, TypeError, "log_prob"),
        (PADDED, {"alpha": -1}, ValueError, "alpha"),
        (PADDED, {"mask": torch.ones(2, 2)}, ValueError, "mask.*shape"),
        (PADDED, {"mask": [[1]]}, TypeError, "mask"),
        (FLAT, {"mask": FLAT, "cu_seqlens": torch.tensor([0, 6])}, ValueError, "mask.*None"),
        (FLAT, {"cu_seqlens": torch.tensor([1, 6])}, ValueError, r"cu_seqlens.*\[1, 6\]"),
        (FLAT, {"cu_seqlens": torch.tensor([0, 5])}, ValueError, "cu_seqlens.*6"),
        (FLAT, {"cu_seqlens": torch.tensor([0, 4, 3, 6])}, ValueError, "cu_seqlens.*fall"),
        (FLAT, {"cu_seqlens": torch.tensor([], dtype=torch.int64)}, ValueError, "cu_seqlens"),
        (FLAT, {"cu_seqlens": torch.tensor([0.0, 6.0])}, TypeError, "cu_seqlens"),
    ],
)
@pytest.mark.each_value
def test_bad_arguments(backend, log_prob, options, error, names):
    with pytest.raises(error, match=names):
        sequence_log_likelihood(log_prob, **options)
