"""Ticks in one launch, without the pauses of a loop that looks now and then whether it is done."""

from __future__ import annotations

import torch

from powerkernels.power_sampling.graph_loop import DeviceLoop


def launched(loop: DeviceLoop, ticks: int) -> None:
    """So many ticks on the current stream; returns when the device has made them."""
    before, stream = loop.ticks, torch.cuda.current_stream()
    loop._loop.launch(stream.cuda_stream, ticks)
    stream.synchronize()
    made = loop.ticks - before
    assert made == ticks, f"the loop ended after {made} of {ticks} ticks"
