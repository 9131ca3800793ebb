"""csrc/build.py: what it says where it cannot build, and that a failed build changes nothing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import powerkernels

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("csrc_build", ROOT / "csrc" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_version_is_the_packages(
    builder: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert builder.version() == powerkernels.__version__
    with pytest.raises(SystemExit):
        builder.main(["--version"])
    assert capsys.readouterr().out == f"{powerkernels.__version__}\n"


def test_a_package_without_a_version_is_refused(
    builder: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "__init__.py").write_text("__version__ = of_something_else()\n")
    monkeypatch.setattr(builder, "PACKAGE", tmp_path)
    with pytest.raises(RuntimeError, match=r"powerkernels/__init__\.py names no version"):
        builder.version()


def test_the_module_is_put_where_this_python_looks(builder: ModuleType) -> None:
    assert builder.in_place().parent == ROOT / "powerkernels"
    assert builder.in_place().name.startswith(f"_C.{sys.implementation.cache_tag}")


def test_a_missing_nvcc_is_named(
    builder: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("pybind11")
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    target = tmp_path / "_C.so"
    target.write_text("an older module")
    monkeypatch.setattr(builder, "in_place", lambda: target)
    assert builder.main(["--cuda", "on"]) == 1
    assert capsys.readouterr().err == (
        "csrc/build.py: powerkernels._C was not built: "
        "nvcc is neither on PATH nor under CUDA_HOME or CUDA_PATH\n"
    )
    assert target.read_text() == "an older module"


def test_a_missing_tool_is_named(
    builder: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "ninja", None)
    with pytest.raises(RuntimeError, match="ninja was not found"):
        builder.find_tool("ninja")


def test_a_compiler_that_fails_leaves_the_old_module(tmp_path: Path) -> None:
    """In a process of its own, with a compiler that is none."""
    pytest.importorskip("pybind11")
    environment = {**os.environ, "CXX": "/bin/false", "CC": "/bin/false"}
    program = (
        "import importlib.util, pathlib, sys\n"
        f"spec = importlib.util.spec_from_file_location('b', {str(ROOT / 'csrc' / 'build.py')!r})\n"
        "b = importlib.util.module_from_spec(spec); spec.loader.exec_module(b)\n"
        f"b.folder_of = lambda tag: pathlib.Path({str(tmp_path)!r}) / tag\n"
        f"b.in_place = lambda: pathlib.Path({str(tmp_path)!r}) / '_C.so'\n"
        "sys.exit(b.main(['--cuda', 'off']))"
    )
    (tmp_path / "_C.so").write_text("an older module")
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "powerkernels._C was not built" in result.stderr
    assert (tmp_path / "_C.so").read_text() == "an older module"


def test_an_installed_version_is_the_same(builder: ModuleType) -> None:
    try:
        installed = importlib.metadata.version("powerkernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("powerkernels is not installed here")
    assert installed == builder.version()
