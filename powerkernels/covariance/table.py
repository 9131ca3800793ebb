"""How a batch's covariances are distributed: the table of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from powerkernels._arguments import check_number
from powerkernels.covariance.functional import token_covariance

# The paper's table 1.
SHARES = (0.0002, 0.002, 0.02, 0.2, 0.5, 1.0)


class CovarianceTable(NamedTuple):
    share: Tensor  # float64 [S]
    mean_cov: Tensor  # float64 [S], of the share of the tokens with the largest covariances
    quantile: Tensor  # float64 [S], the smallest covariance among them


def covariance_table(
    log_prob: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    shares: Sequence[float] = SHARES,
    cu_seqlens: Tensor | None = None,
) -> CovarianceTable:
    """Mean and smallest covariance among the max(1, floor(share * count)) tokens with the largest.

    By sorting: exact, and slower than a selection. Nothing waits for the device. NaN without a
    token, or where a token is not finite.

    Args:
        log_prob, advantages, mask, cu_seqlens: as of `token_covariance`.
        shares: numbers in (0, 1].

    Returns:
        CovarianceTable: one entry a share, in their order, on the same device.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype, device or range.

    Source: Cui et al. 2025, table 1.
    """
    for share in shares:
        check_number("shares", share, low=0, open_low=True)
        if share > 1:
            raise ValueError(f"shares must be in (0, 1], got {share!r} among them")
    found = token_covariance(log_prob, advantages, mask, cu_seqlens=cu_seqlens)
    cov = found.cov.flatten()
    if mask is not None:
        cov = cov.masked_fill(mask.flatten() == 0, -torch.inf)
    ordered = cov.sort(descending=True).values.double()
    # Masked-out tokens are at the end, and no share reaches them.
    sums = torch.where(ordered.isfinite(), ordered, 0.0).cumsum(0)
    filled = found.covariance.new_empty(0)  # on the device, without a copy from the host
    wanted = torch.cat([filled, *(filled.new_full((1,), share) for share in shares)])
    if cov.numel() == 0:
        nothing = torch.full_like(wanted, torch.nan)
        return CovarianceTable(wanted, nothing, nothing)
    number = (wanted * found.count).floor().clamp(min=1).long()
    known = ~found.covariance.isnan()
    mean = torch.where(known, sums[number - 1] / number, torch.nan)
    return CovarianceTable(wanted, mean, torch.where(known, ordered[number - 1], torch.nan))
