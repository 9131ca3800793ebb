"""linear_score_tokens: checks, torch op with its gradient, public function.

The vocabulary is taken in chunks, all rows at once: a chunk's logits [N, C] are one matmul, scored
as a shard of the vocabulary, and forgotten. The backward computes them again, overwrites them with
their gradient, and is two more matmuls. Because a chunk has all rows, its part of the weight's
gradient is one matmul, summed over the rows in the accumulators of the hardware: no float32 copy
of it is needed.

Floor, forward and backward: 8 N D V FLOP in four matmuls (one forward, three backward). The chunks
add N V elements written and read forward, 3 N V written and read backward: at 8192/4096/151936 in
bfloat16, against 790 TFLOP/s and 4.3 TB/s, 1.2 ms on 12.9 ms and 3.5 ms on 38.7 ms (predicted, not
measured).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from powerkernels import _process_group
from powerkernels._arguments import (
    INDEX_DTYPES,
    LOGIT_DTYPES,
    check_shape,
    check_tensor,
    described,
)
from powerkernels.logprob import eager, vocab_parallel
from powerkernels.logprob.functional import TokenScores, check_options, implementation
from powerkernels.logprob.options import ScoreOptions, Scores, empty_scores, score_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Method = Literal["auto", "chunked", "fused"]

# Logits of a chunk: large enough that its matmuls are large, small beside weight and hidden.
CHUNK_LOGITS = {"cuda": 2**26, "cpu": 2**22}
# A narrower chunk would leave the matmuls' tiles unfilled, whatever the number of rows.
MIN_CHUNK_V = 256
# Below this many hidden units the chunk's way through memory costs more than the fused kernel's
# epilogue, which its matmul does not hide. Predicted from the floors; not yet measured.
FUSED_BELOW_D = 2048


class _Gradients(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor


@torch.library.custom_op("powerkernels::linear_score_tokens", mutates_args=())
def _linear_score_tokens(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperatures: Tensor | None,
    alpha: float,
    temperature: float,
    entropy: bool,
    softcap: float | None,
    ignore_index: int,
    group: str,
    method: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if not group:
        eager.check_targets(targets, weight.shape[0], ignore_index)
    options = ScoreOptions(alpha, temperature, temperatures, entropy, softcap)
    kept = _kept_rows(targets != ignore_index)
    if kept is None:
        return _forward(hidden, weight, bias, targets, ignore_index, options, group, method)
    found = _forward(
        hidden[kept],
        weight,
        bias,
        targets[kept],
        ignore_index,
        _options_of(options, kept),
        group,
        method,
    )
    scores = empty_scores(hidden, targets.shape, entropy)
    for score, value in zip(scores, found, strict=True):
        if score.numel():
            score.zero_().index_copy_(0, kept, value)
    return scores


@_linear_score_tokens.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperatures: Tensor | None,
    alpha: float,
    temperature: float,
    entropy: bool,
    softcap: float | None,
    ignore_index: int,
    group: str,
    method: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return empty_scores(hidden, targets.shape, entropy)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, temperatures, alpha, temperature, *rest = inputs
    ctx.entropy, softcap, ignore_index, group, _ = rest
    ctx.save_for_backward(hidden, weight, bias, targets, temperatures, *output)
    ctx.parameters = (alpha, temperature, softcap, ignore_index, group)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any,
    grad_log_prob: Tensor | None,
    grad_log_z: Tensor | None,
    grad_entropy: Tensor | None,
    _row_max: None,
    _log_sum: None,
) -> tuple[Tensor | None, ...]:
    grad_entropy = grad_entropy if ctx.entropy else None
    needed = list(ctx.needs_input_grad[:3])
    gradients = _linear_score_tokens_bwd(
        *ctx.saved_tensors, grad_log_prob, grad_log_z, grad_entropy, *ctx.parameters, *needed
    )
    found = (gradient if need else None for gradient, need in zip(gradients, needed, strict=True))
    return (*found, *(9 * (None,)))


_linear_score_tokens.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("powerkernels::linear_score_tokens_bwd", mutates_args=())
def _linear_score_tokens_bwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
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
    group: str,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _empty_gradients(hidden, weight, bias, needs_hidden, needs_weight, needs_bias)
    incoming = (grad_log_prob, grad_log_z, grad_entropy)
    counts = torch.zeros_like(targets, dtype=torch.bool)
    for grad in incoming:
        counts |= False if grad is None else grad != 0
    counts &= targets != ignore_index
    kept = _kept_rows(counts)
    options = ScoreOptions(alpha, temperature, temperatures, grad_entropy is not None, softcap)
    scores = Scores(log_prob, log_z, entropy, row_max, log_sum)
    hidden_sums = _hidden_sums(hidden, kept) if needs_hidden else None
    if kept is not None:
        hidden, targets = hidden[kept], targets[kept]
        options = _options_of(options, kept)
        scores = Scores(*(score[kept] if score.numel() else score for score in scores))
        at_kept = [None if grad is None else grad[kept] for grad in incoming]
        incoming = (at_kept[0], at_kept[1], at_kept[2])
    _add_gradients(
        hidden,
        weight,
        bias,
        targets,
        ignore_index,
        options,
        scores,
        incoming,
        hidden_sums,
        gradients.weight if needs_weight else None,
        gradients.bias if needs_bias else None,
    )
    if hidden_sums is not None:
        if group:
            _process_group.all_reduce(hidden_sums, group)
        if kept is None:
            gradients.hidden.copy_(hidden_sums)
        else:
            gradients.hidden.zero_().index_copy_(0, kept, hidden_sums.to(hidden.dtype))
    return gradients


@_linear_score_tokens_bwd.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(hidden, weight, bias, *arguments[-3:])


def linear_score_tokens(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    alpha: float = 1.0,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    softcap: float | None = None,
    ignore_index: int = -100,
    process_group: ProcessGroup | None = None,
    method: Method = "auto",
) -> TokenScores:
    """`score_tokens(hidden @ weight.T + bias, targets)` without the logits in memory.

    Gradients go to hidden, weight and bias, those of them that require one. Rows that are ignored
    take no part; in the backward neither do rows whose incoming gradients are all 0 (masked,
    clipped, advantage 0): they cost nothing, and nothing in them reaches another row or the weight.
    On a GPU each of the two is one wait for the device, to know how many rows are left; while a
    CUDA graph is captured all rows take part.

    Args:
        hidden: float16, bfloat16, float32 or float64 [..., D], D >= 1: the last hidden states.
        weight: [V, D], V >= 1, dtype and device of hidden: the LM head, or the tied embedding. With
            process_group, this rank's rows of it.
        targets: int32 or int64 [...], in [0, V) (of all ranks together) or ignore_index.
        bias: [V], dtype and device of hidden, or None.
        alpha, temperature, entropy, softcap, ignore_index: as in `score_tokens`.
        process_group: over whose ranks the vocabulary is split, in the order of the ranks. All
            ranks call with the same hidden and targets and get the same scores. The gradient of
            hidden is summed over the ranks; that of weight and bias is of this rank's part.
        method: "chunked", matmul and scoring by turns; "fused", a matmul that keeps only the sums
            (forward on a GPU; the backward is chunked); "auto" picks by size.

    Returns:
        TokenScores of float32 [...] (float64 for float64 hidden), as `score_tokens` gives them.
        Chunked logits are rounded to hidden's dtype, as a model's own head does; fused ones are
        float32.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype, device or range, a
            rank of process_group has no part of the vocabulary, or method="fused" cannot be had.
        IndexError: a target is neither in [0, V) nor ignore_index (checked on CPU only; on a GPU
            its log_prob is -inf).
    """
    check_tensor("hidden", hidden, LOGIT_DTYPES)
    if hidden.ndim == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"hidden must have shape [..., D] with D >= 1, got {described(hidden)}")
    check_tensor("weight", weight, (hidden.dtype,), hidden.device)
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must have shape [V, {hidden.shape[-1]}] as hidden has, got {described(weight)}"
        )
    if weight.shape[0] == 0 and process_group is None:
        raise ValueError(f"weight must have a vocabulary of at least 1, got {described(weight)}")
    if bias is not None:
        check_tensor("bias", bias, (hidden.dtype,), hidden.device)
        check_shape("bias", bias, weight.shape[:1])
    check_tensor("targets", targets, INDEX_DTYPES, hidden.device)
    check_shape("targets", targets, hidden.shape[:-1])
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}")
    number, temperatures = check_options(alpha, temperature, softcap, targets)
    shape = targets.shape
    group = _process_group.name_of(process_group)
    if group:
        targets = vocab_parallel.local_targets(targets, weight.shape[0], ignore_index, group)
        ignore_index = vocab_parallel.IGNORED
    log_prob, log_z, entropies, _, _ = _linear_score_tokens(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        targets.reshape(-1),
        None if temperatures is None else temperatures.reshape(-1),
        float(alpha),
        number,
        entropy,
        None if softcap is None else float(softcap),
        ignore_index,
        group,
        method,
    )
    return TokenScores(
        log_prob.view(shape), log_z.view(shape), entropies.view(shape) if entropy else None
    )


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    options: ScoreOptions,
    group: str,
    method: str,
) -> Scores:
    module = implementation(hidden, options)
    if _is_fused(hidden, weight, options, method):
        from powerkernels.linear_logprob import gpu

        sums = gpu.row_sums(hidden, weight, bias, targets, ignore_index, options).unsqueeze(0)
    else:
        chunks = _chunks(hidden, weight, bias, targets, ignore_index)
        sums = torch.stack(
            [
                module.row_sums(logits, local, vocab_parallel.IGNORED, options)
                for _, logits, local in chunks
            ]
        )
    if group:
        sums = _process_group.all_gather(sums, group).flatten(0, 1)
    scores = module.finish_scores(sums, targets, ignore_index, options)
    return Scores(*(score.to(score_dtype(hidden)) for score in scores))


def _add_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    options: ScoreOptions,
    scores: Scores,
    incoming: tuple[Tensor | None, Tensor | None, Tensor | None],
    hidden_sums: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> None:
    """Writes dweight and dbias, adds to hidden_sums."""
    module = implementation(hidden, options)
    for start, logits, local in _chunks(hidden, weight, bias, targets, ignore_index):
        end = start + logits.shape[1]
        module.score_tokens_bwd(
            logits, local, vocab_parallel.IGNORED, options, scores, incoming, logits
        )
        dlogits = logits
        if dbias is not None:
            dbias[start:end] = dlogits.sum(0, dtype=scores.log_prob.dtype)
        if dweight is not None:
            torch.mm(dlogits.T, hidden, out=dweight[start:end])
        if hidden_sums is not None:
            _add_product(hidden_sums, dlogits, weight[start:end])


def _chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """start, logits [N, <= C] in the same memory, targets [N] of one chunk after another."""
    num_rows, vocab = hidden.shape[0], weight.shape[0]
    width = chunk_width(num_rows, vocab, hidden.device.type)
    buffer = torch.empty(num_rows * width, dtype=hidden.dtype, device=hidden.device)
    starts = torch.arange(0, vocab, width, device=hidden.device).unsqueeze(-1)
    of_chunks = vocab_parallel.shifted(targets, ignore_index, starts)
    for start, local in zip(range(0, vocab, width), of_chunks, strict=True):
        end = min(start + width, vocab)
        logits = buffer[: num_rows * (end - start)].view(num_rows, end - start)
        if bias is None:
            torch.mm(hidden, weight[start:end].T, out=logits)
        else:
            torch.addmm(bias[start:end], hidden, weight[start:end].T, out=logits)
        yield start, logits, local


def chunk_width(num_rows: int, vocab: int, device_type: str) -> int:
    """Entries of the vocabulary in a chunk."""
    logits = CHUNK_LOGITS["cpu" if device_type == "cpu" else "cuda"]
    width = max(logits // max(num_rows, 1), MIN_CHUNK_V) // MIN_CHUNK_V * MIN_CHUNK_V
    return min(width, vocab)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; total may be float32 where a and b are halves."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    else:
        total += a @ b


def _hidden_sums(hidden: Tensor, kept: Tensor | None) -> Tensor:
    """Zeros for the gradient of the kept rows, float32 or wider."""
    num_rows = hidden.shape[0] if kept is None else kept.shape[0]
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return torch.zeros((num_rows, hidden.shape[1]), dtype=dtype, device=hidden.device)


def _empty_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> _Gradients:
    """Contiguous, with no elements where not needed."""

    def empty(tensor: Tensor | None, needed: bool) -> Tensor:
        shape = tensor.shape if tensor is not None and needed else torch.Size((0,))
        return torch.empty(shape, dtype=hidden.dtype, device=hidden.device)

    return _Gradients(
        empty(hidden, needs_hidden), empty(weight, needs_weight), empty(bias, needs_bias)
    )


def _kept_rows(counts: Tensor) -> Tensor | None:
    """Where counts [N] is true; None where everywhere, or where nobody may wait to know."""
    if counts.is_cuda:
        with torch.cuda.device(counts.device):  # whose stream is asked for
            if torch.cuda.is_current_stream_capturing():
                return None
    kept = counts.nonzero().squeeze(-1)
    return None if kept.shape[0] == counts.shape[0] else kept


def _options_of(options: ScoreOptions, rows: Tensor) -> ScoreOptions:
    if options.temperatures is None:
        return options
    return options._replace(temperatures=options.temperatures[rows])


def _is_fused(hidden: Tensor, weight: Tensor, options: ScoreOptions, method: str) -> bool:
    if method == "chunked":
        return False
    why_not = _why_not_fused(hidden, weight, options)
    if method == "fused":
        if why_not:
            raise ValueError(f'method="fused" cannot be had: {why_not}')
        return True
    return why_not is None and hidden.is_cuda and hidden.shape[1] < FUSED_BELOW_D


def _why_not_fused(hidden: Tensor, weight: Tensor, options: ScoreOptions) -> str | None:
    module = implementation(hidden, options)
    if not module.__name__.endswith(".gpu"):
        return (
            f"it is a GPU kernel, and {module.__name__.rpartition('.')[2]} serves these arguments"
        )
    from powerkernels.linear_logprob import gpu

    return None if gpu.supports(hidden, weight, options) else "its kernel lacks this size or dtype"
