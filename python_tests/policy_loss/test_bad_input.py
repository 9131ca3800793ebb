"""What is refused, and that the message names the argument."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from powerkernels import (
    clip_cov_loss,
    entropy_bonus,
    kl_cov_loss,
    ppo_clip_loss,
    reference_kl_loss,
)

VALUES = torch.linspace(-1, 1, 6).view(2, 3)
FLAT = VALUES.view(-1)
BOUNDS = torch.tensor([0, 2, 6])

POLICY_LOSSES: dict[str, Callable[..., Any]] = {
    "ppo_clip_loss": ppo_clip_loss,
    "clip_cov_loss": functools.partial(clip_cov_loss, seed=1),
    "kl_cov_loss": kl_cov_loss,
}


def with_tokens(log_prob: Tensor, **options: Any) -> list[Callable[[], Any]]:
    """Every loss of valid tokens shaped as log_prob; to be called with the options."""
    policy = [
        functools.partial(loss, log_prob, log_prob, log_prob, **options)
        for loss in POLICY_LOSSES.values()
    ]
    return [
        *policy,
        functools.partial(reference_kl_loss, log_prob, log_prob, coef=1.0, **options),
        functools.partial(entropy_bonus, log_prob, coef=1.0, **options),
    ]


every_policy_loss = pytest.mark.parametrize("loss", POLICY_LOSSES.values(), ids=POLICY_LOSSES)


@every_policy_loss
@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("log_prob", (VALUES.long(), VALUES, VALUES), TypeError),
        ("log_prob", ([[0.0]], VALUES, VALUES), TypeError),
        ("log_prob", (torch.tensor(0.0),) * 3, ValueError),
        ("log_prob", (FLAT,) * 3, ValueError),  # flat without cu_seqlens
        ("log_prob", (VALUES[None],) * 3, ValueError),
        ("old_log_prob", (VALUES, VALUES.int(), VALUES), TypeError),
        ("old_log_prob", (VALUES, 0.0, VALUES), TypeError),
        ("old_log_prob", (VALUES, VALUES[:1], VALUES), ValueError),
        ("old_log_prob", (VALUES, VALUES.to("meta"), VALUES), ValueError),
        ("advantages", (VALUES, VALUES, VALUES.int()), TypeError),
        ("advantages", (VALUES, VALUES, 1.0), TypeError),
        ("advantages", (VALUES, VALUES, torch.ones(3)), ValueError),
        ("advantages", (VALUES, VALUES, torch.ones(1, 3)), ValueError),
        ("response_mask", (VALUES, VALUES, VALUES, [1]), TypeError),
        ("response_mask", (VALUES, VALUES, VALUES, torch.ones(2)), ValueError),
        ("response_mask", (VALUES, VALUES, VALUES, VALUES.to("meta")), ValueError),
    ],
)
def test_wrong_tensors(loss, name, arguments, error):
    with pytest.raises(error, match=f"^{name} must"):
        loss(*arguments)


@every_policy_loss
def test_wrong_weights(loss):
    for value, error in ((torch.ones(2), ValueError), (1.0, TypeError), (VALUES > 0, TypeError)):
        with pytest.raises(error, match=r"^rollout_is_weights must"):
            loss(VALUES, VALUES, VALUES, rollout_is_weights=value)


def test_wrong_tensors_of_the_other_losses():
    with pytest.raises(TypeError, match=r"^entropy must be"):
        entropy_bonus(VALUES.int(), coef=1.0)
    with pytest.raises(ValueError, match=r"^entropy must have shape"):
        entropy_bonus(FLAT, coef=1.0)
    with pytest.raises(ValueError, match=r"^response_mask must have shape"):
        entropy_bonus(VALUES, torch.ones(2), coef=1.0)
    with pytest.raises(TypeError, match=r"^log_prob must be"):
        reference_kl_loss(VALUES.int(), VALUES, coef=1.0)
    with pytest.raises(ValueError, match=r"^ref_log_prob must have shape"):
        reference_kl_loss(VALUES, VALUES.T, coef=1.0)


@every_policy_loss
def test_old_log_prob_and_advantages_are_not_optional(loss):
    with pytest.raises(TypeError, match=r"^old_log_prob must be"):
        loss(VALUES, None, VALUES)
    with pytest.raises(TypeError, match=r"^advantages must be"):
        loss(VALUES, VALUES, None)


def test_ref_log_prob_is_not_optional():
    with pytest.raises(TypeError, match=r"^ref_log_prob must be"):
        reference_kl_loss(VALUES, None, coef=1.0)


@given(st.lists(st.integers(-2, 9), max_size=5), st.integers(0, 6))
def test_bounds_that_do_not_add_up_are_refused(bounds, count):
    cu_seqlens = torch.tensor(bounds, dtype=torch.int64)
    right = bounds[:1] == [0] and bounds[-1] == count and sorted(bounds) == bounds
    for call in with_tokens(torch.ones(count), cu_seqlens=cu_seqlens):
        if right:
            assert call().loss.isfinite()
        else:
            with pytest.raises(ValueError, match=r"^cu_seqlens"):
                call()


def test_bounds_are_of_flat_tensors():
    for call in with_tokens(VALUES, cu_seqlens=BOUNDS):
        with pytest.raises(ValueError, match=r"^(log_prob|entropy) must be flat"):
            call()
    for call in with_tokens(FLAT, cu_seqlens=BOUNDS.float()):
        with pytest.raises(TypeError, match=r"^cu_seqlens must be"):
            call()


def test_unknown_modes():
    for mode in ("mean", "", None, "token_mean", "seq-mean-token-sum-norm "):
        for call in with_tokens(VALUES, loss_agg_mode=mode):
            with pytest.raises(ValueError, match=r"^loss_agg_mode must be one of .*token-mean"):
                call()


@pytest.mark.parametrize(
    ("mode", "missing"),
    [
        ("token-mean", "batch_num_tokens"),
        ("seq-mean-token-sum", "global_batch_size"),
        ("seq-mean-token-sum-norm", "global_batch_size"),
        ("seq-mean-token-mean", "global_batch_size"),
    ],
)
def test_many_ranks_need_the_counts_of_all(mode, missing):
    others = {"batch_num_tokens": 9, "global_batch_size": 9}
    for call in with_tokens(VALUES, loss_agg_mode=mode, dp_size=2):
        with pytest.raises(ValueError, match=f"^{missing}.*must be given"):
            call()
        with pytest.raises(ValueError, match=f"^{missing}.*must be given"):
            call(**{key: value for key, value in others.items() if key != missing})
        assert call(**{missing: 9}).loss.isfinite()
    for call in with_tokens(VALUES, loss_agg_mode="token-sum", dp_size=2):
        assert call().loss.isfinite()


def test_packed_sequences_have_no_length_to_divide_by():
    mode = "seq-mean-token-sum-norm"
    for call in with_tokens(FLAT, cu_seqlens=BOUNDS, loss_agg_mode=mode):
        with pytest.raises(ValueError, match=r"^loss_scale_factor must be given"):
            call()
        assert call(loss_scale_factor=3).loss.isfinite()


@pytest.mark.parametrize("name", ["batch_num_tokens", "global_batch_size", "loss_scale_factor"])
def test_wrong_counts(name):
    for value, error in (
        (0, ValueError),
        (-1, ValueError),
        (math.nan, ValueError),
        (math.inf, ValueError),
        ("7", TypeError),
        (True, TypeError),
        (torch.ones(2), ValueError),
        (torch.ones(0), ValueError),
    ):
        for call in with_tokens(VALUES, **{name: value}):
            with pytest.raises(error, match=f"^{name} must be"):
                call()


def test_wrong_numbers_of_ranks():
    for value, error in (
        (0, ValueError),
        (-2, ValueError),
        (math.nan, ValueError),
        ("2", TypeError),
    ):
        for call in with_tokens(VALUES, dp_size=value, batch_num_tokens=6):
            with pytest.raises(error, match=r"^dp_size must be"):
                call()


CALLS: dict[str, Callable[..., Any]] = {
    name: functools.partial(loss, VALUES, VALUES, VALUES) for name, loss in POLICY_LOSSES.items()
}


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("loss", "option"),
    [
        ("ppo_clip_loss", "clip_ratio_low"),
        ("ppo_clip_loss", "clip_ratio_high"),
        ("ppo_clip_loss", "clip_ratio_c"),
        ("clip_cov_loss", "clip_ratio_low"),
        ("clip_cov_loss", "clip_ratio_high"),
        ("clip_cov_loss", "clip_cov_ratio"),
        ("kl_cov_loss", "kl_cov_ratio"),
        ("kl_cov_loss", "ppo_kl_coef"),
    ],
)
def test_wrong_numbers(loss, option, value):
    with pytest.raises(ValueError, match=f"^{option} must be"):
        CALLS[loss](**{option: value})
    for wrong in (True, "0.5", torch.tensor(0.5)):
        with pytest.raises(TypeError, match=f"^{option} must be"):
            CALLS[loss](**{option: wrong})


@pytest.mark.parametrize("value", [0, 0.5, 1, 1.0])
def test_the_dual_clip_is_above_1(value):
    with pytest.raises(ValueError, match=r"^clip_ratio_c must be"):
        CALLS["ppo_clip_loss"](clip_ratio_c=value)


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
def test_shares_are_in_0_to_1(name):
    for value in (0, 0.0, 1.5):
        with pytest.raises(ValueError, match=f"^{name}_ratio must be"):
            CALLS[f"{name}_loss"](**{f"{name}_ratio": value})


@pytest.mark.parametrize("bounds", [(1, 1), (5.0, 1.0), (math.nan, 1), (0, math.nan)])
def test_the_band_is_not_empty(bounds):
    lb, ub = bounds
    with pytest.raises(ValueError, match=r"^clip_cov_lb must be < clip_cov_ub"):
        CALLS["clip_cov_loss"](clip_cov_lb=lb, clip_cov_ub=ub)


def test_clip_cov_needs_a_seed_or_a_choice():
    with pytest.raises(ValueError, match="needs a seed"):
        clip_cov_loss(VALUES, VALUES, VALUES)
    assert clip_cov_loss(VALUES, VALUES, VALUES, selected=VALUES > 0).loss.isfinite()
    for seed, error in ((2**64, ValueError), (1.5, TypeError), (torch.ones(1), TypeError)):
        with pytest.raises(error, match=r"^seed must"):
            clip_cov_loss(VALUES, VALUES, VALUES, seed=seed)


@pytest.mark.parametrize("name", ["clip_cov_loss", "kl_cov_loss"])
def test_wrong_choices(name):
    with pytest.raises(ValueError, match=r"^selected must have shape"):
        CALLS[name](selected=torch.ones(2))
    with pytest.raises(TypeError, match=r"^selected must be"):
        CALLS[name](selected=[True])
    with pytest.raises(TypeError, match=r"^process_group must be"):
        CALLS[name](process_group="default")


def test_wrong_numbers_of_sequences():
    with pytest.raises(ValueError, match=r"^sequence_index must have shape"):
        CALLS["clip_cov_loss"](sequence_index=torch.arange(3))
    with pytest.raises(TypeError, match=r"^sequence_index must be"):
        CALLS["clip_cov_loss"](sequence_index=torch.ones(2))


@pytest.mark.parametrize("estimator", ["", "k4", "+", "k1++", "K1", "full"])
def test_unknown_estimators(estimator):
    with pytest.raises(ValueError, match=r"^estimator must be one of .*low_var_kl"):
        reference_kl_loss(VALUES, VALUES, coef=1.0, estimator=estimator)


def test_an_estimator_is_a_string():
    with pytest.raises((TypeError, ValueError), match=r"^estimator must be"):
        reference_kl_loss(VALUES, VALUES, coef=1.0, estimator=None)


def test_wrong_coefficients():
    for coef, error in ((-1, ValueError), (math.nan, ValueError), (math.inf, ValueError)):
        with pytest.raises(error, match=r"^coef must be"):
            reference_kl_loss(VALUES, VALUES, coef=coef)
        with pytest.raises(error, match=r"^coef must be"):
            entropy_bonus(VALUES, coef=coef)
    with pytest.raises(TypeError, match=r"^coef must be"):
        entropy_bonus(VALUES, coef="1")
