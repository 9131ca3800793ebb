"""What all benches share: sizes by option, and what a figure must carry to mean something later."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.harness import machine


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="small sizes, to see that benches run")


def pytest_configure(config: pytest.Config) -> None:
    # What torch.compile's own imports say is no matter of ours.
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning")


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--quick"))


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    machine_info["powerkernels"] = machine.environment(torch.device("cpu"))
