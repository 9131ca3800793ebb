from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from powerkernels import score_tokens
from powerkernels.logprob import reference

ALPHAS = (0.0, 0.5, 1.0, 2.0, 2.5, 4.0, 7.3)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# One entry; two; less than a vector; one short of, exactly and one more than a slice; a real
# vocabulary; a large one, and odd.
VOCABS = (1, 2, 127, 1023, 1024, 1025, 50257, 151937)

# Error allowed: this many times the error of the same expression in torch's float32, plus a few
# float32 roundings of the result. Measured: at most 1.5 times on all levels.
ERROR_FACTOR = 2.0
ERROR_FLOOR = 2**-22


def truth(logits: Tensor, targets: Tensor, **options) -> list[Tensor]:
    settings_ = {
        "alpha": 1.0,
        "temperature": 1.0,
        "entropy": True,
        "softcap": None,
        "ignore_index": -100,
    }
    scores = reference.score_tokens(logits.double(), targets, **(settings_ | options))
    return list(scores)


def float32_expression(
    logits: Tensor, targets: Tensor, alpha: float, temperature: float
) -> list[Tensor]:
    """The scores as one writes them in torch, in float32."""
    log_p = torch.log_softmax(logits.float() / temperature, dim=-1)
    log_prob = log_p.gather(-1, targets[..., None].long()).squeeze(-1)
    masked = log_p == -torch.inf
    log_z = torch.logsumexp((alpha * log_p).masked_fill(masked, -torch.inf), dim=-1)
    return [log_prob, log_z, -(log_p.exp() * log_p.masked_fill(masked, 0.0)).sum(-1)]


def assert_close_to_truth(got: Tensor, exact: Tensor, expression: Tensor, what: str) -> None:
    finite = exact.isfinite()
    special = exact[~finite].to(got.dtype)
    torch.testing.assert_close(got[~finite], special, rtol=0, atol=0, equal_nan=True, msg=what)
    if not finite.any():
        return
    exact = exact[finite]
    error = (got[finite].double() - exact).abs()
    if got.dtype == torch.float64:
        # The same formula in another order: a few roundings of float64 times log V.
        assert (error <= 1e-12 * (1 + exact.abs())).all(), (what, error.max())
        return
    peer = (expression[finite].double() - exact).abs().max()
    allowed = ERROR_FACTOR * peer + ERROR_FLOOR * (1 + exact.abs())
    assert (error <= allowed).all(), (what, error.max(), peer)


