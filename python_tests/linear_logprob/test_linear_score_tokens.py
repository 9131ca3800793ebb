from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from powerkernels import linear_score_tokens, score_tokens
from powerkernels.linear_logprob import functional, reference
from python_tests.logprob.expected import DEFAULTS, random_weights

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Error allowed, relative to the largest of the tensor or to 1, what comes in: this many times the
# error of the same expression in torch at the same dtype, plus a few roundings of that dtype.
ERROR_FACTOR = 2.0
FLOOR = {
    torch.float64: 1e-13,
    torch.float32: 2**-20,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-11,
}


@pytest.fixture(autouse=True)
def many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small sizes must be cut too; the last chunk is a short one for most vocabularies here."""
    monkeypatch.setattr(functional, "CHUNK_LOGITS", {"cpu": 1500, "cuda": 1500})
    monkeypatch.setattr(functional, "MIN_CHUNK_V", 64)


class Inputs(NamedTuple):
    hidden: Tensor  # [2, 6, D]
    weight: Tensor  # [V, D]
    bias: Tensor  # [V]
    targets: Tensor  # [2, 6], some ignored
    weights: list[Tensor]  # incoming gradients, some rows all 0


def inputs(vocab: int, dim: int, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(vocab + dim)
    targets = torch.randint(vocab, (2, 6), generator=generator)
    targets[0, 3] = targets[1, 5] = -100
    weights = random_weights(targets, generator)
    for weight in weights:
        weight[1, 1] = 0.0
    return Inputs(
        torch.randn(2, 6, dim, generator=generator).to(dtype),
        torch.randn(vocab, dim, generator=generator).mul(dim**-0.5 * 4).to(dtype),
        torch.randn(vocab, generator=generator).to(dtype),
        targets,
        weights,
    )


def eager(targets: Tensor, leaves: list[Tensor], options: dict[str, Any]) -> tuple[Tensor, ...]:
    """The scores as one writes them in torch, at the dtype of the leaves."""
    hidden, weight, *bias = leaves
    logits = torch.nn.functional.linear(hidden, weight, bias[0] if bias else None).float()
    if options["softcap"] is not None:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    temperature = options["temperature"]
    if isinstance(temperature, Tensor):
        temperature = temperature.unsqueeze(-1)
    log_p = torch.log_softmax(logits / temperature, -1)
    ignored = targets == -100
    log_prob = log_p.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    scores = (
        log_prob,
        torch.logsumexp(options["alpha"] * log_p, -1),
        -(log_p.exp() * log_p).sum(-1),
    )
    return tuple(score.masked_fill(ignored, 0.0) for score in scores)


def assert_close(
    got: Tensor, exact: Tensor, expression: Tensor, alpha: float, got_dtype: torch.dtype, what: str
) -> None:
    got, exact, expression = got.detach().double(), exact.detach(), expression.detach().double()
    # Logits computed again in the backward round anew; log_z multiplies that by alpha, twice.
    growth = (1 + alpha) ** 2 if got_dtype in (torch.float32, torch.float64) else 1.0
    error, peer = (got - exact).abs().max(), (expression - exact).abs().max()
    allowed = ERROR_FACTOR * peer + FLOOR[got_dtype] * growth * exact.abs().max().clamp(min=1.0)
    assert error <= allowed, (what, error, peer)


def check(x: Inputs, dtype: torch.dtype, *, with_bias: bool, **options: Any) -> None:
    options = DEFAULTS | options

    def leaves(kind: torch.dtype) -> list[Tensor]:
        tensors = [x.hidden, x.weight, *([x.bias] if with_bias else [])]
        return [tensor.to(kind).detach().requires_grad_() for tensor in tensors]

    def gradients(scores: Any, of: list[Tensor]) -> tuple[Tensor, ...]:
        total = sum(
            (score * weight.to(score.dtype)).sum()
            for score, weight in zip(scores, x.weights, strict=True)
        )
        return torch.autograd.grad(total, of)

    own, exact_leaves, peers = leaves(dtype), leaves(torch.float64), leaves(dtype)
    got = linear_score_tokens(*own[:2], x.targets, bias=own[2] if with_bias else None, **options)
    exact = reference.linear_score_tokens(
        *exact_leaves[:2], x.targets, bias=exact_leaves[2] if with_bias else None, **options
    )
    expression = eager(x.targets, peers, options)
    for field, *values in zip(got._fields, got, exact, expression, strict=True):
        assert_close(*values, options["alpha"], dtype, f"{field} {options}")
    results = (gradients(got, own), gradients(exact, exact_leaves), gradients(expression, peers))
    for field, *values in zip(("hidden", "weight", "bias"), *results, strict=False):
        assert values[0].dtype == dtype
        assert_close(*values, options["alpha"], dtype, f"gradient of {field} {options}")


@pytest.mark.parametrize("vocab", [1, 2, 127, 1000, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients_are_the_truth(backend, dtype, vocab):
    x = inputs(vocab, 24, dtype)
    for alpha, with_bias in itertools.product((0.5, 1.0, 2.5, 4.0, 7.3), (False, True)):
        check(x, dtype, with_bias=with_bias, alpha=alpha)


@pytest.mark.parametrize("dtype", DTYPES)
def test_softcap_and_temperatures(backend, dtype):
    x = inputs(700, 24, dtype)
    temperature = torch.linspace(0.6, 1.5, 12).view(2, 6)
    for options in (
        {"softcap": 5.0},
        {"temperature": 0.7},
        {"temperature": temperature},
        {"temperature": temperature, "softcap": 3.0},
    ):
        check(x, dtype, with_bias=True, alpha=2.5, **options)


def test_equal_to_score_tokens_of_the_logits(backend):
    x = inputs(1000, 24, torch.float32)
    logits = torch.nn.functional.linear(x.hidden, x.weight, x.bias)
    got = linear_score_tokens(x.hidden, x.weight, x.targets, bias=x.bias, alpha=4, entropy=True)
    expected = score_tokens(logits, x.targets, alpha=4, entropy=True)
    for value, other in zip(got, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("needed", list(itertools.product((False, True), repeat=3))[1:])
def test_only_the_gradients_that_are_needed(backend, needed):
    x = inputs(300, 16, torch.float32)
    leaves = [
        tensor.clone().requires_grad_(need) for tensor, need in zip(x[:3], needed, strict=True)
    ]
    scores = linear_score_tokens(*leaves[:2], x.targets, bias=leaves[2], alpha=2.0)
    scores.log_prob.sum().backward()
    every = [tensor.clone().requires_grad_() for tensor in x[:3]]
    linear_score_tokens(*every[:2], x.targets, bias=every[2], alpha=2.0).log_prob.sum().backward()
    for leaf, other, need in zip(leaves, every, needed, strict=True):
        assert (leaf.grad is not None) == need
        assert not need or torch.equal(leaf.grad, other.grad)


def test_tied_weights(backend):
    x = inputs(300, 16, torch.float64)
    results = []
    for call in ("fused", "reference"):
        embedding = x.weight.clone().requires_grad_()
        hidden = embedding[x.targets.clamp(min=0)].tanh()
        if call == "fused":
            scores = linear_score_tokens(hidden, embedding, x.targets, alpha=2.0, entropy=True)
        else:
            options = DEFAULTS | {"alpha": 2.0}
            scores = reference.linear_score_tokens(
                hidden, embedding, x.targets, bias=None, **options
            )
        sum(score.sum() for score in scores).backward()
        results.append(embedding.grad)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_what_is_left_out_costs_nothing_and_leaks_nothing(backend, monkeypatch):
    """Ignored rows before the forward's matmuls, rows without a gradient before the backward's."""
    x = inputs(300, 16, torch.float32)
    seen: list[int] = []
    chunks = functional._chunks

    def counted(hidden: Tensor, *arguments: Any) -> Any:
        seen.append(hidden.shape[0])
        return chunks(hidden, *arguments)

    monkeypatch.setattr(functional, "_chunks", counted)
    hidden = x.hidden.clone()
    hidden[0, 3] = torch.nan  # ignored
    hidden[1, 1] = torch.nan  # no gradient
    hidden.requires_grad_()
    weight = x.weight.clone().requires_grad_()
    scores = linear_score_tokens(hidden, weight, x.targets, alpha=4, entropy=True)
    assert all((score[0, 3] == 0).all() for score in scores)
    assert all(score[1, 1].isnan().all() for score in scores)
    total = sum(
        (score * w).nan_to_num(0.0).sum() for score, w in zip(scores, x.weights, strict=True)
    )
    total.backward()
    assert seen == [10, 9]
    assert weight.grad.isfinite().all()
    assert (hidden.grad[0, 3] == 0).all()
    assert (hidden.grad[1, 1] == 0).all()
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("count", ["none at all", "all ignored"])
def test_no_rows(backend, count):
    shape = (0,) if count == "none at all" else (3,)
    hidden = torch.randn(*shape, 8, requires_grad=True)
    weight = torch.randn(40, 8, requires_grad=True)
    targets = torch.full(shape, -100)
    scores = linear_score_tokens(hidden, weight, targets, alpha=2, entropy=True)
    assert all(score.shape == shape and (score == 0).all() for score in scores)
    scores.log_prob.sum().backward()
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()


def test_strided_and_batched_inputs(backend):
    """Against the truth: how a matmul rounds depends on where its operands lie."""
    x = inputs(300, 16, torch.float32)
    hidden = torch.randn(2, 7, 32)[:, 1:, ::2]
    options = DEFAULTS | {"alpha": 4.0}
    exact = reference.linear_score_tokens(
        hidden.double(), x.weight.double(), x.targets, bias=None, **options
    )
    expression = eager(x.targets, [hidden, x.weight], options)
    weight, targets = x.weight.T.contiguous().T, x.targets.int()
    got = linear_score_tokens(hidden, weight, targets, alpha=4, entropy=True)
    for field, *values in zip(got._fields, got, exact, expression, strict=True):
        assert_close(*values, 4.0, torch.float32, field)
    one = linear_score_tokens(hidden[1, 0], weight, targets[1, 0], alpha=4, entropy=True)
    for field, value, *values in zip(got._fields, one, exact, expression, strict=True):
        assert value.shape == ()
        assert_close(value, *(other[1, 0] for other in values), 4.0, torch.float32, field)


def test_gradcheck_of_the_op_and_the_reference(backend):
    x = inputs(40, 4, torch.float64)
    leaves = [tensor.clone().requires_grad_() for tensor in x[:3]]

    def op(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return linear_score_tokens(
            hidden, weight, x.targets, bias=bias, alpha=2.5, entropy=True, softcap=4.0
        )

    def truth(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        options = DEFAULTS | {"alpha": 2.5, "softcap": 4.0}
        return reference.linear_score_tokens(hidden, weight, x.targets, bias=bias, **options)

    assert torch.autograd.gradcheck(op, leaves)
    assert torch.autograd.gradcheck(truth, leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_opcheck(backend, dtype):
    x = inputs(60, 8, dtype)
    hidden, targets = x.hidden.flatten(0, 1), x.targets.flatten()
    for bias, temperatures, entropy, needs in (
        (None, None, False, False),
        (x.bias, torch.ones(12), True, True),
    ):
        leaves = [
            t if t is None else t.clone().requires_grad_(needs) for t in (hidden, x.weight, bias)
        ]
        torch.library.opcheck(
            torch.ops.powerkernels.linear_score_tokens.default,
            (*leaves, targets, temperatures, 2.0, 0.5, entropy, 30.0, -100, "", "auto"),
        )


def test_compiles_as_one_graph(backend):
    x = inputs(60, 8, torch.float32)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        scores = linear_score_tokens(hidden * 2, weight, x.targets, alpha=4, entropy=True)
        return sum(score.sum() for score in scores)

    leaves = [tensor.clone().requires_grad_() for tensor in x[:2]]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*leaves), leaves)
    for value, other in zip(got, expected, strict=True):
        torch.testing.assert_close(value, other)


HIDDEN, WEIGHT, TARGETS = torch.zeros(2, 4), torch.zeros(5, 4), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("hidden", "weight", "targets", "options", "error", "names"),
    [
        (None, WEIGHT, TARGETS, {}, TypeError, r"hidden.*NoneType"),
        (torch.zeros(2, 0), WEIGHT, TARGETS, {}, ValueError, r"hidden.*D >= 1"),
        (HIDDEN, WEIGHT.half(), TARGETS, {}, TypeError, r"weight.*float32.*float16"),
        (HIDDEN, WEIGHT[:, :3], TARGETS, {}, ValueError, r"weight.*\[V, 4\].*\[5, 3\]"),
        (HIDDEN, WEIGHT[:0], TARGETS, {}, ValueError, r"weight.*vocabulary"),
        (HIDDEN, WEIGHT.to("meta"), TARGETS, {}, ValueError, r"weight.*cpu.*meta"),
        (HIDDEN, WEIGHT, TARGETS, {"bias": torch.zeros(4)}, ValueError, r"bias.*\[5\].*\[4\]"),
        (HIDDEN, WEIGHT, TARGETS, {"bias": torch.zeros(5).half()}, TypeError, r"bias.*float16"),
        (HIDDEN, WEIGHT, TARGETS.float(), {}, TypeError, r"targets.*float32"),
        (HIDDEN, WEIGHT, TARGETS[:1], {}, ValueError, r"targets.*\[2\].*\[1\]"),
        (HIDDEN, WEIGHT, torch.tensor([0, 5]), {}, IndexError, r"targets.*\[0, 5\).*5 at row 1"),
        (HIDDEN, WEIGHT, torch.tensor([-1, 0]), {}, IndexError, r"targets.*-1 at row 0"),
        (HIDDEN, WEIGHT, TARGETS, {"alpha": -1}, ValueError, r"alpha.*-1"),
        (HIDDEN, WEIGHT, TARGETS, {"temperature": 0}, ValueError, r"temperature.*> 0"),
        (HIDDEN, WEIGHT, TARGETS, {"softcap": -1.0}, ValueError, r"softcap.*> 0"),
        (HIDDEN, WEIGHT, TARGETS, {"method": "fast"}, ValueError, r"method.*fast"),
        (HIDDEN, WEIGHT, TARGETS, {"method": "fused"}, ValueError, r"fused.*GPU kernel"),
        (HIDDEN, WEIGHT, TARGETS, {"process_group": 1}, TypeError, r"process_group.*int"),
    ],
)
@pytest.mark.each_value
def test_bad_arguments(backend, hidden, weight, targets, options, error, names):
    with pytest.raises(error, match=names):
        linear_score_tokens(hidden, weight, targets, **options)
