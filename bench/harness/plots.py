"""Plots from the JSON, one a kernel: roofline, times along each axis, speed-ups; SVG.

SVG since it is text: a change of a figure is a change of some lines, and it is sharp at any size.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from bench.harness import results
from bench.harness.results import Row

ROOT = Path(__file__).resolve().parents[2]
RESULTS, FOLDER = ROOT / "bench" / "results", ROOT / "bench" / "plots"
OUR_COLOUR = "#c0392b"
Colours = dict[str, Any]
FIXED_COLOURS: Colours = {"powerkernels": OUR_COLOUR, "ceiling": "black"}
LEGEND_COLUMNS = 5
# The same bytes for the same figures: ids that are drawn from the salt, and no date. Letters are
# the viewer's: as outlines they are half of the file.
STYLE = {
    "svg.hashsalt": "powerkernels",
    "svg.fonttype": "none",
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 8,
}
METADATA = {"Date": None}
PANEL_WIDTH, PANEL_HEIGHT = 4.6, 4.0  # inches
POSITION_DIGITS = 4  # of a share of the figure


def committed() -> list[Path]:
    """The suite's files among the results."""
    return [path for path in sorted(RESULTS.glob("*.json")) if is_suite(path)]


def is_suite(path: Path) -> bool:
    data = results.read_json(path)
    return isinstance(data, dict) and results.KEY in data


def draw(paths: Sequence[Path], folder: Path) -> list[Path]:
    """All plots of all files, as FILE-KERNEL; returns what was written.

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
                target = folder / f"{path.stem}-{name}.svg"
                figure.savefig(target, metadata=METADATA)
                written.append(target)
                plt.close(figure)
    return written


def figures(data: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    """One a kernel: its roofline, its time along each axis, its speed-ups, side by side.

    None of a kernel that has neither a floor nor an axis: the table says it all.
    """
    rows = best_mode(list(results.rows_of(data)))
    environment = data[results.KEY]["environment"]
    for kernel in dict.fromkeys(row.kernel for row in rows):
        own = [row for row in rows if row.kernel == kernel]
        if not any(row.info["floor_bytes"] or row.info["sweep"] for row in own):
            continue
        colours = colours_of(own)
        panels: list[Callable[[Axes], None]] = []
        if any(row.info["floor_bytes"] for row in own):
            panels.append(functools.partial(roofline, own, data[results.KEY]["ceilings"], colours))
        for axis in dict.fromkeys(axis for row in own for axis in row.info["sweep"]):
            points = [row for row in own if axis in row.info["sweep"]]
            if len({row.info["shape"][axis] for row in points}) > 1:
                panels.append(functools.partial(sweep, axis, points, colours))
        panels.append(functools.partial(speed_up, own, colours))
        figure, axes = plt.subplots(
            1,
            len(panels),
            figsize=(PANEL_WIDTH * len(panels), PANEL_HEIGHT),
            layout="constrained",
            squeeze=False,
        )
        title = figure.suptitle(
            f"{kernel} on {environment['device']}, {environment['threads']} threads"
        )
        for panel, place in zip(panels, axes[0], strict=True):
            panel(place)
        _legend(figure)
        _settle(figure, title)
        yield kernel, figure


def best_mode(rows: Sequence[Row]) -> list[Row]:
    """Sustained where there is such a figure, cold where not."""
    found: dict[Any, Row] = {}
    for row in rows:
        key = (row.kernel, row.case, row.variant)
        if key not in found or row.mode == "sustained":
            found[key] = row
    return list(found.values())


def roofline(rows: Sequence[Row], ceilings: dict[str, float], colours: Colours, axes: Axes) -> None:
    """Rate against FLOP of matrix products a byte of the floor; bytes where there are none."""
    bandwidth = max(value for name, value in ceilings.items() if name.endswith("GB/s"))
    with_flops = [row for row in rows if row.info["floor_flops"]]
    axes.set(xscale="log", yscale="log", title="roofline of this run")
    if not with_flops:
        axes.axhline(bandwidth, color="black", linewidth=1, label="memory")
        for row in rows:
            rate = row.info["gigabytes_per_second"]
            axes.plot(row.info["floor_bytes"] / 1e6, rate, **_marker(row, colours))
        axes.set(xlabel="MB of the floor", ylabel="GB/s of the floor")
        return
    dtypes = {row.info["dtype"] for row in with_flops}
    roofs = {
        name.split(",")[0]: value
        for name, value in ceilings.items()
        if name.endswith("TFLOP/s") and name.split(",")[0].removeprefix("matmul ") in dtypes
    }
    intensities = [row.info["floor_flops"] / row.info["floor_bytes"] for row in with_flops]
    ridges = [1e3 * value / bandwidth for value in roofs.values()]
    low, high = min(intensities + ridges) / 4, max(intensities + ridges) * 4
    grid = [low * (high / low) ** (i / 100) for i in range(101)]
    for name, value in roofs.items():
        axes.plot(grid, [min(value, bandwidth * x / 1e3) for x in grid], label=name, linewidth=1)
    for row, intensity in zip(with_flops, intensities, strict=True):
        axes.plot(intensity, row.info["teraflops"], **_marker(row, colours))
    axes.set(xlabel="FLOP a byte of the floor", ylabel="TFLOP/s")


def sweep(axis: str, rows: Sequence[Row], colours: Colours, axes: Axes) -> None:
    for of_variant in _by_variant(rows).values():
        ordered = sorted(of_variant, key=lambda row: row.info["shape"][axis])
        points = [row.info["shape"][axis] for row in ordered]
        times = [row.info["median_ms"] for row in ordered]
        low = [row.info["median_ms"] - row.info["p20_ms"] for row in ordered]
        high = [row.info["p80_ms"] - row.info["median_ms"] for row in ordered]
        marker = _marker(ordered[0], colours) | {"linestyle": "-", "markersize": 4}
        axes.errorbar(points, times, [low, high], capsize=2, **marker)
    ticks = sorted({row.info["shape"][axis] for row in rows})
    axes.set(xscale="log", yscale="log", xlabel=axis, title=f"time against {axis}")
    axes.set(ylabel="ms, median, p20 to p80")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()


def speed_up(rows: Sequence[Row], colours: Colours, axes: Axes) -> None:
    """Each variant's time by ours, in the case that has most variants."""
    cases: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        cases[row.case].append(row)
    case = max(cases, key=lambda name: len(cases[name]))
    own = next((row for row in cases[case] if row.info["ours"]), None)
    others = [row for row in cases[case] if row is not own]
    if own is not None and others:
        factors = [row.median / own.median for row in others]
        bars = axes.barh(
            [row.variant for row in others],
            factors,
            color=[colours[name_of(row)] for row in others],
        )
        axes.bar_label(bars, [f"{factor:.2g} x" for factor in factors], padding=3, fontsize=8)
        axes.axvline(1.0, color=OUR_COLOUR, linewidth=1)
    axes.set_title(f"time by ours:\n{case}")
    axes.invert_yaxis()
    axes.margins(x=0.15)


