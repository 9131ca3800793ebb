"""Attention of a lane step, beside SDPA over the static cache.

On a CPU at SmolLM2's shape, on a GPU at Qwen2.5-1.5B's with full lanes. extra_info: bytes of the
keys and values that are attended to, and GB/s of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from powerkernels.decode_attention import reference
from powerkernels.decode_attention.functional import launch


class Shape(NamedTuple):
    lanes: int
    heads: int
    kv_heads: int
    head_size: int
    positions: int
    shortest: int
    longest: int


SHAPES = {"cpu": Shape(16, 9, 3, 64, 256, 40, 200), "cuda": Shape(64, 12, 2, 128, 4096, 500, 4000)}
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


class Inputs:
    def __init__(self, device: str, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.shape = shape = SHAPES[device]

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(device, dtype)

        cache = (shape.lanes, shape.positions, shape.kv_heads, shape.head_size)
        self.query = draw(shape.lanes, shape.heads, shape.head_size)
        self.key, self.value = (draw(*cache).transpose(1, 2) for _ in range(2))
        lengths = torch.randint(shape.shortest, shape.longest, (shape.lanes,), generator=generator)
        self.bytes = int(lengths.sum()) * 2 * shape.kv_heads * shape.head_size * dtype.itemsize
        self.lengths = lengths.to(device)
        self.scale = shape.head_size**-0.5


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def inputs(request: pytest.FixtureRequest, device: str) -> Inputs:
    return Inputs(device, request.param)


def ours(x: Inputs) -> Tensor:
    return launch(x.query, x.key, x.value, x.lengths, scale=x.scale)


def sdpa(x: Inputs) -> Tensor:
    mask = reference.attended(x.lengths, x.shape.positions, None)[:, None, None]
    output = scaled_dot_product_attention(
        x.query[:, :, None], x.key, x.value, attn_mask=mask, scale=x.scale, enable_gqa=True
    )
    return output[:, :, 0]


@pytest.mark.parametrize("variant", [ours, sdpa], ids=lambda variant: variant.__name__)
def test_decode_attention(
    benchmark: Callable, device: str, inputs: Inputs, variant: Callable
) -> None:
    truth = reference.decode_attention(
        inputs.query[:8].double(),
        inputs.key[:8].double(),
        inputs.value[:8].double(),
        inputs.lengths[:8],
        scale=inputs.scale,
    )
    eps = torch.finfo(inputs.query.dtype).eps
    assert (variant(inputs)[:8].double() - truth).abs().max() <= 8 * eps

    def run() -> None:
        variant(inputs)
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{inputs.shape.lanes} lanes {inputs.query.dtype} on {device}"
    benchmark.pedantic(run, rounds=200, warmup_rounds=20)
    benchmark.extra_info["bytes"] = inputs.bytes
    benchmark.extra_info["GB/s"] = inputs.bytes / benchmark.stats.stats.median / 1e9
