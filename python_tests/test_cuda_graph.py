"""What an op that can be captured in a CUDA graph must not do: copy from the host, wait for it.

Tensors of FakeTensorMode say that they are on a GPU: what the ops ask of torch can be seen without
one, save for a backward, which wants the device's streams.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import powerkernels as pk
from powerkernels import _cuda_graph, _process_group
from powerkernels._arguments import seed_tensor
from powerkernels.logprob import vocab_parallel
from powerkernels.policy_loss import advice, aggregate
from python_tests import fake_cuda

GPU = torch.device("cuda", 1)
ROWS, VOCAB, LENGTH = 6, 32, 5


class HostCopies(TorchDispatchMode):
    """Which operators were given a tensor of the CPU, and made one of a GPU of it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given, made = places((args, kwargs)), places(result)
        if "cpu" in given and "cuda" in made | given:
            self.found.append(str(func))
        return result


class SelectForIndex(TorchFunctionMode):
    """x[0] by an operator: Python's own indexing asks for a guard that torch for CPUs lacks."""

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[1], int):
            return args[0].select(0, args[1])
        return func(*args, **(kwargs or {}))


def places(tree: Any) -> set[str]:
    return {leaf.device.type for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)}


def batch() -> dict[str, Tensor]:
    shape = (ROWS, LENGTH)
    return {
        "log_prob": torch.randn(shape, device=GPU),
        "old_log_prob": torch.randn(shape, device=GPU),
        "advantages": torch.randn(shape, device=GPU),
        "response_mask": torch.ones(shape, dtype=torch.bool, device=GPU),
    }


def logits() -> dict[str, Tensor]:
    return {
        "logits": torch.randn(ROWS, VOCAB, device=GPU),
        "targets": torch.zeros(ROWS, dtype=torch.int64, device=GPU),
    }


def selections() -> tuple[Tensor, Tensor, Tensor]:
    x = batch()
    return x["log_prob"].detach(), x["advantages"], x["response_mask"]


def local_targets() -> None:
    targets = torch.zeros(ROWS, dtype=torch.int64, device=GPU)
    vocab_parallel.local_targets._init_fn(targets, VOCAB, -100, "a group")


def of_accumulator() -> None:
    accumulator = pk.SelectionAccumulator.band(ratio=0.1, lb=1.0, ub=5.0, seed=3)
    for _ in range(2):
        accumulator.add(*selections())


