"""Attention of one new token per lane over the lane's own prefix in a static cache."""

from powerkernels.decode_attention.functional import decode_attention

__all__ = ["decode_attention"]
