"""Every public op and every launcher, called as a user's first minute on a GPU would.

Over dtypes, sizes that are multiples of nothing, strided, unaligned and empty tensors, arguments
left out. Tensors have no memory, so the largest cost as little as the smallest: what takes time is
the compilation of each variant of a kernel, so a call of the short list brings one that no other
has, and the rest is in the long one.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import powerkernels as pk
from powerkernels.decode_attention import decode_attention
from powerkernels.lane_moves import LaneCaches, move_positions
from powerkernels.linear_logprob import gpu as linear_gpu
from powerkernels.logprob import gpu as logprob_gpu
from powerkernels.logprob import vocab_parallel
from powerkernels.logprob.options import ScoreOptions, Support
from powerkernels.policy_loss.advice import AdvantageScaleCheck
from powerkernels.policy_loss.aggregate import LossAggMode
from powerkernels.power_sampling.lane_state import Rules, init_lanes, rules_of
from powerkernels.power_sampling.transition import transition_of
from python_tests.launch_path import inventory
from python_tests.launch_path.stand_in_gpu import DEVICE, StandInGpu, capturing

VOCABS = (1, 2, 127, 5003, 50257, 151936, 151937)
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
# A power by products, a half-integer one, a general one, and those that are no power.
ALPHAS = (4.0, 2.5, 7.3, 1.0, 0.0, 0.5)


class Call(NamedTuple):
    name: str
    function: Callable[[StandInGpu], object]
    full: bool  # only in the long list
    launches: bool  # whether it launches anything
    copies_from_host: bool  # whether it may


CALLS: list[Call] = []


def jit_modules() -> list[ModuleType]:
    return inventory.jit_modules("powerkernels")


def add(
    name: str,
    function: Callable[..., object],
    *args: Any,
    full: bool = False,
    launches: bool = True,
    copies_from_host: bool = False,
    **kwargs: Any,
) -> None:
    """A call of `function` with these arguments, some of them made by `made` at each call."""

    def made(value: Any) -> Any:
        return value() if isinstance(value, functools.partial) else value

    def call(gpu: StandInGpu) -> object:
        return function(*map(made, args), **{name: made(value) for name, value in kwargs.items()})

    CALLS.append(Call(name, call, full, launches, copies_from_host))


def empty(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE, requires_grad=grad)


def ints(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE)


def bools(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bool, device=DEVICE)


def unaligned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """One entry behind an address that is aligned."""
    flat = torch.empty(torch.Size(shape).numel() + 1, dtype=dtype, device=DEVICE)
    return flat[1:].view(shape)


def strided(rows: int, columns: int, gap: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows with `gap` entries between them."""
    return torch.empty((rows, columns + gap), dtype=dtype, device=DEVICE)[:, :columns]


Argument = Callable[..., Tensor]


def later(function: Argument, *args: Any, **kwargs: Any) -> functools.partial[Tensor]:
    """A tensor that each call makes anew."""
    return functools.partial(function, *args, **kwargs)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Scores from logits.


def score(
    logits: Tensor,
    *,
    grads: tuple[str, ...] = (),
    temperatures: bool = False,
    target_dtype: torch.dtype = torch.int64,
    strided_targets: bool = False,
    **options: Any,
) -> None:
    """The scores, and the gradients of those named."""
    shape = logits.shape[:-1]
    logits = logits.detach().requires_grad_(bool(grads))
    targets = ints(*shape, dtype=target_dtype)
    if strided_targets:
        targets = ints(*shape, 3, dtype=target_dtype)[..., 1]
    if temperatures:
        options["temperature"] = empty(*shape, dtype=torch.float64)
    scores = pk.score_tokens(logits, targets, **options)
    if grads:
        sum(getattr(scores, name).sum() for name in grads).backward()


ALL_THREE = ("log_prob", "log_z", "entropy")

for dtype in DTYPES:
    add(
        f"score_tokens {name_of(dtype)}",
        score,
        later(empty, 8, 5003, dtype=dtype),
        alpha=4.0,
        entropy=True,
        grads=ALL_THREE,
    )
    # Many rows: a program takes a group of slices. More than 2^31 elements.
    add(
        f"score_tokens {name_of(dtype)} 20000 x 151936",
        score,
        later(empty, 20000, 151936, dtype=dtype),
        alpha=4.0,
        entropy=True,
        grads=ALL_THREE,
        full=dtype != torch.bfloat16,
    )
