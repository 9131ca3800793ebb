"""Switches of torch.cuda that a test turns, put back whatever happens."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def waits_are_errors() -> Iterator[None]:
    """Inside, an operation that waits for the CUDA device raises RuntimeError.

    torch warns that the mode is a prototype after it has set it: here that is no error, and were
    it one, the mode would be put back all the same.
    """
    before = torch.cuda.get_sync_debug_mode()
    try:
        _set("error")
        yield
    finally:
        _set(before)


def _set(mode: int | str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*prototype feature", UserWarning)
        torch.cuda.set_sync_debug_mode(mode)
