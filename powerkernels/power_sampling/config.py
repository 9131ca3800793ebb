"""The settings of a power-sampling run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

PAPER_NUM_BLOCKS = 16  # Karan & Du 2025: T = 3072 in blocks of B = 192


@dataclass(frozen=True, kw_only=True)
class PowerSamplingConfig:
    """What to sample and how long to run the chain.

    Args:
        alpha: power of the target p(x)^alpha; finite, >= 0. 1 is the model itself.
        max_new_tokens: length limit of a completion in tokens, its EOS included; >= 1.
        block_size: tokens by which the length limit grows between rounds of transitions; >= 1.
            None is ``ceil(max_new_tokens / 16)``, the paper's ratio. A size of `max_new_tokens` or
            more is one block.
        num_mcmc_steps: Metropolis-Hastings transitions per block; >= 0. 0 leaves the first draw as
            it is, that is plain sampling at `proposal_temperature`.
        proposal_temperature: temperature of the proposal q ∝ p^(1/proposal_temperature); > 0, may
            be infinite (uniform over the vocabulary). None is 1/alpha, the choice for which only
            log_z enters the acceptance ratio.
        seed: key of the Philox streams; 0 <= seed < 2^64.
        early_rejection: stop a proposal as soon as it can no longer be accepted. Exact. Only in
            effect for 1 <= 1/proposal_temperature <= alpha, where the bound holds.
        shared_prefix_skip: draw without the model the part of a proposal that repeats the current
            completion. Exact.
        prefetch: let lanes that have no chain of their own make the next transitions of those that
            have, from the same state: used if the earlier ones are rejected, dropped otherwise.
            Exact: every chain stays the same bit for bit.
        top_k, top_p, min_p: restrict q, and with it the target, to a part of the vocabulary at each
            position, as in `sample_tokens`. None is all of it. The target is then p^alpha over the
            completions whose every token is in its position's part.
        compat: "reference" follows the law of the public implementation (see
            `integrations.public_sampler`) where that is not p^alpha: proposals never grow past the
            current completion, there is no length term, Σ w of the current completion ends where
            the proposal does, and a chain is over at the end of the block in which it has its EOS.
            None is p^alpha.
        num_lanes: rows of the static batch; >= 1. None is the number of chains, with `prefetch` at
            least 8 (4 on a CPU), and at most 16.
        device_loop: whether a GPU runs the loop over model steps itself, in one CUDA graph. None is
            yes where that is possible, else the host does, by the graph of one step if there can
            be one, with a warning that says why. True raises instead. False: the host, without
            graphs.
        compile: run the model step through torch.compile, which takes a minute or more at first.
        eos_token_id: token or tokens that end a completion. None takes the model's own; an empty
            sequence is a model without EOS, whose completions run to the limit.

    Raises:
        TypeError, ValueError: a field of the wrong type or outside its range, by name.

    Source: Karan & Du 2025, "Reasoning with Sampling", Algorithm 1; alpha = 4, T = 3072, B = 192
    and 10 transitions are its settings.
    """

    alpha: float = 4.0
    max_new_tokens: int = 3072
    block_size: int | None = None
    num_mcmc_steps: int = 10
    proposal_temperature: float | None = None
    seed: int = 0
    early_rejection: bool = True
    shared_prefix_skip: bool = True
    prefetch: bool = True
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    compat: Literal["reference"] | None = None
    num_lanes: int | None = None
    device_loop: bool | None = None
    compile: bool = False
    eos_token_id: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        _check_float("alpha", self.alpha)
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise ValueError(f"alpha must be finite and >= 0, got {self.alpha!r}")
        _check_int("max_new_tokens", self.max_new_tokens, 1)
        if self.block_size is not None:
            _check_int("block_size", self.block_size, 1)
        _check_int("num_mcmc_steps", self.num_mcmc_steps, 0)
        if self.proposal_temperature is not None:
            _check_float("proposal_temperature", self.proposal_temperature)
            if not self.proposal_temperature > 0:
                raise ValueError(
                    f"proposal_temperature must be > 0, got {self.proposal_temperature!r}"
                )
            if not math.isfinite(1.0 / self.proposal_temperature):
                raise ValueError(
                    "proposal_temperature must be large enough for a finite power 1/temperature, "
                    f"got {self.proposal_temperature!r}"
                )
        _check_int("seed", self.seed, 0)
        if self.seed >= 2**64:
            raise ValueError(f"seed must be below 2**64, got {self.seed!r}")
        for name in ("early_rejection", "shared_prefix_skip", "prefetch", "compile"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {getattr(self, name)!r}")
        if not (self.device_loop is None or isinstance(self.device_loop, bool)):
            raise TypeError(f"device_loop must be a bool or None, got {self.device_loop!r}")
        if self.top_k is not None:
            _check_int("top_k", self.top_k, 1)
        for name, value, open_low in (("top_p", self.top_p, True), ("min_p", self.min_p, False)):
            if value is not None:
                _check_float(name, value)
                if not (0 < value <= 1 or (value == 0 and not open_low)):
                    raise ValueError(f"{name} must be from 0 to 1, got {value!r}")
        if self.compat not in (None, "reference"):
            raise ValueError(f'compat must be "reference" or None, got {self.compat!r}')
        if self.num_lanes is not None:
            _check_int("num_lanes", self.num_lanes, 1)
        if self.eos_token_id is not None:
            ids = self.eos_token_id
            for token in (ids,) if isinstance(ids, int) else tuple(ids):
                _check_int("eos_token_id", token, 0)

    @property
    def proposal_power(self) -> float:
        """s in the proposal q ∝ p^s."""
        if self.proposal_temperature is None:
            return float(self.alpha)
        return 1.0 / self.proposal_temperature

    @property
    def block_limits(self) -> tuple[int, ...]:
        """The length limit of each block, the last one being `max_new_tokens`."""
        size = self.block_size or math.ceil(self.max_new_tokens / PAPER_NUM_BLOCKS)
        limits = range(size, self.max_new_tokens + size, size)
        return tuple(min(limit, self.max_new_tokens) for limit in limits)

    @property
    def can_reject_early(self) -> bool:
        """Whether early rejection is asked for and its bound holds (1 <= s <= alpha)."""
        return self.early_rejection and 1.0 <= self.proposal_power <= self.alpha


def _check_int(name: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be >= {minimum}, got {value!r}")


def _check_float(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
