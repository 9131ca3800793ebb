"""Draws from a support that top_k, top_p and min_p leave, in every backend."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from powerkernels import sample_tokens, score_tokens
from powerkernels._cuda_graph import waits_are_errors
from powerkernels.logprob import reference
from powerkernels.logprob.functional import implementation
from powerkernels.logprob.options import ScoreOptions, Support
from python_tests import tiers, triton_device
from python_tests.logprob.expected import far_apart, random_logits
from python_tests.logprob.test_sample_tokens import (
    DRAWS,
    SIGNIFICANCE,
    chi_square_p_value,
    counters_for,
    power_law,
)

# numpy's word for a row of NaN.
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Within this of top_p the backends may decide differently, as `sample_tokens` says. Measured: 3e-7.
BOUNDARY = 1e-6
# Of log_z: a few roundings of float32 times the length of its sum's tree.
LOG_Z_ERROR = 2e-6


class OnBoundary(Exception):
    """top_p is a share of mass that some row's support has; any backend may decide either way."""


def shares_of(z: np.ndarray, alpha: float, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct logits of a row that are kept, falling, and the share of mass down to each."""
    values, count = np.unique(z[kept], return_counts=True)
    mass = (count * np.exp(alpha * (values - z.max())))[::-1]
    return values[::-1], mass.cumsum() / mass.sum()


def true_support(
    logits: Tensor,
    alpha: float,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """logits [C, V] -> bool [C, V], one warper after the other; top_p must not be on a boundary."""
    rows = []
    for z in logits.double().numpy():
        kept = z > -np.inf
        if top_k is not None:
            kept &= z >= np.sort(z)[::-1][min(top_k, len(z)) - 1]
        if top_p is not None and top_p < 1:
            values, shares = shares_of(z, alpha, kept)
            if np.abs(shares - top_p)[:-1].min(initial=1.0) <= BOUNDARY:
                raise OnBoundary
            kept &= z >= values[np.argmax(shares >= top_p)]
        if min_p is not None and alpha > 0:
            kept &= alpha * (z - z.max()) >= np.log(min_p)
        rows.append(kept)
    return torch.from_numpy(np.stack(rows))


def off_boundaries(logits: Tensor, alpha: float, bounds: dict[str, Any]) -> dict[str, Any]:
    """The bounds with a top_p near by at which the support of all rows is beyond doubt."""
    for k in range(50):
        near = dict(bounds)
        if "top_p" in bounds:
            near["top_p"] *= 1 - 2.3 * k * BOUNDARY
        try:
            true_support(logits, alpha, **near)
        except OnBoundary:
            continue
        return near
    raise AssertionError(f"no top_p near {bounds} is off the boundaries")


def threshold_of(device: str, logits: Tensor, alpha: float, bounds: dict[str, Any]) -> Tensor:
    options = ScoreOptions(alpha=alpha)
    support = Support(
        bounds.get("top_k", logits.shape[-1]), bounds.get("top_p", 1.0), bounds.get("min_p", 0.0)
    )
    module = implementation(logits.to(device), options)
    return module.support_threshold(logits.to(device), options, support).cpu().double()


def check(
    device: str, logits: Tensor, alpha: float, banned: Tensor | None = None, **bounds: Any
) -> None:
    """The support itself, log_z over it, the scores beside it, and that the tokens are in it."""
    bounds = off_boundaries(logits, alpha, bounds)
    support = true_support(logits, alpha, **bounds)
    threshold = threshold_of(device, logits, alpha, bounds)
    found = (logits.double() >= threshold[:, None]) & (logits > -torch.inf)
    assert torch.equal(found, support), (bounds, found.sum(-1), support.sum(-1))

    num_rows, vocab = logits.shape
    counters = counters_for(num_rows).to(device)
    x = logits.to(device)
    samples = sample_tokens(
        x,
        alpha=alpha,
        seed=1,
        counters=counters,
        banned=None if banned is None else banned.to(device),
        entropy=True,
        **bounds,
    )
    scores = score_tokens(x, samples.token, alpha=alpha, entropy=True)
    assert torch.equal(samples.log_prob, scores.log_prob)
    assert torch.equal(samples.entropy, scores.entropy)

    allowed = support.clone()
    if banned is not None:
        entry = torch.arange(vocab)
        allowed &= entry != banned[:, None]
        allowed[~allowed.any(-1)] = support[~allowed.any(-1)]
    token = samples.token.cpu()
    assert allowed.gather(1, token[:, None]).all()

    log_p = torch.log_softmax(logits.double(), -1)
    masked = (alpha * log_p).masked_fill(~support, -torch.inf)
    exact = torch.logsumexp(masked, -1)
    error = (samples.log_z.cpu().double() - exact).abs()
    assert (error <= LOG_Z_ERROR * (1 + alpha) * (1 + exact.abs())).all(), (bounds, error)
    if alpha >= 1:
        assert (samples.log_z <= 0).all()


BOUNDS: tuple[dict[str, Any], ...] = (
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 10**9},
    {"top_p": 0.9},
    {"top_p": 1e-9},
    {"min_p": 0.03},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.8},
    {"top_k": 7, "min_p": 0.1},
    {"top_k": 900, "top_p": 0.95, "min_p": 0.001},
)


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 4.0, 7.3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_support(backend, dtype, alpha, bounds, generator):
    for vocab in (1, 2, 127, 1024, 5000):
        logits = random_logits((5, vocab), dtype, generator)
        check("cpu", logits, alpha, **bounds)
        check("cpu", logits, alpha, banned=torch.tensor([-1, 0, vocab - 1, 0, 0]), **bounds)


@pytest.mark.parametrize("alpha", [1.0, 2.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_support_of_a_real_vocabulary(backend, dtype, alpha, generator):
    logits = random_logits((2, 50257), dtype, generator)
    for bounds in (*BOUNDS, {"top_k": 3000}, {"top_k": 30_000}, {"top_k": 20_000, "top_p": 0.5}):
        check("cpu", logits, alpha, **bounds)


@pytest.mark.parametrize(
    ("dtype", "alpha"),
    tiers.every(
        4,
        [
            *((torch.float32, alpha) for alpha in (1.0, 0.0, 2.5)),
            (DTYPES[2], 0.7),
            (DTYPES[1], 4.0),
        ],
        of_several=True,
    ),
)
def test_the_support_by_the_kernels(kernel_device, dtype, alpha, generator):
    for vocab, some in ((1, BOUNDS[::3]), (2, BOUNDS[::4]), (127, BOUNDS[::2]), (1500, BOUNDS)):
        logits = random_logits((2, vocab), dtype, generator)
        for bounds in some if kernel_device == "cpu" else BOUNDS:
            check(kernel_device, logits, alpha, banned=torch.tensor([-1, 0]), **bounds)


@pytest.mark.parametrize("dtype", tiers.every(3, DTYPES[2::-1]))
def test_the_support_of_a_real_vocabulary_by_the_kernels(kernel_device, dtype, generator):
    logits = random_logits((1, 50257), dtype, generator)
    check(kernel_device, logits, 1.0, top_k=3000, top_p=0.9, min_p=1e-3)
    check(kernel_device, logits, 0.5, top_k=30_000)


@pytest.mark.parametrize("offset", [0.0, -1e3, 300.0])
@pytest.mark.parametrize("order", ["rising", "falling"])
def test_sorted_logits_far_from_zero(backend, order, offset):
    """Rising, every slice holds more of the largest than all before it."""
    logits = torch.linspace(-9, 9, 6000)[None] + offset
    logits = logits.flip(1) if order == "falling" else logits
    for bounds in (*BOUNDS, {"top_k": 1500}, {"top_k": 2600}):
        check("cpu", logits, 1.0, **bounds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_how_near_to_a_boundary_top_p_may_be(backend, dtype, generator):
    logits = (3 * torch.randn(1, 3000, generator=generator)).to(dtype)
    check_boundaries("cpu", logits, BOUNDARY if dtype == torch.float32 else 1e-12)


@pytest.mark.slow
def test_how_near_to_a_boundary_top_p_may_be_for_the_kernels(kernel_device, generator):
    check_boundaries(kernel_device, 3 * torch.randn(1, 600, generator=generator), BOUNDARY)


def check_boundaries(device: str, logits: Tensor, distance: float) -> None:
    z = logits.double().numpy()[0]
    for alpha in (0.7, 2.5, 4.0):
        values, shares = shares_of(z, alpha, z > -np.inf)
        wide = np.nonzero(np.diff(shares) > 3 * distance)[0]
        for i in wide[:: max(1, len(wide) // 5)]:
            for top_p, last in ((shares[i] - distance, i), (shares[i] + distance, i + 1)):
                if 0 < top_p < 1 and (i == 0 or top_p > shares[i - 1]):
                    threshold = threshold_of(device, logits, alpha, {"top_p": float(top_p)})
                    assert (z >= threshold.item()).sum() == (z >= values[last]).sum()


def warped(logits: Tensor, alpha: float, bounds: dict[str, Any]) -> Tensor:
    """bool [C, V] by transformers' warpers at temperature 1 / alpha."""
    warpers = pytest.importorskip("transformers.generation.logits_process")
    kinds = {
        "top_k": warpers.TopKLogitsWarper,
        "top_p": warpers.TopPLogitsWarper,
        "min_p": warpers.MinPLogitsWarper,
    }
    scores = warpers.TemperatureLogitsWarper(1 / alpha)(None, logits.double())
    for name, kind in kinds.items():
        if name in bounds:
            scores = kind(bounds[name])(None, scores)
    return scores > -torch.inf


def without_ties(vocab: int, generator: torch.Generator) -> Tensor:
    drawn = (3 * torch.randn(4 * vocab, generator=generator)).unique()
    assert len(drawn) >= 3 * vocab
    return drawn[torch.randperm(len(drawn), generator=generator)[: 3 * vocab]].view(3, vocab)


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("alpha", [0.5, 1.0, 4.0])
def test_the_support_is_that_of_transformers(backend, alpha, bounds, generator):
    for vocab in (5, 127, 1100):
        logits = without_ties(vocab, generator)
        threshold = threshold_of("cpu", logits, alpha, bounds)
        expected = warped(logits, alpha, bounds)
        assert torch.equal(logits >= threshold[:, None], expected)


@pytest.mark.parametrize("bounds", tiers.every(3, BOUNDS), ids=str)
def test_the_support_by_the_kernels_is_that_of_transformers(kernel_device, bounds, generator):
    logits = without_ties(600, generator)
    threshold = threshold_of(kernel_device, logits, 2.0, bounds)
    assert torch.equal(logits >= threshold[:, None], warped(logits, 2.0, bounds))


TIES = torch.tensor(
    [
        [2.0, 1.0, 1.0, 1.0, 0.0, -0.0, 0.0, -3.0, -torch.inf],
        [0.0, -0.0, -0.0, 0.0, -1.0, -1.0, -1.0, -torch.inf, -torch.inf],
        [5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0],
        [-1.0, -1.0, -2.0, -2.0, -2.0, -2.0, -3.0, -3.0, -4.0],
    ]
)
TIED_BOUNDS = (
    *({"top_k": k} for k in range(1, 10)),
    *({"top_p": p} for p in (0.05, 0.31, 0.52, 0.77, 0.983)),
    *({"top_k": k, "top_p": p} for k in (2, 5) for p in (0.52, 0.77)),
    {"min_p": 1.0},
    {"top_k": 2, "min_p": 0.3},
)


@pytest.mark.parametrize("bounds", TIED_BOUNDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_with_the_threshold_are_in(backend, dtype, bounds):
    for alpha in (0.0, 1.0, 4.0):
        check("cpu", TIES.to(dtype), alpha, **bounds)


@pytest.mark.parametrize("bounds", tiers.every(5, TIED_BOUNDS), ids=str)
def test_ties_with_the_threshold_are_in_for_the_kernels(kernel_device, bounds):
    for dtype in (torch.float32, torch.bfloat16):
        check(kernel_device, TIES.to(dtype), 1.0, **bounds)


@pytest.mark.parametrize("equal", [0.0, -7.25])
def test_a_row_of_equal_logits_has_them_all(backend, equal):
    for bounds in BOUNDS:
        check("cpu", torch.full((1, 3000), equal), 1.0, **bounds)


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e30, 3e38])
def test_logits_of_any_size(backend, scale, generator):
    logits = scale * (2 * torch.rand(2, 1200, generator=generator) - 1)
    for bounds in ({"top_k": 1}, {"top_k": 50}, {"top_k": 700}, {"min_p": 1.0}):
        check("cpu", logits, 0.0, **bounds)
        threshold = threshold_of("cpu", logits, 2.0, bounds)
        assert torch.equal(logits >= threshold[:, None], true_support(logits, 2.0, **bounds))


