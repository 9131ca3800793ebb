"""The law of `mcmc_power_samp` beside that of the public function, on a model with few texts.

    python bench/power_sampling/compare_public_law.py --peer PATH \\
        --output bench/results/public_law_cpu.json

PATH is the folder of aakaran/reasoning-with-sampling that holds power_samp_utils.py; it runs as it
is. Both draw from a random Llama with four tokens, two blocks of two tokens, and a two-sample χ²
says whether the completions could come from one law: with compat="reference" they must, and with
p^(1/temp) itself, which is another law, they must not.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.harness.cases import Case
from bench.harness.whole_job import Run
from bench.power_sampling import compare_sampler as common

VOCAB_SIZE, EOS, PROMPT = 4, 0, [1, 2]
TEMPERATURE, NUM_MCMC_STEPS, MAX_NEW_TOKENS, NUM_BLOCKS = 0.5, 4, 4, 2
OURS_PER_PUBLIC = 8  # our draws cost next to nothing, and more of them sharpen the test
FEWEST_IN_A_BIN = 10  # completions that are rarer in all draws together share a bin
SIGNIFICANCE = 1e-3
# By the name of ours in the file: what `compat` gives it. The first is the public function's own.
LAWS = {"same_law": "reference", "power_law": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--peer", type=Path, required=True, help="folder with power_samp_utils.py")
    parser.add_argument("--draws", type=int, default=4000, help="of the public function")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args()

    p = public_sampler_object(options.peer)
    started = time.perf_counter()
    public = public_draws(p, options.draws)
    seconds = time.perf_counter() - started
    figures: dict[str, Any] = {"seconds": seconds, "draws": options.draws}
    for name, compat in LAWS.items():
        statistic, freedom, p_value = two_sample(public, our_draws(p, options.draws, compat))
        figures[name] = {"chi2": statistic, "degrees_of_freedom": freedom, "p_value": p_value}
        print(f"{name}: χ² = {statistic:.1f} on {freedom} degrees of freedom, p = {p_value:.2g}")
    common.write(options.output, "mcmc_power_samp", [job_run(figures)])
    same, other = (figures[name]["p_value"] for name in LAWS)
    if not (same > SIGNIFICANCE > other):
        sys.exit("the laws are not what they should be")


def job_run(figures: dict[str, Any]) -> Run:
    """The file's row: the public function's draws, and ours of either law beside them."""
    shape = {
        "num_mcmc_steps": NUM_MCMC_STEPS,
        "max_new_tokens": MAX_NEW_TOKENS,
        "num_blocks": NUM_BLOCKS,
        "our_draws_per_public_draw": OURS_PER_PUBLIC,
    }
    case = Case(f"random Llama, {VOCAB_SIZE} tokens, temperature {TEMPERATURE}", shape)
    return Run(case, "public", figures, ours=False, peer="public-sampler")


def public_sampler_object(peer: Path) -> Any:
    """The public `AutoregressiveSampler` of a random model."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=EOS,
        initializer_range=0.3,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    tokenizer = SimpleNamespace(eos_token_id=EOS, decode=lambda *args, **kwargs: "")
    module = common.public_module(peer)
    return module.AutoregressiveSampler(model, tokenizer, torch.device("cpu"))


def public_draws(p: Any, draws: int) -> Counter[tuple[int, ...]]:
    import numpy as np
    import torch

    module = sys.modules["power_samp_utils"]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    counts: Counter[tuple[int, ...]] = Counter()
    for _ in range(draws):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            gen, *_ = module.mcmc_power_samp(
                p, PROMPT, TEMPERATURE, NUM_MCMC_STEPS, MAX_NEW_TOKENS, block_num=NUM_BLOCKS
            )
        counts[tuple(gen[len(PROMPT) :])] += 1
    return counts


def our_draws(p: Any, draws: int, compat: Any) -> Counter[tuple[int, ...]]:
    from powerkernels.integrations.public_sampler import mcmc_power_samp_batch

    samples = mcmc_power_samp_batch(
        p,
        [PROMPT] * (draws * OURS_PER_PUBLIC),
        TEMPERATURE,
        NUM_MCMC_STEPS,
        MAX_NEW_TOKENS,
        NUM_BLOCKS,
        compat=compat,
        seed=2,
        num_lanes=512,
    )
    return Counter(tuple(sample.gen[len(PROMPT) :]) for sample in samples)


def two_sample(
    a: Counter[tuple[int, ...]], b: Counter[tuple[int, ...]]
) -> tuple[float, int, float]:
    """χ² of homogeneity: statistic, degrees of freedom, p-value."""
    from scipy import stats

    rows, rare = [], [0, 0]
    for completion in sorted(a.keys() | b.keys()):
        row = [a[completion], b[completion]]
        if sum(row) * a.total() / (a.total() + b.total()) >= FEWEST_IN_A_BIN:
            rows.append(row)
        else:
            rare = [rare[0] + row[0], rare[1] + row[1]]
    if sum(rare):
        rows.append(rare)
    result = stats.chi2_contingency(rows)
    return float(result.statistic), int(result.dof), float(result.pvalue)


if __name__ == "__main__":
    main()
