"""The terminal's table of a case."""

from __future__ import annotations

from typing import Any

HEADER = ("variant", "mode", "median", "p20", "p80", "rate", "of ceiling", "peak memory")


def cells(info: dict[str, Any]) -> tuple[str, ...]:
    """A row's figures as text; a dash for what is not measured."""
    ratio, peak = info["ratio_to_ceiling"], info["peak_megabytes"]
    return (
        info["variant"],
        info["mode"],
        milliseconds(info["median_ms"]),
        milliseconds(info["p20_ms"]),
        milliseconds(info["p80_ms"]),
        rate(info),
        "-" if ratio is None else f"{ratio:.0%}",
        "-" if peak is None else f"{peak:.0f} MB",
    )


def rate(info: dict[str, Any]) -> str:
    if info.get("teraflops") and not info.get("memory_bound"):
        return f"{info['teraflops']:.3g} TFLOP/s"
    if info.get("gigabytes_per_second"):
        return f"{info['gigabytes_per_second']:.3g} GB/s"
    return "-"


def milliseconds(value: float) -> str:
    if value < 1:
        return f"{1e3 * value:.3g} µs"
    return f"{value:.3g} ms" if value < 1e3 else f"{value / 1e3:.3g} s"


def text(rows: list[dict[str, Any]]) -> str:
    """Aligned columns, and beneath a row the metrics of its own."""
    lines = [HEADER, *(cells(row["extra_info"]) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    printed = []
    for line, row in zip(lines, [None, *rows], strict=True):
        texts = [line[0].ljust(widths[0]), line[1].ljust(widths[1])]
        texts += [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
        printed.append("    " + "  ".join(texts).rstrip())
        if row is not None and row["extra_info"].get("metrics"):
            metrics = row["extra_info"]["metrics"]
            shown = ", ".join(f"{name} {value:.3g}" for name, value in metrics.items())
            printed.append(f"      {shown}")
    return "\n".join(printed)
