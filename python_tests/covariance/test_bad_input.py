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
    CovarianceTable,
    SelectionAccumulator,
    TokenCovariance,
    _advice,
    covariance_table,
    select_cov_band,
    select_top_cov,
    token_covariance,
)
from powerkernels.covariance import tokens

VALUES = torch.linspace(-1, 1, 6).view(2, 3)
TOP: dict[str, Any] = {"k": 2}
BAND: dict[str, Any] = {"k": 2, "lb": 0.0, "ub": 1.0, "seed": 1}


def added(make: Callable[[], SelectionAccumulator], *tensors: Any, **options: Any) -> Tensor:
    step = make()
    step.add(*tensors, **options)
    return step.masks()[0]


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "token_covariance": token_covariance,
    "covariance_table": covariance_table,
    "select_top_cov": functools.partial(select_top_cov, **TOP),
    "select_cov_band": functools.partial(select_cov_band, **BAND),
    "add to top": functools.partial(added, functools.partial(SelectionAccumulator.top, **TOP)),
    "add to band": functools.partial(added, functools.partial(SelectionAccumulator.band, **BAND)),
}
every_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


@every_function
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("log_prob", (VALUES.tolist(), VALUES)),
        ("log_prob", (VALUES.long(), VALUES)),
        ("log_prob", (VALUES.to_sparse(), VALUES)),
        ("log_prob", (VALUES.to(torch.complex64), VALUES)),
        ("advantages", (VALUES, 1.0)),
        ("advantages", (VALUES, None)),
        ("advantages", (VALUES, VALUES.int())),
        ("mask", (VALUES, VALUES, [1])),
        ("mask", (VALUES, VALUES, VALUES.to(torch.complex64))),
    ],
)
def test_wrong_types(function, name, arguments):
    with pytest.raises(TypeError, match=f"^{name} must be"):
        function(*arguments)


@every_function
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("log_prob", (torch.tensor(1.0), torch.tensor(1.0))),
        ("advantages", (VALUES, VALUES[:, :2])),
        ("advantages", (VALUES, VALUES.T)),
        ("advantages", (VALUES, torch.ones(3))),
        ("advantages", (VALUES, torch.ones(1, 3))),
        ("advantages", (VALUES, torch.tensor(1.0))),
        ("advantages", (VALUES[0], torch.ones(1))),
        ("mask", (VALUES, VALUES, torch.ones(2))),
        ("mask", (VALUES, VALUES, torch.ones(2, 1))),
        ("mask", (VALUES, VALUES[:, 0], torch.ones(3, 2))),
    ],
)
def test_wrong_shapes(function, name, arguments):
    with pytest.raises(ValueError, match=f"^{name} must have"):
        function(*arguments)


@every_function
def test_wrong_devices(function):
    elsewhere = VALUES.to("meta")
    with pytest.raises(ValueError, match=r"^advantages must be on cpu.*meta"):
        function(VALUES, elsewhere)
    with pytest.raises(ValueError, match=r"^mask must be on cpu.*meta"):
        function(VALUES, VALUES, elsewhere)
    with pytest.raises(ValueError, match=r"^cu_seqlens must be on cpu.*meta"):
        function(VALUES[0], VALUES[0], cu_seqlens=torch.tensor([0, 3], device="meta"))


@every_function
@pytest.mark.parametrize(
    ("bounds", "error", "message"),
    [
        ([1, 3], ValueError, "start at 0"),
        ([0, 2, 1, 3], ValueError, "never fall"),
        ([0, 2], ValueError, "end at the 3"),
        ([0, 4], ValueError, "end at the 3"),
        ([0, -1, 3], ValueError, "never fall"),
        ([], ValueError, "shape"),
        ([[0, 3]], ValueError, "shape"),
        ([0.0, 3.0], TypeError, "int32 or int64"),
    ],
)
def test_wrong_bounds(function, bounds, error, message):
    cu_seqlens = torch.tensor(bounds, dtype=None if bounds else torch.int64)
    with pytest.raises(error, match=f"^cu_seqlens.*{message}"):
        function(VALUES[0], VALUES[0], cu_seqlens=cu_seqlens)


def dependent(found: Any) -> Tensor:
    """One of the results that depend on the advantages."""
    if isinstance(found, CovarianceTable):
        return found.mean_cov
    return found.cov if isinstance(found, TokenCovariance) else found


