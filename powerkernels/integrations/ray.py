"""Power sampling as a stage of Ray Data: a pool of actors, each with a sampler of its own.

`sample_dataset` is the stage, for a pipeline of one's own. `run_on_ray` makes a whole job of
`powerkernels.integrations.sharding`, from a file of prompts to a file of samples, and is what
`powerkernels sample --ray` calls. Both leave scheduling, restarts of actors and retries of what
they were at to Ray Data. docs/scaling.md says how to run them.

Needs ray[data] >= 2.60.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from powerkernels.integrations.sharding import (
    JobSummary,
    Row,
    Sampler,
    SamplingJob,
    read_prompt,
    record_schema,
    run_part,
    sample_rows,
)

INSTALL_RAY = "pip install 'powerkernels[ray]'"

try:
    import pyarrow as pa
    import ray
    import ray.data
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{error.name} is not installed, and powerkernels.integrations.ray needs it; "
        f"get it with: {INSTALL_RAY}",
        name=error.name,
    ) from error

if TYPE_CHECKING:
    from ray.data import Dataset

# Ray Data restarts an actor and retries its task without end. What has ended this many workers
# would end the next one too.
MAX_ATTEMPTS = 4
BATCH_SIZE = 64


def sample_dataset(
    dataset: Dataset,
    make_sampler: Callable[[], Sampler],
    *,
    index: str = "index",
    num_samples: int = 1,
    chat: bool | None = None,
    num_workers: int = 1,
    num_cpus: float = 1,
    num_gpus: float = 0,
    batch_size: int = BATCH_SIZE,
) -> Dataset:
    """Sample every row of a dataset on a pool of actors.

    What is drawn for a row depends on its prompt, its index and the sampler's settings (name
    `num_lanes` among them), not on the batch, the actor or the order.

    Args:
        dataset: rows with "prompt" (text) or "messages" (a list of {"role", "content"}).
        make_sampler: makes an actor's sampler, such as `sharding.SamplerFactory`; pickled.
        index: column of integers >= 0 that tells rows with equal prompts from each other; it is
            what makes them draw different samples.
        num_samples: chains per prompt, >= 1.
        chat: whether text goes into the chat template; None is "where there is one".
        num_workers: actors, each with a model.
        num_cpus, num_gpus: that Ray gives to each.
        batch_size: rows that an actor samples at a time; some times the number of lanes.

    Returns:
        The dataset with `num_samples` rows in the place of each, which have its columns, then
        sample_index, text, tokens, log_prob, log_likelihood, confidence, acceptance_rate,
        decoded_tokens, finish_reason and error. A row that cannot be sampled comes once, with
        "error". Of columns with the same name in the dataset the new ones stay.

    Raises:
        ValueError: `index` is no column of integers >= 0 (when the dataset is executed).
    """
    return dataset.map_batches(
        _SampleBatch,
        fn_constructor_kwargs={
            "make_sampler": make_sampler,
            "index": index,
            "num_samples": num_samples,
            "chat": chat,
        },
        batch_size=batch_size,
        batch_format="pyarrow",
        compute=_pool(num_workers),
        num_cpus=num_cpus,
        num_gpus=num_gpus,
    )


class _SampleBatch:
    """The actor of `sample_dataset`."""

    def __init__(
        self, make_sampler: Callable[[], Sampler], index: str, num_samples: int, chat: bool | None
    ) -> None:
        self._sampler = make_sampler()
        self._index, self._num_samples, self._chat = index, num_samples, chat

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = [
            Row(number, *read_prompt(record, number), number)
            for record, number in zip(batch.to_pylist(), self._numbers(batch), strict=True)
        ]
        of_rows = sample_rows(self._sampler, rows, num_samples=self._num_samples, chat=self._chat)
        given = ("prompt_index", "prompt", "messages")
        schema = pa.schema([field for field in record_schema() if field.name not in given])
        new = pa.Table.from_pylist(
            [{name: record[name] for name in schema.names} for row in of_rows for record in row],
            schema=schema,
        )
        kept = batch.select([name for name in batch.column_names if name not in schema.names])
        table = kept.take([i for i, row in enumerate(of_rows) for _ in row])
        for field in schema:
            table = table.append_column(field, new.column(field.name))
        return table

    def _numbers(self, batch: pa.Table) -> list[int]:
        name = self._index
        if name not in batch.column_names or not pa.types.is_integer(batch.schema.field(name).type):
            raise ValueError(
                f"index must be a column of integers of the dataset, got {name!r} "
                f"(it has {', '.join(batch.column_names)})"
            )
        numbers: list[int] = batch.column(name).to_pylist()
        if any(number is None or number < 0 for number in numbers):
            raise ValueError(f"index: the integers in {name!r} must be >= 0")
        return numbers


def run_on_ray(
    job: SamplingJob,
    make_sampler: Callable[[], Sampler],
    *,
    num_workers: int = 1,
    num_cpus: float = 1,
    num_gpus: float = 0,
    progress: bool | None = None,
) -> JobSummary:
    """Sample the missing parts of a job on a pool of actors, and join all.

    Args:
        job: from `sharding.plan_job`.
        make_sampler: makes an actor's sampler, such as `sharding.SamplerFactory`; pickled.
        num_workers: actors, each with a model.
        num_cpus, num_gpus: that Ray gives to each.
        progress: a progress line on standard error; None shows it on a terminal only.

    Returns:
        The finished job.

    Raises:
        ValueError: the output is that of other settings; see `SamplingJob.begin`.
        RuntimeError: a part has ended `MAX_ATTEMPTS` workers.
    """
    from powerkernels.power_sampling.progress import ProgressLine

    job.begin()
    missing = job.missing_parts()
    for part in missing:
        _attempts_path(job, part).unlink(missing_ok=True)
    if missing:
        num_done = job.num_parts - len(missing)
        line = ProgressLine(lambda elapsed: job.progress(elapsed, num_done), progress)
        try:
            dataset = _parts_dataset(
                job,
                missing,
                make_sampler,
                num_workers=min(num_workers, len(missing)),
                num_cpus=num_cpus,
                num_gpus=num_gpus,
            )
            for _ in dataset.iter_rows():
                line.update()
        except ray.exceptions.RayTaskError as error:
            # Ray's message is the worker's traceback; what went wrong there is enough.
            raise error.cause from error
        finally:
            line.close()
    summary = job.finish()
    assert summary is not None
    return summary


def _parts_dataset(
    job: SamplingJob,
    parts: list[int],
    make_sampler: Callable[[], Sampler],
    *,
    num_workers: int,
    num_cpus: float,
    num_gpus: float,
) -> Dataset:
    """One row, and one task, a part."""
    dataset = ray.data.from_items(
        [{"part": part} for part in parts], override_num_blocks=len(parts)
    )
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    dataset.context.raise_original_map_exception = True
    return dataset.map_batches(
        _SamplePart,
        fn_constructor_kwargs={"job": job, "make_sampler": make_sampler},
        batch_size=1,
        compute=_pool(num_workers),
        num_cpus=num_cpus,
        num_gpus=num_gpus,
    )


class _SamplePart:
    """The actor of `run_on_ray`: a part is written by the time that its task is done."""

    def __init__(self, job: SamplingJob, make_sampler: Callable[[], Sampler]) -> None:
        self._job = job
        self._make_sampler = make_sampler

    @functools.cached_property
    def _sampler(self) -> Sampler:
        # Not when the actor starts: Ray hands on the errors of a task, but not those of a start.
        return self._make_sampler()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for part in batch["part"].tolist():
            _count_attempt(self._job, part)
            run_part(self._job, part, self._sampler)
            _attempts_path(self._job, part).unlink(missing_ok=True)
        return batch


def _count_attempt(job: SamplingJob, part: int) -> None:
    """A byte for each attempt at a part that has not come to its end."""
    with _attempts_path(job, part).open("ab") as file:
        file.write(b".")
        attempts = file.tell()
    if attempts > MAX_ATTEMPTS:
        first, end = job.part_rows(part)
        raise RuntimeError(
            f"rows {first} to {end - 1} have ended {MAX_ATTEMPTS} workers, one after the other "
            "(out of memory?); the parts that are done are kept"
        )


def _attempts_path(job: SamplingJob, part: int) -> Any:
    return job.folder / f".{job.part_path(part).name}.attempts"


def _pool(num_workers: int) -> ray.data.ActorPoolStrategy:
    # A part or batch takes minutes: none waits behind another while an actor is free.
    return ray.data.ActorPoolStrategy(size=num_workers, max_tasks_in_flight_per_actor=1)


@contextlib.contextmanager
def running(*, quiet: bool = False) -> Iterator[None]:
    """Ray started, or the cluster of RAY_ADDRESS joined, and left afterwards; nothing if it runs.

    `quiet` keeps what workers print to themselves.
    """
    if ray.is_initialized():
        yield
        return
    ray.init(include_dashboard=False, log_to_driver=not quiet, logging_level=logging.WARNING)
    logging.getLogger("ray.data").setLevel(logging.ERROR if quiet else logging.WARNING)
    try:
        yield
    finally:
        ray.shutdown()


def default_workers(device: str) -> int:
    """As many as the cluster has GPUs, or machines where there is none or it is not wanted."""
    gpus = int(ray.cluster_resources().get("GPU", 0)) if device != "cpu" else 0
    return gpus or sum(bool(node["Alive"]) for node in ray.nodes())


def worker_resources(num_workers: int, device: str, threads: int | None) -> tuple[float, float]:
    """(CPUs, GPUs) of each worker: a GPU if there is one for each, else a share of the CPUs."""
    total = ray.cluster_resources()
    if device != "cpu" and total.get("GPU", 0) >= num_workers:
        return threads or 1, 1
    share = total.get("CPU", 1) / num_workers
    return threads or (int(share) if share >= 1 else share), 0
