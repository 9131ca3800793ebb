"""A vocabulary split over the ranks of a process group, in their order.

torch may be built without its distributed part: it is imported where a group is given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from powerkernels.logprob import eager

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# The target of a row that no shard counts. What else is outside of a shard is on another one.
IGNORED = -(2**62)


def name_of(process_group: ProcessGroup | None) -> str:
    """What torch's ops know the group by; empty for None."""
    if process_group is None:
        return ""
    from torch.distributed import ProcessGroup

    if not isinstance(process_group, ProcessGroup):
        raise TypeError(
            "process_group must be a torch.distributed.ProcessGroup that this rank belongs to, "
            f"got {type(process_group).__name__} {process_group!r}"
        )
    return process_group.group_name


def _group(name: Any) -> ProcessGroup:
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)


def shifted(targets: Tensor, ignore_index: int, start: Tensor | int) -> Tensor:
    """Targets as entries of the part of the vocabulary that begins at start: int64, or IGNORED."""
    return torch.where(targets == ignore_index, IGNORED, targets.long() - start)


@torch.library.custom_op("powerkernels::vocab_parallel_targets", mutates_args=())
def local_targets(targets: Tensor, size: int, ignore_index: int, group: str) -> Tensor:
    """Targets of the whole vocabulary as those of this rank's `size` entries."""
    own = torch.tensor([size], dtype=torch.int64, device=targets.device)
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
    return shifted(targets, ignore_index, ends[_group(group).rank()] - size)


@local_targets.register_fake
def _(targets: Tensor, size: int, ignore_index: int, group: str) -> Tensor:
    return torch.empty(targets.shape, dtype=torch.int64, device=targets.device)


def all_gather(value: Tensor, group: str) -> Tensor:
    """[...] of every rank -> [ranks, ...]."""
    import torch.distributed as dist

    process_group = _group(group)
    parts = [torch.empty_like(value) for _ in range(process_group.size())]
    dist.all_gather(parts, value.contiguous(), group=process_group)
    return torch.stack(parts)


def all_reduce(value: Tensor, group: str) -> None:
    """Adds up `value` over the ranks, in place."""
    import torch.distributed as dist

    dist.all_reduce(value, group=_group(group))