for vocab in VOCABS:
    for dtype, rows in itertools.product(DTYPES, (1, 8, 3000)):
        add(
            f"score_tokens {name_of(dtype)} {rows} x {vocab}",
            score,
            later(empty, rows, vocab, dtype=dtype),
            alpha=4.0,
            entropy=True,
            grads=ALL_THREE,
            full=(dtype, rows) != (torch.bfloat16, 1) or vocab not in (1, 151937),
        )
for alpha in ALPHAS:
    for entropy, softcap in itertools.product((False, True), (None, 30.0)):
        add(
            f"score_tokens alpha {alpha} entropy {entropy} softcap {softcap}",
            score,
            later(empty, 8, 5003, dtype=torch.bfloat16),
            alpha=alpha,
            entropy=entropy,
            softcap=softcap,
            temperature=0.7,
            grads=ALL_THREE if entropy else ALL_THREE[:2],
            full=(alpha, entropy, softcap) not in ((2.5, True, 30.0), (7.3, False, None)),
        )
add("score_tokens alpha 1", score, later(empty, 8, 5003), grads=ALL_THREE[:1])
add("score_tokens alpha 0", score, later(empty, 8, 5003), alpha=0.0, grads=ALL_THREE[:2])
for grads in (ALL_THREE[:1], ALL_THREE[1:2], ALL_THREE[2:]):
    add(
        f"score_tokens gradient of {grads[0]}",
        score,
        later(empty, 8, 5003, dtype=torch.bfloat16),
        alpha=4.0,
        entropy=True,
        grads=grads,
        full=grads != ALL_THREE[:1],
    )
add(
    "score_tokens in place",
    score,
    later(empty, 8, 5003, dtype=torch.bfloat16),
    alpha=4.0,
    entropy=True,
    grads=ALL_THREE,
    inplace_backward=True,
)
add(
    "score_tokens a temperature a row, int32 targets",
    score,
    later(empty, 8, 5003, dtype=torch.bfloat16),
    temperatures=True,
    target_dtype=torch.int32,
    alpha=4.0,
    entropy=True,
    ignore_index=2**31 - 1,
    grads=ALL_THREE,
)


def without_last(rows: int, length: int, vocab: int) -> Tensor:
    return empty(rows, length, vocab, dtype=torch.bfloat16)[:, :-1]


LAYOUTS: dict[str, functools.partial[Tensor]] = {
    "[B, T] without the last": later(without_last, 2, 5, 5003),
    "[B, T] of more than 2^31 elements": later(without_last, 3, 20001, 151936),
    "rows with gaps": later(strided, 8, 5003, 5, torch.bfloat16),
    "unaligned": later(unaligned, 8, 5003, dtype=torch.bfloat16),
    "unaligned float32": later(unaligned, 8, 5003),
    "columns first": later(lambda: empty(5003, 8, dtype=torch.bfloat16).T),
    "four dimensions": later(empty, 2, 3, 2, 5003, dtype=torch.bfloat16),
    "one row twice": later(lambda: empty(1, 5003, dtype=torch.bfloat16).expand(4, -1)),
    "one dimension": later(empty, 5003, dtype=torch.bfloat16),
}
for name, logits in LAYOUTS.items():
    add(
        f"score_tokens {name}",
        score,
        logits,
        alpha=4.0,
        entropy=True,
        grads=ALL_THREE,
        strided_targets=name == "rows with gaps",
        full="gaps" not in name and "2^31" not in name,
    )
add("score_tokens no rows", score, later(empty, 0, 5003), grads=ALL_THREE[:1], launches=False)
add(
    "score_tokens float64",
    score,
    later(empty, 8, 5003, dtype=torch.float64),
    grads=ALL_THREE[:1],
    launches=False,
)


def score_shards(num_shards: int, options: ScoreOptions, rows: int = 8) -> None:
    """What a rank of a vocabulary split over several does between the messages."""
    targets = vocab_parallel.shifted(ints(rows), -100, 5003)
    logits = empty(rows, 5003, dtype=torch.bfloat16)
    sums = logprob_gpu.row_sums(logits, targets, vocab_parallel.IGNORED, options)
    gathered = torch.stack(num_shards * [sums])
    scores = logprob_gpu.finish_scores(gathered, targets, vocab_parallel.IGNORED, options)
    gradients = (scores.log_prob, scores.log_z, scores.entropy if options.entropy else None)
    logprob_gpu.score_tokens_bwd(
        logits, targets, vocab_parallel.IGNORED, options, scores, gradients, logits
    )


