"""The transition of all lanes by the backend that serves the state's device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from powerkernels import _extension
from powerkernels.logprob import TokenSamples
from powerkernels.power_sampling import reference
from powerkernels.power_sampling.lane_state import LaneState

# Appends what was drawn (None: nothing) and begins what comes next; see `reference.transition`.
Transition = Callable[[TokenSamples | None], None]


def state_device(device: torch.device) -> torch.device:
    """Where the state of the lanes of a model on `device` lives: there, if a kernel serves it."""
    return device if _extension.backend_for(device) == "triton" else torch.device("cpu")


def transition_of(state: LaneState) -> Transition:
    """The transition of a state, written in place."""
    backend = _extension.backend_for(state.lanes.device)
    if backend == "cpp":
        return _CppTransition(state)
    if backend == "triton":
        from powerkernels.power_sampling import gpu  # imports triton

        return gpu.transition_of(state)
    return functools.partial(reference.transition, state)


class _CppTransition:
    """Holds the state, whose addresses the compiled part keeps."""

    def __init__(self, state: LaneState) -> None:
        self._state = state
        tensors = {
            field.name: getattr(state, field.name)
            for field in fields(state)
            if field.name != "rules"
        }
        self._call = _extension.compiled().LaneTransition(
            addresses={name: tensor.data_ptr() for name, tensor in tensors.items()},
            num_lanes=state.num_lanes,
            max_length=state.tokens.shape[2],
            num_items=state.num_items,
            num_eos=state.eos.numel(),
            **state.rules._asdict(),
        )

    def __call__(self, drawn: TokenSamples | None) -> None:
        columns: list[Tensor] = []
        if drawn is not None:
            assert drawn.entropy is not None
            scores = (drawn.log_prob, drawn.log_z, drawn.entropy)
            columns = [drawn.token, *(score.double().contiguous() for score in scores)]
        addresses = [column.data_ptr() for column in columns] or [0] * 4
        self._call(*addresses, _extension.num_threads())
