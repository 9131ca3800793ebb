"""What a copied tree lacks, in a line: by the standard library alone, before other imports."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("powerkernels", "python_tests", "bench")
# Besides what these files name.
FILES = (
    "setup.py",
    "csrc/build.py",
    "pyproject.toml",
    "python_tests/conftest.py",
    "python_tests/tiers.py",
)


def why_incomplete(root: Path = ROOT) -> str | None:
    """What a tree that was copied lacks, in a line; None if nothing is missing.

    With git's own list where there is one; otherwise by what the files name: every source of
    CMakeLists.txt and every module of ours that is imported is there, and every Python file whole.
    """
    lacking = _deleted(root) or list(_missing(root))
    if not lacking:
        return None
    more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
    return f"the tree is incomplete: {lacking[0]}{more}; copy the whole checkout"


def _deleted(root: Path) -> list[str]:
    """By git, where the tree has its history."""
    try:
        found = subprocess.run(
            ["git", "ls-files", "--deleted"], cwd=root, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return []
    return [f"{name} is missing" for name in found.stdout.splitlines() if name]


def _missing(root: Path) -> Iterator[str]:
    cmake = root / "CMakeLists.txt"
    if not cmake.is_file():
        yield "CMakeLists.txt is missing"
        return
    sources = re.findall(r"csrc/[\w/]+\.(?:cpp|cu)", cmake.read_text())
    headers = [
        f"csrc/include/{name}"
        for source in sources
        if (root / source).is_file()
        for name in re.findall(r'#include "(powerkernels/[\w/]+\.h)"', (root / source).read_text())
    ]
    for name in dict.fromkeys([*FILES, *sources, *headers]):
        if not (root / name).is_file():
            yield f"{name} is missing"
        elif not (root / name).stat().st_size:
            yield f"{name} is empty"
    for folder in FOLDERS:
        if not (root / folder).is_dir():
            yield f"{folder}/ is missing"
            continue
        for path in [*sorted((root / folder).rglob("*.py")), root / "csrc" / "build.py"]:
            if path.is_file():
                yield from _damage(path, root)


def _damage(path: Path, root: Path) -> Iterator[str]:
    name, text = path.relative_to(root), path.read_text(errors="replace")
    if not text and path.name != "__init__.py":
        yield f"{name} is empty"
        return
    try:
        parsed = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        yield f"{name} is cut off or damaged ({getattr(error, 'msg', error)})"
        return
    if path.parts[-2] != "csrc" and not (path.parent / "__init__.py").is_file():
        yield f"{name.parent / '__init__.py'} is missing"
    for node in ast.walk(parsed):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from _absent(root, node.module, [alias.name for alias in node.names])
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield from _absent(root, alias.name, [])


def _absent(root: Path, module: str, names: list[str]) -> Iterator[str]:
    """Files of ours that an import needs."""
    parts = module.split(".")
    if parts[0] not in FOLDERS or module == "powerkernels._C":
        return
    path = root.joinpath(*parts)
    if not path.is_dir():
        if not path.with_suffix(".py").is_file():
            yield f"{'/'.join(parts)}.py is missing"
        return
    initial = path / "__init__.py"
    if not initial.is_file():
        yield f"{'/'.join(parts)}/__init__.py is missing"
        return
    known = initial.read_text()
    for name in names:
        if not re.search(rf"\b{re.escape(name)}\b", known) and not (
            (path / name).is_dir() or (path / f"{name}.py").is_file() or name == "_C"
        ):
            yield f"{'/'.join(parts)}/{name}.py is missing"
