"""The Triton kernels of covariance and selection against the truth: interpreted, or on a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from powerkernels import (
    SelectionAccumulator,
    covariance_table,
    select_cov_band,
    select_top_cov,
    token_covariance,
)
from powerkernels._cuda_graph import waits_are_errors
from python_tests.covariance import expected
from python_tests.covariance.expected import Batch, random_batch
from python_tests.covariance.test_accumulator import check_packed, check_padded
from python_tests.covariance.test_selection import check, check_band, check_exclusive_bounds
from python_tests.covariance.test_token_covariance import check_covariance

pytest.importorskip("triton")

from powerkernels.covariance import gpu

pytestmark = pytest.mark.filterwarnings(expected.IGNORE_LARGE_RATIO)

BAND = {"lb": -0.5, "ub": 1.5}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs and several blocks of each, with few tokens."""
    monkeypatch.setattr(gpu, "BLOCK", 16)
    monkeypatch.setattr(gpu, "HISTOGRAM_BLOCK", 32)
    monkeypatch.setattr(gpu, "MAX_PROGRAMS", 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 43)])
def test_covariance(kernel_device, dtype, shape, generator):
    check_covariance(kernel_device, *random_batch(shape, generator, dtype=dtype))


def test_covariance_of_blocks(kernel_device, small_blocks, generator):
    check_covariance(kernel_device, *random_batch((5, 29), generator))  # whole blocks and a rest
    check_covariance(kernel_device, *random_batch((4, 32), generator))  # whole blocks alone


def test_moments_of_large_offsets_are_exact(kernel_device, generator):
    log_prob, advantages, mask = random_batch((3, 43), generator)
    check_covariance(kernel_device, log_prob - 1e4, advantages + 1e6, mask)


@pytest.mark.parametrize("ties", [False, True])
def test_top(kernel_device, small_blocks, ties, generator):
    batch = random_batch((5, 29), generator, ties=ties)
    for number in ({"k": 0}, {"k": 1}, {"k": 41}, {"k": 1000}, {"ratio": 0.29}):
        check(kernel_device, select_top_cov, batch, **number)


def test_band(kernel_device, small_blocks, generator):
    batch = random_batch((5, 29), generator)
    for number in ({"k": 1}, {"k": 20}, {"k": 1000}, {"ratio": 0.1}):
        check_band(kernel_device, batch, 2**63 + 7, **number, **BAND)


def test_bounds_are_exclusive(kernel_device):
    check_exclusive_bounds(kernel_device)


def test_sizes_of_a_launch(kernel_device, generator):
    """The blocks that a GPU gets."""
    batch = random_batch((2, 1500), generator)
    check(kernel_device, select_top_cov, batch, ratio=0.03)
    check_band(kernel_device, batch, 5, ratio=0.03, **BAND)


def test_layouts(kernel_device, small_blocks, generator):
    base = random_batch((3, 40), generator)
    by_sequence = base._replace(advantages=base.advantages[:, 0])
    lengths = [38, 0, 17]
    bounds = expected.bounds_of(lengths)
    packed = Batch(*(expected.packed(value, lengths) for value in base))
    numbers = torch.tensor([2**40 + 1, 7, 3])
    check(kernel_device, select_top_cov, by_sequence, k=9)
    check_covariance(kernel_device, *by_sequence)
    check(kernel_device, select_top_cov, packed, k=9, cu_seqlens=bounds)
    for batch, options in (
        (by_sequence, {}),
        (by_sequence, {"sequence_index": numbers}),
        (packed, {"cu_seqlens": bounds.int()}),
        (packed, {"cu_seqlens": bounds, "sequence_index": numbers}),
    ):
        check(kernel_device, select_cov_band, batch, k=9, seed=3, **BAND, **options)


@pytest.mark.parametrize("rule", ["top of ties", "band"])
def test_micro_batches(kernel_device, small_blocks, rule, generator):
    check_padded(kernel_device, rule, 3, generator)
    check_packed(kernel_device, rule, 3, generator)


