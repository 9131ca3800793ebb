"""The sampler as a whole job on SmolLM2: each switch on and off, and the public sampler beside it.

    python bench/power_sampling/compare_sampler.py --output bench/results/sampler_cpu.json
    python bench/power_sampling/compare_sampler.py --peer PATH --peer-prompts 3 ...
    python bench/power_sampling/compare_sampler.py --runs both --dtype float32 --revision CHECKOUT

PATH is the folder of aakaran/reasoning-with-sampling that holds power_samp_utils.py; it runs as it
is, batch 1, on the first prompts. Every run is a process of its own, so that each has its own peak
of memory. 16 chat prompts, 160 tokens, 4 blocks, 6 transitions per block, bfloat16. Last, one
prompt alone: on a single lane, and on lanes that make its next transitions ahead (latency mode).
CHECKOUT is another revision of this project, its compiled part in place: the first of the runs is
made with it too. --output is a file as `powerkernels bench` writes them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.machinery
import io
import json
import os
import random
import resource
import subprocess
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.harness.cases import Case
    from bench.harness.whole_job import Run
    from powerkernels import PowerSampler

ROOT = Path(__file__).resolve().parents[2]

PROMPTS = [
    "What is the capital of France, and what is it known for?",
    "Write a haiku about rain.",
    "Explain photosynthesis to a ten-year-old.",
    "Give me three tips for sleeping better.",
    "A train travels 60 miles in 1.5 hours. What is its average speed? Explain each step.",
    "Who wrote Hamlet, and what is the play about?",
    "Describe a cat in a few sentences.",
    "How do I boil an egg?",
    "What is gravity?",
    "Name five fruits and say how each one tastes.",
    "Tell me a short story about a fox.",
    "What is a prime number? Give examples.",
    "Why is the sky blue?",
    "How far away is the moon, and how do we know?",
    "Suggest a name for a boat and explain your choice.",
    "What does HTTP stand for, and what is it used for?",
]
MODEL = "SmolLM2-135M-Instruct"
MAX_NEW_TOKENS, NUM_BLOCKS, NUM_MCMC_STEPS, ALPHA = 160, 4, 6, 4.0
NUM_LANES = 16
SWITCHES = {
    "both": (True, True),
    "early rejection": (True, False),
    "shared-prefix skip": (False, True),
    "neither": (False, False),
}
# One chain on so many lanes; more than one prefetch.
LATENCY = {"one prompt, 1 lane": 1, "one prompt, 4 lanes": 4, "one prompt, 8 lanes": 8}
LATENCY_PROMPTS = (4, 9)  # one after the other
PEER = "peer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--peer", type=Path, help="folder with the public power_samp_utils.py")
    parser.add_argument("--peer-prompts", type=int, default=3, help="prompts the peer runs")
    parser.add_argument(
        "--runs", nargs="+", choices=[*SWITCHES, *LATENCY], help="some of our runs (default: all)"
    )
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the model"
    )
    parser.add_argument("--revision", type=Path, help="checkout of another revision to run beside")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        if options.only == PEER:
            result = peer(options)
        elif options.only in LATENCY:
            result = one_by_one(LATENCY[options.only], options.dtype)
        else:
            result = ours(*SWITCHES[options.only], options.dtype)
        result["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(result))
        return
    names = list(options.runs or (*SWITCHES, *LATENCY))
    results = {name: run(name, options) for name in names}
    if options.revision:
        results[f"{names[0]}, {commit_of(options.revision)[:7]}"] = run(
            names[0], options, PYTHONPATH=str(options.revision)
        )
    if options.peer:
        results[PEER] = run(PEER, options)
    # Only now: a run of another revision must not find this one's modules.
    sys.path.insert(0, str(ROOT))
    write(options.output, "power_sampler", job_runs(results, options.dtype))


def job_runs(results: dict[str, dict], dtype: str) -> list[Run]:
    """Rows of the file, by the number of prompts that they had, and how."""
    from bench.harness.whole_job import Run

    made = []
    for name, figures in results.items():
        prompts = figures["prompts"]
        if name in LATENCY or name == PEER:
            case = job_case(f"{prompts} prompts, one after the other", dtype, prompts=prompts)
        else:
            case = job_case(f"{prompts} prompts", dtype, prompts=prompts, num_lanes=NUM_LANES)
        peer = "public-sampler" if name == PEER else None
        made.append(Run(case, name, figures, ours=peer is None, peer=peer))
    return made


def job_case(label: str, dtype: str, **sizes: int) -> Case:
    """A size of the job: what is as ever, and what is not."""
    import torch

    from bench.harness.cases import Case

    shape = {
        "max_new_tokens": MAX_NEW_TOKENS,
        "num_blocks": NUM_BLOCKS,
        "num_mcmc_steps": NUM_MCMC_STEPS,
        **sizes,
    }
    return Case(f"{MODEL}, α = {ALPHA:g}, {label}", shape, getattr(torch, dtype))


def write(path: Path | None, kernel: str, runs: Sequence[Run], **environment: Any) -> None:
    """Prints a table, and writes the file if there is a path."""
    import torch

    from bench.harness import machine, table, whole_job

    here = machine.environment(torch.device("cpu"))
    here["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    found = whole_job.document(kernel, "power_sampling", runs, here | environment, path)
    print(table.text(found.data["benchmarks"]))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        found.write()


def run(name: str, options: argparse.Namespace, **environment: str) -> dict:
    """One run, in a process of its own."""
    command = [sys.executable, __file__, "--only", name, "--dtype", options.dtype]
    if options.peer:
        command += ["--peer", str(options.peer), "--peer-prompts", str(options.peer_prompts)]
    output = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | environment
    ).stdout
    result = json.loads(output.splitlines()[-1])
    print(f"{name}: {result}", flush=True)
    return result


def commit_of(checkout: Path) -> str:
    return subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True
    ).stdout.strip()


def smollm2_sampler(num_lanes: int, dtype: str = "bfloat16", **switches: bool) -> PowerSampler:
    import torch

    from powerkernels import PowerSampler, PowerSamplingConfig
    from powerkernels.integrations.smollm2 import load_smollm2

    model, tokenizer = load_smollm2(dtype=getattr(torch, dtype))
    config = PowerSamplingConfig(
        alpha=ALPHA,
        max_new_tokens=MAX_NEW_TOKENS,
        block_size=MAX_NEW_TOKENS // NUM_BLOCKS,
        num_mcmc_steps=NUM_MCMC_STEPS,
        num_lanes=num_lanes,
        **switches,
    )
    return PowerSampler(model, tokenizer, config=config)


def ours(early_rejection: bool, shared_prefix_skip: bool, dtype: str) -> dict:
    sampler = smollm2_sampler(
        NUM_LANES, dtype, early_rejection=early_rejection, shared_prefix_skip=shared_prefix_skip
    )
    prompts = [[{"role": "user", "content": text}] for text in PROMPTS]
    started = time.perf_counter()
    samples = sampler.sample(prompts, progress=False)
    seconds = time.perf_counter() - started
    stats = sampler.stats
    return {
        "seconds": seconds,
        "prompts": len(PROMPTS),
        "seconds_per_prompt": seconds / len(PROMPTS),
        "model_steps": stats.model_steps,
        "model_seconds": stats.model_seconds,
        "prefill_seconds": stats.prefill_seconds,
        "decoded_tokens": stats.decoded_tokens,
        "kept_tokens": stats.kept_tokens,
        "tokens_per_second": stats.decoded_tokens / seconds,
        "acceptance_rate": stats.acceptance_rate,
        "lane_occupancy": stats.lane_occupancy,
        "stopped_at_eos": sum(sample.finish_reason == "stop" for sample in samples),
        "mean_log_likelihood": sum(s.log_likelihood for s in samples) / len(samples),
    }


def one_by_one(num_lanes: int, dtype: str) -> dict:
    """Each prompt in a call of its own, on a sampler that has been used before."""
    sampler = smollm2_sampler(num_lanes, dtype)
    seconds, steps, used, decoded, kept = [], 0, 0, 0, 0
    for timed, texts in ((False, PROMPTS[1:2]), (True, [PROMPTS[i] for i in LATENCY_PROMPTS])):
        for text in texts:
            started = time.perf_counter()
            sampler.sample([[{"role": "user", "content": text}]], progress=False)
            if timed:
                seconds.append(time.perf_counter() - started)
                steps += sampler.stats.model_steps
                used += sampler.stats.used_tokens
                decoded += sampler.stats.decoded_tokens
                kept += sampler.stats.kept_tokens
    return {
        "seconds": sum(seconds),
        "prompts": len(seconds),
        "seconds_per_prompt": sum(seconds) / len(seconds),
        "model_steps": steps,
        "used_tokens": used,
        "decoded_tokens": decoded,
        "kept_tokens": kept,
        "used_tokens_per_second": used / sum(seconds),
    }


def peer(options: argparse.Namespace, seed: int = 0) -> dict:
    import numpy
    import torch

    from powerkernels.integrations.smollm2 import load_smollm2

    model, tokenizer = load_smollm2(dtype=torch.bfloat16)
    power_samp_utils = public_module(options.peer)
    sampler = power_samp_utils.AutoregressiveSampler(model, tokenizer, torch.device("cpu"))
    prompts = [prompt_ids(tokenizer, text) for text in PROMPTS[: options.peer_prompts]]
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    decoded = 0
    generate = model.generate

    def counted(*args: object, **kwargs: object) -> object:
        nonlocal decoded
        output = generate(*args, **kwargs)
        decoded += output.sequences.shape[1] - kwargs["input_ids"].shape[1]
        return output

    model.generate = counted
    seconds, kept, acceptance = [], 0, []
    for prompt in prompts:
        started = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            tokens, _, _, rate = power_samp_utils.mcmc_power_samp(
                sampler, prompt, 1 / ALPHA, NUM_MCMC_STEPS, MAX_NEW_TOKENS, block_num=NUM_BLOCKS
            )
        seconds.append(time.perf_counter() - started)
        kept += len(tokens) - len(prompt)
        acceptance.append(rate)
    return {
        "seconds": sum(seconds),
        "prompts": len(prompts),
        "seconds_per_prompt": sum(seconds) / len(prompts),
        "seconds_of_each": seconds,
        "decoded_tokens": decoded,
        "kept_tokens": kept,
        "tokens_per_second": decoded / sum(seconds),
        "acceptance_rate": sum(acceptance) / len(acceptance),
    }


def public_module(peer: Path) -> types.ModuleType:
    """The public power_samp_utils.py of the folder `peer`, as it is."""
    # What the file imports for its evaluations and the sampler does not use.
    unused = {
        "pandas": (),
        "datasets": ("Dataset", "load_dataset", "concatenate_datasets"),
        "grader_utils": (),
        "grader_utils.parse_utils": ("parse_answer",),
        "constants": (),
    }
    for name, contents in unused.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        for content in contents:
            setattr(module, content, None)
        sys.modules[name] = module
    sys.path.insert(0, str(peer))
    import power_samp_utils

    return power_samp_utils


def prompt_ids(tokenizer: object, text: str) -> list[int]:
    """A chat prompt without EOS tokens.

    The public function looks for EOS in the prompt too, finds it after every turn of a chat
    template, and returns after one block. Without those tokens it runs its course.
    """
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )["input_ids"]
    return [token for token in ids if token != tokenizer.eos_token_id]


if __name__ == "__main__":
    main()
