from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from powerkernels import _extension

needs_extension = pytest.mark.skipif(
    _extension.extension() is None, reason=f"no compiled part: {_extension.why_missing()}"
)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_either_a_module_or_a_reason():
    assert (_extension.extension() is None) == (_extension.why_missing() is not None)


def test_backend_by_environment(monkeypatch):
    monkeypatch.setenv("POWERKERNELS_BACKEND", "reference")
    assert _extension.backend_for("cpu") == "reference"
    monkeypatch.setenv("POWERKERNELS_BACKEND", "auto")
    assert _extension.backend_for("cpu") == ("cpp" if _extension.extension() else "reference")
    assert _extension.backend_for(torch.device("meta")) == "reference"
    monkeypatch.setenv("POWERKERNELS_BACKEND", "cpp")
    with pytest.raises(RuntimeError, match=r"POWERKERNELS_BACKEND=cpp.*not cuda"):
        _extension.backend_for("cuda")
    monkeypatch.setenv("POWERKERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"POWERKERNELS_BACKEND.*fast"):
        _extension.backend_for("cpu")


def test_triton_serves_cuda_and_interpreted_cpu_tensors(monkeypatch):
    if _extension.why_no_triton() is not None:
        pytest.skip("Triton is not installed")
    monkeypatch.setenv("POWERKERNELS_BACKEND", "auto")
    assert _extension.backend_for("cuda") == "triton"
    monkeypatch.setenv("POWERKERNELS_BACKEND", "triton")
    assert _extension.backend_for("cuda") == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert _extension.backend_for("cpu") == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match=r"POWERKERNELS_BACKEND=triton.*not cpu"):
        _extension.backend_for("cpu")


def test_without_triton_a_gpu_has_the_reference():
    code = """
import sys; sys.modules['triton'] = None
from powerkernels import _extension as e
print(e.backend_for('cuda'))
"""
    assert run(code, POWERKERNELS_BACKEND="auto").stdout.strip() == "reference"
    result = run(code, POWERKERNELS_BACKEND="triton")
    assert result.returncode != 0
    assert "POWERKERNELS_BACKEND=triton, but that backend is not there: triton" in result.stderr


HIDE_MODULE = "import sys; sys.modules['powerkernels._C'] = None\n"
OLD_MODULE = "import sys, types; sys.modules['powerkernels._C'] = types.ModuleType('_C')\n"
SCORE = """
import torch
from powerkernels import _extension, score_tokens
print(_extension.why_missing())
print(_extension.backend_for('cpu'))
print(score_tokens(torch.zeros(1, 4), torch.tensor([0])).log_prob.exp().item())
"""


@pytest.mark.parametrize(
    ("prelude", "reason"),
    [(HIDE_MODULE, "not built"), (OLD_MODULE, "another version.*score_tokens")],
)
def test_without_the_module_everything_works_and_says_why(prelude, reason):
    result = run(prelude + SCORE)
    assert result.returncode == 0, result.stderr
    why, backend, probability = result.stdout.splitlines()
    assert re.search(reason, why)
    assert backend == "reference"
    assert float(probability) == pytest.approx(0.25)


def test_asking_for_a_missing_backend_is_an_error():
    result = run(HIDE_MODULE + SCORE, POWERKERNELS_BACKEND="cpp")
    assert result.returncode != 0
    assert "POWERKERNELS_BACKEND=cpp" in result.stderr
    assert "not built" in result.stderr


@needs_extension
def test_simd_level_by_environment(monkeypatch):
    monkeypatch.delenv("POWERKERNELS_SIMD", raising=False)  # of the run
    code = "from powerkernels import _extension as e; print(e.compiled().simd_level())"
    assert run(code, POWERKERNELS_SIMD="baseline").stdout.strip() == "baseline"
    assert run(code).stdout.strip() == _extension.compiled().highest_simd_level()
    result = run(code, POWERKERNELS_SIMD="sse9")
    assert result.returncode != 0
    assert (
        "POWERKERNELS_SIMD: SIMD level must be baseline, avx2 or avx512, got sse9" in result.stderr
    )


@needs_extension
def test_the_thread_team_is_torchs():
    code = """
import torch
from powerkernels import _extension as e, score_tokens
score_tokens(torch.zeros(8, 65536), torch.zeros(8, dtype=torch.int64))
print(e.compiled().parallel_backend())
maps = open('/proc/self/maps').read().split()
print(len({word for word in maps if 'omp' in word.rsplit('/', 1)[-1] and '.so' in word}))
"""
    if not Path("/proc/self/maps").exists():
        pytest.skip("no /proc")
    result = run(code)
    team, runtimes = result.stdout.split()
    assert (team, runtimes) == ("openmp", "1")


@needs_extension
def test_cuda_devices_are_reported_without_a_driver_too():
    info = _extension.compiled().cuda_devices()
    assert info["count"] == len(info["devices"])
    assert info["count"] > 0 or info["error"]
    for device in info["devices"]:
        assert device["name"]
        assert device["compute_capability"] >= (5, 0)
