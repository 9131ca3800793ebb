# ruff: noqa: T201
"""From a real model to samples of p^alpha: what `make demo` runs.

SmolLM2-135M-Instruct answers a few questions three ways: plain sampling from p, low temperature,
and Metropolis-Hastings from p^alpha. The answers are printed side by side, and a picture shows the
chains and what likelihood each method reaches.

    python examples/demo.py --output demo.png
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from powerkernels import PowerSamplingConfig
from powerkernels.compare import METHODS, MethodRun, compare_prompt, compare_runs, run_method
from powerkernels.integrations.smollm2 import converted_folder, load_smollm2

PROMPTS = (
    "Name the planet closest to the sun and say why it has no moons.",
    "What is 7 + 5? Explain your answer.",
    "Write one sentence about the sea.",
    "Why is the sky blue?",
    "Give me a recipe for tomato soup in three steps.",
    "Which is heavier, a kilogram of feathers or a kilogram of iron?",
    "What does a compiler do?",
    "Tell me a very short story about a fox.",
)
SHOWN = 2  # prompts whose answers are printed; all of them enter the means and the picture

# Small enough for two CPU cores: 32 chains, 24 transitions each.
NUM_SAMPLES = 4
CONFIG = PowerSamplingConfig(
    alpha=4.0, max_new_tokens=96, block_size=24, num_mcmc_steps=6, seed=0, num_lanes=32
)

COLOURS = {"plain": "0.6", "low-temperature": "tab:orange", "power": "tab:blue"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Plain, low-temperature and power samples of a real model."
    )
    parser.add_argument(
        "--output", type=Path, default=Path("demo.png"), help="where the picture goes"
    )
    arguments = parser.parse_args(argv)

    if not converted_folder().is_dir():
        say("converting SmolLM2-135M-Instruct, once: about 20 s")
    model, tokenizer = load_smollm2()
    runs = sample(model, tokenizer, PROMPTS, CONFIG, NUM_SAMPLES)

    width = shutil.get_terminal_size((120, 24)).columns
    for index in range(SHOWN):
        shown = [first_sample(run) for run in runs]
        print(compare_prompt(PROMPTS[index], index, shown, width), end="\n\n")
    print(
        f"all {len(PROMPTS)} prompts, {NUM_SAMPLES} samples each\n\n{compare_runs(runs, width)}\n"
    )

    draw(runs, arguments.output)
    print(f"picture: {arguments.output}")
    return 0


def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    config: PowerSamplingConfig,
    num_samples: int,
) -> list[MethodRun]:
    """One run for each method, over the same prompts as chats."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    runs = []
    for method in METHODS:
        start = time.perf_counter()
        run = run_method(
            model, tokenizer, chats, method=method, config=config, num_samples=num_samples
        )
        if run.interrupted:
            raise KeyboardInterrupt
        say(f"{method}: {len(run.samples)} samples in {time.perf_counter() - start:.1f} s")
        runs.append(run)
    return runs


def first_sample(run: MethodRun) -> MethodRun:
    """The run with one sample a prompt: enough to read."""
    firsts = [sample for sample in run.samples if sample.sample_index == 0]
    return MethodRun(run.method, run.config, firsts, run.seconds)


def draw(runs: Sequence[MethodRun], path: Path) -> None:
    """Left: log p of each chain by transition. Right: log p of what each method returned."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, (chains, histogram) = plt.subplots(1, 2, figsize=(12, 4.4))

    power = next(run for run in runs if run.method == "power")
    prompts = sorted({sample.prompt_index for sample in power.samples})
    colours = plt.get_cmap("tab10")
    for sample in sorted(power.samples, key=lambda sample: sample.prompt_index):
        values = sample.trace.log_likelihood
        label = f"prompt {sample.prompt_index}" if sample.sample_index == 0 else None
        colour = colours(prompts.index(sample.prompt_index) % 10)
        chains.plot(
            np.arange(1, len(values) + 1), values, color=colour, alpha=0.7, linewidth=1, label=label
        )
    num_steps = power.config.num_mcmc_steps
    num_blocks = len(power.config.block_limits)
    for block in range(1, num_blocks):
        chains.axvline(block * num_steps + 0.5, color="0.85", linewidth=1, zorder=0)
    chains.set_xlabel(f"transition ({num_steps} a block; a line where the completion may grow)")
    chains.set_ylabel("log-likelihood under the model, nats")
    chains.set_title(f"{len(power.samples)} chains towards $p^{{{power.config.alpha:g}}}$")
    chains.legend(fontsize=7, frameon=False, ncols=2)

    everything = [sample.log_likelihood for run in runs for sample in run.samples]
    bins = np.linspace(min(everything) - 1, max(everything) + 1, 31)
    for run in runs:
        returned = [sample.log_likelihood for sample in run.samples]
        label = f"{run.method}: mean {np.mean(returned):.0f}"
        histogram.hist(returned, bins=bins, alpha=0.6, color=COLOURS[run.method], label=label)
    histogram.set_xlabel("log-likelihood of the completion under the model, nats")
    histogram.set_ylabel("completions")
    histogram.set_title("what each method returned")
    histogram.legend(fontsize=8, frameon=False, loc="upper left")

    for axes in (chains, histogram):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
