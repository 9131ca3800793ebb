"""Plots from the JSON: a roofline, times along each axis, speed-ups; PNG and SVG."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.harness import results
from bench.harness.results import Row

ROOT = Path(__file__).resolve().parents[2]
RESULTS, FOLDER = ROOT / "bench" / "results", ROOT / "bench" / "plots"
FORMATS = ("png", "svg")
OUR_COLOUR = "#c0392b"
# The same bytes for the same figures.
STYLE = {"svg.hashsalt": "powerkernels", "axes.grid": True, "grid.alpha": 0.3, "font.size": 9}
METADATA = {"svg": {"Date": None}, "png": {"Software": None}}


def committed() -> list[Path]:
    """The suite's files among the results."""
    return [path for path in sorted(RESULTS.glob("*.json")) if is_suite(path)]


def is_suite(path: Path) -> bool:
    data = results.read_json(path)
    return isinstance(data, dict) and results.KEY in data


def draw(paths: Sequence[Path], folder: Path) -> list[Path]:
    """All plots of all files, as FILE-KIND-…; returns what was written.

    Raises:
        ValueError: there is no file, or one is not of this suite and schema.
    """
    if not paths:
        raise ValueError("bench plot: bench/results/ holds no result of `powerkernels bench`")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    mpl.use("Agg")
    with mpl.rc_context(STYLE):
        for path in paths:
            for name, figure in figures(results.load(path)):
                for kind in FORMATS:
                    target = folder / f"{path.stem}-{name}.{kind}"
                    figure.savefig(target, metadata=METADATA[kind], dpi=130)
                    written.append(target)
                plt.close(figure)
    return written


def figures(data: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    rows = list(results.rows_of(data))
    environment = data[results.KEY]["environment"]
    where = f"{environment['device']}, {environment['threads']} threads"
    for kernel in dict.fromkeys(row.kernel for row in rows):
        own = [row for row in best_mode(rows) if row.kernel == kernel]
        if any(row.info["floor_bytes"] for row in own):
            yield f"roofline-{kernel}", roofline(kernel, own, data[results.KEY], where)
        for axis in dict.fromkeys(axis for row in own for axis in row.info["sweep"]):
            points = [row for row in own if axis in row.info["sweep"]]
            if len({row.info["shape"][axis] for row in points}) > 1:
                yield f"{axis}-{kernel}", sweep(kernel, axis, points, where)
        yield f"speed-up-{kernel}", speed_up(kernel, own, where)


def best_mode(rows: Sequence[Row]) -> list[Row]:
    """Sustained where there is such a figure, cold where not."""
    found: dict[Any, Row] = {}
    for row in rows:
        key = (row.kernel, row.case, row.variant)
        if key not in found or row.mode == "sustained":
            found[key] = row
    return list(found.values())


def roofline(kernel: str, rows: Sequence[Row], suite: dict[str, Any], where: str) -> Figure:
    """Operations of matrix products a byte of the floor, or bytes alone where there are none."""
    figure, axes = _axes(f"{kernel}: roofline\n{where}")
    ceilings = suite["ceilings"]
    bandwidth = max(value for name, value in ceilings.items() if name.endswith("GB/s"))
    compute = [(name, value) for name, value in ceilings.items() if name.endswith("TFLOP/s")]
    with_flops = [row for row in rows if row.info["floor_flops"]]
    if not with_flops:
        _bandwidth_roof(axes, rows, bandwidth)
        return figure
    intensities = [row.info["floor_flops"] / row.info["floor_bytes"] for row in with_flops]
    low, high = min(intensities) / 4, max(intensities) * 4
    grid = [low * (high / low) ** (i / 50) for i in range(51)]
    for name, value in compute:
        axes.plot(grid, [min(value, bandwidth * x / 1e3) for x in grid], label=name.split(",")[0])
    for row, intensity in zip(with_flops, intensities, strict=True):
        axes.plot(intensity, row.info["teraflops"], **_marker(row))
    axes.set(
        xscale="log", yscale="log", xlabel="FLOP a byte of the floor", ylabel="TFLOP/s"
    )
    _legend(axes)
    return figure


def _bandwidth_roof(axes: Axes, rows: Sequence[Row], bandwidth: float) -> None:
    axes.axhline(bandwidth, color="black", linewidth=1, label="memory, this run")
    for row in rows:
        axes.plot(row.info["floor_bytes"] / 1e6, row.info["gigabytes_per_second"], **_marker(row))
    axes.set(xscale="log", yscale="log", xlabel="MB of the floor", ylabel="GB/s of the floor")
    _legend(axes)


def sweep(kernel: str, axis: str, rows: Sequence[Row], where: str) -> Figure:
    figure, axes = _axes(f"{kernel}: time against {axis}\n{where}")
    for name, of_variant in _by_variant(rows).items():
        ordered = sorted(of_variant, key=lambda row: row.info["shape"][axis])
        points = [row.info["shape"][axis] for row in ordered]
        times = [row.info["median_ms"] for row in ordered]
        low = [row.info["median_ms"] - row.info["p20_ms"] for row in ordered]
        high = [row.info["p80_ms"] - row.info["median_ms"] for row in ordered]
        axes.errorbar(points, times, [low, high], marker="o", capsize=2, label=name)
    axes.set(xscale="log", yscale="log", xlabel=axis, ylabel="ms (median, p20 to p80)")
    axes.legend(fontsize=7)
    return figure


def speed_up(kernel: str, rows: Sequence[Row], where: str) -> Figure:
    """How many times ours is as fast as each variant of the largest case."""
    cases: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        cases[row.case].append(row)
    case = max(cases, key=lambda name: len(cases[name]))
    own = next((row for row in cases[case] if row.info["ours"]), None)
    others = [row for row in cases[case] if row is not own]
    figure, axes = _axes(f"{kernel}, {case}: time of each by ours\n{where}")
    if own is not None:
        factors = [row.median / own.median for row in others]
        bars = axes.barh([row.variant for row in others], factors, color="#2980b9")
        axes.bar_label(bars, [f"{factor:.2g} x" for factor in factors], padding=3, fontsize=8)
        axes.axvline(1.0, color=OUR_COLOUR, linewidth=1)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    return figure


def _axes(title: str) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    axes.set_title(title, fontsize=9)
    return figure, axes


def _by_variant(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found["ceiling" if row.info["is_ceiling"] else row.variant].append(row)
    return found


def _marker(row: Row) -> dict[str, Any]:
    ours = row.info["ours"]
    name = "ceiling" if row.info["is_ceiling"] else row.variant
    return {"marker": "*" if ours else "o", "markersize": 10 if ours else 5, "label": name,
            "linestyle": "none", "color": _colour(name)}


def _colour(name: str) -> str:
    """One a name, whatever else is in the plot."""
    return f"C{sum(name.encode()) % 10}"


def _legend(axes: Axes) -> None:
    """Each name once."""
    handles, names = axes.get_legend_handles_labels()
    once = dict(zip(names, handles, strict=True))
    axes.legend(once.values(), once.keys(), fontsize=7)
