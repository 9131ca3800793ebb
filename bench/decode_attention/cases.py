"""Attention of one new token a lane over a static cache, beside SDPA and flashinfer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.harness.cases import (
    LLAMA_8B,
    QWEN_7B,
    SMOLLM2,
    Call,
    Case,
    Kernel,
    Outputs,
    Size,
    Variant,
)
from powerkernels.decode_attention import reference
from powerkernels.decode_attention.functional import launch

CHECKED_LANES = 4
SHORTEST_SHARE = 8  # a lane's shortest length is this part of the longest
PAGE = 16  # positions of a page of flashinfer's cache
WORKSPACE_BYTES = 2**27  # as its documentation has it


class Inputs(NamedTuple):
    query: Tensor  # [C, Hq, D]
    key: Tensor  # [C, H, S, D], positions before heads in memory
    value: Tensor
    lengths: Tensor  # int64 [C]

    @property
    def scale(self) -> float:
        return self.query.shape[-1] ** -0.5


def lengths_of(lanes: int, positions: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(
        max(1, positions // SHORTEST_SHARE), positions + 1, (lanes,), generator=generator
    )


def make(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    lanes, positions = case.shape["lanes"], case.shape["positions"]
    heads, kv_heads, size = (case.shape[name] for name in ("heads", "kv_heads", "head_size"))

    def draw(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=case.dtype, device=device).normal_(generator=generator)

    key, value = (draw(lanes, positions, kv_heads, size).transpose(1, 2) for _ in range(2))
    return Inputs(draw(lanes, heads, size), key, value, lengths_of(lanes, positions).to(device))


def cases(size: Size) -> list[Case]:
    bfloat16, float32 = torch.bfloat16, torch.float32
    sizes = {
        "device": [
            (QWEN_7B, 64, 4096, bfloat16),
            (QWEN_7B, 16, 4096, bfloat16),
            (QWEN_7B, 256, 1024, bfloat16),
            (LLAMA_8B, 64, 4096, bfloat16),
        ],
        "host": [
            (SMOLLM2, 16, 256, bfloat16),
            (SMOLLM2, 64, 256, bfloat16),
            (SMOLLM2, 16, 256, float32),
        ],
        # The second is split over positions, and its parts merged.
        "quick": [(SMOLLM2, 4, 64, float32), (SMOLLM2, 4, 300, bfloat16)],
    }
    found = []
    for number, (model, lanes, positions, dtype) in enumerate(sizes[size]):
        attended = int(lengths_of(lanes, positions).sum())
        row = 2 * model.kv_heads * model.head_size * dtype.itemsize
        found.append(
            Case(
                f"{model.name}, {lanes} lanes, {positions} positions",
                {
                    "lanes": lanes,
                    "positions": positions,
                    "heads": model.heads,
                    "kv_heads": model.kv_heads,
                    "head_size": model.head_size,
                },
                dtype,
                bytes=attended * row,
                flops=4 * attended * model.heads * model.head_size,
                memory=lanes * positions * row,
                sweep=("lanes",) if dtype == bfloat16 and positions == sizes[size][0][2] else (),
                main=number == 0,
            )
        )
    return found


def ours(x: Inputs) -> Call:
    return lambda: {"output": launch(x.query, x.key, x.value, x.lengths, scale=x.scale)}


def sdpa(x: Inputs) -> Call:
    mask = reference.attended(x.lengths, x.key.shape[2], None)[:, None, None]

    def call() -> Outputs:
        output = scaled_dot_product_attention(
            x.query[:, :, None], x.key, x.value, attn_mask=mask, scale=x.scale, enable_gqa=True
        )
        return {"output": output[:, :, 0]}

    return call


def flashinfer_decode(x: Inputs) -> Call:
    """Its plan is made once: the lengths are those of every call."""
    import flashinfer

    lanes, kv_heads, positions, size = x.key.shape
    pages = positions // PAGE
    used = -(-x.lengths // PAGE)
    indices = torch.cat(
        [lane * pages + torch.arange(int(n)) for lane, n in enumerate(used.tolist())]
    )
    indptr = torch.nn.functional.pad(used.cumsum(0), (1, 0))
    device = x.query.device
    cache = torch.stack((x.key, x.value), dim=1)  # [C, 2, H, S, D]
    cache = cache.view(lanes, 2, kv_heads, pages, PAGE, size).permute(0, 3, 1, 4, 2, 5)
    cache = cache.reshape(lanes * pages, 2, PAGE, kv_heads, size).contiguous()
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
    wrapper.plan(
        indptr.int().to(device),
        indices.int().to(device),
        ((x.lengths - 1) % PAGE + 1).int(),
        x.query.shape[1],
        kv_heads,
        size,
        PAGE,
        q_data_type=x.query.dtype,
        kv_data_type=x.key.dtype,
        sm_scale=x.scale,
    )
    return lambda: {"output": wrapper.run(x.query, cache)}


def few(x: Inputs) -> Inputs:
    return Inputs(*(tensor[:CHECKED_LANES] for tensor in x))


def exact(x: Inputs, found: Outputs) -> Outputs:
    wide = (tensor.double() for tensor in x[:3])
    return {"output": reference.decode_attention(*wide, x.lengths, scale=x.scale)}


DECODE_ATTENTION = Kernel(
    name="decode_attention",
    part="decode_attention",
    summary="attention of a lane step; one read of the keys and values attended to is the floor",
    cases=cases,
    inputs=make,
    few=few,
    picked=lambda outputs: {name: value[:CHECKED_LANES] for name, value in outputs.items()},
    expected=exact,
    yardstick=lambda x, found: sdpa(x)(),
    ceiling="read",
    variants=[
        Variant("powerkernels", ours, ours=True),
        Variant("torch SDPA", sdpa, peer="eager", extra_memory=lambda case: case.memory),
        Variant(
            "flashinfer",
            flashinfer_decode,
            peer="flashinfer",
            extra_memory=lambda case: 2 * case.memory + WORKSPACE_BYTES,
        ),
    ],
)

KERNELS = [DECODE_ATTENTION]
