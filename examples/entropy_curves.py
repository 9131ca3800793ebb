# ruff: noqa: T201
"""Policy entropy under six policy losses, from one start: a small, real reinforcement learning run.

A character-level transformer is first trained to add numbers from noisy worked examples in three
styles, so that it can do the task sometimes and is unsure how. Then it is trained with GRPO, the
reward being 1 for a right answer, with each of six losses: the plain one, clip-higher, an entropy
bonus, a KL penalty, Clip-Cov and KL-Cov. What is recorded is how entropy and reward go together.

    python examples/entropy_curves.py --output entropy_curves.json

18 runs, 30 minutes of CPU time on one thread; 35 minutes by the clock on a busy machine. What came
out is in docs/entropy_curves.md.

Source: Cui et al. 2025, "The Entropy Mechanism of Reinforcement Learning for Reasoning Language
Models", whose figures are of 7B and 32B models.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from powerkernels import (
    clip_cov_loss,
    covariance_table,
    entropy_bonus,
    kl_cov_loss,
    ppo_clip_loss,
    reference_kl_loss,
    score_tokens,
    token_covariance,
)
from powerkernels.policy_loss import PolicyLoss
from powerkernels.power_sampling.lane_model import cache_argument

METHODS = ("grpo", "clip-higher", "entropy-bonus", "kl-penalty", "clip-cov", "kl-cov")

# Table 1 of the paper: Qwen2.5-7B, first step.
PAPER_TABLE = {2e-4: 5.654, 2e-3: 3.112, 2e-2: 1.385, 0.2: 0.351, 0.5: 0.152, 1.0: 0.003}

ALPHABET = "0123456789+=>,~#."
PAD = len(ALPHABET)
END = ALPHABET.index(".")


@dataclass(frozen=True)
class Settings:
    """Everything that a run depends on; all of it is written beside the results."""

    digits: int = 5
    styles: tuple[float, float, float] = (0.34, 0.33, 0.33)  # direct, reversed, columns
    noise: float = 0.08  # share of the digits of the worked examples that are random
    hidden: int = 96
    layers: int = 2
    heads: int = 4
    supervised_steps: int = 400
    supervised_batch: int = 128
    supervised_lr: float = 2e-3
    prompts: int = 32
    samples: int = 8  # for each prompt
    minibatches: int = 4  # optimiser steps for each rollout
    lr: float = 3e-4
    evaluate_every: int = 25
    evaluation_prompts: int = 256
    # The strengths of the methods. `docs/entropy_curves.md` says how they were chosen.
    clip_ratio_high: float = 0.28
    entropy_coef: float = 0.03
    kl_coef: float = 0.1
    clip_cov_ratio: float = 0.05
    clip_cov_lb: float = 1.0
    clip_cov_ub: float = 5.0
    kl_cov_ratio: float = 0.02
    ppo_kl_coef: float = 2.0


QUICK = Settings(
    digits=2, hidden=32, supervised_steps=20, supervised_batch=32, prompts=4, evaluation_prompts=8
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="rollouts of each run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="other settings, such as clip_cov_ratio=0.01; their names are those of Settings",
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs at all")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("entropy_curves.json"),
        help="where the results go; the picture goes beside it, as .png",
    )
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)  # the matrices are too small for more to help
    settings = QUICK if arguments.quick else Settings()
    changes = (change.split("=", 1) for change in arguments.set)
    settings = replace(settings, **{name: json.loads(value) for name, value in changes})
    results = experiment(
        settings, arguments.methods, arguments.steps, arguments.seeds, arguments.output
    )
    print(summary(results))
    picture = arguments.output.with_suffix(".png")
    draw(results, picture)
    print(f"results: {arguments.output}, picture: {picture}")
    return 0


def experiment(
    settings: Settings, methods: Sequence[str], steps: int, seeds: int, output: Path
) -> dict[str, Any]:
    """All runs from one start; `output` is written anew after each."""
    begin = time.perf_counter()
    start = start_policy(settings)
    results: dict[str, Any] = {
        "settings": asdict(settings),
        "start": start_figures(start, settings),
        "supervised_seconds": time.perf_counter() - begin,
        "runs": [],
    }
    say(f"start: {results['start']}")
    for seed in range(seeds):
        for method in methods:
            run = train(method, seed, start, settings, steps)
            results["runs"].append(run)
            results["seconds"] = time.perf_counter() - begin
            output.write_text(json.dumps(results) + "\n")
            say(f"{method}, seed {seed}: {run['seconds']:.0f} s; {last_line(run)}")
    return results


# ---- the task


def encode(text: str) -> list[int]:
    return [ALPHABET.index(character) for character in text]


def decode(tokens: Sequence[int]) -> str:
    return "".join(ALPHABET[token] if token < PAD else "" for token in tokens)


def worked_answer(first: int, second: int, digits: int, style: int) -> str:
    """A right answer. Direct: "#0042."; with the digits from the right first; by columns."""
    answer = f"#{first + second:0{digits + 1}}."
    if style == 0:
        return answer
    if style == 1:
        return "~" + answer[-2:0:-1] + answer
    columns, carry = "", 0
    for place in range(digits):
        left, right = first // 10**place % 10, second // 10**place % 10
        total = left + right + carry
        columns += f"{left}{right}>{total:02},"
        carry = total // 10
    return columns + answer


def reward(first: int, second: int, response: str) -> float:
    """1 if the response ends, and what stands between its last "#" and its end is the sum."""
    if not response.endswith("."):
        return 0.0
    answer = response[:-1].rpartition("#")[2]
    right = answer.isascii() and answer.isdigit() and int(answer) == first + second
    return float(right and "#" in response)


def corrupted(text: str, noise: float, rng: random.Random) -> str:
    """`text` with a share of its digits drawn anew."""
    return "".join(
        rng.choice(ALPHABET[:10]) if character.isdigit() and rng.random() < noise else character
        for character in text
    )


class Problems(NamedTuple):
    pairs: list[tuple[int, int]]
    prompts: Tensor  # [N, P], all of one length


def draw_problems(count: int, digits: int, rng: random.Random) -> Problems:
    """Numbers of 1 to `digits` digits, equally often, written with leading zeros."""

    def number() -> int:
        return rng.randrange(10 ** rng.randint(1, digits))

    pairs = [(number(), number()) for _ in range(count)]
    texts = [f"{first:0{digits}}+{second:0{digits}}=" for first, second in pairs]
    return Problems(pairs, torch.tensor([encode(text) for text in texts]))


def longest_response(digits: int) -> int:
    return len(worked_answer(0, 0, digits, style=2)) + 4


# ---- the start policy


def new_model(settings: Settings) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(ALPHABET) + 1,
        hidden_size=settings.hidden,
        intermediate_size=2 * settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=256,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
    )
    return LlamaForCausalLM(config)


def start_policy(settings: Settings) -> LlamaForCausalLM:
    """Trained by cross-entropy on noisy worked answers, at a learning rate that falls to 0."""
    torch.manual_seed(0)
    rng = random.Random(0)
    model = new_model(settings)
    optimiser = torch.optim.AdamW(model.parameters(), lr=settings.supervised_lr)
    for step in range(settings.supervised_steps):
        left = 1 - step / settings.supervised_steps
        for group in optimiser.param_groups:
            group["lr"] = settings.supervised_lr * min(left, (step + 1) / 50)
        problems = draw_problems(settings.supervised_batch, settings.digits, rng)
        texts = [
            corrupted(
                worked_answer(*pair, settings.digits, rng.choices(range(3), settings.styles)[0]),
                settings.noise,
                rng,
            )
            for pair in problems.pairs
        ]
        length = max(map(len, texts))
        responses = torch.tensor([encode(text) + [PAD] * (length - len(text)) for text in texts])
        log_prob = scores(model, problems.prompts, responses)[0]
        mask = responses != PAD
        loss = -(log_prob * mask).sum() / mask.sum()
        update(model, optimiser, loss)
    return model


def start_figures(model: LlamaForCausalLM, settings: Settings) -> dict[str, Any]:
    """What the start policy does, and the paper's table of covariances on a first rollout."""
    rollout = roll_out(model, settings, random.Random("start"))
    with torch.no_grad():
        log_prob, entropy = scores(model, rollout.prompts, rollout.responses)
    table = covariance_table(log_prob, rollout.advantages, rollout.mask)
    cov = token_covariance(log_prob, rollout.advantages, rollout.mask).cov[rollout.mask]
    in_band = (cov > settings.clip_cov_lb) & (cov < settings.clip_cov_ub)
    return {
        **rollout_figures(rollout, entropy, settings),
        "greedy_accuracy": greedy_accuracy(model, settings),
        "tokens": int(rollout.mask.sum()),
        "share_in_clip_cov_band": float(in_band.float().mean()),
        "examples": [decode(row) for row in rollout.responses[:: settings.samples][:8].tolist()],
        "covariance_table": {
            "share": table.share.tolist(),
            "mean_cov": table.mean_cov.tolist(),
            "quantile": table.quantile.tolist(),
            "paper_mean_cov": list(PAPER_TABLE.values()),
        },
    }


