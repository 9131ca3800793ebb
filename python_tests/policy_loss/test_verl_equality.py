"""Our losses against verl's own functions: values, gradients and metrics.

Where the two differ on purpose, a test of its own shows both sides; docs/trainers.md lists them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from powerkernels import (
    PolicyLoss,
    SelectionAccumulator,
    clip_cov_loss,
    entropy_bonus,
    kl_cov_loss,
    ppo_clip_loss,
    reference_kl_loss,
    select_top_cov,
)
from python_tests import tiers
from python_tests.covariance.expected import IGNORE_LARGE_RATIO
from python_tests.policy_loss import verl_losses
from python_tests.policy_loss.expected import MODES

pytestmark = pytest.mark.filterwarnings(IGNORE_LARGE_RATIO)

MASK_DTYPES = (torch.bool, torch.int64, torch.float32)
KL_DTYPES = {mode: torch.float64 if mode == "token-mean" else torch.float32 for mode in MODES}
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
    """At least one token counts; of several rows the first does not at all."""
    generator = torch.Generator().manual_seed(seed)
    log_prob = -3 * torch.rand(shape, generator=generator, dtype=torch.float64)
    old = log_prob + spread * torch.randn(shape, generator=generator, dtype=torch.float64)
    advantages = torch.randn(shape, generator=generator, dtype=torch.float64)
    mask = torch.rand(shape, generator=generator) < 0.7
    if shape[0] > 1:
        mask[0] = False
    mask[-1, 0] = True
    return Batch(log_prob.to(dtype), old.to(dtype), advantages.to(dtype), mask.to(mask_dtype))


def assert_equal(
    found: PolicyLoss,
    leaf: Tensor,
    peer: tuple[Tensor, Tensor, dict[str, float]],
    mode: str = "token-mean",
) -> None:
    """Within a few roundings of verl's own sums in the inputs' dtype."""
    value, gradient, metrics = peer
    (slope,) = torch.autograd.grad(found.loss, leaf)
    double = leaf.dtype == torch.float64
    rtol = 1e-12 if double else 2e-5
    if double and mode == "seq-mean-token-mean":
        rtol = 4e-7  # both divide by tokens + 1e-8, and verl's sum is float32, where this is lost
    size = gradient.abs().sum().item()  # the loss is a difference of numbers of this size
    assert found.loss.dtype == value.dtype
    assert abs(found.loss.item() - value.item()) <= rtol * abs(value.item()) + rtol / 20 * size
    # A gradient of KL-Cov is a difference too: a few roundings of the largest.
    atol = (1e-14 if double else 2**-21) * gradient.abs().max().item()
    torch.testing.assert_close(slope, gradient, rtol=rtol, atol=atol)
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
    batch: Batch, clip: dict[str, float] | None = None, **options: Any
) -> tuple[tuple[Tensor, Tensor, dict[str, float]], Tensor]:
    """verl's results, and the tokens that it chose: those with a loss of PPO's that lost it."""
    clip = clip or {}
    torch.manual_seed(3)
    peer = verl_losses.loss("clip_cov", *batch, **options, **clip)
    leaf = leaf_of(batch)
    ppo = ppo_clip_loss(leaf, *batch[1:], clip_ratio_c=None, loss_agg_mode="token-sum", **clip).loss
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
    assert is_clear_cut(batch, 0.13)
    leaf = leaf_of(batch)
    options = {"kl_cov_ratio": 0.13, "ppo_kl_coef": 0.7}
    found = kl_cov_loss(leaf, *batch[1:], loss_agg_mode=mode, **options, **counts)
    assert_equal(found, leaf, verl_losses.loss("kl_cov", *batch, mode, None, counts, **options))


def is_clear_cut(batch: Batch, ratio: float) -> bool:
    """Whether the last covariance that KL-Cov takes is above the first that it leaves by more than
    float32's roundings. Of two tokens the covariances are equal."""
    kept = batch.mask.bool()
    log_prob, advantages = (x.double()[kept] for x in (batch.log_prob, batch.advantages))
    cov = (log_prob - log_prob.mean()) * (advantages - advantages.mean())
    ordered = cov.sort(descending=True).values
    number = max(1, int(len(ordered) * ratio))
    if number == len(ordered):
        return len(ordered) > 1
    return bool(ordered[number - 1] - ordered[number] > 1e-5)


