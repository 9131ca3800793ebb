"""The mutation check: deliberate faults, one at a time, each of which the fast tier is to catch.

    python -m python_tests.mutations [--list] [--jobs N] [--no-control] [--json FILE] [fault ...]

Exits with 1 if a fault survives or cannot be tried, and with 2 if a fault is not there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from python_tests.mutations.faults import FAULTS, Fault
from python_tests.mutations.run import SURVIVED, TIMEOUT, Result, run_faults

ROOT = Path(__file__).resolve().parents[2]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m python_tests.mutations")
    parser.add_argument("names", nargs="*", metavar="fault", help="names or families; none: all")
    parser.add_argument("--list", action="store_true", help="say what there is, and try nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the results")
    parser.add_argument("--no-control", action="store_true", help="without the runs before a fault")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="side by side")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds; %(default)s")
    return parser.parse_args(arguments)


def chosen(faults: Sequence[Fault], names: Sequence[str]) -> list[Fault]:
    """Those of the names or families. Raises ValueError for what is neither."""
    known = {fault.name for fault in faults} | {fault.family for fault in faults}
    if unknown := sorted(set(names) - known):
        raise ValueError(f"no fault and no family is called {', '.join(unknown)}")
    return [f for f in faults if not names or f.name in names or f.family in names]


def table(results: Sequence[Result]) -> str:
    """A line for each fault, and how many were caught."""
    rows = [(r.fault.name, r.verdict, f"{r.seconds:.0f}", _what(r)) for r in results]
    rows.insert(0, ("fault", "verdict", "s", "the test that failed first, and why"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        f"{name:{widths[0]}}  {verdict:{widths[1]}}  {seconds:>{widths[2]}}  {what}".rstrip()
        for name, verdict, seconds, what in rows
    ]
    counts = Counter(result.verdict for result in results)
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    return "\n".join([*lines, f"{len(results)} faults: {said}"])


def _what(result: Result) -> str:
    return f"{result.test}: {result.why}" if result.test else result.why


def main(
    arguments: Sequence[str] | None = None,
    *,
    faults: Sequence[Fault] = FAULTS,
    root: Path = ROOT,
    package: str = "powerkernels",
) -> int:
    options = parse_arguments(arguments)
    try:
        faults = chosen(faults, options.names)
        for fault in faults:
            fault.applied_to((root / fault.file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    if options.list:
        sys.stdout.write("".join(f"{f.name} ({f.family}, {f.file}): {f.what}\n" for f in faults))
        return 0

    def say(result: Result) -> None:
        sys.stderr.write(f"{result.fault.name}: {result.verdict}, {result.seconds:.0f} s\n")

    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        results = run_faults(
            faults,
            root,
            Path(folder),
            package=package,
            jobs=max(1, min(options.jobs, len(faults))),
            control=not options.no_control,
            timeout=options.timeout,
            on_result=say,
        )
    if options.json is not None:
        rows = [_row(result) for result in results]
        options.json.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    sys.stdout.write(f"{table(results)}, in {time.monotonic() - started:.0f} s\n")
    for result in results:
        if result.verdict == SURVIVED:
            sys.stdout.write(f"* {result.fault.name}, that nobody catches: {result.fault.what}\n")
    return 0 if all(result.is_good for result in results) else 1


def _row(result: Result) -> dict[str, object]:
    fault = result.fault
    return {
        "name": fault.name,
        "family": fault.family,
        "file": fault.file,
        "what": fault.what,
        "verdict": result.verdict,
        "test": result.test,
        "why": result.why,
        "seconds": round(result.seconds, 1),
    }


if __name__ == "__main__":
    sys.exit(main())
