"""Launches the Triton kernel of the losses."""

from __future__ import annotations

import torch
import triton

from powerkernels._triton import EXACT, device_of
from powerkernels.covariance.gpu import advantages_at
from powerkernels.policy_loss import kernels
from powerkernels.policy_loss import objective as objectives
from powerkernels.policy_loss.objective import LossSums, Objective, TokenInputs

# Tokens that a program takes at a time: 4 a thread, 16 bytes of float32.
BLOCK, WARPS = 512, 4
# Programs that fill a large GPU (132 multiprocessors); long sequences are split up to as many.
PROGRAMS = 1024
# A dual clip that never holds, and whose product with 0 is 0.
NO_DUAL_CLIP = 1e30


def loss_sums(inputs: TokenInputs, objective: Objective) -> LossSums:
    rows, size = inputs.num_sequences, inputs.log_prob.numel()
    device = inputs.log_prob.device
    splits = max(1, min(triton.cdiv(PROGRAMS, max(rows, 1)), triton.cdiv(size, BLOCK)))
    shape = (rows, splits, kernels.NUM_COLUMNS.value)
    partials = torch.zeros(shape, dtype=torch.float64, device=device)
    terms = torch.empty(inputs.log_prob.shape, dtype=torch.float32, device=device)
    advantages, per_sequence = inputs.advantages, False
    if advantages is not None:
        advantages, per_sequence = advantages_at(advantages, inputs.cu_seqlens)
    selected = None if inputs.selected is None else inputs.selected.view(torch.int8)
    if size:
        with device_of(terms):
            kernels.loss_kernel[(rows * splits,)](
                inputs.log_prob,
                inputs.old_log_prob,
                advantages,
                inputs.mask.view(torch.int8),
                selected,
                inputs.weights,
                inputs.moments,
                inputs.cu_seqlens,
                1 if inputs.cu_seqlens is not None else inputs.log_prob.shape[1],
                splits,
                objective.low,
                objective.high,
                min(objective.dual_clip, NO_DUAL_CLIP),
                objective.penalty,
                partials,
                terms,
                KIND=objective.kind,
                CLIP=objective.clip,
                SELECTED=objective.selected,
                STRAIGHT_THROUGH=objective.straight_through,
                PER_SEQUENCE=per_sequence,
                BLOCK=BLOCK,
                num_warps=WARPS,
                **EXACT,
            )
    by_row = partials.sum(1)
    sums = by_row.sum(0)
    return LossSums(
        by_row[:, kernels.LOSS.value].clone(),
        by_row[:, objectives.COUNT].clone(),
        sums[: objectives.NUM_SUMS].clone(),
        terms,
    )
