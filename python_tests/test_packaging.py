"""What pyproject.toml, the constraints, the Makefile and the workflows say of one another."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import powerkernels
from powerkernels import doctor

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
ACTIONS = {"actions/checkout", "actions/setup-python", "actions/upload-artifact"}
# Files that may name the version, besides those of history.
MAY_SAY_IT = ("powerkernels", "csrc", "pyproject.toml", "setup.py", "CMakeLists.txt", "Makefile")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads(read("pyproject.toml"))


def makefile_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", read("Makefile"), re.MULTILINE))


def test_the_version_stands_in_one_place() -> None:
    files = [
        file
        for name in MAY_SAY_IT
        for file in ([ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*"))
        if file.suffix in {".py", ".toml", ".txt", ".cpp", ".h", ".cu", ""} and file.is_file()
    ]
    says = re.compile(rf"""["']{re.escape(powerkernels.__version__)}["']""")
    holders = [file for file in files if says.search(file.read_text(encoding="utf-8"))]
    assert holders == [ROOT / "powerkernels" / "__init__.py"]


def test_setuptools_reads_the_version_without_importing_torch(pyproject: dict[str, Any]) -> None:
    assert pyproject["project"]["dynamic"] == ["version"]
    assert "version" not in pyproject["project"]
    program = (
        "import sys\nsys.modules['torch'] = None\n"
        "from setuptools.config.pyprojecttoml import read_configuration\n"
        "print(read_configuration('pyproject.toml')['project']['version'])"
    )
    pytest.importorskip("setuptools", minversion="77")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == powerkernels.__version__, done.stderr


def test_the_newest_entry_of_the_changelog_is_this_version() -> None:
    newest = re.search(r"^## \[(.+?)\]", read("CHANGELOG.md"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == powerkernels.__version__


def test_one_oldest_python(pyproject: dict[str, Any]) -> None:
    oldest = PYTHONS[0]
    found = {
        "pyproject.toml": pyproject["project"]["requires-python"].removeprefix(">="),
        "ruff": pyproject["tool"]["ruff"]["target-version"].replace("py3", "3."),
        "mypy": pyproject["tool"]["mypy"]["python_version"],
        "doctor": ".".join(map(str, doctor.OLDEST_PYTHON)),
        "README.md": re.findall(r"need Python (\S+) or newer", read("README.md"))[0],
        "CMakeLists.txt": re.findall(r"find_package\(Python (\S+) ", read("CMakeLists.txt"))[0],
        "Makefile": re.findall(r"make: Python (\S+) or newer", read("Makefile"))[0],
    }
    assert set(found.values()) == {oldest}
    checked = re.findall(r"sys\.version_info >= \((\d+), (\d+)\)", read("Makefile"))
    assert checked == [tuple(oldest.split("."))]


def test_classifiers_name_the_pythons_that_have_wheels(pyproject: dict[str, Any]) -> None:
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(pyproject["project"]["classifiers"]))
    assert tuple(named) == PYTHONS
    # The license is an SPDX expression, beside which a classifier is refused (PEP 639).
    assert not any("License ::" in one for one in pyproject["project"]["classifiers"])


def test_every_python_has_one_pin_of_a_package() -> None:
    packaging = pytest.importorskip("packaging.requirements")
    lines = [line.partition("#")[0].strip() for line in read("constraints.txt").splitlines()]
    pins = [packaging.Requirement(line) for line in lines if line]
    for python in PYTHONS:
        names = [
            pin.name.lower()
            for pin in pins
            if pin.marker is None or pin.marker.evaluate({"python_version": python})
        ]
        assert len(names) == len(set(names)), python
    assert all(len(pin.specifier) == 1 and "==" in str(pin.specifier) for pin in pins)


def test_cibuildwheel_builds_ten_wheels() -> None:
    pytest.importorskip("cibuildwheel")
    command = [sys.executable, "-m", "cibuildwheel", "--print-build-identifiers"]
    done = subprocess.run(
        [*command, "--platform", "linux"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert sorted(done.stdout.split()) == sorted(
        f"cp{python.replace('.', '')}-manylinux_{processor}"
        for python in PYTHONS
        for processor in ("x86_64", "aarch64")
    )


def test_a_wheel_is_tried_alike_by_both_targets(pyproject: dict[str, Any]) -> None:
    tests = re.search(r"^WHEEL_TESTS := (.+)$", read("Makefile"), re.MULTILINE)
    assert tests is not None
    assert all((ROOT / name).is_file() for name in tests[1].split())
    settings = pyproject["tool"]["cibuildwheel"]
    doctor_command, pytest_command = settings["test-command"]
    assert pytest_command == f"pytest -q -p no:cacheprovider {tests[1]}"
    tried = doctor_command.removeprefix("env ").replace(" powerkernels", " env/bin/powerkernels")
    assert f"{tried};" in read("Makefile")
    assert f"whl {' '.join(settings['test-requires'])};" in read("Makefile")


def test_there_are_workflows() -> None:
    assert {file.stem for file in WORKFLOWS} == {"lint", "tests", "wheels"}


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflow_runs_targets_of_the_makefile(file: Path) -> None:
    yaml = pytest.importorskip("yaml")
    text = file.read_text(encoding="utf-8")
    assert text.startswith("# Not yet run on GitHub.")
    jobs = yaml.safe_load(text)["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    for step in steps:
        assert ("run" in step) != ("uses" in step)
        if "run" in step:
            command, *targets = shlex.split(step["run"])
            assert command == "make"
            assert targets
            assert set(targets) <= makefile_targets()
        else:
            action, _, tag = step["uses"].partition("@")
            assert action in ACTIONS
            assert re.fullmatch(r"v\d+(\.\d+)*", tag)
    assert any("run" in step for step in steps)


def test_the_tests_run_on_every_python() -> None:
    yaml = pytest.importorskip("yaml")
    (workflow,) = (file for file in WORKFLOWS if file.stem == "tests")
    (job,) = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"].values()
    assert tuple(job["strategy"]["matrix"]["python"]) == PYTHONS
