"""Options of `pytest bench`, and what a figure must carry to mean something later."""

from __future__ import annotations

from typing import Any

import pytest

from bench.harness import machine
from powerkernels.models import find_device


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="small sizes, to see that benches run")


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    machine_info["powerkernels"] = machine.environment(find_device("auto"))
