"""What a cubin holds: registers, spills, accesses by width, loops.

The only module that knows Triton's disassemblers and the names of SASS instructions.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WARP = 32
RESIDENT_WARPS = 64
RESIDENT_BLOCKS = 32
REGISTERS = 65536
TENSOR_MEMORY_COLUMNS = 512
SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
# What the driver keeps of every block's shared memory from sm_80 on.
RESERVED_SHARED_BYTES = 1024

# UTC*: tcgen05 of sm_100; *GMMA: wgmma of sm_90; HFMA2.MMA is no such instruction.
_TENSOR_CORE = re.compile(r"(UTC[A-Z]*|[HIDQOB]G?)MMA")
_TMA_LOAD = ("UTMALDG", "UBLKCP")
_TMA_STORE = ("UTMASTG", "UTMAREDG")
# 16 bytes and wider: sm_100 has loads of 32.
_WIDE = 16

_LABEL = re.compile(r"^([.$\w]+):\s*$")
_INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]+\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<name>[A-Z][\w.]*)(?P<operands>[^;]*);"
)
_TARGET = re.compile(r"`\(([^)\s]+)\)|(\.L_\w+)")
_BARRIER_REGISTER = re.compile(r"\bB\d+\b")
_RESOURCE = re.compile(r"\b(REG|STACK|LOCAL):(\d+)")


@dataclass(frozen=True)
class Instruction:
    name: str  # with its suffixes: LDG.E.128
    guarded: bool
    operands: str

    @property
    def operation(self) -> str:
        return self.name.partition(".")[0]

    @property
    def width(self) -> int:
        """Bytes that a load or store moves per thread."""
        for suffix in self.name.split(".")[1:]:
            if suffix in ("U8", "S8"):
                return 1
            if suffix in ("U16", "S16"):
                return 2
            if suffix in ("64", "128", "256"):
                return int(suffix) // 8
        return 4


@dataclass
class Counts:
    """Instructions of a stretch of code, each counted once; loads and stores by bytes a thread."""

    instructions: int = 0
    exps: int = 0
    loads: dict[int, int] = field(default_factory=dict)
    async_copies: dict[int, int] = field(default_factory=dict)
    tma_loads: int = 0
    stores: dict[int, int] = field(default_factory=dict)
    tma_stores: int = 0
    local_loads: int = 0
    local_stores: int = 0
    local_bytes: int = 0
    tensor_cores: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, instructions: Iterable[Instruction]) -> Counts:
        counts = cls()
        for instruction in instructions:
            counts._add(instruction)
        return counts

    def _add(self, instruction: Instruction) -> None:
        operation, width = instruction.operation, instruction.width
        if operation == "NOP":
            return
        self.instructions += 1
        if instruction.name.startswith("MUFU.EX2"):
            self.exps += 1
        elif operation in ("LDG", "LD"):
            self.loads[width] = self.loads.get(width, 0) + 1
        elif operation == "LDGSTS":
            self.async_copies[width] = self.async_copies.get(width, 0) + 1
        elif operation in ("STG", "ST"):
            self.stores[width] = self.stores.get(width, 0) + 1
        elif operation in _TMA_LOAD:
            self.tma_loads += 1
        elif operation in _TMA_STORE:
            self.tma_stores += 1
        elif operation in ("LDL", "STL"):
            self.local_bytes += width
            if operation == "LDL":
                self.local_loads += 1
            else:
                self.local_stores += 1
        elif _TENSOR_CORE.fullmatch(operation):
            self.tensor_cores[operation] = self.tensor_cores.get(operation, 0) + 1

    @property
    def loaded_bytes(self) -> int:
        """By one thread, TMA aside."""
        both = (self.loads, self.async_copies)
        return sum(width * count for widths in both for width, count in widths.items())

    @property
    def wide_loads(self) -> int:
        both = (self.loads, self.async_copies)
        return sum(n for widths in both for width, n in widths.items() if width >= _WIDE)

    @property
    def narrow_loads(self) -> int:
        both = (self.loads, self.async_copies)
        return sum(n for widths in both for width, n in widths.items() if width < _WIDE)

    @property
    def wide_stores(self) -> int:
        return sum(n for width, n in self.stores.items() if width >= _WIDE)

    @property
    def narrow_stores(self) -> int:
        return sum(n for width, n in self.stores.items() if width < _WIDE)


@dataclass
class Loop:
    """A loop; `own` leaves out what is in loops inside of it."""

    depth: int  # 0: in no other loop
    own: Counts


@dataclass
class MachineCode:
    arch: int
    num_warps: int  # of a block, those that warp specialisation adds included
    registers: int  # per thread
    stack_bytes: int  # per thread: what spills, and arrays that are indexed at run time
    shared_bytes: int  # per block, the reserved ones not counted
    tensor_memory_columns: int
    total: Counts
    loops: list[Loop]

    @property
    def spilled_bytes(self) -> int:
        """Local memory that instructions move, each counted once, or that is set aside."""
        return max(self.total.local_bytes, self.stack_bytes if self.total.local_bytes else 0)

    @property
    def tensor_cores(self) -> str:
        return "+".join(sorted(self.total.tensor_cores))

    @property
    def resident_warps(self) -> int:
        """Warps that an SM holds at a time."""
        # Registers are given to a warp by 256, and a warp's come from one of four files.
        per_warp = -(-self.registers * WARP // 256) * 256
        warps = min(RESIDENT_WARPS, 4 * (REGISTERS // 4 // per_warp))
        blocks = min(RESIDENT_BLOCKS, warps // self.num_warps)
        shared = -(-(self.shared_bytes + RESERVED_SHARED_BYTES) // 128) * 128
        blocks = min(blocks, SHARED_BYTES[self.arch] // shared)
        if self.tensor_memory_columns:
            blocks = min(blocks, TENSOR_MEMORY_COLUMNS // self.tensor_memory_columns)
        return blocks * self.num_warps


def read_kernel(kernel: Any, arch: int) -> MachineCode:
    """The machine code of what `triton.compile` returned."""
    # The names that are no documented part of Triton: knobs.nvidia.*, asm["cubin"], and the
    # metadata shared, num_warps, tmem_size. The same in 3.6, 3.7 and 3.8.
    from triton import knobs

    metadata = kernel.metadata
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        sass = _output(knobs.nvidia.nvdisasm.path, "-c", str(path))
        usage = _output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path))
    resources = Counter[str]()
    for name, value in _RESOURCE.findall(usage):
        resources[name] = max(resources[name], int(value))
    code, entry, labels = parse_sass(sass)
    return MachineCode(
        arch=arch,
        num_warps=metadata.num_warps,
        registers=resources["REG"],
        stack_bytes=resources["STACK"] + resources["LOCAL"],
        shared_bytes=metadata.shared or 0,
        tensor_memory_columns=getattr(metadata, "tmem_size", 0) or 0,
        total=Counts.of(code),
        loops=find_loops(code, entry, labels),
    )


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def parse_sass(text: str) -> tuple[list[Instruction], int, dict[str, int]]:
    """The instructions, the place of the first one of the kernel, and the places of labels."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    entry = 0
    global_name = ""
    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            code.append(Instruction(match["name"], bool(match["guard"]), match["operands"]))
        elif match := _LABEL.match(line):
            labels[match[1]] = len(code)
        elif "STO_CUDA_ENTRY" in line:
            global_name = line.split()[1].rstrip(",")
    if not code:
        raise RuntimeError("the disassembly holds no instructions")
    entry = labels.get(f".text.{global_name}", entry)
    return code, entry, labels


