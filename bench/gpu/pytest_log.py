"""A pytest plugin: each test's outcome as a line of JSON, at once; what passed is not run again.

    python -m pytest … -p bench.gpu.pytest_log --test-log FILE --test-log-key KEY

A machine that goes away in the middle leaves the lines of the tests that ended. A later run with
the same key (the digest of the sources) leaves out those that passed. A kernel that breaks the
process's CUDA context fails its own test alone: the process is replaced after it. For
`--dist load`: with `loadgroup` pytest-xdist 3.8 may wait for ever once a process has ended. Tests
of one xdist_group take turns all the same.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.harness.broken_context import BROKEN_EXIT, context_is_broken

# For the reports that are on their way to the main process of pytest-xdist.
SEND_SECONDS = 1.0
MAX_REASON = 300
# What the main process hands to the others.
DONE, LOCKS = "test_log_done", "test_log_locks"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("test log")
    group.addoption("--test-log", type=Path, metavar="FILE", help="outcomes, a line of JSON each")
    group.addoption("--test-log-key", default="", help="lines of another key count for nothing")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--test-log")
    if path is None:
        return
    workers = getattr(config, "workerinput", None)
    if workers is not None:
        config.pluginmanager.register(_Runner(workers[DONE], Path(workers[LOCKS])))
        return
    key = config.getoption("--test-log-key")
    locks = tempfile.mkdtemp(prefix="test-log-")
    config.add_cleanup(lambda: shutil.rmtree(locks, ignore_errors=True))
    done = sorted(passed(path, key))
    config.pluginmanager.register(_Runner(done, Path(locks)))
    config.pluginmanager.register(_Writer(path, key, done))
    if config.pluginmanager.has_plugin("xdist"):
        config.pluginmanager.register(_Distributor(done, locks))


def outcomes(path: Path, key: str) -> dict[str, dict[str, Any]]:
    """The last outcome of each test with the key; a line that was cut off counts for nothing."""
    found = {}
    text = path.read_text(errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.get("key") == key and "outcome" in entry:
            found[entry["test"]] = entry
    return found


def passed(path: Path, key: str) -> frozenset[str]:
    return frozenset(
        test for test, entry in outcomes(path, key).items() if entry["outcome"] == "passed"
    )


class _Distributor:
    """In the main process: what pytest-xdist tells its processes.

    All the same, however late one is begun: it refuses processes that find other tests.
    """

    def __init__(self, done: Sequence[str], locks: str) -> None:
        self._input = {DONE: list(done), LOCKS: locks}

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput.update(self._input)


class _Runner:
    """In every process: leaves out what passed, and ends a process whose context is broken.

    Args:
        done: tests to leave out.
        locks: folder of a file for each group whose tests take turns.
    """

    def __init__(self, done: Sequence[str], locks: Path) -> None:
        self._done, self._locks = frozenset(done), locks
        self._has_failed = False

    @pytest.hookimpl(wrapper=True, tryfirst=True)  # around a timeout, which begins after the wait
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        marker = item.get_closest_marker("xdist_group")
        if marker is None:
            return (yield)
        name = marker.args[0] if marker.args else marker.kwargs["name"]
        with (self._locks / name).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # given back if the process ends
            return (yield)

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        # pytest-xdist adds the group of a test to its id.
        left_out = [item for item in items if item.nodeid.partition("@")[0] in self._done]
        if left_out:
            items[:] = [item for item in items if item not in set(left_out)]
            config.hook.pytest_deselected(items=left_out)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Iterator[None]:
        report: Any = yield
        self._has_failed = self._has_failed or report.failed
        return report

    def pytest_runtest_logfinish(self) -> None:
        failed, self._has_failed = self._has_failed, False
        if failed and context_is_broken():
            if "PYTEST_XDIST_WORKER" in os.environ:
                time.sleep(SEND_SECONDS)
                os._exit(BROKEN_EXIT)
            pytest.exit("the device's context is broken", BROKEN_EXIT)


class _Writer:
    """In the main process."""

    def __init__(self, path: Path, key: str, done: Sequence[str]) -> None:
        self._path, self._key, self._done = path, key, done
        self._reports: dict[str, list[Any]] = {}
        self._failed: set[str] = set()

    def pytest_runtest_logreport(self, report: Any) -> None:
        test = report.nodeid.partition("@")[0]
        self._reports.setdefault(test, []).append(report)
        # "???" is pytest-xdist's word for a test whose process has ended.
        if report.when in ("teardown", "???"):
            entry = {"test": test, "key": self._key, **_summary(self._reports.pop(test))}
            if test in self._failed:
                return  # that its process has ended too says less
            if entry["outcome"] == "failed":
                self._failed.add(test)
            with self._path.open("a") as file:
                file.write(json.dumps(entry) + "\n")

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if self._done and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
            session.exitstatus = pytest.ExitCode.OK  # all that there are have passed before


def _summary(reports: Sequence[Any]) -> dict[str, Any]:
    outcome, reason = "passed", None
    for report in reports:
        if report.failed:
            outcome, reason = "failed", _first_line(report.longrepr)
        elif report.skipped and outcome != "failed":
            outcome, reason = "skipped", _reason(report)
    seconds = sum(report.duration for report in reports)
    return {
        "outcome": outcome,
        "seconds": round(seconds, 2),
        **({"reason": reason[:MAX_REASON]} if reason else {}),
    }


def _first_line(found: Any) -> str:
    """Of what was raised; of a process that has ended, pytest-xdist's text."""
    crash = getattr(found, "reprcrash", None)
    lines = str(found if crash is None else crash.message).strip().splitlines()
    return lines[0] if lines else ""


def _reason(report: Any) -> str:
    found = report.longrepr
    text = found[2] if isinstance(found, tuple) else str(found)
    return text.removeprefix("Skipped: ")
