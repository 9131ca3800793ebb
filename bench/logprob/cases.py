"""score_tokens, forward and with its gradient, and sample_tokens, beside what trainers use."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.harness.cases import (
    LLAMA_8B,
    QWEN_1B,
    QWEN_7B,
    SMOLLM2,
    Call,
    Case,
    Kernel,
    Outputs,
    Size,
    Variant,
)
from powerkernels import sample_tokens, score_tokens
from powerkernels.logprob import reference

ALPHA = 4.0
CHECKED_ROWS = 4
SCORES = ("log_prob", "log_z", "entropy")
# Which scores an implementation gives: an output's name says whose gradient it is.
ALL, LOG_PROB, NO_LOG_Z = "all", "log_prob", "log_prob and entropy"


class Inputs(NamedTuple):
    logits: Tensor  # [N, V]
    targets: Tensor  # int64 [N]
    weights: Tensor  # float32 [3, N], of log_prob, log_z and entropy in the sum that is derived
    counters: Tensor  # int64 [N, 4]


def make(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    rows, vocab = case.shape["rows"], case.shape["vocab"]
    logits = torch.empty(rows, vocab, dtype=case.dtype, device=device)
    logits.normal_(0, 3, generator=generator)
    targets = torch.randint(vocab, (rows,), generator=generator, device=device)
    weights = torch.randn(3, rows, generator=generator, device=device)
    index = torch.arange(rows, device=device)
    counters = torch.stack((index * 0, index, index * 0, index), dim=-1)
    return Inputs(logits, targets, weights, counters)


def few(x: Inputs) -> Inputs:
    rows = slice(CHECKED_ROWS)
    return Inputs(x.logits[rows], x.targets[rows], x.weights[:, rows], x.counters[rows])


def picked(outputs: Outputs) -> Outputs:
    return {name: value[:CHECKED_ROWS] for name, value in outputs.items()}


def cases(size: Size, reads: int = 1, writes: int = 0) -> list[Case]:
    """Rows at one vocabulary, vocabularies at one number of rows, and both dtypes."""
    rows = {"device": 8192, "host": 32, "quick": 8}[size]
    sweep = {"device": (1, 32, 128, 1024), "host": (4, 128), "quick": ()}[size]
    models = {"device": (QWEN_7B, LLAMA_8B, SMOLLM2), "host": (LLAMA_8B, SMOLLM2), "quick": ()}
    vocab = SMOLLM2.vocab if size == "quick" else QWEN_1B.vocab
    name = SMOLLM2.name if size == "quick" else QWEN_1B.name

    def case(label: str, n: int, v: int, dtype: torch.dtype, **more: Any) -> Case:
        logits = n * v * dtype.itemsize
        return Case(
            f"{label}, {n} rows",
            {"rows": n, "vocab": v},
            dtype,
            bytes=(reads + writes) * logits,
            memory=(1 + writes) * logits,
            **more,
        )

    bfloat16 = torch.bfloat16
    found = [case(name, rows, vocab, bfloat16, sweep=("rows", "vocab"), main=True)]
    found += [case(name, n, vocab, bfloat16, sweep=("rows",)) for n in sweep]
    found += [case(m.name, rows, m.vocab, bfloat16, sweep=("vocab",)) for m in models[size]]
    return [*found, case(name, rows, vocab, torch.float32)]


def float32_copies(count: int) -> Callable[[Case], int]:
    """Of the logits, that a chain of torch ops holds at its peak."""
    return lambda case: 4 * count * case.shape["rows"] * case.shape["vocab"]


# Name, function, which scores, peer, copies of the logits in float32 at the forward's peak.
Implementation = tuple[str, Callable[..., tuple[Tensor, ...]], str, str | None, int]


def variants_of(
    implementations: Sequence[Implementation],
    bind: Callable[[Any, str], Callable[[Any], Call]],
    times_copies: int = 1,
) -> list[Variant]:
    """A variant each, by what binds its function and kind of scores to inputs."""
    return [
        Variant(
            name,
            bind(function, kind),
            peer=peer,
            ours=peer is None,
            extra_memory=float32_copies(times_copies * copies),
            main_only=peer == "compile",
        )
        for name, function, kind, peer, copies in implementations
    ]


# ---- forward


def torch_scores(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log_prob, log_z and entropy as one writes them in torch."""
    log_p = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    log_prob = log_p.gather(-1, targets[:, None]).squeeze(-1)
    log_z = torch.logsumexp(ALPHA * log_p, dim=-1)
    return log_prob, log_z, -(log_p.exp() * log_p).sum(-1)


