"""Whether a variant's results are right: no figure is made for one whose are not."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from bench.harness.cases import Outputs

# A variant may be so many times as far from float64 as plain torch in the same dtype is, and a few
# roundings of its own result's dtype more.
TIMES_THE_YARDSTICK = 8.0
ROUNDINGS = 4.0


class WrongResultError(Exception):
    """A variant's result is not the reference's; the message says which and by how much."""


def check(
    found: Outputs, expected: Mapping[str, Tensor], yardstick: Mapping[str, Tensor] | None
) -> dict[str, float]:
    """The largest error of each output.

    Raises:
        WrongResultError: an output is further from `expected` than is allowed, or there is none.
    """
    shared = [name for name in found if name in expected]
    if not shared:
        raise WrongResultError(f"nothing to compare: it returns {', '.join(found) or 'nothing'}")
    errors = {}
    for name in shared:
        value, exact = found[name].detach(), expected[name].detach()
        if value.shape != exact.shape:
            raise WrongResultError(
                f"{name} has shape {list(value.shape)}, expected {list(exact.shape)}"
            )
        allowed = _rounding(value, exact)
        if yardstick is not None and name in yardstick:
            allowed += TIMES_THE_YARDSTICK * _error(yardstick[name], exact)
        errors[name] = _error(value, exact)
        if not errors[name] <= allowed:
            raise WrongResultError(
                f"{name} is off by {errors[name]:.3g}, allowed {allowed:.3g} "
                f"(largest value {float(_finite(exact).abs().max()):.3g})"
            )
    return errors


def _error(value: Tensor, exact: Tensor) -> float:
    """Largest difference; infinite where one is not finite and the other is not the same."""
    value, exact = value.detach().to(exact.device).double(), exact.detach().double()
    if value.numel() == 0:
        return 0.0
    same = (value == exact) | (value.isnan() & exact.isnan())
    difference = torch.where(same, 0.0, (value - exact).abs())
    return math.inf if bool(difference.isnan().any()) else float(difference.max())


def _rounding(value: Tensor, exact: Tensor) -> float:
    if not value.dtype.is_floating_point:
        return 0.0  # tokens, masks and counts are equal or wrong
    eps = torch.finfo(value.dtype).eps
    return ROUNDINGS * eps * float(_finite(exact).abs().max())


def _finite(exact: Tensor) -> Tensor:
    kept = exact.double()[exact.isfinite()]
    return kept if kept.numel() else torch.zeros(1, dtype=torch.float64)