def test_doubles_as_far_apart_as_can_be(compiled_backend):
    """Their difference is no double."""
    logits = torch.tensor([[1.7e308, -1.7e308, 0.0, 1.6e308]], dtype=torch.float64)
    for top_k, size in ((1, 1), (2, 2), (3, 3), (4, 4)):
        for top_p in (1.0, 0.5):
            bounds = {"top_k": top_k, "top_p": top_p}
            threshold = threshold_of("cpu", logits, 0.0, bounds)
            assert (logits >= threshold).sum() == math.ceil(size * top_p)


SMALL = torch.tensor([0.3, -1.0, 2.0, -torch.inf, 1.9, 0.0])


def truncated_law(logits: Tensor, alpha: float, banned: int | None, **bounds: Any) -> Tensor:
    support = true_support(logits[None], alpha, **bounds)[0]
    return power_law(logits.masked_fill(~support, -torch.inf), alpha, banned)


def draw_many(logits: Tensor, alpha: float, banned: int | None, **bounds: Any) -> Tensor:
    return sample_tokens(
        logits.expand(DRAWS, -1),
        alpha=alpha,
        seed=3,
        counters=counters_for(DRAWS),
        banned=None if banned is None else torch.full((DRAWS,), banned),
        **bounds,
    ).token


@pytest.mark.parametrize("bounds", [{"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.1}], ids=str)
@pytest.mark.parametrize("banned", [None, 1, 2, 4])
@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.5])
def test_the_law_of_the_draws(backend, alpha, banned, bounds):
    tokens = draw_many(SMALL, alpha, banned, **bounds)
    law = truncated_law(SMALL, alpha, banned, **bounds)
    assert chi_square_p_value(tokens, law) > SIGNIFICANCE


@pytest.mark.parametrize("banned", [None, 1501])
def test_the_law_across_slices(compiled_backend, banned, generator):
    logits = 2 * torch.randn(2500, generator=generator)
    logits[::3] = -torch.inf
    logits[1501] = 8.0
    bounds = {"top_k": 300, "top_p": 0.97}
    tokens = draw_many(logits, 1.0, banned, **bounds)
    law = truncated_law(logits, 1.0, banned, **bounds)
    assert (law > 0).sum() > 20
    assert chi_square_p_value(tokens, law) > SIGNIFICANCE


def test_the_chi_square_test_rejects_another_support(compiled_backend):
    tokens = draw_many(SMALL, 1.0, None, top_k=3)
    assert chi_square_p_value(tokens, truncated_law(SMALL, 1.0, None, top_k=4)) < SIGNIFICANCE
    with pytest.raises(AssertionError, match="impossible token"):
        chi_square_p_value(tokens, truncated_law(SMALL, 1.0, None, top_k=2))


@pytest.mark.parametrize("bounds", [{"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.05}], ids=str)
@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.5])
def test_every_backend_draws_the_tokens_of_the_reference(backend, alpha, bounds, generator):
    check_draws("cpu", 500, 3000, alpha, bounds, generator, allowed=2)


@pytest.mark.parametrize("bounds", [{"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.05}], ids=str)
@pytest.mark.parametrize("alpha", [1.0, 2.5])
def test_the_kernels_draw_the_tokens_of_the_reference(kernel_device, alpha, bounds, generator):
    rows = 2000 if kernel_device == "cuda" else 12
    check_draws(kernel_device, rows, 1500, alpha, bounds, generator, allowed=rows // 1000)


def check_draws(
    device: str,
    rows: int,
    vocab: int,
    alpha: float,
    bounds: dict[str, Any],
    generator: torch.Generator,
    allowed: int,
) -> None:
    """Equal supports, equal uniforms, equal masses up to rounding."""
    logits = 2 * torch.randn(rows, vocab, generator=generator)
    banned = torch.randint(-1, vocab, (rows,), generator=generator)
    banned[::3] = logits[::3].argmax(-1)
    support = Support(
        bounds.get("top_k", vocab), bounds.get("top_p", 1.0), bounds.get("min_p", 0.0)
    )
    expected = reference.draw_tokens(
        logits,
        alpha=alpha,
        seed=torch.tensor([4]),
        counters=counters_for(rows),
        banned=banned,
        support=support,
    )
    got = sample_tokens(
        logits.to(device),
        alpha=alpha,
        seed=4,
        counters=counters_for(rows).to(device),
        banned=banned.to(device),
        **bounds,
    )
    assert (got.token.cpu() != expected).sum() <= allowed


def check_bans(device: str) -> None:
    """In the support it leaves the others; outside of it it does nothing; alone it is drawn."""
    rows = 12
    logits = torch.tensor([3.0, 2.5, -1.0, 2.0, -torch.inf]).expand(rows, -1).to(device)
    counters = counters_for(rows).to(device)

    def drawn(banned: int, top_k: int) -> Tensor:
        return sample_tokens(
            logits,
            seed=0,
            counters=counters,
            banned=torch.full((rows,), banned, device=device),
            top_k=top_k,
        ).token

    assert set(drawn(0, 3).tolist()) == {1, 3}
    assert set(drawn(-1, 2).tolist()) == {0, 1}
    assert torch.equal(drawn(2, 2), drawn(-1, 2))
    assert torch.equal(drawn(4, 2), drawn(-1, 2))
    assert set(drawn(0, 1).tolist()) == {0}
    assert set(drawn(1, 1).tolist()) == {0}


def test_banned_in_and_outside_of_the_support(backend):
    check_bans("cpu")


@pytest.mark.slow
def test_banned_in_and_outside_of_the_support_by_the_kernels(kernel_device):
    check_bans(kernel_device)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.5])
def test_a_bound_that_leaves_all_changes_no_bit(backend, alpha, generator):
    check_no_bound("cpu", alpha, generator)


def test_a_bound_that_leaves_all_changes_no_bit_of_the_kernels(kernel_device, generator):
    check_no_bound(kernel_device, 2.5, generator)


def check_no_bound(device: str, alpha: float, generator: torch.Generator) -> None:
    logits = random_logits((4, 1300), torch.float32, generator).to(device)
    arguments = {"alpha": alpha, "seed": 2, "counters": counters_for(4).to(device), "entropy": True}
    expected = sample_tokens(logits, **arguments)
    for bounds in ({"top_k": 1300, "top_p": 1, "min_p": 0}, {"top_k": 2**70}, {"top_p": 1.0}):
        got = sample_tokens(logits, **arguments, **bounds)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("bounds", [{"top_k": 30, "top_p": 0.9}, {"min_p": 0.01}], ids=str)
@pytest.mark.parametrize("vocab", [50, 5000])
def test_a_row_depends_on_itself_alone(backend, vocab, bounds, generator, restore_threads):
    logits = 3 * torch.randn(33, vocab, generator=generator)
    counters = counters_for(33)
    banned = torch.randint(-1, vocab, (33,), generator=generator)

    def draw(rows: Tensor) -> list[Tensor]:
        arguments = {"counters": counters[rows], "banned": banned[rows]}
        return list(
            sample_tokens(logits[rows], alpha=2, seed=9, entropy=True, **arguments, **bounds)
        )

    every = torch.arange(33)
    first = draw(every)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        for rows in (every, every.flip(0), every[:1], every[17:18], every[3:7]):
            assert all(torch.equal(a, b[rows]) for a, b in zip(draw(rows), first, strict=True))


def test_a_row_depends_on_itself_alone_in_the_kernels(kernel_device, generator):
    logits = 3 * torch.randn(4, 1500, generator=generator).to(kernel_device)
    counters = counters_for(4).to(kernel_device)

    def draw(rows: list[int]) -> list[Tensor]:
        arguments = {"counters": counters[rows], "top_k": 200, "top_p": 0.9}
        return list(sample_tokens(logits[rows], alpha=2, seed=9, entropy=True, **arguments))

    first = draw([0, 1, 2, 3])
    for rows in ([3, 1], [2]):
        assert all(torch.equal(a, b[rows]) for a, b in zip(draw(rows), first, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_without_a_softmax(backend, dtype):
    check_bad_rows("cpu", dtype)


def test_rows_without_a_softmax_by_the_kernels(kernel_device):
    check_bad_rows(kernel_device, torch.float32)


def check_bad_rows(device: str, dtype: torch.dtype) -> None:
    logits = torch.zeros(6, 1300, dtype=dtype)
    logits[0, 1100] = torch.nan
    logits[1, 5] = torch.inf
    logits[2] = -torch.inf
    logits[3] = torch.nan
    logits[4] = -torch.inf
    logits[4, 1200] = 3.0
    banned = torch.tensor([-1, 7, 7, -1, 1200, -1])
    for bounds in ({"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.5}, {"top_k": 5, "top_p": 0.5}):
        samples = sample_tokens(
            logits.to(device),
            alpha=2,
            seed=0,
            counters=counters_for(6).to(device),
            banned=banned.to(device),
            entropy=True,
            **bounds,
        )
        assert samples.token[:5].tolist() == [-1, -1, -1, -1, 1200]
        assert samples.token[5] >= 0
        for score in samples[1:]:
            assert score[:4].isnan().all()
            assert score[4:].isfinite().all()


def check_layouts(device: str, generator: torch.Generator) -> None:
    base = torch.randn(6, 2, 900, generator=generator).to(device)
    for logits in (base[:, 1], base[::2, 0], base[:, 0, ::2], base[:, 0].T[:7], base[:0, 0]):
        arguments = {"alpha": 4, "seed": 0, "counters": counters_for(len(logits)).to(device)}
        got = sample_tokens(logits, **arguments, top_k=5, top_p=0.9)
        expected = sample_tokens(logits.contiguous(), **arguments, top_k=5, top_p=0.9)
        assert torch.equal(got.token, expected.token)
        assert torch.equal(got.log_z, expected.log_z)


def test_strides(backend, generator):
    check_layouts("cpu", generator)


@pytest.mark.slow
def test_strides_in_the_kernels(kernel_device, generator):
    check_layouts(kernel_device, generator)


@pytest.mark.skipif(not triton_device.INTERPRETED, reason="on a GPU the whole size is tested")
def test_offsets_beyond_2_to_the_31(kernel_device, generator):
    logits = torch.randn(2, 1100, generator=generator).bfloat16()
    arguments = {"alpha": 2, "seed": 0, "counters": counters_for(2), "top_k": 40, "top_p": 0.8}
    near, far = (sample_tokens(rows, **arguments) for rows in (logits, far_apart(logits)))
    assert torch.equal(near.token, far.token)
    assert torch.equal(near.log_z, far.log_z)


def test_logits_that_require_a_gradient(backend):
    logits = torch.zeros(2, 5, requires_grad=True)
    arguments = {"seed": 0, "counters": counters_for(2)}
    for bounds in ({"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.0}):
        with pytest.raises(ValueError, match="gradient"):
            sample_tokens(logits, **arguments, **bounds)
        sample_tokens(logits.detach(), **arguments, **bounds)
        with torch.no_grad():
            sample_tokens(logits, **arguments, **bounds)


@pytest.mark.parametrize(
    "bounds", [(3, None, None), (None, 0.5, None), (None, None, 0.5), (3, 0.5, 0.1)], ids=str
)
@pytest.mark.parametrize("entropy", [False, True])
def test_opcheck(backend, entropy, bounds, generator):
    logits = torch.randn(3, 50, generator=generator)
    arguments = (logits, counters_for(3), torch.tensor([5]), torch.tensor([-1, 0, 49]), 2.0)
    op = torch.ops.powerkernels.sample_tokens.default
    torch.library.opcheck(op, (*arguments, entropy, *bounds))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_as_one_graph(backend, compiler, dynamic, generator):
    logits, counters = torch.randn(3, 50, generator=generator), counters_for(3)

    def drawn(logits: Tensor, counters: Tensor, top_k: int, top_p: float) -> tuple[Tensor, ...]:
        samples = sample_tokens(
            logits * 2, alpha=4, seed=5, counters=counters, top_k=top_k, top_p=top_p, min_p=0.01
        )
        return samples.token + 1, samples.log_prob + samples.log_z

    compiled = torch.compile(drawn, fullgraph=True, backend=compiler, dynamic=dynamic)
    for bounds in ((7, 0.9), (60, 0.5)):
        expected = drawn(logits, counters, *bounds)
        got = compiled(logits, counters, *bounds)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    ("bounds", "error", "names"),
    [
        ({"top_k": 0}, ValueError, "top_k must be an int >= 1, got 0"),
        ({"top_k": -3}, ValueError, "top_k"),
        ({"top_k": 2.0}, TypeError, "top_k must be an int >= 1, got float 2.0"),
        ({"top_k": True}, TypeError, "top_k"),
        ({"top_k": torch.tensor(3)}, TypeError, "top_k"),
        ({"top_p": 0}, ValueError, "top_p must be a finite number > 0 and <= 1, got 0"),
        ({"top_p": 1.01}, ValueError, "top_p"),
        ({"top_p": math.nan}, ValueError, "top_p"),
        ({"top_p": "0.5"}, TypeError, "top_p"),
        ({"top_p": True}, TypeError, "top_p"),
        ({"min_p": -0.1}, ValueError, "min_p must be a finite number >= 0 and <= 1, got -0.1"),
        ({"min_p": 1.5}, ValueError, "min_p"),
        ({"min_p": math.inf}, ValueError, "min_p"),
        ({"min_p": torch.tensor([0.1])}, TypeError, "min_p"),
    ],
)
@pytest.mark.each_value
def test_bad_arguments(backend, bounds, error, names):
    with pytest.raises(error, match=names):
        sample_tokens(torch.zeros(2, 5), seed=0, counters=counters_for(2), **bounds)


@given(
    values=st.lists(
        st.floats(width=32) | st.sampled_from([0.0, -0.0, 1.0, math.nan, math.inf, -math.inf]),
        min_size=1,
        max_size=8,
    ),
    alpha=st.floats(0, 9) | st.sampled_from([0.0, 1.0, 2.5, 4.0]),
    banned=st.integers(-1, 7),
    top_k=st.none() | st.integers(1, 9),
    top_p=st.none() | st.floats(0, 1, exclude_min=True),
    min_p=st.none() | st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_row_and_bounds_give_a_possible_token(
    values, alpha, banned, top_k, top_p, min_p, dtype
):
    banned = min(banned, len(values) - 1)
    samples = sample_tokens(
        torch.tensor([values], dtype=dtype),
        alpha=alpha,
        seed=0,
        counters=counters_for(1),
        banned=torch.tensor([banned]),
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )
    token = int(samples.token)
    if any(math.isnan(x) or x == math.inf for x in values) or max(values) == -math.inf:
        assert token == -1
        return
    falling = sorted(values, reverse=True)
    kth = falling[min(top_k or len(values), len(values)) - 1]
    support = [i for i, x in enumerate(values) if x > -math.inf and x >= kth]
    # top_p and min_p leave the largest, whatever they are.
    best = [i for i in support if values[i] == max(values)]
    allowed = [i for i in support if i != banned] if best != [banned] else support
    assert token in allowed
    if alpha >= 1:
        assert samples.log_z <= 0
    if min_p == 1 and alpha > 1e-30 and len(set(best) - {banned}) > 0:
        assert token in best


needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class TestOnAGpu:
    """What only a GPU can show."""

    pytestmark = needs_gpu

    @pytest.fixture(autouse=True)
    def use_the_kernels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("POWERKERNELS_BACKEND", "triton")

    def test_in_a_cuda_graph(self):
        generator = torch.Generator("cuda").manual_seed(0)
        logits = torch.randn(64, 151936, device="cuda", generator=generator).bfloat16()
        counters, seed = counters_for(64).cuda(), torch.tensor([3], device="cuda")
        static = logits.clone()

        def work() -> list[Tensor]:
            arguments = {"seed": seed, "counters": counters, "top_k": 50, "top_p": 0.9}
            samples = sample_tokens(static, alpha=2, entropy=True, min_p=0.001, **arguments)
            return list(samples)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = work()
        static.copy_(logits.flip(0))
        graph.replay()
        expected = work()
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))

    def test_nothing_waits_for_the_device(self):
        logits = torch.randn(64, 50257, device="cuda")
        arguments = {"alpha": 2, "counters": counters_for(64).cuda(), "top_k": 50, "top_p": 0.9}
        sample_tokens(logits, seed=0, **arguments)  # compiles
        with waits_are_errors():
            sample_tokens(logits, seed=0, **arguments)

    @pytest.mark.gpu_memory(5)  # the logits, 4.4 GB
    def test_more_than_2_to_the_31_elements(self):
        rows, vocab = 16600, 131072
        logits = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda")
        logits[-1] = torch.linspace(-3, 3, vocab)
        arguments = {"alpha": 2.0, "seed": 0, "top_k": 50}
        counters = counters_for(rows).cuda()
        last = sample_tokens(logits[-1:].clone(), counters=counters[-1:], **arguments)
        every = sample_tokens(logits, counters=counters, **arguments)
        assert all(torch.equal(a[-1:], b) for a, b in zip(every[:3], last[:3], strict=True))
