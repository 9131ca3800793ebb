"""Collectives of torch ops, which know a process group by its name.

torch may be built without its distributed part: it is imported where a group is given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from powerkernels._cuda_graph import is_capturing

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Backends whose collectives wait on the host.
HOST_BACKENDS = ("gloo", "mpi")


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
    _refuse_capture(process_group, value.device)
    parts = [torch.empty_like(value) for _ in range(process_group.size())]
    dist.all_gather(parts, value.contiguous(), group=process_group)
    return torch.stack(parts)


def all_reduce(value: Tensor, group: str) -> None:
    """Adds up `value` over the ranks, in place."""
    import torch.distributed as dist

    process_group = group_named(group)
    _refuse_capture(process_group, value.device)
    dist.all_reduce(value, group=process_group)


def _refuse_capture(process_group: ProcessGroup, device: torch.device) -> None:
    """Refuse a collective that a CUDA graph cannot hold, before it spoils the capture."""
    if not is_capturing(device):
        return
    from torch.distributed import get_backend_config

    backends = dict(item.split(":") for item in get_backend_config(process_group).split(","))
    backend = backends.get(device.type, "none")
    if backend in HOST_BACKENDS:
        raise RuntimeError(
            "process_group must have a backend that can be captured in a CUDA graph, as nccl, for "
            f"{device.type}, got {backend}: its collectives wait on the host"
        )
