"""A vocabulary over 2 and 3 ranks gives what it gives in one piece: values and gradients."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from powerkernels import _extension, linear_score_tokens, score_tokens
from python_tests.logprob.expected import random_logits, random_weights

VOCAB, DIM, ROWS = 3001, 12, 9
# Uneven, not at multiples of anything.
SPLITS = {1: (3001,), 2: (1025, 1976), 3: (7, 2993, 1)}
OPTIONS: dict[str, Any] = {"alpha": 2.5, "entropy": True, "temperature": 0.8, "softcap": 20.0}
BACKENDS = ["reference", "cpp"]


def inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    targets = torch.randint(VOCAB, (ROWS,), generator=generator)
    targets[0], targets[1], targets[2], targets[3] = 3000, 6, 0, -100
    logits = random_logits((ROWS, VOCAB), torch.float32, generator)
    logits[4, :1500] = -torch.inf  # one shard holds nothing of this row
    logits[5, 2] = torch.nan
    return {
        "logits": logits,
        "hidden": torch.randn(ROWS, DIM, generator=generator),
        "weight": torch.randn(VOCAB, DIM, generator=generator),
        "bias": torch.randn(VOCAB, generator=generator),
        "targets": targets,
        "weights": random_weights(targets, generator),
    }


def total(scores: Any, weights: list[torch.Tensor]) -> torch.Tensor:
    terms = zip(scores, weights, strict=True)
    return sum((score.nan_to_num(0, 0, 0) * weight).sum() for score, weight in terms)


def results(x: dict[str, Any], bounds: slice, group: Any) -> dict[str, torch.Tensor]:
    """Scores and gradients of both entry points over this part of the vocabulary."""
    logits = x["logits"][:, bounds].clone().requires_grad_()
    hidden = x["hidden"].clone().requires_grad_()
    weight = x["weight"][bounds].clone().requires_grad_()
    bias = x["bias"][bounds].clone().requires_grad_()
    scores = score_tokens(logits, x["targets"], process_group=group, **OPTIONS)
    total(scores, x["weights"]).backward()
    linear = linear_score_tokens(
        hidden, weight, x["targets"], bias=bias, process_group=group, **OPTIONS
    )
    total(linear, x["weights"]).backward()
    found = {f"score {k}": value.detach() for k, value in enumerate(scores)}
    found |= {f"linear {k}": value.detach() for k, value in enumerate(linear)}
    return found | {
        "dlogits": logits.grad,
        "dhidden": hidden.grad,
        "dweight": weight.grad,
        "dbias": bias.grad,
    }


def in_parallel(rank: int, ranks: int, port: int, folder: str, work: Callable[..., Any]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    torch.save(work(rank, ranks), Path(folder, f"{rank}.pt"))
    dist.barrier()  # a rank that leaves early takes its connections from under the others
    dist.destroy_process_group()
    # gloo's threads may hold tensors still; one that lets go of them while the interpreter is being
    # taken down aborts the process.
    os._exit(0)


def run(work: Callable[..., Any], ranks: int, folder: Path) -> list[Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(in_parallel, args=(ranks, port, str(folder), work), nprocs=ranks)
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


def bounds_of(rank: int, ranks: int) -> slice:
    start = sum(SPLITS[ranks][:rank])
    return slice(start, start + SPLITS[ranks][rank])


def score_shards(rank: int, ranks: int) -> dict[str, torch.Tensor]:
    return results(inputs(), bounds_of(rank, ranks), dist.group.WORLD)


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2, 3])
@pytest.mark.parametrize("backend_name", BACKENDS)
@pytest.mark.each_value
def test_a_split_vocabulary_is_the_whole(backend_name, ranks, tmp_path, monkeypatch):
    if backend_name == "cpp" and _extension.extension() is None:
        pytest.skip(f"no compiled part: {_extension.why_missing()}")
    monkeypatch.setenv("POWERKERNELS_BACKEND", backend_name)
    shards = run(score_shards, ranks, tmp_path)
    whole = results(inputs(), slice(None), None)
    for name, expected in whole.items():
        if name in ("dlogits", "dweight", "dbias"):
            dim = 1 if name == "dlogits" else 0
            got = torch.cat([shard[name] for shard in shards], dim)
            torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-6, equal_nan=True)
            continue
        for shard in shards:
            # Every rank has the same bits.
            assert torch.equal(shard[name].nan_to_num(9.0), shards[0][name].nan_to_num(9.0)), name
        got = shards[0][name]
        torch.testing.assert_close(
            got, expected, rtol=2e-5, atol=1e-5, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


def bad_calls(rank: int, ranks: int) -> list[str]:
    """What each of these says; every rank must hear of it, or the others would wait."""
    x = inputs()
    bounds = bounds_of(rank, ranks)
    said = []
    for logits, targets in (
        (x["logits"][:, bounds] if rank else x["logits"][:, :0], x["targets"]),
        (x["logits"][:, bounds], torch.full_like(x["targets"], VOCAB)),
        (x["logits"][:, bounds], torch.full_like(x["targets"], -1)),
    ):
        try:
            score_tokens(logits, targets, process_group=dist.group.WORLD)
        except (ValueError, IndexError) as error:
            said.append(f"{type(error).__name__}: {error}")
    try:
        linear_score_tokens(
            x["hidden"],
            x["weight"][bounds] if rank else x["weight"][:0],
            x["targets"],
            process_group=dist.group.WORLD,
        )
    except ValueError as error:
        said.append(f"{type(error).__name__}: {error}")
    return said


def test_every_rank_hears_what_is_wrong(tmp_path):
    for said in run(bad_calls, 2, tmp_path):
        empty, too_large, negative, empty_weight = said
        assert empty.startswith("ValueError")
        assert "ranks [0]" in empty
        assert too_large.startswith(f"IndexError: targets must be in [0, {VOCAB})")
        assert f"got {VOCAB} at row 0" in too_large
        assert "got -1 at row 0" in negative
        assert "ranks [0]" in empty_weight


def compiled_loss(rank: int, ranks: int) -> dict[str, torch.Tensor]:
    x = inputs()
    logits = x["logits"][:, bounds_of(rank, ranks)].clone().requires_grad_()

    def loss(logits: torch.Tensor) -> torch.Tensor:
        scores = score_tokens(logits, x["targets"], process_group=dist.group.WORLD, **OPTIONS)
        return total(scores, x["weights"])

    found = {}
    for name, function in (
        ("eager", loss),
        ("compiled", torch.compile(loss, fullgraph=True, backend="aot_eager")),
    ):
        (found[name],) = torch.autograd.grad(function(logits), logits)
    return found


@pytest.mark.slow
def test_compiles_as_one_graph(tmp_path):
    for found in run(compiled_loss, 2, tmp_path):
        torch.testing.assert_close(found["compiled"], found["eager"], equal_nan=True)
