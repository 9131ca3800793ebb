"""Collectives of torch ops, which know a process group by its name.

torch may be built without its distributed part: it is imported where a group is given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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


def group_named(name: Any) -> ProcessGroup:
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)


def all_gather(value: Tensor, group: str) -> Tensor:
    """[...] of every rank -> [ranks, ...]."""
    import torch.distributed as dist

    process_group = group_named(group)
    parts = [torch.empty_like(value) for _ in range(process_group.size())]
    dist.all_gather(parts, value.contiguous(), group=process_group)
    return torch.stack(parts)


def all_reduce(value: Tensor, group: str) -> None:
    """Adds up `value` over the ranks, in place."""
    import torch.distributed as dist

    dist.all_reduce(value, group=group_named(group))
