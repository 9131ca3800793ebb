"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from powerkernels import _extension
from python_tests import triton_device

SIMD_LEVELS = ("baseline", "avx2", "avx512")


@pytest.fixture(params=["reference", *(f"cpp-{level}" for level in SIMD_LEVELS)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs a test once per backend, and the C++ one at every SIMD level that this CPU has."""
    name, _, level = request.param.partition("-")
    monkeypatch.setenv("POWERKERNELS_BACKEND", name)
    if name == "reference":
        yield request.param
        return
    with at_simd_level(level):
        yield request.param


@pytest.fixture(params=SIMD_LEVELS)
def simd_level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test of compiled code at every SIMD level that this CPU has."""
    with at_simd_level(request.param):
        yield request.param


@contextmanager
def at_simd_level(level: str) -> Iterator[None]:
    module = _extension.extension()
    if module is None:
        pytest.skip(f"no compiled part: {_extension.why_missing()}")
    if SIMD_LEVELS.index(level) > SIMD_LEVELS.index(module.highest_simd_level()):
        pytest.skip(f"this CPU or build has no {level}")
    before = module.simd_level()
    module.set_simd_level(level)
    try:
        yield
    finally:
        module.set_simd_level(before)


@pytest.fixture
def compiled_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled backend, at the level it has by itself."""
    if _extension.extension() is None:
        pytest.skip(f"no compiled part: {_extension.why_missing()}")
    monkeypatch.setenv("POWERKERNELS_BACKEND", "cpp")


@pytest.fixture(params=triton_device.DEVICES)
def kernel_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs a test of the Triton kernels on a GPU, or in the interpreter where there is none."""
    monkeypatch.setenv("POWERKERNELS_BACKEND", "triton")
    if request.param == "cpu":
        triton_device.make_interpreter_exact(monkeypatch)
    with np.errstate(all="ignore"):  # the interpreter computes with numpy; NaN and inf are meant
        yield request.param


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20260101)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
