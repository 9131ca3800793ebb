"""Covariance and selection by their definitions: exact sums, numpy in float64, a full sort."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from powerkernels.philox import philox4x32

# The last word of a token's counter.
STREAM = 0x436F7631

IGNORE_LARGE_RATIO = r"ignore:.*selects .* of all tokens:UserWarning"


class Truth(NamedTuple):
    cov: np.ndarray  # float32 [N], 0 where masked out
    kept: np.ndarray  # bool [N]
    covariance: float
    mean_log_prob: float
    mean_advantage: float
    count: int


def flat(value: Tensor) -> np.ndarray:
    return value.detach().cpu().double().numpy().reshape(-1)


def as_bool(mask: Tensor | None, like: Tensor) -> np.ndarray:
    return np.ones(like.numel(), bool) if mask is None else flat(mask) != 0


def rows_of(log_prob: Tensor, cu_seqlens: Tensor | None) -> list[range]:
    """The flat indices of each sequence."""
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        return [range(start, end) for start, end in itertools.pairwise(bounds)]
    length = log_prob.shape[-1] if log_prob.ndim > 1 else 1
    count = math.prod(log_prob.shape[:-1]) if log_prob.ndim > 1 else log_prob.shape[0]
    return [range(row * length, (row + 1) * length) for row in range(count)]


def spread(advantages: Tensor, log_prob: Tensor, cu_seqlens: Tensor | None) -> np.ndarray:
    """One advantage a token, float64 [N]."""
    values = flat(advantages)
    if advantages.shape in (log_prob.shape, (1, *log_prob.shape)):
        return values
    out = np.zeros(log_prob.numel())
    for value, row in zip(values, rows_of(log_prob, cu_seqlens), strict=True):
        out[row.start : row.stop] = value
    return out


def covariance(
    log_prob: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> Truth:
    x, a = flat(log_prob), spread(advantages, log_prob, cu_seqlens)
    kept = as_bool(mask, log_prob)
    count = int(kept.sum())
    if count and np.isfinite(x[kept]).all() and np.isfinite(a[kept]).all():
        mean_x, mean_a = math.fsum(x[kept]) / count, math.fsum(a[kept]) / count
    else:
        mean_x = mean_a = math.nan
    with np.errstate(all="ignore"):
        cov = np.where(kept, (x - mean_x) * (a - mean_a), 0.0).astype(np.float32) + np.float32(0)
        total = float(cov[kept].sum(dtype=np.longdouble))
    mean = math.nan if math.isnan(mean_x) else total / count
    return Truth(cov, kept, mean, mean_x, mean_a, count)


def number_of_tokens(count: int, ratio: float | None, k: int | None) -> int:
    if k is not None:
        return k
    assert ratio is not None
    return max(1, math.floor(count * ratio))


def _first(keys: np.ndarray, eligible: np.ndarray, number: int) -> np.ndarray:
    """The places of the largest keys; equal ones by index."""
    places = np.flatnonzero(eligible)
    order = np.lexsort((places, -keys[places].astype(np.float64)))
    chosen = np.zeros(len(keys), bool)
    chosen[places[order[:number]]] = True
    return chosen


def _selectable(truth: Truth, exclude: Tensor | None) -> np.ndarray:
    """The tokens to choose from; none where there is nothing to choose by."""
    out = truth.kept.copy()
    if exclude is not None:
        out &= flat(exclude) == 0
    if math.isnan(truth.mean_log_prob) or not (truth.cov[out] != 0).any():
        out[:] = False
    return out


def top(
    log_prob: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    ratio: float | None = None,
    k: int | None = None,
    exclude: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """bool, shaped as log_prob."""
    truth = covariance(log_prob, advantages, mask, cu_seqlens=cu_seqlens)
    number = number_of_tokens(truth.count, ratio, k)
    chosen = _first(truth.cov, _selectable(truth, exclude), number)
    return torch.from_numpy(chosen).view(log_prob.shape)


def band(
    log_prob: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    ratio: float | None = None,
    k: int | None = None,
    lb: float,
    ub: float,
    seed: int | Tensor,
    exclude: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sequence_index: Tensor | None = None,
) -> Tensor:
    """bool, shaped as log_prob."""
    truth = covariance(log_prob, advantages, mask, cu_seqlens=cu_seqlens)
    eligible = _selectable(truth, exclude)
    eligible &= (truth.cov > np.float32(lb)) & (truth.cov < np.float32(ub))
    keys = random_numbers(log_prob, seed, cu_seqlens, sequence_index)
    number = number_of_tokens(truth.count, ratio, k)
    return torch.from_numpy(_first(keys, eligible, number)).view(log_prob.shape)


def random_numbers(
    log_prob: Tensor, seed: int | Tensor, cu_seqlens: Tensor | None, numbers: Tensor | None
) -> np.ndarray:
    """int64 [N], of each token."""
    counters = []
    names = None if numbers is None else numbers.flatten().tolist()
    for row, places in enumerate(rows_of(log_prob, cu_seqlens)):
        name = row if names is None else names[row]
        counters += [(place, name, name >> 32, STREAM) for place in range(len(places))]
    words = philox4x32(torch.tensor(counters, dtype=torch.int64).view(-1, 4), seed=seed)
    return words[:, 0].clamp(min=1).numpy()


class Batch(NamedTuple):
    """Arguments of all functions of the covariance."""

    log_prob: Tensor
    advantages: Tensor
    mask: Tensor

    def to(self, device: str) -> Batch:
        return Batch(*(value.to(device) for value in self))


def random_batch(
    shape: tuple[int, ...],
    generator: torch.Generator,
    *,
    ties: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """ties: few distinct covariances. About a quarter of the tokens are masked out."""
    log_prob = -torch.rand(shape, generator=generator) * 3
    advantages = torch.randn(shape, generator=generator) * 1.5
    if ties:
        log_prob, advantages = log_prob.round(), advantages.clamp(-1, 1).round()
    mask = torch.rand(shape, generator=generator) < 0.75
    if mask.numel():
        mask.view(-1)[0] = True
    return Batch(log_prob.to(dtype), advantages.to(dtype), mask)


def packed(values: Tensor, lengths: list[int]) -> Tensor:
    """The first of each row's [B, T] entries, one after another."""
    return torch.cat([row[:length] for row, length in zip(values, lengths, strict=True)])


def bounds_of(lengths: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=dtype)


def to_device(arguments: dict[str, Any], device: str) -> dict[str, Any]:
    """The tensors among the arguments on that device."""
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
