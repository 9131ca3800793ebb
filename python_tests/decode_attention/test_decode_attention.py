"""decode_attention against float64, its independence of what it must not depend on, bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from powerkernels.decode_attention import decode_attention, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    lanes: int = 5,
    kv_heads: int = 2,
    group: int = 3,
    positions: int = 200,
    head_size: int = 64,
    value_size: int = 64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    query = draw(lanes, kv_heads * group, head_size)
    key = draw(lanes, positions, kv_heads, head_size).transpose(1, 2)  # as the cache has it
    value = draw(lanes, positions, kv_heads, value_size).transpose(1, 2)
    lengths = torch.tensor([1, 63, 64, 65, positions])[:lanes]
    return query, key, value, lengths


OPTIONS = [{}, {"window": 1}, {"window": 70}, {"softcap": 2.0}, {"sinks": torch.linspace(-2, 2, 6)}]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
# 64: whole vectors; 40 and 72: a rest; different sizes for keys and values
@pytest.mark.parametrize(("head_size", "value_size"), [(64, 64), (40, 72), (1, 3)])
def test_against_float64(
    backend: str,
    dtype: torch.dtype,
    options: dict,
    head_size: int,
    value_size: int,
    generator: torch.Generator,
) -> None:
    tensors = inputs(dtype, generator, head_size=head_size, value_size=value_size)
    output = decode_attention(*tensors, scale=0.2, **options)
    assert output.dtype == dtype
    query, key, value, lengths = tensors
    truth = reference.decode_attention(
        query.double(), key.double(), value.double(), lengths, scale=0.2, **options
    )
    # The result is rounded, and for the reference the weights too. Both are computed in float32,
    # where a score's error is that of its largest products' sum, and shifts a weight by as much.
    keys = key.double().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    products = 0.2 * torch.einsum("lhd,lhpd->lhp", query.double().abs(), keys.abs())
    rounding = torch.finfo(dtype).eps + (2 + products.max()) * torch.finfo(torch.float32).eps
    assert (output.double() - truth).abs().max() <= rounding * value.abs().max()


def test_float64(backend: str, generator: torch.Generator) -> None:
    query, key, value, lengths = inputs(torch.float64, generator)
    output = decode_attention(query, key, value, lengths, scale=0.125)
    for lane, length in enumerate(lengths.tolist()):
        for head in range(6):
            scores = key[lane, head // 3, :length] @ query[lane, head] * 0.125
            expected = scores.softmax(0) @ value[lane, head // 3, :length]
            torch.testing.assert_close(output[lane, head], expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_depends_on_its_own_prefix_only(
    backend: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    query, key, value, lengths = inputs(dtype, generator)
    before = decode_attention(query, key, value, lengths, scale=0.125)
    # Other lanes, and what the cache holds behind a lane's prefix, are overwritten.
    kept = 3
    key2, value2 = torch.randn(key.shape).to(dtype), torch.randn(value.shape).to(dtype)
    length = int(lengths[kept])
    key2[kept, :, :length], value2[kept, :, :length] = (
        key[kept, :, :length],
        value[kept, :, :length],
    )
    query2 = torch.randn(query.shape).to(dtype)
    query2[kept] = query[kept]
    after = decode_attention(query2, key2, value2, lengths, scale=0.125)
    assert torch.equal(before[kept], after[kept])
    assert not torch.equal(before, after)


def test_same_bits_in_any_lane_and_with_any_threads(
    compiled_backend: None, restore_threads: None, generator: torch.Generator
) -> None:
    query, key, value, lengths = inputs(torch.bfloat16, generator)
    torch.set_num_threads(1)
    one = decode_attention(query, key, value, lengths, scale=0.125)
    torch.set_num_threads(2)
    two = decode_attention(query, key, value, lengths, scale=0.125)
    assert torch.equal(one, two)
    order = torch.tensor([3, 0, 4, 2, 1])
    moved = decode_attention(query[order], key[order], value[order], lengths[order], scale=0.125)
    assert torch.equal(moved, one[order])


def test_no_lanes() -> None:
    empty = torch.empty(0, 2, 8), torch.empty(0, 1, 4, 8), torch.empty(0, 1, 4, 8)
    output = decode_attention(*empty, torch.empty(0, dtype=torch.int64), scale=1.0)
    assert output.shape == (0, 2, 8)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
def test_opcheck(options: dict, generator: torch.Generator) -> None:
    values = (options.get("window"), options.get("softcap"), options.get("sinks"))
    arguments = (*inputs(torch.float32, generator), 0.125, *values)
    torch.library.opcheck(torch.ops.powerkernels.decode_attention.default, arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lengths": torch.tensor([1, 2, 3, 4, 0])}, ValueError, "lengths must be 1 to S = 200"),
        ({"lengths": torch.tensor([1, 2, 3, 4, 201])}, ValueError, "lengths must be 1 to S = 200"),
        ({"lengths": torch.tensor([1, 2])}, ValueError, "lengths must be \\[C\\]"),
        ({"lengths": torch.ones(5)}, TypeError, "lengths must be int64"),
        ({"window": 0}, ValueError, "window must be >= 1"),
        ({"sinks": torch.zeros(5)}, ValueError, "sinks must be \\[Hq\\]"),
        ({"query": torch.zeros(5, 5, 64)}, ValueError, "query must be"),
        ({"query": torch.zeros(5, 6, 32)}, ValueError, "query must be"),
        ({"query": torch.zeros(5, 6, 64, dtype=torch.int32)}, TypeError, "query must be"),
        ({"key": torch.zeros(5, 2, 200, 64).half()}, TypeError, "key must be float32"),
        ({"value": torch.zeros(5, 2, 100, 64)}, ValueError, "value must have key's"),
        ({"key": torch.zeros(5, 2, 200, 64, device="meta")}, ValueError, "key must be on cpu"),
        ({"value": torch.zeros(5, 2, 200, 64, device="meta")}, ValueError, "value must be on cpu"),
        ({"lengths": torch.ones(5, device="meta").long()}, ValueError, "lengths must be on cpu"),
        ({"sinks": torch.zeros(6, device="meta")}, ValueError, "sinks must be on cpu"),
    ],
)
def test_bad_input(
    change: dict, error: type[Exception], message: str, generator: torch.Generator
) -> None:
    names = ("query", "key", "value", "lengths")
    arguments = dict(zip(names, inputs(torch.float32, generator), strict=True)) | change
    with pytest.raises(error, match=message):
        decode_attention(**arguments, scale=0.125)