# ---- rollouts


class Rollout(NamedTuple):
    prompts: Tensor  # [B, P]
    responses: Tensor  # [B, T], padded behind the end
    mask: Tensor  # bool [B, T]
    rewards: Tensor  # [B]
    advantages: Tensor  # [B]


def scores(model: LlamaForCausalLM, prompts: Tensor, responses: Tensor) -> tuple[Tensor, Tensor]:
    """log-probability and entropy [B, T] of the responses, with gradients.

    Padding is behind everything, where no other token sees it: no attention mask is needed.
    """
    tokens = torch.cat((prompts, responses[:, :-1]), dim=1)
    logits = model(input_ids=tokens, use_cache=False, logits_to_keep=responses.shape[1]).logits
    found = score_tokens(logits, responses, entropy=True)
    assert found.entropy is not None
    return found.log_prob, found.entropy


@torch.no_grad()
def generate(
    model: LlamaForCausalLM, prompts: Tensor, limit: int, generator: torch.Generator | None
) -> Tensor:
    """Responses [B, T] at temperature 1, or greedy ones without a generator."""
    cache = {cache_argument(model): DynamicCache(config=model.config)}
    tokens = prompts
    ended = torch.zeros(prompts.shape[0], dtype=torch.bool)
    columns = []
    for _ in range(limit):
        output = model(input_ids=tokens, **cache, use_cache=True, logits_to_keep=1)
        logits = output.logits[:, -1]
        if generator is None:
            chosen = logits.argmax(-1)
        else:
            chosen = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        chosen = chosen.masked_fill(ended, PAD)
        columns.append(chosen)
        ended |= chosen == END
        if ended.all():
            break
        tokens = chosen[:, None]
    return torch.stack(columns, dim=1)


