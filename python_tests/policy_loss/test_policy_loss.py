from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from powerkernels import (
    PolicyLoss,
    SelectionAccumulator,
    _advice,
    clip_cov_loss,
    entropy_bonus,
    kl_cov_loss,
    ppo_clip_loss,
    reference_kl_loss,
)
from powerkernels.policy_loss import advice, functional
from powerkernels.policy_loss.advice import AdvantageScaleCheck
from python_tests.covariance import expected as covariance_truth
from python_tests.covariance.expected import bounds_of, packed, spread
from python_tests.logprob.test_vocab_parallel import run
from python_tests.policy_loss import expected
from python_tests.policy_loss.expected import (
    MODES,
    Batch,
    assert_loss,
    assert_metrics,
    clipped_by_ppo,
    random_batch,
)

pytestmark = pytest.mark.filterwarnings(covariance_truth.IGNORE_LARGE_RATIO)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LOW, HIGH = 0.2, 0.28
CLIP: dict[str, Any] = {"clip_ratio_low": LOW, "clip_ratio_high": HIGH}
BAND: dict[str, Any] = {"lb": 0.1, "ub": 3.0, "seed": 5}
CLIP_COV: dict[str, Any] = {
    **CLIP,
    "clip_cov_ratio": 0.11,
    "clip_cov_lb": BAND["lb"],
    "clip_cov_ub": BAND["ub"],
}
KL_COV: dict[str, Any] = {"kl_cov_ratio": 0.07, "ppo_kl_coef": 0.7}
ESTIMATORS = ("k1", "kl", "abs", "k2", "mse", "k3", "low_var_kl")