def test_kl_cov_where_equal_covariances_have_equal_losses(backend):
    """Each token twice, and an odd number to choose: whichever of two it is, the value is one."""
    batch = random_batch((4, 50), 9)
    twice = Batch(*(torch.cat((x, x), dim=1) for x in batch))
    number = int(twice.mask.sum())
    ratio = 7.5 / number
    value, _, metrics = verl_losses.loss("kl_cov", *twice, kl_cov_ratio=ratio, ppo_kl_coef=1.0)
    found = kl_cov_loss(*twice, kl_cov_ratio=ratio)
    assert found.loss.item() == pytest.approx(value.item(), rel=2e-5, abs=1e-6)
    assert found.metrics["actor/ppo_kl"].item() == pytest.approx(metrics["actor/ppo_kl"], rel=1e-5)
    assert found.metrics["actor/cov_selected_tokens"] == 7


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
    # Some beyond the bounds of k3, and of its argument.
    batch = random_batch((5, 40), 7, spread=12.0, dtype=KL_DTYPES[mode])
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


@tiers.examples(
    0.4,
    derandomize=True,  # a ratio within a rounding of a bound is clipped by one and not the other
)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 70)),
    seed=st.integers(0, 10**6),
    mode=st.sampled_from(MODES),
    clip=st.fixed_dictionaries(
        {"clip_ratio_low": st.floats(0.01, 0.9), "clip_ratio_high": st.floats(0.01, 2.0)}
    ),
    c=st.floats(1.01, 5.0),
    ratio=st.floats(1e-4, 1.0),
    coef=st.floats(0.0, 3.0),
    spread=st.floats(0.0, 2.0),
    mask_dtype=st.sampled_from(MASK_DTYPES),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    counts=st.fixed_dictionaries(
        {},
        optional={"loss_scale_factor": st.integers(1, 99)},
    ),
    totals=st.none() | st.tuples(st.integers(1, 9), st.integers(1, 9999), st.integers(1, 99)),
    weighted=st.booleans(),
)
def test_any_settings(
    backend,
    shape,
    seed,
    mode,
    clip,
    c,
    ratio,
    coef,
    spread,
    mask_dtype,
    dtype,
    counts,
    totals,
    weighted,
):
    batch = random_batch(shape, seed, spread=spread, mask_dtype=mask_dtype, dtype=dtype)
    weights = batch.advantages.abs().flip(0) if weighted else None
    if totals is not None:
        names = ("dp_size", "batch_num_tokens", "global_batch_size")
        counts = counts | dict(zip(names, totals, strict=True))
    ours: dict[str, Any] = {"loss_agg_mode": mode, "rollout_is_weights": weights, **counts}
    theirs: dict[str, Any] = {"mode": mode, "weights": weights, "counts": counts}

    leaf = leaf_of(batch)
    found = ppo_clip_loss(leaf, *batch[1:], clip_ratio_c=c, **clip, **ours)
    peer = verl_losses.loss("vanilla", *batch, **theirs, clip_ratio_c=c, **clip)
    assert_equal(found, leaf, peer, mode)

    if is_clear_cut(batch, ratio):
        penalty = {"kl_cov_ratio": ratio, "ppo_kl_coef": coef}
        found = kl_cov_loss(leaf, *batch[1:], **penalty, **ours)
        assert_equal(found, leaf, verl_losses.loss("kl_cov", *batch, **theirs, **penalty), mode)

    band = {"clip_cov_ratio": ratio, "clip_cov_lb": 0.1, "clip_cov_ub": 2.0}
    peer, selected = verl_clip_cov(batch, clip, **theirs, **band)
    found = clip_cov_loss(leaf, *batch[1:], selected=selected, **clip, **ours)
    assert_equal(found, leaf, peer, mode)