def random_logits(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal logits, a fifth of them masked, entry 0 of every row never."""
    logits = 4 * torch.randn(shape, generator=generator)
    logits[torch.rand(shape, generator=generator) < 0.2] = -torch.inf
    logits[..., 0] = 1.0
    return logits.to(dtype)


class Case(NamedTuple):
    alpha: float
    temperature: float
    exact: list[Tensor]
    expression: list[Tensor]


@functools.cache
def cases(vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Case]]:
    """Logits, targets and what they should give; kept, because every backend wants the same."""
    generator = torch.Generator().manual_seed(vocab)
    rows = 2 if vocab > 50000 else 7
    logits = random_logits((rows, vocab), dtype, generator)
    targets = torch.randint(vocab, (rows,), generator=generator)
    alphas = ALPHAS if vocab < 50000 else (0.5, 4.0, 7.3)
    return (
        logits,
        targets,
        [
            Case(
                alpha,
                temperature,
                truth(logits, targets, alpha=alpha, temperature=temperature),
                float32_expression(logits, targets, alpha, temperature),
            )
            for alpha, temperature in itertools.product(alphas, (1.0, 0.7))
        ],
    )


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_are_the_truth(backend, dtype, vocab):
    logits, targets, expected = cases(vocab, dtype)
    for alpha, temperature, exact, expression in expected:
        got = score_tokens(logits, targets, alpha=alpha, temperature=temperature, entropy=True)
        for name, *values in zip(got._fields, got, exact, expression, strict=True):
            assert_close_to_truth(*values, f"{name} at alpha {alpha}, temperature {temperature}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_softcap(backend, dtype, generator):
    logits = random_logits((5, 2100), dtype, generator) * 10
    logits[0, 7] = 0.0
    targets = torch.randint(2100, (5,), generator=generator)
    for cap in (0.5, 30.0):
        got = score_tokens(logits, targets, alpha=2, entropy=True, softcap=cap)
        capped = (cap * torch.tanh(logits.float() / cap)).masked_fill(
            logits == -torch.inf, -torch.inf
        )
        exact = truth(logits, targets, alpha=2, softcap=cap)
        expression = float32_expression(capped, targets, 2, 1.0)
        for name, *values in zip(got._fields, got, exact, expression, strict=True):
            assert_close_to_truth(*values, f"{name} at softcap {cap}")


@pytest.mark.parametrize(
    ("offset", "alpha", "temperature"),
    [
        (1e4, 4.0, 1.0),
        (-1e4, 2.5, 1.0),
        (0.0, 1e6, 1.0),
        (0.0, 1e-6, 1.0),
        (0.0, 4.0, 1e-35),  # what a float32 exponent does not hold
        (0.0, 4.0, 1e35),
        (0.0, 1e-40, 1.0),
        (0.0, 1e33, 1.0),
    ],
)
def test_far_corners(backend, offset, alpha, temperature, generator):
    logits = torch.randn(4, 1500, generator=generator).mul(64).round().div(64) + offset
    logits[:, 5] = -torch.inf
    targets = logits.argmax(-1)
    got = score_tokens(logits, targets, alpha=alpha, temperature=temperature, entropy=True)
    exact = truth(logits, targets, alpha=alpha, temperature=temperature)
    for name, value, true in zip(got._fields, got, exact, strict=True):
        tolerance = 1e-6 * (1 + true.abs()) * max(1.0, alpha if name == "log_z" else 1.0)
        assert ((value.double() - true).abs() <= tolerance).all(), name


def test_float32_minimum_as_a_mask(backend):
    logits = torch.tensor([[0.0, 1.0, torch.finfo(torch.float32).min, 2.0]])
    got = score_tokens(logits, torch.tensor([2]), alpha=0.0, entropy=True)
    assert got.log_prob.item() == torch.finfo(torch.float32).min
    assert got.log_z.item() == pytest.approx(math.log(4))
    assert got.entropy.item() == pytest.approx(0.8323953)


def test_log_z_is_zero_at_one_and_has_a_sign_elsewhere(backend, generator):
    logits = random_logits((64, 1300), torch.float32, generator)
    logits[:32, 3] = 60.0  # all but certain: log_z is at rounding level
    targets = torch.zeros(64, dtype=torch.int64)
    assert (score_tokens(logits, targets, alpha=1.0).log_z == 0).all()
    for alpha in (1.0001, 2.0, 3.3):
        assert (score_tokens(logits, targets, alpha=alpha).log_z <= 0).all()
    for alpha in (0.0, 0.5, 0.999):
        assert (score_tokens(logits, targets, alpha=alpha).log_z >= 0).all()


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.5, 4.0, 7.3])
@pytest.mark.parametrize("bad", ["nan", "nan_payload", "inf", "all_masked"])
@pytest.mark.parametrize("place", [3, 1500])
def test_a_bad_row_is_nan_alone(backend, bad, place, alpha, generator):
    clean = random_logits((4, 1700), torch.float32, generator)
    targets = torch.tensor([0, 1, 2, 3])
    logits = clean.clone()
    if bad == "all_masked":
        logits[2] = -torch.inf
    elif bad == "nan_payload":
        logits.view(torch.int32)[2, place] = 0x7FC001FF
    else:
        logits[2, place] = float(bad)
    got = score_tokens(logits, targets, alpha=alpha, entropy=True)
    expected = score_tokens(clean, targets, alpha=alpha, entropy=True)
    for value, before in zip(got, expected, strict=True):
        assert value[2].isnan()
        assert torch.equal(value[[0, 1, 3]], before[[0, 1, 3]])


def test_a_masked_target_has_log_prob_minus_infinity(backend):
    logits = torch.tensor([[0.0, -torch.inf, 1.0]])
    got = score_tokens(logits, torch.tensor([1]), alpha=2.0, entropy=True)
    assert got.log_prob.item() == -torch.inf
    assert got.log_z.isfinite().all()
    assert got.entropy.isfinite().all()


def test_masked_entries_count_nowhere(backend, generator):
    kept = torch.randn(3, 900, generator=generator)
    logits = torch.full((3, 2700), -torch.inf)
    logits[:, 1::3] = kept
    targets = torch.tensor([1, 4, 7])
    for alpha in ALPHAS:
        got = score_tokens(logits, targets, alpha=alpha, entropy=True)
        expected = score_tokens(kept, (targets - 1) // 3, alpha=alpha, entropy=True)
        for value, other in zip(got, expected, strict=True):
            torch.testing.assert_close(value, other, rtol=2e-6, atol=2e-6)
    assert score_tokens(logits, targets, alpha=0.0).log_z[0].item() == pytest.approx(math.log(900))


@pytest.mark.parametrize("ignore_index", [-100, -1, 3])
def test_ignored_rows_are_zero_whatever_they_hold(backend, ignore_index, generator):
    logits = random_logits((5, 40), torch.float32, generator)
    logits[1] = torch.nan
    targets = torch.tensor([0, ignore_index, 1, ignore_index, 2])
    got = score_tokens(logits, targets, alpha=4, entropy=True, ignore_index=ignore_index)
    rest = score_tokens(logits[::2], targets[::2], alpha=4, entropy=True)
    for value, kept in zip(got, rest, strict=True):
        assert (value[[1, 3]] == 0).all()
        assert torch.equal(value[::2], kept)


def layouts(base: Tensor) -> dict[str, Tensor]:
    """base is [4, 6, 9, 1031]."""
    return {
        "vector": base[0, 0, 0],
        "matrix with a row stride": base[0, 0, :, :1000],
        "every second row": base[0, 0, ::2],
        "shifted": base[0, :, :-1],
        "shifted, four dimensions": base[:, :, :-1],
        "first sizes not mergeable": base[:, :-1, 1:, 3:],
        "permuted": base.permute(2, 0, 1, 3),
        "last stride not 1": base.transpose(0, 3)[:1000],
        "last stride 2": base[..., ::2],
        "repeated row": base[0, 0, :1].expand(7, -1),
        "vocabulary of 1": base[..., :1],
        "no rows": base[:, :0],
        "no rows, two dimensions": base[0, 0, :0],
    }


@pytest.mark.parametrize("layout", layouts(torch.empty(4, 6, 9, 1031)))
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_layouts(backend, layout, index_dtype, generator):
    logits = layouts(torch.randn(4, 6, 9, 1031, generator=generator))[layout]
    rows = logits.shape[:-1]
    targets = torch.randint(logits.shape[-1], rows, generator=generator, dtype=index_dtype)
    got = score_tokens(logits, targets, alpha=4, entropy=True)
    flat = logits.contiguous().view(-1, logits.shape[-1])
    expected = score_tokens(flat, targets.reshape(-1).long(), alpha=4, entropy=True)
    for value, other in zip(got, expected, strict=True):
        assert value.dtype == torch.float32
        assert torch.equal(value, other.view(rows))


@pytest.mark.parametrize("num_rows", [1, 3, 40])
def test_same_bits_for_any_threads_and_rows(backend, num_rows, generator, restore_threads):
    logits = random_logits((num_rows, 20011), torch.bfloat16, generator)
    targets = torch.randint(20011, (num_rows,), generator=generator)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(score_tokens(logits, targets, alpha=4, entropy=True))
    alone = [
        score_tokens(x, y, alpha=4, entropy=True) for x, y in zip(logits, targets, strict=True)
    ]
    results.append([torch.stack(values) for values in zip(*alone, strict=True)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_entropy_is_none_unless_asked(backend):
    assert score_tokens(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)).entropy is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_right_where_they_are_needed(backend, dtype, generator):
    logits = torch.randn(3, 11, dtype=dtype, generator=generator)
    logits[1, 4] = -torch.inf
    targets = torch.tensor([0, 4, -100])
    alpha = 2.5
    for field in ("log_prob", "log_z", "entropy"):
        z = logits.clone().requires_grad_()
        value = getattr(score_tokens(z, targets, alpha=alpha, entropy=True), field)
        (grad,) = torch.autograd.grad(value[value.isfinite()].sum(), z)
        log_p = torch.log_softmax(logits.double(), -1)
        p, log_p = log_p.exp(), log_p.masked_fill(log_p == -torch.inf, 0.0)
        if field == "log_prob":
            exact = torch.nn.functional.one_hot(targets.clamp(min=0), 11) - p
            exact[1] = 0  # an impossible target
        elif field == "log_z":
            exact = alpha * (torch.softmax(alpha * logits.double(), -1) - p)
        else:
            exact = -p * (log_p - (p * log_p).sum(-1, keepdim=True))
        exact[2] = 0  # ignored
        torch.testing.assert_close(grad, exact.to(dtype), rtol=1e-6, atol=1e-7)


def test_the_op_itself_refuses_a_gradient(backend):
    logits = torch.zeros(1, 3, requires_grad=True)
    log_prob, *_ = torch.ops.powerkernels.score_tokens(
        logits, torch.tensor([0]), 1.0, 1.0, False, None, -100
    )
    with pytest.raises(RuntimeError, match="autograd"):
        log_prob.sum().backward()


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_opcheck(backend, dtype, entropy, generator):
    logits = torch.randn(2, 3, 50, generator=generator).to(dtype)
    targets = torch.randint(50, (2, 3), generator=generator)
    torch.library.opcheck(
        torch.ops.powerkernels.score_tokens.default,
        (logits, targets, 2.0, 0.5, entropy, 30.0, -100),
    )


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiles_as_one_graph(backend, compiler, generator):
    logits = torch.randn(2, 3, 50, generator=generator)
    targets = torch.randint(50, (2, 3), generator=generator)

    def scored(logits, targets):
        scores = score_tokens(logits * 2, targets, alpha=4, entropy=True)
        return scores.log_prob + scores.log_z + scores.entropy

    compiled = torch.compile(scored, fullgraph=True, backend=compiler)
    torch.testing.assert_close(compiled(logits, targets), scored(logits, targets))
    assert compiled(logits[:1], targets[:1]).shape == (1, 3)


LOGITS, TARGETS = torch.zeros(2, 5), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("logits", "targets", "options", "error", "names"),
    [
        (None, TARGETS, {}, TypeError, "logits.*NoneType"),
        (LOGITS.int(), TARGETS, {}, TypeError, "logits.*int32"),
        (torch.tensor(1.0), TARGETS, {}, ValueError, "logits"),
        (torch.zeros(2, 0), TARGETS, {}, ValueError, "logits.*vocabulary"),
        (LOGITS.to_sparse(), TARGETS, {}, TypeError, "logits.*dense"),
        (LOGITS, [0, 1], {}, TypeError, "targets.*list"),
        (LOGITS, TARGETS.float(), {}, TypeError, "targets.*float32"),
        (LOGITS, TARGETS[:1], {}, ValueError, r"targets.*\[2\].*\[1\]"),
        (LOGITS, TARGETS.to("meta"), {}, ValueError, "targets.*cpu.*meta"),
        (LOGITS, torch.tensor([0, 5]), {}, IndexError, r"targets.*\[0, 5\).*5 at row 1"),
        (LOGITS, torch.tensor([-1, 0]), {}, IndexError, "targets.*-1 at row 0"),
        (LOGITS, TARGETS, {"alpha": -0.1}, ValueError, "alpha.*-0.1"),
        (LOGITS, TARGETS, {"alpha": math.inf}, ValueError, "alpha.*inf"),
        (LOGITS, TARGETS, {"alpha": math.nan}, ValueError, "alpha.*nan"),
        (LOGITS, TARGETS, {"alpha": "4"}, TypeError, "alpha"),
        (LOGITS, TARGETS, {"alpha": True}, TypeError, "alpha"),
        (LOGITS, TARGETS, {"temperature": 0}, ValueError, "temperature.*> 0"),
        (LOGITS, TARGETS, {"softcap": 0.0}, ValueError, "softcap.*> 0"),
    ],
)
def test_bad_arguments(backend, logits, targets, options, error, names):
    with pytest.raises(error, match=names):
        score_tokens(logits, targets, **options)


@settings(deadline=None, max_examples=150)
@given(
    values=st.lists(
        st.floats(width=32) | st.sampled_from([math.nan, math.inf, -math.inf]),
        min_size=1,
        max_size=8,
    ),
    target=st.integers(-3, 9),
    alpha=st.floats(-1, 9) | st.sampled_from([0.0, 1.0, 2.5, 4.0]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_row_gives_the_truth_or_names_what_is_wrong(values, target, alpha, dtype):
    logits = torch.tensor(values, dtype=torch.float64).to(dtype)
    targets = torch.tensor(target)
    if alpha < 0:
        with pytest.raises(ValueError, match="alpha"):
            score_tokens(logits, targets, alpha=alpha)
        return
    if not 0 <= target < len(values):
        with pytest.raises(IndexError, match="targets"):
            score_tokens(logits, targets, alpha=alpha)
        return
    got = score_tokens(logits, targets, alpha=alpha, entropy=True)
    exact = truth(logits, targets, alpha=alpha)
    for value, true in zip(got, exact, strict=True):
        torch.testing.assert_close(
            value, true.to(value.dtype), rtol=1e-5, atol=1e-5, equal_nan=True
        )
