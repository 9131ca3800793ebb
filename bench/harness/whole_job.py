"""Result files of the scripts that run whole jobs, each in a process of its own.

Their runs are too long to be repeated, and their results are random completions that no float64
result can be held to (tests hold the samplers to their law). So a row has one time, or one for each
call of the run, and its figures are its metrics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness import machine, results
from bench.harness.cases import Case

SECONDS, SECONDS_OF_EACH = "seconds", "seconds_of_each"
PEAK = "peak_megabytes"


@dataclass(frozen=True)
class Run:
    """One run.

    Args:
        figures: of the run: its `seconds`, those of its calls as `seconds_of_each` where there are
            several, its `peak_megabytes` beyond the inputs if that is known, and whatever else.
        ours, peer: as a variant's.
    """

    case: Case
    variant: str
    figures: Mapping[str, Any]
    ours: bool = True
    peer: str | None = None


def document(
    kernel: str, part: str, runs: Sequence[Run], environment: dict[str, Any], path: Path | None
) -> results.Document:
    """The file of these runs, not yet written."""
    made = results.Document(environment, machine.command_line(), path)
    made.add([_row(kernel, part, run) for run in runs])
    made.suite["done"] += list(dict.fromkeys(f"{kernel}: {run.case.title}" for run in runs))
    made.suite["finished"] = True
    return made


def _row(kernel: str, part: str, run: Run) -> dict[str, Any]:
    metrics = flat({name: run.figures[name] for name in run.figures if name != SECONDS_OF_EACH})
    info = {
        "variant": run.variant,
        "ours": run.ours,
        "peer": run.peer,
        "is_ceiling": False,
        "calls": 1,
        "timed_by": "wall clock",
        "ratio_to_ceiling": None,
        "why_no_ratio": "a whole job has no ceiling",
        "peak_megabytes": metrics.get(PEAK),
        "errors": None,
        "memory_bound": False,
        "metrics": metrics,
    }
    times = run.figures.get(SECONDS_OF_EACH) or [run.figures[SECONDS]]
    return results.row(kernel, part, run.case, "cold", times, info)


def flat(figures: Mapping[str, Any]) -> dict[str, float]:
    """With the figures of a figure under its own name and theirs."""
    found: dict[str, float] = {}
    for name, value in figures.items():
        if isinstance(value, Mapping):
            found |= {f"{name}_{inner}": each for inner, each in flat(value).items()}
        else:
            found[name] = value
    return found
