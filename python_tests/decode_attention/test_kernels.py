"""The split-KV kernels, on a GPU or interpreted: against float64, and their bits beside others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from powerkernels.decode_attention import decode_attention, reference
from python_tests import tiers
from python_tests.decode_attention.test_decode_attention import DTYPES, OPTIONS, inputs

pytest.importorskip("triton")

from powerkernels.decode_attention import gpu, kernels

# Of rows that only fill up a program's 16: 0 times infinity.
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")

SPLIT, PARTS = kernels.SPLIT.value, kernels.PARTS.value
SCALE = 0.2


def attention(device: str, tensors: tuple[Tensor, ...], **options: Any) -> Tensor:
    if isinstance(options.get("sinks"), Tensor):
        options["sinks"] = options["sinks"].to(device)
    return decode_attention(*(tensor.to(device) for tensor in tensors), scale=SCALE, **options)


def check(device: str, tensors: tuple[Tensor, ...], **options: Any) -> None:
    """At most twice the error of the torch expression in the same dtype, and of one rounding.

    A score is rounded too, to float32, and exp makes of that a relative error of its weight: how
    often two orders of summation meet the worst of it depends on the machine's matrix product.
    """
    query, key, value, lengths = tensors
    wide = query.double(), key.double(), value.double(), lengths
    truth = reference.decode_attention(*wide, scale=SCALE, **options)
    expected = reference.decode_attention(*tensors, scale=SCALE, **options)
    output = attention(device, tensors, **options).cpu()
    assert output.dtype == query.dtype
    floor = torch.finfo(query.dtype).eps * truth.abs().max()
    floor += torch.finfo(torch.float32).eps * largest_score(wide) * value.double().abs().max()
    error, theirs = ((x.double() - truth).abs().max() for x in (output, expected))
    assert error <= 2 * theirs + floor


def largest_score(tensors: tuple[Tensor, ...]) -> Tensor:
    """Of the finite ones, without softcap and window, nats."""
    query, key, *_ = tensors
    group = query.shape[1] // key.shape[1]
    scores = SCALE * (key.repeat_interleave(group, dim=1) @ query[..., None]).abs()
    return scores[scores.isfinite()].max()


def bits(tensor: Tensor) -> Tensor:
    return tensor.cpu().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def with_lengths(tensors: tuple[Tensor, ...], *lengths: int) -> tuple[Tensor, ...]:
    return (*tensors[:3], torch.tensor(lengths))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("positions", [200, 2 * SPLIT + 1])
def test_against_float64(
    kernel_device: str,
    dtype: torch.dtype,
    options: dict,
    positions: int,
    generator: torch.Generator,
) -> None:
    tensors = inputs(dtype, generator, positions=positions)
    check(kernel_device, tensors, **options)
    near = (SPLIT - 1, SPLIT, SPLIT + 1, positions, 2)
    check(kernel_device, with_lengths(tensors, *(min(n, positions) for n in near)), **options)


# Powers of 2 and none, more columns of values than of keys, the largest; strides by which no load
# of 16 bytes is aligned.
@pytest.mark.parametrize(
    "sizes", [(80, 96), (128, 128), (40, 72), (1, 3), (37, 16), (gpu.MAX_SIZE, 17)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_head_size(
    kernel_device: str, dtype: torch.dtype, sizes: tuple[int, int], generator: torch.Generator
) -> None:
    for positions in (200, SPLIT + 4):
        tensors = inputs(
            dtype, generator, positions=positions, head_size=sizes[0], value_size=sizes[1]
        )
        check(kernel_device, tensors, window=100, sinks=torch.linspace(-2, 2, 6))


# Those that fill the rows of a program, and those that take another.
@pytest.mark.parametrize("group", [1, 16, 17, gpu.MAX_GROUP + 6])
def test_any_group(kernel_device: str, group: int, generator: torch.Generator) -> None:
    for dtype, positions in (
        (torch.bfloat16, 100),
        (torch.bfloat16, SPLIT + 4),
        (torch.float32, 100),
    ):
        tensors = inputs(dtype, generator, group=group, positions=positions, lanes=3)
        check(kernel_device, tensors, sinks=torch.linspace(-2, 2, 2 * group))


@pytest.mark.parametrize(
    "options",
    tiers.every(len(OPTIONS) - 1, OPTIONS),
    ids=lambda options: "-".join(options) or "plain",
)
def test_more_splits_than_are_merged_at_a_time(
    kernel_device: str, options: dict, generator: torch.Generator
) -> None:
    positions = (PARTS + 1) * SPLIT + 70
    tensors = inputs(torch.float32, generator, lanes=3, positions=positions, head_size=16)
    check(kernel_device, with_lengths(tensors, positions, PARTS * SPLIT, 3 * SPLIT), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["positions first", "heads first", "every other", "expanded"])
def test_any_strides(
    kernel_device: str, dtype: torch.dtype, layout: str, generator: torch.Generator
) -> None:
    query, key, value, lengths = inputs(dtype, generator, positions=SPLIT + 10)
    before = attention(kernel_device, (query, key, value, lengths))
    query, key, value = (tensor.to(kernel_device) for tensor in (query, key, value))
    if layout == "heads first":
        key, value = key.contiguous(), value.contiguous()
        assert not value.transpose(1, 2).is_contiguous()
    elif layout == "every other":
        key, value = (tensor.repeat_interleave(2, dim=2)[:, :, ::2] for tensor in (key, value))
        query = query.repeat_interleave(2, dim=0)[::2]
    elif layout == "expanded":  # one lane's cache for all
        key, value = (tensor[:1].expand_as(tensor) for tensor in (key, value))
        own = (query, key.contiguous(), value.contiguous(), lengths)
        before = attention(kernel_device, own)
    after = attention(kernel_device, (query, key, value, lengths.repeat_interleave(2)[::2]))
    assert torch.equal(bits(after), bits(before))


@tiers.examples(0.08)
@given(
    length=st.integers(1, 3 * SPLIT),
    behind=st.sampled_from([0, 1, 40, SPLIT, 2 * SPLIT]),
    neighbours=st.integers(0, 3),
    garbage=st.sampled_from([torch.nan, torch.inf, -torch.inf, 7.0]),
    options=st.sampled_from(OPTIONS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10),
)
@example(SPLIT, SPLIT, 1, torch.nan, {}, torch.bfloat16, 0)  # one split, finished and merged
@example(SPLIT // 2, SPLIT, 0, torch.inf, OPTIONS[-1], torch.float16, 0)
def test_bits_of_its_own_prefix_only(
    kernel_device: str,
    length: int,
    behind: int,
    neighbours: int,
    garbage: float,
    options: dict,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Alone in a cache that it fills, and among other lanes before garbage."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"head_size": 16, "value_size": 24}
    own = inputs(dtype, generator, lanes=1, positions=length, **sizes)
    own = with_lengths(own, length)
    alone = attention(kernel_device, own, **options)

    lanes, lane = neighbours + 1, seed % (neighbours + 1)
    query, key, value, _ = inputs(dtype, generator, lanes=lanes, positions=length + behind, **sizes)
    lengths = torch.randint(1, length + behind + 1, (lanes,), generator=generator)
    query[lane], lengths[lane] = own[0][0], length
    for cache, prefix in ((key, own[1]), (value, own[2])):
        cache[lane, :, :length], cache[lane, :, length:] = prefix[0], garbage
    among = attention(kernel_device, (query, key, value, lengths), **options)
    assert torch.equal(bits(among[lane]), bits(alone[0]))


def test_garbage_before_the_window(kernel_device: str, generator: torch.Generator) -> None:
    positions = 2 * SPLIT
    query, key, value, lengths = inputs(torch.bfloat16, generator, positions=positions)
    lengths = torch.tensor([positions, SPLIT + 100, SPLIT + 64, 100, 64])
    before = attention(kernel_device, (query, key, value, lengths), window=64)
    assert before.isfinite().all()
    for lane, length in enumerate(lengths.tolist()):
        key[lane, :, : length - 64] = value[lane, :, : length - 64] = torch.nan
    after = attention(kernel_device, (query, key, value, lengths), window=64)
    assert torch.equal(bits(after), bits(before))


@pytest.mark.parametrize("positions", [200, 3 * SPLIT])
def test_bad_values_stay_in_their_head(
    kernel_device: str, positions: int, generator: torch.Generator
) -> None:
    tensors = inputs(torch.float32, generator, positions=positions)
    clean = attention(kernel_device, tensors)
    tensors[1][4, 1, 70] = torch.nan
    output = attention(kernel_device, tensors).cpu()
    assert output[4, 3:].isnan().all()
    output[4, 3:] = clean[4, 3:].cpu()
    assert torch.equal(bits(output), bits(clean))


@pytest.mark.parametrize("positions", [200, 3 * SPLIT])
def test_scores_of_minus_infinity(
    kernel_device: str, positions: int, generator: torch.Generator
) -> None:
    """A chunk, or a split, without any weight takes no part."""
    query, key, value, lengths = inputs(torch.float32, generator, lanes=2, positions=positions)
    query, lengths = query.abs(), torch.tensor([positions, positions])
    barred = positions - 50
    key[0, :, :barred] = -torch.inf
    check(kernel_device, (query[:1], key[:1], value[:1], lengths[:1]))
    output = attention(kernel_device, (query, key, value, lengths)).cpu()
    assert output.isfinite().all()


def test_a_softcap_and_a_sink_and_a_window(kernel_device: str, generator: torch.Generator) -> None:
    options = {"softcap": 1.5, "window": 300, "sinks": torch.linspace(-3, 3, 6).bfloat16()}
    check(kernel_device, inputs(torch.bfloat16, generator, positions=600), **options)


def test_what_is_left_to_the_reference(kernel_device: str, generator: torch.Generator) -> None:
    double = inputs(torch.float64, generator)
    wide = inputs(torch.float32, generator, head_size=gpu.MAX_SIZE + 1)
    for tensors in (double, wide):
        assert not gpu.serves(tensors[0], tensors[2])
        check(kernel_device, tensors)
    assert gpu.serves(*inputs(torch.float16, generator)[:2])


def test_no_lanes(kernel_device: str) -> None:
    empty = torch.empty(0, 2, 8), torch.empty(0, 1, 4, 8), torch.empty(0, 1, 4, 8)
    output = attention(kernel_device, (*empty, torch.empty(0, dtype=torch.int64)))
    assert output.shape == (0, 2, 8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("positions", [200, 10 * SPLIT])
def test_replay_with_other_lengths(positions: int, generator: torch.Generator) -> None:
    """Lengths are read on the device, at the time of the replay."""
    tensors = inputs(torch.bfloat16, generator, positions=positions, head_size=128, value_size=128)
    query, key, value, lengths = (tensor.cuda() for tensor in tensors)
    decode_attention(query, key, value, lengths, scale=SCALE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = decode_attention(query, key, value, lengths, scale=SCALE)
    for other in ([positions, 1, 100, 64, 3], [2, positions, positions - 1, 65, 190]):
        lengths.copy_(torch.tensor(other))
        graph.replay()
        expected = decode_attention(query, key, value, lengths, scale=SCALE)
        assert torch.equal(bits(output), bits(expected))
        assert torch.equal(
            output.isfinite().all(dim=-1), torch.ones_like(output[..., 0], dtype=torch.bool)
        )
    check("cuda", with_lengths(tensors, *other))