for shards, rows in ((1, 8), (2, 8), (8, 3000)):
    add(
        f"{shards} shards of a vocabulary, {rows} rows",
        score_shards,
        shards,
        ScoreOptions(alpha=4.0, entropy=True),
        rows,
        full=shards == 1,
    )


# Draws.

# In turn: all of them with all that is beside them would take an hour to compile.
FLAG_PAIRS = itertools.cycle(itertools.product((False, True), repeat=2))


def sample(logits: Tensor, *, banned: bool = False, device_seed: bool = False, **more: Any) -> None:
    rows = logits.shape[0]
    pk.sample_tokens(
        logits,
        seed=ints(1) if device_seed else 2**64 - 1,
        counters=ints(rows, 4),
        banned=ints(rows) if banned else None,
        **more,
    )


SUPPORTS: dict[str, dict[str, Any]] = {
    "": {},
    " top_k": {"top_k": 50},
    " top_p": {"top_p": 0.9},
    " min_p": {"min_p": 0.05},
    " all bounds": {"top_k": 50, "top_p": 0.9, "min_p": 0.05},
}
for dtype in DTYPES:
    add(
        f"sample_tokens {name_of(dtype)}",
        sample,
        later(empty, 8, 5003, dtype=dtype),
        alpha=4.0,
        entropy=True,
    )
    for alpha, (name, support) in itertools.product(ALPHAS, SUPPORTS.items()):
        banned, entropy = next(FLAG_PAIRS)
        add(
            f"sample_tokens {name_of(dtype)} alpha {alpha}{name} banned {banned} entropy {entropy}",
            sample,
            later(empty, 8, 5003, dtype=dtype),
            alpha=alpha,
            banned=banned,
            entropy=entropy,
            **support,
            full=True,
        )
for name, support in SUPPORTS.items():
    add(
        f"sample_tokens with a ban{name}",
        sample,
        later(empty, 8, 5003, dtype=torch.bfloat16),
        alpha=4.0,
        banned=True,
        entropy=True,
        **support,
        full=name == " min_p",
    )
for vocab, support in itertools.product(VOCABS, ("", " all bounds")):
    add(
        f"sample_tokens 64 x {vocab}{support}",
        sample,
        later(empty, 64, vocab, dtype=torch.bfloat16),
        alpha=4.0,
        banned=True,
        device_seed=True,
        **SUPPORTS[support],
        full=vocab != 151937,
    )
add(
    "sample_tokens rows with gaps",
    sample,
    later(strided, 8, 5003, 5, torch.bfloat16),
    alpha=7.3,
    banned=True,
    entropy=True,
)
add("sample_tokens unaligned", sample, later(unaligned, 8, 5003), alpha=1.0, **SUPPORTS[" top_p"])
add("sample_tokens no rows", sample, later(empty, 0, 5003), launches=False)
add(
    "sample_tokens with a gradient",
    sample,
    later(empty, 8, 5003, dtype=torch.bfloat16, grad=True),
    alpha=4.0,
    entropy=True,
)
add(
    "sample_tokens while a graph is captured",
    lambda: _captured(sample, empty(8, 5003), banned=True, device_seed=True),
)
for dtype in DTYPES:
    add(
        f"support_threshold {name_of(dtype)}",
        logprob_gpu.support_threshold,
        later(empty, 8, 5003, dtype=dtype),
        ScoreOptions(alpha=4.0),
        Support(50, 0.9, 0.05),
        full=dtype != torch.bfloat16,
    )


def _captured(function: Callable[..., object], *args: Any, **kwargs: Any) -> None:
    with capturing():
        function(*args, **kwargs)


# Scores from hidden states.


