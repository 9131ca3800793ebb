"""The four targets: their steps in order, and their tables."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu import depth, first_calls, goals, pytest_log, readiness, tick
from bench.gpu.record import free_name
from bench.gpu.session import Step
from bench.harness import results, table
from bench.harness.machine import digest

PYTHON = sys.executable
# Folders of python_tests with tests that need a GPU, those that need no compiled part first, and
# those of the loop on the device, which may hang it, last.
TRITON_PARTS = (
    "logprob",
    "covariance",
    "policy_loss",
    "decode_attention",
    "lane_moves",
    "linear_logprob",
    "bench",
)
LOOP_PARTS = ("power_sampling",)
# Of no folder.
CAPTURE_TESTS = ("test_cuda_graph.py",)
PARTS = ("captures", *TRITON_PARTS, *LOOP_PARTS)
BENCH_PARTS = ("logprob", "linear_logprob", "policy_loss", "power_sampling", "decode_attention")
JOBS = "jobs"
# Files that outlive their step; there are few, since some machines give few back.
TESTS, FIGURES, JOB_FIGURES = "gpu-tests.jsonl", "gpu-bench.json", "gpu-jobs.json"
TEST_PROCESSES = 12
TEST_SECONDS = 120  # of one test, the compilation of its kernels included
# What compute-sanitizer slows down a hundredfold: small calls, not the tests.
SANITIZED = ("move_positions, powerkernels", "decode_attention, powerkernels", "mh_transition, ")
SANITIZERS = ("memcheck", "racecheck")
NO_TOOL = "part of the CUDA toolkit"


@dataclass(frozen=True)
class Setting:
    """What a target is run with.

    Args:
        out: folder of its files.
        build: of the compiled part, under way.
        rehearsal: without a GPU, as far as it goes.
        environment: of the machine, as its figures carry it.
        parts: folders of tests or benches; () is all.
    """

    out: Path
    build: readiness.Build
    rehearsal: bool
    environment: Mapping[str, Any]
    parts: tuple[str, ...] = ()

    def file(self, name: str) -> Path:
        return self.out / name

    def ready(self, seconds: float) -> str | None:
        """Waits for the compiled part. Without it what can be done is: tests of the rest skip."""
        self.build.wait(seconds)
        return None

    def chosen(self, parts: Sequence[str]) -> list[str]:
        return [part for part in parts if not self.parts or part in self.parts]


def correctness(setting: Setting) -> list[Step]:
    """Every op against float64, then the GPU tests part by part."""
    out = setting.file("gpu-first-calls.json")
    device = "cpu" if setting.rehearsal else "cuda"
    first = Step(
        "first calls",
        [PYTHON, "-m", "bench.gpu.first_calls", "--device", device, "--out", str(out)],
        seconds=200,
        read=functools.partial(_first_calls, out),
    )
    log = setting.file(TESTS)
    steps = [_tests(setting, part, [f"python_tests/{part}"], log) for part in TRITON_PARTS]
    steps += [
        _tests(setting, part, [f"python_tests/{part}"], log, ready=setting.ready)
        for part in LOOP_PARTS
    ]
    captures = [f"python_tests/{name}" for name in CAPTURE_TESTS]
    steps.insert(0, _tests(setting, "captures", captures, log))
    named = {f"tests of {part}" for part in setting.chosen(PARTS)}
    return [*([] if setting.parts else [first]), *(step for step in steps if step.name in named)]


def loop(setting: Setting) -> list[Step]:
    """The loop on the device: its tests, and a tick of a model of 1.5B parameters taken apart."""
    log = setting.file(TESTS)
    folder = "python_tests/power_sampling"
    steps = [
        _tests(setting, name, [f"{folder}/test_{name}.py"], log, ready=setting.ready, processes=4)
        for name in ("transition", "graph_loop", "device_loop")
    ]
    for name, compile in (("tick", False), ("tick, compiled", True)):
        out = setting.file(f"gpu-{name.replace(', ', '-')}.json")
        steps.append(
            Step(
                name,
                [
                    *(PYTHON, "-m", "bench.gpu.tick", "--out", str(out)),
                    *(["--compile"] if compile else []),
                    *(["--rehearsal"] if setting.rehearsal else []),
                ],
                seconds=150,
                why_not=functools.partial(_no_compiler, setting, compile),
                ready=setting.ready,
                read=functools.partial(_json, out, "tick"),
            )
        )
    return steps


def figures(setting: Setting) -> list[Step]:
    """The benches of the kernels, into one file."""
    out = setting.file(FIGURES)
    return [_bench(setting, part, out, 300) for part in setting.chosen(BENCH_PARTS)]


def deep(setting: Setting) -> list[Step]:
    """ncu on what misses its target, compute-sanitizer on what moves memory, whole jobs."""
    found = setting.file("gpu-depth-ncu.json")
    ncu = [PYTHON, "-m", "bench.gpu.depth", "--out", str(found)]
    ncu += ["--figures", str(setting.file(FIGURES))]
    if setting.rehearsal:
        ncu += ["--size", "quick", "--list"]
    missing = functools.partial(readiness.why_no_program, advice=NO_TOOL)
    steps = [
        Step(
            "ncu",
            ncu,
            seconds=200,
            why_not=lambda: None if setting.rehearsal else missing("ncu"),
            read=functools.partial(_ncu, found),
        )
    ]
    small = [entry.name for entry in first_calls.entries() if entry.name.startswith(SANITIZED)]
    for tool in SANITIZERS:
        command = [
            *("compute-sanitizer", "--tool", tool, "--error-exitcode", "3"),
            *(PYTHON, "-m", "bench.gpu.first_calls", "--only", *small),
        ]
        steps.append(
            Step(
                tool,
                command,
                seconds=110,
                # So that a block of torch's cache is not one allocation of many tensors.
                environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                why_not=functools.partial(missing, "compute-sanitizer"),
            )
        )
    return [*steps, _bench(setting, JOBS, setting.file(JOB_FIGURES), 200)]


TARGETS: dict[str, Callable[[Setting], list[Step]]] = {
    "correctness": correctness,
    "loop": loop,
    "figures": figures,
    "depth": deep,
}


# ---- steps


def _tests(
    setting: Setting,
    part: str,
    paths: Sequence[str],
    log: Path,
    *,
    processes: int = TEST_PROCESSES,
    ready: Callable[[float], str | None] = lambda seconds: None,
) -> Step:
    folder = paths[0].split("/")[1]
    shared = (f"python_tests/{name}.py" for name in ("conftest", "tiers", "triton_device"))
    sources = ("powerkernels", "csrc", f"python_tests/{folder}", *shared)
    if folder == "bench":
        sources += ("bench",)
    names = ("device", "torch", "triton")
    key = " ".join([digest(sources), *(str(setting.environment.get(name)) for name in names)])
    command = [
        *(PYTHON, "-m", "pytest", *paths, "-m", "gpu", "-q", "-rs", "--no-header"),
        *("-p", "bench.gpu.pytest_log", "--test-log", str(log), "--test-log-key", key),
    ]
    if importlib.util.find_spec("xdist") is not None:
        number = min(processes, os.cpu_count() or 1)
        command += ["-n", str(number), "--dist", "load"]
    if importlib.util.find_spec("hypothesis") is not None:
        command += ["--hypothesis-profile", "thorough"]
    if importlib.util.find_spec("pytest_timeout") is not None:
        # By a thread, which ends the process: a test that waits for a device hears no signal.
        command += ["--timeout", str(TEST_SECONDS), "--timeout-method", "thread"]
    return Step(
        f"tests of {part}",
        command,
        seconds=240,
        ready=ready,
        read=functools.partial(_test_counts, log, key, tuple(paths)),
        sources=sources,
    )


def _bench(setting: Setting, part: str, out: Path, seconds: float) -> Step:
    program = "bench.gpu.stub_clock" if setting.rehearsal else "powerkernels.cli"
    command = [PYTHON, "-m", program, *([] if setting.rehearsal else ["bench"])]
    command += ["--part", part, "--out", str(out), "--resume"]
    if setting.rehearsal:
        command.append("--quick")

    def ready(seconds: float) -> str | None:
        put_aside_of_another(out, setting.environment)
        return setting.ready(seconds)  # nothing is timed beside a compiler

    return Step(
        f"bench of {part}",
        command,
        seconds=seconds,
        ready=ready,
        read=functools.partial(_bench_counts, out, part),
        goes_on=True,
    )


def put_aside_of_another(path: Path, environment: Mapping[str, Any]) -> None:
    """Figures of another version or device share no file with those to come."""
    if not path.exists():
        return
    try:
        before = results.load(path, stub_clock=True)[results.KEY]["environment"]
    except ValueError:  # cut off
        before = {}
    if any(before.get(name) != environment.get(name) for name in results.SAME):
        path.rename(free_name(path))


def _no_compiler(setting: Setting, compile: bool) -> str | None:
    if not compile:
        return None
    if setting.rehearsal:
        return "a rehearsal has no kernels that torch.compile could make"
    return None if shutil.which("cc") or shutil.which("gcc") else "torch.compile needs a C compiler"


# ---- what a step's files say


def _json(path: Path, name: str) -> dict[str, Any]:
    """Into the record, and the file is gone."""
    if not path.exists():
        return {}
    found = {name: json.loads(path.read_text())}
    path.unlink()
    return found


def _ncu(path: Path) -> dict[str, Any]:
    """The file stays where a kernel is missing, for a later run to go on with."""
    if not path.exists():
        return {}
    found = depth.kept(path)
    if all("launches" in one for one in found):
        path.unlink()
    return {"ncu": found}


def _first_calls(path: Path) -> dict[str, Any]:
    ops = _json(path, "ops").get("ops")
    if ops is None:
        return {}
    failed = [op["name"] for op in ops if "raised" in op]
    detail = f"{len(ops) - len(failed)} of {len(first_calls.entries())} ops agree with float64"
    return {"detail": detail + (f"; not {failed[0]}" if failed else ""), "ops": ops}


def _test_counts(log: Path, key: str, paths: tuple[str, ...]) -> dict[str, Any]:
    found = {
        test: entry
        for test, entry in pytest_log.outcomes(log, key).items()
        if test.startswith(paths)
    }
    counts = Counter(entry["outcome"] for entry in found.values())
    reasons = Counter(
        entry.get("reason", "") for entry in found.values() if entry["outcome"] == "skipped"
    )
    return {
        "tests": dict(counts),
        "failed_tests": {
            test: entry.get("reason", "")
            for test, entry in found.items()
            if entry["outcome"] == "failed"
        },
        "skip_reasons": dict(reasons),
        "detail": ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items())),
    }


def _bench_counts(path: Path, part: str) -> dict[str, Any]:
    if not path.exists():
        return {}
    data = results.load(path, stub_clock=True)
    rows = [row for row in results.rows_of(data) if row.info["part"] == part]
    cases = {(row.kernel, row.case) for row in rows}
    kernels = {row.kernel for row in rows}
    failed = [entry for entry in data[results.KEY]["failed"] if entry["kernel"] in kernels]
    return {
        "detail": f"{len(cases)} cases, {len(failed)} wrong variants",
        "failed_variants": failed,
    }


# ---- tables


def summary(target: str, setting: Setting, steps: dict[str, dict[str, Any]]) -> list[str]:
    """The short table that a target ends in."""
    width = max((len(name) for name in steps), default=0)
    printed = []
    for name, step in steps.items():
        seconds = f"{step['seconds']:.0f} s" if "seconds" in step else "-"
        printed.append(
            f"{name:<{width}}  {step['status']:<11}  {seconds:>6}  {step.get('detail') or ''}"
        )
    if target == "loop":
        for step in steps.values():
            if "tick" in step:
                printed += ["", *tick.lines(step["tick"])]
    if target == "figures":
        printed += ["", *_figure_lines(setting.file(FIGURES))]
    if target == "depth":
        for step in steps.values():
            for found in step.get("ncu", ()):
                printed += depth.lines(found)
        printed += ["", *_figure_lines(setting.file(JOB_FIGURES))]
    return printed


def _figure_lines(path: Path) -> list[str]:
    """The main row of each case: median, share of its ceiling, its goal and others' figures."""
    try:
        data = results.load(path, stub_clock=True)
    except ValueError as error:  # none, or cut off
        return [] if not path.exists() else [str(error)]
    device = data[results.KEY]["environment"]["device"]
    printed = [f"{device}; sustained, or cold where a call is long:"]
    if device == results.STUB_DEVICE:
        printed = [f"{device}: not one of these was measured:"]
    chosen: dict[tuple[str, str, str], Any] = {}
    for row in results.rows_of(data):
        if row.info["ours"]:
            chosen[row.kernel, row.case, row.variant] = row  # sustained comes after cold
    for (kernel, case, variant), row in chosen.items():
        ratio = row.info["ratio_to_ceiling"]
        share = "-" if ratio is None else f"{ratio:.0%}"
        goal = f" (goal {goals.GOALS[kernel]:.0%})" if ratio and kernel in goals.GOALS else ""
        claims = [
            f"; {claim.who}: {claim.milliseconds} ms on an {claim.device}"
            for claim in goals.CLAIMS
            if (claim.kernel, claim.variant) == (kernel, variant)
            and case.startswith(claim.case)
            and claim.device in device
        ]
        printed.append(
            f"  {kernel}: {case}: {variant}: {table.milliseconds(row.info['median_ms'])}, "
            f"{share} of the ceiling{goal}{''.join(claims)}"
        )
    return printed
