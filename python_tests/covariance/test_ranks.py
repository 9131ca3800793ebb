"""Tokens over 1 to 4 ranks give the selection and the covariances of one rank."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from powerkernels import (
    SelectionAccumulator,
    _extension,
    select_cov_band,
    select_top_cov,
    token_covariance,
)
from python_tests.covariance import expected
from python_tests.covariance.expected import Batch, bounds_of, random_batch
from python_tests.logprob.test_vocab_parallel import run

pytestmark = pytest.mark.xdist_group("covariance_ranks")  # the ranks run once

RANKS = 4
ROWS, LENGTH = 12, 17
# Rows of each rank. Those of 2 and more are uneven, and some have nothing.
SHARDS = {1: (12,), 2: (5, 7), 3: (4, 0, 8), 4: (0, 3, 8, 1)}
BAND: dict[str, Any] = {"lb": 0.1, "ub": 2.0, "seed": -5}
# Of heavy ties, as many as end in the midst of equal covariances of several ranks.
NUMBERS: tuple[dict[str, Any], ...] = ({"k": 40}, {"k": 77}, {"ratio": 0.05})


def batches() -> dict[str, Batch]:
    generator = torch.Generator().manual_seed(11)
    random = random_batch((ROWS, LENGTH), generator)
    constant = random._replace(advantages=torch.ones(ROWS, LENGTH))
    masked_rank = random._replace(mask=random.mask.clone())
    masked_rank.mask[:5] = False
    bad = random._replace(log_prob=random.log_prob.clone())
    bad.log_prob[7][bad.mask[7]] = torch.nan
    return {
        "random": random,
        "ties": random_batch((ROWS, LENGTH), generator, ties=True),
        "constant": constant,
        "a masked-out rank": masked_rank,
        "nonfinite": bad,
    }


def in_micro_batches(step: SelectionAccumulator, batch: Batch) -> Tensor:
    """Three or fewer, one of them without rows."""
    for rows in (slice(0, 2), slice(2, 2), slice(2, None)):
        step.add(*(value[rows] for value in batch))
    return torch.cat(step.masks())


def packed_calls(batch: Batch, group: Any) -> dict[str, Tensor]:
    flat = [value.reshape(-1) for value in batch]
    cu_seqlens = bounds_of([LENGTH] * len(batch.mask))
    return {
        "packed top": select_top_cov(*flat, k=40, cu_seqlens=cu_seqlens, process_group=group),
        "packed band": select_cov_band(
            *flat, k=20, cu_seqlens=cu_seqlens, process_group=group, **BAND
        ),
    }


def results(batch: Batch, group: Any, number: dict[str, Any]) -> dict[str, Tensor]:
    """What the tokens of this rank get: tensors by token, and scalars."""
    cov = token_covariance(*batch, process_group=group)
    return {
        **cov._asdict(),
        "top": select_top_cov(*batch, process_group=group, **number),
        "band": select_cov_band(*batch, process_group=group, **number, **BAND),
    }


def results_of_micro_batches(batch: Batch, group: Any, number: dict[str, Any]) -> dict[str, Tensor]:
    top = SelectionAccumulator.top(process_group=group, **number)
    band = SelectionAccumulator.band(process_group=group, **number, **BAND)
    return {
        "top": in_micro_batches(top, batch),
        "band": in_micro_batches(band, batch),
        **top.stats()._asdict(),
    }


def all_results(batch_of: Callable[[Batch], Batch], group: Any) -> dict[str, dict[str, Tensor]]:
    found = {}
    for case, batch in batches().items():
        own = batch_of(batch)
        for number in NUMBERS if case == "ties" else NUMBERS[:1]:
            found[f"{case}, {number}"] = results(own, group, number)
            if case in ("ties", "nonfinite"):
                found[f"{case}, {number}, micro-batches"] = results_of_micro_batches(
                    own, group, number
                )
        if case == "ties":
            found[f"{case}, packed"] = packed_calls(own, group)
    return found


def shard(batch: Batch, rank: int, ranks: int) -> Batch:
    start = sum(SHARDS[ranks][:rank])
    return Batch(*(value[start : start + SHARDS[ranks][rank]] for value in batch))


def on_every_number_of_ranks(rank: int, world: int) -> dict[Any, Any]:
    """Of groups of the last 1, 2, 3 and 4 ranks, so that a rank's number in most is another."""
    backends = ["reference", *(["cpp"] if _extension.extension() else [])]
    found = {}
    for ranks in range(1, world + 1):
        members = list(range(world - ranks, world))
        group = dist.new_group(members)
        if rank not in members:
            continue
        for backend in backends:
            os.environ["POWERKERNELS_BACKEND"] = backend
            own = functools.partial(shard, rank=members.index(rank), ranks=ranks)
            found[ranks, backend] = all_results(own, group)
    return found


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """The processes are started once; a process group may hold any of them."""
    return run(on_every_number_of_ranks, RANKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("backend_name", ["reference", "cpp"])
def test_ranks_are_as_one(of_ranks, backend_name, ranks, monkeypatch):
    if backend_name == "cpp" and _extension.extension() is None:
        pytest.skip(f"no compiled part: {_extension.why_missing()}")
    monkeypatch.setenv("POWERKERNELS_BACKEND", backend_name)
    shards = [found[ranks, backend_name] for found in of_ranks[RANKS - ranks :]]
    for case, wanted in all_results(lambda batch: batch, None).items():
        for name, value in wanted.items():
            parts = [shard[case][name] for shard in shards]
            if value.ndim:
                got = torch.cat(parts)
                assert torch.equal(got.nan_to_num(9), value.nan_to_num(9)), (case, name)
            for part in parts if not value.ndim else ():
                # The covariance is a float64 sum in the order of the tokens.
                torch.testing.assert_close(part, value, rtol=1e-12, atol=1e-13, equal_nan=True)
                assert torch.equal(part.nan_to_num(9), parts[0].nan_to_num(9)), (case, name)


def test_one_rank_is_as_the_truth(monkeypatch):
    monkeypatch.setenv("POWERKERNELS_BACKEND", "reference")
    for name, batch in batches().items():
        for number in NUMBERS:
            found = select_top_cov(*batch, **number)
            assert torch.equal(found, expected.top(*batch, **number)), name
            assert found.any() == (name not in ("constant", "nonfinite"))
            found = select_cov_band(*batch, **number, **BAND)
            assert torch.equal(found, expected.band(*batch, **number, **BAND)), name
