# ruff: noqa: T201
"""Exact power sampling in a generation loop of one's own: one chain, a plain transformers model.

    python examples/own_sampler.py "What is 7 + 5? Explain."

`continuation` is the loop that a project already has: a prefill, then a token at a time. What makes
it a power sampler are `sample_tokens`, which draws and scores each token, and the transitions of
`power_sampling.metropolis_hastings`. `PowerSampler` does the same for many chains at once, and
faster; this is for code whose loop must stay its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from transformers import DynamicCache

from powerkernels import sample_tokens, score_tokens
from powerkernels.integrations.smollm2 import load_smollm2
from powerkernels.power_sampling import metropolis_hastings as mh
from powerkernels.power_sampling.lane_model import cache_argument


@torch.inference_mode()
def continuation(
    model: Any,
    prompt: list[int],
    prefix: tuple[int, ...],
    *,
    banned: int | None,
    limit: int,
    alpha: float,
    eos: int,
    seed: int,
    transition: int,
    chain: int,
) -> Iterator[mh.ScoredToken]:
    """Tokens drawn from q ∝ p^alpha after a prompt and a prefix of its completion."""
    cache, new = {cache_argument(model): DynamicCache(config=model.config)}, [*prompt, *prefix]
    for position in range(len(prefix), limit):
        output = model(input_ids=torch.tensor([new]), **cache, use_cache=True, logits_to_keep=1)
        drawn = sample_tokens(
            output.logits[:, -1],
            alpha=alpha,
            seed=seed,
            # Every draw has a counter of its own, so that a chain can be made again.
            counters=torch.tensor([[mh.TOKEN_DRAW, position, transition, chain]]),
            banned=None if banned is None else torch.tensor([banned]),
        )
        banned, new = None, [int(drawn.token)]
        yield mh.ScoredToken(new[0], float(drawn.log_prob), float(drawn.log_z))
        if new[0] == eos:
            return


def power_sample(
    model: Any,
    prompt: list[int],
    *,
    alpha: float = 4.0,
    block_limits: tuple[int, ...] = (16, 32, 48),
    num_mcmc_steps: int = 4,
    eos: int,
    seed: int = 0,
    chain: int = 0,
) -> tuple[mh.MHState, list[mh.MHInfo]]:
    """A completion near p^alpha, and what its transitions did."""
    state: mh.MHState | None = None
    infos = []
    for limit in block_limits:

        def propose(
            prefix: tuple[int, ...], banned: int | None, limit: int, transition: int = 0
        ) -> Iterator[mh.ScoredToken]:
            return continuation(
                model,
                prompt,
                prefix,
                banned=banned,
                limit=limit,
                alpha=alpha,
                eos=eos,
                seed=seed,
                transition=transition,
                chain=chain,
            )

        if state is None:
            state = mh.init(propose((), None, limit), alpha=alpha)
        elif state.tokens[-1] != eos:
            state = mh.extend(state, propose(state.tokens, None, limit), alpha=alpha)
        for _ in range(num_mcmc_steps):
            number = state.transition + 1
            state, info = mh.step(
                state,
                lambda prefix, banned, limit, number=number: propose(prefix, banned, limit, number),
                limit=limit,
                alpha=alpha,
                seed=seed,
                chain=chain,
            )
            infos.append(info)
    assert state is not None
    return state, infos


@torch.inference_mode()
def log_likelihood(model: Any, prompt: list[int], tokens: tuple[int, ...]) -> float:
    """log p of a completion, nats, from one forward: what the chain's own sum must come to."""
    ids = torch.tensor([[*prompt, *tokens]])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    return float(score_tokens(logits, torch.tensor(tokens)).log_prob.sum())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("prompt", nargs="?", default="What is 7 + 5? Explain.")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    model, tokenizer = load_smollm2(dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": options.prompt}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )["input_ids"]
    state, infos = power_sample(model, prompt, eos=tokenizer.eos_token_id, seed=options.seed)
    print(tokenizer.decode(state.tokens, skip_special_tokens=True))
    accepted = sum(info.accepted for info in infos)
    decoded = sum(info.decoded_tokens for info in infos)
    by_forward = log_likelihood(model, prompt, state.tokens)
    print(f"\nlog-likelihood {sum(state.log_prob):.3f} nats, by one forward {by_forward:.3f}")
    print(f"{accepted} of {len(infos)} transitions accepted, {decoded} tokens decoded for them")


if __name__ == "__main__":
    main()