def rewards_of(pairs: Sequence[tuple[int, int]], responses: Tensor) -> Tensor:
    rows = zip(pairs, responses.tolist(), strict=True)
    return torch.tensor([reward(*pair, decode(row)) for pair, row in rows])


def roll_out(model: LlamaForCausalLM, settings: Settings, rng: random.Random) -> Rollout:
    """Samples of new problems, with advantages normalised in each problem's group."""
    problems = draw_problems(settings.prompts, settings.digits, rng)
    pairs = [pair for pair in problems.pairs for _ in range(settings.samples)]
    prompts = problems.prompts.repeat_interleave(settings.samples, dim=0)
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    responses = generate(model, prompts, longest_response(settings.digits), generator)
    rewards = rewards_of(pairs, responses)
    groups = rewards.view(settings.prompts, settings.samples)
    centred = groups - groups.mean(1, keepdim=True)
    advantages = (centred / (groups.std(1, keepdim=True) + 1e-6)).flatten()
    # A PAD that was sampled before the end is a token as any other.
    after_end = (responses == END).cumsum(1) - (responses == END).int()
    return Rollout(prompts, responses, after_end == 0, rewards, advantages)


def greedy_accuracy(model: LlamaForCausalLM, settings: Settings) -> float:
    problems = draw_problems(
        settings.evaluation_prompts, settings.digits, random.Random("evaluation")
    )
    responses = generate(model, problems.prompts, longest_response(settings.digits), None)
    return float(rewards_of(problems.pairs, responses).mean())


def rollout_figures(rollout: Rollout, entropy: Tensor, settings: Settings) -> dict[str, float]:
    groups = rollout.rewards.view(-1, settings.samples)
    return {
        "entropy": float(entropy[rollout.mask].mean()),
        "reward": float(rollout.rewards.mean()),
        "pass_at_8": float(groups.amax(1).mean()),
        "length": float(rollout.mask.sum(1).float().mean()),
    }


# ---- reinforcement learning


