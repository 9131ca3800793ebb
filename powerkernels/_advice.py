"""Warnings about settings that are legal and probably not meant; each is given once."""

from __future__ import annotations

import functools
import warnings


@functools.cache
def warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)
