"""Power sampling of one job on vLLM, in lockstep and not, and on the lane engine.

    .venv-integrations/bin/python bench/power_sampling/compare_vllm.py \\
        --output bench/results/vllm_cpu.json

SmolLM2, 16 prompts, 160 tokens, 4 blocks of 6 transitions (compare_sampler.py). Each run has a
process of its own and is timed from a loaded model on. --dtype float32 is for a CPU without
AVX-512, where bfloat16 products are slow.

- "lockstep": the loop that people write over `LLM.generate`: all chains make their extension, then
  all make their k-th proposal, and each round waits for its longest. Same law, and tokens drawn and
  scored by the same logits processor as ours, which does that in less time than vLLM's sampler and
  two logsumexps would; no early rejection, no shared-prefix skip.
- "vllm": `integrations.vllm`, on an LLM with the same settings.
- "lanes": `PowerSampler`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.harness.whole_job import Run
from bench.power_sampling import compare_sampler as common

MAX_MODEL_LEN = 512
CACHE_GIB = "4"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument(
        "--runs", nargs="+", choices=list(RUNS), default=list(RUNS), help="some of the runs"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(RUNS[options.only](options.dtype)))
        return
    results = {}
    for name in options.runs:
        command = [sys.executable, __file__, "--only", name, "--dtype", options.dtype]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results[name] = json.loads(output.splitlines()[-1])
        print(f"{name}: {results[name]}", flush=True)
    if "lockstep" in results:
        baseline = results["lockstep"]["seconds"]
        for name in results:
            results[name]["share_of_lockstep"] = results[name]["seconds"] / baseline
            print(f"{name}: {results[name]['share_of_lockstep']:.2f} of the lockstep loop's time")
    prompts = len(common.PROMPTS)
    case = common.job_case(
        f"{prompts} prompts", options.dtype, prompts=prompts, num_lanes=common.NUM_LANES
    )
    made = [Run(case, name, found, ours=name != "lockstep") for name, found in results.items()]
    common.write(options.output, "power_sampler", made)


def lanes(dtype: str) -> dict:
    sampler = common.smollm2_sampler(common.NUM_LANES, dtype)
    return timed(sampler)


def backend(dtype: str) -> dict:
    from powerkernels.integrations.vllm import VLLMPowerSampler

    sampler = VLLMPowerSampler(load(dtype), config=config())
    result = timed(sampler)
    stats = sampler.stats
    return result | {
        "requests": stats.requests,
        "aborted_requests": stats.aborted_requests,
        "prompt_tokens": stats.prompt_tokens,
        "cached_tokens": stats.cached_tokens,
        "log_z_noise": stats.log_z_noise._asdict(),
    }


def timed(sampler: Any) -> dict:
    prompts = [[{"role": "user", "content": text}] for text in common.PROMPTS]
    started = time.perf_counter()
    samples = sampler.sample(prompts, progress=False)
    seconds = time.perf_counter() - started
    stats = sampler.stats
    return summary(
        seconds,
        stats.model_steps,
        stats.decoded_tokens,
        [len(sample.tokens) for sample in samples],
        [sample.log_likelihood for sample in samples],
        stats.acceptance_rate,
    )


def lockstep(dtype: str) -> dict:
    """The loop over `LLM.generate`, its transitions by `metropolis_hastings`."""
    from vllm import SamplingParams

    from powerkernels.integrations import vllm as integration
    from powerkernels.power_sampling import metropolis_hastings as mh

    llm, settings = load(dtype), config()
    steps = count_steps(llm)
    processor = llm.collective_rpc(integration._processor_of)[0]
    tokenizer = llm.get_tokenizer()
    eos = tokenizer.eos_token_id
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        )["input_ids"]
        for text in common.PROMPTS
    ]
    law = integration.Law(settings.seed, settings.proposal_power, None, None, None)
    decoded = accepted = transitions = 0

    def generate(chains: list[int], prefixes: list[tuple[int, ...]], limit: int, number: int):
        """Continuations of the prefixes, all of them when the last is there."""
        nonlocal decoded
        keys = [next(integration._request_keys) for _ in chains]
        draws = [
            integration.Draw(key, len(prefix), number, chain, -1, law)._asdict()
            for key, prefix, chain in zip(keys, prefixes, chains, strict=True)
        ]
        params = [
            SamplingParams(
                temperature=0.0,
                max_tokens=limit - len(prefix),
                stop_token_ids=[eos],
                ignore_eos=True,
                detokenize=False,
                extra_args={integration.EXTRA_ARG: draw | {"law": tuple(law)}},
            )
            for draw, prefix in zip(draws, prefixes, strict=True)
        ]
        inputs = [
            {"prompt_token_ids": [*prompts[chain], *prefix]}
            for chain, prefix in zip(chains, prefixes, strict=True)
        ]
        outputs = llm.generate(inputs, params, use_tqdm=False)
        records = processor.take()
        drawn = []
        for key, prefix, output in zip(keys, prefixes, outputs, strict=True):
            tokens = output.outputs[0].token_ids
            decoded += len(tokens)
            of_request = [records[key, len(prefix) + t] for t in range(len(tokens))]
            drawn.append([mh.ScoredToken(r.token, r.log_prob, r.log_z) for r in of_request])
        return drawn

    started = time.perf_counter()
    states = [mh.MHState((), (), (), (0.0,), 0)] * len(prompts)
    for limit in settings.block_limits:
        going = [i for i, state in enumerate(states) if eos not in state.tokens]
        extended = generate(going, [states[i].tokens for i in going], limit, 0) if going else []
        for i, tokens in zip(going, extended, strict=True):
            states[i] = mh.extend(states[i], tokens, alpha=settings.alpha)
        for _ in range(settings.num_mcmc_steps):
            proposals = [
                mh.begin(state, seed=settings.seed, chain=i, shared_prefix_skip=False)
                for i, state in enumerate(states)
            ]
            kept = [proposal.written.tokens for proposal in proposals]
            number = states[0].transition + 1
            drawn = generate(list(range(len(prompts))), kept, limit, number)
            for i, (proposal, tokens) in enumerate(zip(proposals, drawn, strict=True)):
                for token in tokens:
                    proposal = mh.grow(proposal, token, alpha=settings.alpha)
                states[i], info = mh.decide(proposal)
                accepted, transitions = accepted + info.accepted, transitions + 1
    seconds = time.perf_counter() - started
    return summary(
        seconds,
        steps["count"],
        decoded,
        [len(state.tokens) for state in states],
        [sum(state.log_prob) for state in states],
        accepted / transitions,
    )


def count_steps(llm: Any) -> dict[str, int]:
    steps = {"count": 0}
    step = llm.llm_engine.step

    def counted() -> Any:
        steps["count"] += 1
        return step()

    llm.llm_engine.step = counted
    return steps


def load(dtype: str) -> Any:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CACHE_GIB)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

    from powerkernels.integrations.smollm2 import smollm2_path
    from powerkernels.integrations.vllm import load_llm

    path = smollm2_path()
    llm = load_llm(path, dtype=dtype, max_model_len=MAX_MODEL_LEN)
    # What is set up at first use belongs to no run.
    llm.generate({"prompt_token_ids": [1, 2, 3]}, use_tqdm=False)
    return llm


def config() -> Any:
    from powerkernels import PowerSamplingConfig

    return PowerSamplingConfig(
        alpha=common.ALPHA,
        max_new_tokens=common.MAX_NEW_TOKENS,
        block_size=common.MAX_NEW_TOKENS // common.NUM_BLOCKS,
        num_mcmc_steps=common.NUM_MCMC_STEPS,
    )


def summary(
    seconds: float,
    steps: int,
    decoded: int,
    lengths: list[int],
    log_likelihoods: list[float],
    acceptance_rate: float,
) -> dict:
    return {
        "seconds": seconds,
        "model_steps": steps,
        "decoded_tokens": decoded,
        "kept_tokens": sum(lengths),
        "mean_busy_rows": decoded / steps,
        "tokens_per_second": decoded / seconds,
        "acceptance_rate": acceptance_rate,
        "mean_log_likelihood": sum(log_likelihoods) / len(log_likelihoods),
    }


RUNS = {"lockstep": lockstep, "vllm": backend, "lanes": lanes}


if __name__ == "__main__":
    main()
