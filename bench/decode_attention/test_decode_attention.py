"""Attention of a lane step on the CPU at SmolLM2's shape, beside SDPA over the static cache."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from powerkernels.decode_attention import reference
from powerkernels.decode_attention.functional import launch

LANES, HEADS, KV_HEADS, HEAD_SIZE, POSITIONS = 16, 9, 3, 64, 256
SCALE = HEAD_SIZE**-0.5


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def inputs(request: pytest.FixtureRequest) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(request.param)

    lengths = torch.randint(40, 200, (LANES,), generator=generator)
    cache = (LANES, POSITIONS, KV_HEADS, HEAD_SIZE)
    return (
        draw(LANES, HEADS, HEAD_SIZE),
        draw(*cache).transpose(1, 2),
        draw(*cache).transpose(1, 2),
        lengths,
    )


def ours(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor) -> Tensor:
    return launch(query, key, value, lengths, scale=SCALE)


def sdpa(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor) -> Tensor:
    mask = reference.attended(lengths, POSITIONS, None)[:, None, None]
    output = scaled_dot_product_attention(
        query[:, :, None], key, value, attn_mask=mask, scale=SCALE, enable_gqa=True
    )
    return output[:, :, 0]


@pytest.mark.parametrize("variant", [ours, sdpa], ids=lambda variant: variant.__name__)
def test_decode_attention(
    benchmark: Callable, inputs: tuple[Tensor, ...], variant: Callable
) -> None:
    query, key, value, lengths = inputs
    truth = reference.decode_attention(
        query.double(), key.double(), value.double(), lengths, scale=SCALE
    )
    eps = torch.finfo(query.dtype).eps
    assert (variant(*inputs).double() - truth).abs().max() <= 8 * eps
    benchmark.group = f"{LANES} lanes {query.dtype}"
    benchmark.pedantic(variant, args=inputs, rounds=200, warmup_rounds=20)
