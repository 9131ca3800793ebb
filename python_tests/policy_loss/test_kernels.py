"""The Triton kernel of the losses against the truth, in the interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from powerkernels import clip_cov_loss, kl_cov_loss, ppo_clip_loss, reference_kl_loss
from powerkernels._cuda_graph import waits_are_errors
from python_tests.covariance.expected import IGNORE_LARGE_RATIO
from python_tests.policy_loss.expected import Batch, random_batch
from python_tests.policy_loss.test_policy_loss import LOSSES, check_loss, check_metrics, kl, leaf_of

pytest.importorskip("triton")

from powerkernels.policy_loss import gpu

pytestmark = pytest.mark.filterwarnings(IGNORE_LARGE_RATIO)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs a sequence and several blocks of each, with few tokens."""
    monkeypatch.setattr(gpu, "BLOCK", 8)
    monkeypatch.setattr(gpu, "PROGRAMS", 6)


@pytest.mark.parametrize("name", LOSSES)
def test_loss(kernel_device, small_blocks, name, generator):
    check_loss(kernel_device, LOSSES[name], random_batch((3, 43), generator))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(kernel_device, small_blocks, dtype, generator):
    for name in ("ppo, dual clip", "kl_cov"):
        check_loss(kernel_device, LOSSES[name], random_batch((2, 21), generator, dtype))


@pytest.mark.parametrize("estimator", ["k1", "abs", "k2", "k3+"])
def test_estimators(kernel_device, estimator, generator):
    check_loss(kernel_device, kl(estimator), random_batch((2, 40), generator, spread=8.0))


def test_weights_and_modes(kernel_device, small_blocks, generator):
    batch = random_batch((3, 20), generator)
    weights = torch.rand(3, 20, generator=generator)
    check_loss(kernel_device, LOSSES["clip_cov"], batch, weights=weights)
    check_loss(kernel_device, LOSSES["ppo"], batch, "seq-mean-token-mean")


def test_packed_is_as_padded(kernel_device, small_blocks, generator):
    batch = random_batch((3, 20), generator).map(lambda value: value.to(kernel_device))
    lengths = torch.tensor([20, 0, 13], device=kernel_device)
    inside = torch.arange(20, device=kernel_device) < lengths[:, None]
    padded = leaf_of(batch._replace(mask=batch.mask & inside), kernel_device)
    packed = leaf_of(batch.map(lambda value: value[inside]), kernel_device)
    cu_seqlens = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
    for name in ("ppo", "clip_cov", "kl_cov"):
        one = LOSSES[name].call(padded, loss_agg_mode="seq-mean-token-mean")
        other = LOSSES[name].call(
            packed, loss_agg_mode="seq-mean-token-mean", cu_seqlens=cu_seqlens
        )
        torch.testing.assert_close(one.loss, other.loss)
        slopes = [
            torch.autograd.grad(found.loss, x.log_prob)[0]
            for found, x in ((one, padded), (other, packed))
        ]
        torch.testing.assert_close(slopes[0][inside], slopes[1])


def test_metrics(kernel_device, small_blocks, generator):
    check_metrics(kernel_device, random_batch((3, 43), generator))


def test_masked_out_places_do_not_matter(kernel_device, small_blocks, generator):
    batch = random_batch((3, 20), generator)
    zeros = batch._replace(log_prob=torch.where(batch.mask, batch.log_prob, 0))
    hidden = batch._replace(log_prob=torch.where(batch.mask, batch.log_prob, torch.nan))
    for name in ("ppo", "kl_cov"):
        found = []
        for x in (zeros, hidden):
            leaf = leaf_of(x, kernel_device)
            loss = LOSSES[name].call(leaf).loss
            found.append((loss.detach(), torch.autograd.grad(loss, leaf.log_prob)[0]))
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])


# Of the ratio, by default: at them the gradient jumps.
CLIP_BOUNDS = (0.8, 1.2, 3.0)
# Relative; two exponentials in float32 are nearer to each other.
EXP_ERROR = 3e-6


def off_the_bounds(batch: Batch) -> Batch:
    """Without the tokens that two exponentials may put on different sides of a bound."""
    ratio = (batch.log_prob.double() - batch.old_log_prob.double()).exp()
    near = [(ratio / bound - 1).abs() < EXP_ERROR for bound in CLIP_BOUNDS]
    return batch._replace(mask=batch.mask & ~torch.stack(near).any(0))


def test_a_token_on_a_bound_is_left_out(generator):
    batch = random_batch((3, 43), generator)
    mask = batch.mask.fill_(True)
    old_log_prob = batch.log_prob - 0.01
    old_log_prob[0, :3] = batch.log_prob[0, :3] - torch.tensor([0.8, 1.2 + 1e-6, 1.2 + 1e-4]).log()
    kept = off_the_bounds(batch._replace(old_log_prob=old_log_prob)).mask
    assert kept[0, :3].tolist() == [False, False, True]
    assert kept.sum() == mask.sum() - 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnAGpu:
    """What only a GPU can show."""

    @pytest.fixture(autouse=True)
    def use_the_kernels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("POWERKERNELS_BACKEND", "triton")

    @staticmethod
    def work(batch: Batch, seed: Tensor) -> list[Tensor]:
        found = [
            ppo_clip_loss(*batch),
            clip_cov_loss(*batch, clip_cov_ratio=0.01, clip_cov_lb=0.1, seed=seed),
            kl_cov_loss(*batch, kl_cov_ratio=0.01),
            reference_kl_loss(batch.log_prob, batch.old_log_prob, batch.mask, coef=0.1),
        ]
        slopes = torch.autograd.grad(sum(one.loss for one in found), batch.log_prob)
        return [*slopes, *(value for one in found for value in one.metrics.values())]

    def test_in_a_cuda_graph(self, generator):
        batch = leaf_of(random_batch((64, 1000), generator), "cuda")
        seed = torch.tensor([3], device="cuda")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.work(batch, seed)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = self.work(batch, seed)
        with torch.no_grad():
            batch.log_prob.copy_(batch.log_prob.flip(0))
        seed += 1
        graph.replay()
        assert all(map(torch.equal, captured, self.work(batch, seed)))

    def test_nothing_waits_for_the_device(self, generator):
        batch = leaf_of(random_batch((64, 1000), generator), "cuda")
        seed = torch.tensor([3], device="cuda")
        self.work(batch, seed)  # compiles
        with waits_are_errors():
            self.work(batch, seed)
            clip_cov_loss(*batch, seed=5, covariance_metrics=True)

    def test_a_million_tokens_as_on_the_cpu(self, monkeypatch, generator):
        batch = off_the_bounds(random_batch((256, 4099), generator))
        on_gpu = self.work(leaf_of(batch, "cuda"), torch.tensor([7], device="cuda"))
        monkeypatch.setenv("POWERKERNELS_BACKEND", "auto")
        on_cpu = self.work(leaf_of(batch), torch.tensor([7]))
        for got, wanted in zip(on_gpu, on_cpu, strict=True):
            torch.testing.assert_close(got.cpu(), wanted, rtol=1e-5, atol=1e-8)