def name_of(row: Row) -> str:
    # A ceiling's name goes on with what it is, after how it was timed if there are several.
    return row.variant.split(":")[0] if row.info["is_ceiling"] else row.variant


def colours_of(rows: Sequence[Row]) -> Colours:
    """One a variant, in all panels of a kernel."""
    names = [name for name in dict.fromkeys(map(name_of, rows)) if name not in FIXED_COLOURS]
    palette = mpl.colormaps["tab10" if len(names) <= 10 else "tab20"]
    return FIXED_COLOURS | {name: palette(number) for number, name in enumerate(names)}


def _by_variant(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[name_of(row)].append(row)
    return found


def _marker(row: Row, colours: Colours) -> dict[str, Any]:
    ours = row.info["ours"]
    return {
        "marker": "*" if ours else "o",
        "markersize": 10 if ours else 5,
        "label": name_of(row),
        "linestyle": "none",
        "color": colours[name_of(row)],
    }


def _legend(figure: Figure) -> None:
    """Each name of all panels once, beneath them."""
    once: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            once.setdefault(name, handle)
    if once:
        figure.legend(
            once.values(), once.keys(), fontsize=7, loc="outside lower center", ncols=LEGEND_COLUMNS
        )


def _settle(figure: Figure, title: Text) -> None:
    """Where the layout has put everything, rounded: its last digits differ from run to run."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in figure.axes:
        axes.set_position([round(each, POSITION_DIGITS) for each in axes.get_position().bounds])
    title.set_position(tuple(round(each, POSITION_DIGITS) for each in title.get_position()))
