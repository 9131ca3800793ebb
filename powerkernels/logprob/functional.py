"""score_tokens and sample_tokens: checks, torch ops with their gradients, public functions."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from powerkernels import _extension, _process_group
from powerkernels._arguments import (
    INDEX_DTYPES,
    LOGIT_DTYPES,
    check_count,
    check_number,
    check_shape,
    check_tensor,
    check_vocab,
    described,
    seed_tensor,
)
from powerkernels.logprob import cpp, eager, vocab_parallel
from powerkernels.logprob.options import (
    ScoreOptions,
    Scores,
    Support,
    can_be_overwritten,
    empty_scores,
    score_dtype,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

TEMPERATURE_DTYPES = (torch.float32, torch.float64)


class TokenScores(NamedTuple):
    log_prob: Tensor  # [...] log p(target)
    log_z: Tensor  # [...] log sum_v p(v)^alpha
    entropy: Tensor | None  # [...] of p, in nats; None unless asked


class TokenSamples(NamedTuple):
    token: Tensor  # int64 [C]
    log_prob: Tensor  # [C] log p(token)
    log_z: Tensor  # [C] log sum_v p(v)^alpha, over the support
    entropy: Tensor | None  # [C] of p, in nats; None unless asked


def implementation(logits: Tensor, options: ScoreOptions) -> ModuleType:
    """The module that computes the scores of these logits."""
    backend = _extension.backend_for(logits.device)
    if backend == "cpp":
        return cpp
    if backend == "triton":
        from powerkernels.logprob import gpu  # imports triton

        if gpu.serves(logits, options):
            return gpu
    return eager


@torch.library.custom_op("powerkernels::score_tokens", mutates_args=())
def _score_tokens(
    logits: Tensor,
    targets: Tensor,
    temperatures: Tensor | None,
    alpha: float,
    temperature: float,
    entropy: bool,
    softcap: float | None,
    ignore_index: int,
    group: str,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = ScoreOptions(alpha, temperature, temperatures, entropy, softcap)
    module = implementation(logits, options)
    if not group:
        return module.score_tokens(logits, targets, ignore_index, options)
    sums = module.row_sums(logits, targets, ignore_index, options)
    sums = _process_group.all_gather(sums, group)
    scores = module.finish_scores(sums, targets, ignore_index, options)
    return Scores(*(score.to(score_dtype(logits)) for score in scores))


@_score_tokens.register_fake
def _(
    logits: Tensor,
    targets: Tensor,
    temperatures: Tensor | None,
    alpha: float,
    temperature: float,
    entropy: bool,
    softcap: float | None,
    ignore_index: int,
    group: str,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return empty_scores(logits, targets.shape, entropy)


def _score_tokens_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, temperatures, alpha, temperature, entropy, softcap, *rest = inputs
    ignore_index, _, ctx.inplace = rest
    ctx.entropy = entropy
    ctx.save_for_backward(logits, targets, temperatures, *output)
    ctx.parameters = (alpha, temperature, softcap, ignore_index)
    ctx.set_materialize_grads(False)


def _score_tokens_backward(
    ctx: Any,
    grad_log_prob: Tensor | None,
    grad_log_z: Tensor | None,
    grad_entropy: Tensor | None,
    _row_max: None,
    _log_sum: None,
) -> tuple[Tensor | None, ...]:
    logits, targets, temperatures, *scores = ctx.saved_tensors
    grad_entropy = grad_entropy if ctx.entropy else None
    arguments = (targets, temperatures, *scores, grad_log_prob, grad_log_z, grad_entropy)
    if ctx.inplace:
        _score_tokens_bwd_(logits, *arguments, *ctx.parameters)
        dlogits = logits
    else:
        dlogits = _score_tokens_bwd(logits, *arguments, *ctx.parameters)
    return (dlogits,) + 9 * (None,)


_score_tokens.register_autograd(_score_tokens_backward, setup_context=_score_tokens_setup)


@torch.library.custom_op("powerkernels::score_tokens_bwd", mutates_args=())
def _score_tokens_bwd(
    logits: Tensor,
    targets: Tensor,
    temperatures: Tensor | None,
    log_prob: Tensor,
    log_z: Tensor,
    entropy: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    grad_log_prob: Tensor | None,
    grad_log_z: Tensor | None,
    grad_entropy: Tensor | None,
    alpha: float,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
) -> Tensor:
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    options = ScoreOptions(alpha, temperature, temperatures, grad_entropy is not None, softcap)
    implementation(logits, options).score_tokens_bwd(
        logits,
        targets,
        ignore_index,
        options,
        Scores(log_prob, log_z, entropy, row_max, log_sum),
        (grad_log_prob, grad_log_z, grad_entropy),
        dlogits,
    )
    return dlogits


@_score_tokens_bwd.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@torch.library.custom_op("powerkernels::score_tokens_bwd_", mutates_args=("logits",))
def _score_tokens_bwd_(
    logits: Tensor,
    targets: Tensor,
    temperatures: Tensor | None,
    log_prob: Tensor,
    log_z: Tensor,
    entropy: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    grad_log_prob: Tensor | None,
    grad_log_z: Tensor | None,
    grad_entropy: Tensor | None,
    alpha: float,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
) -> None:
    options = ScoreOptions(alpha, temperature, temperatures, grad_entropy is not None, softcap)
    implementation(logits, options).score_tokens_bwd(
        logits,
        targets,
        ignore_index,
        options,
        Scores(log_prob, log_z, entropy, row_max, log_sum),
        (grad_log_prob, grad_log_z, grad_entropy),
        logits,
    )


@_score_tokens_bwd_.register_fake
def _(*_: Any) -> None:
    return None


def score_tokens(
    logits: Tensor,
    targets: Tensor,
    *,
    alpha: float = 1.0,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    softcap: float | None = None,
    ignore_index: int = -100,
    process_group: ProcessGroup | None = None,
    inplace_backward: bool = False,
) -> TokenScores:
    """Log-probability, power normaliser and entropy of each token, from one read of the logits.

    p = softmax(z / temperature), z = softcap * tanh(logits / softcap) if softcap is given.
    alpha * log_prob - log_z is the log-probability under p^alpha, renormalised. All three have a
    gradient (once, not twice).

    -inf logits are legal: such entries are outside the vocabulary (also at alpha = 0 and under a
    softcap), and as a target they have log_prob -inf, whose gradient is 0. NaN, +inf, or nothing
    but -inf in a row gives NaN for that row alone; on a GPU also a finite logit that
    log2(e) / temperature takes out of float32's range. Rows whose target is ignore_index give 0
    throughout. They, and rows whose incoming gradients are all 0, get the gradient 0 whatever they
    hold.

    Args:
        logits: float16, bfloat16, float32 or float64 [..., V], V >= 1. Rows may have any stride.
            With process_group, this rank's part of the vocabulary: V may differ between ranks.
        targets: int32 or int64 [...], in [0, V) (of all ranks together) or ignore_index.
        alpha: the power, finite, >= 0.
        temperature: > 0, finite; a number, or float32 or float64 [...], one a token (no gradient).
        entropy: whether to compute the entropy of p.
        softcap: > 0, finite; None for none.
        ignore_index: the target of rows to leave out.
        process_group: over whose ranks the vocabulary is split, in the order of the ranks. All
            ranks call with the same targets and get the same scores; a rank's gradient is that of
            its own logits, if all ranks go on to compute the same loss. In a CUDA graph if its
            backend can be captured, as NCCL can once it has been used, and gloo cannot.
        inplace_backward: the backward may overwrite logits with their gradient, which saves as
            much memory as they take. Nothing else may need them then: an op that does raises in
            its own backward. Left aside under torch.compile, which plans memory itself.

    Returns:
        TokenScores of float32 [...] (float64 for float64 logits): log_prob in [-inf, 0];
        log_z = LSE(alpha z) - alpha LSE(z), <= 0 for alpha >= 1, 0 at 1; entropy in nats or None.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype, device or range, or
            a rank of process_group has no part of the vocabulary.
        IndexError: a target is neither in [0, V) nor ignore_index (checked on CPU only; on a GPU
            its log_prob is -inf).

    Source: the power distribution of Karan & Du 2025, "Reasoning with Sampling", section 4.1.
    """
    check_tensor("logits", logits, LOGIT_DTYPES)
    if process_group is None:
        check_vocab("logits", logits)
    elif logits.ndim == 0:
        raise ValueError(f"logits must have at least 1 dimension, got {described(logits)}")
    check_tensor("targets", targets, INDEX_DTYPES, logits.device)
    check_shape("targets", targets, logits.shape[:-1])
    number, temperatures = check_options(alpha, temperature, softcap, targets)
    group = _process_group.name_of(process_group)
    if group:
        targets = vocab_parallel.local_targets(targets, logits.shape[-1], ignore_index, group)
        ignore_index = vocab_parallel.IGNORED
    if inplace_backward and logits.requires_grad:
        if torch.compiler.is_compiling():
            inplace_backward = False
        elif not can_be_overwritten(logits):
            raise ValueError(
                "inplace_backward needs logits whose entries are all in different places and "
                f"contiguous in the vocabulary, got {described(logits)}, strides {logits.stride()}"
            )
    log_prob, log_z, entropies, _, _ = _score_tokens(
        logits,
        targets,
        temperatures,
        float(alpha),
        number,
        entropy,
        None if softcap is None else float(softcap),
        ignore_index,
        group,
        inplace_backward,
    )
    return TokenScores(log_prob, log_z, entropies if entropy else None)


def check_options(
    alpha: float, temperature: float | Tensor, softcap: float | None, targets: Tensor
) -> tuple[float, Tensor | None]:
    """The temperature as a number, 1 where it is a tensor, and the tensor."""
    check_number("alpha", alpha, low=0)
    if softcap is not None:
        check_number("softcap", softcap, low=0, open_low=True)
    if not isinstance(temperature, Tensor):
        check_number("temperature", temperature, low=0, open_low=True)
        return float(temperature), None
    check_tensor("temperature", temperature, TEMPERATURE_DTYPES, targets.device)
    check_shape("temperature", temperature, targets.shape)
    if temperature.requires_grad:
        raise ValueError("temperature must not require a gradient: there is none for it")
    # On a GPU that would wait for the device.
    if temperature.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = ~((temperature > 0) & temperature.isfinite())
        if bad.any():
            value = temperature[bad][0].item()
            raise ValueError(f"temperature must be finite numbers > 0, got {value!r} among them")
    return 1.0, temperature


@torch.library.custom_op("powerkernels::sample_tokens", mutates_args=())
def _sample_tokens(
    logits: Tensor,
    counters: Tensor,
    seed: Tensor,
    banned: Tensor | None,
    alpha: float,
    entropy: bool,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_banned(banned, logits.shape[-1])
    options = ScoreOptions(alpha=alpha, entropy=entropy)
    token, scores = implementation(logits, options).sample_tokens(
        logits, seed, counters, banned, options, _support(top_k, top_p, min_p, logits.shape[-1])
    )
    return token, *scores[:3]


@_sample_tokens.register_fake
def _(
    logits: Tensor,
    counters: Tensor,
    seed: Tensor,
    banned: Tensor | None,
    alpha: float,
    entropy: bool,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    token = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    return token, *empty_scores(logits, token.shape, entropy)[:3]


def sample_tokens(
    logits: Tensor,
    *,
    alpha: float = 1.0,
    seed: int | Tensor,
    counters: Tensor,
    banned: Tensor | None = None,
    entropy: bool = False,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> TokenSamples:
    """Draws a token per row from q ~ p^alpha, p = softmax(logits), and scores it under p.

    top_k, top_p and min_p restrict q to a support: the entries at or above a logit, the largest of
    the three bounds' thresholds, as transformers' warpers do in this order at temperature 1/alpha.
    Entries with the threshold's own logit are in, and so is always the largest. The scores are
    those of p over all of the vocabulary, but log_z = log Σ p(v)^alpha over the support:
    alpha * log_prob - log_z is the log-probability of the token under what it was drawn from.

    A row's result depends on its logits, counters, banned token and the seed, and on nothing else:
    not on the other rows, the row's place, or the number of threads. log_prob, entropy and, without
    a bound, log_z have the bits that `score_tokens` gives for the token, and its gradient where
    logits require one.

    Every backend draws the same token from the same logits and counters, but where the uniform
    falls within float32's rounding of a bound of the cumulative probabilities. The tests allow that
    in 2 of 2000 draws between the C++ and the float64 reference. All find the same support for
    top_k; for top_p they may differ where the mass down to a logit is within 1e-6 of top_p, and for
    min_p where a logit comes within two roundings of float32 of the threshold.

    A row with NaN, +inf, or nothing but -inf gives token -1 and NaN scores.

    Args:
        logits: float16, bfloat16, float32 or float64 [C, V], V >= 1. -inf entries are never drawn.
        alpha: the power, finite, >= 0; 0 is uniform over the entries above -inf.
        seed: 64 bits, an int or an int64 tensor of one element.
        counters: int64 [C, 4], the row's Philox counter (index, position, step, chain). Rows with
            the same counter get the same uniforms.
        banned: int64 [C] or None. A banned token (-1: none) is drawn only if it alone has mass;
            the draw is from q restricted to the others, the scores are those without a ban.
        entropy: whether to compute the entropy of p.
        top_k: >= 1; the top_k largest logits. V and more, or None: no bound.
        top_p: in (0, 1]; of what top_k leaves, the fewest largest logits whose share of its mass
            under q is at least top_p. 1 or None: no bound.
        min_p: in [0, 1]; the entries v with q(v) >= min_p * max q. 0 or None: no bound.

    Returns:
        TokenSamples: token int64 [C]; the others float32 [C] (float64 for float64 logits).

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype, device or range, or
            logits require a gradient and top_k, top_p or min_p is given.

    Source: the proposal of Karan & Du 2025, "Reasoning with Sampling", Algorithm 1.
    """
    check_tensor("logits", logits, LOGIT_DTYPES)
    check_vocab("logits", logits, 2)
    check_number("alpha", alpha, low=0)
    check_tensor("counters", counters, (torch.int64,), logits.device)
    check_shape("counters", counters, (logits.shape[0], 4))
    if banned is not None:
        check_tensor("banned", banned, (torch.int64,), logits.device)
        check_shape("banned", banned, (logits.shape[0],))
    if top_k is not None:
        check_count("top_k", top_k, low=1)
        top_k = min(top_k, logits.shape[-1])
    if top_p is not None:
        check_number("top_p", top_p, low=0, open_low=True, high=1)
        top_p = float(top_p)
    if min_p is not None:
        check_number("min_p", min_p, low=0, high=1)
        min_p = float(min_p)
    wants_gradient = torch.is_grad_enabled() and logits.requires_grad
    if wants_gradient and (top_k, top_p, min_p) != (None, None, None):
        raise ValueError(
            "logits must not require a gradient where top_k, top_p or min_p is given: there is "
            "none of log_z over a support; detach them, or score the token with score_tokens"
        )
    key = seed_tensor(seed, logits.device)
    token, *scores = _sample_tokens(
        logits.detach(), counters, key, banned, float(alpha), entropy, top_k, top_p, min_p
    )
    if wants_gradient:
        scores = list(score_tokens(logits, token.clamp(min=0), alpha=alpha, entropy=entropy))
    log_prob, log_z, entropies = scores
    return TokenSamples(token, log_prob, log_z, entropies if entropy else None)


def _support(
    top_k: int | None, top_p: float | None, min_p: float | None, vocab: int
) -> Support | None:
    """None where nothing is left out."""
    support = Support(
        vocab if top_k is None else top_k,
        1.0 if top_p is None else top_p,
        0.0 if min_p is None else min_p,
    )
    return None if support.keeps_all(vocab) else support


def _check_banned(banned: Tensor | None, vocab: int) -> None:
    if banned is None or banned.device.type != "cpu":
        return
    bad = (banned < -1) | (banned >= vocab)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise IndexError(f"banned must be in [-1, {vocab}), got {int(banned[row])} at row {row}")
