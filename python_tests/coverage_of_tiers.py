"""The lines of each file that the fast tier reaches, beside those that all tests reach.

    python -m python_tests.coverage_of_tiers FOLDER

FOLDER has coverage's data of the fast tests and of the slow ones: fast.*, slow.*. Exits with 1 if
the fast tier reaches less of a file than `SHARE` of what all tests do.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from coverage import CoverageData

ROOT = Path(__file__).resolve().parents[1]
SHARE = 0.95
TIERS = ("fast", "slow")

Lines = Mapping[str, set[int]]


def lines_of(folder: Path, tier: str) -> Lines:
    """The lines that a tier has reached, by file."""
    found: dict[str, set[int]] = {}
    files = sorted(folder.glob(f"{tier}.*"))
    if not files:
        raise SystemExit(f"{folder} has no {tier}.*: run `make test-coverage`")
    for path in files:
        data = CoverageData(basename=str(path))
        data.read()
        for name in data.measured_files():
            found.setdefault(name, set()).update(data.lines(name) or ())
    return found


def table(fast: Lines, slow: Lines) -> tuple[str, list[str]]:
    """A line a file, the least of shares first, and the files below `SHARE`."""
    rows, below = [], []
    for name in fast.keys() | slow.keys():
        by_fast = fast.get(name, set())
        by_all = by_fast | slow.get(name, set())
        if by_all:
            share = len(by_fast) / len(by_all)
            path = Path(name)
            shown = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else name
            rows.append((share, shown, len(by_fast), len(by_all)))
            if share < SHARE:
                below.append(shown)
    total = [sum(column) for column in list(zip(*rows, strict=True))[2:]] if rows else [0, 0]
    lines = [f"{'share':>7}{'fast':>7}{'all':>7}  file"]
    lines += [f"{share:7.1%}{n:7d}{of:7d}  {name}" for share, name, n, of in sorted(rows)]
    lines.append(f"{total[0] / max(1, total[1]):7.1%}{total[0]:7d}{total[1]:7d}  all")
    return "\n".join(lines), sorted(below)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m python_tests.coverage_of_tiers")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(arguments).folder
    text, below = table(*(lines_of(folder, tier) for tier in TIERS))
    sys.stdout.write(text + "\n")
    if below:
        sys.stdout.write(f"below {SHARE:.0%}: {', '.join(below)}\n")
    return 1 if below else 0


if __name__ == "__main__":
    sys.exit(main())
