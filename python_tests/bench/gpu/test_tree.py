"""A tree that was not copied whole is refused in a line, by the command itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu import tree
from python_tests import tiers

ROOT = tree.ROOT


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout without its history."""
    target = tmp_path_factory.mktemp("copy")
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "results", "plots", ".*")
    for name in ("csrc", "powerkernels", "python_tests", "bench"):
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    for name in ("CMakeLists.txt", "setup.py", "pyproject.toml"):
        shutil.copy2(ROOT / name, target / name)
    return target


def test_a_whole_tree(whole: Path) -> None:
    assert tree.why_incomplete(whole) is None
    assert tree.why_incomplete() is None


def said(root: Path) -> str:
    """The line of the command in a tree."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "loop"],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    return result.stderr.strip()


@pytest.mark.parametrize(
    "name",
    tiers.every(
        4,
        [
            "csrc/cuda/graph_loop.cu",
            "csrc/include/powerkernels/graph_loop.h",
            "csrc/build.py",
            "powerkernels/__init__.py",
            "powerkernels/logprob/__init__.py",
            "powerkernels/logprob/kernels.py",
            "python_tests/conftest.py",
            "bench/harness/machine.py",
            "bench/suite.py",
            "bench/gpu/session.py",
            "bench/gpu/readiness.py",
            "CMakeLists.txt",
            "pyproject.toml",
        ],
    ),
)
def test_a_file_that_was_not_copied(whole: Path, name: str) -> None:
    kept = (whole / name).read_bytes()
    (whole / name).unlink()
    try:
        line = said(whole)
    finally:
        (whole / name).write_bytes(kept)
    assert line.startswith("bench.gpu: the tree is incomplete: ")
    assert f"{name} is missing" in line
    assert line.endswith("copy the whole checkout")


@pytest.mark.parametrize("name", ["powerkernels/logprob", "bench/logprob"])
def test_a_folder_that_was_not_copied(whole: Path, tmp_path: Path, name: str) -> None:
    shutil.move(whole / name, tmp_path / "kept")
    try:
        assert f"{name}" in said(whole)
    finally:
        shutil.move(tmp_path / "kept", whole / name)


@pytest.mark.parametrize(
    "name", ["powerkernels/logprob/gpu.py", "bench/harness/machine.py", "bench/gpu/targets.py"]
)
def test_a_file_that_is_cut_off_or_empty(whole: Path, name: str) -> None:
    path = whole / name
    kept = path.read_text()
    try:
        path.write_text(kept[: kept.index("def ") + 6])
        assert f"{name} is cut off or damaged" in said(whole)
        path.write_text("")
        assert f"{name} is empty" in said(whole)
    finally:
        path.write_text(kept)


def test_an_empty_folder(tmp_path: Path) -> None:
    assert tree.why_incomplete(tmp_path) == (
        "the tree is incomplete: CMakeLists.txt is missing; copy the whole checkout"
    )


def test_git_knows_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = ["docs/engines.md is missing", "README.md is missing"]
    monkeypatch.setattr(tree, "_deleted", lambda root: lacking)
    assert tree.why_incomplete() == (
        "the tree is incomplete: docs/engines.md is missing and 1 more; copy the whole checkout"
    )
