"""Launches the fused kernel of `linear_score_tokens`: tiles by architecture, descriptors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from powerkernels.linear_logprob import kernels
from powerkernels.logprob import gpu
from powerkernels.logprob.gpu import EXACT, Partials, device_of, temperature_of, twice_alpha
from powerkernels.logprob.options import ScoreOptions

DTYPES = (torch.bfloat16, torch.float16)
# Bytes to a multiple of which TMA wants addresses and strides.
TMA_BYTES = 16
# Triton takes note that a size is a multiple of this, and of nothing less.
ELEMENTS = 16


class Tiles(NamedTuple):
    """Of one architecture; all without spills, which the ahead-of-time test sees to."""

    block_n: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    descriptors: bool
    group_n: int = 8


# 255 registers hold a 256x128 tile of accumulators on sm_90, not a 128x256 one; on sm_100 they are
# in tensor memory, and the wide tile is the one whose bias does not spill. Before sm_90 descriptors
# become narrow loads: pointers there, and a tile that 164 KB of shared memory hold.
TILES = {9: Tiles(256, 128, 64, 8, 4, True), 10: Tiles(128, 256, 64, 8, 4, True)}
OTHER_TILES = Tiles(128, 128, 64, 8, 3, False)
# Of what TMA does not take and 16-byte loads do not either: all through registers, which the tiles
# above would spill.
UNALIGNED_TILES = Tiles(128, 128, 32, 8, 3, False)


def supports(hidden: Tensor, weight: Tensor, options: ScoreOptions) -> bool:
    """float32 is left to the matmul library: without tensor cores there is nothing to fuse for."""
    return hidden.dtype in DTYPES and gpu.serves(hidden, options) and hidden.shape[0] > 0


def row_sums(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    options: ScoreOptions,
) -> Tensor:
    """float32 [5, N] of hidden [N, D] and a shard weight [V, D], as `logprob.gpu.row_sums`."""
    hidden, weight = hidden.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    num_rows, dim = hidden.shape
    vocab = weight.shape[0]
    tiles = tiles_for(hidden.device)
    if not _are_aligned(hidden, weight, 1 if tiles.descriptors else ELEMENTS):
        tiles = UNALIGNED_TILES
    descriptors = tiles.descriptors
    tiles_v = triton.cdiv(vocab, tiles.block_v)
    floats: dict[str, Any] = {"dtype": torch.float32, "device": hidden.device}
    sums = torch.empty((4, num_rows, tiles_v), **floats)
    target_logit = torch.full((num_rows, 1), -torch.inf, **floats)

    def source(matrix: Tensor, block: int) -> Any:
        if not descriptors:
            return matrix
        return TensorDescriptor.from_tensor(matrix, [block, tiles.block_d])

    with device_of(hidden):
        kernels.linear_sums_kernel[(triton.cdiv(num_rows, tiles.block_n) * tiles_v,)](
            source(hidden, tiles.block_n),
            source(weight, tiles.block_v),
            hidden.stride(0),
            weight.stride(0),
            num_rows,
            vocab,
            dim,
            bias,
            targets.contiguous(),
            ignore_index,
            *temperature_of(options),
            options.alpha,
            options.softcap or 0.0,
            sums,
            sums.stride(0),
            target_logit,
            ENTROPY=options.entropy,
            TWICE_ALPHA=twice_alpha(options.alpha),
            SOFTCAP=options.softcap is not None,
            DESCRIPTORS=descriptors,
            SPLIT=descriptors and _needs_registers(vocab, options),
            BLOCK_N=tiles.block_n,
            BLOCK_V=tiles.block_v,
            BLOCK_D=tiles.block_d,
            GROUP_N=tiles.group_n,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            **EXACT,
        )
    out = torch.empty((5, num_rows), **floats)
    partials = Partials(sums, target_logit, 1)
    gpu.merge(partials, targets, ignore_index, options, out.unbind(), finish=False)
    return out


def tiles_for(device: torch.device) -> Tiles:
    if device.type != "cuda":  # interpreted
        return TILES[9]
    return TILES.get(torch.cuda.get_device_capability(device)[0], OTHER_TILES)


def _needs_registers(vocab: int, options: ScoreOptions) -> bool:
    """Whether an epilogue of the whole tile at once spills on sm_90 or sm_100."""
    return options.softcap is not None or options.alpha < 1 or vocab % ELEMENTS != 0


def _are_aligned(hidden: Tensor, weight: Tensor, elements: int) -> bool:
    """For TMA, or with rows of a multiple of `elements` for 16-byte loads through pointers."""
    return all(
        matrix.data_ptr() % TMA_BYTES == 0
        and matrix.shape[1] % elements == 0
        and matrix.stride(0) * matrix.element_size() % TMA_BYTES == 0
        for matrix in (hidden, weight)
    )
