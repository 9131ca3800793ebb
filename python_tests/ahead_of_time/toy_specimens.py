"""Specimens of the toy kernels: those named bad_* must fail the gate."""

from __future__ import annotations

from dataclasses import replace

from python_tests.ahead_of_time.gate import Expectation, Specimen

TOYS = "python_tests.ahead_of_time.toy_kernels:"

STREAM = Specimen(
    name="stream",
    kernel=TOYS + "exp_sum",
    signature={"x_ptr": "*bf16", "out_ptr": "*fp32", "n": "i32"},
    constexprs={"BLOCK": 1024, "STAGES": 1},
    aligned=("x_ptr", "out_ptr", "n"),
    num_warps=1,
    element_bytes=2,
    expected=Expectation(
        max_registers=128, vector_loads=True, exps_per_element=1.0, max_instructions_per_element=4
    ),
)
STRAIGHT = Specimen(
    name="straight",
    kernel=TOYS + "two_exps",
    signature={"x_ptr": "*bf16", "out_ptr": "*bf16", "n": "i32", "alpha": "fp32"},
    constexprs={"BLOCK": 1024},
    aligned=("x_ptr", "out_ptr", "n"),
    elements=1024,
    expected=Expectation(vector_loads=True, vector_stores=True, exps_per_element=2.0),
)
SPILL = Specimen(
    name="bad_spill",
    kernel=TOYS + "normalize_twice",
    signature={"x_ptr": "*fp32", "out_ptr": "*fp32"},
    constexprs={"BLOCK": 4096},
    num_warps=1,
    options={"maxnreg": 64},
)
MATMUL = Specimen(
    name="matmul",
    kernel=TOYS + "matmul_exp_sum",
    signature={
        "a": "tensordesc<bf16[128,64]>",
        "b": "tensordesc<bf16[128,64]>",
        "out_ptr": "*fp32",
        "n": "i32",
        "k": "i32",
    },
    constexprs={"M": 128, "N": 128, "K": 64, "STAGES": 3},
    aligned=("out_ptr", "k"),
    num_warps=4,
    elements=128 * 128,
    arches=(90, 100),
    expected=Expectation(tensor_cores=True, tma=True, exps_per_element=1.0, max_shared=100 * 1024),
)
POINTERS = Specimen(
    name="matmul_by_pointers",
    kernel=TOYS + "matmul_by_pointers",
    signature={"a_ptr": "*bf16", "b_ptr": "*bf16", "out_ptr": "*fp32", "k": "i32"},
    constexprs={"M": 64, "N": 64, "K": 32},
    aligned=("a_ptr", "b_ptr", "out_ptr", "k"),
    arches=(80,),
    expected=Expectation(tensor_cores=True, vector_loads=True),
)

SPECIMENS = [
    STREAM,
    replace(
        STREAM,
        name="stream_async",
        constexprs={"BLOCK": 1024, "STAGES": 3},
        expected=Expectation(vector_loads=True, exps_per_element=1.0),
    ),
    STRAIGHT,
    SPILL,
    replace(STREAM, name="bad_unaligned", aligned=("out_ptr",)),
    replace(STRAIGHT, name="bad_exps", expected=Expectation(exps_per_element=1.0)),
    replace(STREAM, name="bad_registers", expected=Expectation(max_registers=16)),
    replace(STREAM, name="bad_arguments", signature={"x_ptr": "*bf16"}),
    MATMUL,
    POINTERS,
    replace(STREAM, name="bad_no_matmul", expected=Expectation(tensor_cores=True, tma=True)),
]
