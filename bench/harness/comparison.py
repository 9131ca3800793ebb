"""Whether B is slower than A, or two runs of the same code that differ by noise.

A change counts if all three hold, for a mode, cold or sustained, that both files have:

1. The medians differ by more than `min_effect`, and by more than the noise of these two runs: what
   the peers' rows, whose code did not change, differ by beside their ceilings (four times their
   robust standard deviation), and what the row's own two halves of a run differ by. Samples of one
   run have its load in common, which a rank test does not know.
2. A rank test (Mann-Whitney) tells the samples apart, by the quantiles that a file keeps of them,
   at a level for all rows of ours together, and for all of the peers (Holm), so that a long table
   does not find something by its length. Quantiles scatter less than as many samples do: the test
   finds less than it would in all samples, and no more than its level says.
3. The same two hold for the times divided by the ceiling's median in the same case of the same run.
   A machine that is slower as a whole, with other load or lower clocks, slows both; a change of the
   raw times that may be of that kind is called "machine". Without a ceiling, the peers of the case
   stand for it.

And the samples must lie apart: each run's median outside of the other's p20 to p80.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

from bench.harness import results, table
from bench.harness.results import Row

LEVEL = 0.05  # of finding anything where nothing changed
ROW_LEVEL = 0.01  # of a row by itself, for the verdict "machine"
# Fewer samples cannot be told apart at that level.
FEWEST_SAMPLES = 5
FEWEST_PEER_ROWS = 4
ROBUST_SD = 1.4826  # of a normal distribution, by its median absolute deviation
NOISE_WIDTHS = 4.0  # so that hundreds of rows have none beyond it
Verdict = Literal["slower", "faster", "same", "machine", "too few samples"]


@dataclass(frozen=True)
class Change:
    key: tuple[str, str, str, str]
    before_ms: float
    after_ms: float
    ratio: float  # of the medians, after by before
    relative: float  # the same, of times by the ceiling's
    p_value: float  # the larger of the two tests'
    verdict: Verdict
    ours: bool


@dataclass(frozen=True)
class Comparison:
    changes: list[Change]
    only_in_one: list[str]
    notes: list[str]

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if change.ours and change.verdict == "slower"]


def compare(
    before: dict[str, Any], after: dict[str, Any], *, min_effect: float = 0.1
) -> Comparison:
    """B against A, row by row.

    Raises:
        ValueError: the files have no row in common, are of different devices or thread counts, or
            min_effect is not above 0.
    """
    if not min_effect > 0:
        raise ValueError(f"--min-effect must be > 0, got {min_effect}")
    environments = [data[results.KEY]["environment"] for data in (before, after)]
    for name in ("device", "threads"):
        a, b = (environment.get(name) for environment in environments)
        if a != b:
            raise ValueError(f"the files are of different machines: {name} {a!r} and {b!r}")
    rows = [{row.key: row for row in results.rows_of(data)} for data in (before, after)]
    shared = [key for key in rows[0] if key in rows[1] and not rows[0][key].info["is_ceiling"]]
    if not shared:
        raise ValueError("the files have no row in common")
    # A graph's replay and the calls themselves are two things. Older files do not say which.
    ways = {key: tuple(side[key].info.get("timed_by") for side in rows) for key in shared}
    unlike = [key for key, way in ways.items() if None not in way and len(set(way)) > 1]
    shared = [key for key in shared if key not in unlike]
    yardsticks = [_yardsticks(of_file) for of_file in rows]
    tests = [_Test(*(side[key] for side in rows), *(y[key] for y in yardsticks)) for key in shared]
    noise = _run_noise([test.relative for test in tests if not test.ours])
    changes = []
    for family in (True, False):
        of_family = [test for test in tests if test.ours == family]
        significant = _holm([test.p_value for test in of_family])
        changes += [
            test.change(found, min_effect, noise)
            for test, found in zip(of_family, significant, strict=True)
        ]
    only = sorted({": ".join(key[:3]) for key in rows[0].keys() ^ rows[1].keys()})
    notes = [
        f"{name} differs: {a!r} and {b!r}"
        for name in ("torch", "backend", "simd", "driver", "triton")
        if (a := environments[0].get(name)) != (b := environments[1].get(name))
    ]
    for key in unlike:
        name, mode = ": ".join(key[:3]), key[3]
        notes.append(f"{name}, {mode} is not compared: timed by {' and by '.join(ways[key])}")
    return Comparison(changes, only, notes)


class _Test:
    def __init__(self, before: Row, after: Row, speed_before: float, speed_after: float) -> None:
        self._before, self._after = before, after
        self.ours = bool(after.info["ours"])
        self._a, self._b = np.asarray(before.quantiles), np.asarray(after.quantiles)
        self.ratio = after.median / before.median if self._enough else 1.0
        drift = speed_after / speed_before
        self.relative = self.ratio / drift
        self._p_raw = self._p_relative = 1.0
        if self._enough:
            self._p_raw = _p_value(self._a, self._b)
            self._p_relative = _p_value(self._a, self._b / drift)
        self.p_value = max(self._p_raw, self._p_relative)

    @property
    def _enough(self) -> bool:
        return min(len(self._a), len(self._b)) >= FEWEST_SAMPLES

    def change(self, significant: bool, min_effect: float, noise: float) -> Change:
        verdict: Verdict = "same"
        halves = [row.stats["halves_differ"] for row in (self._before, self._after)]
        least = max(min_effect, noise, *halves)
        if not self._enough:
            verdict = "too few samples"
        elif _direction(self.ratio, min_effect) and self._apart():
            direction = _direction(self.ratio, least)
            if significant and direction and direction == _direction(self.relative, least):
                verdict = "slower" if self.ratio > 1 else "faster"
            elif self._p_raw < ROW_LEVEL:
                verdict = "machine"
        return Change(
            self._before.key,
            1e3 * self._before.median,
            1e3 * self._after.median,
            self.ratio,
            self.relative,
            self.p_value,
            verdict,
            self.ours,
        )

    def _apart(self) -> bool:
        def outside(value: float, row: Row) -> bool:
            return not row.stats["p20"] <= value <= row.stats["p80"]

        return outside(self._after.median, self._before) and outside(
            self._before.median, self._after
        )


def _run_noise(ratios: Sequence[float]) -> float:
    """Of rows that did not change, as an effect; 0 where there are too few to tell."""
    if len(ratios) < FEWEST_PEER_ROWS:
        return 0.0
    return math.exp(NOISE_WIDTHS * ROBUST_SD * float(np.median(np.abs(np.log(ratios))))) - 1


def _direction(ratio: float, min_effect: float) -> int:
    """1 slower, -1 faster, 0 neither by more than min_effect."""
    return (ratio > 1 + min_effect) - (ratio < 1 / (1 + min_effect))


def _p_value(a: np.ndarray, b: np.ndarray) -> float:
    return float(stats.mannwhitneyu(a, b, alternative="two-sided").pvalue)


def _holm(p_values: Sequence[float]) -> list[bool]:
    """Which are significant at LEVEL for all together."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    found, holds = [False] * len(p_values), True
    for rank, index in enumerate(order):
        holds = holds and p_values[index] <= LEVEL / (len(p_values) - rank)
        found[index] = holds
    return found


