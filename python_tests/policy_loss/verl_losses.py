"""verl's own functions, with the settings that they need."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what verl imports
    algorithms = pytest.importorskip("verl.trainer.ppo.core_algos")
    # By its imports, what verl itself lacks is named too.
    ActorConfig = pytest.importorskip("verl.workers.config").ActorConfig
    PolicyLossConfig = pytest.importorskip("verl.workers.config.actor").PolicyLossConfig


def config(counts: dict[str, Any] | None = None, **settings: Any) -> Any:
    """An ActorConfig; settings of PolicyLossConfig by their names, the others are its own."""
    names = PolicyLossConfig.__dataclass_fields__
    of_loss = {name: value for name, value in settings.items() if name in names}
    own = {name: value for name, value in settings.items() if name not in names}
    made = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        use_dynamic_bsz=True,
        policy_loss=PolicyLossConfig(**of_loss),
        **own,
    )
    made.global_batch_info.update(counts or {})
    return made


def loss(
    name: str,
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    mask: Tensor,
    mode: str = "token-mean",
    weights: Tensor | None = None,
    counts: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Value, gradient and metrics."""
    leaf = log_prob.detach().clone().requires_grad_()
    function = algorithms.get_policy_loss_fn(name)
    value, metrics = function(
        old_log_prob, leaf, advantages, mask, mode, config(counts, **settings), weights
    )
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient, metrics
