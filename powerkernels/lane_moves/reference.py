"""Moves of cached positions in plain torch: the truth."""

from __future__ import annotations

from torch import Tensor

from powerkernels.lane_moves.caches import LaneCaches


def move_positions(caches: LaneCaches, moves: Tensor, offset: Tensor) -> None:
    """See functional.move_positions. Waits for the device."""
    for lane, (move, start) in enumerate(zip(moves.tolist(), offset.tolist(), strict=True)):
        source, copy, first, count = move
        if count <= 0:
            continue
        positions = slice(start + first, start + first + count)
        targets = (1 - copy,) if source == lane else (0, 1)
        for copies in caches.copies:
            of_lane = copies.unflatten(1, (caches.num_lanes, caches.num_positions))
            for target in targets:
                of_lane[target, lane, positions] = of_lane[copy, source, positions]
