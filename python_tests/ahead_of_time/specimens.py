"""The kernels of this package as they are launched where speed matters.

Imports no kernel: whether Triton interprets is decided when a kernel's module is first imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from python_tests.ahead_of_time.gate import Expectation, Specimen

LOGPROB = "powerkernels.logprob.kernels:"
EXACT = {"enable_fp_fusion": False}
# 2 * alpha of the powers computed by products; GENERAL is the others' mark.
ALPHA_4, ALPHA_2_5, GENERAL = 8, 5, -1

LOGIT_ROWS = {
    "logits_ptr": "*bf16",
    "inner": "i32",
    "outer_stride": "i64",
    "inner_stride": "i64",
    "vocab": "i32",
    "targets_ptr": "*i64",
    "ignore_index": "i32",
    "scale": "fp32",
    "alpha": "fp32",
    "softcap": "fp32",
}

ROW_SUMS = Specimen(
    name="row_sums bf16 α=4 entropy",
    kernel=LOGPROB + "row_sums_kernel",
    signature={
        **LOGIT_ROWS,
        "partials_ptr": "*fp32",
        "stride_plane": "i32",
        "stride_row": "i32",
        "num_parts": "i32",
        "target_logit_ptr": "*fp32",
    },
    constexprs={
        "temperatures_ptr": None,
        "ENTROPY": True,
        "TWICE_ALPHA": ALPHA_4,
        "SOFTCAP": False,
        "SLICES": 8,
        "WORDS": True,
    },
    aligned=("logits_ptr", "outer_stride", "inner_stride", "vocab", "targets_ptr", "partials_ptr"),
    num_warps=1,
    options=EXACT,
    element_bytes=2,
    # The exponentials beyond one an element merge the slices: 2 in 32 elements of a thread. 13.8 is
    # what 128 lanes of issue leave an element at 4.3 TB/s; 64 registers let 32 warps be resident.
    expected=Expectation(
        vector_loads=True,
        max_registers=64,
        min_resident_warps=32,
        exps_per_element=(1.0, 1.07),
        max_instructions_per_element=12.8,
    ),
)


def row_sums(name: str, expected: Expectation, dtype: str = "bf16", **constexprs: Any) -> Specimen:
    return replace(
        ROW_SUMS,
        name=f"row_sums {name}",
        signature={**ROW_SUMS.signature, "logits_ptr": f"*{dtype}"},
        constexprs={**ROW_SUMS.constexprs, "WORDS": dtype == "bf16", **constexprs},
        element_bytes=4 if dtype == "fp32" else 2,
        expected=expected,
    )


# A merge needs a second exponential for a power that is no product of the first.
ONE_EXP = Expectation(
    vector_loads=True, exps_per_element=(1.0, 1.13), max_instructions_per_element=13.8
)
# Three quarters of the second exponentials, and two of each in the merge.
SECOND_EXP = Expectation(
    vector_loads=True, exps_per_element=(1.75, 1.9), max_instructions_per_element=16.5
)

SCORE_BWD = Specimen(
    name="score_bwd bf16 α=4 all three",
    kernel=LOGPROB + "score_bwd_kernel",
    signature={
        **LOGIT_ROWS,
        "row_max_ptr": "*fp32",
        "log_sum_ptr": "*fp32",
        "log_prob_ptr": "*fp32",
        "log_z_ptr": "*fp32",
        "entropy_ptr": "*fp32",
        "grad_log_prob_ptr": "*fp32",
        "grad_log_z_ptr": "*fp32",
        "grad_entropy_ptr": "*fp32",
        "dlogits_ptr": "*bf16",
        "dlogits_inner": "i32",
        "dlogits_outer_stride": "i64",
        "dlogits_inner_stride": "i64",
        "num_blocks": "i32",
    },
    constexprs={
        "temperatures_ptr": None,
        "TWICE_ALPHA": ALPHA_4,
        "SOFTCAP": False,
        "BLOCK_V": 4096,
    },
    aligned=(
        "logits_ptr",
        "outer_stride",
        "inner_stride",
        "vocab",
        "dlogits_ptr",
        "dlogits_outer_stride",
        "dlogits_inner_stride",
    ),
    num_warps=4,
    options=EXACT,
    elements=4096,
    # The narrow loads are the row's own nine scalars; 27 is what 128 lanes of issue leave an
    # element that is read and written at 4.3 TB/s.
    expected=Expectation(
        vector_loads=True,
        scalar_loads=9,
        vector_stores=True,
        min_resident_warps=28,
        exps_per_element=(1.0, 1.07),
        max_instructions_per_element=27,
    ),
)


def score_bwd(
    name: str,
    *,
    dtype: str = "bf16",
    expected: Mapping[str, Any] | None = None,
    without: tuple[str, ...] = (),
    **constexprs: Any,
) -> Specimen:
    signature = {**SCORE_BWD.signature, "logits_ptr": f"*{dtype}", "dlogits_ptr": f"*{dtype}"}
    return replace(
        SCORE_BWD,
        name=f"score_bwd {name}",
        signature={key: value for key, value in signature.items() if key not in without},
        constexprs={**SCORE_BWD.constexprs, **constexprs, **dict.fromkeys(without)},
        expected=replace(SCORE_BWD.expected, **(expected or {})),
    )


MERGE = Specimen(
    name="merge groups α=4",
    kernel=LOGPROB + "merge_kernel",
    signature={
        "partials_ptr": "*fp32",
        "stride_plane": "i32",
        "stride_row": "i32",
        "num_parts": "i32",
        "target_logit_ptr": "*fp32",
        "targets_ptr": "*i64",
        "ignore_index": "i32",
        "scale": "fp32",
        "alpha": "fp32",
        **{f"out{k}_ptr": "*fp32" for k in range(5)},
    },
    constexprs={
        "stride_part": 1,
        "target_stride_row": 1,
        "target_stride_part": 1,
        "num_target_parts": 1,
        "temperatures_ptr": None,
        "ENTROPY": True,
        "TWICE_ALPHA": ALPHA_4,
        "PARTS": 1,
        "BLOCK": 32,
        "FINISH": True,
    },
    num_warps=1,
    options=EXACT,
    expected=Expectation(max_registers=64),
)

DRAW = Specimen(
    name="draw bf16 α=4",
    kernel=LOGPROB + "draw_kernel",
    signature={
        "logits_ptr": "*bf16",
        "stride_logits": "i64",
        "vocab": "i32",
        "seed_ptr": "*i64",
        "counters_ptr": "*i64",
        "banned_ptr": "*i64",
        "alpha": "fp32",
        "partials_ptr": "*fp32",
        "stride_plane": "i32",
        "stride_row": "i32",
        "token_ptr": "*i64",
        "log_prob_ptr": "*fp32",
        "log_z_ptr": "*fp32",
        "entropy_ptr": "*fp32",
    },
    constexprs={
        "threshold_ptr": None,
        "ENTROPY": True,
        "TWICE_ALPHA": ALPHA_4,
        "GROUPS": 32,
        "SLICES": 256,
    },
    aligned=("logits_ptr", "stride_logits", "vocab", "partials_ptr"),
    num_warps=4,
    options=EXACT,
    expected=Expectation(max_registers=128, max_shared=48 * 1024),
)

THRESHOLD = Specimen(
    name="threshold bf16 top_k top_p α=4",
    kernel=LOGPROB + "threshold_kernel",
    signature={
        "logits_ptr": "*bf16",
        "stride_logits": "i64",
        "vocab": "i32",
        "alpha": "fp32",
        "top_k": "i32",
        "top_p": "fp32",
        "top_p_drop": "fp32",
        "min_p_drop": "fp32",
        "partials_ptr": "*fp32",
        "stride_row": "i32",
        "num_slices": "i32",
        "threshold_ptr": "*fp32",
    },
    constexprs={
        "TOP_K": True,
        "TOP_P": True,
        "TWICE_ALPHA": ALPHA_4,
        "SHIFT": 16,
        "SLICES": 256,
        "BLOCK": 8192,
    },
    aligned=("logits_ptr", "stride_logits", "vocab", "partials_ptr"),
    num_warps=16,
    options=EXACT,
    element_bytes=2,
    # 16 warps, a program a multiprocessor: the rows are fewer than those.
    expected=Expectation(
        vector_loads=True,
        max_registers=128,
        exps_per_element=1.0,
        max_instructions_per_element=9.5,
    ),
)

SUPPORT_SUMS = Specimen(
    name="support_sums bf16 α=4",
    kernel=LOGPROB + "support_sums_kernel",
    signature={
        "logits_ptr": "*bf16",
        "stride_logits": "i64",
        "vocab": "i32",
        "alpha": "fp32",
        "threshold_ptr": "*fp32",
        "partials_ptr": "*fp32",
        "stride_plane": "i32",
        "stride_row": "i32",
        "num_slices": "i32",
    },
    constexprs={"TWICE_ALPHA": ALPHA_4},
    aligned=("logits_ptr", "stride_logits", "vocab", "partials_ptr"),
    num_warps=1,
    options=EXACT,
    elements=1024,
    # The narrow loads are the threshold and the slice's maximum.
    expected=Expectation(
        vector_loads=True,
        scalar_loads=2,
        max_registers=64,
        min_resident_warps=32,
        exps_per_element=1.0,
    ),
)


def threshold(name: str, dtype: str = "bf16", exps: float = 1.0, **constexprs: Any) -> Specimen:
    shift = {"bf16": 16, "fp16": 13, "fp32": 0}[dtype]
    return replace(
        THRESHOLD,
        name=f"threshold {dtype} {name}",
        signature={**THRESHOLD.signature, "logits_ptr": f"*{dtype}"},
        constexprs={**THRESHOLD.constexprs, "SHIFT": shift, **constexprs},
        expected=replace(THRESHOLD.expected, exps_per_element=exps),
        element_bytes=4 if dtype == "fp32" else 2,
    )


# As powerkernels.linear_logprob.gpu.TILES has them.
LINEAR_TILES = {
    80: {"BLOCK_N": 128, "BLOCK_V": 128, "BLOCK_D": 64},
    90: {"BLOCK_N": 256, "BLOCK_V": 128, "BLOCK_D": 64},
    100: {"BLOCK_N": 128, "BLOCK_V": 256, "BLOCK_D": 64},
}


UNALIGNED_TILES = {"BLOCK_N": 128, "BLOCK_V": 128, "BLOCK_D": 32}


def linear_sums(
    name: str,
    arch: int,
    *,
    dtype: str = "bf16",
    bias: bool = False,
    temperatures: bool = False,
    odd_sizes: bool = False,
    unaligned: bool = False,
    exps: tuple[float, float] = (1.0, 1.05),
    **constexprs: Any,
) -> Specimen:
    """The fused matmul as it is launched on an architecture.

    odd_sizes: N and V are multiples of nothing. unaligned: nor is D, which leaves only pointers.
    """
    tiles = UNALIGNED_TILES if unaligned else LINEAR_TILES[arch]
    descriptors = arch >= 90 and not unaligned
    n, v, d = tiles["BLOCK_N"], tiles["BLOCK_V"], tiles["BLOCK_D"]
    signature = {
        "hidden": f"tensordesc<{dtype}[{n},{d}]>" if descriptors else f"*{dtype}",
        "weight": f"tensordesc<{dtype}[{v},{d}]>" if descriptors else f"*{dtype}",
        "stride_hidden": "i64",
        "stride_weight": "i64",
        "num_rows": "i32",
        "vocab": "i32",
        "dim": "i32",
        "targets_ptr": "*i64",
        "ignore_index": "i64",
        "scale": "fp32",
        "alpha": "fp32",
        "softcap": "fp32",
        "partials_ptr": "*fp32",
        "stride_plane": "i32",
        "target_logit_ptr": "*fp32",
    }
    fixed = {
        "temperatures_ptr": None,
        "ENTROPY": True,
        "TWICE_ALPHA": ALPHA_4,
        "SOFTCAP": False,
        "DESCRIPTORS": descriptors,
        "GROUP_N": 8,
        "SPLIT": False,
    }
    if bias:
        signature["bias_ptr"] = f"*{dtype}"
    else:
        fixed["bias_ptr"] = None
    if temperatures:
        signature["temperatures_ptr"] = "*fp32"
        del fixed["temperatures_ptr"]
    aligned = ["partials_ptr"]
    if not unaligned:
        aligned += ["stride_hidden", "stride_weight", "dim"]
        aligned += [] if descriptors else ["hidden", "weight"]
        aligned += [] if odd_sizes else ["num_rows", "vocab"]
    return Specimen(
        name=f"linear_sums {n}x{v}x{d} {dtype} {name}" + (f" sm_{arch}" if unaligned else ""),
        kernel="powerkernels.linear_logprob.kernels:linear_sums_kernel",
        signature=signature,
        constexprs={**fixed, **tiles, **constexprs},
        aligned=aligned,
        num_warps=8,
        num_stages=4 if descriptors else 3,
        options=EXACT,
        region="code",
        elements=n * v,
        arches=(arch,),
        expected=Expectation(
            tensor_cores=True,
            tma=descriptors,
            max_shared=227 * 1024 if descriptors else 99 * 1024,
            exps_per_element=exps,
        ),
    )


LINEAR: list[Specimen] = [
    specimen
    for arch in LINEAR_TILES
    for specimen in (
        linear_sums("α=4", arch),
        linear_sums("α=4 bias", arch, bias=True),
        linear_sums("α=7.3", arch, exps=(2.0, 2.05), TWICE_ALPHA=GENERAL),
        linear_sums("α=4", arch, dtype="fp16"),
        # Split as the launch does it, where descriptors are.
        linear_sums("α=4 odd sizes", arch, odd_sizes=True, exps=(1.0, 1.1), SPLIT=arch >= 90),
        linear_sums(
            "α=2.5 softcap bias temperatures",
            arch,
            bias=True,
            temperatures=True,
            odd_sizes=True,
            exps=(2.0, 2.5),
            SOFTCAP=True,
            TWICE_ALPHA=ALPHA_2_5,
            SPLIT=arch >= 90,
        ),
        linear_sums(
            "α=7.3 bias unaligned",
            arch,
            bias=True,
            unaligned=True,
            exps=(2.0, 2.05),
            TWICE_ALPHA=GENERAL,
        ),
    )
]

COVARIANCE = "powerkernels.covariance.kernels:"
TOKENS = {
    "log_prob_ptr": "*fp32",
    "advantages_ptr": "*fp32",
    "mask_ptr": "*i8",
    "width": "i32",
    "num_tokens": "i32",
}

MOMENTS = Specimen(
    name="moments",
    kernel=COVARIANCE + "moments_kernel",
    signature={**TOKENS, "tokens_per_program": "i32", "partials_ptr": "*fp64"},
    constexprs={"PER_SEQUENCE": False, "BLOCK": 512},
    aligned=("log_prob_ptr", "advantages_ptr", "mask_ptr", "tokens_per_program"),
    options=EXACT,
    element_bytes=9,
    # The narrow load is the mask's: a byte a token.
    expected=Expectation(
        vector_loads=True, scalar_loads=1, max_registers=128, min_resident_warps=16
    ),
)

KEYS = {
    **{name: kind for name, kind in TOKENS.items() if name != "mask_ptr"},
    "selectable_ptr": "*i8",
    "tokens_per_program": "i32",
    "num_sequences": "i32",
    "moments_ptr": "*fp64",
    "lb": "fp32",
    "ub": "fp32",
    "first_sequence_ptr": "*i64",
    "state_ptr": "*i64",
}
TOP = {
    "bounds_ptr": None,
    "seed_ptr": None,
    "sequence_index_ptr": None,
    "BAND": False,
    "PER_SEQUENCE": False,
    "STEPS": 0,
}
KEY_POINTERS = ("log_prob_ptr", "advantages_ptr", "selectable_ptr", "tokens_per_program")

HISTOGRAM = Specimen(
    name="histogram second digit",
    kernel=COVARIANCE + "histogram_kernel",
    signature={**KEYS, "counts_ptr": "*i64"},
    constexprs={**TOP, "SHIFT": 10, "BITS": 11, "BLOCK": 2048},
    aligned=KEY_POINTERS,
    num_warps=16,
    options=EXACT,
    expected=Expectation(
        vector_loads=True, scalar_loads=1, max_registers=128, max_shared=48 * 1024
    ),
)


def band(specimen: Specimen, *, packed: bool) -> Specimen:
    """Random keys of the tokens in a band."""
    more = {"seed_ptr": "*i64", **({"bounds_ptr": "*i64"} if packed else {})}
    fixed = {name: value for name, value in specimen.constexprs.items() if name not in more}
    return replace(
        specimen,
        name=f"{specimen.name} band{' packed' if packed else ''}",
        signature={**specimen.signature, **more},
        constexprs={**fixed, "BAND": True, "STEPS": 11 if packed else 0},
        # The search in the bounds loads one by one.
        expected=replace(specimen.expected, vector_loads=not packed),
    )


NARROW = Specimen(
    name="narrow",
    kernel=COVARIANCE + "narrow_kernel",
    signature={
        "counts_ptr": "*i64",
        "moments_ptr": "*fp64",
        "wanted_ptr": "*fp64",
        "state_ptr": "*i64",
    },
    constexprs={"before_ptr": None, "BITS": 11},
    num_warps=8,
    options=EXACT,
    expected=Expectation(max_registers=128),
)

MARK = Specimen(
    name="mark",
    kernel=COVARIANCE + "mark_kernel",
    signature={**KEYS, "ties_ptr": "*i32", "num_programs": "i32", "out_ptr": "*i8"},
    constexprs={**TOP, "ties_before_ptr": None, "PROGRAMS": 1024, "BLOCK": 512},
    aligned=(*KEY_POINTERS, "out_ptr"),
    options=EXACT,
    expected=Expectation(
        vector_loads=True, scalar_loads=1, max_registers=64, min_resident_warps=32
    ),
)

UNCLIPPED = Specimen(
    name="unclipped",
    kernel=COVARIANCE + "unclipped_kernel",
    signature={
        **{name: kind for name, kind in TOKENS.items() if name != "mask_ptr"},
        "old_log_prob_ptr": "*fp32",
        "selectable_ptr": "*i8",
        "low": "fp32",
        "high": "fp32",
        "out_ptr": "*i8",
    },
    constexprs={"PER_SEQUENCE": False, "BLOCK": 512},
    aligned=(*KEY_POINTERS[:3], "old_log_prob_ptr", "out_ptr"),
    options=EXACT,
    expected=Expectation(max_registers=64, min_resident_warps=32),
)

LOSS_POINTERS = ("log_prob_ptr", "old_log_prob_ptr", "advantages_ptr", "mask_ptr", "selected_ptr")
LOSS = Specimen(
    name="policy_loss clip_cov",
    kernel="powerkernels.policy_loss.kernels:loss_kernel",
    signature={
        "log_prob_ptr": "*fp32",
        "old_log_prob_ptr": "*fp32",
        "advantages_ptr": "*fp32",
        "mask_ptr": "*i8",
        "selected_ptr": "*i8",
        "moments_ptr": "*fp64",
        "width": "i32",
        "splits": "i32",
        "low": "fp32",
        "high": "fp32",
        "dual_clip": "fp32",
        "penalty": "fp32",
        "partials_ptr": "*fp64",
        "terms_ptr": "*fp32",
    },
    constexprs={
        "weights_ptr": None,
        "bounds_ptr": None,
        "KIND": 0,
        "CLIP": True,
        "SELECTED": 1,
        "STRAIGHT_THROUGH": False,
        "PER_SEQUENCE": False,
        "BLOCK": 512,
    },
    aligned=(*LOSS_POINTERS, "terms_ptr", "width"),
    options=EXACT,
    # The narrow loads are the two masks' and the ten moments.
    expected=Expectation(
        vector_loads=True, scalar_loads=12, max_registers=128, min_resident_warps=16
    ),
)


def policy_loss(name: str, *, without: tuple[str, ...] = (), **constexprs: Any) -> Specimen:
    more = {"bounds_ptr": "*i64"} if "packed" in name else {}
    fixed = {key: value for key, value in LOSS.constexprs.items() if key not in more}
    kept = {key: kind for key, kind in LOSS.signature.items() if key not in without}
    return replace(
        LOSS,
        name=f"policy_loss {name}",
        signature={**kept, **more},
        constexprs={**fixed, **dict.fromkeys(without), **constexprs},
        # The first token of a packed sequence is at a multiple of nothing.
        expected=replace(LOSS.expected, vector_loads="packed" not in name),
    )


TOKEN_KERNELS: list[Specimen] = [
    MOMENTS,
    replace(
        MOMENTS,
        name="moments advantages of sequences",
        constexprs={**MOMENTS.constexprs, "PER_SEQUENCE": True},
        expected=Expectation(max_registers=128),
    ),
    replace(
        HISTOGRAM,
        name="histogram first digit",
        signature={k: v for k, v in HISTOGRAM.signature.items() if k != "state_ptr"},
        constexprs={**HISTOGRAM.constexprs, "SHIFT": 21, "state_ptr": None},
    ),
    HISTOGRAM,
    band(HISTOGRAM, packed=False),
    band(HISTOGRAM, packed=True),
    NARROW,
    MARK,
    band(MARK, packed=True),
    UNCLIPPED,
    LOSS,
    policy_loss("kl_cov packed", CLIP=False, SELECTED=2),
    policy_loss(
        "k3", without=("advantages_ptr", "selected_ptr", "moments_ptr"), KIND=4, SELECTED=0
    ),
]


ATTEND = Specimen(
    name="attend bf16 64, 3 heads a group",
    kernel="powerkernels.decode_attention.kernels:attend_kernel",
    signature={
        "query_ptr": "*bf16",
        "query_stride_lane": "i32",
        "query_stride_head": "i32",
        "key_ptr": "*bf16",
        "key_stride_lane": "i32",
        "key_stride_head": "i32",
        "key_stride_position": "i32",
        "value_ptr": "*bf16",
        "value_stride_lane": "i32",
        "value_stride_head": "i32",
        "value_stride_position": "i32",
        "lengths_ptr": "*i64",
        "kv_heads": "i32",
        "num_positions": "i32",
        "scale": "fp32",
        "softcap": "fp32",
        "window": "i32",
        "stats_ptr": "*fp32",
        "sums_ptr": "*fp32",
        "output_ptr": "*bf16",
    },
    constexprs={
        "sinks_ptr": None,
        "GROUP": 3,
        "HEAD_SIZE": 64,
        "VALUE_SIZE": 64,
        "SOFTCAP": False,
        "UNIT": 8,
        "CHUNK": 64,
        "BLOCK_G": 16,
        "BLOCK_D": 64,
        "BLOCK_DV": 64,
    },
    options=EXACT,
    element_bytes=2,
    # 13.8 instructions are what 128 lanes of issue leave an element at 4.3 TB/s. What is on its way
    # is in shared memory: here 32 KB a block, of which four are resident.
    expected=Expectation(
        vector_loads=True,
        tensor_cores="HMMA",
        min_resident_warps=16,
        max_shared=40 * 1024,
        max_instructions_per_element=5,
    ),
)
# 64 KB on their way a block, of which two are resident on sm_80 and three on the others.
ATTEND_128 = replace(
    ATTEND.expected,
    min_resident_warps=8,
    max_registers=168,
    max_shared=72 * 1024,
    max_instructions_per_element=4,
)
OF_128 = {"HEAD_SIZE": 128, "VALUE_SIZE": 128, "BLOCK_D": 128, "BLOCK_DV": 128}


def attend(name: str, expected: Expectation, dtype: str = "bf16", **constexprs: Any) -> Specimen:
    pointers = ("query_ptr", "key_ptr", "value_ptr", "output_ptr")
    return replace(
        ATTEND,
        name=f"attend {name}",
        signature={
            key: f"*{dtype}" if key in pointers else kind
            for key, kind in ATTEND.signature.items()
            if key not in constexprs
        },
        constexprs={**ATTEND.constexprs, **constexprs},
        element_bytes=4 if dtype == "fp32" else 2,
        expected=expected,
    )


MERGE_SPLITS = Specimen(
    name="merge splits of 128",
    kernel="powerkernels.decode_attention.kernels:merge_kernel",
    signature={
        "stats_ptr": "*fp32",
        "sums_ptr": "*fp32",
        "num_splits": "i32",
        "lengths_ptr": "*i64",
        "num_heads": "i32",
        "num_positions": "i32",
        "window": "i32",
        "output_ptr": "*bf16",
    },
    constexprs={"sinks_ptr": None, "VALUE_SIZE": 128, "BLOCK_DV": 128},
    num_warps=1,
    options=EXACT,
    # A row's 16 maxima and totals and its length.
    expected=Expectation(vector_loads=True, scalar_loads=20),
)

MOVES = Specimen(
    name="lane moves of 16 bytes",
    kernel="powerkernels.lane_moves.kernels:move_kernel",
    signature={
        "table_ptr": "*i64",
        "num_tensors": "i32",
        "moves_ptr": "*i64",
        "offset_ptr": "*i64",
        "num_lanes": "i32",
        "num_positions": "i32",
        "run": "i32",
    },
    constexprs={"LANES": 64, "WORD_BYTES": 16, "ACCESSES": 512},
    num_warps=4,
    options=EXACT,
    region="code",
    # The narrow loads are the moves'. 8 blocks of 4 warps are to be resident.
    expected=Expectation(
        vector_loads=True,
        scalar_loads=10,
        vector_stores=True,
        max_registers=64,
        min_resident_warps=32,
    ),
)
SAMPLING = "powerkernels.power_sampling.kernels:"
LANE_STATE = {
    "lanes_ptr": "*i64",
    "slots_ptr": "*i64",
    "tokens_ptr": "*i64",
    "scores_ptr": "*fp64",
    "w_sum_ptr": "*fp64",
    "moves_ptr": "*i64",
    "totals_ptr": "*i64",
    "num_lanes": "i32",
    "max_length": "i32",
    "num_mcmc_steps": "i32",
}
DRAWN = {
    "token_ptr": "*i64",
    "log_prob_ptr": "*fp32",
    "log_z_ptr": "*fp32",
    "entropy_ptr": "*fp32",
}

# A program waits for one load after another: registers only have to be there.
MH_TRANSITION = Specimen(
    name="mh_transition 64 lanes",
    kernel=SAMPLING + "mh_transition_kernel",
    signature={
        **LANE_STATE,
        **DRAWN,
        "log_u_ptr": "*fp64",
        "trace_ptr": "*fp64",
        "block_limits_ptr": "*i64",
        "log_int_ptr": "*fp64",
        "eos_ptr": "*i64",
        "seed_ptr": "*i64",
        "powers_ptr": "*fp64",
        "num_items": "i32",
        "num_eos": "i32",
        "block_size": "i32",
    },
    constexprs={
        "OTHER_POWER": False,
        "BOUNDED": True,
        "EARLY_REJECTION": True,
        "SHARED_PREFIX_SKIP": True,
        "LENGTH_TERM": True,
        "GROWTH_CAP": False,
        "TRUNCATED_SUM": False,
        "STOP_AT_EOS": False,
        "BLOCK_C": 64,
        "BLOCK_T": 128,
    },
    num_warps=1,
    options={**EXACT, "maxnreg": 192},
    expected=Expectation(max_registers=180, max_shared=8 * 1024),
)


def mh_transition(name: str, *, lanes: int, num_warps: int = 1, **constexprs: Any) -> Specimen:
    return replace(
        MH_TRANSITION,
        name=f"mh_transition {name}",
        constexprs={**MH_TRANSITION.constexprs, "BLOCK_C": lanes, **constexprs},
        num_warps=num_warps,
        options=MH_TRANSITION.options if num_warps <= 4 else EXACT,
    )


LANES: list[Specimen] = [
    MH_TRANSITION,
    mh_transition("32 lanes and fewer", lanes=32),
    mh_transition("256 lanes", lanes=256, num_warps=4),
    # A few values of 512 programs, two a multiprocessor; with registers for all of them it would be
    # one. Which is faster has not been measured.
    replace(
        mh_transition("512 lanes", lanes=512, num_warps=8),
        expected=replace(MH_TRANSITION.expected, may_spill=True),
    ),
    mh_transition("1024 lanes", lanes=1024, num_warps=16),
    mh_transition(
        "64 lanes public law",
        lanes=64,
        OTHER_POWER=True,
        BOUNDED=False,
        EARLY_REJECTION=False,
        LENGTH_TERM=False,
        GROWTH_CAP=True,
        TRUNCATED_SUM=True,
        STOP_AT_EOS=True,
    ),
    replace(
        MH_TRANSITION,
        name="mh_transition 64 lanes nothing drawn",
        signature={k: v for k, v in MH_TRANSITION.signature.items() if k not in DRAWN},
        constexprs={**MH_TRANSITION.constexprs, **dict.fromkeys(DRAWN)},
    ),
    Specimen(
        name="prepare_step",
        kernel=SAMPLING + "prepare_step_kernel",
        signature={
            **LANE_STATE,
            "offset_ptr": "*i64",
            "fed_ptr": "*i64",
            "position_ptr": "*i64",
            "counters_ptr": "*i64",
            "ban_ptr": "*i64",
            "go_ptr": "*i32",
        },
        constexprs={"BLOCK": 1024},
        num_warps=8,
        options=EXACT,
        expected=Expectation(vector_loads=True, max_registers=72, max_shared=8 * 1024),
    ),
]


SPECIMENS: list[Specimen] = [
    ROW_SUMS,
    row_sums(
        "bf16 α=4", replace(ROW_SUMS.expected, max_instructions_per_element=10), ENTROPY=False
    ),
    row_sums("bf16 α=1 entropy", ONE_EXP, TWICE_ALPHA=2),
    row_sums("bf16 α=2.5 entropy", ONE_EXP, TWICE_ALPHA=ALPHA_2_5),
    row_sums("fp16 α=4 entropy", ONE_EXP, dtype="fp16"),
    row_sums("fp32 α=4 entropy", ONE_EXP, dtype="fp32"),
    row_sums("bf16 α=7.3 entropy", SECOND_EXP, TWICE_ALPHA=GENERAL),
    # tanh takes an exponential and divisions of its own, and is no aim of these kernels' speed.
    row_sums("bf16 α=4 entropy softcap", Expectation(vector_loads=True), SOFTCAP=True),
    # Straight-line code, main part and masked tail as one: 32 narrow loads are the tail's.
    replace(
        row_sums(
            "bf16 α=4 entropy few rows",
            Expectation(vector_loads=True, scalar_loads=40, exps_per_element=(1.0, 1.07)),
            SLICES=1,
        ),
        region="code",
        element_bytes=None,
        elements=2 * 1024,
    ),
    MERGE,
    replace(
        MERGE,
        name="merge tiles of the fused matmul α=4",
        constexprs={**MERGE.constexprs, "BLOCK": 2048},
        num_warps=4,
        expected=Expectation(max_registers=96),
    ),
    replace(
        MERGE,
        name="merge slices α=7.3",
        constexprs={**MERGE.constexprs, "PARTS": 8, "TWICE_ALPHA": GENERAL},
        expected=Expectation(),
    ),
    SCORE_BWD,
    score_bwd("bf16 α=4 log_prob only", without=("grad_log_z_ptr", "grad_entropy_ptr")),
    score_bwd("bf16 α=2.5 all three", TWICE_ALPHA=ALPHA_2_5),
    score_bwd("fp16 α=4 all three", dtype="fp16"),
    score_bwd("fp32 α=4 all three", dtype="fp32"),
    score_bwd(
        "bf16 α=7.3 all three", expected={"exps_per_element": (2.0, 2.07)}, TWICE_ALPHA=GENERAL
    ),
    DRAW,
    replace(
        DRAW,
        name="draw bf16 α=7.3",
        constexprs={**DRAW.constexprs, "TWICE_ALPHA": GENERAL},
    ),
    replace(
        DRAW,
        name="draw bf16 α=4 from a support",
        signature={**DRAW.signature, "threshold_ptr": "*fp32"},
        constexprs={k: v for k, v in DRAW.constexprs.items() if k != "threshold_ptr"},
    ),
    THRESHOLD,
    threshold("top_k", exps=0.0, TOP_P=False),
    threshold("top_p α=7.3", dtype="fp32", TOP_K=False, TWICE_ALPHA=GENERAL),
    threshold("top_k top_p α=1", dtype="fp16", TWICE_ALPHA=2),
    SUPPORT_SUMS,
    *LINEAR,
    *TOKEN_KERNELS,
    ATTEND,
    attend("bf16 128, 6", ATTEND_128, GROUP=6, **OF_128),
    attend("bf16 128, 6, finishing", ATTEND_128, GROUP=6, stats_ptr=None, sums_ptr=None, **OF_128),
    attend("bf16 80, 4", ATTEND_128, GROUP=4, **{**OF_128, "HEAD_SIZE": 80, "VALUE_SIZE": 80}),
    # Without tensor cores; 27.5 instructions are left an element of 4 bytes.
    attend(
        "fp32 64, 3",
        replace(ATTEND_128, tensor_cores=False, max_instructions_per_element=22),
        dtype="fp32",
        UNIT=4,
    ),
    MERGE_SPLITS,
    MOVES,
    replace(
        MOVES,
        name="lane moves of 2 bytes, 256 lanes",
        constexprs={**MOVES.constexprs, "LANES": 256, "WORD_BYTES": 2},
        expected=Expectation(),
    ),
    *LANES,
]
