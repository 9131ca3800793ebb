from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from powerkernels import score_tokens
from python_tests.logprob.expected import (
    ALPHAS,
    assert_close_to_truth,
    assert_gradient_close,
    far_apart,
    float32_expression,
    gradient,
    random_logits,
    random_weights,
    true_gradient,
    truth,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# One entry; two; less than a vector; one short of, exactly and one more than a slice; a real
# vocabulary; a large one, and odd.
VOCABS = (1, 2, 127, 1023, 1024, 1025, 50257, 151937)


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


GRADIENT_ALPHAS = (0.0, 0.5, 1.0, 2.0, 2.5, 4.0, 7.3)


class GradientCase(NamedTuple):
    alpha: float
    temperature: float
    exact: Tensor
    expression: Tensor


@functools.cache
def gradient_cases(
    vocab: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[Tensor], list[GradientCase]]:
    generator = torch.Generator().manual_seed(vocab)
    rows = 3 if vocab > 50000 else 9
    logits = random_logits((rows, vocab), dtype, generator)
    targets = torch.randint(vocab, (rows,), generator=generator)
    targets[1] = -100
    weights = random_weights(targets, generator)
    alphas = GRADIENT_ALPHAS if vocab < 50000 else (1.0, 2.5, 4.0, 7.3)
    return (
        logits,
        targets,
        weights,
        [
            GradientCase(
                alpha,
                temperature,
                *true_gradient(logits, targets, weights, alpha=alpha, temperature=temperature),
            )
            for alpha, temperature in itertools.product(alphas, (1.0, 0.7))
        ],
    )


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_the_truth(backend, dtype, vocab, inplace):
    logits, targets, weights, expected = gradient_cases(vocab, dtype)
    for alpha, temperature, exact, expression in expected:
        z = logits.clone().requires_grad_()
        scores = score_tokens(
            z,
            targets,
            alpha=alpha,
            temperature=temperature,
            entropy=True,
            inplace_backward=inplace,
        )
        got = gradient(scores, weights, z)
        what = f"alpha {alpha}, temperature {temperature}"
        assert_gradient_close(got, exact, expression, what, alpha)
        assert (got.data_ptr() == z.data_ptr()) == inplace


@pytest.mark.parametrize("field", ["log_prob", "log_z", "entropy"])
@pytest.mark.parametrize("alpha", [2.0, 2.5, 7.3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_each_score(backend, dtype, alpha, field, generator):
    logits = random_logits((6, 1500), dtype, generator)
    targets = torch.randint(1500, (6,), generator=generator)
    z = logits.clone().requires_grad_()
    score = getattr(score_tokens(z, targets, alpha=alpha, entropy=True), field)
    got = gradient([score], [torch.ones(6)], z)
    weights = [torch.full((6,), float(name == field)) for name in ("log_prob", "log_z", "entropy")]
    assert_gradient_close(got, *true_gradient(logits, targets, weights, alpha=alpha), field, alpha)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_gradient_under_a_softcap(backend, cap, dtype, generator):
    logits = random_logits((5, 2100), dtype, generator) * 3
    targets = torch.randint(2100, (5,), generator=generator)
    weights = random_weights(targets, generator)
    z = logits.clone().requires_grad_()
    got = gradient(score_tokens(z, targets, alpha=2, entropy=True, softcap=cap), weights, z)
    x = logits.double().requires_grad_()
    exact = gradient(truth(x, targets, alpha=2, softcap=cap), weights, x)
    y = logits.float().requires_grad_()
    capped = torch.where(y == -torch.inf, y, cap * torch.tanh(y / cap))
    expression = gradient(float32_expression(capped, targets, 2, 1.0), weights, y)
    assert_gradient_close(got, exact, expression, f"softcap {cap}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_temperature_for_each_token(backend, dtype, generator):
    logits = random_logits((2, 3, 1100), dtype, generator)
    targets = torch.randint(1100, (2, 3), generator=generator)
    temperature = torch.rand(2, 3, generator=generator) + 0.5
    weights = random_weights(targets, generator)
    z = logits.clone().requires_grad_()
    scores = score_tokens(z, targets, alpha=2.5, temperature=temperature, entropy=True)
    exact = truth(logits, targets, alpha=2.5, temperature=temperature)
    expression = float32_expression(logits, targets, 2.5, temperature)
    for name, *values in zip(scores._fields, scores, exact, expression, strict=True):
        assert_close_to_truth(*values, name)
    expected = true_gradient(logits, targets, weights, alpha=2.5, temperature=temperature)
    assert_gradient_close(gradient(scores, weights, z), *expected, "gradient")
    one = score_tokens(
        logits[1, 2], targets[1, 2], alpha=2.5, temperature=float(temperature[1, 2]), entropy=True
    )
    for value, alone in zip(scores, one, strict=True):
        torch.testing.assert_close(value[1, 2].detach(), alone, rtol=1e-6, atol=1e-6)


def test_gradcheck_of_the_op(backend, generator):
    logits = torch.randn(3, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    targets = torch.tensor([0, 4, -100])

    def scores(x):
        return score_tokens(x, targets, alpha=2.5, temperature=0.7, entropy=True, softcap=5.0)

    assert torch.autograd.gradcheck(scores, (logits,))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.5])
def test_gradcheck_of_the_reference(alpha, generator):
    logits = torch.randn(3, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    targets = torch.tensor([0, 4, -100])

    def scores(x):
        log_prob, log_z, entropy = truth(x, targets, alpha=alpha, softcap=3.0, temperature=0.7)
        return log_prob, log_z, entropy

    assert torch.autograd.gradcheck(scores, (logits,))


@pytest.mark.parametrize("alpha", [1.0, 2.5])
def test_rows_without_a_gradient_get_zeros_whatever_they_hold(backend, alpha, generator):
    logits = random_logits((5, 1300), torch.float32, generator)
    targets = torch.tensor([0, -100, 2, 0, 5])
    logits[1] = torch.nan
    logits[2] = torch.nan
    logits[3, 7] = torch.nan
    weights = [torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])] * 3
    z = logits.clone().requires_grad_()
    scores = score_tokens(z, targets, alpha=alpha, entropy=True)
    total = sum((score * w).nan_to_num(0.0).sum() for score, w in zip(scores, weights, strict=True))
    (got,) = torch.autograd.grad(total, z)
    assert (got[[1, 2]] == 0).all()
    assert got[[0, 4]].isfinite().all()
    exact, expression = true_gradient(
        logits[[0, 4]], targets[[0, 4]], [torch.ones(2)] * 3, alpha=alpha
    )
    assert_gradient_close(got[[0, 4]], exact, expression, "the other rows")


def test_a_bad_row_with_a_gradient_has_a_nan_gradient_alone(backend, generator):
    logits = random_logits((3, 1300), torch.float32, generator)
    logits[1, 1100] = torch.nan
    z = logits.requires_grad_()
    scores = score_tokens(z, torch.zeros(3, dtype=torch.int64), alpha=4, entropy=True)
    (got,) = torch.autograd.grad(sum(score.sum() for score in scores), z)
    assert got[1].isnan().all()
    assert got[[0, 2]].isfinite().all()


def test_an_impossible_target_has_no_gradient(backend):
    logits = torch.tensor([[0.0, -torch.inf, 1.0]], requires_grad=True)
    scores = score_tokens(logits, torch.tensor([1]), alpha=2.0, entropy=True)
    (got,) = torch.autograd.grad(scores.log_prob.sum(), logits, retain_graph=True)
    assert (got == 0).all()
    (got,) = torch.autograd.grad(scores.entropy.sum(), logits)
    assert got.isfinite().all()
    assert got[0, 0] != 0


@pytest.mark.parametrize("layout", ["shifted", "every second row", "permuted", "last stride 2"])
def test_gradients_of_layouts(backend, layout, generator):
    base = torch.randn(4, 6, 9, 131, generator=generator)
    logits = layouts(base)[layout]
    targets = torch.randint(logits.shape[-1], logits.shape[:-1], generator=generator)
    z = logits.detach().requires_grad_()
    got = gradient(
        score_tokens(z, targets, alpha=4, entropy=True), [torch.ones(targets.shape)] * 3, z
    )
    flat = logits.contiguous().requires_grad_()
    expected = gradient(
        score_tokens(flat, targets, alpha=4, entropy=True), [torch.ones(targets.shape)] * 3, flat
    )
    assert torch.equal(got, expected)


def test_offsets_beyond_2_to_the_31(compiled_backend, generator):
    logits = torch.randn(2, 1100, generator=generator).bfloat16()
    targets = torch.tensor([3, 1099])
    results = []
    for rows in (logits, far_apart(logits)):
        z = rows.requires_grad_()
        scores = score_tokens(
            z, targets, alpha=4, entropy=True, inplace_backward=rows is not logits
        )
        slope = gradient(scores, [torch.ones(2)] * 3, z)
        results.append([*(score.detach() for score in scores), slope.clone()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_in_place_takes_only_what_can_be_overwritten(backend):
    targets = torch.zeros(3, dtype=torch.int64)
    base = torch.randn(1, 8, requires_grad=True)
    with pytest.raises(ValueError, match=r"inplace_backward.*strides"):
        score_tokens(base.expand(3, -1), targets, inplace_backward=True)
    with pytest.raises(ValueError, match=r"inplace_backward.*strides"):
        score_tokens(torch.randn(8, 3, requires_grad=True).T, targets, inplace_backward=True)


def test_in_place_is_noticed_by_others_that_need_the_logits(backend):
    base = torch.randn(2, 8, requires_grad=True)
    logits = base * 2
    targets = torch.zeros(2, dtype=torch.int64)
    square = logits.square().sum()  # needs the logits in its own backward
    scores = score_tokens(logits, targets, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (square + scores.log_prob.sum()).backward()


def test_same_gradient_bits_for_any_threads(backend, generator, restore_threads):
    logits = random_logits((5, 20011), torch.bfloat16, generator).requires_grad_()
    targets = torch.randint(20011, (5,), generator=generator)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        scores = score_tokens(logits, targets, alpha=4, entropy=True)
        results.append(gradient(scores, [torch.ones(5)] * 3, logits))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_opcheck(backend, dtype, entropy, generator):
    logits = torch.randn(2, 3, 50, generator=generator).to(dtype)
    targets = torch.randint(50, (2, 3), generator=generator)
    temperatures = torch.ones(2, 3)
    for grad, per_token in itertools.product((False, True), (None, temperatures)):
        torch.library.opcheck(
            torch.ops.powerkernels.score_tokens.default,
            (
                logits.clone().requires_grad_(grad),
                targets,
                per_token,
                2.0,
                0.5,
                entropy,
                30.0,
                -100,
                "",
                False,
            ),
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_opcheck_of_the_backward(backend, dtype, generator):
    logits = torch.randn(2, 3, 50, generator=generator).to(dtype)
    targets = torch.randint(50, (2, 3), generator=generator)
    op = torch.ops.powerkernels
    scores = op.score_tokens(logits, targets, None, 2.0, 0.5, True, None, -100, "", False)
    arguments = (targets, None, *scores, scores[0], None, scores[2], 2.0, 0.5, None, -100)
    torch.library.opcheck(op.score_tokens_bwd.default, (logits, *arguments))
    torch.library.opcheck(op.score_tokens_bwd_.default, (logits, *arguments))


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


@pytest.mark.parametrize("inplace", [False, True])
def test_gradients_compile_as_one_graph(backend, inplace, generator):
    logits = torch.randn(2, 3, 50, generator=generator, requires_grad=True)
    targets = torch.randint(50, (2, 3), generator=generator)

    def loss(logits, targets):
        scores = score_tokens(logits * 2, targets, alpha=4, entropy=True, inplace_backward=inplace)
        return (scores.log_prob + scores.log_z + scores.entropy).sum()

    (expected,) = torch.autograd.grad(loss(logits, targets), logits)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(logits, targets), logits)
    torch.testing.assert_close(got, expected)


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
        (LOGITS, TARGETS, {"temperature": torch.ones(3)}, ValueError, r"temperature.*\[2\].*\[3\]"),
        (LOGITS, TARGETS, {"temperature": torch.ones(2).int()}, TypeError, "temperature.*int32"),
        (
            LOGITS,
            TARGETS,
            {"temperature": torch.tensor([1.0, 0.0])},
            ValueError,
            "temperature.*0.0",
        ),
        (
            LOGITS,
            TARGETS,
            {"temperature": torch.ones(2, requires_grad=True)},
            ValueError,
            "temperature.*gradient",
        ),
        (LOGITS, TARGETS, {"process_group": "world"}, TypeError, "process_group.*str"),
    ],
)
@pytest.mark.each_value
def test_bad_arguments(backend, logits, targets, options, error, names):
    with pytest.raises(error, match=names):
        score_tokens(logits, targets, **options)


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