@pytest.fixture(autouse=True)
def fresh_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test before this one was warned of."""
    _advice.warn_once.cache_clear()
    monkeypatch.setattr(functional, "check_advantage_scale", AdvantageScaleCheck())


def taken_by_clip_cov(batch: Batch, cu_seqlens: Tensor | None = None) -> Tensor:
    log_prob, old, advantages, mask = batch
    each = torch.from_numpy(spread(advantages, log_prob, cu_seqlens)).view(log_prob.shape)
    clipped = clipped_by_ppo(log_prob, old, each, LOW, HIGH)
    how = {"ratio": CLIP_COV["clip_cov_ratio"], "exclude": clipped, "cu_seqlens": cu_seqlens}
    return covariance_truth.band(log_prob, advantages, mask, **how, **BAND)


def taken_by_kl_cov(batch: Batch, cu_seqlens: Tensor | None = None) -> Tensor:
    log_prob, _, advantages, mask = batch
    ratio = KL_COV["kl_cov_ratio"]
    return covariance_truth.top(log_prob, advantages, mask, ratio=ratio, cu_seqlens=cu_seqlens)


class Loss(NamedTuple):
    call: Callable[..., PolicyLoss]  # of a batch and what all losses share
    # Of a CPU batch and its cu_seqlens: the loss of tokens as a textbook writes it.
    book: Callable[[Batch, Tensor | None], Callable[..., Tensor]]
    num_inputs: int = 3  # of log_prob, old_log_prob, advantages
    magnitude: float = 0.0  # as of `assert_loss`


def ppo(clip_ratio_c: float | None) -> Loss:
    return Loss(
        lambda batch, **how: ppo_clip_loss(*batch, **CLIP, clip_ratio_c=clip_ratio_c, **how),
        lambda *_: functools.partial(expected.ppo_clip, low=LOW, high=HIGH, c=clip_ratio_c),
    )


def kl(estimator: str) -> Loss:
    return Loss(
        lambda batch, **how: reference_kl_loss(
            batch.log_prob, batch.old_log_prob, batch.mask, coef=0.3, estimator=estimator, **how
        ),
        lambda *_: lambda log_prob, ref: 0.3 * expected.kl(log_prob, ref, estimator),
        2,
        0.6,
    )


def clip_cov_book(batch: Batch, cu_seqlens: Tensor | None) -> Callable[..., Tensor]:
    selected = taken_by_clip_cov(batch, cu_seqlens).flatten()
    return functools.partial(expected.clip_cov, low=LOW, high=HIGH, selected=selected)


def kl_cov_book(batch: Batch, cu_seqlens: Tensor | None) -> Callable[..., Tensor]:
    selected = taken_by_kl_cov(batch, cu_seqlens).flatten()
    return functools.partial(expected.kl_cov, coef=KL_COV["ppo_kl_coef"], selected=selected)


POLICY_LOSSES = {
    "ppo": ppo(None),
    "ppo, dual clip": ppo(1.5),
    "clip_cov": Loss(
        lambda batch, **how: clip_cov_loss(*batch, **CLIP_COV, **{"seed": BAND["seed"]} | how),
        clip_cov_book,
    ),
    "kl_cov": Loss(lambda batch, **how: kl_cov_loss(*batch, **KL_COV, **how), kl_cov_book),
}
LOSSES = {
    **POLICY_LOSSES,
    "entropy": Loss(
        lambda batch, **how: entropy_bonus(batch.log_prob, batch.mask, coef=0.01, **how),
        lambda *_: lambda entropy: -0.01 * entropy,
        1,
    ),
    "kl k3": kl("k3"),
    "kl k1+": kl("k1+"),
}


def leaf_of(batch: Batch, device: str = "cpu") -> Batch:
    moved = batch.map(lambda value: value.detach().clone().to(device))
    return moved._replace(log_prob=moved.log_prob.requires_grad_())


def gradient(found: PolicyLoss, batch: Batch) -> Tensor:
    return torch.autograd.grad(found.loss, batch.log_prob, retain_graph=True)[0]


def check_loss(
    device: str,
    loss: Loss,
    batch: Batch,
    mode: str = "token-mean",
    weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **counts: Any,
) -> None:
    """Value and gradient against float64."""
    how: dict[str, Any] = {"loss_agg_mode": mode, **counts}
    if weights is not None:
        how["rollout_is_weights"] = weights.to(device)
    if cu_seqlens is not None:
        how["cu_seqlens"] = cu_seqlens.to(device)
    leaf = leaf_of(batch, device)
    found = loss.call(leaf, **how)
    assert_loss(
        found,
        leaf.log_prob,
        loss.book(batch, cu_seqlens),
        batch[: loss.num_inputs],
        batch.mask,
        magnitude=loss.magnitude,
        mode=mode,
        weights=weights,
        cu_seqlens=cu_seqlens,
        **counts,
    )


# One token; less than a vector, and one more than some; rows of many vectors and a rest.
SHAPES = ((1, 1), (2, 7), (3, 17), (6, 203))


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [*((torch.float32, shape) for shape in SHAPES), *((dtype, (3, 67)) for dtype in DTYPES[1:])],
)
@pytest.mark.parametrize("name", LOSSES)
def test_loss_is_that_of_the_textbook(backend, name, dtype, shape, generator):
    check_loss("cpu", LOSSES[name], random_batch(shape, generator, dtype))


@pytest.mark.parametrize("plus", ["", "+"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimators(backend, estimator, plus, generator):
    for width in (1e-3, 0.3, 8.0):  # of 8 some are beyond the bounds of k3
        batch = random_batch((3, 90), generator, spread=width)
        check_loss("cpu", kl(estimator + plus), batch)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_importance_weights(backend, name, generator):
    batch = random_batch((5, 43), generator)
    weights = torch.rand(5, 43, generator=generator) * 3
    weights[0] = 0
    check_loss("cpu", LOSSES[name], batch, weights=weights)
    check_loss("cpu", LOSSES[name], batch, "seq-mean-token-mean", weights=weights.bfloat16())


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_mixed_dtypes(backend, name, generator):
    batch = random_batch((5, 43), generator)
    for dtypes in (
        (torch.bfloat16, torch.float32, torch.float16),
        (torch.float16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float64, torch.float32),
        (torch.float32, torch.float32, torch.float64),
    ):
        tensors = [x.to(dtype) for x, dtype in zip(batch[:3], dtypes, strict=True)]
        check_loss("cpu", LOSSES[name], Batch(*tensors, batch.mask))
    check_loss("cpu", LOSSES[name], batch, weights=torch.full((5, 43), 0.3, dtype=torch.float64))


COUNTS: tuple[dict[str, Any], ...] = (
    {},
    {"dp_size": 3, "batch_num_tokens": 1234, "global_batch_size": 17.5, "loss_scale_factor": 9},
)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LOSSES)
def test_modes(backend, name, mode, generator):
    batch = random_batch((6, 23), generator)
    batch.mask[2] = False  # a sequence that does not count
    for counts in COUNTS:
        check_loss("cpu", LOSSES[name], batch, mode, **counts)
        as_tensors = {
            key: torch.tensor([float(x)]) for key, x in counts.items() if key != "dp_size"
        }
        given = counts | as_tensors
        found, same = (LOSSES[name].call(batch, loss_agg_mode=mode, **x) for x in (given, counts))
        assert torch.equal(found.loss, same.loss)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LOSSES)
def test_packed_is_as_padded(backend, name, mode, generator):
    lengths = [23, 0, 7, 1, 20, 0]
    batch = random_batch((6, 23), generator)
    inside = torch.arange(23) < torch.tensor(lengths)[:, None]
    batch = batch._replace(mask=batch.mask & inside)
    flat = batch.map(lambda value: packed(value, lengths))
    how = {"loss_scale_factor": 23}
    loss = LOSSES[name]
    check_loss("cpu", loss, flat, mode, cu_seqlens=bounds_of(lengths, torch.int32), **how)
    cu_seqlens = bounds_of(lengths)
    here, there = leaf_of(batch), leaf_of(flat)
    padded = loss.call(here, loss_agg_mode=mode, **how)
    in_packs = loss.call(there, loss_agg_mode=mode, cu_seqlens=cu_seqlens, **how)
    torch.testing.assert_close(in_packs.loss, padded.loss, rtol=2**-23, atol=0)
    assert torch.equal(gradient(in_packs, there), gradient(padded, here)[inside])
    # Means of log-ratios are added up in float32, lane by lane of a vector; the others
    # are numbers of tokens, or added up in float64.
    largest = (batch.log_prob - batch.old_log_prob)[batch.mask].abs().max().item()
    for key, value in padded.metrics.items():
        torch.testing.assert_close(in_packs.metrics[key], value, rtol=2**-23, atol=2**-23 * largest)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_advantages_of_sequences(backend, name, generator):
    batch = random_batch((6, 23), generator)
    for advantages in (batch.advantages[:, 0], batch.advantages[:, 2:3]):
        check_loss("cpu", LOSSES[name], batch._replace(advantages=advantages))
    lengths = [23, 0, 7, 1, 20, 3]
    flat = batch.map(lambda value: packed(value, lengths))
    flat = flat._replace(advantages=batch.advantages[:, 0])
    check_loss("cpu", LOSSES[name], flat, cu_seqlens=bounds_of(lengths))


@pytest.mark.parametrize("name", LOSSES)
def test_layouts(backend, name, generator):
    batch = random_batch((8, 60), generator)
    loss = LOSSES[name]
    for view in (
        lambda x: x.T,
        lambda x: x[:, ::2],
        lambda x: x[1::2, 3:],
        lambda x: x[:1].expand(5, -1),
    ):
        strided = batch.map(view)
        whole = leaf_of(strided)
        leaf = strided._replace(log_prob=strided.log_prob.detach().requires_grad_())
        found, wanted = loss.call(leaf), loss.call(whole)
        assert torch.equal(found.loss, wanted.loss)
        assert torch.equal(gradient(found, leaf), gradient(wanted, whole))


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_given_tokens(backend, name, dtype, generator):
    batch = random_batch((4, 50), generator)
    selected = torch.rand(4, 50, generator=generator) < 0.3
    marks = selected.to(dtype)
    if dtype == torch.float32:
        marks = marks * -0.5
    leaf = leaf_of(batch)
    if name == "clip_cov":
        found = clip_cov_loss(*leaf, **CLIP_COV, selected=marks)
        book = functools.partial(expected.clip_cov, low=LOW, high=HIGH, selected=selected.flatten())
    else:
        found = kl_cov_loss(*leaf, **KL_COV, selected=marks)
        book = functools.partial(
            expected.kl_cov, coef=KL_COV["ppo_kl_coef"], selected=selected.flatten()
        )
    assert_loss(found, leaf.log_prob, book, batch[:3], batch.mask)
    taken = selected & batch.mask  # tokens that do not count are none of the selected
    assert found.metrics["actor/cov_selected_tokens"] == taken.sum()


def check_metrics(device: str, batch: Batch) -> None:
    log_prob, old, advantages, mask = batch
    count = int(mask.sum())
    moved = batch.map(lambda value: value.to(device))
    common = expected.common_metrics(log_prob, old, mask)
    clipped = (clipped_by_ppo(log_prob, old, advantages, LOW, HIGH) & mask).sum().item() / count
    ratio = expected.ratio_of(log_prob.double(), old.double())
    lower = ((advantages < 0) & (ratio > 1.5) & mask).sum().item() / count
    ppo_metrics = {
        **common,
        "actor/ppo_kl": common["actor/approx_kl_k1"],
        "actor/ppo_clipfrac": clipped,
    }
    found = LOSSES["ppo, dual clip"].call(moved)
    wanted = {**ppo_metrics, "actor/pg_clipfrac": clipped, "actor/pg_clipfrac_lower": lower}
    assert found.metrics.keys() == wanted.keys()
    assert_metrics(found, wanted)
    assert LOSSES["ppo"].call(moved).metrics["actor/pg_clipfrac_lower"] == 0

    truth = covariance_truth.covariance(log_prob, advantages, mask)
    taken = taken_by_clip_cov(batch).sum().item()
    assert taken
    found = LOSSES["clip_cov"].call(moved)
    wanted = {
        **ppo_metrics,
        "actor/pg_clipfrac": taken / count,
        "actor/cov_clipfrac": taken / count,
        "actor/cov_selected_tokens": taken,
        "actor/covariance": truth.covariance,
        "actor/cov_constant": 0,
    }
    assert found.metrics.keys() == wanted.keys()
    assert_metrics(found, wanted)

    taken = taken_by_kl_cov(batch).sum().item()
    found = LOSSES["kl_cov"].call(moved)
    wanted |= common | {
        "actor/ppo_kl": (log_prob.double() - old.double())[mask].abs().sum().item() / count,
        "actor/cov_clipfrac": taken / count,
        "actor/cov_selected_tokens": taken,
    }
    wanted = {
        k: v for k, v in wanted.items() if k not in ("actor/ppo_clipfrac", "actor/pg_clipfrac")
    }
    assert found.metrics.keys() == wanted.keys()
    assert_metrics(found, wanted)

    found = LOSSES["entropy"].call(moved)
    wanted = {"actor/entropy": log_prob[mask].double().mean().item(), "actor/nonfinite_tokens": 0}
    assert found.metrics.keys() == wanted.keys()
    assert_metrics(found, wanted)
    found = kl("k2").call(moved)
    mean = 0.5 * (log_prob.double() - old.double())[mask].square().mean().item()
    assert_metrics(found, {"actor/kl_loss": mean, "actor/nonfinite_tokens": 0})


@pytest.mark.parametrize("dtype", DTYPES)
def test_metrics(backend, dtype, generator):
    check_metrics("cpu", random_batch((5, 61), generator, dtype))


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_table_among_the_metrics(backend, name, generator):
    batch = random_batch((5, 121), generator)
    truth = covariance_truth.covariance(batch.log_prob, batch.advantages, batch.mask)
    plain = LOSSES[name].call(batch)
    found = LOSSES[name].call(batch, covariance_metrics=True)
    wanted = expected.table_metrics(truth)
    assert_metrics(found, wanted)
    assert found.metrics.keys() == plain.metrics.keys() | wanted.keys()
    assert torch.equal(found.loss, plain.loss)
    if name in ("clip_cov", "kl_cov"):
        found = LOSSES[name].call(batch, covariance_metrics=True, selected=batch.mask)
        assert_metrics(found, wanted)
        assert "actor/cov_constant" not in found.metrics


RUBBISH = (math.nan, math.inf, -math.inf, 3e38)


@pytest.mark.parametrize("name", LOSSES)
def test_masked_out_places_may_hold_anything(backend, name, generator):
    batch = random_batch((4, 37), generator)
    mask = batch.mask
    how: dict[str, Any] = {"covariance_metrics": True} if name in POLICY_LOSSES else {}

    def filled(values: tuple[float, ...]) -> Batch:
        tensors = [x.where(mask, value) for x, value in zip(batch[:3], values, strict=True)]
        return leaf_of(Batch(*tensors, mask))

    clean = filled((0.0, 0.0, 0.0))
    wanted = LOSSES[name].call(clean, **how)
    for bad in RUBBISH:
        for values in ((bad, 0.0, 0.0), (0.0, bad, 0.0), (0.0, 0.0, bad), (bad, bad, bad)):
            dirty = filled(values)
            if name in POLICY_LOSSES:
                how["rollout_is_weights"] = torch.ones(4, 37).where(mask, bad)
            found = LOSSES[name].call(dirty, **how)
            assert torch.equal(found.loss, wanted.loss)
            slope = gradient(found, dirty)
            assert torch.equal(slope, gradient(wanted, clean))
            assert (slope[~mask] == 0).all()
            for key, value in wanted.metrics.items():
                assert torch.equal(found.metrics[key], value), key


@pytest.mark.parametrize("name", LOSSES)
def test_a_nan_that_counts_is_seen(backend, name, generator):
    for which in range(LOSSES[name].num_inputs):
        batch = random_batch((4, 37), generator)
        batch[which][1, 5] = batch[which][3, 36] = batch[which][2, 8] = math.nan
        batch.mask[1, 5] = batch.mask[3, 36] = True
        batch.mask[2, 8] = False
        found = LOSSES[name].call(leaf_of(batch))
        assert found.loss.isnan()
        assert found.metrics["actor/nonfinite_tokens"] == 2
        if name in ("clip_cov", "kl_cov") and which != 1:
            assert found.metrics["actor/cov_selected_tokens"] == 0
            assert found.metrics["actor/cov_constant"] == 0


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_a_nan_weight_is_seen(backend, name, generator):
    batch = random_batch((4, 37), generator)
    batch.mask[1, 5] = True
    weights = torch.ones(4, 37)
    weights[1, 5] = math.nan
    found = LOSSES[name].call(batch, rollout_is_weights=weights)
    assert found.loss.isnan()
    assert found.metrics["actor/nonfinite_tokens"] == 1


@pytest.mark.parametrize("infinity", [math.inf, -math.inf])
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_infinities_are_counted(backend, name, infinity, generator):
    batch = random_batch((4, 37), generator)
    batch.old_log_prob[1, 5] = batch.log_prob[2, 6] = infinity
    batch.mask[1, 5] = batch.mask[2, 6] = True
    assert LOSSES[name].call(batch).metrics["actor/nonfinite_tokens"] == 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*POLICY_LOSSES, "kl k3"])
def test_far_ratios_are_bounded(backend, name, dtype):
    difference = torch.tensor([-200.0, -88, -21, -19, 0, 19, 21, 88, 200]).to(dtype)
    for sign in (1, -1):
        advantages = torch.linspace(0.5, 1.5, 9, dtype=torch.float64).to(dtype) * sign
        batch = Batch(
            difference[None], torch.zeros(1, 9).to(dtype), advantages[None], torch.ones(1, 9)
        )
        # So many that gradients of float16 do not overflow.
        how: dict[str, Any] = {"batch_num_tokens": 1e6}
        given = {"selected": torch.zeros(1, 9)} if name in ("clip_cov", "kl_cov") else {}
        leaf = leaf_of(batch)
        found = LOSSES[name].call(leaf, **how, **given)
        slope = gradient(found, leaf)
        assert found.loss.isfinite()
        assert slope.isfinite().all()
        assert (slope[0, difference.abs() > 20] == 0).all()
        if not given:
            book = LOSSES[name].book(batch, None)
            inputs = batch[: LOSSES[name].num_inputs]
            assert_loss(found, leaf.log_prob, book, inputs, batch.mask, magnitude=1.0, **how)


def test_the_penalty_goes_on_beyond_the_bounds_of_the_ratio(backend):
    difference = torch.tensor([[-200.0, -30, 25, 200]])
    zeros = torch.zeros(1, 4)
    leaf = leaf_of(Batch(difference, zeros, zeros, torch.ones(1, 4)))
    selected = torch.tensor([[1, 1, 1, 0]])
    found = kl_cov_loss(*leaf, ppo_kl_coef=2.0, selected=selected, loss_agg_mode="token-sum")
    assert found.loss == 2 * (200 + 30 + 25)
    assert gradient(found, leaf).tolist() == [[-2.0, -2.0, 2.0, 0.0]]


def check_zero(name: str, batch: Batch, **how: Any) -> None:
    for mode in MODES:
        leaf = leaf_of(batch)
        found = LOSSES[name].call(leaf, loss_agg_mode=mode, **how)
        assert found.loss == 0, mode
        assert (gradient(found, leaf) == 0).all()
        for key, value in found.metrics.items():
            assert value == 0, key


@pytest.mark.parametrize("name", LOSSES)
def test_without_a_token_all_is_zero(backend, name, generator):
    batch = random_batch((3, 8), generator)
    batch.mask[:] = False
    flat = batch.map(lambda value: value[0, :0])
    counts = {"batch_num_tokens": 7, "global_batch_size": 2, "loss_scale_factor": 8}
    check_zero(name, batch)
    check_zero(name, batch, **counts)
    check_zero(name, batch.map(lambda value: value[:0]))
    for bounds in ([0], [0, 0]):
        check_zero(name, flat, cu_seqlens=torch.tensor(bounds), loss_scale_factor=8)


@pytest.mark.parametrize("name", LOSSES)
def test_padded_sequences_without_a_place(backend, name, generator):
    check_zero(name, random_batch((3, 8), generator).map(lambda value: value[:, :0]))


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
@pytest.mark.parametrize("shape", [(1, 1), (4, 30)])
def test_constant_advantages_are_reported(backend, name, shape, generator):
    batch = random_batch(shape, generator)._replace(advantages=torch.full(shape, 0.7))
    batch = batch._replace(mask=torch.ones(shape))
    found = LOSSES[name].call(batch)
    assert_metrics(
        found,
        {
            "actor/cov_constant": 1,
            "actor/cov_selected_tokens": 0,
            "actor/cov_clipfrac": 0,
            "actor/covariance": 0,
        },
    )
    check_loss("cpu", LOSSES[name], batch)


def test_the_seed_chooses_and_may_be_a_tensor(backend, generator):
    batch = random_batch((4, 60), generator)
    call = LOSSES["clip_cov"].call

    def slope(seed: int | Tensor) -> Tensor:
        leaf = leaf_of(batch)
        return gradient(call(leaf, seed=seed), leaf)

    assert torch.equal(slope(3), slope(torch.tensor(3)))
    assert torch.equal(slope(-1), slope(torch.tensor([-1])))
    assert torch.equal(slope(-1), slope(2**64 - 1))
    assert not torch.equal(slope(3), slope(4))


def test_numbered_sequences_may_come_in_any_order(backend, generator):
    batch = random_batch((6, 31), generator)
    names = torch.tensor([4, 10, 2, 3, 9, 0])
    order = torch.randperm(6, generator=generator)
    here, there = leaf_of(batch), leaf_of(batch.map(lambda value: value[order]))
    call = LOSSES["clip_cov"].call
    slope = gradient(call(here, sequence_index=names), here)
    again = gradient(call(there, sequence_index=names[order]), there)
    assert torch.equal(again, slope[order])


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
def test_micro_batches_of_a_step_add_up(backend, name, generator):
    batch = random_batch((8, 31), generator)
    tokens = int(batch.mask.sum())
    if name == "clip_cov":
        step = SelectionAccumulator.band(ratio=CLIP_COV["clip_cov_ratio"], **BAND)
        options: dict[str, Any] = CLIP
    else:
        step, options = SelectionAccumulator.top(ratio=KL_COV["kl_cov_ratio"]), {}
    parts = [batch.map(lambda value, rows=rows: value[rows]) for rows in torch.arange(8).split(3)]
    for log_prob, old, advantages, mask in parts:
        if options:
            step.add(log_prob, advantages, mask, old_log_prob=old, **options)
        else:
            step.add(log_prob, advantages, mask)
    slopes = []
    for part, selected in zip(parts, step.masks(), strict=True):
        leaf = leaf_of(part)
        found = LOSSES[name].call(leaf, selected=selected, batch_num_tokens=tokens)
        slopes.append(gradient(found, leaf))
    whole = leaf_of(batch)
    assert torch.equal(torch.cat(slopes), gradient(LOSSES[name].call(whole), whole))


@pytest.mark.parametrize("name", LOSSES)
def test_a_factor_on_the_loss_is_one_on_the_gradient(backend, name, generator):
    leaf = leaf_of(random_batch((3, 20), generator))
    found = LOSSES[name].call(leaf)
    once = gradient(found, leaf)
    (scaled,) = torch.autograd.grad(-4 * found.loss, leaf.log_prob)
    assert torch.equal(scaled, -4 * once)


@pytest.mark.parametrize("name", LOSSES)
def test_only_log_prob_has_a_gradient(backend, name, generator):
    batch = random_batch((3, 20), generator)
    others = [value.clone().requires_grad_() for value in batch[1:3]]
    found = LOSSES[name].call(Batch(batch.log_prob, *others, batch.mask))
    assert not found.loss.requires_grad
    found = LOSSES[name].call(leaf_of(batch))
    assert found.loss.requires_grad
    assert not any(value.requires_grad for value in found.metrics.values())


def test_same_bits_for_any_threads(backend, generator, restore_threads):
    batch = random_batch((33, 1501), generator)
    for name in ("ppo, dual clip", "kl k3"):
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            leaf = leaf_of(batch)
            found = LOSSES[name].call(leaf)
            results.append((gradient(found, leaf), found.loss.detach()))
        for slope, loss in results[1:]:
            assert torch.equal(slope, results[0][0])
            torch.testing.assert_close(loss, results[0][1], rtol=2**-23, atol=0)


@pytest.mark.parametrize("backend", ["reference", "cpp-baseline"], indirect=True)
@pytest.mark.parametrize("name", LOSSES)
def test_compiles_as_one_graph(backend, name, generator):
    batch = random_batch((3, 20), generator)
    how: dict[str, Any] = {"covariance_metrics": True} if name == "clip_cov" else {}

    def call(log_prob: Tensor) -> PolicyLoss:
        return LOSSES[name].call(batch._replace(log_prob=log_prob), **how)

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    here, there = leaf_of(batch), leaf_of(batch)
    found, wanted = compiled(here.log_prob), call(there.log_prob)
    assert torch.equal(found.loss, wanted.loss)
    assert torch.equal(gradient(found, here), gradient(wanted, there))
    for key, value in wanted.metrics.items():
        assert torch.equal(found.metrics[key], value), key


@pytest.mark.parametrize("backend", ["reference", "cpp-baseline"], indirect=True)
def test_opcheck(backend, generator):
    log_prob, old, advantages, mask = random_batch((2, 9), generator)
    op = torch.ops.powerkernels
    torch.library.opcheck(op.cov_moments.default, (log_prob, advantages, mask, None))
    moments = op.cov_moments(log_prob, advantages, mask, None)
    assert moments[0] == mask.sum()
    rest = (0, True, 0.8, 1.2, 3.0, 1, 0.0, False)
    leaf = log_prob.clone().requires_grad_()
    inputs = (leaf, old, advantages, mask, ~mask, advantages.abs(), moments, None)
    torch.library.opcheck(op.policy_loss_sums.default, (*inputs, *rest))
    cu_seqlens = torch.tensor([0, 7, 18])
    flat = (log_prob.bfloat16().view(-1).requires_grad_(), old.view(-1), advantages[:, 0].clone())
    torch.library.opcheck(op.policy_loss_sums.default, (*flat, *4 * (None,), cu_seqlens, *rest))
    alone = (leaf, *7 * (None,), 5, *rest[1:])
    torch.library.opcheck(op.policy_loss_sums.default, alone)


SPLIT = 2  # rows of the first rank


def of_ranks(rank: int, ranks: int) -> dict[str, Any]:
    """Loss, gradient and metrics of this rank's rows, or of all where ranks is 1."""
    warnings.simplefilter("ignore")  # processes of their own: pytest's filters are not theirs
    batch = random_batch((5, 31), torch.Generator().manual_seed(2))
    group = None
    if ranks > 1:
        batch = batch.map(lambda value: value[SPLIT:] if rank else value[:SPLIT])
        group = dist.group.WORLD
    found = {}
    for name in ("clip_cov", "kl_cov"):
        leaf = leaf_of(batch)
        loss, metrics = LOSSES[name].call(leaf, process_group=group, loss_agg_mode="token-sum")
        slope = torch.autograd.grad(loss, leaf.log_prob)[0]
        found[name] = slope, loss.detach(), metrics, batch.mask.sum()
    return found


