"""A vocabulary split over the ranks of a process group, in their order."""

from __future__ import annotations

import torch
from torch import Tensor

from powerkernels._process_group import all_gather, group_named
from powerkernels.logprob import eager

# The target of a row that no shard counts. What else is outside of a shard is on another one.
IGNORED = -(2**62)


def shifted(targets: Tensor, ignore_index: int, start: Tensor | int) -> Tensor:
    """Targets as entries of the part of the vocabulary that begins at start: int64, or IGNORED."""
    return torch.where(targets == ignore_index, IGNORED, targets.long() - start)


@torch.library.custom_op("powerkernels::vocab_parallel_targets", mutates_args=())
def local_targets(targets: Tensor, size: int, ignore_index: int, group: str) -> Tensor:
    """Targets of the whole vocabulary as those of this rank's `size` entries."""
    # Filled on the device: a copy from the host would wait for it, and cannot be captured.
    own = torch.full((1,), size, dtype=torch.int64, device=targets.device)
    sizes = all_gather(own, group).flatten()
    empty = "this rank" if size == 0 else ""
    # On a GPU what the others hold is on the device, and looking at it would wait.
    if targets.device.type == "cpu":
        ranks = (sizes == 0).nonzero().flatten().tolist()
        empty = f"ranks {ranks}" if ranks else ""
    if empty:
        raise ValueError(
            f"every rank of process_group must hold part of the vocabulary; empty: {empty}"
        )
    if targets.device.type == "cpu":
        eager.check_targets(targets, int(sizes.sum()), ignore_index)
    ends = sizes.cumsum(0)
    return shifted(targets, ignore_index, ends[group_named(group).rank()] - size)


@local_targets.register_fake
def _(targets: Tensor, size: int, ignore_index: int, group: str) -> Tensor:
    return torch.empty(targets.shape, dtype=torch.int64, device=targets.device)
