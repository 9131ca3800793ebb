"""Compiles kernels ahead of time and prints what their machine code is like.

    python -m python_tests.ahead_of_time [--arch 90] [--json FILE] [--from MODULE] [name ...]

Exits with 1 if an expectation is not met, and with 2 if nothing could be examined.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from python_tests.ahead_of_time.gate import ARCHES, Finding, Specimen, examine, table

SPECIMENS = "python_tests.ahead_of_time.specimens"
CACHE = Path(__file__).parents[2] / "build" / "triton"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m python_tests.ahead_of_time")
    parser.add_argument("names", nargs="*", help="specimens; without any, all")
    parser.add_argument("--arch", type=int, choices=ARCHES, action="append")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--from", dest="module", default=SPECIMENS, help="default: %(default)s")
    parser.add_argument("--fresh", action="store_true", help="compile all, whatever was before")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    return parser.parse_args(arguments)


@contextlib.contextmanager
def compiled_kernels(*, fresh: bool = False) -> Iterator[None]:
    """Where Triton keeps what it compiles, under a hash of all that decides it: the sources of the
    kernel and of what it calls, types, constants, options, target, Triton itself and its ptxas."""
    if not fresh:
        os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE))
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        yield


def as_json(finding: Finding) -> dict[str, Any]:
    result = dataclasses.asdict(finding)
    result["exps_per_element"] = finding.exps_per_element
    result["instructions_per_element"] = finding.instructions_per_element
    if finding.code is not None:
        result["resident_warps"] = finding.code.resident_warps
        result["spilled_bytes"] = finding.code.spilled_bytes
        result["tensor_cores"] = finding.code.tensor_cores
    return result


def examine_all(wanted: Sequence[tuple[Specimen, int]], jobs: int) -> list[Finding]:
    if not wanted:
        return []
    import triton  # noqa: F401 # once, for the children too

    for specimen, _ in wanted:
        # What cannot be imported is reported by `examine`.
        with contextlib.suppress(Exception):
            importlib.import_module(specimen.kernel.partition(":")[0])
    jobs = min(jobs, len(wanted))
    specimens, arches = zip(*wanted, strict=True)
    if jobs == 1:
        return list(map(examine, specimens, arches))
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        return list(pool.map(examine, specimens, arches))


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        sys.stderr.write("TRITON_INTERPRET is set, and its kernels cannot be compiled: unset it\n")
        return 2
    specimens: Sequence[Specimen] = importlib.import_module(options.module).SPECIMENS
    known = [specimen.name for specimen in specimens]
    if len(set(known)) < len(known):
        sys.stderr.write(f"two specimens have one name: {known}\n")
        return 2
    if unknown := set(options.names) - set(known):
        sys.stderr.write(f"no such specimen: {sorted(unknown)}; there are {known}\n")
        return 2
    wanted = [
        (specimen, arch)
        for specimen in specimens
        if not options.names or specimen.name in options.names
        for arch in options.arch or ARCHES
        if arch in specimen.arches
    ]
    with compiled_kernels(fresh=options.fresh):
        findings = examine_all(wanted, options.jobs)
    if options.json:
        options.json.write_text(json.dumps([as_json(finding) for finding in findings], indent=1))
    sys.stdout.write(table(findings))
    for finding in findings:
        for failure in finding.failures:
            sys.stdout.write(f"* {finding.name} on sm_{finding.arch}: {failure}\n")
    return 1 if any(finding.failures for finding in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
