"""Applies a fault to a copy of the tree and runs the tests that are to catch it.

A fault is caught by a test that fails in its call: an error of the collection, of an import or of a
fixture says that the tree is broken, and nothing about what the tests see. No byte of the checkout
is written; bytecode is not kept, so that no change is hidden by it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from python_tests.mutations import witness
from python_tests.mutations.faults import Fault

CAUGHT, SURVIVED, BROKEN, HUNG = "caught", "SURVIVED", "BROKEN", "HUNG"
# Seconds of one run of pytest; what takes longer hangs.
TIMEOUT = 300
MAX_WHY = 300


class Result(NamedTuple):
    fault: Fault
    verdict: str
    test: str  # the first that failed
    why: str
    seconds: float

    @property
    def is_good(self) -> bool:
        return self.verdict == CAUGHT


class Outcome(NamedTuple):
    """Of one run of pytest."""

    verdict: str
    test: str
    why: str


class Tree:
    """A copy of a checkout: one fault at a time is in it."""

    def __init__(self, root: Path, folder: Path, *, package: str, timeout: float) -> None:
        self.root, self.folder = root, folder / "tree"
        self._package, self._timeout = package, timeout
        self._report = folder / "report.json"
        self._plugins = folder / "plugins"
        self._plugins.mkdir()
        shutil.copy2(witness.__file__, self._plugins / "mutation_witness.py")
        for name in files_of(root):
            target = self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target)
        self._compiled = Compiled(self.folder, folder, package)

    def run_with(self, fault: Fault) -> Outcome:
        """The tests of a fault, with it."""
        path = self.folder / fault.file
        before, times = path.read_bytes(), path.stat()
        self._compiled.choose(fault.is_compiled)
        try:
            path.write_text(fault.applied_to(before.decode()), encoding="utf-8")
            if fault.is_compiled and (reason := self._compiled.rebuild()):
                return Outcome(BROKEN, "", f"it does not compile: {reason}")
            return self._pytest(fault.tests)
        finally:
            path.write_bytes(before)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
            if fault.is_compiled:
                self._compiled.restore()

    def run_without(self, fault: Fault) -> Outcome:
        """The same tests without the fault."""
        self._compiled.choose(fault.is_compiled)
        return self._pytest(fault.tests)

    def _pytest(self, tests: Sequence[str]) -> Outcome:
        self._report.unlink(missing_ok=True)
        path = os.pathsep.join((str(self.folder), str(self._plugins)))
        environment = {
            **os.environ,
            "PYTHONPATH": path,
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_WAIT_POLICY": "passive",
            witness.FILE: str(self._report),
            witness.PACKAGE: self._package,
        }
        command = [sys.executable, "-m", "pytest", *tests, "-x", "-q", "-m", "not slow"]
        command += ["-p", "mutation_witness", "-p", "no:cacheprovider", "-p", "no:xdist"]
        try:
            done = subprocess.run(
                command,
                cwd=self.folder,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=self._timeout,
            )
        except subprocess.TimeoutExpired:
            return Outcome(HUNG, "", f"no end within {self._timeout:g} s")
        if not self._report.exists():
            last = (done.stderr or done.stdout).strip().splitlines()[-1:]
            return Outcome(BROKEN, "", " ".join([f"pytest ended with {done.returncode}", *last]))
        return self._judged(json.loads(self._report.read_text()))

    def _judged(self, report: dict) -> Outcome:
        if report["failed"]:
            found = Outcome(CAUGHT, report["failed"]["test"], report["failed"]["why"])
        elif report["broken"]:
            found = Outcome(BROKEN, report["broken"]["test"], report["broken"]["why"])
        elif not report["passed"]:
            found = Outcome(BROKEN, "", "none of its tests is run: all are slow, or skipped")
        else:
            found = Outcome(SURVIVED, "", f"{report['passed']} tests passed")
        file = report["package"]
        if file is not None and not Path(file).is_relative_to(self.folder):
            found = Outcome(BROKEN, "", f"the tests imported {file}, and not the copy")
        return found._replace(why=found.why[:MAX_WHY])


class Compiled:
    """The compiled part of a copy: the checkout's own, or one that is built there for the faults.

    A build without the fault is kept beside it, objects and all, so that each fault compiles what
    it changes and nothing else.
    """

    def __init__(self, tree: Path, folder: Path, package: str) -> None:
        self._tree, self._build, self._kept = tree, tree / "build", folder / "kept"
        self._modules = tree / package
        self._own = folder / "own"
        self._is_built = False
        self._copy(self._modules, self._own)

    def choose(self, built: bool) -> None:
        if built == self._is_built:
            return
        if built and not self._kept.exists():
            if reason := self.rebuild():
                raise RuntimeError(f"csrc/build.py fails without a fault: {reason}")
            shutil.copytree(self._build, self._kept / "build")
            self._copy(self._modules, self._kept / "modules")
        self._is_built = built
        self._copy(self._kept / "modules" if built else self._own, self._modules)

    def rebuild(self) -> str:
        """Empty, or why the compiler failed."""
        # Without CUDA: no fault is in that part, and no test runs it without a GPU.
        command = [sys.executable, "csrc/build.py", "--cuda", "off"]
        done = subprocess.run(command, cwd=self._tree, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if "error" in line] or [done.stderr]
        return lines[0].strip() if done.returncode else ""

    def restore(self) -> None:
        shutil.rmtree(self._build)
        shutil.copytree(self._kept / "build", self._build)
        self._copy(self._kept / "modules", self._modules)

    def _copy(self, source: Path, target: Path) -> None:
        """The modules of one folder in place of another's."""
        target.mkdir(parents=True, exist_ok=True)
        for module in target.glob("_C*.so"):
            module.unlink()
        for module in source.glob("_C*.so"):
            shutil.copy2(module, target / module.name)


