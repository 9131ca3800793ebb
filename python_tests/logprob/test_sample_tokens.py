from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2
from torch import Tensor

from powerkernels import _extension, sample_tokens, score_tokens
from powerkernels.logprob import reference

# A right sampler fails a test at this level once in a million seeds; the seed here is fixed.
SIGNIFICANCE = 1e-6
DRAWS = 100_000
# The reference is slow, and is compared with the others token by token.
REFERENCE_DRAWS = 20_000
# Bins are joined until each expects this many draws, as the chi-square approximation wants.
MIN_EXPECTED = 20


def counters_for(num_rows: int) -> Tensor:
    index = torch.arange(num_rows)
    return torch.stack((torch.zeros_like(index), index, index % 7, index + 11), dim=-1)


def power_law(logits: Tensor, alpha: float, banned: int | None = None) -> Tensor:
    log_p = torch.log_softmax(logits.double(), -1)
    mass = (alpha * log_p).exp().masked_fill(log_p == -torch.inf, 0.0)
    if banned is not None:
        mass[banned] = 0.0
    return mass / mass.sum()


def chi_square_p_value(tokens: Tensor, law: Tensor) -> float:
    counts = torch.bincount(tokens, minlength=len(law)).double()
    assert counts[law == 0].sum() == 0, "an impossible token was drawn"
    expected, order = (law * len(tokens)).sort(descending=True)
    counts = counts[order]
    joined = torch.div(expected.cumsum(0), MIN_EXPECTED, rounding_mode="floor").long()
    bins = torch.where(expected >= MIN_EXPECTED, torch.arange(len(law)), len(law) + joined)
    _, bins = bins.unique(return_inverse=True)
    size = int(bins.max()) + 1
    want = torch.zeros(size, dtype=torch.float64).index_add(0, bins, expected)
    have = torch.zeros(size, dtype=torch.float64).index_add(0, bins, counts)
    kept = want > 0
    if kept.sum() == 1:
        return 1.0
    statistic = ((have - want)[kept] ** 2 / want[kept]).sum().item()
    return float(chi2.sf(statistic, int(kept.sum()) - 1))


def draw_many(logits: Tensor, alpha: float, banned: int | None = None, seed: int = 3) -> Tensor:
    draws = REFERENCE_DRAWS if _extension.backend_for("cpu") == "reference" else DRAWS
    return sample_tokens(
        logits.expand(draws, -1),
        alpha=alpha,
        seed=seed,
        counters=counters_for(draws),
        banned=None if banned is None else torch.full((draws,), banned),
    ).token


SMALL = torch.tensor([0.3, -1.0, 2.0, -torch.inf, 1.9, 0.0])


@pytest.mark.parametrize("banned", [None, 2, 3])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 4.0])
def test_law_of_a_small_vocabulary(backend, alpha, banned):
    tokens = draw_many(SMALL, alpha, banned)
    assert chi_square_p_value(tokens, power_law(SMALL, alpha, banned)) > SIGNIFICANCE


@pytest.mark.parametrize("banned", [None, 1501])
def test_law_across_slices(backend, banned, generator, monkeypatch):
    logits = 2 * torch.randn(2500, generator=generator)
    logits[::3] = -torch.inf
    logits[1501] = 8.0
    if backend == "reference":  # many long rows in float64 take their time
        monkeypatch.setattr(reference, "SLICE_V", 16)
        logits, banned = logits[1490:1540], None if banned is None else 11
    tokens = draw_many(logits, 1.0, banned)
    assert chi_square_p_value(tokens, power_law(logits, 1.0, banned)) > SIGNIFICANCE


def test_the_chi_square_test_rejects_what_is_wrong(backend):
    other_power = draw_many(SMALL, 1.1)
    assert chi_square_p_value(other_power, power_law(SMALL, 1.0)) < SIGNIFICANCE
    other_logit = SMALL + torch.tensor([0.3, 0, 0, 0, 0, 0])
    assert chi_square_p_value(draw_many(SMALL, 1.0), power_law(other_logit, 1.0)) < SIGNIFICANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.5, 4.0, 7.3])
@pytest.mark.parametrize("vocab", [1, 127, 1024, 5000])
def test_scores_have_the_bits_of_score_tokens(backend, vocab, alpha, dtype, generator):
    logits = (3 * torch.randn(9, vocab, generator=generator)).to(dtype)
    logits[:, 1::5] = -torch.inf
    for banned in (None, torch.arange(-1, 8).clamp(max=vocab - 1)):
        samples = sample_tokens(
            logits, alpha=alpha, seed=1, counters=counters_for(9), banned=banned, entropy=True
        )
        scores = score_tokens(logits, samples.token, alpha=alpha, entropy=True)
        for value, score in zip(samples[1:], scores, strict=True):
            assert value.dtype == score.dtype
            assert torch.equal(value, score)


