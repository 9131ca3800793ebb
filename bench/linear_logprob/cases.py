"""linear_score_tokens, forward and with its gradients, beside other heads without logits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.harness.cases import (
    LLAMA_8B,
    QWEN_7B,
    SMOLLM2,
    Call,
    Case,
    Kernel,
    Model,
    Outputs,
    Size,
    Variant,
)
from bench.logprob.cases import (
    ALL,
    ALPHA,
    LOG_PROB,
    NAMES,
    NO_LOG_Z,
    SCORES,
    Implementation,
    variants_of,
)
from bench.logprob.cases import exact_scores as exact_scores_of_logits
from bench.logprob.cases import torch_scores as torch_scores_of_logits
from powerkernels import linear_score_tokens, score_tokens

# Rows of the hidden states' gradient and of the weight's that are compared.
CHECKED = 64
ROWS_AT_ONCE = 256  # of float64 logits
VERL_CHUNK = 512  # its own default
# The size that other fused heads publish their times of; no model's, so it has no attention.
PUBLISHED_HEAD = Model("head of 4096 × 131072", 4096, 131072, 0, 0, 0)


class Inputs(NamedTuple):
    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # int64 [N]


def make(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    rows, dim, vocab = (case.shape[name] for name in ("rows", "hidden", "vocab"))
    hidden = torch.empty(rows, dim, dtype=case.dtype, device=device).normal_(generator=generator)
    weight = torch.empty(vocab, dim, dtype=case.dtype, device=device)
    weight.normal_(0, 2 * dim**-0.5, generator=generator)
    targets = torch.randint(vocab, (rows,), generator=generator, device=device)
    return Inputs(hidden, weight, targets)


def cases(size: Size, matmuls: int = 1) -> list[Case]:
    """matmuls: products of 2 N D V FLOP."""
    bfloat16, float32 = torch.bfloat16, torch.float32
    sizes = {
        "device": [
            (LLAMA_8B, 8192, bfloat16),
            (PUBLISHED_HEAD, 8192, bfloat16),
            (QWEN_7B, 8192, bfloat16),
            (QWEN_7B, 1024, bfloat16),
            (SMOLLM2, 8192, bfloat16),
        ],
        # float32 first: without bfloat16 instructions a CPU multiplies bfloat16 many times slower.
        "host": [(SMOLLM2, 64, float32), (SMOLLM2, 128, float32), (SMOLLM2, 16, bfloat16)],
        "quick": [(SMOLLM2, 4, float32)],
    }
    found = []
    for number, (model, n, dtype) in enumerate(sizes[size]):
        of_inputs = (n + model.vocab) * model.hidden * dtype.itemsize
        found.append(
            Case(
                f"{model.name}, {n} rows",
                {"rows": n, "hidden": model.hidden, "vocab": model.vocab},
                dtype,
                bytes=of_inputs * (1 if matmuls == 1 else 3),
                flops=matmuls * 2 * n * model.hidden * model.vocab,
                memory=of_inputs * (1 if matmuls == 1 else 2),
                sweep=("rows",) if dtype == sizes[size][0][2] else (),
                main=number == 0,
            )
        )
    return found


Scores = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    scores = linear_score_tokens(hidden, weight, targets, alpha=ALPHA, entropy=True)
    assert scores.entropy is not None
    return scores.log_prob, scores.log_z, scores.entropy


def ours_log_prob_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """What trainers' fused heads give: no power."""
    scores = linear_score_tokens(hidden, weight, targets, entropy=True)
    assert scores.entropy is not None
    return scores.log_prob, scores.entropy


