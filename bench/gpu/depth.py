"""What ncu says of a kernel: its command, and its CSV as a few figures.

    python -m bench.gpu.depth --figures gpu-bench.json --out gpu-depth-ncu.json

Looks at the variants of ours that miss their target in a file of figures; without one, or with none
missed, at the kernels that have a target. Not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import suite
from bench.gpu.goals import GOALS
from bench.harness import results
from bench.harness.cases import SIZES
from bench.harness.machine import ROOT

SECONDS_EACH = 75
# Clocks are left as they are: they are not this program's to set.
NCU = (
    "ncu",
    "--clock-control",
    "none",
    "--profile-from-start",
    "off",
    "--target-processes",
    "all",
    "--csv",
    "--page",
    "raw",
    "--print-units",
    "base",
)
# Column of ncu's raw page -> name here.
METRICS = {
    "gpu__time_duration.sum": "duration",
    "dram__bytes.sum": "dram_bytes",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "active_warps_percent",
    "smsp__inst_executed.sum": "instructions",
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active": "special_function_percent",
    "launch__registers_per_thread": "registers",
    "launch__occupancy_limit_registers": "blocks_by_registers",
    "launch__waves_per_multiprocessor": "waves",
}
NAME = "Kernel Name"


def missed(path: Path) -> list[tuple[str, str]]:
    """Kernel and variant of what misses its target in a file of figures, the worst first."""
    data = results.load(path, stub_clock=True)
    shares: dict[tuple[str, str], float] = {}
    for row in results.rows_of(data):
        goal, ratio = GOALS.get(row.kernel), row.info["ratio_to_ceiling"]
        # At the size that the goal is for, which is the one that `one_call` takes.
        if goal is None or row.case not in first_cases(row.kernel):
            continue
        if row.info["ours"] and ratio is not None and ratio < goal:
            key = row.kernel, row.variant
            shares[key] = min(shares.get(key, 1.0), ratio / goal)
    return sorted(shares, key=lambda key: shares[key])


def first_cases(kernel: str) -> set[str]:
    return {suite.KERNELS[kernel].cases(size)[0].title for size in SIZES}


def looked_at(figures: Path | None) -> list[tuple[str, str]]:
    found = missed(figures) if figures is not None and figures.exists() else []
    return found or [(kernel, "powerkernels") for kernel in GOALS]


def command(kernel: str, variant: str, size: str) -> list[str]:
    return [
        *NCU,
        "--metrics",
        ",".join(METRICS),
        sys.executable,
        "-m",
        "bench.gpu.one_call",
        kernel,
        variant,
        "--size",
        size,
    ]


def kernels_of(output: str) -> Iterator[dict[str, Any]]:
    """A launch each, from what `ncu --csv --page raw` prints.

    Lines of ncu's own and of the program stand before the header; the row after it has the units.
    A metric that this chip does not have is left out.
    """
    lines = output.splitlines()
    start = next((n for n, line in enumerate(lines) if f'"{NAME}"' in line), None)
    if start is None:
        return
    rows = list(csv.DictReader(io.StringIO("\n".join(lines[start:]))))
    units = rows[0] if rows else {}
    for row in rows[1:]:
        if not row.get(NAME):
            continue
        found: dict[str, Any] = {"kernel": row[NAME]}
        for column, name in METRICS.items():
            value = _number(row.get(column))
            if value is not None:
                found[name] = value
                if name == "duration" and units.get(column):
                    found["duration_unit"] = units[column]
        yield found


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


def examine(kernel: str, variant: str, size: str) -> dict[str, Any]:
    found: dict[str, Any] = {"kernel": kernel, "variant": variant}
    try:
        run = subprocess.run(
            command(kernel, variant, size),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=SECONDS_EACH,
        )
    except FileNotFoundError:
        return {**found, "why_not": "ncu is not on PATH"}
    except subprocess.TimeoutExpired:
        return {**found, "why_not": f"not done in {SECONDS_EACH} s"}
    launches = list(kernels_of(run.stdout))
    if launches:
        return {**found, "launches": launches}
    said = [line for line in (run.stdout + run.stderr).splitlines() if "==ERROR==" in line]
    said = said or (run.stderr or run.stdout).strip().splitlines()[-1:]
    return {**found, "why_not": said[0] if said else f"exit status {run.returncode}"}


def kept(path: Path) -> list[dict[str, Any]]:
    """What an earlier run left; nothing where that was cut off."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def lines(found: dict[str, Any]) -> Iterator[str]:
    yield f"{found['kernel']}, {found['variant']}: {found.get('why_not', '')}".rstrip(": ")
    for launch in found.get("launches", ()):
        unit = launch.get("duration_unit", "")
        shares = ", ".join(
            f"{name.removesuffix('_percent').replace('_', ' ')} {launch[name]:.0f}%"
            for name in METRICS.values()
            if name.endswith("_percent") and name in launch
        )
        yield f"  {launch['kernel'][:60]}: {launch.get('duration', 0):g} {unit}, {shares}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--figures", type=Path, help="JSON of `powerkernels bench`")
    parser.add_argument("--out", type=Path, required=True, help="JSON, written after every kernel")
    parser.add_argument("--size", choices=SIZES, default="device")
    parser.add_argument("--list", action="store_true", help="print the commands and end")
    options = parser.parse_args(argv)
    chosen = looked_at(options.figures)
    if options.list:
        for kernel, variant in chosen:
            print(" ".join(command(kernel, variant, options.size)))
        return 0
    before = kept(options.out)
    done = {(one["kernel"], one["variant"]) for one in before if "launches" in one}
    found = [one for one in before if "launches" in one]
    for kernel, variant in chosen:
        if (kernel, variant) in done:
            continue
        found.append(examine(kernel, variant, options.size))
        options.out.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
        print("\n".join(lines(found[-1])), flush=True)
    return 0 if all("launches" in one for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
