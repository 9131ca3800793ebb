"""verl's policy losses, computed by powerkernels: the same names, settings and values.

Importing this module adds "powerkernels_vanilla" (also as "powerkernels_ppo_clip"),
"powerkernels_clip_cov" and "powerkernels_kl_cov" to verl's registry. verl's workers import what
their configuration names, so a run needs two settings and no code:

    python -m verl.trainer.main_ppo \\
        actor_rollout_ref.model.external_lib=powerkernels.integrations.verl \\
        actor_rollout_ref.actor.policy_loss.loss_mode=powerkernels_clip_cov ...

The environment variable VERL_USE_EXTERNAL_MODULES=powerkernels.integrations.verl does the same as
external_lib where it reaches the workers. `register(replace=True)`, in a module of one's own that
is named there instead, puts the losses in the place of verl's "vanilla", "clip_cov" and "kl_cov",
so that no other setting changes.

docs/trainers.md lists where the values differ from verl's, and why. Needs verl >= 0.9.

Source of the semantics: verl 0.9.1, `verl.trainer.ppo.core_algos`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from powerkernels import clip_cov_loss, kl_cov_loss, ppo_clip_loss
from powerkernels._arguments import seed_tensor
from powerkernels.policy_loss import PolicyLoss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

INSTALL_VERL = "pip install 'verl>=0.9'"

try:
    from verl.trainer.ppo.core_algos import register_policy_loss
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{error.name} is not installed, and powerkernels.integrations.verl needs it; "
        f"get it with: {INSTALL_VERL}",
        name=error.name,
    ) from error

PREFIX = "powerkernels_"
# This package's name of verl's "vanilla": registered too, after the prefix.
ALIAS = "ppo_clip"
# What verl's own functions take where a setting is None.
CLIP_COV_RATIO, CLIP_COV_LB, CLIP_COV_UB = 0.0002, 1.0, 5.0
KL_COV_RATIO, PPO_KL_COEF = 0.0002, 1.0
DUAL_CLIP = 3.0
# Between the seeds of two calls, so that runs with seeds near each other share none.
CALL_STRIDE = 2**20

PolicyLossFunction = Callable[..., tuple[Tensor, dict[str, float]]]
Group: TypeAlias = "ProcessGroup | Callable[[], ProcessGroup | None] | None"


class VerlLosses:
    """The three losses with verl's signature:

        (old_log_prob, log_prob, advantages, response_mask, loss_agg_mode="token-mean", config,
         rollout_is_weights=None) -> (loss, metrics)

    Tensors are [B, T], config an `ActorConfig` with its `policy_loss` and `global_batch_info`. The
    loss is a float32 scalar (float64 where an input is) with a gradient for log_prob. Metrics are
    floats, as in verl, brought from the device in one transfer: verl takes tensors too, but waits
    once for each.

    Where verl's counts say that the whole batch has no token, the loss is 0 and not 0 / 0.

    Args:
        seed: of Clip-Cov's choice, 64 bits. Each call takes another one, counted from here, so a
            run that makes the same calls makes the same choices. It is the same on all ranks:
            those of tensor or sequence parallelism hold the same tokens and must choose the same.
        process_group: ranks that select together, among all tokens of their current micro-batches:
            verl's data-parallel ranks and no others, since those of sequence, tensor and pipeline
            parallelism hold the same tokens or none. A group, or a function without arguments that
            returns it and is called at each loss: verl imports this before any group exists. All
            ranks must call as often, which verl's engines see to, also with a dynamic batch size.

    Raises:
        TypeError, ValueError: seed is no int or does not fit in 64 bits.
    """

    def __init__(self, seed: int = 0, process_group: Group = None) -> None:
        seed_tensor(seed, torch.device("cpu"))  # refused here and not in the first update
        self.seed = seed
        self.process_group = process_group
        self._calls = 0

    def vanilla(
        self,
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """PPO with clip-higher and the dual clip."""
        return _as_verl(
            ppo_clip_loss(
                log_prob,
                old_log_prob,
                advantages,
                response_mask,
                **_shared(loss_agg_mode, config, rollout_is_weights),
                **_clip_ratios(config),
                clip_ratio_c=config.get("clip_ratio_c", DUAL_CLIP),
            )
        )

    def clip_cov(
        self,
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Clip-Cov: config.policy_loss.clip_cov_ratio, clip_cov_lb, clip_cov_ub."""
        shared = _shared(loss_agg_mode, config, rollout_is_weights)
        settings = config.policy_loss
        return _as_verl(
            clip_cov_loss(
                log_prob,
                old_log_prob,
                advantages,
                response_mask,
                **shared,
                **_clip_ratios(config),
                clip_cov_ratio=_or(settings.clip_cov_ratio, CLIP_COV_RATIO),
                clip_cov_lb=_or(settings.clip_cov_lb, CLIP_COV_LB),
                clip_cov_ub=_or(settings.clip_cov_ub, CLIP_COV_UB),
                seed=self._next_seed(),
                process_group=self._group(),
            )
        )

    def kl_cov(
        self,
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """KL-Cov: config.policy_loss.kl_cov_ratio, ppo_kl_coef."""
        shared = _shared(loss_agg_mode, config, rollout_is_weights)
        settings = config.policy_loss
        return _as_verl(
            kl_cov_loss(
                log_prob,
                old_log_prob,
                advantages,
                response_mask,
                **shared,
                kl_cov_ratio=_or(settings.kl_cov_ratio, KL_COV_RATIO),
                ppo_kl_coef=_or(settings.ppo_kl_coef, PPO_KL_COEF),
                process_group=self._group(),
            )
        )

    def _group(self) -> ProcessGroup | None:
        group = self.process_group
        return group() if callable(group) else group

    def _next_seed(self) -> int:
        seed = self.seed + CALL_STRIDE * self._calls
        self._calls += 1
        return seed % 2**64


def register(
    *,
    replace: bool = False,
    prefix: str = PREFIX,
    seed: int = 0,
    process_group: Group = None,
) -> dict[str, PolicyLossFunction]:
    """Adds the losses to verl's registry; a later call counts its seeds from the start again.

    Args:
        replace: whether to take verl's own names, "vanilla", "clip_cov" and "kl_cov". verl's
            "bypass_mode" calls its own vanilla loss by itself and keeps it.
        prefix: before these names and "ppo_clip", where verl's own are left alone.
        seed, process_group: as of `VerlLosses`. A run resumed from a checkpoint is a new run: give
            it another seed.

    Returns:
        The functions by the names under which they are registered now.

    Raises:
        TypeError, ValueError: as of `VerlLosses`, or prefix is empty and replace is False.
    """
    if not prefix and not replace:
        raise ValueError("prefix must not be empty: these are verl's own names; replace=True them")
    losses = VerlLosses(seed, process_group)
    functions = {"vanilla": losses.vanilla, "clip_cov": losses.clip_cov, "kl_cov": losses.kl_cov}
    if replace:
        registered = functions
    else:
        named = {**functions, ALIAS: losses.vanilla}
        registered = {prefix + name: function for name, function in named.items()}
    for name, function in registered.items():
        register_policy_loss(name)(function)
    return registered


def _shared(mode: str, config: Any, weights: Tensor | None) -> dict[str, Any]:
    if config is None:
        raise ValueError("config must be verl's ActorConfig, got None")
    counts = dict(config.global_batch_info)
    for name in ("batch_num_tokens", "global_batch_size"):
        if name in counts:
            counts[name] = _at_least_one(counts[name])
    counts = {name: value for name, value in counts.items() if value is not None}
    return dict(loss_agg_mode=mode, rollout_is_weights=weights, **counts)


def _at_least_one(count: float | Tensor | None) -> float | Tensor | None:
    """Of no token and no sequence the loss is 0, whatever it is divided by."""
    if isinstance(count, Tensor):
        return torch.where(count == 0, 1, count)
    return 1 if count == 0 else count


def _clip_ratios(config: Any) -> dict[str, Any]:
    return dict(
        clip_ratio_low=_or(config.clip_ratio_low, config.clip_ratio),
        clip_ratio_high=_or(config.clip_ratio_high, config.clip_ratio),
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _as_verl(found: PolicyLoss) -> tuple[Tensor, dict[str, float]]:
    values = torch.stack([value.double() for value in found.metrics.values()]).tolist()
    return found.loss, dict(zip(found.metrics, values, strict=True))


register()
