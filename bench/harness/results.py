"""The JSON of a run: pytest-benchmark's schema, and what a row means in each `extra_info`.

So pytest-benchmark's own compare and histogram commands read it too. Of ours are the key `suite`
(schema version, environment, command line, ceilings, what was skipped and what failed) and, in
`stats`, what stands for the samples: p20, p80, QUANTILES quantiles, and by how much the halves of
the run differ. A row is a line. The file is written anew after every case.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest_benchmark
from pytest_benchmark.stats import Stats
from pytest_benchmark.utils import get_commit_info

from bench.harness import timing
from bench.harness.cases import Case

SCHEMA = 2  # 1 had every sample
KEY = "suite"
# Of a row's samples, of which there are 8 to 40. `compare` takes them for so many samples: in a
# table of 300 rows it then finds medians that are 1.5 standard deviations apart, and with all 40
# samples it would find 0.9.
QUANTILES = 20
DIGITS = 6  # of a quantile: a clock has no more
FEWEST_IN_A_HALF = 5
# A file goes on with --resume only where these are as they were.
SAME = ("commit", "changed", "sources", "device", "threads", "torch")
# The device of a rehearsal's file, whose times are none.
STUB_DEVICE = "none (stub clock)"


class Row(NamedTuple):
    """A variant of a case in one mode, cold or sustained."""

    kernel: str
    case: str
    variant: str
    mode: str
    info: dict[str, Any]
    stats: dict[str, Any]

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.kernel, self.case, self.variant, self.mode

    @property
    def quantiles(self) -> list[float]:
        """What stands for the samples: all of them, in order, where there are few."""
        found: list[float] = self.stats["quantiles"]
        return found

    @property
    def median(self) -> float:
        return self.stats["median"]


class Document:
    """A run's results, in a file if there is a path."""

    def __init__(self, environment: dict[str, Any], command: str, path: Path | None) -> None:
        self.path = path
        self.data: dict[str, Any] = {
            "machine_info": {"powerkernels": environment},
            "commit_info": get_commit_info(),
            "benchmarks": [],
            "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(),
            "version": pytest_benchmark.__version__,
            KEY: {
                "schema": SCHEMA,
                "command": command,
                "environment": environment,
                "ceilings": {},
                "done": [],
                "skipped": [],
                "failed": [],
                "finished": False,
            },
        }

    @classmethod
    def resumed(cls, environment: dict[str, Any], command: str, path: Path) -> Document:
        """What the file holds; a new one where there is no file.

        Raises:
            ValueError: the file is no result of this suite and schema, or of another machine,
                commit or number of threads.
        """
        fresh = cls(environment, command, path)
        if not path.exists():
            return fresh
        found = load(path, stub_clock=environment.get("device") == STUB_DEVICE)
        before = found[KEY]["environment"]
        other = [name for name in SAME if before.get(name) != environment.get(name)]
        if other:
            differences = ", ".join(
                f"{name} {before.get(name)!r} there, {environment.get(name)!r} here"
                for name in other
            )
            raise ValueError(f"--resume: {path} is of another run ({differences}); name a new file")
        fresh.data = found
        return fresh

    @property
    def suite(self) -> dict[str, Any]:
        return self.data[KEY]

    def is_done(self, key: str) -> bool:
        return key in self.suite["done"]

    def skip(self, **entry: str) -> None:
        self.suite["skipped"].append(entry)

    def fail(self, **entry: str) -> None:
        self.suite["failed"].append(entry)

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        self.data["benchmarks"].extend(rows)

    def write(self) -> None:
        """Whole or not at all: beside the file first, then in its place."""
        if self.path is None:
            return
        beside = self.path.with_name(f".{self.path.name}.part")
        beside.write_text(as_text(self.data))
        os.replace(beside, self.path)


