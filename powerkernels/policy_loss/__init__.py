"""Policy losses: PPO's clip, Clip-Cov, KL-Cov, and the entropy and KL terms beside them."""

from powerkernels.policy_loss.functional import (
    PolicyLoss,
    clip_cov_loss,
    entropy_bonus,
    kl_cov_loss,
    ppo_clip_loss,
    reference_kl_loss,
)

__all__ = [
    "PolicyLoss",
    "clip_cov_loss",
    "entropy_bonus",
    "kl_cov_loss",
    "ppo_clip_loss",
    "reference_kl_loss",
]
