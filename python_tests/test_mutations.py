"""The mutation check itself: its faults fit the sources, and it tells what the tests have seen."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from python_tests.mutations.__main__ import ROOT, chosen, main
from python_tests.mutations.faults import FAULTS, Fault
from python_tests.mutations.run import BROKEN, CAUGHT, HUNG, SURVIVED, Outcome, files_of, try_fault

# What the kernels, the samplers and the losses consist of.
FAMILIES = {
    "cli",
    "covariance",
    "decode attention",
    "engine",
    "graph loop",
    "jobs",
    "lane moves",
    "launch path",
    "linear_score_tokens",
    "packed linear",
    "philox",
    "policy loss",
    "ranks",
    "records",
    "sample_tokens",
    "score_tokens",
    "sequence_log_likelihood",
    "transition",
}
NEEDS_GIT = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_a_fault_fits(fault: Fault) -> None:
    changed = fault.applied_to((ROOT / fault.file).read_text())
    if fault.file.endswith(".py"):
        compile(changed, fault.file, "exec")
    assert fault.tests
    for test in fault.tests:
        file, _, name = test.partition("::")
        assert (ROOT / file).exists()
        assert not name or re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE)


def test_faults_are_of_all_families_and_languages() -> None:
    assert {fault.family for fault in FAULTS} == FAMILIES
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 24
    for kind in ("csrc/cpu/", "kernels.py", "reference.py", "functional.py", "gpu.py"):
        assert any(kind in fault.file for fault in FAULTS), kind


def test_a_fault_that_does_not_fit_is_named() -> None:
    fault = Fault("slip", "toy", "", "toy.py", "a", "b", ("test_toy.py",))
    assert fault.applied_to("xay") == "xby"
    with pytest.raises(ValueError, match=r"slip: what it changes is in toy.py 2 times, not 1"):
        fault.applied_to("aa")
    with pytest.raises(ValueError, match=r"slip: .* 0 times"):
        fault.applied_to("")
    with pytest.raises(ValueError, match=r"slip: it changes nothing"):
        replace(fault, new="a").applied_to("a")


def test_faults_are_chosen_by_name_or_family() -> None:
    philox = chosen(FAULTS, ["philox", "length-term-cpp"])
    assert {fault.family for fault in philox} == {"philox", "transition"}
    assert chosen(FAULTS, []) == list(FAULTS)
    with pytest.raises(ValueError, match="no fault and no family is called nothing"):
        chosen(FAULTS, ["philox", "nothing"])


TOY = {
    "toy/__init__.py": "LIMIT = 5\ndef added(a, b):\n    return min(a + b, LIMIT)\n",
    "toy/late.py": "def doubled(a):\n    return 2 * a\n",
    "test_toy.py": """
import pytest, toy

@pytest.fixture
def two():
    return toy.added(1, 1) // (toy.LIMIT > 3)

def test_added(two):
    assert toy.added(two, 2) == 4

def test_late():
    from toy import late
    assert late.doubled(2) == 4

@pytest.mark.slow
def test_limit():
    assert toy.added(4, 4) == 5
