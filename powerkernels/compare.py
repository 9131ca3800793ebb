"""Plain, low-temperature and power samples of the same prompts: run them, lay them out as text."""

from __future__ import annotations

import dataclasses
import math
import time
import unicodedata
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from powerkernels import PowerSample, PowerSamplingConfig

METHODS = ("plain", "low-temperature", "power")

SIDE_BY_SIDE_WIDTH = 100  # columns of text below about 30 characters are no pleasure to read
_SEPARATOR = " | "
_HARMLESS = "\n\t\u200c\u200d"  # the last two join letters and emoji


@dataclasses.dataclass
class MethodRun:
    """All samples of one method, in the order in which they finished."""

    method: str
    config: PowerSamplingConfig
    samples: list[PowerSample] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False


def method_config(method: str, config: PowerSamplingConfig) -> PowerSamplingConfig:
    """The settings that make `PowerSampler` the given method, with the alpha of `config`.

    plain is p itself; low-temperature draws each token from q ∝ p^alpha and leaves it there; power
    is `config`.
    """
    if method == "power":
        return config
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    alpha = 1.0 if method == "plain" else config.alpha
    return dataclasses.replace(config, alpha=alpha, num_mcmc_steps=0, proposal_temperature=None)


def run_method(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    *,
    method: str,
    config: PowerSamplingConfig,
    num_samples: int = 1,
    progress: bool | None = None,
    on_sample: Callable[[MethodRun, PowerSample], None] | None = None,
) -> MethodRun:
    """Sample every prompt with one method.

    Args:
        model, tokenizer, prompts, num_samples, progress: as for `PowerSampler`.
        method: one of `METHODS`.
        config: the settings of the power method; the others are derived by `method_config`.
        on_sample: called as each sample finishes, `run.seconds` being the time since the method
            began.

    Returns:
        The run; after a KeyboardInterrupt, what was finished, with `interrupted` set.
    """
    from powerkernels import PowerSampler

    run = MethodRun(method, method_config(method, config))
    sampler = PowerSampler(model, tokenizer, config=run.config)
    start = time.perf_counter()
    try:
        for sample in sampler.iter_samples(prompts, num_samples, progress=progress):
            run.samples.append(sample)
            run.seconds = time.perf_counter() - start
            if on_sample is not None:
                on_sample(run, sample)
        run.interrupted = bool(sampler.stats.interrupted)
    except KeyboardInterrupt:
        run.interrupted = True
    run.seconds = time.perf_counter() - start
    return run


def sample_facts(sample: PowerSample, config: PowerSamplingConfig) -> list[tuple[str, str]]:
    """(name, value) of what is worth comparing between samples."""
    return [
        ("log-likelihood", f"{sample.log_likelihood:.1f} nats"),
        ("confidence", f"{sample.confidence:.2f} nats"),
        ("acceptance", _rate(sample.acceptance_rate) if config.num_mcmc_steps else "-"),
        ("cost", f"{_per_kept([sample]):.1f} decoded/kept"),
        ("length", f"{len(sample.tokens)} tokens, {sample.finish_reason}"),
    ]


def run_facts(run: MethodRun) -> list[tuple[str, str]]:
    """(name, value) of a whole run: means over its samples."""
    samples = run.samples
    if not samples:
        return [("samples", "0")]
    return [
        ("samples", str(len(samples))),
        ("log-likelihood", f"{_mean([s.log_likelihood for s in samples]):.1f} nats"),
        ("confidence", f"{_mean([s.confidence for s in samples]):.2f} nats"),
        (
            "acceptance",
            _rate(_mean([s.acceptance_rate for s in samples]))
            if run.config.num_mcmc_steps
            else "-",
        ),
        ("cost", f"{_per_kept(samples):.1f} decoded/kept"),
        ("time", f"{run.seconds:.1f} s"),
        ("per sample", f"{run.seconds / len(samples):.2f} s"),
    ]


def prompt_text(prompt: Any) -> str:
    """What a person recognises a prompt by: the text, or the last message of a chat."""
    if isinstance(prompt, str):
        return prompt
    if prompt and isinstance(prompt[-1], dict):
        return str(prompt[-1].get("content", ""))
    return " ".join(map(str, prompt))