def files_of(root: Path) -> list[str]:
    """What git lists of a checkout and what is new in it, and the compiled part."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    names = {name for name in listed.split("\0") if name and (root / name).is_file()}
    return sorted(names | {str(path.relative_to(root)) for path in root.glob("*/_C*.so")})


class Controls:
    """Each set of tests is run once without any fault, by whoever needs it first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: dict[tuple[bool, tuple[str, ...]], Future[Outcome]] = {}

    def of(self, fault: Fault, run: Callable[[Fault], Outcome]) -> Outcome:
        key = (fault.is_compiled, fault.tests)
        with self._lock:
            is_mine = key not in self._found
            future = self._found.setdefault(key, Future())
        if is_mine:
            try:
                future.set_result(run(fault))
            except BaseException as error:
                future.set_exception(error)
                raise
        return future.result()


def run_faults(
    faults: Iterable[Fault],
    root: Path,
    folder: Path,
    *,
    package: str = "powerkernels",
    jobs: int = 1,
    control: bool = True,
    timeout: float = TIMEOUT,
    on_result: Callable[[Result], object] = lambda result: None,
) -> list[Result]:
    """Try each fault in a copy of the checkout `root`.

    Args:
        faults: what to try; each must be applicable, see `Fault.applied_to`.
        root: the checkout.
        folder: an empty one, for the copies.
        package: the folder of the package, whose compiled part a fault in csrc/ rebuilds.
        jobs: copies that are worked on side by side. One of them takes what must be compiled.
        control: whether the tests must pass without the fault.
        timeout: seconds of a run of tests.
        on_result: called as each fault is done.

    Returns:
        A result for each fault, in their order.
    """
    faults = list(faults)
    compiled = deque(fault for fault in faults if fault.is_compiled)
    others = deque(fault for fault in faults if not fault.is_compiled)
    controls, lock = Controls(), threading.Lock()
    results: dict[str, Result] = {}

    def work(number: int) -> None:
        place = folder / str(number)
        place.mkdir()
        tree = Tree(root, place, package=package, timeout=timeout)
        while True:
            with lock:
                mine = compiled if number == 0 and compiled else others
                if not mine:
                    return
                fault = mine.popleft()
            result = try_fault(tree, fault, controls if control else None)
            with lock:
                results[fault.name] = result
                on_result(result)

    with ThreadPoolExecutor(jobs) as pool:
        workers = [pool.submit(work, number) for number in range(jobs)]
        try:
            for worker in workers:
                worker.result()
        except BaseException:
            with lock:  # the others end with the fault that they are at
                compiled.clear()
                others.clear()
            raise
    return [results[fault.name] for fault in faults]


def try_fault(tree: Tree, fault: Fault, controls: Controls | None) -> Result:
    started = time.monotonic()
    if controls is not None:
        found = controls.of(fault, tree.run_without)
        if found.verdict != SURVIVED:
            why = f"without the fault: {found.test} {found.why}".replace("  ", " ")
            return Result(fault, BROKEN, "", why, time.monotonic() - started)
        started = time.monotonic()
    found = tree.run_with(fault)
    if found.verdict == HUNG and fault.may_hang:
        found = found._replace(verdict=CAUGHT)
    return Result(fault, *found, time.monotonic() - started)
