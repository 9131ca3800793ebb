"""Scores of tokens under p and p^alpha, and tokens drawn from p^alpha."""

from powerkernels.logprob.functional import (
    TokenSamples,
    TokenScores,
    sample_tokens,
    score_tokens,
)
from powerkernels.logprob.sequence import sequence_log_likelihood

__all__ = [
    "TokenSamples",
    "TokenScores",
    "sample_tokens",
    "score_tokens",
    "sequence_log_likelihood",
]