def linear(
    gpu: StandInGpu,
    shape: tuple[int, int, int],
    *,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = False,
    temperatures: bool = False,
    make: Argument = empty,
    grads: bool = True,
    share_found: float = 1.0,
    entropy: bool = True,
    **options: Any,
) -> None:
    rows, vocab, dim = shape
    gpu.share_found = share_found
    hidden = make(rows, dim, dtype=dtype).detach().requires_grad_(grads)
    weight = make(vocab, dim, dtype=dtype).detach().requires_grad_(grads)
    scores = pk.linear_score_tokens(
        hidden,
        weight,
        ints(rows),
        bias=empty(vocab, dtype=dtype, grad=grads) if bias else None,
        temperature=empty(rows) if temperatures else 1.0,
        entropy=entropy,
        **options,
    )
    if grads:
        names = ALL_THREE if entropy else ALL_THREE[:2]
        sum(getattr(scores, name).sum() for name in names).backward()


def add_linear(name: str, *args: Any, full: bool = False, **kwargs: Any) -> None:
    def call(gpu: StandInGpu) -> None:
        linear(gpu, *args, **kwargs)

    CALLS.append(Call(f"linear_score_tokens {name}", call, full, True, False))


add_linear("chunked", (64, 5003, 512), method="chunked", alpha=4.0, bias=True)
add_linear("chunked half of the rows", (64, 5003, 512), method="chunked", share_found=0.5)
add_linear("chunked float32", (64, 5003, 512), dtype=torch.float32, method="chunked", full=True)
add_linear("chunked large", (8192, 151936, 4096), alpha=4.0, bias=True)
add_linear("fused", (64, 5008, 512), method="fused", alpha=4.0)
add_linear("fused float16", (64, 5008, 512), dtype=torch.float16, method="fused", alpha=4.0)
add_linear("fused odd sizes", (63, 5003, 520), method="fused", alpha=2.5, softcap=30.0, bias=True)
add_linear(
    "fused D = 1", (7, 127, 1), method="fused", alpha=7.3, bias=True, temperatures=True, grads=False
)
add_linear("fused unaligned", (64, 5003, 512), method="fused", make=unaligned, grads=False)
add_linear("fused large", (20000, 151936, 576), method="fused", alpha=4.0, grads=False)
add_linear("fused half of the rows", (64, 5008, 512), method="fused", share_found=0.5, full=True)
for vocab in VOCABS:
    add_linear(f"auto V = {vocab}", (9, vocab, 576), alpha=4.0, temperatures=True, full=vocab != 1)
for alpha, softcap, dtype in itertools.product(ALPHAS, (None, 30.0), HALVES):
    entropy, bias = next(FLAG_PAIRS)
    add_linear(
        f"fused alpha {alpha} entropy {entropy} softcap {softcap} bias {bias} {name_of(dtype)}",
        (64, 5008, 512),
        dtype=dtype,
        method="fused",
        alpha=alpha,
        entropy=entropy,
        softcap=softcap,
        bias=bias,
        grads=False,
        full=True,
    )
add(
    "linear row_sums of a shard",
    linear_gpu.row_sums,
    later(empty, 64, 512, dtype=torch.bfloat16),
    later(empty, 5008, 512, dtype=torch.bfloat16),
    None,
    later(ints, 64),
    vocab_parallel.IGNORED,
    ScoreOptions(alpha=4.0, entropy=True),
)

# Sums over sequences: torch's own ops on a GPU.
add(
    "sequence_log_likelihood",
    lambda: (
        pk.sequence_log_likelihood(empty(4, 7), alpha=4.0, mask=bools(4, 7)),
        pk.sequence_log_likelihood(empty(28), cu_seqlens=ints(5)),
    ),
    launches=False,
)


# Covariance, selection, losses.


class Batch(NamedTuple):
    """Arguments of the ops on tokens."""

    log_prob: Tensor
    advantages: Tensor
    mask: Tensor | None
    cu_seqlens: Tensor | None


def padded(
    rows: int = 4,
    length: int = 700,
    dtype: torch.dtype = torch.float32,
    *,
    masked: bool = True,
    per_sequence: bool = False,
    gap: int = 0,
) -> Batch:
    return Batch(
        strided(rows, length, gap, dtype),
        empty(rows, dtype=dtype) if per_sequence else strided(rows, length, gap, dtype),
        bools(rows, length) if masked else None,
        None,
    )


def packed(tokens: int = 2800, sequences: int = 5, dtype: torch.dtype = torch.float32) -> Batch:
    cu_seqlens = ints(sequences + 1, dtype=torch.int32)
    return Batch(empty(tokens, dtype=dtype), empty(tokens, dtype=dtype), None, cu_seqlens)


