"""`mcmc_power_samp` beside the public function of that name, on SmolLM2 and the same prompts.

    python bench/power_sampling/compare_public_sampler.py --peer PATH --peer-prompts 4 9 \\
        --output bench/results/public_sampler_cpu.json

PATH is the folder of aakaran/reasoning-with-sampling that holds power_samp_utils.py; it runs as it
is. Ours runs with compat="reference": the public function's own law. First one prompt after the
other, then all sixteen at once; each in a process of its own. Settings, prompts and the care taken
of the public function's EOS test are those of compare_sampler.py.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.power_sampling import compare_sampler as common


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--peer", type=Path, help="folder with the public power_samp_utils.py")
    parser.add_argument(
        "--peer-prompts", type=int, nargs="+", default=[4], help="numbers of the prompts it runs"
    )
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(run(options)))
        return
    results = {}
    for name in [
        "ours, one by one",
        "ours, sixteen at once",
        *(["public"] if options.peer else []),
    ]:
        command = [sys.executable, __file__, "--only", name]
        command += ["--peer-prompts", *map(str, options.peer_prompts)]
        if options.peer:
            command += ["--peer", str(options.peer)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results[name] = json.loads(output.splitlines()[-1])
        print(f"{name}: {results[name]}", flush=True)
    if options.peer:
        peer = results["public"]["seconds_per_prompt"]
        for name in list(results)[:2]:
            faster = peer / results[name]["seconds_per_prompt"]
            results[name]["times_faster"] = faster
            print(f"{name}: {faster:.1f} x faster than the public function")
    report = {
        "environment": common.environment(),
        "settings": common.settings("bfloat16") | {"prompts": options.peer_prompts},
        "results": results,
    }
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=1) + "\n")


def run(options: argparse.Namespace) -> dict:
    chosen = [common.PROMPTS[i] for i in options.peer_prompts]
    if options.only == "public":
        common.PROMPTS = chosen
        return common.peer(argparse.Namespace(peer=options.peer, peer_prompts=len(chosen)))
    if options.only == "ours, one by one":
        return ours([[text] for text in chosen])
    return ours([common.PROMPTS])


def ours(batches: list[list[str]]) -> dict:
    """Each batch of prompts in a call of its own."""
    from types import SimpleNamespace

    import torch

    from powerkernels.integrations import public_sampler
    from powerkernels.integrations.smollm2 import load_smollm2

    model, tokenizer = load_smollm2(dtype=torch.bfloat16)
    p = SimpleNamespace(model=model, tokenizer=tokenizer, device=torch.device("cpu"))
    seconds, kept, acceptance, num_prompts = [], 0, [], 0
    for texts in batches:
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
            seed=0,
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
        "kept_tokens": kept,
        "acceptance_rate": sum(acceptance) / len(acceptance),
    }


if __name__ == "__main__":
    main()