def penalised(batch: Batch, ratio: float, coef: float = 1e6) -> Tensor:
    """The tokens that verl's KL-Cov selects."""
    slope = verl_losses.loss("kl_cov", *batch, "token-sum", kl_cov_ratio=ratio, ppo_kl_coef=coef)[1]
    return slope.abs() > coef / 2


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

    def test_no_token_in_the_whole_batch(self):
        batch = random_batch((4, 30), 0)._replace(mask=torch.zeros(4, 30, dtype=torch.bool))
        counts = {"dp_size": 2, "batch_num_tokens": 0}
        assert verl_losses.loss("vanilla", *batch, "token-mean", None, counts)[0].isnan()
        with pytest.raises(ValueError, match="batch_num_tokens must be"):
            ppo_clip_loss(*batch, **counts)  # the adapter takes 1 instead: see test_verl.py

    @pytest.mark.parametrize("number", [1, 2, 4])
    def test_ties(self, number):
        """Of one token the covariance is 0, of two there are two equal ones."""
        sign = torch.tensor([[1.0, -1.0, 1.0, -1.0]])[:, :number]
        log_prob = sign - 2
        batch = Batch(log_prob, log_prob - 0.1, sign, torch.ones(1, number, dtype=torch.bool))
        chosen = penalised(batch, 0.5)
        assert chosen.sum() == max(1, number // 2)  # which ones is up to torch.topk
        found = select_top_cov(log_prob, sign, ratio=0.5)
        assert found.tolist() == [[number > 1 and place < number / 2 for place in range(number)]]

    @pytest.mark.parametrize("difference", [30.0, 100.0])
    def test_large_ratios(self, difference):
        batch = random_batch((2, 10), 0)
        batch.old_log_prob[-1, 0] = batch.log_prob[-1, 0] - difference
        batch.advantages[-1, 0] = 0 if difference == 100 else -1
        ours = {
            "clip_cov": lambda x: clip_cov_loss(x, *batch[1:], seed=0),
            "kl_cov": lambda x: kl_cov_loss(x, *batch[1:], ppo_kl_coef=0.0),
        }
        for name, loss in ours.items():
            value, slope, metrics = verl_losses.loss(name, *batch, ppo_kl_coef=0.0)
            assert value.isnan() if difference == 100 else value > 1e10  # inf * 0, and e^30
            leaf = leaf_of(batch)
            found = loss(leaf)
            assert found.loss < math.exp(20)
            (gradient,) = torch.autograd.grad(found.loss, leaf)
            assert gradient[-1, 0] == 0
            assert not abs(slope[-1, 0]) < 1e10
            assert found.metrics["actor/ppo_kl"].abs() < abs(metrics["actor/ppo_kl"])

    def test_the_penalty_of_large_ratios_is_not_clamped(self):
        batch = random_batch((2, 10), 0)
        batch.old_log_prob[-1, 0] = batch.log_prob[-1, 0] - 30
        selected = torch.zeros(2, 10, dtype=torch.bool)
        selected[-1, 0] = True
        losses = [
            kl_cov_loss(*batch, ppo_kl_coef=coef, selected=selected, loss_agg_mode="token-sum").loss
            for coef in (0.0, 1e8)
        ]
        assert (losses[1] - losses[0]).item() == pytest.approx(30e8, rel=1e-6)

    @pytest.mark.parametrize("offset", [1e6])
    def test_large_offsets(self, offset):
        generator = torch.Generator().manual_seed(0)
        log_prob = -3 * torch.rand(8, 1024, generator=generator)
        advantages = offset + torch.randn(8, 1024, generator=generator)
        batch = Batch(log_prob, log_prob - 0.1, advantages, torch.ones(8, 1024, dtype=torch.bool))
        x, a = log_prob.double(), advantages.double()
        cov = ((x - x.mean()) * (a - a.mean())).flatten()
        wanted = torch.zeros(8 * 1024, dtype=torch.bool)
        wanted[cov.topk(819).indices] = True
        assert (penalised(batch, 0.1, coef=1e12).flatten() != wanted).any()
        assert torch.equal(select_top_cov(log_prob, advantages, ratio=0.1).flatten(), wanted)

    def test_ratios_above_1(self):
        batch = random_batch((2, 10), 0)
        assert verl_losses.loss("clip_cov", *batch, clip_cov_ratio=1.5)[0].isfinite()
        with pytest.raises(RuntimeError, match="out of range"):
            verl_losses.loss("kl_cov", *batch, kl_cov_ratio=1.5)
        with pytest.raises(ValueError, match="clip_cov_ratio must be a share"):
            clip_cov_loss(*batch, clip_cov_ratio=1.5, seed=0)
        with pytest.raises(ValueError, match="kl_cov_ratio must be a share"):
            kl_cov_loss(*batch, kl_cov_ratio=1.5)

    def test_selection_of_micro_batches(self):
        """verl issue #7829."""
        batch = random_batch((8, 1024), 0)._replace(mask=torch.ones(8, 1024, dtype=torch.bool))
        rows = [Batch(*(x[i : i + 1] for x in batch)) for i in range(8)]
        assert penalised(batch, 2e-4).sum() == 1
        assert sum(penalised(row, 2e-4).sum() for row in rows) == 8
        step = SelectionAccumulator.top(ratio=2e-4)
        for row in rows:
            step.add(row.log_prob, row.advantages, row.mask)
        assert torch.equal(torch.cat(step.masks()), penalised(batch, 2e-4))

    def test_the_gradient_where_rounding_makes_both_terms_equal(self, monkeypatch):
        monkeypatch.setenv("POWERKERNELS_BACKEND", "reference")  # whose exp is torch's
        one = torch.ones(1, 1)
        above = torch.nextafter(torch.tensor(1.2), torch.tensor(2.0)).log().view(1, 1)
        assert above.exp() > torch.tensor(1.2)
        numbers = torch.linspace(1.66, 2.0, 30)
        equal = numbers[numbers * above.exp().item() == numbers * torch.tensor(1.2)]
        assert len(equal)
        for number in equal:
            batch = Batch(above, 0 * one, number * one, one.bool())
            half = verl_losses.loss("vanilla", *batch)[1]
            leaf = leaf_of(batch)
            (whole,) = torch.autograd.grad(ppo_clip_loss(leaf, *batch[1:]).loss, leaf)
            assert half.item() == pytest.approx(whole.item() / 2)

    def test_nan_at_a_place_that_counts(self):
        batch = random_batch((4, 30), 0)
        batch.log_prob[2, 3] = torch.nan
        batch.mask[2, 3] = True
        value, slope, _ = verl_losses.loss("kl_cov", *batch, ppo_kl_coef=1e6)
        assert value.isnan()
        assert (slope.isnan() | (slope.abs() > 1e3)).any()  # the one that torch.topk gave
        found = kl_cov_loss(*batch)
        assert found.loss.isnan()
        assert found.metrics["actor/cov_selected_tokens"] == 0
        assert found.metrics["actor/nonfinite_tokens"] == 1

    def test_metrics(self):
        batch = random_batch((4, 30), 0)
        ours = {
            "vanilla": ppo_clip_loss(*batch),
            "clip_cov": clip_cov_loss(*batch, seed=0),
            "kl_cov": kl_cov_loss(*batch),
        }
        for name, found in ours.items():
            metrics = verl_losses.loss(name, *batch)[2]
            assert all(isinstance(value, float) for value in metrics.values())
            assert all(isinstance(value, Tensor) for value in found.metrics.values())
            assert set(metrics) < set(found.metrics)

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
        """verl's modes by sequence multiply by the mask, in the sequences that have a token; so
        does the gradient of an exp without a clamp before it, in every mode."""
        batch = random_batch((4, 30), 0)
        batch.mask[1, :5] = False
        batch.log_prob[1, :5] = torch.nan
        value = verl_losses.loss("vanilla", *batch, "seq-mean-token-sum")[0]
        assert value.isnan()
        leaf = leaf_of(batch)
        found = ppo_clip_loss(leaf, *batch[1:], loss_agg_mode="seq-mean-token-sum").loss
        assert found.isfinite()
        (gradient,) = torch.autograd.grad(found, leaf)
        assert (gradient[1, :5] == 0).all()
        value, slope, _ = verl_losses.loss("kl_cov", *batch, "token-mean")
        assert value.isfinite()
        assert slope[1, :5].isnan().all()
        (gradient,) = torch.autograd.grad(kl_cov_loss(leaf, *batch[1:]).loss, leaf)
        assert (gradient[1, :5] == 0).all()
