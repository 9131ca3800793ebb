"""The kernels' machine code for sm_80, sm_90 and sm_100, compiled without a GPU.

Compiled in a process of its own: in this one the kernels may be interpreted. The fast tier has the
first specimen of each kernel, on sm_90.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from python_tests import tiers
from python_tests.ahead_of_time import machine_code, specimens, toy_specimens
from python_tests.ahead_of_time.machine_code import Counts, MachineCode, find_loops, parse_sass

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed"
    ),
    pytest.mark.xdist_group("ahead_of_time"),  # all kernels are compiled once
]

ROOT = Path(__file__).parents[2]
FAST_ARCH = 90
ARCHES = tiers.every(3, (FAST_ARCH, 100, 80))


def run_gate(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "python_tests.ahead_of_time", *arguments],
        cwd=ROOT,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@functools.cache
def findings_of(module: str, arch: int, *names: str) -> tuple[dict[str, dict[str, Any]], str]:
    """What the gate found for these specimens of a module, or all, and the table it printed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "findings.json"
        done = run_gate("--from", module, "--json", str(path), "--arch", str(arch), *names)
        assert path.exists(), done.stdout + done.stderr
        findings = json.loads(path.read_text())
    sys.stdout.write("\n" + done.stdout)
    has_failed = any(finding["failures"] for finding in findings)
    assert done.returncode == (1 if has_failed else 0), done.stdout + done.stderr
    assert {finding["arch"] for finding in findings} == {arch}
    return {finding["name"]: finding for finding in findings}, done.stdout


def check(name: str, arch: int, *of: Any) -> None:
    findings, printed = findings_of(*of)
    failures = findings[name]["failures"]
    if failures:
        wrong = "\n".join(f"  {failure}" for failure in failures)
        pytest.fail(f"{name} on sm_{arch}:\n{wrong}\n\n{printed}", pytrace=False)


def toy(name: str, arch: int) -> dict[str, Any]:
    return findings_of(toy_specimens.__name__, arch)[0][name]


FIRST = {s.kernel: s.name for s in reversed(specimens.SPECIMENS) if FAST_ARCH in s.arches}.values()


@pytest.mark.parametrize("name", FIRST)
def test_first_specimen_of_a_kernel_is_compiled_as_expected(name: str) -> None:
    check(name, FAST_ARCH, specimens.__name__, FAST_ARCH, *FIRST)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arch"), [(s.name, arch) for s in specimens.SPECIMENS for arch in s.arches]
)
def test_kernel_is_compiled_as_expected(name: str, arch: int) -> None:
    check(name, arch, specimens.__name__, arch)


GOOD = [s for s in toy_specimens.SPECIMENS if not s.name.startswith("bad_")]


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        case
        for s in GOOD
        for case in tiers.every(
            3,
            [(s.name, arch) for arch in sorted(s.arches, key=lambda arch: arch != FAST_ARCH)],
            of_several=True,
        )
    ],
)
def test_good_toy_passes(name: str, arch: int) -> None:
    check(name, arch, toy_specimens.__name__, arch)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bad_spill", "spills: "),
        ("bad_unaligned", "loads that are not of 16 bytes: 32 of 2 bytes"),
        ("bad_exps", "exponentials per element: 2.000, not 1.0"),
        ("bad_registers", "registers: "),
        ("bad_arguments", "does not compile: ValueError: arguments missing: ['n', 'out_ptr']"),
        ("bad_no_matmul", "tensor cores: none, not "),
        ("bad_no_matmul", "no TMA load"),
    ],
)
def test_bad_toy_fails(name: str, arch: int, message: str) -> None:
    failures = toy(name, arch)["failures"]
    assert any(failure.startswith(message) for failure in failures), failures


@pytest.mark.parametrize("arch", ARCHES)
def test_spill_shows_in_instructions_and_in_the_stack(arch: int) -> None:
    code = toy("bad_spill", arch)["code"]
    assert code["total"]["local_stores"] > 0
    assert code["total"]["local_loads"] > 0
    assert code["stack_bytes"] > 0
    assert code["registers"] <= 64


@pytest.mark.parametrize("arch", ARCHES)
def test_elements_are_counted_in_an_unrolled_loop(arch: int) -> None:
    """What the unrolling leaves over is done by another loop, which is not counted."""
    finding = toy("stream", arch)
    a_tile = 1024 // machine_code.WARP
    assert finding["elements"] % a_tile == 0
    assert finding["region"]["exps"] == finding["elements"]
    assert finding["code"]["loops"]


