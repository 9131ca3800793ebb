"""Scores of tokens straight from hidden states and the LM head."""

from powerkernels.linear_logprob.functional import linear_score_tokens

__all__ = ["linear_score_tokens"]