def compare_prompt(prompt: Any, prompt_index: int, runs: Sequence[MethodRun], width: int) -> str:
    """Every sample of one prompt, a row of methods for each sample index."""
    parts = [f"prompt {prompt_index}: {_one_line(prompt_text(prompt), width - 12)}"]
    mine = [[s for s in run.samples if s.prompt_index == prompt_index] for run in runs]
    indices = sorted({s.sample_index for samples in mine for s in samples})
    for index in indices:
        columns = []
        for run, samples in zip(runs, mine, strict=True):
            for sample in samples:
                if sample.sample_index == index:
                    title = run.method if len(indices) == 1 else f"{run.method}, sample {index}"
                    text = (
                        sample.text
                        if sample.text is not None
                        else " ".join(map(str, sample.tokens))
                    )
                    columns.append(
                        (title, printable(text).strip(), sample_facts(sample, run.config))
                    )
        parts.append(layout(columns, width))
    return "\n\n".join(parts)


def compare_runs(runs: Sequence[MethodRun], width: int) -> str:
    """The means of each method."""
    return layout([(run.method, "", run_facts(run)) for run in runs], width)


def layout(columns: Sequence[tuple[str, str, list[tuple[str, str]]]], width: int) -> str:
    """Columns of (title, text, facts) beside one another, or below where `width` is too small."""
    if len(columns) > 1 and width >= SIDE_BY_SIDE_WIDTH:
        column_width = (width - len(_SEPARATOR) * (len(columns) - 1)) // len(columns)
        blocks = [_column(*column, column_width) for column in columns]
        rows = []
        for part in zip(
            *blocks, strict=True
        ):  # title, text, facts: each as high as its highest column
            height = max(len(lines) for lines in part)
            padded = [lines + [""] * (height - len(lines)) for lines in part]
            for cells in zip(*padded, strict=True):
                rows.append(_SEPARATOR.join(_pad(cell, column_width) for cell in cells).rstrip())
        return "\n".join(rows)
    return "\n\n".join(
        "\n".join(line for part in _column(*column, width) for line in part) for column in columns
    )


def _column(
    title: str, text: str, facts: list[tuple[str, str]], width: int
) -> tuple[list[str], list[str], list[str]]:
    name_width = max(len(name) for name, _ in facts)
    fact_lines = [
        line for name, value in facts for line in wrap(f"{name:<{name_width}}  {value}", width)
    ]
    text_lines = [*wrap(text, width), ""] if text else []
    return [title, "-" * width], text_lines, fact_lines


def wrap(text: str, width: int) -> list[str]:
    """Break text into lines of at most `width` terminal cells, at spaces where possible."""
    lines = []
    for paragraph in text.expandtabs(4).split("\n"):
        line = ""
        for word in _words(paragraph):
            if display_width(line + word.rstrip(" ")) > width and line:
                lines.append(line.rstrip(" "))
                line, word = "", word.lstrip(" ")
            while display_width(word.rstrip(" ")) > width:
                head = _head(word, width)
                lines.append(head)
                word = word[len(head) :]
            line += word
        lines.append(line.rstrip(" "))
    return lines


def _words(paragraph: str) -> list[str]:
    """The paragraph cut after every run of spaces: joined, the words are the paragraph."""
    words: list[str] = []
    for piece in paragraph.split(" "):
        words.append(piece + " ")
    words[-1] = words[-1][:-1]
    return words


def _head(word: str, width: int) -> str:
    """The longest beginning of `word` that fits; at least one character, so that wrapping ends."""
    end = 1
    while end < len(word) and display_width(word[: end + 1]) <= width:
        end += 1
    return word[:end]


def display_width(text: str) -> int:
    """Terminal cells of a text: two for a wide East Asian character, none for a combining mark."""
    return sum(
        0
        if unicodedata.category(c) in ("Mn", "Me", "Cf")
        else 2
        if unicodedata.east_asian_width(c) in "WF"
        else 1
        for c in text
    )


def printable(text: str) -> str:
    """Text that is safe on a terminal: control characters but newline and tab are spelled out."""
    return "".join(
        c if c in _HARMLESS or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else repr(c)[1:-1]
        for c in text
    )


def _pad(text: str, width: int) -> str:
    return text + " " * (width - display_width(text))


def _one_line(text: str, width: int) -> str:
    line = " ".join(printable(text).split())
    return line if len(line) <= width else line[: max(width - 3, 0)] + "..."


def _per_kept(samples: Sequence[PowerSample]) -> float:
    kept = sum(len(s.tokens) for s in samples)
    return sum(s.decoded_tokens for s in samples) / kept if kept else math.nan


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _rate(rate: float) -> str:
    return "-" if math.isnan(rate) else f"{rate:.2f}"
