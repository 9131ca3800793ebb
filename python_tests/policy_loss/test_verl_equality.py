"""Our losses against verl's own functions: values, gradients and metrics.

Where the two differ on purpose, a test of its own shows both sides; docs/trainers.md lists them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from powerkernels import (
    PolicyLoss,
    clip_cov_loss,
    entropy_bonus,
    kl_cov_loss,
    ppo_clip_loss,
    reference_kl_loss,
)
from python_tests.covariance.expected import IGNORE_LARGE_RATIO
from python_tests.policy_loss import verl_losses
from python_tests.policy_loss.expected import MODES

pytestmark = pytest.mark.filterwarnings(IGNORE_LARGE_RATIO)

MASK_DTYPES = (torch.bool, torch.int64, torch.float32)
SHAPES = ((1, 1), (1, 9), (7, 1), (5, 40), (16, 127))
COUNTS: tuple[dict[str, Any], ...] = (
    {},
    {"dp_size": 2, "batch_num_tokens": 321, "global_batch_size": 13, "loss_scale_factor": 55},
)


class Batch(NamedTuple):
    log_prob: Tensor
    old_log_prob: Tensor
    advantages: Tensor
    mask: Tensor


def random_batch(
    shape: tuple[int, int],
    seed: int,
    *,
    spread: float = 0.3,
    dtype: torch.dtype = torch.float32,
    mask_dtype: torch.dtype = torch.bool,
) -> Batch:
    """At least one token counts; of some shapes a whole row does not."""
    generator = torch.Generator().manual_seed(seed)
    log_prob = -3 * torch.rand(shape, generator=generator, dtype=torch.float64)
    old = log_prob + spread * torch.randn(shape, generator=generator, dtype=torch.float64)
    advantages = torch.randn(shape, generator=generator, dtype=torch.float64)
    mask = torch.rand(shape, generator=generator) < 0.7
    mask[0] = False
    mask[-1, 0] = True
    return Batch(log_prob.to(dtype), old.to(dtype), advantages.to(dtype), mask.to(mask_dtype))


def assert_equal(
    found: PolicyLoss, leaf: Tensor, peer: tuple[Tensor, Tensor, dict[str, float]]
) -> None:
    """Within a few roundings of verl's own sums in the inputs' dtype."""
    value, gradient, metrics = peer
    (slope,) = torch.autograd.grad(found.loss, leaf)
    double = leaf.dtype == torch.float64
    rtol = 1e-12 if double else 2e-5
    size = gradient.abs().sum().item()  # the loss is a difference of numbers of this size
    assert found.loss.dtype == value.dtype
    assert abs(found.loss.item() - value.item()) <= rtol * abs(value.item()) + rtol / 20 * size
    torch.testing.assert_close(
        slope, gradient, rtol=rtol, atol=1e-7 * gradient.abs().max().item() * (not double)
    )
    for name, wanted in metrics.items():
        assert found.metrics[name].item() == pytest.approx(wanted, rel=1e-5, abs=1e-6), name


def leaf_of(batch: Batch) -> Tensor:
    return batch.log_prob.clone().requires_grad_()


@pytest.mark.parametrize("mask_dtype", MASK_DTYPES)
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_vanilla(backend, shape, mode, counts, mask_dtype):
    batch = random_batch(shape, 1, mask_dtype=mask_dtype)
    leaf = leaf_of(batch)
    found = ppo_clip_loss(
        leaf,
        *batch[1:],
        clip_ratio_low=0.1,
        clip_ratio_high=0.3,
        clip_ratio_c=1.4,
        loss_agg_mode=mode,
        **counts,
    )
    peer = verl_losses.loss(
        "vanilla",
        *batch,
        mode,
        None,
        counts,
        clip_ratio_low=0.1,
        clip_ratio_high=0.3,
        clip_ratio_c=1.4,
    )
    assert_equal(found, leaf, peer)


def verl_clip_cov(
    batch: Batch, **options: Any
) -> tuple[tuple[Tensor, Tensor, dict[str, float]], Tensor]:
    """verl's results, and the tokens that it chose: those with a loss of PPO's that lost it."""
    torch.manual_seed(3)
    peer = verl_losses.loss("clip_cov", *batch, **options)
    leaf = leaf_of(batch)
    ppo = ppo_clip_loss(leaf, *batch[1:], clip_ratio_c=None, loss_agg_mode="token-sum").loss
    (slope,) = torch.autograd.grad(ppo, leaf)
    return peer, (peer[1] == 0) & (slope != 0)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_clip_cov_with_verls_choice(backend, shape, mode, counts):
    batch = random_batch(shape, 2)
    band = {"clip_cov_ratio": 0.05, "clip_cov_lb": 0.1, "clip_cov_ub": 2.0}
    peer, selected = verl_clip_cov(batch, mode=mode, counts=counts, **band)
    leaf = leaf_of(batch)
    found = clip_cov_loss(leaf, *batch[1:], selected=selected, loss_agg_mode=mode, **counts)
    assert_equal(found, leaf, peer)


@pytest.mark.parametrize("mask_dtype", MASK_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_clip_cov_where_all_of_the_band_is_chosen(backend, shape, mask_dtype):
    """Then there is nothing random: the band, what PPO clips, and the number are verl's."""
    batch = random_batch(shape, 4, mask_dtype=mask_dtype)
    band = {"clip_cov_ratio": 0.9, "clip_cov_lb": 0.2, "clip_cov_ub": 1.5}
    leaf = leaf_of(batch)
    found = clip_cov_loss(leaf, *batch[1:], seed=0, **band)
    assert_equal(found, leaf, verl_losses.loss("clip_cov", *batch, **band))


