"""Every op, at small sizes, against float64: draws first. `python -m bench.gpu.first_calls`.

The first thing to run on a new kind of GPU: seconds, and a line for each op, whatever the others
do. The ops of the suite have their inputs, float64 result and tolerance there (at its "quick"
sizes); what has no bench is here, and its float64 result is the op's own, of float64 inputs on the
CPU, which plain torch computes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import powerkernels as pk
from bench import suite
from bench.harness import accuracy, runner
from bench.harness.broken_context import context_is_broken
from bench.harness.cases import Kernel, Outputs, Variant
from bench.policy_loss.cases import BAND, RATIO, Batch
from bench.policy_loss.cases import cases as batch_cases
from bench.policy_loss.cases import make as make_batch

VOCAB, ROWS = 5003, 7  # odd: the last slice of a row is not whole
# What a first launch compiles, the second one looks up and checks.
CALLS = 2
# Whole jobs need a model and a minute: a target of their own.
WITHOUT = ("jobs",)
DRAWS = ("sample_tokens",)
# A reference that is as near as the old policy would compare 1 - x + exp(-x), which cancels.
KL_DISTANCE = 3.0


class Op(NamedTuple):
    """An op without a bench.

    inputs: device -> tensors; call: tensors -> outputs, of float64 tensors too.
    """

    name: str
    inputs: Callable[[torch.device], Any]
    call: Callable[[Any], Outputs]


class Logits(NamedTuple):
    logits: Tensor  # [ROWS, VOCAB]
    counters: Tensor  # int64 [ROWS, 4]
    banned: Tensor  # int64 [ROWS]

    def truth(self) -> Logits:
        return Logits(self.logits.cpu().double(), self.counters.cpu(), self.banned.cpu())


class Tokens(NamedTuple):
    batch: Batch

    def truth(self) -> Tokens:
        values = [value.detach().cpu().double() for value in self.batch[:3]]
        return Tokens(Batch(values[0].requires_grad_(), *values[1:], self.batch.mask.cpu()))


def logits_on(device: torch.device) -> Logits:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(ROWS, VOCAB, generator=generator)).bfloat16()
    index = torch.arange(ROWS)
    counters = torch.stack((index, 0 * index, 0 * index, index), dim=-1)
    banned = torch.where(index % 2 == 0, logits.argmax(-1), -1)
    return Logits(logits.to(device), counters.to(device), banned.to(device))


def tokens_on(device: torch.device) -> Tokens:
    return Tokens(make_batch(batch_cases("quick")[0], device))


def draw(x: Logits, **settings: Any) -> Outputs:
    drawn = pk.sample_tokens(x.logits, seed=3, counters=x.counters, entropy=True, **settings)
    return {name: value for name, value in drawn._asdict().items() if value is not None}


def covariance(x: Tokens) -> Outputs:
    log_prob, _, advantages, mask = x.batch
    return dict(pk.token_covariance(log_prob, advantages, mask)._asdict())


def band(x: Tokens) -> Outputs:
    log_prob, _, advantages, mask = x.batch
    bounds = {"lb": BAND[0], "ub": BAND[1]}
    return {
        "selected": pk.select_cov_band(log_prob, advantages, mask, ratio=RATIO, seed=5, **bounds)
    }


def accumulated(x: Tokens) -> Outputs:
    log_prob, _, advantages, mask = x.batch
    step = pk.SelectionAccumulator.top(ratio=RATIO)
    for row in range(log_prob.shape[0]):
        rows = slice(row, row + 1)
        step.add(log_prob[rows], advantages[rows], mask[rows])
    return {"selected": torch.cat(step.masks())}


def table(x: Tokens) -> Outputs:
    log_prob, _, advantages, mask = x.batch
    found = pk.covariance_table(log_prob, advantages, mask)._asdict()
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def likelihood(x: Tokens) -> Outputs:
    log_prob, mask = x.batch.log_prob, x.batch.mask
    return {"log_likelihood": pk.sequence_log_likelihood(log_prob, alpha=4.0, mask=mask)}


def with_gradient(loss: Callable[[Batch], Tensor]) -> Callable[[Tokens], Outputs]:
    def call(x: Tokens) -> Outputs:
        value = loss(x.batch)
        return {"loss": value, "dlog_prob": torch.autograd.grad(value, x.batch.log_prob)[0]}

    return call


OPS = (
    Op("sample_tokens, a token banned", logits_on, lambda x: draw(x, alpha=4.0, banned=x.banned)),
    Op(
        "sample_tokens, top_k, top_p and min_p",
        logits_on,
        lambda x: draw(x, alpha=2.0, top_k=50, top_p=0.9, min_p=1e-3),
    ),
    Op("sample_tokens, a general power", logits_on, lambda x: draw(x, alpha=1.3)),
    Op("sequence_log_likelihood", tokens_on, likelihood),
    Op("token_covariance", tokens_on, covariance),
    Op("select_cov_band", tokens_on, band),
    Op("SelectionAccumulator", tokens_on, accumulated),
    Op("covariance_table", tokens_on, table),
    Op(
        "entropy_bonus",
        tokens_on,
        with_gradient(lambda b: pk.entropy_bonus(-b.log_prob, b.mask, coef=0.1).loss),
    ),
    Op(
        "reference_kl_loss",
        tokens_on,
        with_gradient(
            lambda b: (
                pk.reference_kl_loss(
                    b.log_prob, KL_DISTANCE * b.old_log_prob, b.mask, coef=0.1
                ).loss
            )
        ),
    ),
)


class Entry(NamedTuple):
    """What is run: a variant of ours of a kernel of the suite, or an op; device -> errors."""

    name: str
    check: Callable[[torch.device], dict[str, float]]


def entries() -> list[Entry]:
    kernels = sorted(suite.KERNELS.values(), key=lambda kernel: kernel.name not in DRAWS)
    ops = sorted(OPS, key=lambda op: not op.name.startswith(DRAWS))
    draws = sum(op.name.startswith(DRAWS) for op in ops)
    of_suite = [
        Entry(
            f"{kernel.name}, {variant.name}",
            lambda device, k=kernel, v=variant: _bench(k, v, device),
        )
        for kernel in kernels
        if kernel.part not in WITHOUT
        for variant in kernel.variants
        if variant.ours
    ]
    of_ops = [Entry(op.name, lambda device, op=op: _op(op, device)) for op in ops]
    first = [entry for entry in of_suite if entry.name.startswith(DRAWS)]
    return [*first, *of_ops[:draws], *of_suite[len(first) :], *of_ops[draws:]]


def _bench(kernel: Kernel, variant: Variant, device: torch.device) -> dict[str, float]:
    """The largest errors over the quick cases."""
    errors: dict[str, float] = {}
    for case in kernel.cases("quick"):
        inputs = kernel.inputs(case, device)
        expectation = runner.Expectation(kernel, inputs)
        found = expectation.check(expectation.part_of(variant.bind(inputs)()))
        errors |= {name: max(error, errors.get(name, 0.0)) for name, error in found.items()}
    return errors


def _op(op: Op, device: torch.device) -> dict[str, float]:
    inputs = op.inputs(device)
    return accuracy.check(op.call(inputs), op.call(inputs.truth()), None)


def run_one(entry: Entry, device: torch.device) -> dict[str, Any]:
    """Its outcome: errors against float64, or what was raised, with the place."""
    begin = time.perf_counter()
    found: dict[str, Any] = {"name": entry.name}
    try:
        for _ in range(CALLS):
            found["errors"] = entry.check(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        found["raised"] = f"{type(error).__name__}: {lines[0]}"
        found["traceback"] = traceback.format_exc()
    found["seconds"] = round(time.perf_counter() - begin, 2)
    return found


def run(names: Sequence[str], device: torch.device, out: Path | None) -> list[dict[str, Any]]:
    known = {entry.name: entry for entry in entries()}
    outcomes: list[dict[str, Any]] = []
    for number, name in enumerate(names):
        outcome = run_one(known[name], device)
        outcomes.append(outcome)
        print(line(outcome), flush=True)
        if "traceback" in outcome:
            print(outcome["traceback"], file=sys.stderr, flush=True)
        if out is not None:
            out.write_text(json.dumps(outcomes, indent=1) + "\n")
        rest = names[number + 1 :]
        if rest and context_is_broken():
            print("the device's context is broken: the rest in a new process", flush=True)
            return outcomes + _in_new_process(rest, device, out)
    return outcomes


def _in_new_process(
    names: Sequence[str], device: torch.device, out: Path | None
) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "bench.gpu.first_calls", "--device", str(device)]
    beside = out.with_name(f"{out.stem}-rest{out.suffix}") if out is not None else None
    if beside is not None:
        command += ["--out", str(beside)]
    subprocess.run([*command, "--only", *names], check=False)
    if beside is None or out is None or not beside.exists():
        return []
    rest: list[dict[str, Any]] = json.loads(beside.read_text())
    beside.unlink()
    out.write_text(json.dumps(json.loads(out.read_text()) + rest, indent=1) + "\n")
    return rest


def line(outcome: dict[str, Any]) -> str:
    if "raised" in outcome:
        return f"FAILED  {outcome['name']}: {outcome['raised']}"
    worst = max(outcome["errors"].values(), default=0.0)
    return f"ok      {outcome['name']}: largest error {worst:.2g}, {outcome['seconds']:.1f} s"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="JSON, written after every op")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these entries, by their names")
    options = parser.parse_args(argv)
    names = [entry.name for entry in entries()]
    if options.only:
        unknown = [name for name in options.only if name not in names]
        if unknown:
            parser.error(f"--only: unknown {unknown[0]!r}; known: {', '.join(names)}")
        names = options.only
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcomes = run(names, torch.device(options.device), options.out)
    failed = sum("raised" in outcome for outcome in outcomes)
    print(f"{len(outcomes) - failed} of {len(names)} ops agree with float64")
    return 0 if failed == 0 and len(outcomes) == len(names) else 1


if __name__ == "__main__":
    sys.exit(main())