def as_text(data: dict[str, Any]) -> str:
    """As JSON, with a line for each row."""
    parts = []
    for key, value in data.items():
        if key == "benchmarks" and value:
            rows = ",\n".join(json.dumps(entry, allow_nan=False) for entry in value)
            text = f"[\n{rows}\n]"
        else:
            text = json.dumps(value, indent=1, allow_nan=False)
        parts.append(f"{json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """`stats` of a row, from seconds in the order in which they were taken."""
    stats = Stats()
    for sample in samples:
        stats.update(sample)
    return {
        **stats.as_dict(),
        "p20": timing.quantile(samples, 0.2),
        "p80": timing.quantile(samples, 0.8),
        "halves_differ": halves_differ(samples),
        "quantiles": quantiles(samples),
    }


def quantiles(samples: Sequence[float]) -> list[float]:
    """All samples in order, or the middles of QUANTILES shares that hold as many of them each."""
    found = sorted(samples)
    if len(samples) > QUANTILES:
        middles = (np.arange(QUANTILES) + 0.5) / QUANTILES
        found = np.quantile(samples, middles, method="hazen").tolist()
    return [float(f"{each:.{DIGITS}g}") for each in found]


def halves_differ(samples: Sequence[float]) -> float:
    """By how much the medians of a run's first and second half differ, as an effect."""
    if len(samples) < 2 * FEWEST_IN_A_HALF:
        return 0.0
    middle = (len(samples) + 1) // 2
    first, second = statistics.median(samples[:middle]), statistics.median(samples[middle:])
    return math.exp(abs(math.log(first / second))) - 1


def row(
    kernel: str,
    part: str,
    case: Case,
    mode: str,
    samples: Sequence[float],
    info: dict[str, Any],
) -> dict[str, Any]:
    """One entry of `benchmarks`.

    info: `variant`, `ours`, `peer`, `is_ceiling`, and figures of its own.
    """
    name, stats = info["variant"], summary(samples)
    common = {
        "kernel": kernel,
        "part": part,
        "case": case.title,
        "mode": mode,
        "shape": case.shape,
        "dtype": case.dtype_name,
        "sweep": list(case.sweep),
        "floor_bytes": case.bytes,
        "floor_flops": case.flops,
        "median_ms": 1e3 * stats["median"],
        "p20_ms": 1e3 * stats["p20"],
        "p80_ms": 1e3 * stats["p80"],
    }
    return {
        "group": f"{kernel}: {case.title} ({mode})",
        "name": f"{kernel}[{case.title}-{name}-{mode}]",
        "fullname": f"bench/{part}/{kernel}[{case.title}-{name}-{mode}]",
        "params": {"case": case.title, "variant": name, "mode": mode},
        "param": f"{case.title}-{name}-{mode}",
        "extra_info": {**common, **info},
        "options": {"timer": "perf_counter", "min_rounds": 1, "warmup": True},
        "stats": {**stats, "iterations": info.get("calls", 1)},
    }


def load(path: Path, *, stub_clock: bool = False) -> dict[str, Any]:
    """A file of this suite; with `stub_clock` a rehearsal's too.

    Raises:
        ValueError: there is no such file, it is no JSON, or of another program or schema, or its
            times were not measured.
    """
    data = read_json(path)
    suite = data.get(KEY) if isinstance(data, dict) else None
    if not isinstance(suite, dict) or "schema" not in suite:
        raise ValueError(f"{path} is no result of `powerkernels bench`: it has no {KEY!r}")
    if suite["schema"] != SCHEMA:
        raise ValueError(
            f"{path} has schema {suite['schema']!r}, and this version reads schema {SCHEMA}; "
            "measure again, or use the version that wrote it"
        )
    if not stub_clock and suite["environment"].get("device") == STUB_DEVICE:
        raise ValueError(f"{path} is a rehearsal's: its times were not measured")
    return data


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def rows_of(data: dict[str, Any]) -> Iterator[Row]:
    for entry in data["benchmarks"]:
        info = entry["extra_info"]
        yield Row(info["kernel"], info["case"], info["variant"], info["mode"], info, entry["stats"])
