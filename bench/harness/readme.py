"""README's tables from the JSON of bench/results/, and from nothing else.

A block between `<!-- bench: NAME -->` and `<!-- /bench -->` is written by the function of that name
in BLOCKS.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from bench.harness import plots, results, table
from bench.harness.results import Row

TARGET = plots.ROOT / "README.md"
FOLDER = "bench/results"
BLOCK = re.compile(r"<!-- bench: (?P<name>[\w -]+) -->\n(?P<text>.*?)<!-- /bench -->", re.DOTALL)
MARKERS = re.compile(r"<!-- (?:bench: .*?|/bench) -->")
# How much a ceiling moves depends on the case: the cell says.
AMOUNT = re.compile(r" of ([\d.]+ MB)$")
AVX2, AVX512 = "suite_cpu", "ops_cpu"
LOSSES = ("ppo_clip_loss", "clip_cov_loss", "kl_cov_loss")
LOSS_CASE = "256 sequences of 4096, float32"


class Column(NamedTuple):
    """A case of a kernel, in a file."""

    title: str
    file: str
    case: str


def rewritten(text: str) -> str:
    """README with the blocks of today.

    Raises:
        ValueError: a block is of no name that is known, or does not end.
    """
    if len(MARKERS.findall(text)) != 2 * len(BLOCK.findall(text)):
        raise ValueError(f"{TARGET.name}: a block of `bench report` does not end")

    def block(found: re.Match[str]) -> str:
        name = found["name"]
        if name not in BLOCKS:
            known = ", ".join(BLOCKS)
            raise ValueError(f"{TARGET.name}: no block {name!r} in `bench report`; known: {known}")
        return f"<!-- bench: {name} -->\n{BLOCKS[name]()}\n<!-- /bench -->"

    return BLOCK.sub(block, text)


# ---- kinds of tables


def about(file: str) -> str:
    """The file, what made it, where, and at which commit."""
    suite = load(file)[results.KEY]
    environment = suite["environment"]
    facts = [environment["device"]]
    if "threads" in environment:
        facts.append(f"{environment['threads']} threads")
    facts += [
        environment[name].upper() for name in ("simd", "cpu_capability") if environment.get(name)
    ]
    facts.append(f"torch {environment['torch']}")
    commit = environment.get("commit")
    facts.append(f"commit {commit[:7]}" if commit else "the commit was not kept")
    return f"`{suite['command']}`: {', '.join(facts)} ([{file}.json]({FOLDER}/{file}.json))."


def times(kernel: str, columns: Sequence[Column], *, memory: bool = False) -> str:
    """Medians, one variant a row, with the peak memory of each; the ceilings last."""
    found: dict[str, dict[int, Row]] = {}
    for number, column in enumerate(columns):
        rows = [row for row in rows_of(column.file) if row.kernel == kernel]
        for row in plots.best_mode([row for row in rows if row.case == column.case]):
            found.setdefault(AMOUNT.sub("", row.variant), {})[number] = row
    if len({number for rows in found.values() for number in rows}) != len(columns):
        raise ValueError(f"{kernel}: a case of {[column.case for column in columns]} has no row")
    ordered = sorted(found.items(), key=lambda item: rank(next(iter(item[1].values()))))

    def cell(row: Row | None) -> str:
        if row is None:
            return ""
        text = table.milliseconds(row.info["median_ms"])
        if moved := AMOUNT.search(row.variant):
            return f"{text} for {moved[1]}"
        peak = row.info["peak_megabytes"]
        return text if peak is None or not memory else f"{text}, {peak:.0f} MB"

    return markdown(
        ["", *(column.title for column in columns)],
        [[name, *(cell(rows.get(n)) for n in range(len(columns)))] for name, rows in ordered],
    )


def rank(row: Row) -> tuple[bool, bool]:
    """Ours first, ceilings last."""
    return row.info["is_ceiling"], not row.info["ours"]


def figures(file: str, names: dict[str, str]) -> str:
    """A job's runs, one a row, after what made the file; names: of a metric, in the table."""
    rows = [
        [row.variant, *(number(row.info["metrics"].get(name)) for name in names)]
        for row in rows_of(file)
    ]
    return "\n".join([about(file), "", markdown(["", *names.values()], rows)])


def peak_memory() -> str:
    (row,) = rows_of("linear_peak_memory_cpu")
    names = {
        "peak_megabytes": "peak, MB",
        "gradients_megabytes": "gradients, MB",
        "beyond_gradients_megabytes": "beyond them, MB",
        "logits_megabytes": "logits, MB",
    }
    cells = [number(row.info["metrics"][name]) for name in names]
    return markdown(["", *names.values()], [[row.case, *cells]])


