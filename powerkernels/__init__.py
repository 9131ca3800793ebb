"""Fast, exact kernels for language-model sampling and RL training."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from powerkernels.covariance import (
        CovarianceTable,
        SelectionAccumulator,
        TokenCovariance,
        covariance_table,
        select_cov_band,
        select_top_cov,
        token_covariance,
    )
    from powerkernels.linear_logprob import linear_score_tokens
    from powerkernels.logprob import (
        TokenSamples,
        TokenScores,
        sample_tokens,
        score_tokens,
        sequence_log_likelihood,
    )
    from powerkernels.policy_loss import (
        PolicyLoss,
        clip_cov_loss,
        entropy_bonus,
        kl_cov_loss,
        ppo_clip_loss,
        reference_kl_loss,
    )
    from powerkernels.power_sampling import PowerSample, PowerSampler, PowerSamplingConfig

# The one place of it: pyproject.toml and csrc/build.py read it from this line.
__version__ = "0.1.0"

# Imported at first use, so that `powerkernels --help` need not wait for torch.
_HOMES = {
    "CovarianceTable": "powerkernels.covariance",
    "PolicyLoss": "powerkernels.policy_loss",
    "PowerSample": "powerkernels.power_sampling",
    "PowerSampler": "powerkernels.power_sampling",
    "PowerSamplingConfig": "powerkernels.power_sampling",
    "SelectionAccumulator": "powerkernels.covariance",
    "TokenCovariance": "powerkernels.covariance",
    "TokenSamples": "powerkernels.logprob",
    "TokenScores": "powerkernels.logprob",
    "clip_cov_loss": "powerkernels.policy_loss",
    "covariance_table": "powerkernels.covariance",
    "entropy_bonus": "powerkernels.policy_loss",
    "kl_cov_loss": "powerkernels.policy_loss",
    "linear_score_tokens": "powerkernels.linear_logprob",
    "ppo_clip_loss": "powerkernels.policy_loss",
    "reference_kl_loss": "powerkernels.policy_loss",
    "sample_tokens": "powerkernels.logprob",
    "score_tokens": "powerkernels.logprob",
    "select_cov_band": "powerkernels.covariance",
    "select_top_cov": "powerkernels.covariance",
    "sequence_log_likelihood": "powerkernels.logprob",
    "token_covariance": "powerkernels.covariance",
}

__all__ = [
    "CovarianceTable",
    "PolicyLoss",
    "PowerSample",
    "PowerSampler",
    "PowerSamplingConfig",
    "SelectionAccumulator",
    "TokenCovariance",
    "TokenSamples",
    "TokenScores",
    "clip_cov_loss",
    "covariance_table",
    "entropy_bonus",
    "kl_cov_loss",
    "linear_score_tokens",
    "ppo_clip_loss",
    "reference_kl_loss",
    "sample_tokens",
    "score_tokens",
    "select_cov_band",
    "select_top_cov",
    "sequence_log_likelihood",
    "token_covariance",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