def find_loops(code: Sequence[Instruction], entry: int, labels: dict[str, int]) -> list[Loop]:
    """The loops that are reached from `entry`, outer ones first.

    By strongly connected components and not by branches back: the slow path of a wait lies behind
    the end of the code and branches back to its middle without being a loop around it.
    """
    successors = _successors(code, labels)
    starts = {0, entry, *labels.values()}
    starts.update(s for i, after in enumerate(successors) if after != [i + 1] for s in after)
    starts.update(i + 1 for i, after in enumerate(successors) if after != [i + 1])
    ordered = sorted(start for start in starts if start < len(code))
    ends = dict(zip(ordered, [*ordered[1:], len(code)], strict=True))
    blocks = {start: [s for s in successors[end - 1] if s in ends] for start, end in ends.items()}

    reached = {entry}
    waiting = [entry]
    while waiting:
        for after in blocks[waiting.pop()]:
            if after not in reached:
                reached.add(after)
                waiting.append(after)
    graph = {start: set(blocks[start]) for start in reached}
    loops: list[Loop] = []
    _collect_loops(graph, entry, 0, ends, code, loops)
    return loops


def _successors(code: Sequence[Instruction], labels: dict[str, int]) -> list[list[int]]:
    result = []
    reconvergence: dict[str, int] = {}
    for i, instruction in enumerate(code):
        targets = [a or b for a, b in _TARGET.findall(instruction.operands)]
        after = [labels[target] for target in targets if target in labels]
        operation = instruction.operation
        barrier = _BARRIER_REGISTER.search(instruction.operands)
        if operation in ("EXIT", "RET", "KILL"):
            after = []
        elif operation == "BSSY" and barrier and after:
            reconvergence[barrier[0]] = after[0]
        elif operation == "BSYNC" and barrier and barrier[0] in reconvergence:
            after = [reconvergence[barrier[0]]]
        goes_on = operation not in ("EXIT", "RET", "KILL", "BRA", "BRX", "JMP", "BRXU", "JMX")
        # A uniform branch has its condition among the operands: BRA.U !UP0, `(.L_x_1).
        conditional = instruction.guarded or re.match(r"\s*!?U?P\d", instruction.operands)
        if (goes_on or conditional) and i + 1 < len(code):
            after.append(i + 1)
        result.append(sorted(set(after)))
    return result


