"""The fused kernel: on a GPU, or interpreted, where sizes are kept small."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from powerkernels import linear_score_tokens
from powerkernels.linear_logprob import functional, gpu, reference
from python_tests import triton_device
from python_tests.linear_logprob.test_linear_score_tokens import eager
from python_tests.logprob.expected import DEFAULTS

pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")

DTYPES = (torch.bfloat16, torch.float16)
# Error of a gradient, in units of that of torch at the same dtype. Measured: 1.0, and up to 4.5 in
# the interpreter: the backward's logits are rounded, and the sums of the fused forward's are not.
GRADIENT_FACTOR = {"chunked": 2.0, "fused": 6.0}
SMALL_TILES = gpu.Tiles(32, 32, 16, 4, 2, True, group_n=2)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small sizes have several tiles each way, and tiles that stick out."""
    if triton_device.INTERPRETED:
        monkeypatch.setattr(gpu, "tiles_for", lambda device: SMALL_TILES)
        pointers = SMALL_TILES._replace(descriptors=False)
        monkeypatch.setattr(gpu, "UNALIGNED_TILES", pointers)


def inputs(rows: int, vocab: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(rows + vocab + dim)
    return (
        torch.randn(rows, dim, generator=generator).to(dtype),
        (torch.randn(vocab, dim, generator=generator) * (4 * dim**-0.5)).to(dtype),
        torch.randn(vocab, generator=generator).to(dtype),
        torch.randint(vocab, (rows,), generator=generator),
    )


def check(device: str, x: tuple[Tensor, ...], *, with_bias: bool = True, **options: Any) -> None:
    """Logits are exact products summed in float32: far closer than those rounded to a half."""
    options = DEFAULTS | options
    hidden, weight, bias, targets = x
    bias = bias if with_bias else None
    exact = reference.linear_score_tokens(hidden, weight, targets, bias=bias, **options)
    moved = [None if tensor is None else tensor.to(device) for tensor in (hidden, weight, bias)]
    temperature = options["temperature"]
    if isinstance(temperature, Tensor):
        options["temperature"] = temperature.to(device)
    got = linear_score_tokens(
        moved[0], moved[1], targets.to(device), bias=moved[2], method="fused", **options
    )
    for name, value, true in zip(got._fields, got, exact, strict=True):
        if true is None:
            assert value is None
            continue
        tolerance = 3e-6 * (1 + options["alpha"]) * (1 + true.abs())
        assert ((value.cpu().double() - true).abs() <= tolerance).all(), (name, options)


@pytest.mark.parametrize("vocab", [1, 31, 100])
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_scores_are_the_truth(kernel_device, dtype, rows, vocab):
    for alpha in (0.0, 1.0, 2.5, 4.0, 7.3):
        check(kernel_device, inputs(rows, vocab, 32, dtype), alpha=alpha)


@pytest.mark.parametrize("dim", [1, 7, 16, 40])
def test_any_hidden_size(kernel_device, dim):
    """Of 7 and 1 no descriptor can be had."""
    x = inputs(33, 70, dim, torch.bfloat16)
    check(kernel_device, x, alpha=4.0)
    check(kernel_device, x, alpha=4.0, with_bias=False)


def test_a_bias_that_is_not_contiguous(kernel_device):
    hidden, weight, bias, targets = inputs(33, 70, 16, torch.bfloat16)
    for other in (bias.repeat_interleave(2)[::2], bias[:1].expand(70)):
        moved = [tensor.to(kernel_device) for tensor in (hidden, weight, targets)]
        strided = other.to(kernel_device)
        got = linear_score_tokens(*moved, bias=strided, method="fused")
        expected = linear_score_tokens(*moved, bias=strided.contiguous(), method="fused")
        assert torch.equal(got.log_prob, expected.log_prob)


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 3.0},
        {"temperature": 0.6},
        {"temperature": torch.linspace(0.5, 2.0, 33)},
        {"entropy": False},
    ],
)
def test_options(kernel_device, options):
    check(kernel_device, inputs(33, 70, 16, torch.bfloat16), alpha=2.5, **options)


def test_ignored_rows_and_bad_rows(kernel_device):
    hidden, weight, _, targets = inputs(33, 70, 16, torch.bfloat16)
    targets[::5] = -100
    hidden[5] = torch.nan  # ignored
    hidden[7] = torch.nan
    options = {"alpha": 4.0, "entropy": True, "method": "fused"}
    got = linear_score_tokens(
        hidden.to(kernel_device), weight.to(kernel_device), targets.to(kernel_device), **options
    )
    for value in got:
        assert (value[::5] == 0).all()
        assert value[7].isnan()
        assert value.isnan().sum() == 1


