"""What each test takes, by tier and by file.

    python -m pytest python_tests -p python_tests.durations --times FOLDER ...
    python -m python_tests.durations FOLDER [FOLDER ...]      a table; of two, side by side

Seconds of CPU are those of the test's process and of the processes that it has waited for, so that
they change little with what else the machine does; fixtures count for the test that is first.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

from python_tests import tiers

KINDS = ("interpreted", "aot", "integration")
OUTCOMES = pytest.StashKey[list[str]]()

Row = dict[str, Any]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--times", metavar="FOLDER", help="where to write what each test took")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    item.stash[OUTCOMES] = []
    began, before = time.perf_counter(), sum(os.times()[:4])
    result = yield
    folder = item.config.getoption("--times")
    if folder:
        row = {
            "test": tiers.function_of(item),
            "parameters": item.stash[tiers.INDICES],
            "slow": tiers.is_marked(item, "slow"),
            "kind": next((kind for kind in KINDS if tiers.is_marked(item, kind)), "other"),
            "outcome": next((o for o in item.stash[OUTCOMES] if o != "passed"), "passed"),
            "seconds": round(time.perf_counter() - began, 4),
            "cpu_seconds": round(sum(os.times()[:4]) - before, 4),
        }
        worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
        Path(folder).mkdir(parents=True, exist_ok=True)
        with (Path(folder) / f"{worker}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    item.stash[OUTCOMES].append(report.outcome)
    return report


def read(folder: Path) -> list[Row]:
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise SystemExit(f"{folder} has no times: run pytest with --times {folder}")
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def tier_of(row: Row) -> str:
    return f"{'slow' if row['slow'] else 'fast'}, {row['kind']}"


def file_of(row: Row) -> str:
    return row["test"].partition("::")[0].removeprefix("python_tests/")


def table(runs: Sequence[Sequence[Row]], what: str, group: Callable[[Row], str]) -> str:
    """Tests and seconds of CPU of each run; the most costly of the first run at the top."""
    sums: dict[str, list[list[float]]] = defaultdict(lambda: [[0, 0.0] for _ in runs])
    for k, rows in enumerate(runs):
        for row in rows:
            for name in (group(row), "all"):
                sums[name][k][0] += 1
                sums[name][k][1] += row["cpu_seconds"]
    width = max(map(len, sums))
    lines = [what.ljust(width) + "  tests  CPU s" * len(runs)]
    for name, columns in sorted(
        sums.items(), key=lambda entry: (entry[0] != "all", -entry[1][0][1])
    ):
        cells = "".join(f"{int(count):7d}{seconds:7.1f}" for count, seconds in columns)
        lines.append(name.ljust(width) + cells)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m python_tests.durations")
    parser.add_argument("folders", nargs="+", type=Path)
    runs = [read(folder) for folder in parser.parse_args(arguments).folders]
    for what, group in (("tier", tier_of), ("file", file_of)):
        sys.stdout.write(table(runs, what, group) + "\n\n")


if __name__ == "__main__":
    main()