def losses() -> str:
    """Ours, verl's, and how many times faster, on both machines and with caches of both kinds."""
    rows = []
    for kernel in LOSSES:
        cells = []
        here = [row for row in rows_of(AVX2) if (row.kernel, row.case) == (kernel, LOSS_CASE)]
        for mode in ("sustained", "cold"):
            own, verl = (
                next(row.info["median_ms"] for row in here if (row.variant, row.mode) == key)
                for key in (("powerkernels", mode), ("verl", mode))
            )
            cells.append((own, verl, verl / own))
        for mode in ("repeated", "interleaved"):
            (row,) = (
                row
                for row in rows_of("policy_loss_cpu")
                if (row.kernel, row.mode) == (kernel, mode)
            )
            metrics = row.info["metrics"]
            cells.append((row.info["median_ms"], metrics["verl_ms"], metrics["times_faster"]))
        texts = [f"{own:.3g} and {verl:.3g} ms: {factor:.2g} ×" for own, verl, factor in cells]
        rows.append([f"`{kernel}`", *texts])
    titles = ["AVX2, sustained", "AVX2, cold", "AVX-512, repeated", "AVX-512, interleaved"]
    return markdown(["ours and verl's", *titles], rows)


# ---- text


def load(file: str) -> dict[str, Any]:
    return results.load(plots.RESULTS / f"{file}.json")


def rows_of(file: str) -> list[Row]:
    return list(results.rows_of(load(file)))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def number(value: float | None) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1e3 else f"{value:.0f}"
    return str(value)


BLOCKS: dict[str, Callable[[], str]] = {
    "files": lambda: "\n".join(
        f"- {about(file)}" for file in (AVX2, AVX512, "policy_loss_cpu", "linear_peak_memory_cpu")
    ),
    "score_tokens": lambda: times(
        "score_tokens",
        [
            Column("AVX2, 32 rows, float32", AVX2, "Qwen2.5-1.5B, 32 rows, float32"),
            Column("AVX2, 128 rows, bfloat16", AVX2, "Qwen2.5-1.5B, 128 rows, bfloat16"),
            Column("AVX-512, 512 rows, float32", AVX512, "Qwen2.5-1.5B, 512 rows, float32"),
            Column("AVX-512, 512 rows, bfloat16", AVX512, "Qwen2.5-1.5B, 512 rows, bfloat16"),
        ],
    ),
    "score_tokens_fwd_bwd": lambda: times(
        "score_tokens_fwd_bwd",
        [
            Column("AVX2, 32 rows, float32", AVX2, "Qwen2.5-1.5B, 32 rows, float32"),
            Column("AVX2, 32 rows, bfloat16", AVX2, "Qwen2.5-1.5B, 32 rows, bfloat16"),
            Column("AVX-512, 512 rows, float32", AVX512, "Qwen2.5-1.5B, 512 rows, float32"),
            Column("AVX-512, 512 rows, bfloat16", AVX512, "Qwen2.5-1.5B, 512 rows, bfloat16"),
        ],
        memory=True,
    ),
    "linear_score_tokens_fwd_bwd": lambda: times(
        "linear_score_tokens_fwd_bwd",
        [
            Column("AVX2, 64 rows, float32", AVX2, "SmolLM2-135M, 64 rows, float32"),
            Column("AVX-512, 512 rows, float32", AVX512, "SmolLM2-135M, 512 rows, float32"),
            Column("AVX-512, 512 rows, bfloat16", AVX512, "SmolLM2-135M, 512 rows, bfloat16"),
        ],
        memory=True,
    ),
    "linear_score_tokens at 7B": peak_memory,
    "losses": losses,
    "sampler": lambda: figures(
        "sampler_cpu",
        {
            "seconds_per_prompt": "seconds a prompt",
            "prompts": "prompts",
            "model_steps": "model steps",
            "decoded_tokens": "tokens decoded",
            "kept_tokens": "kept",
            "acceptance_rate": "acceptance",
            "lane_occupancy": "lanes busy",
            "peak_memory_mb": "peak memory, MiB",
        },
    ),
    "public sampler": lambda: figures(
        "public_sampler_cpu",
        {
            "seconds_per_prompt": "seconds a prompt",
            "seconds_per_kept_token": "seconds a token kept",
            "times_faster_per_prompt": "times faster, a prompt",
            "standard_error_of_times_faster_per_prompt": "its standard error",
            "times_faster_per_kept_token": "times faster, a token kept",
        },
    ),
    "latency": lambda: figures(
        "sampler_latency_cpu",
        {
            "seconds_per_prompt": "seconds a prompt",
            "model_steps": "model steps",
            "used_tokens": "tokens used",
            "decoded_tokens": "tokens decoded",
        },
    ),
    "revision": lambda: figures(
        "sampler_revision_cpu",
        {
            "seconds": "seconds",
            "model_seconds": "in the model's steps",
            "model_steps": "model steps",
            "tokens_per_second": "tokens decoded a second",
            "mean_log_likelihood": "mean log-likelihood",
        },
    ),
    "law": lambda: figures(
        "public_law_cpu",
        {
            "draws": "draws",
            "same_law_chi2": "χ², the same law",
            "same_law_degrees_of_freedom": "degrees of freedom",
            "same_law_p_value": "p",
            "power_law_chi2": "χ², p^(1/temp)",
            "power_law_degrees_of_freedom": "degrees of freedom",
            "power_law_p_value": "p",
        },
    ),
}
