"""Moves of cached positions in plain torch: the truth."""

from __future__ import annotations

from torch import Tensor

from powerkernels.lane_moves.caches import LaneCaches


def move_positions(caches: LaneCaches, moves: Tensor, offset: Tensor) -> None:
    """See functional.move_positions. Waits for the device."""
    for lane, (move, start) in enumerate(zip(moves.tolist(), offset.tolist(), strict=True)):
        source, copy, first, count, both_from = move
        if count <= 0:
            continue
        end = start + first + count
        targets = {1 - copy: slice(start + first, end)}
        if source != lane:
            targets[copy] = slice(min(start + both_from, end), end)
        for copies in caches.copies:
            of_lane = copies.unflatten(1, (caches.num_lanes, caches.num_positions))
            for target, positions in targets.items():
                of_lane[target, lane, positions] = of_lane[copy, source, positions]
