"""`python -m bench.gpu correctness|loop|figures|depth|rehearsal --out FOLDER`."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch

from bench.gpu import readiness, targets
from bench.gpu.record import Record, free_name, problems
from bench.gpu.session import Session, Stopped
from bench.gpu.targets import TARGETS, Setting
from bench.harness import machine, results

REHEARSAL = "rehearsal"
# Well inside ten minutes, with what a machine's start and the copying of files take.
BUDGET_SECONDS = 540.0
REHEARSAL_SECONDS = 900.0
PARTS_OF = {"correctness": targets.PARTS, "figures": targets.BENCH_PARTS}
EXIT_FAILED, EXIT_CANNOT, EXIT_STOPPED = 1, 2, 130
STOPPING = (signal.SIGTERM, signal.SIGHUP)


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(argv)
    for part in options.part:
        if part not in PARTS_OF.get(options.target, ()):
            known = ", ".join(PARTS_OF.get(options.target, ())) or "none"
            parser.error(f"--part: {options.target} has no part {part!r}; it has: {known}")
    reason = None if options.target == REHEARSAL else readiness.why_no_device()
    if reason is not None:
        print(f"bench.gpu: {reason}", file=sys.stderr)
        return EXIT_CANNOT
    folder = options.out
    if folder is None and options.target == REHEARSAL:
        folder = Path(tempfile.mkdtemp(prefix="gpu-rehearsal-"))
    folder = folder or machine.ROOT / "build" / "gpu"
    reason = readiness.why_no_folder(folder)
    if reason is not None:
        print(f"bench.gpu: {reason}", file=sys.stderr)
        return EXIT_CANNOT
    before = {number: signal.signal(number, _on_signal) for number in STOPPING}
    if options.fresh:
        for name in (targets.TESTS, targets.FIGURES, targets.JOB_FIGURES):
            if (folder / name).exists():
                (folder / name).rename(free_name(folder / name))
    build = readiness.Build(folder / "gpu-build.log")
    try:
        if options.target == REHEARSAL:
            return _rehearse(folder, build, options)
        environment = machine.environment(torch.device("cuda"))
        setting = Setting(folder, build, False, environment, tuple(options.part))
        return _run(options.target, setting, options)
    except (Stopped, KeyboardInterrupt) as error:
        print(
            f"bench.gpu: stopped by {str(error) or 'Ctrl-C'}; what was done is in {folder}",
            file=sys.stderr,
        )
        return EXIT_STOPPED
    finally:
        build.end()
        for number, handler in before.items():
            signal.signal(number, handler)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description="What to do with half an hour on a GPU."
    )
    parser.add_argument("target", choices=[*TARGETS, REHEARSAL])
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="JSON and log; a run goes on with what is there (default: build/gpu)",
    )
    parser.add_argument(
        "--budget", type=_seconds, default=None, metavar="S", help="seconds (default: 540)"
    )
    parser.add_argument(
        "--part",
        action="append",
        default=[],
        choices=sorted({*targets.PARTS, *targets.BENCH_PARTS}),
        help="of the tests or benches; repeats",
    )
    parser.add_argument("--fresh", action="store_true", help="what passed is run again too")
    return parser


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be > 0 seconds, got {text}")
    return value


def _run(target: str, setting: Setting, options: argparse.Namespace) -> int:
    environment = {**setting.environment, "rehearsal": setting.rehearsal}
    record = Record(target, environment, setting.file(f"gpu-{target}.json"))
    if record.put_aside is not None:
        print(f"gpu-{target}.json was damaged or of another device: it is now {record.put_aside}")
    print(f"gpu-{target} on {environment['device']}, sources {environment['sources']}", flush=True)
    default = REHEARSAL_SECONDS if setting.rehearsal else BUDGET_SECONDS
    session = Session(
        record,
        setting.file("gpu.log"),
        options.budget or default,
        lambda text: print(text, flush=True),
        device_fault=(lambda: None) if setting.rehearsal else readiness.device_fault,
        fresh=options.fresh,
    )
    try:
        good = session.run(TARGETS[target](setting))
    finally:
        print()
        print("\n".join(targets.summary(target, setting, record.steps)))
        reason = None if setting.rehearsal else setting.build.wait(0.0)
        if reason is not None:
            print(f"without the compiled part: {reason}")
        print(f"in {record.path}", flush=True)
    return 0 if good else EXIT_FAILED


def _rehearse(folder: Path, build: readiness.Build, options: argparse.Namespace) -> int:
    print("a rehearsal: no GPU is used, nothing is measured")
    failed = []
    # Of the stub clock, which the benches take.
    environment = {**machine.environment(torch.device("cpu")), "device": results.STUB_DEVICE}
    for target in TARGETS:
        setting = Setting(folder, build, True, environment)
        status = _run(target, setting, options)
        if status or list(problems(results.read_json(setting.file(f"gpu-{target}.json")))):
            failed.append(f"gpu-{target}")
        print()
    reason = build.wait(REHEARSAL_SECONDS)
    print(f"the compiled part with CUDA: {reason or 'built'}")
    if reason is not None and readiness.why_no_program("nvcc", "") is None:
        failed.append("the build")
    if failed:
        print(f"would not go through: {', '.join(failed)}")
        return EXIT_FAILED
    return 0


def _on_signal(number: int, frame: FrameType | None) -> NoReturn:
    raise Stopped(signal.Signals(number).name)
