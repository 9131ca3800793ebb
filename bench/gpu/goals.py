"""What a figure is held against: shares of a ceiling, and what others say they reach."""

from __future__ import annotations

from typing import NamedTuple

# Of the ceiling measured beside it, at the size of a training step.
GOALS = {
    "score_tokens": 0.95,
    "score_tokens_bwd": 0.92,
    "linear_score_tokens": 0.90,
    "linear_score_tokens_fwd_bwd": 0.85,
    "sample_tokens": 1 / 1.3,
}


class Claim(NamedTuple):
    """A figure of somebody else's, on their machine: to be beaten there, not measured here."""

    kernel: str
    case: str  # how the title of ours of that size begins
    variant: str
    device: str  # part of the device's name
    milliseconds: float
    who: str


CLAIMS = (
    Claim(
        "score_tokens",
        "Qwen2.5-1.5B, 8192 rows, bfloat16",
        "powerkernels, log_prob and entropy",
        "H100",
        0.89,
        "a trainer's fused Triton op, log_prob and entropy",
    ),
    Claim(
        "linear_score_tokens",
        "head of 4096 × 131072, 8192 rows, bfloat16",
        "powerkernels, log_prob and entropy",
        "H100",
        12.3,
        "Liger (CuTe DSL), NLL and entropy, forward",
    ),
    Claim(
        "linear_score_tokens_fwd_bwd",
        "head of 4096 × 131072, 8192 rows, bfloat16",
        "powerkernels, log_prob and entropy",
        "H100",
        50.2,
        "Liger (CuTe DSL), NLL and entropy, forward and backward",
    ),
    Claim(
        "linear_score_tokens_fwd_bwd",
        "Llama-3-8B, 8192 rows, bfloat16",
        "powerkernels, log_prob and entropy",
        "H200",
        34.4,
        "Liger, linear cross-entropy of 8192 rows, forward and backward",
    ),
)