BATCHES: dict[str, Callable[[], Batch]] = {
    "float32": padded,
    "bfloat16": functools.partial(padded, dtype=torch.bfloat16),
    "float16 without a mask": functools.partial(padded, dtype=torch.float16, masked=False),
    "advantages of sequences": functools.partial(padded, per_sequence=True),
    "rows with gaps": functools.partial(padded, gap=3),
    "one token": functools.partial(padded, 1, 1),
    "one a sequence": functools.partial(padded, 5003, 1),
    "one sequence": functools.partial(padded, 1, 5003),
    "large": functools.partial(padded, 2048, 4096),
    "more than 2^31 tokens": functools.partial(padded, 2**16, 2**15 + 1),
    "packed": packed,
    "packed large": functools.partial(packed, 8_000_000, 4096),
    "no tokens": functools.partial(padded, 4, 0),
    "no sequences": functools.partial(padded, 0, 7),
}
SHORT_BATCHES = {"float32", "packed", "no tokens"}
NO_TOKENS = {"no tokens", "no sequences"}


def covariance(batch: Batch) -> None:
    log_prob, advantages, mask, cu_seqlens = batch
    pk.token_covariance(log_prob, advantages, mask, cu_seqlens=cu_seqlens)
    if log_prob.numel() < 2**31:  # torch sorts no more
        pk.covariance_table(log_prob, advantages, mask, cu_seqlens=cu_seqlens)


def selection(batch: Batch) -> None:
    log_prob, advantages, mask, cu_seqlens = batch
    shape = log_prob.shape
    sequences = shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    common: dict[str, Any] = {"cu_seqlens": cu_seqlens, "exclude": ints(*shape, dtype=torch.uint8)}
    pk.select_top_cov(log_prob, advantages, mask, ratio=2e-4, **common)
    pk.select_top_cov(log_prob, advantages, mask, k=3, cu_seqlens=cu_seqlens)
    pk.select_cov_band(
        log_prob, advantages, mask, k=3, lb=1.0, ub=5.0, seed=ints(1), cu_seqlens=cu_seqlens
    )
    pk.select_cov_band(
        log_prob,
        advantages,
        mask,
        ratio=2e-4,
        lb=1.0,
        ub=5.0,
        seed=7,
        sequence_index=ints(sequences),
        **common,
    )


def accumulated(batch: Batch) -> None:
    """Several micro-batches: ties of those before come from the device."""
    log_prob, advantages, mask, cu_seqlens = batch
    steps = (
        pk.SelectionAccumulator.top(ratio=2e-3),
        pk.SelectionAccumulator.band(k=3, lb=1.0, ub=5.0, seed=7),
    )
    for step in steps:
        step.add(log_prob, advantages, mask, cu_seqlens=cu_seqlens)
        step.add(
            log_prob,
            advantages,
            mask,
            old_log_prob=empty(*log_prob.shape, dtype=log_prob.dtype),
            cu_seqlens=cu_seqlens,
        )
        step.masks()
        step.stats()


def losses(
    batch: Batch,
    *,
    modes: tuple[str, ...] = ("token-mean",),
    weights: bool = False,
    covariance_metrics: bool = False,
) -> None:
    """All losses of a batch, forward and backward."""
    log_prob, advantages, mask, cu_seqlens = batch
    shape, dtype = log_prob.shape, log_prob.dtype
    log_prob = log_prob.detach().requires_grad_()
    common: dict[str, Any] = {"cu_seqlens": cu_seqlens}
    if cu_seqlens is not None:
        common["loss_scale_factor"] = 700
    ratio: dict[str, Any] = {"covariance_metrics": covariance_metrics}
    if weights:
        ratio["rollout_is_weights"] = empty(*shape, dtype=dtype)
    policy = (log_prob, empty(*shape, dtype=dtype), advantages, mask)
    for mode in modes:
        common["loss_agg_mode"] = mode
        found = [
            pk.ppo_clip_loss(*policy, **common, **ratio),
            pk.ppo_clip_loss(*policy, clip_ratio_c=None, dp_size=1, **common, **ratio),
            pk.clip_cov_loss(*policy, seed=7, **common, **ratio),
            pk.clip_cov_loss(*policy, selected=bools(*shape), **common, **ratio),
            pk.kl_cov_loss(*policy, **common, **ratio),
            pk.kl_cov_loss(*policy, selected=bools(*shape), **common, **ratio),
            pk.entropy_bonus(log_prob, mask, coef=0.01, **common),
        ]
        found += [
            pk.reference_kl_loss(
                log_prob, empty(*shape, dtype=dtype), mask, coef=0.1, estimator=estimator, **common
            )
            for estimator in ("k1", "abs", "k2", "k3", "k3+")
        ]
        for loss in found:
            loss.loss.backward(retain_graph=True)


