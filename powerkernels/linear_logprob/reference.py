"""Scores from hidden states as a formula in plain torch: the truth the kernels are tested against.

Everything is computed in float64 and differentiable.
"""

from __future__ import annotations

from torch import Tensor

from powerkernels.logprob import reference


def linear_score_tokens(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    alpha: float,
    temperature: float | Tensor,
    entropy: bool,
    softcap: float | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden [..., D], weight [V, D], targets [...] -> float64 log_prob, log_z, entropy [...]."""
    # Ignored rows take part in nothing: not even a NaN in them reaches a gradient.
    kept = hidden.double().masked_fill((targets == ignore_index).unsqueeze(-1), 0.0)
    logits = kept @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    return reference.score_tokens(
        logits,
        targets,
        alpha=alpha,
        temperature=temperature,
        entropy=entropy,
        softcap=softcap,
        ignore_index=ignore_index,
    )
