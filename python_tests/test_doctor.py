"""`powerkernels doctor`: what it says about a whole machine, and about one where things are
missing or broken.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from powerkernels import _extension, doctor
from powerkernels.cli import main
from powerkernels.doctor import Check
from powerkernels.power_sampling import graph_loop


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_this_machine_is_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text
    assert "backend on cpu" in text
    assert "everything that powerkernels requires is here" in text


def test_json_is_the_same_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    checks = {check["name"]: check for check in report["checks"]}
    assert {
        "python",
        "torch",
        "compiled part",
        "backend on cpu",
        "nvcc",
        "CUDA device",
        "smollm2",
    } <= set(checks)
    assert checks["torch"]["detail"].startswith(torch.__version__)


def test_device_loop_says_why_the_host_drives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_loop, "why_no_graph_loop", lambda device: "the driver is too old")
    check = by_name(doctor.examine())["device loop"]
    assert check.status == "missing"
    assert check.detail.startswith("the driver is too old; the host drives")

    monkeypatch.setattr(graph_loop, "why_no_graph_loop", lambda device: None)
    assert by_name(doctor.examine())["device loop"].status == "ok"


def test_every_missing_thing_comes_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> str:
        raise doctor.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(shutil, "which", lambda *args, **kwargs: None)
    monkeypatch.setattr(doctor.importlib.metadata, "version", nothing)
    monkeypatch.setattr(_extension, "extension", lambda: None)
    monkeypatch.setattr(_extension, "why_missing", lambda: "no compiler when it was installed")
    checks = by_name(doctor.examine())
    for name in (
        "C++ compiler",
        "cmake",
        "ninja",
        "nvcc",
        "triton",
        "compiled part",
        "transformers",
        "gguf",
    ):
        assert checks[name].status == "missing", name
        assert checks[name].advice, name
    assert "no compiler when it was installed" in checks["compiled part"].detail
    assert checks["numpy"].status == "broken"  # required, unlike the rest


def test_broken_requirement_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(device: Any) -> str:
        raise RuntimeError("POWERKERNELS_BACKEND=cpp, but the compiled part is not here")

    monkeypatch.setattr(_extension, "backend_for", refuse)
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "broken: backend on cpu" in text
    assert "unset POWERKERNELS_BACKEND" in text


def test_torch_that_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    (check,) = doctor._torch()
    assert check.status == "broken"
    assert check.advice == "pip install torch"


def test_machine_without_torch() -> None:
    """The report is for such machines, so it must not need torch itself."""
    code = (
        "import sys\nsys.modules['torch'] = None\nfrom powerkernels.cli import main\n"
        "sys.exit(main(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "broken: torch" in done.stdout
    assert "pip install torch" in done.stdout


def test_extension_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash() -> str:
        raise OSError("libstdc++.so.6: version not found")

    monkeypatch.setattr(
        _extension, "extension", lambda: SimpleNamespace(simd_level=crash, __file__="_C.so")
    )
    (check,) = doctor._extension()
    assert check.status == "broken"
    assert "libstdc++" in check.detail


def test_driver_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash() -> bool:
        raise RuntimeError("CUDA driver version is insufficient\nfor this runtime")

    monkeypatch.setattr(torch.cuda, "is_available", crash)
    check = by_name(doctor._cuda())["CUDA device"]
    assert (check.status, check.detail) == ("missing", "CUDA driver version is insufficient")


def test_program_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*args: Any, **kwargs: Any) -> None:
        raise subprocess.TimeoutExpired("c++", 10)

    monkeypatch.setattr(subprocess, "run", hang)
    check = doctor._program("C++ compiler", sys.executable, "advice")
    assert check.status == "missing"
    assert "does not answer" in check.detail