@pytest.mark.parametrize("ratio", [0.0002, 0.01, 0.03, 0.29])
def test_clip_cov_chooses_as_many(backend, ratio):
    batch = random_batch((16, 200), 5)
    band = {"clip_cov_ratio": ratio, "clip_cov_lb": 0.1, "clip_cov_ub": 3.0}
    metrics = clip_cov_loss(*batch, seed=1, **band).metrics
    peer = verl_losses.loss("clip_cov", *batch, **band)[2]
    for name, value in peer.items():
        assert metrics[name].item() == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("mask_dtype", MASK_DTYPES)
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES[1:])  # of one token the covariance is 0: see below
def test_kl_cov(backend, shape, mode, counts, mask_dtype):
    batch = random_batch(shape, 3, mask_dtype=mask_dtype)
    if batch.mask.sum() < 2:
        batch.mask[-1] = 1
    leaf = leaf_of(batch)
    options = {"kl_cov_ratio": 0.13, "ppo_kl_coef": 0.7}
    found = kl_cov_loss(leaf, *batch[1:], loss_agg_mode=mode, **options, **counts)
    if batch.mask.sum() > 1:
        assert_equal(found, leaf, verl_losses.loss("kl_cov", *batch, mode, None, counts, **options))


@pytest.mark.parametrize("name", ["vanilla", "clip_cov", "kl_cov"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_importance_weights_and_dtypes(backend, name, dtype):
    batch = random_batch((6, 50), 6, dtype=dtype)
    weights = torch.rand(6, 50, generator=torch.Generator().manual_seed(0)).to(dtype) * 2
    leaf = leaf_of(batch)
    if name == "vanilla":
        found = ppo_clip_loss(leaf, *batch[1:], rollout_is_weights=weights)
        peer = verl_losses.loss(name, *batch, weights=weights)
    elif name == "kl_cov":
        found = kl_cov_loss(leaf, *batch[1:], rollout_is_weights=weights, kl_cov_ratio=0.1)
        peer = verl_losses.loss(name, *batch, weights=weights, kl_cov_ratio=0.1, ppo_kl_coef=1.0)
    else:
        band = {"clip_cov_ratio": 0.9, "clip_cov_lb": 0.2, "clip_cov_ub": 1.5}
        found = clip_cov_loss(leaf, *batch[1:], rollout_is_weights=weights, seed=0, **band)
        peer = verl_losses.loss(name, *batch, weights=weights, **band)
    assert_equal(found, leaf, peer)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("plus", ["", "+"])
@pytest.mark.parametrize("estimator", ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"])
def test_reference_kl(backend, estimator, plus, mode):
    batch = random_batch((5, 40), 7, spread=3.0)  # some beyond the bounds of k3
    leaf = leaf_of(batch)
    found = reference_kl_loss(
        leaf,
        batch.old_log_prob,
        batch.mask,
        coef=1.0,
        estimator=estimator + plus,
        loss_agg_mode=mode,
    )
    peer_leaf = leaf_of(batch)
    tokens = verl_losses.algorithms.kl_penalty(peer_leaf, batch.old_log_prob, estimator + plus)
    value = verl_losses.algorithms.agg_loss(tokens, batch.mask, mode)
    (gradient,) = torch.autograd.grad(value, peer_leaf)
    assert_equal(found, leaf, (value.detach(), gradient, {}))


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("mode", MODES)
def test_entropy(backend, mode, counts):
    batch = random_batch((5, 40), 8)
    leaf = leaf_of(batch)
    found = entropy_bonus(leaf, batch.mask, coef=1.0, loss_agg_mode=mode, **counts)
    peer_leaf = leaf_of(batch)
    value = -verl_losses.algorithms.agg_loss(peer_leaf, batch.mask, mode, **counts)
    (gradient,) = torch.autograd.grad(value, peer_leaf)
    assert_equal(found, leaf, (value.detach(), gradient, {}))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.integers(1, 9),
    length=st.integers(1, 70),
    seed=st.integers(0, 10**6),
    mode=st.sampled_from(MODES),
    low=st.floats(0.01, 0.9),
    high=st.floats(0.01, 2.0),
    c=st.floats(1.01, 5.0),
    ratio=st.floats(1e-4, 1.0),
    spread=st.floats(0.0, 2.0),
    mask_dtype=st.sampled_from(MASK_DTYPES),
)
def test_any_settings(rows, length, seed, mode, low, high, c, ratio, spread, mask_dtype):
    batch = random_batch((rows, length), seed, spread=spread, mask_dtype=mask_dtype)
    clip = {"clip_ratio_low": low, "clip_ratio_high": high}
    leaf = leaf_of(batch)
    found = ppo_clip_loss(leaf, *batch[1:], clip_ratio_c=c, loss_agg_mode=mode, **clip)
    peer = verl_losses.loss("vanilla", *batch, mode, clip_ratio_c=c, **clip)
    assert_equal(found, leaf, peer)
    if batch.mask.sum() > 1:
        found = kl_cov_loss(leaf, *batch[1:], kl_cov_ratio=ratio, loss_agg_mode=mode)
        peer = verl_losses.loss("kl_cov", *batch, mode, kl_cov_ratio=ratio, ppo_kl_coef=1.0)
        assert_equal(found, leaf, peer)
    band = {"clip_cov_ratio": ratio, "clip_cov_lb": 0.1, "clip_cov_ub": 2.0}
    peer, selected = verl_clip_cov(batch, mode=mode, **band, clip_ratio_low=0.2)
    found = clip_cov_loss(leaf, *batch[1:], selected=selected, loss_agg_mode=mode)
    assert_equal(found, leaf, peer)


class TestDeliberateDifferences:
    """verl's behaviour first, ours after it; one a row of the table in docs/trainers.md."""

    def test_constant_advantages(self):
        batch = random_batch((4, 30), 0)._replace(advantages=torch.full((4, 30), 0.5))
        options = {"kl_cov_ratio": 0.02, "ppo_kl_coef": 1.0}
        value = verl_losses.loss("kl_cov", *batch, **options)[0]
        found = kl_cov_loss(*batch, **options)
        plain = kl_cov_loss(*batch, selected=torch.zeros(4, 30, dtype=torch.bool))
        assert value > plain.loss + 1e-5  # an arbitrary token was penalised
        assert found.loss == plain.loss
        assert found.metrics["actor/cov_constant"] == 1

    def test_no_token(self):
        batch = random_batch((4, 30), 0)._replace(mask=torch.zeros(4, 30, dtype=torch.bool))
        for name, ours in (("vanilla", ppo_clip_loss), ("kl_cov", kl_cov_loss)):
            assert verl_losses.loss(name, *batch)[0].isnan()
            assert ours(*batch).loss == 0

    @pytest.mark.parametrize("difference", [30.0, 100.0])
    def test_large_ratios(self, difference):
        batch = random_batch((2, 10), 0)
        batch.old_log_prob[-1, 0] = batch.log_prob[-1, 0] - difference
        batch.advantages[-1, 0] = 0 if difference == 100 else -1
        value = verl_losses.loss("clip_cov", *batch)[0]
        assert value.isnan() if difference == 100 else value > 1e10  # inf * 0, and e^30
        found = clip_cov_loss(*batch, seed=0).loss
        assert found.isfinite()
        assert found < math.exp(20)

    def test_verl_averages_the_fractions_of_a_mask(self):
        batch = random_batch((4, 30), 0, mask_dtype=torch.float32)
        half = batch._replace(mask=0.5 * batch.mask)
        sums = [verl_losses.loss("vanilla", *x, "token-sum")[0] for x in (batch, half)]
        assert sums[1].item() == pytest.approx(sums[0].item() / 2)
        ours = [ppo_clip_loss(*x, loss_agg_mode="token-sum").loss for x in (batch, half)]
        assert ours[0] == ours[1]

    def test_bfloat16_is_computed_in_float32(self):
        batch = random_batch((8, 100), 0, dtype=torch.bfloat16)
        exact = ppo_clip_loss(*(x.double() for x in batch[:3]), batch.mask).loss
        value = verl_losses.loss("vanilla", *batch)[0]
        found = ppo_clip_loss(*batch).loss
        assert found.dtype == torch.float32
        assert (found - exact).abs() < 1e-6
        assert (value - exact).abs() > 1e-5

    def test_masked_out_nan(self):
        """verl's modes by sequence multiply by the mask, in the sequences that have a token."""
        batch = random_batch((4, 30), 0)
        batch.mask[1, :5] = False
        batch.log_prob[1, :5] = torch.nan
        value = verl_losses.loss("vanilla", *batch, "seq-mean-token-sum")[0]
        assert value.isnan()
        assert ppo_clip_loss(*batch, loss_agg_mode="seq-mean-token-sum").loss.isfinite()