def _collect_loops(
    graph: dict[int, set[int]],
    entry: int,
    depth: int,
    ends: dict[int, int],
    code: Sequence[Instruction],
    loops: list[Loop],
) -> set[int]:
    """Appends the loops of `graph`; returns the blocks that are in one."""
    inside: set[int] = set()
    for component in _components(graph):
        if len(component) == 1 and not graph[component[0]] & set(component):
            continue
        body = set(component)
        inside |= body
        heads = [b for b in body if b == entry or any(b in graph[a] for a in graph.keys() - body)]
        # Without the branches to its head, what still is a cycle is a loop inside.
        head = min(heads, default=min(body))
        inner = {b: (graph[b] & body) - {head} for b in body}
        place = len(loops)
        loops.append(Loop(depth, Counts()))
        nested = _collect_loops(inner, head, depth + 1, ends, code, loops)
        loops[place].own = Counts.of(code[i] for b in body - nested for i in range(b, ends[b]))
    return inside


def _components(graph: dict[int, set[int]]) -> list[list[int]]:
    """Strongly connected components, by Kosaraju, without recursion."""
    order: list[int] = []
    seen: set[int] = set()
    for root in sorted(graph):
        if root in seen:
            continue
        seen.add(root)
        stack = [(root, iter(sorted(graph[root])))]
        while stack:
            node, rest = stack[-1]
            for after in rest:
                if after not in seen:
                    seen.add(after)
                    stack.append((after, iter(sorted(graph[after]))))
                    break
            else:
                order.append(node)
                stack.pop()
    before: dict[int, list[int]] = {node: [] for node in graph}
    for node, afters in graph.items():
        for after in afters:
            before[after].append(node)
    components = []
    assigned: set[int] = set()
    for root in reversed(order):
        if root in assigned:
            continue
        component = []
        assigned.add(root)
        pending = [root]
        while pending:
            node = pending.pop()
            component.append(node)
            for previous in before[node]:
                if previous not in assigned:
                    assigned.add(previous)
                    pending.append(previous)
        components.append(sorted(component))
    return sorted(components)