def test_masked_out_places_do_not_matter(kernel_device, small_blocks, generator):
    batch = random_batch((5, 29), generator)
    hidden = batch._replace(log_prob=torch.where(batch.mask, batch.log_prob, torch.nan))
    check_covariance(kernel_device, *hidden)
    check(kernel_device, select_top_cov, hidden, k=9)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_reported(kernel_device, value, generator):
    batch = random_batch((3, 17), generator)
    batch.log_prob.view(-1)[0] = value
    log_prob, advantages, mask = batch.to(kernel_device)
    assert token_covariance(log_prob, advantages, mask).cov[mask].isnan().all()
    step = SelectionAccumulator.top(k=5)
    step.add(log_prob, advantages, mask)
    assert not step.masks()[0].any()
    assert step.stats().nonfinite.item() == 1


def test_constant_advantages_select_nothing(kernel_device, generator):
    log_prob, _, mask = random_batch((3, 43), generator).to(kernel_device)
    advantages = torch.full_like(log_prob, 0.3)
    assert not select_top_cov(log_prob, advantages, mask, k=5).any()
    assert not select_cov_band(log_prob, advantages, mask, k=5, seed=1, **BAND).any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnAGpu:
    """What only a GPU can show."""

    @pytest.fixture(autouse=True)
    def use_the_kernels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("POWERKERNELS_BACKEND", "triton")

    @staticmethod
    def work(batch: Batch, seed: Tensor) -> list[Tensor]:
        return [
            *token_covariance(*batch),
            select_top_cov(*batch, ratio=2e-3),
            select_cov_band(*batch, ratio=2e-3, seed=seed, **BAND),
        ]

    def test_a_million_tokens_as_on_the_cpu(self, monkeypatch, generator):
        batch = random_batch((256, 4099), generator)
        on_gpu = self.work(batch.to("cuda"), torch.tensor([7], device="cuda"))
        monkeypatch.setenv("POWERKERNELS_BACKEND", "auto")
        on_cpu = self.work(batch, torch.tensor([7]))
        for got, wanted in zip(on_gpu, on_cpu, strict=True):
            torch.testing.assert_close(got.cpu(), wanted, rtol=1e-12, atol=0)

    def test_whose_packed_advantages_are_is_not_waited_for(self):
        tokens = torch.tensor([-1.0, -2.0, -4.0], device="cuda")
        in_doubt, one_each = (
            torch.tensor(bounds, device="cuda") for bounds in ([0, 2, 2, 3], [0, 1, 2, 3])
        )
        token_covariance(tokens, tokens, cu_seqlens=one_each)  # compiles
        with waits_are_errors():
            found, alike, padded = (
                token_covariance(tokens, tokens, **options).cov
                for options in ({"cu_seqlens": in_doubt}, {"cu_seqlens": one_each}, {})
            )
        assert found.isnan().all()
        assert torch.equal(alike, padded)

    def test_in_a_cuda_graph(self, generator):
        batch = random_batch((64, 1000), generator).to("cuda")
        seed = torch.tensor([3], device="cuda")
        self.work(batch, seed)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = self.work(batch, seed)
        batch.log_prob.copy_(batch.log_prob.flip(0))
        seed += 1
        graph.replay()
        for got, wanted in zip(captured, self.work(batch, seed), strict=True):
            assert torch.equal(got, wanted)

    def test_nothing_waits_for_the_device(self, generator):
        batch = random_batch((64, 1000), generator).to("cuda")
        seed = torch.tensor([3], device="cuda")
        self.work(batch, seed)  # compiles
        with waits_are_errors():
            self.work(batch, seed)
            select_cov_band(*batch, k=9, seed=2**63 + 7, **BAND)
            covariance_table(*batch)
            step = SelectionAccumulator.top(ratio=2e-3)
            for part in range(4):
                step.add(*(value[16 * part : 16 * part + 16] for value in batch))
            step.masks()

    def test_run_to_run_bits(self, generator):
        batch = random_batch((64, 4001), generator, ties=True).to("cuda")
        seed = torch.tensor([3], device="cuda")
        first = self.work(batch, seed)
        for _ in range(5):
            assert all(map(torch.equal, first, self.work(batch, seed)))
