"""Counter-based random numbers, the same in every backend."""

from powerkernels.philox.functional import philox4x32, uniform53

__all__ = ["philox4x32", "uniform53"]