CALLS: dict[str, Callable[[], object]] = {
    "score_tokens": lambda: pk.score_tokens(**logits(), alpha=4.0, temperature=0.7, entropy=True),
    "sample_tokens": lambda: pk.sample_tokens(
        logits()["logits"],
        alpha=4.0,
        seed=3,
        counters=torch.zeros(ROWS, 4, dtype=torch.int64, device=GPU),
        top_k=5,
        top_p=0.9,
    ),
    "linear_score_tokens": lambda: pk.linear_score_tokens(
        torch.randn(ROWS, 8, device=GPU),
        torch.randn(VOCAB, 8, device=GPU),
        torch.zeros(ROWS, dtype=torch.int64, device=GPU),
        entropy=True,
    ),
    "ppo_clip_loss": lambda: pk.ppo_clip_loss(**batch(), batch_num_tokens=7, dp_size=2),
    "clip_cov_loss": lambda: pk.clip_cov_loss(**batch(), seed=3),
    "kl_cov_loss": lambda: pk.kl_cov_loss(**batch(), loss_agg_mode="seq-mean-token-sum-norm"),
    "select_top_cov": lambda: pk.select_top_cov(*selections(), ratio=0.1),
    "select_cov_band": lambda: pk.select_cov_band(*selections(), k=3, lb=1.0, ub=5.0, seed=3),
    "token_covariance": lambda: pk.token_covariance(*selections()),
    "SelectionAccumulator": of_accumulator,
    "vocabulary of a rank": local_targets,
    "check of the advantages": lambda: advice._figures(batch()["advantages"], None),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_nothing_is_copied_from_the_host(
    call: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(advice.AdvantageScaleCheck, "_later", lambda *tensors: None)
    monkeypatch.setattr(vocab_parallel, "all_gather", lambda value, group: value.repeat(2, 1))
    monkeypatch.setattr(vocab_parallel, "group_named", lambda name: SimpleNamespace(rank=lambda: 0))
    with FakeTensorMode(), SelectForIndex(), HostCopies() as copies:
        call()
    assert not copies.found


def test_the_watch_sees_a_copy() -> None:
    with FakeTensorMode(), HostCopies() as copies:
        torch.tensor([3], device=GPU)
    assert copies.found == ["aten._to_copy.default"]


# Where the caller's own tensor is on the host.


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_cuda.FakeCuda]:
    """In a capture on the second device, while the first is the current one."""
    cuda = fake_cuda.install(monkeypatch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(1), torch.cuda.stream(torch.cuda.Stream()):
        graph.capture_begin()
        with torch.cuda.device(0):
            yield cuda


def test_a_capture_is_known_by_its_device(capturing: fake_cuda.FakeCuda) -> None:
    assert _cuda_graph.is_capturing(GPU)
    assert not _cuda_graph.is_capturing(torch.device("cuda", 0))
    assert not _cuda_graph.is_capturing(torch.device("cuda"))
    assert not _cuda_graph.is_capturing(torch.device("cpu"))


def test_arguments_on_the_host_are_refused_in_a_capture(capturing: fake_cuda.FakeCuda) -> None:
    with pytest.raises(RuntimeError, match="seed must be on cuda:1 while a CUDA graph is captured"):
        seed_tensor(torch.tensor(3), GPU)
    assert seed_tensor(torch.tensor(3), torch.device("cpu")).tolist() == [3]
    loss: Any = SimpleNamespace(device=GPU)
    with pytest.raises(RuntimeError, match="batch_num_tokens must be on cuda:1 while a CUDA graph"):
        aggregate._or("batch_num_tokens", torch.tensor(2.0), loss)
    assert aggregate._or("batch_num_tokens", 2.0, loss) == 2.0


def test_the_check_of_the_advantages_is_of_their_device(
    monkeypatch: pytest.MonkeyPatch, capturing: fake_cuda.FakeCuda
) -> None:
    monkeypatch.setattr(advice, "_figures", lambda advantages, mask: torch.ones(2))
    check, advantages = advice.AdvantageScaleCheck(), SimpleNamespace(device=GPU)
    check._later(advantages, None)  # type: ignore[arg-type]
    assert check._pending is None  # in the capture nothing is begun
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory, **options: torch.zeros(2))
    capturing.recording = None
    check._later(advantages, None)  # type: ignore[arg-type]
    assert check._pending is not None
    assert capturing.done_on["event"] == [1]


@contextlib.contextmanager
def group_of_one(backend: str) -> Iterator[Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("collective", [_process_group.all_gather, _process_group.all_reduce])
def test_a_collective_that_waits_on_the_host_is_refused_in_a_capture(
    capturing: fake_cuda.FakeCuda, collective: Callable[[Tensor, str], object]
) -> None:
    with group_of_one("gloo") as gloo:
        group = _process_group.name_of(gloo)
        collective(torch.ones(3), group)
        value = capturing.tensor(torch.ones(3), 1)
        with pytest.raises(RuntimeError, match="as nccl, for cuda, got gloo: its collectives wait"):
            collective(value, group)
        assert capturing.is_valid


# On a GPU.


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnGpu:
    def test_a_vocabulary_over_ranks_is_captured(self) -> None:
        if not dist.is_nccl_available():
            pytest.skip("torch has no NCCL")
        logits = torch.randn(ROWS, VOCAB, device="cuda")
        targets = torch.arange(ROWS, device="cuda")
        with group_of_one("nccl") as nccl:

            def score() -> tuple[Tensor, ...]:
                scores = pk.score_tokens(
                    logits, targets, alpha=2.0, entropy=True, process_group=nccl
                )
                return tuple(score for score in scores if score is not None)

            score()
            found: list[tuple[Tensor, ...]] = []
            graph = _cuda_graph.record(lambda: found.append(score()), torch.cuda.Stream())
            logits.normal_()
            graph.replay()
            expected = score()
            torch.cuda.synchronize()
            assert all(map(torch.equal, found[0], expected))
            del graph  # before the communicator that its nodes call

    def test_a_seed_on_the_host_is_refused_in_a_capture(self) -> None:
        counters = torch.zeros(ROWS, 4, dtype=torch.int64, device="cuda")
        logits = torch.randn(ROWS, VOCAB, device="cuda")

        def draw(seed: Any) -> Callable[[], object]:
            return lambda: pk.sample_tokens(logits, alpha=4.0, seed=seed, counters=counters)

        draw(3)()
        stream = torch.cuda.Stream()
        with pytest.raises(RuntimeError, match="seed must be on cuda:0 while a CUDA graph"):
            _cuda_graph.record(draw(torch.tensor([3])), stream)
        _cuda_graph.record(draw(3), stream).replay()
