"""sequence_log_likelihood of padded completions, beside the same sum in torch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.harness.cases import Call, Case, Kernel, Outputs, Size, Variant
from powerkernels import sequence_log_likelihood

ALPHA = 4.0
BYTES_PER_TOKEN = 4 + 1  # float32, and a byte of the mask


class Inputs(NamedTuple):
    log_prob: Tensor  # float32 [B, T]
    mask: Tensor  # bool


def make(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    rows, length = case.shape["sequences"], case.shape["length"]
    place: Any = {"generator": generator, "device": device}
    log_prob = -torch.rand(rows, length, **place)
    lengths = torch.randint(1, length + 1, (rows, 1), **place)
    return Inputs(log_prob, torch.arange(length, device=device) < lengths)


def cases(size: Size) -> list[Case]:
    sizes = {
        "device": [(2048, 4096), (256, 4096)],
        "host": [(2048, 4096), (256, 4096)],
        "quick": [(64, 512)],
    }
    return [
        Case(
            f"{rows} sequences of {length}",
            {"sequences": rows, "length": length},
            bytes=BYTES_PER_TOKEN * rows * length,
            memory=BYTES_PER_TOKEN * rows * length,
            sweep=("sequences",),
            main=number == 0,
        )
        for number, (rows, length) in enumerate(sizes[size])
    ]


def ours(x: Inputs) -> Call:
    def call() -> Outputs:
        return {"sum": sequence_log_likelihood(x.log_prob, alpha=ALPHA, mask=x.mask)}

    return call


def in_torch(x: Inputs) -> Call:
    def call() -> Outputs:
        total = torch.where(x.mask, x.log_prob, 0.0).sum(-1, dtype=torch.float64)
        return {"sum": (ALPHA * total).float()}

    return call


def exact(x: Inputs, found: Outputs) -> Outputs:
    return {"sum": ALPHA * torch.where(x.mask, x.log_prob.double(), 0.0).sum(-1)}


SEQUENCE_LOG_LIKELIHOOD = Kernel(
    name="sequence_log_likelihood",
    part="logprob",
    summary="α times the log-probability of each completion; one read of the tokens is the floor",
    cases=cases,
    inputs=make,
    few=lambda x: x,
    expected=exact,
    ceiling="read",
    variants=[
        Variant("powerkernels", ours, ours=True),
        Variant(
            "torch eager",
            in_torch,
            peer="eager",
            extra_memory=lambda case: 12 * case.shape["sequences"] * case.shape["length"],
        ),
    ],
)

KERNELS = [SEQUENCE_LOG_LIKELIHOOD]