class Minibatch(NamedTuple):
    log_prob: Tensor
    entropy: Tensor
    old_log_prob: Tensor
    start_log_prob: Tensor | None
    advantages: Tensor
    mask: Tensor
    seed: int

    @property
    def tokens(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.log_prob, self.old_log_prob, self.advantages, self.mask


def grpo(batch: Minibatch, settings: Settings) -> PolicyLoss:
    return ppo_clip_loss(*batch.tokens, covariance_metrics=True)


def clip_higher(batch: Minibatch, settings: Settings) -> PolicyLoss:
    return ppo_clip_loss(
        *batch.tokens, clip_ratio_high=settings.clip_ratio_high, covariance_metrics=True
    )


def with_entropy_bonus(batch: Minibatch, settings: Settings) -> PolicyLoss:
    policy = grpo(batch, settings)
    bonus = entropy_bonus(batch.entropy, batch.mask, coef=settings.entropy_coef)
    return PolicyLoss(policy.loss + bonus.loss, policy.metrics)


def with_kl_penalty(batch: Minibatch, settings: Settings) -> PolicyLoss:
    assert batch.start_log_prob is not None
    policy = grpo(batch, settings)
    penalty = reference_kl_loss(
        batch.log_prob, batch.start_log_prob, batch.mask, coef=settings.kl_coef
    )
    return PolicyLoss(policy.loss + penalty.loss, policy.metrics)


def clip_cov(batch: Minibatch, settings: Settings) -> PolicyLoss:
    return clip_cov_loss(
        *batch.tokens,
        clip_cov_ratio=settings.clip_cov_ratio,
        clip_cov_lb=settings.clip_cov_lb,
        clip_cov_ub=settings.clip_cov_ub,
        seed=batch.seed,
    )


def kl_cov(batch: Minibatch, settings: Settings) -> PolicyLoss:
    return kl_cov_loss(
        *batch.tokens, kl_cov_ratio=settings.kl_cov_ratio, ppo_kl_coef=settings.ppo_kl_coef
    )


LOSSES: dict[str, Callable[[Minibatch, Settings], PolicyLoss]] = {
    "grpo": grpo,
    "clip-higher": clip_higher,
    "entropy-bonus": with_entropy_bonus,
    "kl-penalty": with_kl_penalty,
    "clip-cov": clip_cov,
    "kl-cov": kl_cov,
}
RECORDED = {  # name in the results: name in the metrics, 0 where a loss has no such thing
    "covariance": "actor/covariance",
    "selected": "actor/cov_clipfrac",
    "clipped": "actor/ppo_clipfrac",
}


def update(model: LlamaForCausalLM, optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    optimiser.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()


def train(
    method: str, seed: int, start: LlamaForCausalLM, settings: Settings, steps: int
) -> dict[str, Any]:
    """One run. The problems and the sampling seeds depend on `seed` alone, not on the method."""
    begin = time.perf_counter()
    rng = random.Random(seed)
    model = new_model(settings)
    model.load_state_dict(start.state_dict())
    optimiser = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.0)
    history: dict[str, list[float]] = {}
    evaluations = {"step": [0], "greedy_accuracy": [greedy_accuracy(model, settings)]}
    for step in range(1, steps + 1):
        rollout = roll_out(model, settings, rng)
        figures = learn(method, model, start, optimiser, rollout, rng, settings)
        for name, value in figures.items():
            history.setdefault(name, []).append(round(value, 6))
        if step % settings.evaluate_every == 0 or step == steps:
            evaluations["step"].append(step)
            evaluations["greedy_accuracy"].append(greedy_accuracy(model, settings))
    seconds = time.perf_counter() - begin
    return dict(method=method, seed=seed, seconds=seconds, history=history, evaluations=evaluations)


def learn(
    method: str,
    model: LlamaForCausalLM,
    start: LlamaForCausalLM,
    optimiser: torch.optim.Optimizer,
    rollout: Rollout,
    rng: random.Random,
    settings: Settings,
) -> dict[str, float]:
    """One pass over a rollout, in minibatches of whole groups; the rollout's figures."""
    rows = list(torch.arange(len(rollout.rewards)).chunk(settings.minibatches))
    old, start_scores = [], []
    with torch.no_grad():
        for part in rows:
            old.append(scores(model, rollout.prompts[part], rollout.responses[part]))
            if method == "kl-penalty":
                start_scores.append(scores(start, rollout.prompts[part], rollout.responses[part]))
    metrics: dict[str, list[float]] = {name: [] for name in RECORDED}
    for index, part in enumerate(rows):
        log_prob, entropy = scores(model, rollout.prompts[part], rollout.responses[part])
        batch = Minibatch(
            log_prob,
            entropy,
            old[index][0],
            start_scores[index][0] if start_scores else None,
            rollout.advantages[part],
            rollout.mask[part],
            rng.getrandbits(60),
        )
        result = LOSSES[method](batch, settings)
        update(model, optimiser, result.loss)
        for name, values in metrics.items():
            values.append(float(result.metrics.get(RECORDED[name], 0.0)))
    figures = rollout_figures(rollout, torch.cat([entropy for _, entropy in old]), settings)
    return figures | {name: sum(values) / len(values) for name, values in metrics.items()}


# ---- what came out

TITLES = {
    "entropy": "policy entropy, nats a token",
    "reward": "mean reward of the samples",
    "pass_at_8": "problems with a right answer among 8",
    "length": "tokens of a response",
    "covariance": "covariance of log-probability and advantage",
    "greedy_accuracy": "greedy accuracy",
}
COLOURS = dict(
    zip(
        METHODS,
        ("0.3", "tab:olive", "tab:green", "tab:purple", "tab:orange", "tab:blue"),
        strict=True,
    )
)
SMOOTHED = 10  # steps in a mean, in the picture and in the table


def curve(run: dict[str, Any], name: str) -> tuple[list[float], list[float]]:
    """Steps and values; the step is the number of rollouts that the policy had learnt from."""
    if name in run["evaluations"]:
        return run["evaluations"]["step"], run["evaluations"][name]
    values = run["history"][name]
    return list(range(len(values))), values


def final(run: dict[str, Any], name: str) -> float:
    """The last evaluation, or the mean of the last steps."""
    _, values = curve(run, name)
    last = values[-1:] if name in run["evaluations"] else values[-SMOOTHED:]
    return sum(last) / len(last)


def last_line(run: dict[str, Any]) -> str:
    names = ["greedy_accuracy", *run["history"]]
    return ", ".join(f"{name} {final(run, name):.3g}" for name in names)


def summary(results: dict[str, Any]) -> str:
    """A row of Markdown for each method: means over the seeds, and the smallest and largest."""
    names = ("entropy", "reward", "pass_at_8", "greedy_accuracy", "length", "selected", "clipped")
    lines = ["| method | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for method, runs in by_method(results).items():
        cells = []
        for name in names:
            values = [final(run, name) for run in runs]
            mean = sum(values) / len(values)
            cells.append(f"{mean:.3g} ({min(values):.3g} to {max(values):.3g})")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def by_method(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found = {
        method: [run for run in results["runs"] if run["method"] == method] for method in METHODS
    }
    return {method: runs for method, runs in found.items() if runs}


def draw(results: dict[str, Any], path: Path) -> None:
    """Each figure over the steps: thin lines are the seeds, thick ones their means.

    No bands: where one seed learns and another does not, nothing is in between.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    def smooth(runs: Sequence[dict[str, Any]], name: str) -> tuple[Any, Any]:
        """Steps [S] and values [seeds, S]; means of some steps, but for evaluations."""
        steps = np.array(curve(runs[0], name)[0])
        values = np.array([curve(run, name)[1] for run in runs])
        if name in runs[0]["evaluations"]:
            return steps, values
        width = min(SMOOTHED, len(steps))
        kernel = np.ones(width) / width
        values = np.array([np.convolve(row, kernel, mode="valid") for row in values])
        return steps[width - 1 :] - (width - 1) / 2, values

    figure, panels = plt.subplots(2, 4, figsize=(17, 7.4))
    panels = panels.flatten()
    for axes, (name, title) in zip(panels, TITLES.items(), strict=False):
        for method, runs in by_method(results).items():
            steps, values = smooth(runs, name)
            colour = COLOURS[method]
            axes.plot(steps, values.mean(0), color=colour, linewidth=1.8, label=method)
            axes.plot(steps, values.T, color=colour, alpha=0.35, linewidth=0.6)
        axes.set_title(title, fontsize=10)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("rollouts learnt from")

    against, table = panels[len(TITLES) :]
    for method, runs in by_method(results).items():
        entropy, rewards = (smooth(runs, name)[1] for name in ("entropy", "reward"))
        against.plot(entropy.T, rewards.T, color=COLOURS[method], linewidth=0.8)
        against.plot(entropy[:, -1], rewards[:, -1], "o", color=COLOURS[method], markersize=4)
    against.set_xlabel("policy entropy; each seed, a dot at its end")
    against.set_title("mean reward against entropy", fontsize=10)

    figures = results["start"]["covariance_table"]
    table.loglog(figures["share"], figures["mean_cov"], "o-", color="0.3", label="this start")
    table.loglog(
        figures["share"], figures["paper_mean_cov"], "s--", color="0.6", label="Qwen2.5-7B (paper)"
    )
    table.set_xlabel("share of the tokens, of highest covariance")
    table.set_title("mean covariance, first step", fontsize=10)
    table.legend(fontsize=8, frameon=False)

    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    panels[4].legend(fontsize=8, frameon=False, loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