def _yardsticks(rows: dict[tuple[str, str, str, str], Row]) -> dict[Any, float]:
    """Seconds that tell how fast the machine was beside each row."""
    cases: dict[Any, list[Row]] = defaultdict(list)
    for row in rows.values():
        cases[row.kernel, row.case, row.mode].append(row)
    found = {}
    for key, row in rows.items():
        beside = cases[row.kernel, row.case, row.mode]
        ceilings = [
            other.median
            for other in beside
            if other.info["is_ceiling"] and other.info.get("timed_by") == row.info.get("timed_by")
        ]
        # A slow variant is sampled cold only, a ceiling both ways.
        others = [other.median for other in beside if not other.info["ours"]]
        chosen = ceilings or others
        found[key] = float(np.exp(np.mean(np.log(chosen)))) if chosen else 1.0
    return found


def text(found: Comparison) -> str:
    """The changes, largest first; then what could not be compared."""
    lines = [f"note: {note}" for note in found.notes]
    counts: dict[str, int] = defaultdict(int)
    for change in sorted(found.changes, key=lambda change: -change.ratio):
        counts[change.verdict] += 1
        if change.verdict in ("slower", "faster", "machine"):
            kernel, case, variant, mode = change.key
            lines.append(
                f"{change.verdict:<8} x {change.ratio:.2f} (x {change.relative:.2f} beside the "
                f"ceiling, p = {change.p_value:.1g})  {kernel}: {case}: {variant}, {mode}: "
                f"{table.milliseconds(change.before_ms)} -> "
                f"{table.milliseconds(change.after_ms)}" + ("" if change.ours else "  (not ours)")
            )
    lines += [f"in one file only: {name}" for name in found.only_in_one]
    lines.append(", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())))
    lines.append(
        f"{len(found.regressions)} of ours became slower" if found.regressions else "no regression"
    )
    return "\n".join(lines)
