"""One selection over several micro-batches is that of one call on all of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from powerkernels import SelectionAccumulator, select_cov_band, select_top_cov
from python_tests.covariance import expected
from python_tests.covariance.expected import Batch, bounds_of, packed, random_batch

pytestmark = pytest.mark.filterwarnings(expected.IGNORE_LARGE_RATIO)

# Heavy ties: several micro-batches have covariances equal to the threshold.
RULES: dict[str, dict[str, Any]] = {
    "top": {"k": 23},
    "top of ties": {"k": 61},
    "share": {"ratio": 0.21},
    "band": {"ratio": 0.1, "lb": 0.1, "ub": 2.0, "seed": 9},
    "all of a band": {"k": 10**6, "lb": -1.0, "ub": 0.9, "seed": 9},
}


def accumulator(rule: str) -> SelectionAccumulator:
    options = RULES[rule]
    return (
        SelectionAccumulator.band(**options)
        if "seed" in options
        else (SelectionAccumulator.top(**options))
    )


def one_call(rule: str, batch: Batch, **options: Any) -> Tensor:
    select = select_cov_band if "seed" in RULES[rule] else select_top_cov
    return select(*batch, **RULES[rule], **options)


def whole(rule: str, length: int, generator: torch.Generator) -> Batch:
    return random_batch((16, length), generator, ties="ties" in rule)


def check_padded(device: str, rule: str, parts: int, generator: torch.Generator) -> None:
    """Micro-batches of rows, each padded to a length of its own."""
    length = 12
    batch = whole(rule, length, generator)
    exclude = torch.rand(16, length, generator=generator) < 0.1
    lengths = [length - part % 3 for part in range(parts)]
    rows = torch.arange(16).tensor_split(parts)
    for row, end in zip(rows, lengths, strict=True):
        batch.mask[row, end:] = False
    step = accumulator(rule)
    for row, end in zip(rows, lengths, strict=True):
        part = Batch(*(value[row, :end] for value in batch)).to(device)
        step.add(*part, exclude=exclude[row, :end].to(device))
    masks = step.masks()
    wanted = one_call(rule, batch.to(device), exclude=exclude.to(device))
    assert wanted.any()
    assert len(masks) == parts
    for mask, row, end in zip(masks, rows, lengths, strict=True):
        assert torch.equal(mask, wanted[row, :end])
        assert not wanted[row, end:].any()


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
@pytest.mark.parametrize("rule", RULES)
def test_padded_micro_batches(backend, rule, parts, generator):
    check_padded("cpu", rule, parts, generator)


def check_packed(device: str, rule: str, parts: int, generator: torch.Generator) -> None:
    """Micro-batches of packed sequences, some of them empty, with an advantage each."""
    batch = whole(rule, 12, generator)
    lengths = torch.randint(13, (16,), generator=generator).tolist()
    advantages = batch.advantages[:, 0].to(device)
    log_prob, mask = (packed(value, lengths).to(device) for value in (batch.log_prob, batch.mask))
    step = accumulator(rule)
    for rows in torch.arange(16).tensor_split(parts):
        first, last = rows[0], rows[-1]
        start, own = sum(lengths[:first]), lengths[first : last + 1]
        here = slice(start, start + sum(own))
        step.add(
            log_prob[here],
            advantages[first : last + 1, None],  # there may be as many tokens as sequences
            mask[here],
            cu_seqlens=bounds_of(own).to(device),
        )
    cu_seqlens = bounds_of(lengths).to(device)
    wanted = one_call(rule, Batch(log_prob, advantages, mask), cu_seqlens=cu_seqlens)
    assert wanted.any()
    assert torch.equal(torch.cat(step.masks()), wanted)


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
@pytest.mark.parametrize("rule", RULES)
def test_packed_micro_batches(backend, rule, parts, generator):
    check_packed("cpu", rule, parts, generator)


def test_micro_batches_are_as_the_truth(backend, generator):
    batch = random_batch((16, 9), generator)
    band = {"k": 9, "lb": 0.1, "ub": 2.0, "seed": 4}
    for step, wanted in (
        (SelectionAccumulator.top(k=9), expected.top(*batch, k=9)),
        (SelectionAccumulator.band(**band), expected.band(*batch, **band)),
    ):
        for row in range(16):
            step.add(*(value[row : row + 1] for value in batch))
        assert torch.equal(torch.cat(step.masks()), wanted)


@pytest.mark.parametrize("rule", RULES)
def test_a_selection_for_each_micro_batch_is_a_wrong_one(backend, rule, generator):
    """Around means of its own, and a share of at least one token: what trainers do without this."""
    batch = whole(rule, 12, generator)
    parts = [Batch(*part) for part in zip(*(value.tensor_split(8) for value in batch), strict=True)]
    step = accumulator(rule)
    for part in parts:
        step.add(*part)
    wanted = one_call(rule, batch)
    assert torch.equal(torch.cat(step.masks()), wanted)
    assert not torch.equal(torch.cat([one_call(rule, part) for part in parts]), wanted)


def test_one_token_of_8192_is_one_in_eight_micro_batches_too(backend, generator):
    batch = random_batch((64, 128), generator)._replace(mask=torch.ones(64, 128, dtype=torch.bool))
    parts = [Batch(*part) for part in zip(*(value.tensor_split(8) for value in batch), strict=True)]
    step = SelectionAccumulator.top(ratio=2e-4)
    for part in parts:
        step.add(*part)
    assert sum(mask.sum() for mask in step.masks()) == 1
    assert sum(select_top_cov(*part, ratio=2e-4).sum() for part in parts) == 8


@pytest.mark.parametrize("rule", ["top", "band"])
@pytest.mark.parametrize("old_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_ppo_clips_is_left_out(backend, rule, old_dtype, generator):
    batch = random_batch((8, 40), generator)
    old = (batch.log_prob + 0.3 * torch.randn(8, 40, generator=generator)).to(old_dtype)
    ratio = (batch.log_prob.double() - old.double()).exp()
    others = []
    for low, high in ((0.2, None), (0.1, 0.4), (0.0, 0.0)):
        up = low if high is None else high
        clipped = torch.where(batch.advantages > 0, ratio > 1 + up, ratio < 1 - low)
        clipped &= batch.advantages != 0
        step = accumulator(rule)
        for rows in (slice(0, 3), slice(3, 8)):
            step.add(
                *(value[rows] for value in batch),
                old_log_prob=old[rows],
                clip_ratio_low=low,
                clip_ratio_high=high,
            )
        wanted = one_call(rule, batch, exclude=clipped)
        assert torch.equal(torch.cat(step.masks()), wanted)
        others.append(torch.equal(wanted, one_call(rule, batch)))
    assert not all(others)


def test_numbered_sequences_may_be_in_any_micro_batch(backend, generator):
    batch = random_batch((12, 20), generator)
    names = torch.arange(12) * 7 - 20
    wanted = one_call("band", batch, sequence_index=names)
    order = torch.randperm(12, generator=generator)
    step = accumulator("band")
    for rows in order.split(5):
        step.add(*(value[rows] for value in batch), sequence_index=names[rows])
    assert torch.equal(torch.cat(step.masks()), wanted[order])


def test_micro_batches_of_many_dtypes_and_shapes(backend, generator):
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    parts = [random_batch((3, 10), generator, dtype=dtype) for dtype in dtypes]
    step = SelectionAccumulator.top(k=11)
    step.add(*(value.view(3, 2, 5) for value in parts[0]))
    step.add(*(value.reshape(-1) for value in parts[1]))
    step.add(*(value[:0] for value in parts[1]))
    step.add(*parts[2])
    step.add(*(value.reshape(-1) for value in parts[3]), cu_seqlens=torch.tensor([0, 11, 30]))
    masks = step.masks()
    assert [tuple(mask.shape) for mask in masks] == [(3, 2, 5), (30,), (0, 10), (3, 10), (30,)]
    together = Batch(*(torch.cat([v.double() for v in x]) for x in zip(*parts, strict=True)))
    wanted = expected.top(*together, k=11)
    assert torch.equal(torch.cat([mask.flatten() for mask in masks]), wanted.flatten())


def test_stats(backend, generator):
    batch = random_batch((6, 30), generator)
    truth = expected.covariance(*batch)
    step = accumulator("top")
    for rows in (slice(0, 2), slice(2, 6)):
        step.add(*(value[rows] for value in batch))
    found = step.stats()
    assert found.count == truth.count
    assert found.selected == 23 == sum(int(mask.sum()) for mask in step.masks())
    assert found.nonfinite == 0
    assert found.mean_log_prob.item() == pytest.approx(truth.mean_log_prob, rel=2e-16)
    assert found.mean_advantage.item() == pytest.approx(truth.mean_advantage, rel=2e-16)


@pytest.mark.parametrize("rule", ["top", "band"])
def test_nonfinite_tokens_are_counted_and_nothing_is_chosen(backend, rule, generator):
    batch = random_batch((6, 30), generator)
    bad = [(0, 3, math.nan, 0), (4, 7, math.inf, 1), (5, 0, -math.inf, 0)]
    for row, place, value, which in bad:
        batch[which][row, place] = value
        batch.mask[row, place] = True
    batch.log_prob[1] = math.nan
    batch.mask[1] = False
    step = accumulator(rule)
    for rows in range(0, 6, 2):
        step.add(*(value[rows : rows + 2] for value in batch))
    found = step.stats()
    assert found.nonfinite == 3
    assert found.selected == 0
    assert found.mean_log_prob.isnan()
    assert not any(mask.any() for mask in step.masks())


def test_asking_twice_gives_the_same(backend, generator):
    batch = random_batch((2, 30), generator)
    step = accumulator("top")
    step.add(*batch)
    before = step.masks()
    step.stats()
    assert torch.equal(step.masks()[0], before[0])


def test_micro_batches_do_not_change_after_they_are_added_up(backend, generator):
    batch = random_batch((2, 30), generator)
    wanted = one_call("top", batch)
    step = accumulator("top")
    step.add(*batch)
    masks = step.masks()
    for value in batch:
        value.zero_()
    assert torch.equal(masks[0], wanted)


def test_no_micro_batch_after_the_masks(backend, generator):
    batch = random_batch((2, 30), generator)
    for last in ("masks", "stats"):
        step = accumulator("top")
        step.add(*batch)
        getattr(step, last)()
        with pytest.raises(RuntimeError, match="takes no more micro-batches"):
            step.add(*batch)


def test_masks_without_a_micro_batch_are_refused():
    for last in ("masks", "stats"):
        with pytest.raises(RuntimeError, match="no micro-batch"):
            getattr(accumulator("top"), last)()
