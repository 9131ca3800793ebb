"""Says so, once, where advantages look divided by the number of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from powerkernels._advice import warn_once

# Advantages are of the order of 1. At this many tokens ...
MIN_TOKENS = 256
# ... the largest times their number is far above this, unless they were divided by it.
MAX_SUM = 10.0


class AdvantageScaleCheck:
    """Looks at the first batch. On a GPU it looks when the figures have arrived by themselves."""

    def __init__(self) -> None:
        self._done = False
        self._pending: tuple[Tensor, torch.cuda.Event] | None = None

    def __call__(self, advantages: Tensor, mask: Tensor | None) -> None:
        if self._done or torch.compiler.is_compiling():
            return
        if advantages.device.type == "cuda":
            self._later(advantages, mask)
        else:
            self._judge(_figures(advantages, mask))

    def _later(self, advantages: Tensor, mask: Tensor | None) -> None:
        # The current device may be another one, and events are of the current one's stream.
        with torch.cuda.device(advantages.device):
            if torch.cuda.is_current_stream_capturing():
                return
            if self._pending is None:
                figures = torch.empty(2, dtype=torch.float64, pin_memory=True)
                figures.copy_(_figures(advantages, mask), non_blocking=True)
                event = torch.cuda.Event()
                event.record()
                self._pending = figures, event
            elif self._pending[1].query():
                self._judge(self._pending[0])

    def _judge(self, figures: Tensor) -> None:
        self._done = True
        largest, count = figures.tolist()
        if count >= MIN_TOKENS and 0 < largest * count <= MAX_SUM:
            warn_once(
                f"the largest advantage of {count:.0f} tokens is {largest:g}: were the advantages "
                "divided by the number of tokens? Bounds of the covariance are meant for "
                "advantages of the order of 1."
            )


def _figures(advantages: Tensor, mask: Tensor | None) -> Tensor:
    """float64 [2]: the largest |advantage|, and the number of tokens."""
    sizes = advantages.detach().abs().nan_to_num(0, 0, 0)
    if mask is None:
        count = sizes.new_full((), sizes.numel(), dtype=torch.float64)
    else:
        kept = mask != 0
        count = kept.sum(dtype=torch.float64)
        if sizes.shape == kept.shape:
            sizes = torch.where(kept, sizes, 0)
    largest = sizes.amax() if sizes.numel() else sizes.new_zeros(())
    return torch.stack((largest.double(), count))


check_advantage_scale = AdvantageScaleCheck()