def test_ranks_are_as_one(tmp_path):
    first, second = run(of_ranks, 2, tmp_path)
    for name, (slope, loss, metrics, count) in of_ranks(0, 1).items():
        slopes, losses, all_metrics, counts = zip(first[name], second[name], strict=True)
        assert torch.equal(torch.cat(slopes), slope)
        torch.testing.assert_close(sum(losses), loss, rtol=1e-6, atol=1e-5)
        taken = [x["actor/cov_selected_tokens"] for x in all_metrics]
        assert sum(taken) == metrics["actor/cov_selected_tokens"] > 0
        parts = [x["actor/covariance"] * n for x, n in zip(all_metrics, counts, strict=True)]
        torch.testing.assert_close(sum(parts) / count, metrics["actor/covariance"])


def said(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
def test_a_large_share_is_warned_of_once(name, generator):
    batch = random_batch((4, 60), generator)
    option = f"{name}_ratio"

    def call(ratio: float) -> None:
        function = {"clip_cov": clip_cov_loss, "kl_cov": kl_cov_loss}[name]
        function(*batch, **{option: ratio}, **({"seed": 1} if name == "clip_cov" else {}))

    assert said(lambda: call(0.1)) == []
    (message,) = said(lambda: call(0.2))
    assert f"{option}=0.2 selects 20% of all tokens" in message
    assert said(lambda: call(0.2)) == []


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
def test_advantages_divided_by_the_number_of_tokens_are_warned_of_once(
    name, generator, monkeypatch
):
    batch = random_batch((8, 60), generator)
    count = int(batch.mask.sum())
    small = batch._replace(advantages=batch.advantages / count)
    (message,) = said(
        lambda: kl_cov_loss(*small) if name == "kl_cov" else clip_cov_loss(*small, seed=1)
    )
    assert f"the largest advantage of {count} tokens" in message
    assert said(lambda: kl_cov_loss(*small)) == []
    monkeypatch.setattr(functional, "check_advantage_scale", AdvantageScaleCheck())
    assert said(lambda: kl_cov_loss(*small)) == []


def test_the_figures_of_the_advice_are_made_on_the_device(monkeypatch):
    """What torch.tensor makes comes from the host: on a GPU that is a wait."""
    monkeypatch.setattr(torch, "tensor", None)
    assert advice._figures(torch.full((3, 5), -2.0), None).tolist() == [2.0, 15.0]


def test_ordinary_advantages_are_not_warned_of(generator, monkeypatch):
    batch = random_batch((8, 60), generator)
    few = batch.map(lambda value: value[:2, :40])
    rare = batch._replace(advantages=torch.zeros(8, 60))
    rare.advantages[3, 3] = 1.0
    rare.mask[3, 3] = True
    for x in (
        batch,
        few._replace(advantages=few.advantages / 80),  # too few tokens to tell
        batch._replace(advantages=torch.zeros(8, 60)),
        batch._replace(advantages=batch.advantages[:, 0]),
        rare,
        batch.map(lambda value: value[:0]),
    ):
        monkeypatch.setattr(functional, "check_advantage_scale", AdvantageScaleCheck())
        assert said(lambda x=x: kl_cov_loss(*x)) == []
        monkeypatch.setattr(functional, "check_advantage_scale", AdvantageScaleCheck())
        assert said(lambda x=x: clip_cov_loss(*x, seed=1)) == []
