"""The jit functions of a package: which there are, which a launch reaches, what they refer to."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

from triton.runtime.jit import JITFunction

_USES_JIT = re.compile(r"^@triton\.jit\b", re.MULTILINE)
_ATOMIC = re.compile(r"\b((?:atom|red)\.[\w.:]+)")


def jit_modules(package: str) -> list[ModuleType]:
    """The package's modules that define jit functions, imported."""
    root = importlib.import_module(package)
    found = []
    for info in pkgutil.walk_packages(root.__path__, f"{package}."):
        finder: Any = info.module_finder
        spec = finder.find_spec(info.name)
        if spec is None or not str(spec.origin).endswith(".py"):
            continue
        if _USES_JIT.search(spec.loader.get_data(spec.origin).decode()):
            found.append(importlib.import_module(info.name))
    return found


def jit_functions(modules: Iterable[ModuleType]) -> dict[str, JITFunction]:
    """By "module:name", those defined there; imported ones are in the module they come from."""
    return {
        f"{module.__name__}:{name}": value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and value.module == module.__name__
    }


def uses(function: JITFunction) -> set[str]:
    """The jit functions that one names."""
    names = {node.id for node in ast.walk(function.parse()) if isinstance(node, ast.Name)}
    found = (function.fn.__globals__.get(name) for name in names)
    return {f"{f.module}:{f.__name__}" for f in found if isinstance(f, JITFunction)}


def unreached(functions: dict[str, JITFunction], launched: Iterable[str]) -> list[str]:
    """Those that no launched kernel is or calls."""
    reached: set[str] = set()
    waiting = [name for name in launched if name in functions]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += uses(functions[name]) & functions.keys()
    return sorted(functions.keys() - reached)


def unsteady_globals(functions: dict[str, JITFunction]) -> list[str]:
    """Globals that a launch after the first one would refuse, as Triton itself compares them."""
    found = []
    for name, function in functions.items():
        assert function.cache_key  # which is when Triton notes what is used
        for (variable, _), (value, owner) in function.used_global_vals.items():
            if variable not in owner or owner[variable] != value:
                found.append(f"{name} uses {variable}, {value}, which is not equal to itself now")
    return found


def atomics(functions: dict[str, JITFunction]) -> dict[str, list[str]]:
    """The atomic instructions in the PTX of all that was compiled, by kernel."""
    found = {}
    for name, function in functions.items():
        texts = [kernel.asm["ptx"] for kernel in _compiled(function)]
        if instructions := sorted({each for text in texts for each in _ATOMIC.findall(text)}):
            found[name] = instructions
    return found


def _compiled(function: JITFunction) -> Iterator[Any]:
    for kernels, *_ in function.device_caches.values():
        yield from kernels.values()
