"""The log of test outcomes, in pytest runs of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu.pytest_log import outcomes, passed
from bench.harness.machine import ROOT
from python_tests import tiers

TESTS = """
import os, pytest

def test_good(): pass
def test_bad(): assert 1 == 2
@pytest.mark.skip(reason="needs a CUDA device")
def test_skipped(): pass
@pytest.fixture
def broken(): raise RuntimeError("the fixture breaks")
def test_of_a_broken_fixture(broken): pass
@pytest.mark.xdist_group("large")
@pytest.mark.parametrize("n", [1, 2])
def test_several(n): pass
"""


def run(folder: Path, *options: str, key: str = "k") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", str(folder), "-q", "-p", "no:cacheprovider"]
    command += ["-p", "bench.gpu.pytest_log", "--test-log", str(folder / "log.jsonl")]
    command += ["--test-log-key", key, "--rootdir", str(folder), "-c", "/dev/null", *options]
    if "-n" in options:
        command += ["-p", "xdist"]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # they take seconds
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "test_some.py").write_text(TESTS)
    return tmp_path


@pytest.mark.parametrize("options", [(), ("-n", "2", "--dist", "load")], ids=["one", "xdist"])
@pytest.mark.slow
def test_outcomes_and_what_is_left_out_next_time(folder: Path, options: tuple[str, ...]) -> None:
    first = run(folder, *options)
    assert "3 passed" in first.stdout, first.stdout + first.stderr
    found = {
        test.partition("::")[2]: (entry["outcome"], entry.get("reason"))
        for test, entry in outcomes(folder / "log.jsonl", "k").items()
    }
    assert {name: outcome for name, (outcome, _) in found.items()} == {
        "test_good": "passed",
        "test_bad": "failed",
        "test_skipped": "skipped",
        "test_of_a_broken_fixture": "failed",
        "test_several[1]": "passed",
        "test_several[2]": "passed",
    }
    assert found["test_skipped"][1] == "needs a CUDA device"
    assert found["test_bad"][1] == "assert 1 == 2"
    assert found["test_of_a_broken_fixture"][1] == "RuntimeError: the fixture breaks"

    second = run(folder, *options)
    assert "passed" not in second.stdout.splitlines()[-1]
    assert "1 failed" in second.stdout
    if not options:
        other = run(folder, key="other sources")
        assert "3 passed" in other.stdout


@pytest.mark.parametrize("processes", ["1", "3"])
@pytest.mark.slow
def test_a_process_that_dies_fails_its_own_test_alone(folder: Path, processes: str) -> None:
    """And the test is not begun again, though what was to follow it is."""
    (folder / "test_some.py").write_text(
        "import os, pytest\n"
        f"begun = {str(folder / 'begun')!r}\n"
        "@pytest.mark.parametrize('n', range(30))\n"
        "def test_lives(n): pass\n"
        "@pytest.mark.xdist_group('g')\n"
        "@pytest.mark.parametrize('n', range(3))\n"
        "def test_dies(n):\n"
        "    open(begun, 'a').write(f'{n}\\n')\n"
        "    if n == 1: os._exit(9)\n"
    )
    options = ("-n", processes, "--dist", "load")
    result = run(folder, *options)
    found = outcomes(folder / "log.jsonl", "k")
    failed = {test.partition("::")[2] for test, e in found.items() if e["outcome"] == "failed"}
    assert failed == {"test_dies[1]"}, result.stdout
    assert len(passed(folder / "log.jsonl", "k")) == 32
    assert sorted((folder / "begun").read_text().split()) == ["0", "1", "2"]
    # What passed is left out, by the processes that replace others too.
    again = run(folder, *options)
    assert "INTERNALERROR" not in again.stdout + again.stderr
    assert sorted((folder / "begun").read_text().split()) == ["0", "1", "1", "2"]


@pytest.mark.slow
def test_a_process_that_replaces_another_finds_the_same_tests(folder: Path) -> None:
    """Though some have passed meanwhile."""
    (folder / "test_some.py").write_text(
        "import os, pytest, time\n"
        "@pytest.mark.parametrize('n', range(40))\n"
        "def test_some(n):\n"
        "    time.sleep(0.01)\n"
        "    if n == 5: os._exit(9)\n"
    )
    result = run(folder, "-n", "2", "--dist", "load")
    assert "INTERNALERROR" not in result.stdout + result.stderr
    assert "1 failed, 39 passed" in result.stdout


@pytest.mark.parametrize(
    "options", tiers.every(2, [(), ("-n", "2", "--dist", "load")]), ids=["one", "xdist"]
)
def test_nothing_left_is_no_failure(folder: Path, options: tuple[str, ...]) -> None:
    (folder / "test_some.py").write_text("def test_good(): pass\n")
    assert [run(folder, *options).returncode for _ in range(2)] == [0, 0]
    (folder / "log.jsonl").unlink()
    (folder / "test_some.py").write_text("")
    assert run(folder, *options).returncode == pytest.ExitCode.NO_TESTS_COLLECTED


@pytest.mark.slow
def test_tests_of_a_group_take_turns(folder: Path) -> None:
    (folder / "test_some.py").write_text(
        "import pathlib, pytest, time\n"
        f"busy = pathlib.Path({str(folder / 'busy')!r})\n"
        "@pytest.mark.xdist_group(name='large')\n"
        "@pytest.mark.parametrize('n', range(8))\n"
        "def test_some(n):\n"
        "    busy.touch(exist_ok=False)\n"
        "    time.sleep(0.05)\n"
        "    busy.unlink()\n"
    )
    assert "8 passed" in run(folder, "-n", "4", "--dist", "load").stdout


@pytest.mark.parametrize("options", [("-n", "1", "--dist", "load"), ()], ids=["xdist", "one"])
def test_a_broken_context_ends_its_process(folder: Path, options: tuple[str, ...]) -> None:
    """Stands in for torch.cuda: after the first failure every call of CUDA fails."""
    (folder / "conftest.py").write_text(
        "import bench.gpu.pytest_log as log\n"
        "broken = []\n"
        "log.context_is_broken = lambda: bool(broken)\n"
    )
    (folder / "test_some.py").write_text(
        "import conftest, pytest\n"
        "def test_breaks():\n"
        "    conftest.broken.append(1)\n"
        "    assert False, 'an illegal memory access'\n"
        "@pytest.mark.parametrize('n', range(4))\n"
        "def test_after(n): assert not conftest.broken\n"
    )
    result = run(folder, *options)
    found = outcomes(folder / "log.jsonl", "k")
    statuses = {test.partition("::")[2]: entry["outcome"] for test, entry in found.items()}
    assert statuses["test_breaks"] == "failed"
    (entry,) = (e for test, e in found.items() if test.endswith("test_breaks"))
    assert "an illegal memory access" in entry["reason"]
    if options:
        assert all(statuses[f"test_after[{n}]"] == "passed" for n in range(4)), result.stdout
    else:
        assert list(statuses) == ["test_breaks"]
        assert result.returncode == 70


def test_a_line_that_was_cut_off_counts_for_nothing(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    whole = {"test": "a", "key": "k", "outcome": "passed", "seconds": 0.1}
    path.write_text(
        json.dumps(whole) + "\n" + json.dumps(whole | {"test": "b"})[:30] + "\n5\n[1]\n{}\n"
    )
    assert passed(path, "k") == {"a"}
    assert passed(tmp_path / "none", "k") == frozenset()
