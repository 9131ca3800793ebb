"""Runs a target's steps, each in a process of its own, within a budget of seconds."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu.record import Record, Status
from bench.harness.broken_context import BROKEN_EXIT
from bench.harness.machine import ROOT, digest

# Below this a step is not begun: a process that imports torch and compiles a kernel takes as long.
MIN_SECONDS = 15.0
# Between SIGTERM, at which a step may still write, and SIGKILL.
GRACE_SECONDS = 5.0
TAIL_LINES = 12  # of a failed step's output, shown at once
MAX_DETAIL = 300


class Stopped(Exception):
    """The process was asked to end, by a signal or Ctrl-C; str() says by which."""


@dataclass(frozen=True)
class Step:
    """A process and what it leaves.

    Args:
        name: unique in its target.
        command: program and arguments; run in the checkout's root.
        seconds: its limit; less where the budget has less left.
        environment: variables on top of this process's.
        why_not: a reason not to run it, in a line; None if it can run. Asked when its turn comes.
        read: what its files say, for the record; called whatever became of it.
        ready: waits for what it needs, at most so many seconds; returns why that failed.
        sources: folders and files that its outcome depends on.
        goes_on: begun again after its CUDA context has broken, it goes on behind that.
    """

    name: str
    command: Sequence[str]
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)
    why_not: Callable[[], str | None] = field(default=lambda: None)
    read: Callable[[], dict[str, Any]] = field(default=dict)
    ready: Callable[[float], str | None] = field(default=lambda seconds: None)
    sources: Sequence[str] = ("powerkernels", "csrc", "bench")
    goes_on: bool = False


@dataclass
class Session:
    """A target being run.

    Args:
        record: where outcomes go.
        log: file that all output is added to.
        budget: seconds for all steps together.
        say: prints a line.
        device_fault: asked after a step that did not pass; why the device no longer answers, or
            None.
        fresh: steps that have passed at these sources are run again too.
    """

    record: Record
    log: Path
    budget: float
    say: Callable[[str], None]
    device_fault: Callable[[], str | None] = field(default=lambda: None)
    fresh: bool = False
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def run(self, steps: Sequence[Step]) -> bool:
        """Whether every step has passed or been skipped, in this run or at these sources before.

        Raises:
            Stopped: after what was under way has been ended and recorded.
        """
        deadline = time.monotonic() + self.budget
        digests = {step.name: digest(step.sources) for step in steps}
        fault: str | None = None
        for step in self._in_order(steps, digests):
            sources = digests[step.name]
            if not self.fresh and self._is_done(step, sources):
                self.say(f"{step.name}: passed before")
                continue
            left = deadline - time.monotonic()
            if fault is not None or left < MIN_SECONDS:
                self._not_reached(step, sources, fault or "the time was used up")
                continue
            reason = step.why_not()
            if reason is not None:
                self.say(f"{step.name}: skipped, {reason}")
                self.record.set(step.name, "skipped", detail=reason, sources=sources)
                continue
            reason = step.ready(left)
            if reason is not None:
                self.say(f"{step.name}: NOT RUN, {reason}")
                self.record.set(step.name, "failed", detail=reason, sources=sources)
                continue
            left = deadline - time.monotonic()
            status = self._run_one(step, sources, min(step.seconds, max(left, MIN_SECONDS)))
            if status != "passed":
                fault = self.device_fault()
                if fault is not None:
                    self.say(
                        f"the device no longer answers after {step.name}: {fault}; what was "
                        f"measured is in {self.record.path}"
                    )
        done = [self.record.steps[step.name]["status"] in ("passed", "skipped") for step in steps]
        return all(done)

    def _in_order(self, steps: Sequence[Step], digests: Mapping[str, str]) -> list[Step]:
        """As listed: first what never ran, then what failed at these sources or was cut off, then
        what passed at others."""

        def rank(step: Step) -> int:
            before = self.record.steps.get(step.name)
            if before is None or before["status"] in ("not reached", "skipped"):
                return 0
            if before["sources"] == digests[step.name]:
                return 1
            return 2 if before["status"] == "passed" else 0

        return sorted(steps, key=rank)

    def _is_done(self, step: Step, sources: str) -> bool:
        before = self.record.steps.get(step.name, {})
        return before.get("status") == "passed" and before["sources"] == sources

    def _not_reached(self, step: Step, sources: str, reason: str) -> None:
        self.say(f"{step.name}: not reached, {reason}")
        if step.name not in self.record.steps:  # else what an earlier run found stays
            self.record.set(step.name, "not reached", detail=reason, sources=sources)

    def _run_one(self, step: Step, sources: str, limit: float) -> Status:
        self.say(f"{step.name}: at most {limit:.0f} s")
        begin = time.monotonic()
        start = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            log.write(f"\n==== {step.name}: {shlex.join(step.command)}\n".encode())
            log.flush()
            try:
                status, detail = self._wait(step, log, limit)
            except (KeyboardInterrupt, Stopped) as error:
                entry = self._entry(step, sources, begin, str(error) or "Ctrl-C")
                self.record.set(step.name, "stopped", **entry)
                raise Stopped(str(error) or "Ctrl-C") from None
        self.record.set(step.name, status, **self._entry(step, sources, begin, detail))
        kept = self.record.steps[step.name]
        self.say(f"{step.name}: {status} in {kept['seconds']:.0f} s{_after(kept['detail'])}")
        if status != "passed":
            for line in tail(self.log, start):
                self.say(f"    {line}")
        return status

    def _entry(self, step: Step, sources: str, begin: float, detail: str | None) -> dict[str, Any]:
        try:
            found = step.read()
        except Exception as error:  # whatever a process that was killed may leave
            found = {}
            detail = detail or f"its results are unreadable: {type(error).__name__}: {error}"
        details = [each for each in (detail, found.pop("detail", None)) if each]
        return {
            "detail": "; ".join(details)[:MAX_DETAIL] or None,
            "seconds": round(time.monotonic() - begin, 1),
            "command": shlex.join(step.command),
            "sources": sources,
            **found,
        }

    def _wait(self, step: Step, log: Any, limit: float) -> tuple[Status, str | None]:
        deadline = time.monotonic() + limit
        try:
            self._process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env={**os.environ, **step.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that what it starts ends with it
            )
        except OSError as error:
            return "failed", f"{step.command[0]} does not start: {error.strerror}"
        try:
            code = self._process.wait(limit)
        except subprocess.TimeoutExpired:
            self.end()
            return "timed out", f"after {limit:.0f} s"
        except BaseException:
            self.end()
            raise
        finally:
            self._process = None
        if code == BROKEN_EXIT and step.goes_on and time.monotonic() + MIN_SECONDS < deadline:
            return self._wait(step, log, deadline - time.monotonic())
        if code == 0:
            return "passed", None
        if code < 0:
            return "failed", f"ended by {signal.Signals(-code).name}"
        return "failed", f"exit status {code}"

    def end(self) -> None:
        """End the step under way, and what it has started."""
        process = self._process
        if process is None:
            return
        # SIGKILL in any case: a child may outlive the process that was asked.
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)


def tail(log: Path, start: int) -> list[str]:
    """The last lines of what was added to a file after `start` bytes."""
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()
    return [line for line in lines if line.strip()][-TAIL_LINES:]


def _after(detail: str | None) -> str:
    return f", {detail}" if detail else ""