for name, batch in BATCHES.items():
    long = name not in SHORT_BATCHES
    some = name not in NO_TOKENS
    add(f"token_covariance {name}", covariance, functools.partial(batch), full=long, launches=some)
    # The digits of an empty histogram are still looked for.
    add(f"select {name}", selection, functools.partial(batch), full=long)
    add(f"SelectionAccumulator {name}", accumulated, functools.partial(batch), full=long)
    # Nor does a selection of no tokens spare the search for its threshold.
    add(f"losses {name}", losses, functools.partial(batch), full=long)
add("losses in all modes", losses, functools.partial(padded), modes=LossAggMode.__args__)
add("losses in all modes, packed", losses, functools.partial(packed), modes=LossAggMode.__args__)
add(
    "losses with weights and the table",
    losses,
    functools.partial(padded),
    weights=True,
    covariance_metrics=True,
)
add(
    "losses with weights, packed bfloat16",
    losses,
    functools.partial(packed, dtype=torch.bfloat16),
    weights=True,
    full=True,
)
add("losses while a graph is captured", lambda: _captured(losses, padded()))


def advised(masked: bool) -> None:
    """The look at the first advantages, which a process takes once."""
    AdvantageScaleCheck()(empty(4, 700), bools(4, 700) if masked else None)


for masked in (False, True):
    add(f"advice, masked {masked}", advised, masked, launches=False)


# Attention, the cache's moves, transitions.


def attend(
    lanes: int,
    heads: int,
    kv_heads: int,
    positions: int,
    size: int,
    *,
    value_size: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    sinks: bool = False,
    make: Argument = empty,
    **options: Any,
) -> None:
    decode_attention(
        make(lanes, heads, size, dtype=dtype),
        make(lanes, kv_heads, positions, size, dtype=dtype),
        make(lanes, kv_heads, positions, value_size or size, dtype=dtype),
        ints(lanes),
        scale=0.125,
        sinks=empty(heads, dtype=dtype) if sinks else None,
        **options,
    )


def transposed(*shape: int, dtype: torch.dtype) -> Tensor:
    """A cache with its positions outside of its heads."""
    if len(shape) != 4:
        return empty(*shape, dtype=dtype)
    lanes, heads, positions, size = shape
    return empty(lanes, positions, heads, size, dtype=dtype).transpose(1, 2)


add("decode_attention", attend, 16, 9, 3, 1000, 64)
add("decode_attention one split, sinks", attend, 16, 9, 3, 200, 64, sinks=True)
add("decode_attention float32", attend, 16, 9, 3, 1000, 64, dtype=torch.float32)
add("decode_attention unaligned", attend, 16, 9, 3, 1000, 64, make=unaligned)
add(
    "decode_attention window, softcap, sinks",
    attend, 64, 12, 2, 2000, 128, window=512, softcap=50.0, sinks=True,
)  # fmt: skip
POSITIONS = itertools.cycle((200, 4096, 1000))
for dtype, group, size in itertools.product(DTYPES, (1, 6, 40), (1, 16, 64, 80, 128, 256)):
    positions = next(POSITIONS)
    add(
        f"decode_attention {name_of(dtype)} {group} heads of {size}, {positions}",
        attend,
        4,
        2 * group,
        2,
        positions,
        size,
        dtype=dtype,
        sinks=group == 6,
        full=True,
    )
add("decode_attention other value size", attend, 4, 8, 2, 1000, 64, value_size=128, full=True)
add("decode_attention positions first", attend, 4, 8, 2, 1000, 64, make=transposed, full=True)
add("decode_attention 2^20 positions", attend, 256, 32, 8, 2**20, 128)
add("decode_attention no lanes", attend, 0, 8, 2, 1000, 64, launches=False)
add(
    "decode_attention head too large",
    attend, 4, 8, 2, 1000, 257, launches=False,
)  # fmt: skip


