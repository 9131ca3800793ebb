"""Runs cases: fits in memory? right? then timed beside its ceiling, written, and on to the next."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bench.harness import accuracy, ceilings, peers, timing
from bench.harness.broken_context import BrokenContextError, context_is_broken
from bench.harness.cases import Call, Case, Kernel, Outputs, Size, Variant
from bench.harness.results import Document, row
from bench.memory import peak_bytes
from powerkernels._cuda_graph import on_device
from powerkernels.power_sampling.lane_model import free_memory

# Of the memory that is free, what a case may take.
MEMORY_SHARE = 0.8
CASE_SECONDS: dict[Size, float] = {"device": 3.0, "host": 2.5, "quick": 0.2}
# `compare` cannot tell fewer than 8 samples apart in a table of a hundred rows.
MIN_ROUNDS: dict[Size, int] = {"device": 9, "host": 8, "quick": 3}
JOB_ROUNDS: dict[Size, int] = {"device": 2, "host": 2, "quick": 1}
CEILING = "ceiling"


@dataclass(frozen=True)
class Settings:
    size: Size
    device: torch.device
    peers: frozenset[str]
    peer_path: Path | None = None
    free_bytes: int | None = None  # None: as the system says


def run(
    kernels: Sequence[Kernel],
    settings: Settings,
    document: Document,
    say: Callable[[str], None],
    show: Callable[[list[dict[str, Any]]], None],
) -> None:
    """Measures what is not in the document yet, and writes it after every case."""
    if not document.suite["ceilings"]:
        say("ceilings of this machine")
        document.suite["ceilings"] = ceilings.measure(settings.device, settings.size)
        document.write()
    for kernel in kernels:
        for case in kernel.cases(settings.size):
            key = f"{kernel.name}: {case.title}"
            if document.is_done(key):
                say(f"{key}: in the file already")
                continue
            say(key)
            rows = _Measurement(kernel, case, settings, document, say).rows()
            document.add(rows)
            document.suite["done"].append(key)
            document.write()
            show(rows)
    document.suite["finished"] = True
    document.write()


def why_not(variant: Variant, case: Case, settings: Settings) -> str | None:
    """Why a variant cannot run here; None if it can."""
    if variant.peer is not None and (
        reason := peers.why_missing(variant.peer, settings.device, settings.peer_path)
    ):
        return reason
    return _too_large(case.memory + variant.extra_memory(case), settings)


def _too_large(needed: int, settings: Settings) -> str | None:
    free = settings.free_bytes
    if free is None:
        free = free_memory(settings.device)
    if free is None or needed <= MEMORY_SHARE * free:
        return None
    return (
        f"it needs about {needed / 1e9:.1f} GB of memory, "
        f"and {MEMORY_SHARE:.0%} of the free {free / 1e9:.1f} GB may be used"
    )


class _Measurement:
    """One case of a kernel."""

    def __init__(
        self,
        kernel: Kernel,
        case: Case,
        settings: Settings,
        document: Document,
        say: Callable[[str], None],
    ) -> None:
        self._kernel, self._case, self._settings = kernel, case, settings
        self._document, self._say = document, say
        self._errors: dict[str, dict[str, float]] = {}
        self._peaks: dict[str, int | None] = {}

    def rows(self) -> list[dict[str, Any]]:
        device = self._settings.device
        place = on_device if self._kernel.whole_job else timing.capture_stream
        with place(device):
            made = self._rows()
        _collect(device)
        return made

    def _rows(self) -> list[dict[str, Any]]:
        if reason := _too_large(self._case.memory, self._settings):
            self._skip("all variants", reason)
            return []
        device = self._settings.device
        try:
            inputs = self._kernel.inputs(self._case, device)
        except ImportError as error:  # a model that is a package of its own
            self._skip("all variants", str(error))
            return []
        sets = self._sets(inputs)
        variants = {
            variant.name: variant for variant in self._kernel.variants if self._runs(variant)
        }
        expectation = Expectation(self._kernel, inputs)
        calls: dict[str, list[Call]] = {}
        for name, variant in variants.items():
            with self._guarded(name):
                calls[name] = self._right(variant, sets, expectation)
        if not calls:
            return []
        ceiling = self._ceiling(sets)
        if ceiling is not None:
            calls[CEILING] = ceiling[1]
        samples = timing.interleaved(calls, device, self._plan(), self._failed)
        return self._as_rows(samples, variants, ceiling[0] if ceiling else None, inputs)

    def _right(self, variant: Variant, sets: list[Any], expectation: Expectation) -> list[Call]:
        """Calls of the variant on all sets, once its result is found right and its memory known."""
        device, results = self._settings.device, []
        calls = [variant.bind(inputs) for inputs in sets]
        if not self._kernel.whole_job:
            # The first call allocates and compiles what stays; only a job has no second one.
            results.append(expectation.part_of(calls[0]()))
            _collect(device)
        peak = peak_bytes(lambda: results.append(calls[0]()), device)
        found = expectation.part_of(results[0]) if self._kernel.whole_job else results[0]
        self._errors[variant.name] = expectation.check(found)
        self._peaks[variant.name] = peak
        return calls

    def _sets(self, inputs: Any) -> list[Any]:
        if not self._kernel.rotates or self._kernel.whole_job:
            return [inputs]
        count = timing.num_sets(_bytes_of(inputs), self._settings.device)
        return [inputs, *(_copied(inputs) for _ in range(count - 1))]

    def _runs(self, variant: Variant) -> bool:
        if variant.peer is not None and variant.peer not in self._settings.peers:
            return False
        if variant.main_only and not self._case.main:
            return False
        if reason := why_not(variant, self._case, self._settings):
            return self._skip(variant.name, reason)
        return True

    def _skip(self, variant: str, reason: str) -> bool:
        entry = {"kernel": self._kernel.name, "variant": variant, "reason": reason}
        before = self._document.suite["skipped"]
        if not any(entry.items() <= other.items() for other in before):
            self._say(f"  {variant}: skipped, {reason}")
        self._document.skip(case=self._case.title, **entry)
        return False

    def _failed(self, name: str, error: Exception) -> None:
        out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
            "not enough memory" in str(error)
        )
        lines = str(error).splitlines() or [""]
        reason = (
            lines[0]
            if isinstance(error, accuracy.WrongResultError)
            else (f"{type(error).__name__}: {lines[0]}")
        )
        if out_of_memory:
            self._skip(name, f"out of memory: {lines[0]}")
            return
        self._say(f"  {name}: FAILED, no figure: {reason}")
        self._document.fail(
            kernel=self._kernel.name, case=self._case.title, variant=name, reason=reason
        )
        if context_is_broken():
            # A later run does not begin with what has broken this one.
            self._document.suite["done"].append(f"{self._kernel.name}: {self._case.title}")
            self._document.write()
            raise BrokenContextError(reason)

    def _guarded(self, name: str) -> _Guard:
        return _Guard(lambda error: self._failed(name, error))

    def _ceiling(self, sets: list[Any]) -> tuple[str, list[Call]] | None:
        """Its name, and calls that go over as many copies as the inputs of the variants have."""
        kind, case, device = self._kernel.ceiling, self._case, self._settings.device
        if kind is None:
            return None
        if isinstance(kind, str):
            make = {"copy": ceilings.copy_of, "read": ceilings.read_of}[kind]
            count = timing.num_sets(case.bytes, device) if self._kernel.rotates else 1
            name = f"{kind} of {case.bytes / 1e6:.3g} MB"
            return name, [make(case.bytes, device) for _ in range(count)]
        found = [kind(case, inputs) for inputs in sets]
        return found[0][0], [call for _, call in found]

    def _plan(self) -> timing.Plan:
        size = self._settings.size
        if self._kernel.whole_job:
            rounds = JOB_ROUNDS[size]
            return timing.Plan(
                0.0, min_rounds=rounds, max_rounds=rounds, evict=False, whole_job=True
            )
        variants = self._kernel.variants
        return timing.Plan(
            CASE_SECONDS[size],
            min_rounds=MIN_ROUNDS[size],
            peers=frozenset(variant.name for variant in variants if not variant.ours),
            on_host=frozenset(variant.name for variant in variants if variant.on_host),
            ceiling=CEILING,
        )

    def _as_rows(
        self,
        samples: dict[str, timing.Samples],
        variants: dict[str, Variant],
        ceiling: str | None,
        inputs: Any,
    ) -> list[dict[str, Any]]:
        made = []
        for name, taken in samples.items():
            variant = variants.get(name)
            for mode in ("cold", "sustained"):
                times = getattr(taken, mode)
                if not times:
                    continue
                median = timing.median(times)
                ratio, why_no_ratio = self._ratio(samples, taken, mode, median)
                info: dict[str, Any] = {
                    "variant": name if variant else f"{name}: {ceiling}",
                    "ours": bool(variant and variant.ours),
                    "peer": variant.peer if variant else None,
                    "is_ceiling": variant is None,
                    "calls": taken.calls if mode == "sustained" else 1,
                    "timed_by": taken.timed_by,
                    "graph": taken.graph,
                    "why_no_graph": taken.why_no_graph,
                    "ratio_to_ceiling": ratio,
                    "why_no_ratio": why_no_ratio,
                    "peak_megabytes": _megabytes(self._peaks.get(name)),
                    "errors": self._errors.get(name),
                    "memory_bound": isinstance(self._kernel.ceiling, str),
                    **self._rate(median),
                }
                if variant is not None and variant.metrics is not None:
                    info["metrics"] = variant.metrics(inputs, median)
                kernel = self._kernel
                made.append(row(kernel.name, kernel.part, self._case, mode, times, info))
        return made

    def _rate(self, median: float) -> dict[str, float | None]:
        case = self._case
        return {
            "gigabytes_per_second": case.bytes / median / 1e9 if case.bytes else None,
            "teraflops": case.flops / median / 1e12 if case.flops else None,
        }

    def _ratio(
        self, samples: dict[str, timing.Samples], taken: timing.Samples, mode: str, median: float
    ) -> tuple[float | None, str | None]:
        """The ceiling's median by a variant's, both timed in one way; or why there is none."""
        way = taken.timed_by
        found = [samples.get(name) for name in (CEILING, timing.ceiling_by(CEILING, way))]
        same = next((each for each in found if each is not None and each.timed_by == way), None)
        if same is not None:
            # A slow variant has cold samples only, beside a ceiling that may have both.
            times = getattr(same, mode) or same.cold
            return timing.median(times) / median, None
        if self._kernel.ceiling is None:
            return None, "this kernel has no ceiling"
        if found[0] is None:
            return None, "the ceiling has no figure"
        why = f", as {found[0].why_no_graph}" if found[0].why_no_graph else ""
        return None, f"timed by {way}, and the ceiling by {found[0].timed_by}{why}"


class Expectation:
    """The float64 results of a case; made when they are first needed."""

    def __init__(self, kernel: Kernel, inputs: Any) -> None:
        self._kernel, self._few = kernel, kernel.few(inputs)
        self._expected: Outputs | None = None
        self._yardstick: Outputs | None = None

    def part_of(self, outputs: Outputs) -> Outputs:
        """What is compared, where later calls do not write."""
        picked = self._kernel.picked(outputs)
        return {name: value.detach().clone() for name, value in picked.items()}

    def check(self, found: Outputs) -> dict[str, float]:
        kernel = self._kernel
        if self._expected is None or kernel.by_outcome:
            self._expected = kernel.expected(self._few, found)
            if kernel.yardstick is not None:
                self._yardstick = kernel.yardstick(self._few, found)
        return accuracy.check(found, self._expected, self._yardstick)


class _Guard:
    """Hands an exception to a function instead of raising it; not KeyboardInterrupt."""

    def __init__(self, handle: Callable[[Exception], None]) -> None:
        self._handle = handle

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        self._handle(error)
        return True


def _bytes_of(inputs: Any) -> int:
    return sum(leaf.nbytes for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor))


def _copied(inputs: Any) -> Any:
    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.detach().clone().requires_grad_(leaf.requires_grad)

    return pytree.tree_map(copy, inputs)


def _collect(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _megabytes(value: int | None) -> float | None:
    return None if value is None else value / 1e6
