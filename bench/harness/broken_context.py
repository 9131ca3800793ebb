"""A CUDA context that an illegal access has broken, and with it all that its process can do."""

from __future__ import annotations

# Of a process that ends for it. What it has done is kept, and the next one goes on behind it.
BROKEN_EXIT = 70


class BrokenContextError(Exception):
    """Every later call of CUDA in this process would fail for what is broken already."""


def context_is_broken() -> bool:
    """Whether CUDA is in use here and answers every call with an error of an earlier one."""
    import torch

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
