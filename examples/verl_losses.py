# ruff: noqa: T201
"""verl's registry, verl's configuration, our losses: the update of an actor, without a cluster.

A small policy makes a few updates with each loss as verl's worker does: it looks up
`policy_loss.loss_mode`, and calls what it finds with its `ActorConfig`. In a real run the same
needs no code, only the name of the module to import and that of the loss:

    python -m verl.trainer.main_ppo \\
        actor_rollout_ref.model.external_lib=powerkernels.integrations.verl \\
        actor_rollout_ref.actor.policy_loss.loss_mode=powerkernels_kl_cov ...

    python examples/verl_losses.py
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from powerkernels import score_tokens

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import ActorConfig
    from verl.workers.config.actor import PolicyLossConfig

    import powerkernels.integrations.verl

MODES = ("powerkernels_vanilla", "powerkernels_clip_cov", "powerkernels_kl_cov")
VOCAB, LENGTH, PROMPTS, SAMPLES = 64, 16, 32, 8
METRICS = ("actor/covariance", "actor/cov_clipfrac", "actor/ppo_clipfrac", "actor/ppo_kl")


def config(mode: str) -> ActorConfig:
    """Shares and a band for some thousand tokens; the paper's are for hundreds of thousands."""
    policy_loss = PolicyLossConfig(
        loss_mode=mode, clip_cov_ratio=0.01, clip_cov_lb=0.2, kl_cov_ratio=0.01, ppo_kl_coef=1.0
    )
    return ActorConfig(
        strategy="fsdp", rollout_n=SAMPLES, use_dynamic_bsz=True, policy_loss=policy_loss
    )


class Policy(nn.Module):
    """The next token from the one before: [B, T] -> logits [B, T, VOCAB]."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(VOCAB, VOCAB))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table[tokens]

    @torch.no_grad()
    def sample(self, first: Tensor) -> Tensor:
        """[B] -> [B, LENGTH + 1]."""
        tokens = [first]
        for _ in range(LENGTH):
            tokens.append(torch.multinomial(self.table[tokens[-1]].softmax(-1), 1).squeeze(-1))
        return torch.stack(tokens, dim=1)


def reward(tokens: Tensor) -> Tensor:
    """[B]: the share of steps upwards."""
    return (tokens.diff(dim=1) > 0).float().mean(1)


def train(mode: str, updates: int) -> None:
    torch.manual_seed(0)
    policy, actor = Policy(), config(mode)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.1)
    loss_of = get_policy_loss_fn(actor.policy_loss.loss_mode)
    print(f"\n{mode}\n  update  reward  entropy  " + "  ".join(name[6:] for name in METRICS))
    for update in range(updates):
        if update % 2 == 0:  # each batch of samples is used twice
            first = torch.randint(VOCAB, (PROMPTS,)).repeat_interleave(SAMPLES)
            tokens = policy.sample(first)
            rewards = reward(tokens).view(PROMPTS, SAMPLES)
            spread = rewards.std(1, keepdim=True) + 1e-6
            advantages = ((rewards - rewards.mean(1, keepdim=True)) / spread).view(-1, 1)
            old_log_prob = None
        scores = score_tokens(policy(tokens[:, :-1]), tokens[:, 1:], entropy=True)
        if old_log_prob is None:
            old_log_prob = scores.log_prob.detach()
        loss, metrics = loss_of(
            old_log_prob=old_log_prob,
            log_prob=scores.log_prob,
            advantages=advantages.expand_as(old_log_prob),
            response_mask=torch.ones_like(old_log_prob, dtype=torch.bool),
            config=actor,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print_line(update, rewards, scores.entropy, metrics)


def print_line(update: int, rewards: Tensor, entropy: Any, metrics: dict[str, float]) -> None:
    cells = [f"{update:8d}", f"{rewards.mean().item():6.3f}", f"{entropy.mean().item():7.3f}"]
    for name in METRICS:
        cell = f"{metrics[name]:.4f}" if name in metrics else "-"
        cells.append(cell.rjust(len(name) - 6))
    print("  ".join(cells))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=6, help="of each loss")
    options = parser.parse_args(argv)
    print("registered:", ", ".join(powerkernels.integrations.verl.register()))
    for mode in MODES:
        train(mode, options.updates)
    return 0


if __name__ == "__main__":
    sys.exit(main())
