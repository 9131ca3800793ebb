"""Moves of cached positions between lanes, and between the two copies of a lane's cache."""

from powerkernels.lane_moves.caches import LaneCaches
from powerkernels.lane_moves.functional import move_positions

__all__ = ["LaneCaches", "move_positions"]
