"""Fast, exact kernels for language-model sampling and RL training."""

from importlib import import_module as _import_module
from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from powerkernels.linear_logprob import linear_score_tokens
    from powerkernels.logprob import (
        TokenSamples,
        TokenScores,
        sample_tokens,
        score_tokens,
        sequence_log_likelihood,
    )
    from powerkernels.power_sampling import PowerSample, PowerSampler, PowerSamplingConfig

try:
    __version__ = _version("powerkernels")
except _PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0.1.0"

# Imported at first use, so that `powerkernels --help` need not wait for torch.
_HOMES = {
    "PowerSample": "powerkernels.power_sampling",
    "PowerSampler": "powerkernels.power_sampling",
    "PowerSamplingConfig": "powerkernels.power_sampling",
    "TokenSamples": "powerkernels.logprob",
    "TokenScores": "powerkernels.logprob",
    "linear_score_tokens": "powerkernels.linear_logprob",
    "sample_tokens": "powerkernels.logprob",
    "score_tokens": "powerkernels.logprob",
    "sequence_log_likelihood": "powerkernels.logprob",
}

__all__ = [
    "PowerSample",
    "PowerSampler",
    "PowerSamplingConfig",
    "TokenSamples",
    "TokenScores",
    "linear_score_tokens",
    "sample_tokens",
    "score_tokens",
    "sequence_log_likelihood",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
