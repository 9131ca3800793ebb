"""The losses by the C++ part: CPU tensors in, addresses on."""

from __future__ import annotations

import torch

from powerkernels import _extension
from powerkernels.covariance.cpp import floats, rows, threads
from powerkernels.policy_loss.objective import NUM_SUMS, LossSums, Objective, TokenInputs


def loss_sums(inputs: TokenInputs, objective: Objective) -> LossSums:
    count = inputs.num_sequences
    found = LossSums(
        torch.empty(count, dtype=torch.float64),
        torch.empty(count, dtype=torch.float64),
        torch.empty(NUM_SUMS, dtype=torch.float64),
        torch.empty(inputs.log_prob.shape, dtype=torch.float32),
    )
    advantages = None if inputs.advantages is None else inputs.advantages.contiguous()
    _extension.compiled().policy_loss_sums(
        rows=rows(inputs.log_prob, count, inputs.cu_seqlens),
        log_prob=floats(inputs.log_prob),
        old_log_prob=floats(inputs.old_log_prob),
        advantages=floats(advantages),
        weights=floats(inputs.weights),
        mask=inputs.mask.data_ptr(),
        selected=_extension.address(inputs.selected),
        moments=_extension.address(inputs.moments),
        kind=objective.kind,
        clip=objective.clip,
        low=objective.low,
        high=objective.high,
        dual_clip=objective.dual_clip,
        on_selected=objective.selected,
        penalty=objective.penalty,
        straight_through=objective.straight_through,
        row_loss=found.row_loss.data_ptr(),
        row_count=found.row_count.data_ptr(),
        sums=found.sums.data_ptr(),
        terms=found.terms.data_ptr(),
        num_threads=threads(),
    )
    return found
