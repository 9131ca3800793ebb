"""Kernels, what is expected of their machine code, and whether it is so."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from python_tests.ahead_of_time.machine_code import WARP, Counts, MachineCode, read_kernel

ARCHES = (80, 90, 100)
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


@dataclass(frozen=True)
class Expectation:
    """What must hold; None and False: nothing in particular."""

    may_spill: bool = False
    max_registers: int | None = None
    min_resident_warps: int | None = None
    max_shared: int | None = None  # bytes
    # In the element region, all but `scalar_loads` loads have 16 bytes or more, and there is one.
    vector_loads: bool = False
    scalar_loads: int = 0
    # In all of the code: a store need not be in the loop.
    vector_stores: bool = False
    scalar_stores: int = 0
    # A number: within 0.005 of it; a pair: bounds.
    exps_per_element: float | tuple[float, float] | None = None
    max_instructions_per_element: float | None = None
    # True: those of the architecture: HMMA, HGMMA, UTCHMMA; a name: that instruction.
    tensor_cores: bool | str = False
    tma: bool = False


@dataclass(frozen=True)
class Specimen:
    """A kernel as one launch compiles it.

    Its element region is the loop with the most exponentials, or if no loop has any, the one with
    the most bytes loaded, without the loops inside of it; without either, all of the code.
    """

    name: str
    kernel: str  # "module:function", imported only where it is compiled
    signature: Mapping[str, str]  # the arguments that are no constexprs: "*bf16", "i64", "fp32", …
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    # The arguments that are divisible by 16; None: the pointers.
    aligned: Collection[str] | None = None
    num_warps: int = 4
    num_stages: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)
    # Elements that a program handles in one pass of the element region, ...
    elements: int | None = None
    # ... or the bytes of one, for them to be counted by what the region loads. The second holds
    # however far the compiler unrolls the loop.
    element_bytes: int | None = None
    region: Literal["auto", "code"] = "auto"
    arches: Sequence[int] = ARCHES
    expected: Expectation | Mapping[int, Expectation] = field(default_factory=Expectation)

    def expected_on(self, arch: int) -> Expectation:
        if isinstance(self.expected, Expectation):
            return self.expected
        return self.expected[arch]


@dataclass
class Finding:
    """A specimen on an architecture: its figures, or why there are none, and what is wrong."""

    name: str
    arch: int
    code: MachineCode | None = None
    region: Counts | None = None
    elements: float | None = None  # per thread, by the region's code
    failures: list[str] = field(default_factory=list)

    @property
    def exps_per_element(self) -> float | None:
        return self.region.exps / self.elements if self.region and self.elements else None

    @property
    def instructions_per_element(self) -> float | None:
        return self.region.instructions / self.elements if self.region and self.elements else None


def load_kernel(name: str) -> Any:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def compile_specimen(specimen: Specimen, arch: int) -> MachineCode:
    """Compiles without a GPU, as a launch on one would."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET is set: its kernels cannot be compiled")
    kernel = load_kernel(specimen.kernel)
    names = list(kernel.arg_names)
    given = {*specimen.signature, *specimen.constexprs}
    if given != set(names):
        missing, unknown = set(names) - given, given - set(names)
        raise ValueError(f"arguments missing: {sorted(missing)}, unknown: {sorted(unknown)}")
    signature = {name: specimen.signature.get(name, "constexpr") for name in names}
    aligned = specimen.aligned
    if aligned is None:
        aligned = [name for name in names if signature[name].startswith("*")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=dict(specimen.constexprs),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {
        "num_warps": specimen.num_warps,
        "num_stages": specimen.num_stages,
        **specimen.options,
    }
    target = GPUTarget("cuda", arch, WARP)
    return read_kernel(triton.compile(source, target=target, options=options), arch)


def element_region(specimen: Specimen, code: MachineCode) -> Counts:
    if specimen.region == "code":
        return code.total
    measures: tuple[Callable[[Counts], int], ...] = (
        lambda counts: counts.exps,
        lambda counts: counts.loaded_bytes,
        lambda counts: counts.tma_loads,
    )
    for measure in measures:
        best = max((loop.own for loop in code.loops), key=measure, default=None)
        if best is not None and measure(best):
            return best
    return code.total


def examine(specimen: Specimen, arch: int) -> Finding:
    """Compiles and compares with what is expected."""
    finding = Finding(specimen.name, arch)
    try:
        code = compile_specimen(specimen, arch)
    except Exception as error:
        finding.failures.append(f"does not compile: {type(error).__name__}: {error}")
        return finding
    region = element_region(specimen, code)
    finding.code, finding.region = code, region
    if specimen.element_bytes is not None:
        finding.elements = region.loaded_bytes / specimen.element_bytes
    elif specimen.elements is not None:
        finding.elements = specimen.elements / (specimen.num_warps * WARP)
    finding.failures += failures(specimen.expected_on(arch), finding)
    return finding


def failures(expected: Expectation, finding: Finding) -> list[str]:
    code, region = finding.code, finding.region
    assert code is not None
    assert region is not None
    found = []
    total = code.total

    def at_most(what: str, value: float | None, limit: float | None) -> None:
        if limit is None:
            return
        if value is None:
            found.append(f"{what}: unknown, since the specimen's elements are")
        elif value > limit:
            found.append(f"{what}: {value:g}, more than {limit:g}")

    if code.spilled_bytes and not expected.may_spill:
        found.append(
            f"spills: {total.local_stores} stores and {total.local_loads} loads of local memory, "
            f"{code.stack_bytes} bytes of it"
        )
    at_most("registers", code.registers, expected.max_registers)
    at_most("bytes of shared memory", code.shared_bytes, expected.max_shared)
    wanted_warps = expected.min_resident_warps
    if wanted_warps is not None and code.resident_warps < wanted_warps:
        found.append(f"resident warps: {code.resident_warps}, fewer than {wanted_warps}")
    if expected.vector_loads and (
        region.narrow_loads > expected.scalar_loads or not region.wide_loads
    ):
        widths = _by_width(region.loads) + _by_width(region.async_copies)
        found.append(f"loads that are not of 16 bytes: {', '.join(widths) or 'no loads at all'}")
    if expected.vector_stores and (
        total.narrow_stores > expected.scalar_stores or not total.wide_stores
    ):
        widths = _by_width(total.stores)
        found.append(f"stores that are not of 16 bytes: {', '.join(widths) or 'no stores at all'}")
    wanted_exps = expected.exps_per_element
    if wanted_exps is not None:
        bounds = wanted_exps
        if not isinstance(bounds, tuple):
            bounds = (bounds - 0.005, bounds + 0.005)
        exps = finding.exps_per_element
        if exps is None or not bounds[0] <= exps <= bounds[1]:
            shown = "unknown" if exps is None else f"{exps:.3f}"
            found.append(f"exponentials per element: {shown}, not {wanted_exps}")
    at_most(
        "instructions per element",
        finding.instructions_per_element,
        expected.max_instructions_per_element,
    )
    wanted_kind = expected.tensor_cores
    if wanted_kind:
        kind = TENSOR_CORES[code.arch] if wanted_kind is True else wanted_kind
        if kind not in total.tensor_cores:
            found.append(f"tensor cores: {code.tensor_cores or 'none'}, not {kind}")
    if expected.tma and not total.tma_loads:
        found.append("no TMA load")
    return found


def _by_width(widths: Mapping[int, int]) -> list[str]:
    return [f"{count} of {width} bytes" for width, count in sorted(widths.items())]


HEADER = (
    "kernel",
    "arch",
    "regs",
    "spill B",
    "shared KB",
    "loads 16B/other/TMA",
    "exp/el",
    "instr/el",
    "tensor cores",
    "warps",
)


def table(findings: Iterable[Finding]) -> str:
    """One line a finding; loads are those of the element region, TMA's those of all the code."""
    rows = [HEADER, *(_row(finding) for finding in findings)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip() + "\n")
    return "".join(lines)


def _marked(finding: Finding) -> str:
    return finding.name + (" *" if finding.failures else "")


def _row(finding: Finding) -> tuple[str, ...]:
    code, region = finding.code, finding.region
    if code is None or region is None:
        return (_marked(finding), str(finding.arch), *"-" * (len(HEADER) - 2))

    def figure(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    return (
        _marked(finding),
        str(finding.arch),
        str(code.registers),
        str(code.spilled_bytes),
        f"{code.shared_bytes / 1024:.1f}",
        f"{region.wide_loads}/{region.narrow_loads}/{code.total.tma_loads}",
        figure(finding.exps_per_element),
        figure(finding.instructions_per_element),
        code.tensor_cores or "-",
        str(code.resident_warps),
    )
