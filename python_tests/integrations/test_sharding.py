"""Jobs in parts: the samples of one call, in order; resumed; bad rows; other settings refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import powerkernels
from powerkernels import PowerSample, PowerSampler, PowerSamplingConfig
from powerkernels.cli import main
from powerkernels.integrations import sharding
from powerkernels.integrations.sharding import (
    SamplerFactory,
    SamplingJob,
    plan_job,
    run_rank,
    scan_prompts,
)
from python_tests.integrations.job_samplers import Watched
from python_tests.tiny_model import CHAT_TEMPLATE, save_tiny_model

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

ROOT = Path(powerkernels.__file__).parents[1]
CONFIG = PowerSamplingConfig(
    alpha=2.0, max_new_tokens=6, block_size=3, num_mcmc_steps=2, seed=1, num_lanes=3
)
# Equal prompts in different parts, and a chat.
PROMPTS: list[Any] = ["one", "two three", "one", "four five one two", "one", "two three", "three"]
PROMPTS += [[{"role": "user", "content": "five"}], "four", "one two"]
FAST = ["--max-new-tokens", "6", "--block-size", "3", "--num-mcmc-steps", "2", "--alpha", "2"]
FAST += ["--seed", "1", "--num-lanes", "3", "--threads", "1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("chat") / "model", template=CHAT_TEMPLATE))


@pytest.fixture(scope="module")
def plain(model: str) -> list[PowerSample]:
    """What one call of the sampler draws for all of PROMPTS, two samples each."""
    return SamplerFactory(model, CONFIG)().sample(as_chats(PROMPTS), num_samples=2)


def as_chats(prompts: list[Any]) -> list[Any]:
    return [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]


def write_jsonl(path: Path, prompts: list[Any] = PROMPTS) -> Path:
    rows = [{"prompt": p} if isinstance(p, str) else {"messages": p} for p in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, prompts: list[Any] = PROMPTS, rows_per_group: int = 4) -> Path:
    rows = [
        {"prompt": p, "messages": None} if isinstance(p, str) else {"prompt": None, "messages": p}
        for p in prompts
    ]
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=rows_per_group)
    return path


def job_of(prompts: Path, output: Path, model: str, **changes: Any) -> SamplingJob:
    values: dict[str, Any] = dict(model=model, config=CONFIG, num_samples=2, rows_per_part=3)
    return plan_job(scan_prompts(prompts), output, **(values | changes))


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return parquet.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same_samples(records: list[dict[str, Any]], samples: list[PowerSample]) -> None:
    places = [(record["prompt_index"], record["sample_index"]) for record in records]
    assert places == [(sample.prompt_index, sample.sample_index) for sample in samples]
    for record, sample in zip(records, samples, strict=True):
        assert record["tokens"] == sample.tokens
        assert record["text"] == sample.text
        assert torch.equal(torch.tensor(record["log_prob"]), sample.log_prob)  # the same bits
        assert record["log_likelihood"] == sample.log_likelihood
        assert record["decoded_tokens"] == sample.decoded_tokens
        assert record["error"] is None


# ---- the same samples, however the work is shared


@pytest.mark.parametrize("output_name", ["out.jsonl", "out.parquet"])
@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_ranks_draw_what_one_call_draws(
    model: str,
    plain: list[PowerSample],
    tmp_path: Path,
    write: Callable[[Path], Path],
    output_name: str,
) -> None:
    prompts = write(tmp_path / ("in.jsonl" if write is write_jsonl else "in.parquet"))
    job = job_of(prompts, tmp_path / output_name, model)
    make = SamplerFactory(model, job.config)
    assert job.num_parts == 4
    assert run_rank(job, make, rank=1, world_size=2) is None
    assert not job.output.exists()
    assert run_rank(job, make, rank=0, world_size=2) == (10, 0)
    records = read(job.output)
    assert_same_samples(records, plain)
    assert [r["messages"] or r["prompt"] for r in records[::2]] == PROMPTS


@pytest.mark.parametrize(("world_size", "rows_per_part"), [(1, 10), (1, 1), (3, 2), (4, 3)])
def test_no_byte_depends_on_parts_or_ranks(
    model: str, tmp_path: Path, world_size: int, rows_per_part: int
) -> None:
    prompts = write_jsonl(tmp_path / "in.jsonl")
    one = job_of(prompts, tmp_path / "one.jsonl", model)
    run_rank(one, SamplerFactory(model, CONFIG))
    other = job_of(prompts, tmp_path / "other.jsonl", model, rows_per_part=rows_per_part)
    for rank in reversed(range(world_size)):
        run_rank(other, SamplerFactory(model, CONFIG), rank=rank, world_size=world_size)
    assert other.output.read_bytes() == one.output.read_bytes()


def test_lanes_are_those_of_one_call(model: str, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, num_lanes=None)
    prompts = write_jsonl(tmp_path / "in.jsonl")
    job = job_of(prompts, tmp_path / "out.jsonl", model, config=config, rows_per_part=1)
    make = SamplerFactory(model, job.config)
    run_rank(job, make)
    sampler = SamplerFactory(model, config)()
    assert_same_samples(read(job.output), sampler.sample(as_chats(PROMPTS), num_samples=2))
    assert job.config.num_lanes == sampler.stats.num_lanes == 16


# ---- bad rows

BAD_LINES: dict[str, tuple[bytes, str]] = {
    "no prompt": (b'{"text": "one"}', 'expected an object with "prompt"'),
    "no object": (b"[1, 2]", "expected an object"),
    "not JSON": (b'{"prompt"', "not JSON"),
    "too deep": (b"[" * 100_000, "not JSON"),
    "not UTF-8": (b'{"prompt": "\xff"}', "not UTF-8 text"),
    "half a surrogate": (b'{"prompt": "one \\ud800"}', "cannot be written as UTF-8"),
    "empty": (b'{"prompt": " "}', "empty"),
    "null": (b'{"prompt": null}', "expected an object"),
    "number": (b'{"prompt": 7}', "expected an object"),
    "bad messages": (b'{"messages": [{"role": "user"}]}', "role"),
    "too long": (json.dumps({"prompt": "one " * 80}).encode(), "context of 64 tokens"),
}


@pytest.mark.parametrize("output_name", ["out.jsonl", "out.parquet"])
def test_bad_rows_carry_their_error_and_the_others_go_on(
    model: str, plain: list[PowerSample], tmp_path: Path, output_name: str
) -> None:
    good = write_jsonl(tmp_path / "good.jsonl").read_bytes().splitlines()
    bad = [line for line, _ in BAD_LINES.values()]
    # A good row, then a bad one, and so on; blank lines are no rows.
    mixed = [line for pair in zip(good, bad, strict=False) for line in (*pair, b"")] + bad[10:]
    (tmp_path / "in.jsonl").write_bytes(b"\r\n".join(mixed))
    job = job_of(tmp_path / "in.jsonl", tmp_path / output_name, model)
    assert run_rank(job, SamplerFactory(model, CONFIG)) == (21, 11)
    records = read(job.output)
    assert [r["prompt_index"] for r in records] == sorted(r["prompt_index"] for r in records)
    errors = [record for record in records if record["error"] is not None]
    for record, (_, message) in zip(errors, BAD_LINES.values(), strict=True):
        assert message in record["error"]
        assert record["error"].startswith(f"row {record['prompt_index']}: ")
        assert record["tokens"] is None
    of_good = [r | {"prompt_index": r["prompt_index"] // 2} for r in records if not r["error"]]
    assert_same_samples(of_good, plain)


def test_bad_rows_of_parquet(model: str, tmp_path: Path) -> None:
    columns = {
        "prompt": ["one", None, "", "two"],
        "messages": [None, None, None, None],
        "id": "abcd",
    }
    table = pa.table({name: list(values) for name, values in columns.items()})
    parquet.write_table(table, tmp_path / "in.parquet", row_group_size=3)
    job = job_of(tmp_path / "in.parquet", tmp_path / "out.jsonl", model, num_samples=1)
    assert run_rank(job, SamplerFactory(model, CONFIG)) == (4, 2)
    assert [record["error"] is None for record in read(job.output)] == [True, False, False, True]


def test_a_template_that_raises_is_the_error_of_its_row(tmp_path: Path) -> None:
    template = "{% if m is undefined and messages[0]['content'] == 'two' %}"
    template += "{{ raise_exception('not two') }}{% endif %}one"
    folder = str(save_tiny_model(tmp_path / "model", template=template))
    prompts = write_jsonl(tmp_path / "in.jsonl", ["one", "two", "three"])
    job = job_of(prompts, tmp_path / "out.jsonl", folder, num_samples=1)
    assert run_rank(job, SamplerFactory(folder, CONFIG)) == (3, 1)
    assert [record["error"] for record in read(job.output)] == [None, "row 1: not two", None]


def test_what_is_wrong_with_every_row_is_no_error_of_a_row(tmp_path: Path) -> None:
    folder = str(save_tiny_model(tmp_path / "model", template=None))
    prompts = write_jsonl(tmp_path / "in.jsonl", ["one", "two"])
    job = job_of(prompts, tmp_path / "out.jsonl", folder, chat=True)
    with pytest.raises(ValueError, match="no chat template"):
        run_rank(job, SamplerFactory(folder, CONFIG))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.jsonl", b"\n \n", "holds no prompt"),
        ("in.parquet", b"PAR1", "is not Parquet"),
        ("in.txt", None, "cannot read"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"file: .*{message}"):
        scan_prompts(tmp_path / name)


def test_parquet_without_a_column_of_prompts(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": ["one"]}), tmp_path / "in.parquet")
    with pytest.raises(ValueError, match='must have a column "prompt" or "messages", got text'):
        scan_prompts(tmp_path / "in.parquet")


def test_lines_of_text(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_bytes("one\r\n\n  two\u2028ünï\none".encode())
    rows = scan_prompts(tmp_path / "in.txt").rows(0, 3)
    assert [(r.number, r.prompt, r.repeat) for r in rows] == [
        (0, "one", 0),
        (1, "  two\u2028ünï", 0),
        (2, "one", 1),
    ]


# ---- interrupted, and resumed


@pytest.mark.parametrize("failure", ["interrupt", "error"])
@pytest.mark.parametrize("output_name", ["out.jsonl", "out.parquet"])
def test_interrupted_job_goes_on_where_it_was(
    model: str, plain: list[PowerSample], tmp_path: Path, failure: str, output_name: str
) -> None:
    prompts = write_jsonl(tmp_path / "in.jsonl")
    job = job_of(prompts, tmp_path / output_name, model)
    # In the third part: rows 6, 7 and 8.
    make = Watched(SamplerFactory(model, CONFIG), tmp_path / "log", "five", failure)
    with pytest.raises(KeyboardInterrupt if failure == "interrupt" else RuntimeError):
        run_rank(job, make)
    assert not job.output.exists()
    assert job.missing_parts() == [2, 3]
    assert run_rank(job, make) == (10, 0)
    assert_same_samples(read(job.output), plain)
    taken_up = make.prompts()
    # The part that the failure hit is taken up again, and nothing else.
    assert taken_up["three"] == taken_up["five"] == taken_up["four"] == 2
    assert sum(taken_up.values()) == len(PROMPTS) + 3
    assert sorted(entry.name for entry in job.folder.iterdir()) == [
        "manifest.json",
        *(job.part_path(part).name for part in range(4)),
    ]


def test_progress_of_a_resumed_job(model: str, tmp_path: Path) -> None:
    job = job_of(write_jsonl(tmp_path / "in.jsonl"), tmp_path / "out.jsonl", model)
    job.begin()
    assert job.progress(9.0, 0) == "0/4 parts | 0/10 prompts"
    for part in (0, 3):
        job.part_path(part).touch()
    # Both were there before, or one; of what was left then a third took a minute.
    assert job.progress(60.0, 2) == "2/4 parts | 6/10 prompts"
    assert job.progress(60.0, 1) == "2/4 parts | 6/10 prompts | about 2:00 left"


def test_finished_job_is_left_as_it_is(model: str, tmp_path: Path) -> None:
    job = job_of(write_jsonl(tmp_path / "in.jsonl"), tmp_path / "out.jsonl", model)
    run_rank(job, SamplerFactory(model, CONFIG))
    before = job.output.stat().st_mtime_ns

    def nothing_to_sample() -> PowerSampler:
        raise AssertionError

    assert run_rank(job, nothing_to_sample) == (10, 0)
    assert job.output.stat().st_mtime_ns == before


def test_what_a_dead_worker_left_is_no_part(model: str, tmp_path: Path) -> None:
    job = job_of(write_jsonl(tmp_path / "in.jsonl"), tmp_path / "out.jsonl", model)
    job.begin()
    (job.folder / f".{job.part_path(0).name}.0123").write_text('{"prompt_index": 0, "pro')
    assert run_rank(job, SamplerFactory(model, CONFIG)) == (10, 0)
    assert len(read(job.output)) == 20
    assert not list(job.folder.glob(".*"))


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")

    def fail(file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "no space left on device")

    with pytest.raises(OSError, match="no space"):
        sharding.write_atomically(tmp_path / "file", fail)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_parts_stay_as_they_were_begun(model: str, tmp_path: Path) -> None:
    prompts = write_jsonl(tmp_path / "in.jsonl")
    job_of(prompts, tmp_path / "out.jsonl", model).begin()
    job = job_of(prompts, tmp_path / "out.jsonl", model, rows_per_part=None, num_workers=7)
    assert job.rows_per_part == 3
    fresh = job_of(prompts, tmp_path / "new.jsonl", model, rows_per_part=None, num_workers=7)
    assert fresh.rows_per_part == 2


# ---- another job's output

CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "alpha": (dict(config=dataclasses.replace(CONFIG, alpha=3.0)), "config.alpha was 2.0 and is 3"),
    "seed": (dict(config=dataclasses.replace(CONFIG, seed=2)), "config.seed was 1 and is 2"),
    "samples": (dict(num_samples=3), "num_samples was 2 and is 3"),
    "dtype": (dict(dtype="bfloat16"), "dtype was 'auto' and is 'bfloat16'"),
    "method": (dict(method="plain"), "method was 'power' and is 'plain'"),
    "engine": (dict(engine="vllm"), "engine was 'lanes' and is 'vllm'"),
    "chat": (dict(chat=False), "chat was None and is False"),
    "parts": (dict(rows_per_part=4), "rows_per_part was 3 and is 4"),
}


@pytest.fixture
def begun(model: str, tmp_path: Path) -> SamplingJob:
    """A job with one part of two."""
    prompts = write_jsonl(tmp_path / "in.jsonl", PROMPTS[:4])
    job = job_of(prompts, tmp_path / "out.jsonl", model)
    run_rank(job, SamplerFactory(model, CONFIG), rank=0, world_size=2)
    assert job.missing_parts() == [1]
    return job


@pytest.mark.parametrize(("changes", "message"), CHANGES.values(), ids=CHANGES)
def test_other_settings_are_refused(
    begun: SamplingJob, model: str, changes: dict[str, Any], message: str
) -> None:
    job = job_of(begun.prompts.path, begun.output, model, **changes)
    with pytest.raises(ValueError, match=rf"output: .*out\.jsonl' was begun with .*{message}"):
        run_rank(job, SamplerFactory(model, job.config))
    assert begun.missing_parts() == [1]


def test_other_prompts_model_or_version_are_refused(
    begun: SamplingJob, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "in.jsonl", PROMPTS[1:5])
    with pytest.raises(ValueError, match="input was"):
        job_of(begun.prompts.path, begun.output, model).begin()
    write_jsonl(tmp_path / "in.jsonl", PROMPTS[:4])

    moved = shutil.copytree(model, tmp_path / "moved")
    job_of(begun.prompts.path, begun.output, str(moved)).begin()  # the same, elsewhere
    weights = moved / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="model was"):
        job_of(begun.prompts.path, begun.output, str(moved)).begin()

    monkeypatch.setattr(powerkernels, "__version__", "9.9")
    with pytest.raises(ValueError, match=r"powerkernels was .* and is '9.9'"):
        job_of(begun.prompts.path, begun.output, model).begin()


def test_settings_of_a_job_that_has_no_samples_yet_may_change(model: str, tmp_path: Path) -> None:
    prompts = write_jsonl(tmp_path / "in.jsonl")
    first = job_of(prompts, tmp_path / "out.jsonl", model)
    first.begin()
    second = job_of(prompts, tmp_path / "out.jsonl", model, num_samples=1)
    second.begin()
    # A worker of the first that is still there does not write among the second's.
    sampler = SamplerFactory(model, CONFIG)()
    with pytest.raises(ValueError, match="not this job's any more"):
        sharding.run_part(first, 0, sampler)
    assert run_rank(second, SamplerFactory(model, CONFIG)) == (10, 0)


def test_a_file_of_something_else_is_refused(model: str, tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("precious")
    job = job_of(write_jsonl(tmp_path / "in.jsonl"), tmp_path / "out.jsonl", model)
    with pytest.raises(ValueError, match=r"output: .*out\.jsonl' exists, and no .*manifest"):
        run_rank(job, SamplerFactory(model, CONFIG))
    assert job.output.read_text() == "precious"


@pytest.mark.parametrize("content", ["{", "[]", '{"settings": 1}'])
def test_damaged_manifest(begun: SamplingJob, model: str, content: str) -> None:
    begun.manifest.write_text(content)
    with pytest.raises(ValueError, match="is no manifest"):
        job_of(begun.prompts.path, begun.output, model)


def test_bad_arguments(model: str, tmp_path: Path) -> None:
    prompts = write_jsonl(tmp_path / "in.jsonl")
    with pytest.raises(ValueError, match="output: expected a name that ends in"):
        job_of(prompts, tmp_path / "out.csv", model)
    with pytest.raises(ValueError, match="engine must be one of lanes, vllm, got 'hands'"):
        job_of(prompts, tmp_path / "out.jsonl", model, engine="hands")
    with pytest.raises(ValueError, match="engine must be one of"):
        SamplerFactory(model, CONFIG, engine="hands")


# ---- the command


def run(*argv: str) -> int:
    try:
        return main(argv)
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.mark.slow
def test_torchrun(model: str, plain: list[PowerSample], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in.jsonl")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    sample = ["-m", "powerkernels.cli", "sample", "-f", "in.jsonl", "-o", "out.jsonl", "-n", "2"]
    done = subprocess.run(
        [*launch, *sample, "--model", model, "--rows-per-part", "3", *FAST],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},  # a checkout need not be installed
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "10 prompts" in done.stderr
    assert_same_samples(read(tmp_path / "out.jsonl"), plain)


def test_command_of_each_rank(
    model: str,
    plain: list[PowerSample],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    restore_threads: None,
) -> None:
    prompts = write_parquet(tmp_path / "in.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    argv = ["sample", "-f", str(prompts), "-o", "out.parquet", "-n", "2", "--model", model, *FAST]
    for rank, said in (("0", ""), ("1", "out.parquet: 10 prompts\n")):
        monkeypatch.setenv("RANK", rank)
        assert run(*argv, "--rows-per-part", "3") == 0
        assert capsys.readouterr().err == said
    assert_same_samples(read(tmp_path / "out.parquet"), plain)
    assert run(*argv, "--alpha", "3") == 2
    error = capsys.readouterr().err
    assert error.startswith("powerkernels: error: output: ")
    assert error.count("\n") == 1


BAD_COMMANDS = {
    "no file": (["one", "-o", "out.jsonl"], "--file"),
    "standard input": (["-f", "-", "-o", "out.jsonl"], "--file"),
    "prompt and file": (["one", "-f", "in.jsonl", "-o", "out.jsonl"], "PROMPT"),
    "no output": (["-f", "in.jsonl"], "--output"),
    "json": (["-f", "in.jsonl", "-o", "out.jsonl", "--json"], "--json"),
    "kind of output": (["-f", "in.jsonl", "-o", "out.csv"], "output: expected a name"),
    "folder": (["-f", "in.jsonl", "-o", "none/out.jsonl"], "--output"),
    "methods": (["-f", "in.jsonl", "-o", "out.jsonl", "--methods", "plain,power"], "--methods"),
    "workers": (["-f", "in.jsonl", "-o", "out.jsonl", "--workers", "2"], "--workers"),
    "no workers": (["-f", "in.jsonl", "-o", "out.jsonl", "--workers", "0"], "--workers"),
    "ray too": (["-f", "in.jsonl", "-o", "out.jsonl", "--ray"], "--ray"),
    "missing file": (["-f", "no.jsonl", "-o", "out.jsonl"], "no.jsonl"),
    "missing model": (["-f", "in.jsonl", "-o", "out.jsonl", "--model", "./no"], "./no"),
    "alpha": (["-f", "in.jsonl", "-o", "out.jsonl", "--alpha", "-1"], "alpha"),
}


@pytest.mark.parametrize(("argv", "names"), BAD_COMMANDS.values(), ids=BAD_COMMANDS)
def test_bad_commands_under_torchrun(
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    names: str,
) -> None:
    write_jsonl(tmp_path / "in.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_refused(["sample", "--model", model, *argv], names, capsys)


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("-1", "2"), ("one", "2"), ("0", "0")])
def test_bad_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str, size: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    assert_refused(["sample", "one"], "RANK and WORLD_SIZE", capsys)


@pytest.mark.parametrize(
    "argv", [["--workers", "2"], ["--rows-per-part", "2"], ["--engine", "vllm"]]
)
def test_options_of_a_job_without_one(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(["sample", "one", *argv], argv[0], capsys)


def test_parquet_without_a_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_parquet(tmp_path / "in.parquet")
    assert_refused(["sample", "-f", str(path)], "Parquet is for a job", capsys)


def assert_refused(argv: list[str], names: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("powerkernels: error: ")
    assert names in lines[0]
