"""What a machine or a tree lacks is said in a line."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.gpu import readiness
from bench.harness.machine import ROOT
from python_tests import tiers

# ---- the device


def test_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert readiness.why_no_device() == f"torch {torch.__version__} is built without CUDA"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "The NVIDIA driver on your system is too old (found version 12020). Please update it\n"
            "and a second line"
        ),
        RuntimeError("Found no NVIDIA driver on your system."),
        AssertionError("Torch not compiled with CUDA enabled"),
    ],
    ids=["too old", "none", "assertion"],
)
def test_a_driver_that_will_not_do(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def init() -> None:
        warnings.warn("CUDA initialization: something is off", UserWarning, stacklevel=2)
        raise error

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    assert readiness.why_no_device() == str(error).splitlines()[0]


def test_a_device_that_no_longer_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: object, **options: object) -> SimpleNamespace:
        trace = "Traceback …\nRuntimeError: CUDA error: device-side assert triggered\n"
        return SimpleNamespace(returncode=1, stderr=trace)

    monkeypatch.setattr(subprocess, "run", run)
    fault = readiness.device_fault()
    assert fault == "RuntimeError: CUDA error: device-side assert triggered"

    def hang(*arguments: object, **options: object) -> None:
        raise subprocess.TimeoutExpired("python", 60)

    monkeypatch.setattr(subprocess, "run", hang)
    assert readiness.device_fault() == "a kernel has not ended in 60 s"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("target", tiers.every(4, ["correctness", "loop", "figures", "depth"]))
def test_the_targets_say_so_in_a_line(target: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.gpu", target, "--out", str(tmp_path / "out")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("bench.gpu: ")
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


# ---- the compiled part


@pytest.fixture
def builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for csrc/build.py; the stamp is not the checkout's."""
    monkeypatch.setattr(readiness, "BUILD", tmp_path / "build.py")
    monkeypatch.setattr(readiness, "STAMP", tmp_path / "stamp" / "compiled-sources")
    return tmp_path / "build.py"


def build(builder: Path, program: str) -> tuple[str | None, str | None]:
    """What two waits for it say."""
    builder.write_text(program)
    log = builder.parent / "gpu-build.log"
    made = readiness.Build(log)
    return made.wait(20), made.wait(20)


def test_a_build_that_goes_well(builder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([False, True, True])
    monkeypatch.setattr(readiness, "has_cuda_part", lambda: next(looks))
    assert build(builder, "print('compiling')") == (None, None)
    assert readiness.STAMP.read_text() == readiness.compiled_sources()
    assert not (builder.parent / "gpu-build.log").exists()


def test_a_build_that_fails(builder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "has_cuda_part", lambda: False)
    reasons = build(builder, "raise SystemExit('powerkernels._C was not built: no nvcc')")
    assert reasons == ("powerkernels._C was not built: no nvcc",) * 2
    assert not readiness.STAMP.exists()


def test_an_extension_without_cuda(builder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "has_cuda_part", lambda: False)
    reasons = build(builder, "")
    assert reasons == ("the compiled part is without CUDA: python csrc/build.py --cuda on",) * 2


def test_a_build_that_takes_too_long(builder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "has_cuda_part", lambda: False)
    builder.write_text("import time; time.sleep(60)")
    made = readiness.Build(builder.parent / "log")
    assert made.wait(0.1) == "the build of the compiled part takes longer than 0 s"
    made.end()
    assert made.wait(20) is not None


def test_nothing_is_built_twice(builder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "has_cuda_part", lambda: True)
    assert build(builder, "raise SystemExit('built again')") == (None, None)


def test_a_program_that_is_not_there() -> None:
    found = readiness.why_no_program("no-such-ncu", "part of the CUDA toolkit")
    assert found == "no-such-ncu is not on PATH (part of the CUDA toolkit)"
    assert readiness.why_no_program("sh", "") is None


def test_a_folder_that_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert readiness.why_no_folder(tmp_path / "new" / "folder") is None
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    file = tmp_path / "file"
    file.touch()
    expected = f"--out: nothing can be kept in {file}: File exists"
    assert readiness.why_no_folder(file) == expected

    def full(dir: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(readiness.tempfile, "TemporaryFile", full)
    expected = f"--out: nothing can be kept in {tmp_path}: No space left on device"
    assert readiness.why_no_folder(tmp_path) == expected
