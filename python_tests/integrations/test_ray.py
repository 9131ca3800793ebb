"""Jobs and stages on Ray Data: several actors, one of them killed; resumed; the same samples."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from powerkernels import PowerSampler, PowerSamplingConfig
from powerkernels.cli import main
from powerkernels.integrations import smollm2
from powerkernels.integrations.sharding import SamplerFactory, run_rank
from python_tests.integrations.job_samplers import Watched
from python_tests.integrations.test_sharding import (
    CONFIG,
    FAST,
    PROMPTS,
    as_chats,
    assert_same_samples,
    job_of,
    read,
    write_jsonl,
)
from python_tests.tiny_model import CHAT_TEMPLATE, save_tiny_model

pa = pytest.importorskip("pyarrow")
ray = pytest.importorskip("ray")

pytestmark = [
    pytest.mark.xdist_group("ray"),  # Ray starts once
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Ray's, of its own settings
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of the processes that it starts
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("chat") / "model", template=CHAT_TEMPLATE))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray on this machine, with room for two actors of one thread."""
    with contextlib.ExitStack() as stack:
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
        )
        stack.callback(ray.shutdown)
        yield


@pytest.mark.slow
def test_one_of_two_workers_dies_and_no_prompt_is_lost(cluster: None, tmp_path: Path) -> None:
    from powerkernels.integrations.ray import run_on_ray

    try:
        importlib.metadata.version(smollm2.PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{smollm2.PACKAGE} is not installed")
    config = PowerSamplingConfig(max_new_tokens=6, block_size=3, num_mcmc_steps=1, num_lanes=4)
    prompts = [f"What is {a} + {b}?" for a in (3, 4) for b in range(2, 6)]
    job = job_of(
        write_jsonl(tmp_path / "in.jsonl", prompts),
        tmp_path / "out.jsonl",
        "smollm2",
        config=config,
        num_samples=1,
        rows_per_part=2,
    )
    make = Watched(
        SamplerFactory("smollm2", job.config, threads=1), tmp_path / "log", prompts[5], "exit"
    )
    assert run_on_ray(job, make, num_workers=2, progress=False) == (8, 0)
    assert make.log.with_suffix(".failed").exists()
    assert len(make.processes()) == 3  # two, and the one that came for the dead one
    again = {prompt: count for prompt, count in make.prompts().items() if count != 1}
    assert again == {prompts[4]: 2, prompts[5]: 2}  # the part that was lost
    assert not list(job.folder.glob(".*"))

    # In order, each once, and the same bits as without all that.
    samples = SamplerFactory("smollm2", config, threads=1)().sample(as_chats(prompts))
    assert_same_samples(read(job.output), samples)
    assert [record["prompt"] for record in read(job.output)] == prompts


def test_what_ray_began_goes_on_anywhere(cluster: None, model: str, tmp_path: Path) -> None:
    from powerkernels.integrations.ray import run_on_ray

    prompts = write_jsonl(tmp_path / "in.jsonl")
    job = job_of(prompts, tmp_path / "out.parquet", model)
    make = Watched(SamplerFactory(model, CONFIG), tmp_path / "log", "four", "error")
    # The error is the worker's own.
    with pytest.raises(RuntimeError, match=r"^told to\b"):
        run_on_ray(job, make, progress=False)
    missing = job.missing_parts()
    assert 3 in missing
    assert missing != [0, 1, 2, 3]
    before = make.log.read_text()
    with pytest.raises(ValueError, match="num_samples was 2 and is 1"):
        run_on_ray(job_of(prompts, job.output, model, num_samples=1), make, progress=False)

    assert run_rank(job, make) == (10, 0)
    taken_up = [line.split(" ", 1)[1] for line in make.log.read_text()[len(before) :].splitlines()]
    texts = [p if isinstance(p, str) else p[0]["content"] for p in PROMPTS]
    assert taken_up == [texts[i] for part in missing for i in range(*job.part_rows(part))]
    plain = SamplerFactory(model, CONFIG)().sample(as_chats(PROMPTS), num_samples=2)
    assert_same_samples(read(job.output), plain)
    # Nothing is left to do, and nothing is done.
    log = make.log.read_text()
    assert run_on_ray(job, make, progress=False) == (10, 0)
    assert make.log.read_text() == log


@pytest.mark.slow
def test_command(
    cluster: None, model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = write_jsonl(tmp_path / "in.jsonl").read_text().splitlines()
    (tmp_path / "in.jsonl").write_text("\n".join([*lines, "{}"]))
    target = tmp_path / "out.jsonl"
    argv = ["sample", "--ray", "-f", str(tmp_path / "in.jsonl"), "-o", str(target), "-n", "2"]
    assert main([*argv, "--model", model, "--workers", "2", "--rows-per-part", "4", *FAST]) == 0
    assert f"{target}: 11 prompts, 1 with an error\n" in capfd.readouterr().err
    plain = SamplerFactory(model, CONFIG)().sample(as_chats(PROMPTS), num_samples=2)
    assert_same_samples(read(target)[:-1], plain)
    assert "row 10: expected an object" in read(target)[-1]["error"]
    assert main([*argv, "--model", model, *FAST, "--alpha", "3"]) == 2
    assert "was begun with other settings" in capfd.readouterr().err
    argv[-3] = str(tmp_path / "other.jsonl")
    assert main([*argv, "--model", "./no-such-model", *FAST]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("powerkernels: error: model: there is no folder './no-such-model'")


def test_stage_of_a_pipeline(cluster: None, model: str, tmp_path: Path) -> None:
    from powerkernels.integrations.ray import sample_dataset

    rows: list[dict[str, Any]] = [
        {"index": 10 + i, "answer": f"a{i}", "prompt": prompt if isinstance(prompt, str) else None}
        for i, prompt in enumerate(PROMPTS)
    ]
    dataset = ray.data.from_items(rows, override_num_blocks=3)
    dataset.context.enable_progress_bars = False
    sampled = sample_dataset(
        dataset, SamplerFactory(model, CONFIG), num_samples=2, num_workers=2, batch_size=4
    )
    found = sorted(sampled.take_all(), key=lambda row: (row["index"], row["sample_index"] or 0))
    bad = [row for row in found if row["error"] is not None]
    assert [(row["answer"], row["prompt"], row["tokens"]) for row in bad] == [("a7", None, None)]
    good = [i for i in range(len(PROMPTS)) if i != 7]
    expected = SamplerFactory(model, CONFIG)().sample(
        as_chats([PROMPTS[i] for i in good]),
        num_samples=2,
        first_sample=[2 * (10 + i) for i in good],
    )
    found = [
        row | {"prompt_index": good.index(row["index"] - 10)} for row in found if row not in bad
    ]
    assert_same_samples(found, expected)
    assert [row["answer"] for row in found[::2]] == [f"a{i}" for i in good]


# ---- the actors, in this process


@dataclasses.dataclass(frozen=True)
class Ready:
    """Gives a sampler that is there."""

    sampler: PowerSampler

    def __call__(self) -> PowerSampler:
        return self.sampler


def test_what_ends_every_worker_ends_the_job(model: str, tmp_path: Path) -> None:
    from powerkernels.integrations import ray as on_ray

    job = job_of(write_jsonl(tmp_path / "in.jsonl"), tmp_path / "out.jsonl", model)
    job.begin()
    for _ in range(on_ray.MAX_ATTEMPTS):  # that came to no end
        on_ray._count_attempt(job, 1)
    actor = on_ray._SamplePart(job, SamplerFactory(model, CONFIG))
    table = pa.table({"part": [0]})
    actor({"part": table.column("part").to_numpy()})
    with pytest.raises(RuntimeError, match="rows 3 to 5 have ended 4 workers"):
        actor({"part": table.column("part").to_numpy() + 1})
    assert job.missing_parts() == [1, 2, 3]


def test_batches_change_nothing(model: str) -> None:
    from powerkernels.integrations.ray import _SampleBatch

    actor = _SampleBatch(Ready(SamplerFactory(model, CONFIG)()), "id", 2, None)
    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    schema = pa.schema([("id", pa.int32()), ("prompt", pa.string()), ("messages", messages)])
    rows = [
        {"id": i, "prompt": p if isinstance(p, str) else None}
        | {"messages": None if isinstance(p, str) else p}
        for i, p in enumerate(PROMPTS)
    ]
    table = pa.Table.from_pylist(rows, schema=schema)
    whole = actor(table)
    parts = pa.concat_tables([actor(table.slice(i, 3)) for i in range(0, 10, 3)])
    assert parts.equals(whole)
    assert whole.column("id").to_pylist() == [i for i in range(10) for _ in range(2)]
    too_long = actor(pa.table({"id": [7, 7], "prompt": ["one", "one " * 80]})).to_pylist()
    assert [row["error"] is None for row in too_long] == [True, True, False]
    assert too_long[2]["error"].startswith("row 7: prompt and max_new_tokens must fit")
    # Of rows with one prompt each draws samples of its own.
    ones = {json.dumps(r["log_prob"]) for r in whole.to_pylist() if r["prompt"] == "one"}
    assert len(ones) > 3


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": ["one"]}, r"index must be a column of integers .* got 'id' \(it has prompt\)"),
        ({"prompt": ["one"], "id": [0.5]}, "index must be a column of integers"),
        ({"prompt": ["one"], "id": [-1]}, "must be >= 0"),
        ({"prompt": ["one", "two"], "id": [None, 1]}, "must be >= 0"),
    ],
)
def test_bad_index(model: str, columns: dict[str, list[Any]], message: str) -> None:
    from powerkernels.integrations.ray import _SampleBatch

    actor = _SampleBatch(Ready(SamplerFactory(model, CONFIG)()), "id", 1, None)
    with pytest.raises(ValueError, match=message):
        actor(pa.table(columns))


@pytest.mark.parametrize(
    ("resources", "workers", "device", "threads", "expected"),
    [
        ({"CPU": 16.0}, 4, "auto", None, (4, 0)),
        ({"CPU": 2.0}, 4, "auto", None, (0.5, 0)),
        ({"CPU": 16.0}, 4, "auto", 2, (2, 0)),
        ({"CPU": 16.0, "GPU": 4.0}, 4, "auto", None, (1, 1)),
        ({"CPU": 16.0, "GPU": 4.0}, 4, "cpu", None, (4, 0)),
    ],
)
def test_what_a_worker_is_given(
    monkeypatch: pytest.MonkeyPatch,
    resources: dict[str, float],
    workers: int,
    device: str,
    threads: int | None,
    expected: tuple[float, float],
) -> None:
    from powerkernels.integrations.ray import worker_resources

    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
    assert worker_resources(workers, device, threads) == expected