@functools.cache
def compiled_scores() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(torch_scores, fullgraph=True, dynamic=False)


def exact_scores(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """The reference's, in float64."""
    scores = reference.score_tokens(
        logits.double(),
        targets,
        alpha=ALPHA,
        temperature=1.0,
        entropy=True,
        softcap=None,
        ignore_index=-100,
    )
    return tuple(score for score in scores[:3] if score is not None)


def ours(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    scores = score_tokens(logits, targets, alpha=ALPHA, entropy=True)
    assert scores.entropy is not None
    return scores.log_prob, scores.log_z, scores.entropy


def ours_log_prob(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    return (score_tokens(logits, targets).log_prob,)


def ours_log_prob_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """What trainers' fused ops give: no power."""
    scores = score_tokens(logits, targets, entropy=True)
    assert scores.entropy is not None
    return scores.log_prob, scores.entropy


def torch_log_softmax(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    log_p = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    return (log_p.gather(-1, targets[:, None]).squeeze(-1),)


def torch_cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    return (-torch.nn.functional.cross_entropy(logits, targets, reduction="none"),)


def trl_log_prob(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    from trl.trainer.utils import selective_log_softmax

    return (selective_log_softmax(logits, targets),)


def trl_log_prob_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    return selective_log_softmax(logits, targets), entropy_from_logits(logits)


def verl_log_prob_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    from verl.utils import torch_functional

    log_prob = torch_functional.logprobs_from_logits(logits, targets, inplace_backward=False)
    return log_prob, torch_functional.entropy_from_logits(logits)


def liger_log_prob(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return (-liger_cross_entropy(logits, targets, reduction="none"),)


def quack_log_prob(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    from quack.cross_entropy import cross_entropy

    return (-cross_entropy(logits, targets, reduction="none"),)


Scores = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
NAMES = {ALL: SCORES, LOG_PROB: SCORES[:1], NO_LOG_Z: SCORES[::2]}


# Its backward leaves the gradient where the logits were, as early as in the forward.
OVERWRITES = (liger_log_prob,)


def logits_for(function: Scores, x: Inputs) -> Tensor:
    """The logits, or a copy for a function that overwrites them."""
    return x.logits.clone() if function in OVERWRITES else x.logits.detach()


def forward(function: Scores, kind: str) -> Callable[[Inputs], Call]:
    def bind(x: Inputs) -> Call:
        logits = logits_for(function, x)
        return lambda: dict(zip(NAMES[kind], function(logits, x.targets), strict=True))

    return bind


def lazily(compiled: Callable[[], Scores]) -> Scores:
    """Compiled when it is first called."""
    return lambda logits, targets: compiled()(logits, targets)


def exact_forward(x: Inputs, found: Outputs) -> Outputs:
    return dict(zip(SCORES, exact_scores(x.logits, x.targets), strict=True))


def torch_forward(x: Inputs, found: Outputs) -> Outputs:
    return dict(zip(SCORES, torch_scores(x.logits, x.targets), strict=True))


IMPLEMENTATIONS: tuple[Implementation, ...] = (
    ("powerkernels", ours, ALL, None, 0),
    ("powerkernels, log_prob", ours_log_prob, LOG_PROB, None, 0),
    ("powerkernels, log_prob and entropy", ours_log_prob_entropy, NO_LOG_Z, None, 0),
    ("torch eager", torch_scores, ALL, "eager", 4),
    ("torch.compile", lazily(compiled_scores), ALL, "compile", 1),
    ("torch log_softmax, log_prob", torch_log_softmax, LOG_PROB, "eager", 2),
    ("torch cross_entropy, log_prob", torch_cross_entropy, LOG_PROB, "eager", 2),
    ("TRL, log_prob", trl_log_prob, LOG_PROB, "trl", 1),
    ("TRL, log_prob and entropy", trl_log_prob_entropy, NO_LOG_Z, "trl", 2),
    ("verl, log_prob and entropy", verl_log_prob_entropy, NO_LOG_Z, "verl", 3),
    ("Liger, log_prob", liger_log_prob, LOG_PROB, "liger", 1),
    ("quack, log_prob", quack_log_prob, LOG_PROB, "quack", 1),
)

SCORE_TOKENS = Kernel(
    name="score_tokens",
    part="logprob",
    summary="log_prob, log_z (α = 4) and entropy of each row; one read of the logits is the floor",
    cases=cases,
    inputs=make,
    few=few,
    picked=picked,
    expected=exact_forward,
    yardstick=torch_forward,
    ceiling="read",
    variants=variants_of(IMPLEMENTATIONS, forward),
)


# ---- forward and backward


def gradient_name(kind: str) -> str:
    return f"dlogits of {kind}"


def weighted(scores: tuple[Tensor, ...], weights: Tensor, kind: str) -> Tensor:
    chosen = [weights[SCORES.index(name)] for name in NAMES[kind]]
    return sum((s * w).sum() for s, w in zip(scores, chosen, strict=True))


def gradient(function: Scores, kind: str) -> Callable[[Inputs], Call]:
    def bind(x: Inputs) -> Call:
        logits = logits_for(function, x)

        def call() -> Outputs:
            leaf = logits.detach().requires_grad_()
            total = weighted(function(leaf, x.targets), x.weights, kind)
            return {gradient_name(kind): torch.autograd.grad(total, leaf)[0]}

        return call

    return bind


def backward_alone(function: Scores) -> Callable[[Inputs], Call]:
    def bind(x: Inputs) -> Call:
        logits = x.logits.detach().requires_grad_()
        total = weighted(function(logits, x.targets), x.weights, ALL)

        def call() -> Outputs:
            (found,) = torch.autograd.grad(total, logits, retain_graph=True)
            return {gradient_name(ALL): found}

        return call

    return bind


def in_place(x: Inputs) -> Call:
    """Each call's gradient is the next one's logits: as many bytes, and other numbers."""
    logits = x.logits.detach().clone()

    def call() -> Outputs:
        leaf = logits.detach().requires_grad_()
        scores = score_tokens(leaf, x.targets, alpha=ALPHA, entropy=True, inplace_backward=True)
        (found,) = torch.autograd.grad(weighted(scores, x.weights, ALL), leaf)
        return {gradient_name(ALL): found}

    return call


def _gradients(function: Scores, logits: Tensor, x: Inputs) -> Outputs:
    leaf = logits.detach().requires_grad_()
    scores = function(leaf, x.targets)
    weights = x.weights.to(scores[0].dtype)
    found = {}
    for kind, names in NAMES.items():
        chosen = tuple(scores[SCORES.index(name)] for name in names)
        total = weighted(chosen, weights, kind)
        (found[gradient_name(kind)],) = torch.autograd.grad(total, leaf, retain_graph=True)
    return found


def exact_gradients(x: Inputs, found: Outputs) -> Outputs:
    return _gradients(exact_scores, x.logits.double(), x)


def torch_gradients(x: Inputs, found: Outputs) -> Outputs:
    return _gradients(torch_scores, x.logits, x)


def gradient_cases(size: Size) -> list[Case]:
    """Fewer: a chain of torch ops takes seconds for a backward on a CPU."""
    found = [case for case in cases(size, reads=2, writes=1) if case.sweep != ("vocab",)]
    most = max(case.shape["rows"] for case in found)
    return [case for case in found if size != "host" or case.shape["rows"] < most]


SCORE_TOKENS_FWD_BWD = Kernel(
    name="score_tokens_fwd_bwd",
    part="logprob",
    summary="the same and the gradient of all its scores; two reads and a write are the floor",
    cases=gradient_cases,
    inputs=make,
    few=few,
    picked=picked,
    expected=exact_gradients,
    yardstick=torch_gradients,
    ceiling="copy",
    variants=[
        Variant("powerkernels", gradient(ours, ALL), ours=True),
        # Before the others: its memory is a copy of the logits.
        Variant(
            "powerkernels, in place",
            in_place,
            ours=True,
            extra_memory=lambda case: case.memory // 2,
        ),
        Variant("powerkernels, log_prob", gradient(ours_log_prob, LOG_PROB), ours=True),
        *variants_of(
            [implementation for implementation in IMPLEMENTATIONS if implementation[3]],
            gradient,
            times_copies=2,
        ),
    ],
)

SCORE_TOKENS_BWD = Kernel(
    name="score_tokens_bwd",
    part="logprob",
    summary="the backward alone, from saved scores; a read and a write are the floor",
    cases=lambda size: [case for case in cases(size, reads=1, writes=1) if case.main],
    inputs=make,
    few=few,
    picked=picked,
    expected=exact_gradients,
    yardstick=torch_gradients,
    ceiling="copy",
    variants=[
        Variant("powerkernels", backward_alone(ours), ours=True),
        Variant(
            "torch eager",
            backward_alone(torch_scores),
            peer="eager",
            extra_memory=float32_copies(6),
        ),
    ],
)


# ---- sample_tokens


def our_sample(x: Inputs) -> Call:
    def call() -> Outputs:
        drawn = sample_tokens(x.logits, alpha=ALPHA, seed=0, counters=x.counters, entropy=True)
        return {"token": drawn.token, "log_prob": drawn.log_prob, "log_z": drawn.log_z}

    return call


def torch_sample(x: Inputs) -> Call:
    """Draws from p^alpha and scores the token under p, with torch's own generator."""

    def call() -> Outputs:
        log_p = torch.log_softmax(x.logits, dim=-1, dtype=torch.float32)
        scaled = ALPHA * log_p
        log_z = torch.logsumexp(scaled, dim=-1)
        token = torch.multinomial(torch.softmax(scaled, dim=-1), 1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        log_prob = log_p.gather(-1, token)[:, 0]
        return {"own token": token[:, 0], "log_z": log_z, "own log_prob": log_prob, "h": entropy}

    return call


def flashinfer_sample(x: Inputs) -> Call:
    """The token alone."""
    from flashinfer.sampling import sampling_from_logits

    return lambda: {"own token": sampling_from_logits(ALPHA * x.logits.float()).long()}


def exact_sample(x: Inputs, found: Outputs) -> Outputs:
    """Ours draws the reference's token; a peer's own draw must have some probability."""
    logits = x.logits.double()
    token, log_prob, log_z, *_ = reference.sample_tokens(
        logits,
        alpha=ALPHA,
        seed=torch.zeros(1, dtype=torch.int64, device=logits.device),
        counters=x.counters,
        banned=None,
        entropy=False,
    )
    expected = {"token": token, "log_prob": log_prob, "log_z": log_z}
    if "own token" in found:
        own = found["own token"]
        log_p = torch.log_softmax(logits, dim=-1).gather(-1, own[:, None])[:, 0]
        likely = ALPHA * log_p - log_z > math.log(1e-9)
        expected |= {"own token": torch.where(likely, own, -1), "own log_prob": log_p}
    return expected


def torch_sample_scores(x: Inputs, found: Outputs) -> Outputs:
    """In torch, of the tokens that were drawn."""
    names = ("token", "log_prob") if "token" in found else ("own token", "own log_prob")
    log_prob, log_z, _ = torch_scores(x.logits, found[names[0]])
    return {names[1]: log_prob, "log_z": log_z}


def sample_cases(size: Size) -> list[Case]:
    rows = {"device": (64, 1, 256), "host": (16, 64), "quick": (4,)}[size]
    model = SMOLLM2 if size == "quick" else QWEN_1B
    found = []
    for n in rows:
        num_bytes = n * model.vocab * 2
        found.append(
            Case(
                f"{model.name}, {n} rows",
                {"rows": n, "vocab": model.vocab},
                torch.bfloat16,
                bytes=num_bytes,
                memory=num_bytes,
                sweep=("rows",),
                main=n == rows[0],
            )
        )
    return found


SAMPLE_TOKENS = Kernel(
    name="sample_tokens",
    part="logprob",
    summary="a token of each row from p^α (α = 4), its log_prob, log_z and entropy",
    cases=sample_cases,
    inputs=make,
    few=few,
    picked=picked,
    expected=exact_sample,
    yardstick=torch_sample_scores,
    by_outcome=True,
    ceiling="read",
    variants=[
        Variant("powerkernels", our_sample, ours=True),
        Variant("torch eager", torch_sample, peer="eager", extra_memory=float32_copies(4)),
        Variant(
            "flashinfer, token alone",
            flashinfer_sample,
            peer="flashinfer",
            extra_memory=float32_copies(1),
        ),
    ],
)

KERNELS = [SCORE_TOKENS, SCORE_TOKENS_FWD_BWD, SCORE_TOKENS_BWD, SAMPLE_TOKENS]