def test_fused_forward_and_chunked_backward(kernel_device):
    hidden, weight, bias, targets = inputs(40, 100, 32, torch.bfloat16)
    results = []
    for method in ("fused", "chunked"):
        leaves = [
            tensor.to(kernel_device).clone().requires_grad_() for tensor in (hidden, weight, bias)
        ]
        scores = linear_score_tokens(
            *leaves[:2],
            targets.to(kernel_device),
            bias=leaves[2],
            alpha=2.5,
            entropy=True,
            method=method,
        )
        sum(score.sum() for score in scores).backward()
        results.append([leaf.grad.float() for leaf in leaves])
    for fused, chunked in zip(*results, strict=True):
        error = (fused - chunked).abs().max() / chunked.abs().max()
        assert error <= 0.1  # logits rounded to bfloat16, or not


def test_what_it_does_not_serve_is_named(kernel_device):
    hidden, weight, _, targets = inputs(3, 70, 16, torch.bfloat16)
    with pytest.raises(ValueError, match=r'method="fused" cannot be had.*dtype'):
        linear_score_tokens(
            hidden.float().to(kernel_device),
            weight.float().to(kernel_device),
            targets.to(kernel_device),
            method="fused",
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnAGpu:
    """What only a GPU can show."""

    @pytest.fixture(autouse=True)
    def use_the_kernels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("POWERKERNELS_BACKEND", "triton")

    @pytest.mark.parametrize("method", ["chunked", "fused"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_gradients(self, dtype, method, monkeypatch):
        """Against float64, with float32 sums over the chunks of the vocabulary; beside torch."""
        monkeypatch.setattr(functional, "CHUNK_LOGITS", {"cpu": 2**16, "cuda": 2**16})
        hidden, weight, bias, targets = inputs(300, 5000, 256, dtype)
        targets[::7] = -100
        leaves = [tensor.cuda().requires_grad_() for tensor in (hidden, weight, bias)]
        scores = linear_score_tokens(
            *leaves[:2], targets.cuda(), bias=leaves[2], alpha=2.5, entropy=True, method=method
        )
        sum(score.sum() for score in scores).backward()
        exact = [tensor.double().requires_grad_() for tensor in (hidden, weight, bias)]
        true = reference.linear_score_tokens(
            *exact[:2], targets, bias=exact[2], **(DEFAULTS | {"alpha": 2.5})
        )
        sum(score.sum() for score in true).backward()
        peers = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
        sum(score.sum() for score in eager(targets, peers, DEFAULTS | {"alpha": 2.5})).backward()
        for leaf, *others in zip(leaves, exact, peers, strict=True):
            error, peer = (
                (found.grad.cpu().double() - others[0].grad).abs().max()
                for found in (leaf, others[1])
            )
            floor = torch.finfo(dtype).eps * others[0].grad.abs().max()
            assert error <= GRADIENT_FACTOR[method] * peer + floor

    def test_in_a_cuda_graph(self):
        hidden, weight, _, targets = inputs(64, 5000, 128, torch.bfloat16)
        static = hidden.cuda().requires_grad_()
        weight = weight.cuda().requires_grad_()
        targets = targets.cuda()

        def work() -> list[Tensor]:
            scores = linear_score_tokens(static, weight, targets, alpha=4, entropy=True)
            total = sum(score.sum() for score in scores)
            return [*(s.detach() for s in scores), *torch.autograd.grad(total, (static, weight))]

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = work()
        with torch.no_grad():
            static.copy_(hidden.cuda().flip(0))
        graph.replay()
        for value, expected in zip(captured, work(), strict=True):
            torch.testing.assert_close(value, expected)

    def test_the_logits_are_never_in_memory(self):
        rows, vocab, dim = 8192, 151936, 1024
        hidden = torch.randn(rows, dim, device="cuda").bfloat16().requires_grad_()
        weight = torch.randn(vocab, dim, device="cuda").mul(0.03).bfloat16().requires_grad_()
        targets = torch.randint(vocab, (rows,), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        scores = linear_score_tokens(hidden, weight, targets, alpha=4, entropy=True)
        sum(score.sum() for score in scores).backward()
        taken = torch.cuda.max_memory_allocated() - before
        gradients = hidden.grad.nbytes + weight.grad.nbytes
        assert taken - gradients < rows * vocab * 2 / 5
