"""One line on a terminal that says how a run is getting on."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from powerkernels.power_sampling.engine import SamplerStats

REFRESH_SECONDS = 0.25


class ProgressLine:
    """Rewrites one line of standard error; does nothing where that is not a terminal.

    Args:
        what: the counts of the run, read at every refresh; or a function from the seconds since
            the start to the line.
        show: True or False to force it; None is "only on a terminal".
    """

    def __init__(
        self, what: SamplerStats | Callable[[float], str], show: bool | None = None
    ) -> None:
        self._what = what
        self._show = sys.stderr.isatty() if show is None else show
        self._started = self._drawn = time.perf_counter()
        self._width = 0

    def update(self) -> None:
        """Redraw, at most every quarter of a second."""
        now = time.perf_counter()
        if self._show and now - self._drawn >= REFRESH_SECONDS:
            self._drawn = now
            elapsed, what = now - self._started, self._what
            self._write(what(elapsed) if callable(what) else describe(what, elapsed))

    def close(self) -> None:
        """Leave the cursor on an empty line."""
        if self._width:
            self._write("")
            sys.stderr.write("\r")
            sys.stderr.flush()

    def _write(self, line: str) -> None:
        sys.stderr.write("\r" + line.ljust(self._width))
        sys.stderr.flush()
        self._width = len(line)


def describe(stats: SamplerStats, elapsed: float) -> str:
    """The line: chains, tokens per second, acceptance, lanes busy, time left."""
    parts = [
        f"{stats.finished_chains}/{stats.num_chains} chains",
        f"{stats.decoded_tokens / max(elapsed, 1e-9):.0f} tok/s",
        f"{stats.busy_lanes}/{stats.num_lanes} lanes busy",
    ]
    if stats.transitions:
        parts.append(f"acceptance {stats.acceptance_rate:.2f}")
    if stats.fraction_done > 0:
        parts.append(time_left(elapsed, stats.fraction_done))
    return " | ".join(parts)


def time_left(elapsed: float, fraction_done: float) -> str:
    left = elapsed * (1 - fraction_done) / fraction_done
    return f"about {int(left) // 60}:{int(left) % 60:02d} left"
