"""What all tests share."""

from __future__ import annotations

import importlib.util
import random
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from powerkernels import _extension
from python_tests import tiers, triton_device
from python_tests.tiers import SIMD_LEVELS

# Seconds for a test that may hang: its kernels compile in it, beside those of other processes.
HANG_SECONDS = 180
TEST_ID = pytest.StashKey[str]()  # without the group that xdist appends
# Hypothesis's examples of a test by --hypothesis-profile: in the fast tier, and in all.
EXAMPLES = {"fast": 100, "thorough": 400}

if importlib.util.find_spec("hypothesis") is not None:
    import hypothesis

    for profile, number in EXAMPLES.items():
        hypothesis.settings.register_profile(
            profile,
            max_examples=number,
            deadline=None,
            # A backend, for one, is a fixture, and the same in all examples.
            suppress_health_check=[
                hypothesis.HealthCheck.function_scoped_fixture,
                hypothesis.HealthCheck.too_slow,
            ],
        )
    hypothesis.settings.load_profile("fast")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seed",
        type=int,
        default=0,
        help="of whatever the tests draw: each is to pass with any",
    )
    parser.addoption(
        "--share",
        metavar="K/N",
        help="of the tests that are collected the K-th of N parts: what CI runs of the slow ones",
    )


def pytest_configure(config: pytest.Config) -> None:
    if share := config.getoption("--share"):
        tiers.numbers_of(share)  # an error of the command line, not of each process's collection


def seed_draws(config: pytest.Config, what: str) -> None:
    """What a test or a fixture draws is its own, whatever has run before it in its process."""
    seed = zlib.crc32(f"{config.getoption('--seed')} {what}".encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef, request: pytest.FixtureRequest) -> None:
    where = request.node.stash.get(TEST_ID, request.node.nodeid)
    seed_draws(request.config, f"{where} {fixturedef.argname} {request.param_index}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    seed_draws(item.config, item.stash[TEST_ID])


def pytest_itemcollected(item: pytest.Item) -> None:
    item.stash[TEST_ID] = item.nodeid
    function = getattr(item, "obj", None)
    if getattr(function, "is_hypothesis_test", False):
        hypothesis.seed(item.config.getoption("--seed"))(function)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # around that of xdist, which reads the groups
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Generator[None]:
    """Tests that may hang have a timeout and run last; those that need much memory, in turn.

    Only the end of its process ends what hangs on a device, so that the timeout does that
    (`method="thread"`): what has run before it keeps its result.
    """
    tiers.mark(items)
    for item in items:
        if may_hang(item) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(HANG_SECONDS, method="thread"))
        if item.get_closest_marker("gpu_memory") is not None:
            item.add_marker(pytest.mark.xdist_group("gpu_memory"))
    yield  # -m leaves some of them out, and they may be shuffled
    items.sort(key=may_hang)
    if share := config.getoption("--share"):
        items[:], others = tiers.in_share(items, share)
        config.hook.pytest_deselected(items=others)
    for item in items:
        # xdist 3.8 writes the group to a name of the node that pytest 9.2 no longer reads.
        grouped = getattr(item, "_nodeid", item.nodeid)
        if grouped != item.nodeid:
            item._id = type(item._id).parse(grouped)


def may_hang(item: pytest.Item) -> bool:
    return item.get_closest_marker("may_hang") is not None


def pytest_runtest_setup(item: pytest.Item) -> None:
    marker = item.get_closest_marker("gpu_memory")
    if marker is not None and torch.cuda.is_available():
        (wanted,), there = marker.args, torch.cuda.mem_get_info()[1]
        if there < wanted * 1e9:
            pytest.skip(f"needs {wanted} GB of GPU memory, and the device has {there / 1e9:.1f}")


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu_memory") is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()  # for the other processes


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
    return torch.Generator().manual_seed(torch.initial_seed())


@pytest.fixture
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
