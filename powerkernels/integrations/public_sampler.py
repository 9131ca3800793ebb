"""Drop-ins for the public power sampler, aakaran/reasoning-with-sampling (`power_samp_utils.py`).

    from powerkernels.integrations.public_sampler import mcmc_power_samp

takes the place of its function of that name, with the same arguments and results. By default it
samples p^(1/temp), which the public function does not: there

- the proposal, and with it the target, is restricted to the 50 likeliest tokens at each position
  (`generate`'s default),
- a proposal never grows past the current completion, and a new block adds to what there is,
- there is no length term log n - log n',
- Σ w of the current completion ends where a shorter proposal does,
- a chain is over at the end of the first block in which it has its EOS.

`compat="reference"` follows all of these. One thing it does not: the public function also finds
EOS tokens in the prompt, and returns after one block for every prompt that holds one.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch

from powerkernels.power_sampling import PowerSample, PowerSampler, PowerSamplingConfig

PUBLIC_TOP_K = 50  # of `generate` where neither the model nor the caller says otherwise


class PublicSample(NamedTuple):
    """What the public function returns, with its names."""

    gen: list[int]  # prompt and completion
    log_probs_norm: list[float]  # log q of the completion's tokens, nats
    log_probs_unnorm: list[float]  # (1/temp) log p of them
    acceptance_ratio: float  # NaN without transitions


# The sampler last used with a `p`: its cache and packed weights serve the next call.
_samplers: weakref.WeakKeyDictionary[Any, PowerSampler] = weakref.WeakKeyDictionary()


def mcmc_power_samp(
    p: Any,
    context: Sequence[int],
    temp: float,
    mcmc_steps: int,
    max_new_tokens: int,
    block_num: int = 16,
    *,
    compat: Literal["reference"] | None = None,
    seed: int | None = None,
    num_lanes: int | None = None,
) -> PublicSample:
    """Draw one completion of a prompt from p^(1/temp), with the public signature.

    Args:
        p: an object with `model` (a transformers causal LM) and `tokenizer`, as the public
            `AutoregressiveSampler`.
        context: the prompt's token ids, at least one.
        temp: 1/alpha, > 0.
        mcmc_steps: transitions per block, >= 0.
        max_new_tokens: length limit of the completion, a multiple of `block_num`.
        block_num: number of blocks, >= 1.
        compat: "reference" samples the public function's own law; None samples p^(1/temp).
        seed: None draws one from torch's global generator.
        num_lanes: rows of the batch on which transitions are made ahead; None is the sampler's
            default.

    Returns:
        (gen, log_probs_norm, log_probs_unnorm, acceptance_ratio), as the public function.

    Raises:
        TypeError, ValueError: an argument, by name.
    """
    return mcmc_power_samp_batch(
        p,
        [context],
        temp,
        mcmc_steps,
        max_new_tokens,
        block_num,
        compat=compat,
        seed=seed,
        num_lanes=num_lanes,
    )[0]


def mcmc_power_samp_batch(
    p: Any,
    contexts: Sequence[Sequence[int]],
    temp: float,
    mcmc_steps: int,
    max_new_tokens: int,
    block_num: int = 16,
    *,
    compat: Literal["reference"] | None = None,
    seed: int | None = None,
    num_lanes: int | None = None,
) -> list[PublicSample]:
    """`mcmc_power_samp` of many prompts at once, in their order."""
    if isinstance(block_num, bool) or not isinstance(block_num, int) or block_num < 1:
        raise ValueError(f"block_num must be an int >= 1, got {block_num!r}")
    if max_new_tokens % block_num:
        raise ValueError(
            f"max_new_tokens must be a multiple of block_num = {block_num}, got {max_new_tokens!r}"
        )
    alpha = _alpha(temp)
    bounds: dict[str, Any] = _generate_bounds(p.model) if compat else {}
    config = PowerSamplingConfig(
        alpha=alpha,
        max_new_tokens=max_new_tokens,
        block_size=max_new_tokens // block_num,
        num_mcmc_steps=mcmc_steps,
        num_lanes=num_lanes,
        eos_token_id=_eos(p.tokenizer),
        compat=compat,
        **bounds,
    )
    return [
        PublicSample(
            [*contexts[sample.prompt_index], *sample.tokens],
            sample.log_q.tolist(),
            [alpha * log_prob for log_prob in sample.log_prob.tolist()],
            sample.acceptance_rate,
        )
        for sample in _sample(p, contexts, config, seed)
    ]


def naive_temp(
    p: Any,
    context: Sequence[int],
    temp: float,
    seq_len: int,
    *,
    compat: Literal["reference"] | None = None,
    seed: int | None = None,
) -> tuple[list[int], list[float], list[float]]:
    """Draw a continuation at temperature `temp`, with the public signature.

    Args:
        p, context, temp, seed: as in `mcmc_power_samp`.
        seq_len: length limit of prompt and continuation together.
        compat: "reference" restricts each token as `generate` would, to the 50 likeliest if the
            model's generation config does not say otherwise.

    Returns:
        (prompt and continuation, log q of the continuation's tokens, (1/temp) log p of them).
    """
    drawn = mcmc_power_samp_batch(
        p, [context], temp, 0, seq_len - len(context), 1, compat=compat, seed=seed
    )[0]
    return drawn.gen, drawn.log_probs_norm, drawn.log_probs_unnorm


def _sample(
    p: Any, contexts: Sequence[Sequence[int]], config: PowerSamplingConfig, seed: int | None
) -> list[PowerSample]:
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ()))
    can_be_kept = type(p).__hash__ is not None
    sampler = _samplers.pop(p, None) if can_be_kept else None
    if sampler is None or sampler.config != config or sampler.model is not p.model:
        if sampler is not None:
            sampler.release()  # before the next one asks for memory
        sampler = PowerSampler(p.model, p.tokenizer, config=config)
    prompts = [list(context) for context in contexts]
    samples = sampler.sample(prompts, seed=seed, progress=False)
    if can_be_kept:
        _samplers[p] = sampler
    if sampler.stats.interrupted:
        raise KeyboardInterrupt
    return samples


def _alpha(temp: float) -> float:
    if isinstance(temp, bool) or not isinstance(temp, (int, float)):
        raise TypeError(f"temp must be a number, got {temp!r}")
    if not temp > 0:
        raise ValueError(f"temp must be > 0, got {temp!r}")
    return 1.0 / temp


def _eos(tokenizer: Any) -> tuple[int, ...]:
    token = tokenizer.eos_token_id
    return () if token is None else (token,)


def _generate_bounds(model: Any) -> dict[str, Any]:
    """top_k, top_p and min_p that `generate` applies by itself."""
    config = getattr(model, "generation_config", None)
    top_k = getattr(config, "top_k", None)
    top_p = getattr(config, "top_p", None)
    return {
        "top_k": PUBLIC_TOP_K if top_k is None else top_k or None,
        "top_p": top_p if top_p is not None and top_p < 1 else None,
        "min_p": getattr(config, "min_p", None),
    }