@pytest.mark.parametrize("vocab", [50, 5000])
def test_a_row_depends_on_itself_alone(backend, vocab, generator, restore_threads):
    logits = 3 * torch.randn(33, vocab, generator=generator)
    counters = counters_for(33)
    banned = torch.randint(-1, vocab, (33,), generator=generator)

    def draw(rows: Tensor) -> list[Tensor]:
        return list(
            sample_tokens(
                logits[rows],
                alpha=4,
                seed=9,
                counters=counters[rows],
                banned=banned[rows],
                entropy=True,
            )
        )

    every = torch.arange(33)
    first = draw(every)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        shuffled = torch.randperm(33, generator=generator)
        for rows in (every, every.flip(0), shuffled, every[:1], every[17:18], every[3:7]):
            assert all(torch.equal(a, b[rows]) for a, b in zip(draw(rows), first, strict=True))


def test_other_counters_and_seeds_give_other_tokens(backend):
    logits = torch.zeros(1, 20_000)
    tokens = {
        sample_tokens(logits, seed=seed, counters=torch.tensor([counter])).token.item()
        for seed in (0, 1, 2**32, 2**63)
        for counter in ([0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1])
    }
    assert len(tokens) == 20


def test_a_seed_may_be_a_tensor(backend):
    logits, counters = torch.zeros(50, 1000), counters_for(50)
    by_int = sample_tokens(logits, seed=2**63 + 5, counters=counters)
    by_tensor = sample_tokens(logits, seed=torch.tensor([-(2**63) + 5]), counters=counters)
    assert torch.equal(by_int.token, by_tensor.token)


@functools.cache
def reference_draws(alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(8)
    logits = 2 * torch.randn(2000, 3000, generator=generator)
    banned = torch.randint(-1, 3000, (2000,), generator=generator)
    token, *_ = reference.sample_tokens(
        logits,
        alpha=alpha,
        seed=torch.tensor([4]),
        counters=counters_for(2000),
        banned=banned,
        entropy=False,
    )
    return logits, banned, token


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.5, 4.0])
def test_every_backend_draws_the_tokens_of_the_reference(backend, alpha):
    """Equal uniforms, equal masses up to rounding: they differ only within rounding of a bound."""
    logits, banned, expected = reference_draws(alpha)
    got = sample_tokens(logits, alpha=alpha, seed=4, counters=counters_for(2000), banned=banned)
    assert (got.token != expected).sum() <= 2


def test_nothing_but_the_banned_token(backend):
    logits = torch.full((2, 1500), -torch.inf)
    logits[:, 1200] = 3.0
    samples = sample_tokens(
        logits, alpha=4, seed=0, counters=counters_for(2), banned=torch.tensor([1200, -1])
    )
    assert samples.token.tolist() == [1200, 1200]
    assert samples.log_prob.tolist() == [0.0, 0.0]


def test_a_banned_token_that_has_almost_all_mass(backend):
    """Subtracting its mass would leave rounding errors; the others' law must be exact still."""
    others = torch.tensor([1.0, 0.5, -torch.inf, 0.0])
    logits = torch.cat((others, torch.tensor([300.0])))
    tokens = draw_many(logits, 1.0, banned=4)
    assert chi_square_p_value(tokens, power_law(others, 1.0)) > SIGNIFICANCE


def test_rows_without_a_softmax(backend):
    logits = torch.zeros(4, 1300)
    logits[0, 1100] = torch.nan
    logits[1, 5] = torch.inf
    logits[2] = -torch.inf
    samples = sample_tokens(logits, alpha=2, seed=0, counters=counters_for(4), entropy=True)
    assert samples.token[:3].tolist() == [-1, -1, -1]
    assert samples.token[3] >= 0
    for score in samples[1:]:
        assert score[:3].isnan().all()
        assert score[3].isfinite()


def test_strides(backend, generator):
    base = torch.randn(6, 2, 900, generator=generator)
    for logits in (base[:, 1], base[::2, 0], base[:, 0, ::2], base[:, 0].T):
        num_rows = logits.shape[0]
        counters = counters_for(2 * num_rows)[::2]
        got = sample_tokens(logits, alpha=4, seed=0, counters=counters)
        expected = sample_tokens(
            logits.contiguous(), alpha=4, seed=0, counters=counters.contiguous()
        )
        assert torch.equal(got.token, expected.token)
        assert torch.equal(got.log_prob, expected.log_prob)