@pytest.mark.parametrize("arch", ARCHES)
def test_async_copies_are_loads(arch: int) -> None:
    region = toy("stream_async", arch)["region"]
    assert region["async_copies"].keys() == {"16"}
    assert not region["loads"]


@pytest.mark.parametrize("arch", ARCHES[:2])
def test_matmul_loop_lies_in_the_loop_of_the_exponentials(arch: int) -> None:
    code = toy("matmul", arch)["code"]
    (outer,) = (loop for loop in code["loops"] if loop["own"]["exps"])
    assert outer["depth"] == 0
    # On sm_100 the first of the inner loop's passes is peeled off into the outer one.
    (inner,) = (loop for loop in code["loops"] if loop["own"]["tensor_cores"] and loop["depth"])
    assert inner["depth"] == 1
    assert inner["own"]["exps"] == 0
    assert (code["tensor_memory_columns"] > 0) == (arch == 100)


def test_interpreter_is_refused() -> None:
    done = run_gate(TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "unset it" in done.stderr


def test_unknown_specimen_is_refused() -> None:
    done = run_gate("--from", toy_specimens.__name__, "no_such")
    assert done.returncode == 2
    assert "no such specimen: ['no_such']" in done.stderr


SASS = """
        .other          kernel,@"STO_CUDA_ENTRY STV_DEFAULT"
kernel:
.text.kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_outer:
        /*0010*/                   BSSY B0, `(.L_joined) ;
.L_inner:
        /*0020*/                   LDG.E.EF.128 R4, desc[UR10][R4.64] ;
        /*0030*/                   MUFU.EX2 R8, R8 ;
        /*0040*/               @P1 BRA `(.L_inner) ;
        /*0050*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR17+0x180b0], R5 ;
        /*0060*/              @!P0 BRA `(.L_wait) ;
.L_done:
        /*0070*/              @!P2 LDG.E.U16 R9, desc[UR10][R4.64] ;
        /*0080*/                   BSYNC B0 ;
.L_joined:
        /*0090*/                   HFMA2.MMA R2, -RZ, RZ, 0, 0 ;
        /*00a0*/                   BRA.U UP0, `(.L_outer) ;
        /*00b0*/                   STG.E.64 desc[UR10][R2.64], R6 ;
        /*00c0*/                   EXIT ;
.L_wait:
        /*00d0*/                   NANOSLEEP 0x64 ;
.L_again:
        /*00e0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR17+0x180b0], R5 ;
        /*00f0*/              @!P0 BRA `(.L_again) ;
        /*0100*/                   BRA `(.L_done) ;
.L_trap:
        /*0110*/                   BRA `(.L_trap);
        /*0120*/                   NOP;
"""


def test_loops_of_written_code() -> None:
    code, entry, labels = parse_sass(SASS)
    total = Counts.of(code)
    assert total.instructions == 18
    assert total.loads == {16: 1, 2: 1}
    assert total.stores == {8: 1}
    assert total.tensor_cores == {}

    loops = find_loops(code, entry, labels)
    assert sorted((loop.depth, loop.own.instructions) for loop in loops) == [(0, 9), (1, 2), (1, 3)]
    (outer,) = (loop for loop in loops if loop.depth == 0)
    assert outer.own.loads == {2: 1}
    (streaming,) = (loop for loop in loops if loop.own.exps)
    assert streaming.own.loads == {16: 1}


@pytest.mark.parametrize(
    ("arch", "num_warps", "registers", "shared_kib", "columns", "warps"),
    [
        (90, 4, 32, 0, 0, 64),
        (90, 1, 32, 0, 0, 32),  # 32 blocks
        (90, 4, 128, 0, 0, 16),
        (90, 8, 168, 0, 0, 8),  # 12 warps have the registers; a block has 8
        (90, 4, 255, 0, 0, 8),
        (80, 4, 64, 80, 0, 8),  # with the reserved ones 2 * 81 of 164
        (80, 4, 64, 82, 0, 4),
        (90, 4, 64, 75, 0, 12),
        (100, 4, 64, 16, 256, 8),
    ],
)
def test_resident_warps(
    arch: int, num_warps: int, registers: int, shared_kib: int, columns: int, warps: int
) -> None:
    code = MachineCode(
        arch, num_warps, registers, 0, shared_kib * 1024, columns, total=Counts(), loops=[]
    )
    assert code.resident_warps == warps