@every_function
def test_whose_packed_advantages_are(function):
    log_prob, advantages = torch.tensor([-1.0, -3.0, -2.0]), torch.tensor([1.0, 0.5, 0.2])
    bounds = torch.tensor([0, 2, 2, 3])  # as many sequences as tokens, and not one each
    with pytest.raises(ValueError, match=r"^advantages \[3\].*\[1, 3\] or as \[3, 1\]"):
        function(log_prob, advantages, cu_seqlens=bounds)
    of_tokens, of_sequences, one_each = (
        dependent(function(log_prob, given, cu_seqlens=cu_seqlens))
        for given, cu_seqlens in (
            (advantages.view(1, 3), bounds),
            (advantages.view(3, 1), bounds),
            (advantages, torch.arange(4)),
        )
    )
    assert torch.equal(of_tokens, dependent(function(log_prob, advantages)))
    assert torch.equal(of_tokens, one_each)
    assert torch.equal(of_sequences, dependent(function(log_prob, advantages[[0, 0, 2]])))
    assert not torch.equal(of_tokens, of_sequences)


def test_whose_packed_advantages_are_without_a_wait(monkeypatch):
    """What a GPU does, which must not be asked: the doubt is NaN, and there is none otherwise."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    log_prob, advantages = torch.zeros(3), torch.tensor([5.0, -1.0, 2.0]).half()
    in_doubt, one_each = torch.tensor([0, 2, 2, 3]), torch.arange(4)
    found = tokens.per_token(advantages, log_prob, in_doubt)
    assert found.isnan().all()
    assert found.dtype == torch.float16
    assert torch.equal(tokens.per_token(advantages, log_prob, one_each), advantages)
    for shape, bounds in (((1, 3), in_doubt), ((3,), torch.tensor([0, 3]))):
        given = advantages.reshape(shape)
        assert torch.equal(tokens.per_token(given, log_prob, bounds), advantages)


@every_function
def test_bounds_are_of_flat_tensors(function):
    with pytest.raises(ValueError, match=r"^log_prob must be flat"):
        function(VALUES, VALUES, cu_seqlens=torch.tensor([0, 6]))
    with pytest.raises(TypeError, match=r"^cu_seqlens must be"):
        function(VALUES[0], VALUES[0], cu_seqlens=[0, 3])
    with pytest.raises(ValueError, match=r"^advantages must have shape"):
        function(VALUES[0], torch.ones(4), cu_seqlens=torch.tensor([0, 1, 3]))


@given(st.lists(st.integers(-2, 9), max_size=5), st.integers(0, 6))
def test_bounds_that_do_not_add_up_are_refused(bounds, count):
    values = torch.ones(count)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int64)
    right = bounds[:1] == [0] and bounds[-1] == count and sorted(bounds) == bounds
    for function in FUNCTIONS.values():
        if right:
            function(values, values, cu_seqlens=cu_seqlens)
        else:
            with pytest.raises(ValueError, match=r"^cu_seqlens"):
                function(values, values, cu_seqlens=cu_seqlens)


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=3),
    st.lists(st.integers(0, 3), max_size=3),
)
def test_advantages_are_of_tokens_or_of_sequences(shape, other):
    log_prob, advantages = torch.ones(shape), torch.ones(other)
    allowed = [shape]
    if len(shape) > 1:
        allowed += [shape[:-1], [*shape[:-1], 1]]
    if other in allowed:
        assert token_covariance(log_prob, advantages).cov.shape == log_prob.shape
    else:
        with pytest.raises(ValueError, match=r"^advantages must have shape"):
            token_covariance(log_prob, advantages)


SELECTORS: dict[str, Callable[..., Any]] = {
    "select_top_cov": functools.partial(select_top_cov, VALUES, VALUES),
    "select_cov_band": functools.partial(select_cov_band, VALUES, VALUES, lb=0.0, ub=1.0, seed=1),
    "SelectionAccumulator.top": SelectionAccumulator.top,
    "SelectionAccumulator.band": functools.partial(
        SelectionAccumulator.band, lb=0.0, ub=1.0, seed=1
    ),
}
every_selector = pytest.mark.parametrize("function", SELECTORS.values(), ids=SELECTORS)


@every_selector
def test_one_of_ratio_and_k(function):
    for options in ({}, {"k": 3, "ratio": 0.1}, {"k": 0, "ratio": 0.1}):
        with pytest.raises(ValueError, match="one of ratio and k"):
            function(**options)


@every_selector
@pytest.mark.parametrize(
    ("options", "error"),
    [
        *(({"ratio": x}, ValueError) for x in (0, 0.0, -0.1, math.nan, math.inf, 1.0000001, 2)),
        *(({"ratio": x}, TypeError) for x in (True, "0.1", torch.tensor(0.1), 1j)),
        *(({"k": x}, ValueError) for x in (-1, -(2**70))),
        *(({"k": x}, TypeError) for x in (True, False, 1.0, "1", torch.tensor(1))),
    ],
)
def test_wrong_numbers_of_tokens(function, options, error):
    (name,) = options
    with pytest.raises(error, match=f"^{name} must be"):
        function(**options)


BANDS = (
    functools.partial(select_cov_band, VALUES, VALUES, k=1),
    functools.partial(SelectionAccumulator.band, k=1),
)


@pytest.mark.parametrize("function", BANDS)
@pytest.mark.parametrize(
    ("lb", "ub", "error"),
    [
        (1.0, 1.0, ValueError),
        (2.0, 1.0, ValueError),
        (0.0, -0.0, ValueError),
        (math.nan, 1.0, ValueError),
        (0.0, math.nan, ValueError),
        (math.inf, math.inf, ValueError),
        ("0", 1.0, TypeError),
        (0.0, None, TypeError),
        (False, 1.0, TypeError),
        (torch.tensor(0.0), 1.0, TypeError),
    ],
)
def test_wrong_bands(function, lb, ub, error):
    with pytest.raises(error, match=r"^(lb|ub) must be"):
        function(lb=lb, ub=ub, seed=0)


@pytest.mark.parametrize("function", BANDS)
@pytest.mark.parametrize(
    ("seed", "error"),
    [
        (2**64, ValueError),
        (-(2**63) - 1, ValueError),
        (1.0, TypeError),
        (True, TypeError),
        (None, TypeError),
        (torch.tensor(1, dtype=torch.int32), TypeError),
        (torch.tensor([1, 2]), TypeError),
    ],
)
def test_wrong_seeds(function, seed, error):
    with pytest.raises(error, match=r"^seed must"):
        function(lb=0, ub=1, seed=seed)


@pytest.mark.parametrize("name", ["select_top_cov", "select_cov_band", "add to top", "add to band"])
def test_wrong_exclusions(name):
    function = FUNCTIONS[name]
    with pytest.raises(ValueError, match=r"^exclude must have shape"):
        function(VALUES, VALUES, exclude=torch.ones(2))
    with pytest.raises(TypeError, match=r"^exclude must be"):
        function(VALUES, VALUES, exclude=1)


@pytest.mark.parametrize("name", ["select_cov_band", "add to band"])
@pytest.mark.parametrize(
    ("index", "error"),
    [
        (torch.arange(3), ValueError),
        (torch.ones(2, 1, dtype=torch.int64), ValueError),
        (torch.ones(2), TypeError),
        ([0, 1], TypeError),
    ],
)
def test_wrong_numbers_of_sequences(name, index, error):
    with pytest.raises(error, match=r"^sequence_index must"):
        FUNCTIONS[name](VALUES, VALUES, sequence_index=index)
    flat, cu_seqlens = VALUES.view(-1), torch.tensor([0, 2, 6])
    with pytest.raises(error, match=r"^sequence_index must"):
        FUNCTIONS[name](flat, flat, cu_seqlens=cu_seqlens, sequence_index=index)


def test_wrong_old_log_prob():
    step = SelectionAccumulator.top(k=1)
    with pytest.raises(ValueError, match=r"^old_log_prob must have shape"):
        step.add(VALUES, VALUES, old_log_prob=torch.ones(2))
    with pytest.raises(TypeError, match=r"^old_log_prob must be"):
        step.add(VALUES, VALUES, old_log_prob=VALUES.int())


def test_wrong_bounds_of_the_ratio():
    step = SelectionAccumulator.top(k=1)
    for value, error in ((-0.1, ValueError), (math.nan, ValueError), ("0.2", TypeError)):
        for name in ("clip_ratio_low", "clip_ratio_high"):
            with pytest.raises(error, match=f"^{name} must be"):
                step.add(VALUES, VALUES, old_log_prob=VALUES, **{name: value})


def test_a_refused_micro_batch_is_not_taken(generator):
    good = torch.randn(2, 30, generator=generator)
    step = SelectionAccumulator.top(k=3)
    step.add(good, good)
    with pytest.raises(ValueError, match="advantages"):
        step.add(good, torch.ones(5))
    (mask,) = step.masks()
    assert torch.equal(mask, select_top_cov(good, good, k=3))


@pytest.mark.parametrize("shares", [(0,), (0.1, -1.0), (1.5,), (math.nan,)])
def test_wrong_shares(shares):
    with pytest.raises(ValueError, match=r"^shares must be"):
        covariance_table(VALUES, VALUES, shares=shares)


def test_wrong_process_groups():
    for function in (
        functools.partial(token_covariance, VALUES, VALUES),
        *(functools.partial(selector, k=1) for selector in SELECTORS.values()),
    ):
        with pytest.raises(TypeError, match=r"^process_group must be"):
            function(process_group="default")


@every_selector
def test_large_shares_are_warned_of_once(function):
    _advice.warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"^ratio=0.2 selects 20% of all tokens"):
        function(ratio=0.2)
    function(ratio=0.2)  # a second warning would be an error
    function(ratio=0.1)