def test_no_rows(backend):
    samples = sample_tokens(torch.zeros(0, 5), seed=0, counters=counters_for(0), entropy=True)
    assert [len(value) for value in samples] == [0, 0, 0, 0]


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 0.75, 1 - 2**-53])
def test_inverse_cdf_never_returns_what_has_no_mass(fraction):
    mass = torch.tensor([[0.0, 1.0, 0.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    index = reference.inverse_cdf(mass, torch.tensor([fraction], dtype=torch.float64))
    assert index.item() == (1 if fraction < 0.5 else 4)


def test_gradients_of_the_scores(backend, generator):
    logits = torch.randn(3, 7, generator=generator, requires_grad=True)
    samples = sample_tokens(logits, alpha=2, seed=0, counters=counters_for(3))
    (grad,) = torch.autograd.grad(samples.log_prob.sum(), logits)
    one_hot = torch.nn.functional.one_hot(samples.token, 7)
    torch.testing.assert_close(grad, one_hot - logits.softmax(-1))


@pytest.mark.parametrize("with_banned", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
def test_opcheck(backend, entropy, with_banned, generator):
    logits = torch.randn(3, 50, generator=generator)
    banned = torch.tensor([-1, 0, 49]) if with_banned else None
    torch.library.opcheck(
        torch.ops.powerkernels.sample_tokens.default,
        (logits, counters_for(3), torch.tensor([5]), banned, 2.0, entropy),
    )


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("seed", [5, torch.tensor([5])])
def test_compiles_as_one_graph(backend, compiler, seed, generator):
    logits, counters = torch.randn(3, 50, generator=generator), counters_for(3)

    def drawn(logits, counters):
        samples = sample_tokens(logits * 2, alpha=4, seed=seed, counters=counters)
        return samples.token + 1, samples.log_prob + samples.log_z

    compiled = torch.compile(drawn, fullgraph=True, backend=compiler)
    for got, expected in zip(compiled(logits, counters), drawn(logits, counters), strict=True):
        assert torch.equal(got, expected)


LOGITS, COUNTERS = torch.zeros(2, 5), counters_for(2)


@pytest.mark.parametrize(
    ("logits", "changes", "error", "names"),
    [
        (LOGITS[0], {}, ValueError, "logits.*2 dimensions"),
        (LOGITS[:, :0], {}, ValueError, "logits.*vocabulary"),
        (LOGITS.long(), {}, TypeError, "logits"),
        (LOGITS, {"alpha": -1}, ValueError, "alpha"),
        (LOGITS, {"alpha": math.inf}, ValueError, "alpha"),
        (LOGITS, {"seed": 2**64}, ValueError, "seed"),
        (LOGITS, {"seed": 0.5}, TypeError, "seed"),
        (LOGITS, {"seed": torch.tensor([1, 2])}, TypeError, "seed"),
        (LOGITS, {"counters": COUNTERS[:1]}, ValueError, r"counters.*\[2, 4\].*\[1, 4\]"),
        (LOGITS, {"counters": COUNTERS.int()}, TypeError, "counters.*int32"),
        (LOGITS, {"banned": torch.tensor([0])}, ValueError, "banned"),
        (LOGITS, {"banned": torch.tensor([0.0, 1.0])}, TypeError, "banned"),
        (LOGITS, {"banned": torch.tensor([0, 5])}, IndexError, "banned.*5 at row 1"),
        (LOGITS, {"banned": torch.tensor([-2, 0])}, IndexError, "banned.*-2 at row 0"),
    ],
)
@pytest.mark.each_value
def test_bad_arguments(backend, logits, changes, error, names):
    with pytest.raises(error, match=names):
        sample_tokens(logits, **({"seed": 0, "counters": COUNTERS} | changes))


@given(
    values=st.lists(
        st.floats(width=32) | st.sampled_from([math.nan, math.inf, -math.inf]),
        min_size=1,
        max_size=8,
    ),
    alpha=st.floats(0, 9) | st.sampled_from([0.0, 1.0, 2.5, 4.0]),
    banned=st.integers(-1, 7),
    counter=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=4, max_size=4),
)
def test_any_row_gives_a_possible_token(values, alpha, banned, counter):
    logits = torch.tensor([values])
    banned = min(banned, len(values) - 1)
    samples = sample_tokens(
        logits,
        alpha=alpha,
        seed=0,
        counters=torch.tensor([counter]),
        banned=torch.tensor([banned]),
    )
    token = int(samples.token)
    if any(math.isnan(x) or x == math.inf for x in values) or max(values) == -math.inf:
        assert token == -1
        return
    possible = [i for i, x in enumerate(values) if x > -math.inf]
    assert token in ([i for i in possible if i != banned] or possible)
