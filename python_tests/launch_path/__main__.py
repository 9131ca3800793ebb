"""Makes the calls of `calls.py` on a stand-in for a GPU, and says in JSON what came of them.

    python -m python_tests.launch_path [--arch 90] [--brief | --full] [--json FILE] [call ...]

Exits with 1 if something would have failed on a GPU, and with 2 if nothing could be called.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import random
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from python_tests.ahead_of_time.__main__ import compiled_kernels

CALLS = "python_tests.launch_path.calls"
ARCHES = (80, 90, 100)
# Of the orders in which the calls are made again.
SEEDS = (1, 2)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m python_tests.launch_path")
    parser.add_argument("names", nargs="*", help="calls that begin so; without any, all")
    parser.add_argument("--arch", type=int, choices=ARCHES, default=90)
    parser.add_argument("--brief", action="store_true", help="what reaches every kernel")
    parser.add_argument("--full", action="store_true", help="the long list too")
    parser.add_argument("--fresh", action="store_true", help="compile all, whatever was before")
    parser.add_argument("--json", type=Path, help="where to write the report")
    parser.add_argument("--from", dest="module", default=CALLS, help="default: %(default)s")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> dict[str, Any] | str:
    """The report, or why there is none."""
    import torch
    import triton

    from python_tests.launch_path import inventory, stand_in_driver, stand_in_gpu

    stand_in_gpu.install(options.arch)
    launches = stand_in_driver.Launches()
    stand_in_driver.activate(
        options.arch,
        launches=launches,
        current_device=stand_in_gpu.current_device,
        device_of=lambda tensor: (
            stand_in_gpu.DEVICE.index if stand_in_gpu.is_on_device(tensor) else None
        ),
    )
    module = importlib.import_module(options.module)
    calls = [
        call
        for call in module.CALLS
        if (options.full or not call.full)
        and (not options.brief or call.name in module.BRIEF)
        and (not options.names or call.name.startswith(tuple(options.names)))
    ]
    if not calls:
        return f"no call begins with {options.names}"
    names = [call.name for call in module.CALLS]
    if options.brief and (unknown := set(module.BRIEF).difference(names)):
        return f"BRIEF has calls that are not there: {sorted(unknown)}"
    if len(set(names)) < len(names):
        return f"two calls have one name: {sorted({n for n in names if names.count(n) > 1})}"

    failures: list[dict[str, str]] = []
    failed: set[str] = set()
    seconds: dict[str, float] = {}
    started = time.monotonic()

    def make(call: Any, when: str) -> None:
        if call.name in failed:
            return
        gpu = stand_in_gpu.StandInGpu()
        before = sum(variant.launches for variant in launches.variants)
        began = time.monotonic()
        try:
            with gpu:
                call.function(gpu)
            if gpu.copies_from_host and not call.copies_from_host:
                raise stand_in_driver.LaunchError(
                    f"{gpu.copies_from_host} copies from the host, each of which waits for it"
                )
            made = sum(variant.launches for variant in launches.variants) - before
            if bool(made) != call.launches:
                raise stand_in_driver.LaunchError(f"launches made: {made}")
        except Exception as error:
            failed.add(call.name)
            failures.append({"call": call.name, "when": when, "error": _described(error)})
        seconds.setdefault(call.name, round(time.monotonic() - began, 2))

    for call in calls:
        make(call, "first")
        make(call, "second")
    for seed in SEEDS:
        shuffled = list(calls)
        random.Random(seed).shuffle(shuffled)
        for call in shuffled:
            make(call, f"in the order of seed {seed}")

    functions = inventory.jit_functions(module.jit_modules())
    counts = launches.counts
    return {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "arch": options.arch,
        "full": options.full,
        "calls": seconds,  # of each when it was first made: the compilation
        "failures": failures,
        "kernels": counts,
        "variants": [dataclasses.asdict(variant) for variant in launches.variants],
        # Of a part of the calls it says nothing.
        "not_launched": [] if options.names else inventory.unreached(functions, counts),
        "globals": inventory.unsteady_globals(functions),
        "atomics": inventory.atomics(functions),
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(sum(os.times()[:4]), 1),  # compilers that were started included
    }


def _described(error: Exception) -> str:
    """The error and the last line of this repository that led to it."""
    root = str(Path(__file__).parents[2])
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename.startswith(root) and "site-packages" not in f.filename]
    own = [f for f in own if "launch_path" not in f.filename] or own
    place = f" ({Path(own[-1].filename).relative_to(root)}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {str(error).strip()[:1000]}{place}"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        sys.stderr.write("TRITON_INTERPRET is set, and its kernels are not launched: unset it\n")
        return 2
    with compiled_kernels(fresh=options.fresh):
        report = run(options)
    if isinstance(report, str):
        sys.stderr.write(report + "\n")
        return 2
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    launched = sum(report["kernels"].values())
    sys.stdout.write(
        f"triton {report['triton']}, sm_{report['arch']}: {len(report['calls'])} calls, "
        f"{launched} launches of {len(report['variants'])} variants of {len(report['kernels'])} "
        f"kernels, {report['seconds']} s, {report['cpu_seconds']} s of CPU\n"
    )
    wrong = [f"{f['call']}, {f['when']}: {f['error']}" for f in report["failures"]]
    wrong += [f"{name} was not launched" for name in report["not_launched"]]
    wrong += report["globals"]
    for line in wrong:
        sys.stdout.write(f"* {line}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
