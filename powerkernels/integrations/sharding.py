"""A file of prompts in, a file of samples out, part by part: what Ray and torchrun jobs share.

A job cuts the prompts into parts of consecutive rows. A worker samples a part and writes it under
its name in one rename, so that a part is there whole or not at all. A row's samples depend on the
row and the settings alone, whichever worker draws them and when: parts that are missing, after a
failure or an interrupt, are sampled by whoever comes next. When all are there they are joined.

    samples.jsonl                    all samples in the order of the prompts
    samples.jsonl.parts/
        manifest.json                the settings; a job with other settings is refused
        part-00000-of-00012.jsonl    what is done so far

Prompts and output lie where all workers see them. docs/scaling.md says how to run it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import uuid
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Protocol

from powerkernels.prompts import as_chat, prompt_of
from powerkernels.records import SAMPLE_FIELDS, sample_fields

if TYPE_CHECKING:
    import pyarrow

    from powerkernels import PowerSample, PowerSampler, PowerSamplingConfig

INPUT_FORMATS = ("text", "jsonl", "parquet")
OUTPUT_FORMATS = ("jsonl", "parquet")
ENGINES = ("lanes", "vllm")
INSTALL_PYARROW = "pip install 'powerkernels[ray]'"

# A part is what a failure can cost. The last chains of one leave lanes without a chain, so it has
# some batches of them.
MAX_ROWS_PER_PART = 128
PARTS_PER_WORKER = 4

_CHUNK = 2**20
_NO_ERROR = b'"error": null}\n'  # the end of a line


class Sampler(Protocol):
    """What a worker samples with: a `PowerSampler`, or whatever has these three."""

    tokenizer: Any

    def encode(self, prompt: Any) -> list[int]:
        """Token ids of a prompt; raises TypeError or ValueError where it cannot be sampled."""

    def iter_samples(
        self,
        prompts: Any,
        num_samples: int = 1,
        *,
        first_sample: Sequence[int] | None = None,
        progress: bool | None = None,
    ) -> Iterator[PowerSample]:
        """As `PowerSampler.iter_samples`."""


@dataclasses.dataclass(frozen=True)
class SamplerFactory:
    """Makes a sampler where it is called: a worker gets this and loads its own model.

    Args:
        model: a folder, a hub name, or smollm2.
        config: the settings.
        engine: one of `ENGINES`: "lanes" is `PowerSampler`, "vllm" is `integrations.vllm`.
        dtype: of the weights: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
        device: for the lanes: "auto", "cpu", "cuda", "cuda:1", …
        threads: of torch on a CPU; None leaves them as they are.
    """

    model: str
    config: PowerSamplingConfig
    engine: str = "lanes"
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        _check_engine(self.engine)

    def __call__(self) -> PowerSampler:
        import torch

        from powerkernels import PowerSampler
        from powerkernels.models import find_device, load_model

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        if self.engine == "vllm":
            return self._on_vllm()
        device = find_device(self.device)
        model, tokenizer = load_model(self.model, self.dtype, device, quiet=True)
        return PowerSampler(model, tokenizer, config=self.config)

    def _on_vllm(self) -> PowerSampler:
        from powerkernels.integrations.vllm import VLLMPowerSampler, load_llm
        from powerkernels.models import model_path

        llm = load_llm(model_path(self.model), dtype=self.dtype)
        return VLLMPowerSampler(llm, config=self.config)


def _check_engine(engine: str) -> None:
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")


# ---- rows in


class Row(NamedTuple):
    """A row of the prompts.

    `repeat` numbers rows with equal prompts, so that each draws samples of its own.
    """

    number: int  # in the file, from 0
    prompt: Any  # text or messages; None with an error
    error: str | None
    repeat: int


@dataclasses.dataclass(frozen=True)
class PromptFile:
    """A file of prompts that has been read through once; rows are read again when needed.

    Attributes:
        path: of the file.
        format: one of `INPUT_FORMATS`.
        fingerprint: a hash of its content.
        repeats: for each row, how many rows before it have the same prompt.
        starts: for each row, the byte at which its line begins; empty for Parquet.
    """

    path: Path
    format: str
    fingerprint: str
    repeats: array[int]
    starts: array[int]

    @property
    def num_rows(self) -> int:
        return len(self.repeats)

    def rows(self, first: int, last: int) -> list[Row]:
        """Rows first .. last - 1."""
        read = _table_rows if self.format == "parquet" else _line_rows
        numbered = enumerate(read(self, first, last), start=first)
        return [Row(i, *read_prompt(raw, i), self.repeats[i]) for i, raw in numbered]


class _Unreadable(NamedTuple):
    """In the place of a row that could not be parsed."""

    reason: str


def scan_prompts(path: Path, file_format: str | None = None) -> PromptFile:
    """Read through a file of prompts.

    Args:
        path: lines of text, JSON lines with "prompt" or "messages", or Parquet with such columns.
        file_format: one of `INPUT_FORMATS`; None goes by the file's name, text if it says nothing.

    Raises:
        ValueError: the file cannot be read, is no Parquet, or holds no prompt. A bad row is no
            error here: it carries one of its own.
    """
    by_name = {".jsonl": "jsonl", ".parquet": "parquet"}
    file_format = file_format or by_name.get(path.suffix, "text")
    repeats, starts, seen = array("q"), array("q"), Counter[bytes]()
    try:
        fingerprint = _file_hash(path)
        for index, (start, raw) in enumerate(_scan(path, file_format)):
            prompt, error = read_prompt(raw, index)
            key = hashlib.blake2b(json.dumps(prompt, sort_keys=True).encode(), digest_size=8)
            repeats.append(0 if error else seen[key.digest()])
            seen[key.digest()] += 1
            if start is not None:
                starts.append(start)
    except OSError as error:
        raise ValueError(f"file: cannot read {str(path)!r}: {error.strerror}") from error
    if not repeats:
        raise ValueError(f"file: {str(path)!r} holds no prompt")
    return PromptFile(path, file_format, fingerprint, repeats, starts)


def _file_hash(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _scan(path: Path, file_format: str) -> Iterator[tuple[int | None, Any]]:
    """(first byte of its line, what it holds) of each row."""
    if file_format == "parquet":
        file, columns = _open_table(path)
        for batch in file.iter_batches(columns=columns):
            yield from ((None, record) for record in batch.to_pylist())
        return
    with path.open("rb") as lines:
        start = 0
        for line in lines:
            if line.strip():
                yield start, _parse_line(line, file_format)
            start += len(line)


def _line_rows(prompts: PromptFile, first: int, last: int) -> Iterator[Any]:
    with prompts.path.open("rb") as lines:
        for index in range(first, last):
            lines.seek(prompts.starts[index])
            yield _parse_line(lines.readline(), prompts.format)


def _table_rows(prompts: PromptFile, first: int, last: int) -> Iterator[Any]:
    """Reads the row groups that hold the rows, and no other."""
    file, columns = _open_table(prompts.path)
    start = 0
    for group in range(file.num_row_groups):
        end = start + file.metadata.row_group(group).num_rows
        if start < last and end > first:
            table = file.read_row_group(group, columns=columns)
            low, high = max(first, start), min(last, end)
            yield from table.slice(low - start, high - low).to_pylist()
        start = end


def _open_table(path: Path) -> tuple[Any, list[str]]:
    pyarrow = _pyarrow()
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"file: {str(path)!r} is not Parquet: {error}") from error
    columns = [name for name in ("prompt", "messages") if name in file.schema_arrow.names]
    if not columns:
        raise ValueError(
            f'file: {str(path)!r} must have a column "prompt" or "messages", '
            f"got {', '.join(file.schema_arrow.names)}"
        )
    return file, columns


def _parse_line(line: bytes, file_format: str) -> Any:
    try:
        text = line.decode("utf-8").rstrip("\r\n")
        return {"prompt": text} if file_format == "text" else json.loads(text)
    except UnicodeDecodeError as error:
        return _Unreadable(f"not UTF-8 text: {error.reason}")
    except json.JSONDecodeError as error:
        return _Unreadable(f"not JSON: {error.msg}")
    except RecursionError:
        return _Unreadable("not JSON that can be read: too deep")


def read_prompt(raw: Any, index: int) -> tuple[Any, str | None]:
    """(prompt, None) or (None, error) of what row `index` holds."""
    where = f"row {index}"
    if isinstance(raw, _Unreadable):
        return None, f"{where}: {raw.reason}"
    try:
        prompt = prompt_of(raw, where)
    except ValueError as error:
        return None, str(error)
    if isinstance(prompt, str) and not prompt.strip():
        return None, f"{where}: the prompt is empty; expected some text"
    try:
        json.dumps(prompt, ensure_ascii=False).encode()
    except (UnicodeEncodeError, TypeError, ValueError) as error:
        return None, f"{where}: the prompt cannot be written as UTF-8 JSON: {error}"
    return prompt, None


# ---- samples of rows


def sample_rows(
    sampler: Sampler, rows: Sequence[Row], *, num_samples: int = 1, chat: bool | None = None
) -> list[list[dict[str, Any]]]:
    """The records of each row: `num_samples` of a good one, one with "error" of a bad one.

    Args:
        sampler: what to sample with.
        rows: prompts or errors; a prompt that the sampler refuses becomes an error too.
        num_samples: chains per prompt, >= 1.
        chat: whether text goes into the chat template; None is "where there is one".

    Raises:
        ValueError: `chat` is True and there is no template.
    """
    as_chat("", sampler.tokenizer, chat)  # what is wrong with all rows is no row's error
    records: list[list[dict[str, Any]]] = []
    good: list[tuple[Row, list[dict[str, Any]]]] = []
    encoded = []
    for row in rows:
        ids, error = _encode(sampler, row, chat)
        if error is None:
            good.append((row, [{}] * num_samples))
            encoded.append(ids)
            records.append(good[-1][1])
        else:
            fields = dict.fromkeys(("sample_index", *SAMPLE_FIELDS))
            records.append([_record(row, fields, error)])
    if good:
        samples = sampler.iter_samples(
            encoded,
            num_samples,
            first_sample=[row.repeat * num_samples for row, _ in good],
            progress=False,
        )
        for sample in samples:
            row, found = good[sample.prompt_index]
            fields = {"sample_index": sample.sample_index, **sample_fields(sample)}
            found[sample.sample_index] = _record(row, fields, None)
    return records


def _encode(sampler: Sampler, row: Row, chat: bool | None) -> tuple[list[int], str | None]:
    if row.error is not None:
        return [], row.error
    try:
        return sampler.encode(as_chat(row.prompt, sampler.tokenizer, chat)), None
    except Exception as error:  # a chat template is a program: it raises what it likes
        return [], f"row {row.number}: {' '.join(str(error).split()) or type(error).__name__}"


def _record(row: Row, fields: dict[str, Any], error: str | None) -> dict[str, Any]:
    is_text = isinstance(row.prompt, str)
    return {
        "prompt_index": row.number,
        "prompt": row.prompt if is_text else None,
        "messages": None if is_text else row.prompt,
        **fields,
        "error": error,
    }


def record_schema() -> pyarrow.Schema:
    """The Parquet schema of the records."""
    pa = _pyarrow()
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    types = {
        "prompt_index": pa.int64(),
        "prompt": pa.string(),
        "messages": pa.list_(message),
        "sample_index": pa.int64(),
        "text": pa.string(),
        "tokens": pa.list_(pa.int64()),
        "log_prob": pa.list_(pa.float32()),
        "log_likelihood": pa.float64(),
        "confidence": pa.float64(),
        "acceptance_rate": pa.float64(),
        "decoded_tokens": pa.int64(),
        "finish_reason": pa.string(),
        "error": pa.string(),
    }
    return pa.schema(list(types.items()))


# ---- the job


class JobSummary(NamedTuple):
    """A finished job."""

    num_rows: int
    num_errors: int


@dataclasses.dataclass(frozen=True)
class SamplingJob:
    """Prompts, settings and where the samples go; made by `plan_job`, the same on every worker.

    Attributes:
        prompts: the rows.
        output: the file of all samples.
        output_format: one of `OUTPUT_FORMATS`.
        config: the settings; for the lanes, `num_lanes` is the same for all parts.
        num_samples: chains per prompt.
        chat: whether text goes into the chat template; None is "where there is one".
        rows_per_part: rows that a worker samples at a time.
        settings: all that decides what the output holds, as the manifest has it.
        about: names that the manifest tells a reader, and nobody compares.
    """

    prompts: PromptFile
    output: Path
    output_format: str
    config: PowerSamplingConfig
    num_samples: int
    chat: bool | None
    rows_per_part: int
    settings: dict[str, Any]
    about: dict[str, Any]

    @property
    def folder(self) -> Path:
        return self.output.with_name(self.output.name + ".parts")

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest.json"

    @property
    def num_parts(self) -> int:
        return -(-self.prompts.num_rows // self.rows_per_part)

    def part_path(self, part: int) -> Path:
        name = f"part-{part:05d}-of-{self.num_parts:05d}.{self.output_format}"
        return self.folder / name

    def part_rows(self, part: int) -> tuple[int, int]:
        """(first row, first row behind it)."""
        first = part * self.rows_per_part
        return first, min(first + self.rows_per_part, self.prompts.num_rows)

    def missing_parts(self) -> list[int]:
        """Parts that are still to be sampled, in order."""
        if self.output.exists():
            return []
        there = {entry.name for entry in self.folder.iterdir()}
        return [part for part in range(self.num_parts) if self.part_path(part).name not in there]

    def check_output(self) -> bool:
        """Whether the manifest is there, with these settings.

        Raises:
            ValueError: there are samples of other settings, or of something else.
        """
        written = _read_manifest(self.manifest)
        if written is None and self.output.exists():
            raise ValueError(
                f"output: {str(self.output)!r} exists, and no {str(self.manifest)!r} says "
                "that it is this job's; choose another name, or delete it"
            )
        if written is None:
            return False
        different = list(_differences(written["settings"], self.settings))
        if different and (self.output.exists() or any(self.folder.glob("part-*"))):
            raise ValueError(
                f"output: {str(self.output)!r} was begun with other settings: "
                f"{'; '.join(different)}; choose another name, or delete it and "
                f"{str(self.folder)!r}"
            )
        return not different

    def begin(self) -> None:
        """Write the manifest, or hold the settings against the one that is there.

        Raises:
            ValueError: see `check_output`.
        """
        if self.check_output():
            return
        self.folder.mkdir(exist_ok=True)
        manifest = {"settings": self.settings, "about": self.about}
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        write_atomically(self.manifest, lambda file: file.write(text.encode()))

    def finish(self) -> JobSummary | None:
        """Join the parts in order; None while parts are missing.

        Workers that come here together write the same, one rename after the other.
        """
        if self.missing_parts():
            return None
        if not self.output.exists():
            parts = [self.part_path(part) for part in range(self.num_parts)]
            join = _join_tables if self.output_format == "parquet" else _join_lines
            write_atomically(self.output, lambda file: join(parts, file))
            for unfinished in self.folder.glob(".*"):  # of workers that died
                unfinished.unlink(missing_ok=True)
        return JobSummary(self.prompts.num_rows, _count_errors(self.output, self.output_format))

    def progress(self, elapsed: float, num_done_before: int) -> str:
        """A line about the parts that are there, `elapsed` seconds after the run began."""
        done = self.num_parts - len(self.missing_parts())
        rows = min(done * self.rows_per_part, self.prompts.num_rows)
        parts = [f"{done}/{self.num_parts} parts", f"{rows}/{self.prompts.num_rows} prompts"]
        if num_done_before < done:
            from powerkernels.power_sampling.progress import time_left

            share = (done - num_done_before) / (self.num_parts - num_done_before)
            parts.append(time_left(elapsed, share))
        return " | ".join(parts)


def plan_job(
    prompts: PromptFile,
    output: Path,
    *,
    model: str,
    config: PowerSamplingConfig,
    dtype: str = "auto",
    method: str = "power",
    engine: str = "lanes",
    num_samples: int = 1,
    chat: bool | None = None,
    rows_per_part: int | None = None,
    num_workers: int = 1,
) -> SamplingJob:
    """The job of sampling all prompts.

    Args:
        prompts: from `scan_prompts`.
        output: file of the samples, .jsonl or .parquet; what is done lies in a folder beside it.
        model: a folder, a hub name, or smollm2.
        config: the settings. Without `num_lanes` the lanes are as many as if all prompts were
            sampled in one call.
        dtype, method: what else tells one output from another; noted in the manifest.
        engine: one of `ENGINES`.
        num_samples, chat: as for `sample_rows`.
        rows_per_part: None is what the job was begun with, or a choice by `num_workers`.
        num_workers: workers that will share the parts.

    Raises:
        ValueError: an argument, by name.
    """
    from powerkernels import __version__
    from powerkernels.models import model_fingerprint
    from powerkernels.power_sampling.sampler import num_lanes_for

    output_format = output.suffix.removeprefix(".")
    if output_format not in OUTPUT_FORMATS:
        raise ValueError(
            f"output: expected a name that ends in .jsonl or .parquet, got {str(output)!r}"
        )
    if output_format == "parquet":
        _pyarrow()
    _check_engine(engine)
    chains_at_once = num_lanes_for(config, prompts.num_rows * num_samples)
    if engine == "lanes":
        config = dataclasses.replace(config, num_lanes=chains_at_once)
    folder = output.with_name(output.name + ".parts")
    written = _read_manifest(folder / "manifest.json")
    if rows_per_part is None:
        begun_with = (written or {"settings": {}})["settings"].get("rows_per_part")
        rows_at_once = -(-chains_at_once // num_samples)
        rows_per_part = begun_with or _rows_per_part(prompts.num_rows, num_workers, rows_at_once)
    settings = {
        "powerkernels": __version__,
        "engine": engine,
        "model": model_fingerprint(model),
        "dtype": dtype,
        "method": method,
        "config": dataclasses.asdict(config),
        "num_samples": num_samples,
        "chat": chat,
        "input": prompts.fingerprint,
        "input_format": prompts.format,
        "output_format": output_format,
        "rows_per_part": rows_per_part,
    }
    about = {"model": model, "input": str(prompts.path), "num_rows": prompts.num_rows}
    # As JSON reads it back: tuples are lists there.
    settings = json.loads(json.dumps(settings))
    return SamplingJob(
        prompts, output, output_format, config, num_samples, chat, rows_per_part, settings, about
    )


def _rows_per_part(num_rows: int, num_workers: int, rows_at_once: int) -> int:
    """Some parts for each worker, but not so small that lanes lie idle."""
    share = -(-num_rows // num_workers)
    wanted = max(-(-share // PARTS_PER_WORKER), rows_at_once)
    return min(wanted, share, MAX_ROWS_PER_PART)


def run_part(job: SamplingJob, part: int, sampler: Sampler) -> None:
    """Sample a part and write it, unless it is there already.

    Raises:
        ValueError: the manifest is that of another job.
    """
    path = job.part_path(part)
    if path.exists():
        return
    rows = job.prompts.rows(*job.part_rows(part))
    of_rows = sample_rows(sampler, rows, num_samples=job.num_samples, chat=job.chat)
    records = [record for of_row in of_rows for record in of_row]
    if not job.check_output():
        raise ValueError(
            f"output: {str(job.manifest)!r} is not this job's any more; another has begun there"
        )
    write = _write_table if job.output_format == "parquet" else _write_lines
    write_atomically(path, lambda file: write(records, file))


def run_rank(
    job: SamplingJob,
    make_sampler: Callable[[], Sampler],
    *,
    rank: int = 0,
    world_size: int = 1,
    progress: bool | None = None,
) -> JobSummary | None:
    """Sample the missing parts of one of `world_size` processes, which need not know each other.

    Args:
        job: from `plan_job`.
        make_sampler: called if there is something to sample.
        rank: the process samples parts rank, rank + world_size, …
        progress: a progress line on standard error; None shows it on a terminal only.

    Returns:
        The finished job, or None while parts of other processes are missing.

    Raises:
        ValueError: the output is that of other settings; see `SamplingJob.begin`.
    """
    from powerkernels.power_sampling.progress import ProgressLine

    job.begin()
    missing = job.missing_parts()
    mine = [part for part in missing if part % world_size == rank]
    num_done = job.num_parts - len(missing)
    line = ProgressLine(lambda elapsed: job.progress(elapsed, num_done), progress)
    try:
        if mine:
            sampler = make_sampler()
        for part in mine:
            run_part(job, part, sampler)
            line.update()
    finally:
        line.close()
    return job.finish()


# ---- files out


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file that appears under its name whole, with what an older one held or not at all."""
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with unfinished.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _write_lines(records: Iterable[dict[str, Any]], file: IO[bytes]) -> None:
    for record in records:
        file.write(json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def _write_table(records: list[dict[str, Any]], file: IO[bytes]) -> None:
    pa = _pyarrow()
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(records, schema=record_schema()), file)


def _join_lines(parts: Iterable[Path], file: IO[bytes]) -> None:
    for part in parts:
        with part.open("rb") as lines:
            while chunk := lines.read(_CHUNK):
                file.write(chunk)


def _join_tables(parts: Iterable[Path], file: IO[bytes]) -> None:
    from pyarrow import parquet

    with parquet.ParquetWriter(file, record_schema()) as writer:
        for part in parts:
            writer.write_table(parquet.ParquetFile(part).read())


def _count_errors(path: Path, file_format: str) -> int:
    if file_format == "parquet":
        from pyarrow import parquet

        column = parquet.read_table(path, columns=["error"]).column("error")
        return len(column) - column.null_count
    with path.open("rb") as lines:
        return sum(not line.endswith(_NO_ERROR) for line in lines)


def _read_manifest(path: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"output: {str(path)!r} is no manifest: {error}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("settings"), dict):
        raise ValueError(f"output: {str(path)!r} is no manifest: it has no settings")
    return manifest


def _differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """Where two settings differ, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield f"{name} was {old!r} and is {new!r}"


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"pyarrow is not installed, and Parquet needs it; get it with: {INSTALL_PYARROW}",
            name="pyarrow",
        ) from error
    return pyarrow
