"""A pytest plugin: what became of the tests, as JSON in the file that MUTATION_WITNESS names.

It stands alone: a copy of it, beside the mutated tree, is what pytest loads.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

FILE = "MUTATION_WITNESS"
PACKAGE = "MUTATION_PACKAGE"  # a module; the report says from which file it was imported
# A test that ends so has seen that the tree does not import, and nothing of what it computes.
NO_CATCH = (ImportError, SyntaxError, NameError)

_found: dict[str, Any] = {"passed": 0, "failed": None, "broken": None}


@pytest.hookimpl(trylast=True)
def pytest_configure() -> None:
    """That an example fails is enough: it need not be made small, which takes minutes."""
    if not any("hypothesis" in name for name in sys.modules):
        return
    from hypothesis import Phase, settings

    phases = (Phase.explicit, Phase.generate)
    settings.register_profile("mutations", settings.default, phases=phases)
    settings.load_profile("mutations")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" and report.passed:
        _found["passed"] += 1
    if report.failed and call.excinfo is not None:
        is_catch = report.when == "call" and not call.excinfo.errisinstance(NO_CATCH)
        _note("failed" if is_catch else "broken", report.nodeid, call.excinfo.exconly())
    return report


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _note("broken", report.nodeid or "collection", report.longreprtext)


def pytest_sessionfinish() -> None:
    module = sys.modules.get(os.environ[PACKAGE])
    _found["package"] = getattr(module, "__file__", None)
    Path(os.environ[FILE]).write_text(json.dumps(_found))


def _note(kind: str, test: str, text: str) -> None:
    if _found[kind] is None:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        # Of an exception the first line says what, of a failed collection the last one.
        line = (lines or [""])[-1 if kind == "broken" else 0]
        _found[kind] = {"test": test.partition("@")[0], "why": line}
