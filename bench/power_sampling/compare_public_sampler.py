"""`mcmc_power_samp` beside the public function of that name, on SmolLM2 and the same prompts.

    python bench/power_sampling/compare_public_sampler.py --peer PATH --seeds 0 1 2 \\
        --output bench/results/public_sampler_cpu.json

PATH is the folder of aakaran/reasoning-with-sampling that holds power_samp_utils.py; it runs as it
is, with the first of the seeds. Ours runs with compat="reference": the public function's own law,
so that the length of a chain is random in the same way; it still varies several times over between
prompts and seeds, and a few chains say little. First one prompt after the other, then all of them
at once; each in a process of its own. Settings, prompts and the care taken of the public function's
EOS test are those of compare_sampler.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.harness.whole_job import Run
from bench.power_sampling import compare_sampler as common

ONE_BY_ONE, AT_ONCE, PUBLIC = "ours, one by one", "ours, all at once", "public"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--peer", type=Path, help="folder with the public power_samp_utils.py")
    parser.add_argument(
        "--prompts",
        type=int,
        nargs="+",
        default=list(range(len(common.PROMPTS))),
        help="numbers of the prompts (default: all)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(run(options)))
        return
    results = {}
    for name in [ONE_BY_ONE, AT_ONCE, *([PUBLIC] if options.peer else [])]:
        command = [sys.executable, __file__, "--only", name]
        command += ["--prompts", *map(str, options.prompts), "--seeds", *map(str, options.seeds)]
        if options.peer:
            command += ["--peer", str(options.peer)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results[name] = json.loads(output.splitlines()[-1])
        print(f"{name}: {results[name]}", flush=True)
    if options.peer:
        compare(results)
    common.write(options.output, "mcmc_power_samp", runs_of(results, options.seeds))


def runs_of(results: dict[str, dict], seeds: list[int]) -> list[Run]:
    """Rows of the file: times are those of each call."""
    prompts = results[ONE_BY_ONE]["prompts"] // len(seeds)
    case = common.job_case(f"{prompts} prompts", "bfloat16", prompts=prompts, seeds=len(seeds))
    return [
        Run(
            case,
            name,
            figures,
            ours=name != PUBLIC,
            peer="public-sampler" if name == PUBLIC else None,
        )
        for name, figures in results.items()
    ]


def run(options: argparse.Namespace) -> dict:
    chosen = [common.PROMPTS[i] for i in options.prompts]
    if options.only == PUBLIC:
        common.PROMPTS = chosen
        settings = argparse.Namespace(peer=options.peer, peer_prompts=len(chosen))
        return with_rates(common.peer(settings, seed=options.seeds[0]))
    if options.only == ONE_BY_ONE:
        return with_rates(ours([[text] for text in chosen], options.seeds))
    return with_rates(ours([chosen], options.seeds))


def compare(results: dict) -> None:
    """Adds to our results how many times faster they are than the public function's.

    One by one also gets the standard error of that ratio, by the jackknife over the prompts: what
    the choice of the prompts, and the public function's one chain of each, leave open.
    """
    public = results[PUBLIC]
    for name in (ONE_BY_ONE, AT_ONCE):
        ours = results[name]
        for unit in ("prompt", "kept_token"):
            faster = public[f"seconds_per_{unit}"] / ours[f"seconds_per_{unit}"]
            ours[f"times_faster_per_{unit}"] = faster
            print(f"{name}: {faster:.1f} x faster than the public function, per {unit}")
    theirs, each = public["seconds_of_each"], results[ONE_BY_ONE]["seconds_of_each"]
    n = len(theirs)
    if n > 1:
        mine = [statistics.mean(each[i::n]) for i in range(n)]
        left_out = [(sum(theirs) - theirs[i]) / (sum(mine) - mine[i]) for i in range(n)]
        error = ((n - 1) * statistics.pvariance(left_out)) ** 0.5
        results[ONE_BY_ONE]["standard_error_of_times_faster_per_prompt"] = error
        print(f"{ONE_BY_ONE}: per prompt, with a standard error of {error:.1f}")


def with_rates(result: dict) -> dict:
    """`result` with its time per token kept, and how far its mean time per call may be off."""
    calls = result["seconds_of_each"]
    result["seconds_per_kept_token"] = result["seconds"] / result["kept_tokens"]
    if len(calls) > 1:
        result["standard_error_of_a_call"] = statistics.stdev(calls) / len(calls) ** 0.5
    return result


def ours(batches: list[list[str]], seeds: list[int]) -> dict:
    """Each batch of prompts in a call of its own, with each seed."""
    from types import SimpleNamespace

    import torch

    from powerkernels.integrations import public_sampler
    from powerkernels.integrations.smollm2 import load_smollm2

    model, tokenizer = load_smollm2(dtype=torch.bfloat16)
    p = SimpleNamespace(model=model, tokenizer=tokenizer, device=torch.device("cpu"))
    seconds, kept, acceptance, num_prompts = [], 0, [], 0
    for seed, texts in itertools.product(seeds, batches):
        contexts = [common.prompt_ids(tokenizer, text) for text in texts]
        started = time.perf_counter()
        samples = public_sampler.mcmc_power_samp_batch(
            p,
            contexts,
            1 / common.ALPHA,
            common.NUM_MCMC_STEPS,
            common.MAX_NEW_TOKENS,
            common.NUM_BLOCKS,
            compat="reference",
            seed=seed,
        )
        seconds.append(time.perf_counter() - started)
        num_prompts += len(texts)
        for sample, context in zip(samples, contexts, strict=True):
            kept += len(sample.gen) - len(context)
            acceptance.append(sample.acceptance_ratio)
    return {
        "seconds": sum(seconds),
        "prompts": num_prompts,
        "seconds_per_prompt": sum(seconds) / num_prompts,
        "seconds_of_each": seconds,
        "kept_tokens": kept,
        "acceptance_rate": sum(acceptance) / len(acceptance),
    }


if __name__ == "__main__":
    main()
