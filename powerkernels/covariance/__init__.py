"""Covariance of log-probability and advantage, and the exact selection of tokens by it."""

from powerkernels.covariance.accumulator import SelectionAccumulator, SelectionStats
from powerkernels.covariance.functional import (
    TokenCovariance,
    select_cov_band,
    select_top_cov,
    token_covariance,
)
from powerkernels.covariance.table import CovarianceTable, covariance_table

__all__ = [
    "CovarianceTable",
    "SelectionAccumulator",
    "SelectionStats",
    "TokenCovariance",
    "covariance_table",
    "select_cov_band",
    "select_top_cov",
    "token_covariance",
]
