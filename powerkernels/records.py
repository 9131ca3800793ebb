"""A sample as a line of JSON, or a row of a table, has it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from powerkernels import PowerSample

# Of a sample, what every kind of output holds; log_prob per token, nats.
SAMPLE_FIELDS = (
    "text",
    "tokens",
    "log_prob",
    "log_likelihood",
    "confidence",
    "acceptance_rate",
    "decoded_tokens",
    "finish_reason",
)


def sample_fields(sample: PowerSample) -> dict[str, Any]:
    """`SAMPLE_FIELDS` of a sample as plain values; a number that is not finite becomes None."""
    return {name: plain(getattr(sample, name)) for name in SAMPLE_FIELDS}


def plain(value: Any) -> Any:
    """Tensors to lists, non-finite numbers to None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
