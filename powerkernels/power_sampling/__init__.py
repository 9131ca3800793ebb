"""Sampling from p(x)^alpha of a language model with Metropolis-Hastings."""

from powerkernels.power_sampling import metropolis_hastings
from powerkernels.power_sampling.config import PowerSamplingConfig
from powerkernels.power_sampling.engine import SamplerStats
from powerkernels.power_sampling.lane_model import LaneModel
from powerkernels.power_sampling.sampler import MHTrace, PowerSample, PowerSampler

__all__ = [
    "LaneModel",
    "MHTrace",
    "PowerSample",
    "PowerSampler",
    "PowerSamplingConfig",
    "SamplerStats",
    "metropolis_hastings",
]