def matmul_then_scores(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    scores = score_tokens(
        hidden @ weight.T, targets, alpha=ALPHA, entropy=True, inplace_backward=True
    )
    assert scores.entropy is not None
    return scores.log_prob, scores.log_z, scores.entropy


def torch_scores(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    return torch_scores_of_logits(hidden @ weight.T, targets)


@functools.cache
def _compiled() -> Scores:
    return torch.compile(torch_scores, fullgraph=True, dynamic=False)


def compiled_scores(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    return _compiled()(hidden, weight, targets)


def verl_scores(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    from verl.utils.experimental.torch_functional import FusedLinearForPPOFunction

    return FusedLinearForPPOFunction.apply(hidden, weight, targets, 1.0, VERL_CHUNK)


def verl_triton_scores(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return tuple(linear_cross_entropy(hidden, weight, targets, 1.0, "none"))


def cce_scores(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    from cut_cross_entropy import linear_cross_entropy

    return (-linear_cross_entropy(hidden, weight, targets, reduction="none"),)


def liger_scores(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """The sum of all rows' log_prob: with a gradient it knows no other."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return (-liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="sum"),)


# Name, function, which scores, peer, copies of the logits in float32.
IMPLEMENTATIONS: tuple[Implementation, ...] = (
    ("powerkernels", ours, ALL, None, 0),
    ("powerkernels, log_prob and entropy", ours_log_prob_entropy, NO_LOG_Z, None, 0),
    ("matmul, then score_tokens", matmul_then_scores, ALL, None, 1),
    ("torch eager", torch_scores, ALL, "eager", 5),
    ("torch.compile", compiled_scores, ALL, "compile", 2),
    ("verl FusedLinearForPPO", verl_scores, NO_LOG_Z, "verl", 1),
    ("verl linear_cross_entropy", verl_triton_scores, NO_LOG_Z, "verl-triton", 0),
    ("cut-cross-entropy, log_prob", cce_scores, LOG_PROB, "cce", 0),
)


# ---- forward


def forward(function: Scores, kind: str) -> Callable[[Inputs], Call]:
    def bind(x: Inputs) -> Call:
        def call() -> Outputs:
            with torch.no_grad():
                return dict(zip(NAMES[kind], function(*x), strict=True))

        return call

    return bind


def few(x: Inputs) -> Inputs:
    return Inputs(x.hidden[:CHECKED], x.weight, x.targets[:CHECKED])


def picked(outputs: Outputs) -> Outputs:
    return {name: value[:CHECKED] for name, value in outputs.items()}


def exact_forward(x: Inputs, found: Outputs) -> Outputs:
    logits = x.hidden.double() @ x.weight.double().T
    return dict(zip(SCORES, exact_scores_of_logits(logits, x.targets), strict=True))


def torch_forward(x: Inputs, found: Outputs) -> Outputs:
    with torch.no_grad():
        return dict(zip(SCORES, torch_scores(*x), strict=True))


def matmul_alone(case: Case, x: Inputs) -> tuple[str, Call]:
    return "the matmul alone", lambda: x.hidden @ x.weight.T


LINEAR_SCORE_TOKENS = Kernel(
    name="linear_score_tokens",
    part="linear_logprob",
    summary="the scores from hidden states and head; 2 N D V FLOP are the floor",
    cases=cases,
    inputs=make,
    few=few,
    picked=picked,
    expected=exact_forward,
    yardstick=torch_forward,
    ceiling=matmul_alone,
    variants=variants_of(IMPLEMENTATIONS, forward),
)


# ---- forward and backward


def names_of(kind: str) -> tuple[str, str]:
    return f"dhidden of {kind}", f"dweight of {kind}"


def gradients(function: Scores, kind: str) -> Callable[[Inputs], Call]:
    """Of the plain sum of all scores."""

    def bind(x: Inputs) -> Call:
        leaves = [tensor.detach().requires_grad_() for tensor in (x.hidden, x.weight)]

        def call() -> Outputs:
            total = sum(score.sum() for score in function(*leaves, x.targets))
            found = torch.autograd.grad(total, leaves)
            return dict(zip(names_of(kind), found, strict=True))

        return call

    return bind


def exact_gradients(
    x: Inputs, weights_of: Callable[[slice], tuple[Tensor | float, ...]]
) -> tuple[Tensor, Tensor]:
    """In float64, rows by rows: the first rows of the hidden states' and of the weight's gradient.

    weights_of: rows -> the gradients of log_prob, log_z and entropy there.
    """
    weight = x.weight.double()
    dhidden = torch.zeros(CHECKED, x.hidden.shape[1], dtype=torch.float64, device=weight.device)
    dweight = torch.zeros_like(dhidden)
    for start in range(0, x.hidden.shape[0], ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        hidden = x.hidden[rows].double()
        logits = (hidden @ weight.T).requires_grad_()
        scores = exact_scores_of_logits(logits, x.targets[rows])
        total = sum((s * w).sum() for s, w in zip(scores, weights_of(rows), strict=True))
        (dlogits,) = torch.autograd.grad(total, logits)
        dweight += dlogits[:, :CHECKED].T @ hidden
        if start == 0:
            dhidden = dlogits[:CHECKED] @ weight
    return dhidden, dweight


def exact_sums(x: Inputs, found: Outputs) -> Outputs:
    expected = {}
    for kind, scores in NAMES.items():
        ones = tuple(float(name in scores) for name in SCORES)
        pair = exact_gradients(x, lambda rows, ones=ones: ones)
        expected |= dict(zip(names_of(kind), pair, strict=True))
    return expected


def torch_sums(x: Inputs, found: Outputs) -> Outputs:
    leaves = [tensor.detach().requires_grad_() for tensor in (x.hidden, x.weight)]
    scores = torch_scores(*leaves, x.targets)
    result = {}
    for kind, names in NAMES.items():
        total = sum(scores[SCORES.index(name)].sum() for name in names)
        pair = torch.autograd.grad(total, leaves, retain_graph=True)
        result |= picked(dict(zip(names_of(kind), pair, strict=True)))
    return result


def four_matmuls(case: Case, x: Inputs) -> tuple[str, Call]:
    """What no implementation without the logits in memory can leave out."""

    def call() -> None:
        for _ in range(2):
            logits = x.hidden @ x.weight.T
        _ = logits @ x.weight, logits.T @ x.hidden

    return "the four matmuls alone", call


LINEAR_SCORE_TOKENS_FWD_BWD = Kernel(
    name="linear_score_tokens_fwd_bwd",
    part="linear_logprob",
    summary="the same and the gradients of hidden states and head; 8 N D V FLOP without the "
    "logits in memory (with them 6 would do)",
    cases=lambda size: cases(size, matmuls=4)[: 1 if size == "host" else None],
    inputs=make,
    few=lambda x: x,
    picked=picked,
    expected=exact_sums,
    yardstick=torch_sums,
    ceiling=four_matmuls,
    variants=[
        *variants_of(IMPLEMENTATIONS, gradients, times_copies=2),
        Variant("Liger, log_prob", gradients(liger_scores, LOG_PROB), peer="liger"),
    ],
)

KERNELS: list[Any] = [LINEAR_SCORE_TOKENS, LINEAR_SCORE_TOKENS_FWD_BWD]