""",
    "test_red.py": "import toy\ndef test_red(): assert toy.LIMIT == 6\n",
    "test_slow.py": "import pytest, toy\n@pytest.mark.slow\ndef test_it(): assert toy.LIMIT == 5\n",
    "pytest.ini": "[pytest]\nmarkers =\n    slow: left out\n",
}


def toy_fault(name: str, old: str, new: str, tests: str = "test_toy.py", file: str = "") -> Fault:
    return Fault(name, "toy", f"what {name} is", file or "toy/__init__.py", old, new, (tests,))


TOY_FAULTS = (
    toy_fault("minus", "a + b", "a - b"),
    toy_fault("low limit", "LIMIT = 5", "LIMIT = 4"),
    toy_fault("no import", "LIMIT = 5", "import no_such_module"),
    toy_fault("no fixture", "LIMIT = 5", "LIMIT = 3"),
    toy_fault("no late import", "2 * a", "2 *", file="toy/late.py"),
    toy_fault("no name", "2 * a", "2 * b", file="toy/late.py"),
    toy_fault("red before", "a + b", "a - b", "test_red.py"),
    toy_fault("slow alone", "a + b", "a - b", "test_slow.py"),
)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # they take a second to import
    root = tmp_path / "toy project"
    for name, text in TOY.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    return root


@NEEDS_GIT
def test_what_is_caught_and_what_is_not(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {name: (toy / name).stat().st_mtime_ns for name in TOY}
    file = tmp_path / "results.json"
    arguments = ["--jobs", "2", "--json", str(file)]
    assert main(arguments, faults=TOY_FAULTS, root=toy, package="toy") == 1
    rows = {row["name"]: row for row in json.loads(file.read_text())}
    assert list(rows) == [fault.name for fault in TOY_FAULTS]
    verdicts = {name: row["verdict"] for name, row in rows.items()}
    assert verdicts.pop("minus") == CAUGHT
    assert rows["minus"]["test"] == "test_toy.py::test_added"
    assert rows["minus"]["why"] == "AssertionError: assert -2 == 4"
    assert verdicts.pop("low limit") == SURVIVED
    assert set(verdicts.values()) == {BROKEN}
    whys = {
        "no import": "no_such_module",
        "no fixture": "ZeroDivisionError",
        "no late import": "SyntaxError",
        "no name": "NameError",
        "red before": "without the fault: test_red.py::test_red",
        "slow alone": "none of its tests is run",
    }
    for name, why in whys.items():
        assert why in rows[name]["why"]

    out, err = capsys.readouterr()
    table = out.splitlines()
    assert re.match(
        r"minus +caught +\d+  test_toy.py::test_added: AssertionError: assert -2 == 4$", table[1]
    )
    assert re.match(r"low limit +SURVIVED +\d+  2 tests passed", table[2])
    assert table[9].startswith("8 faults: 1 caught, 1 SURVIVED, 6 BROKEN, in ")
    assert table[10] == "* low limit, that nobody catches: what low limit is"
    assert "minus: caught" in err
    assert {name: (toy / name).stat().st_mtime_ns for name in TOY} == before
    assert not list(toy.rglob("__pycache__"))


@NEEDS_GIT
def test_exit_status(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"faults": TOY_FAULTS, "root": toy, "package": "toy"}
    assert main(["--no-control", "minus"], **options) == 0
    assert main(["--list", "toy"], **options) == 0
    (toy / "toy" / "__init__.py").write_text("def added(a, b):\n    return b + a\n")
    capsys.readouterr()
    assert main(["minus"], **options) == 2
    assert "minus: what it changes is in toy/__init__.py 0 times" in capsys.readouterr().err


class HangingTree:
    def run_with(self, fault: Fault) -> Outcome:
        return Outcome(HUNG, "", "no end within 1 s")


@pytest.mark.parametrize(("may_hang", "verdict"), [(False, HUNG), (True, CAUGHT)])
def test_tests_that_hang_have_caught_only_what_may_hang(may_hang: bool, verdict: str) -> None:
    fault = replace(TOY_FAULTS[0], may_hang=may_hang)
    result = try_fault(HangingTree(), fault, None)
    assert (result.verdict, result.is_good) == (verdict, may_hang)


@NEEDS_GIT
def test_the_copy_is_what_git_lists_and_the_compiled_part(toy: Path) -> None:
    (toy / ".gitignore").write_text("*.so\nbuild/\n")
    (toy / "build").mkdir()
    (toy / "build" / "left.out").touch()
    (toy / "toy" / "_C.cpython-311.so").touch()
    assert set(files_of(toy)) == {*TOY, ".gitignore", "toy/_C.cpython-311.so"}
