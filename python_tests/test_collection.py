"""What conftest.py does: what may hang runs last, large tests take turns, draws are seeded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from python_tests import tiers
from python_tests.conftest import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[1]
MARKERS = (
    "may_hang",
    "gpu_memory(gigabytes)",
    "timeout(seconds)",
    "xdist_group(name)",
    "slow",
    "gpu",
    "interpreted",
)

CONFTEST = """
import json, os
import pytest
from python_tests.test_collection import MARKERS
from python_tests.conftest import pytest_addoption, pytest_collection_modifyitems  # noqa: F401

def pytest_configure(config):
    for line in MARKERS:
        config.addinivalue_line("markers", line)

@pytest.fixture(autouse=True)
def note(request):
    timeout = request.node.get_closest_marker("timeout")
    seen = {
        "name": request.node.name.partition("@")[0],
        "worker": os.environ.get("PYTEST_XDIST_WORKER"),
        "timeout": timeout and [*timeout.args, timeout.kwargs],
    }
    with open(os.environ["NOTES"], "a") as file:
        file.write(json.dumps(seen) + "\\n")
"""

# Names by which "b" of a file is neither the first nor the last of it.
TESTS = """
import time
import pytest

@pytest.mark.may_hang
def test_a_loop(): pass

@pytest.mark.gpu_memory(5)
def test_large(): time.sleep(0.05)

@pytest.mark.parametrize("i", range(12))
def test_small(i): time.sleep(0.01)

@pytest.mark.may_hang
@pytest.mark.timeout(7)
def test_its_own_timeout(): pass

@pytest.mark.gpu_memory(6)
def test_larger(): time.sleep(0.05)

def test_z(): pass
"""


DRAWING_CONFTEST = """
from python_tests.test_collection import MARKERS
from python_tests.conftest import (  # noqa: F401
    pytest_addoption, pytest_collection_modifyitems, pytest_fixture_setup,
    pytest_itemcollected, pytest_runtest_call,
)
def pytest_configure(config):
    for line in MARKERS:
        config.addinivalue_line("markers", line)
"""

# What draws, by whom: a test with a fixture that others share, one with its own, and hypothesis.
DRAWS = """
import json, os, random
import hypothesis, numpy, pytest, torch
from hypothesis import strategies

def drawn():
    return [random.random(), numpy.random.rand(), torch.rand(()).item()]

def note(name, numbers):
    with open(os.environ["NOTES"], "a") as file:
        file.write(json.dumps([name, numbers]) + "\\n")

@pytest.fixture(scope="module")
def shared(): return drawn()

@pytest.fixture(params=[0, 1])
def own(request): return drawn()

@pytest.mark.xdist_group("some")
def test_shared_and_more(shared): note("more", shared + drawn())

def test_shared(shared): note("shared", shared + drawn())

def test_own(own, request): note(request.node.name, own + drawn())

@pytest.mark.parametrize("i", range(3))
def test_alone(i): note(f"alone {i}", drawn())

@hypothesis.settings(max_examples=5)
@hypothesis.given(strategies.integers(0, 2**60))
def test_examples(integer): note("examples", integer)
"""


def notes_of(folder: Path, *options: str) -> list[dict]:
    """Of a run of two such files, in the order in which the tests began."""
    (folder / "conftest.py").write_text(CONFTEST)
    for name in ("test_one.py", "test_two.py"):
        (folder / name).write_text(TESTS)
    return notes_of_run(folder, str(folder), "--strict-markers", *options)


def notes_of_run(folder: Path, *options: str) -> list:
    notes = folder / "notes"
    notes.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NOTES": str(notes)}
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in notes.read_text().splitlines()]


HANGING = {"test_a_loop", "test_its_own_timeout"}
# On one device they would stand in each other's way, and nothing else is kept in order.
IN_TURN = {"test_large", "test_larger"}


# pytest-timeout need not be there.
@pytest.mark.parametrize(
    "options", tiers.every(2, [[], ["-p", "no:timeout"]]), ids=["as here", "no timeouts"]
)
def test_what_may_hang_runs_last_with_a_timeout(tmp_path: Path, options: list[str]) -> None:
    notes = notes_of(tmp_path, "-n", "0", *options)
    assert len(notes) == 2 * 17
    assert {note["name"] for note in notes[-4:]} == HANGING
    assert not HANGING & {note["name"] for note in notes[:-4]}
    others = [note["name"] for note in notes[:-4]]
    assert others[:15] == others[15:] == ["test_large", *others[1:13], "test_larger", "test_z"]
    timeouts = {note["name"]: note["timeout"] for note in notes if note["timeout"]}
    assert timeouts == {
        "test_a_loop": [HANG_SECONDS, {"method": "thread"}],
        "test_its_own_timeout": [7, {}],
    }


@pytest.mark.slow
def test_in_several_processes(tmp_path: Path) -> None:
    """A process begins the last test that it has been given while another ends the one before."""
    notes = notes_of(tmp_path, "-n", "2", "--dist", "loadgroup")
    assert len(notes) == 2 * 17
    first = min(i for i, note in enumerate(notes) if note["name"] in HANGING)
    assert first >= len(notes) - 8
    assert len({note["worker"] for note in notes if note["name"] in IN_TURN}) == 1
    assert len({note["worker"] for note in notes}) == 2


def draws_of(folder: Path, *options: str) -> dict[str, list]:
    drawn: dict[str, list] = {}
    for name, numbers in notes_of_run(folder, *options):
        drawn.setdefault(name, []).append(numbers)
    return drawn


@pytest.mark.slow
def test_draws_are_those_of_the_test_whatever_ran_before_it(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(DRAWING_CONFTEST)
    file = tmp_path / "test_draws.py"
    file.write_text(DRAWS)
    names = ["shared_and_more", "shared", "own", "alone", "examples"]
    wanted = draws_of(tmp_path, "-n", "0", str(file))
    assert len(wanted) == 8
    assert len(wanted["examples"]) == 5
    numbers = [tuple(drawn) for name, (drawn, *_) in wanted.items() if name != "examples"]
    assert wanted["shared"][0][:3] == wanted["more"][0][:3]
    single = [number for drawn in numbers for number in drawn]
    assert len(set(single)) == len(single) - 3
    backwards = [f"{file}::test_{name}" for name in reversed(names)]
    assert draws_of(tmp_path, "-n", "0", *backwards) == wanted
    assert draws_of(tmp_path, "-n", "2", "--dist", "loadgroup", str(file)) == wanted
    assert draws_of(tmp_path, "-n", "0", backwards[3]) == {"shared": wanted["shared"]}
    others = draws_of(tmp_path, "-n", "0", "--seed", "1", str(file))
    assert others.keys() == wanted.keys()
    assert all(others[name][-1] != wanted[name][-1] for name in wanted)