def move(lanes: int, positions: int, width: int, dtype: torch.dtype, tensors: int = 4) -> None:
    copies = [empty(2, lanes * positions, width, dtype=dtype) for _ in range(tensors)]
    caches = LaneCaches(copies, positions)
    for _ in range(2):
        move_positions(caches, ints(lanes, 5), ints(lanes))


# The table of addresses is copied to the device once, when the caches are made.
for lanes, positions, width, dtype in (
    (16, 1000, 192, torch.bfloat16),
    (1, 1, 1, torch.int8),
    (3, 7, 3, torch.bfloat16),
    (5, 7, 3, torch.float32),
    (5, 7, 3, torch.float64),
    (256, 8192, 1024, torch.bfloat16),
):
    add(
        f"move_positions {lanes} lanes of {positions} x {width} {name_of(dtype)}",
        move,
        lanes,
        positions,
        width,
        dtype,
        full=width == 3 and dtype != torch.bfloat16,
        copies_from_host=True,
    )
add(
    "move_positions of nothing",
    move, 4, 8, 0, torch.bfloat16, launches=False, copies_from_host=True,
)  # fmt: skip


def transition(
    lanes: int,
    *,
    eos: tuple[int, ...] = (2,),
    seed: int = 2**64 - 1,
    rules: dict[str, Any] | None = None,
    score_dtype: torch.dtype = torch.float32,
    **config: Any,
) -> None:
    """A tick without a draw and one with."""
    settings = pk.PowerSamplingConfig(
        **{"max_new_tokens": 160, "block_size": 40, "num_mcmc_steps": 6, "seed": seed, **config}
    )
    changed: Rules = rules_of(settings)._replace(**(rules or {}))
    state = init_lanes(lanes, settings, eos, DEVICE, changed)
    step = transition_of(state)
    step(None)
    scores = [empty(lanes, dtype=score_dtype) for _ in range(3)]
    step(pk.TokenSamples(ints(lanes), *scores))


# A state is made once, from lists of the host.
add_transition = functools.partial(add, copies_from_host=True)
for lanes in (1, 3, 16, 64, 100, 128, 256, 1024):
    add_transition(f"transition {lanes} lanes", transition, lanes, full=lanes not in (1, 64))
add_transition("transition 1024 lanes and 3000 tokens", transition, 1024, max_new_tokens=3072,
               block_size=192, full=True)  # fmt: skip
add_transition("transition no EOS", transition, 4, eos=(), full=True)
add_transition("transition two EOS", transition, 4, eos=(2, 3), full=True)
add_transition("transition public law", transition, 16, compat="reference")
add_transition("transition another proposal", transition, 16, proposal_temperature=0.5, full=True)
add_transition("transition float64 scores", transition, 16, score_dtype=torch.float64, full=True)
add_transition("transition one step", transition, 1, num_mcmc_steps=0, block_size=1,
               max_new_tokens=1, full=True)  # fmt: skip
FLAGS = ("early_rejection", "shared_prefix_skip", "length_term", "growth_cap", "truncated_sum")
for flag, value in itertools.product((*FLAGS, "stop_at_eos"), (False, True)):
    add_transition(f"transition {flag} {value}", transition, 16, rules={flag: value}, full=True)
add_transition("transition alpha 0.5", transition, 16, alpha=0.5, full=True)

# What the fast tier takes. It reaches every kernel: of each op what a user calls first, and a call
# with nothing to launch.
BRIEF = (
    "score_tokens bfloat16",
    "score_tokens no rows",
    "sample_tokens no rows",
    "losses no tokens",
    "decode_attention no lanes",
    "2 shards of a vocabulary, 8 rows",
    "linear_score_tokens chunked",
    "linear_score_tokens fused",
    "sample_tokens with a ban top_k",
    "sample_tokens while a graph is captured",
    "token_covariance float32",
    "select float32",
    "losses float32",
    "losses while a graph is captured",
    "advice, masked True",
    "decode_attention",
    "move_positions 16 lanes of 1000 x 192 bfloat16",
    "transition 1 lanes",
)
