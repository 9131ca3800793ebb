"""`pytest bench` runs the suite's own cases through pytest-benchmark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import suite
from bench import test_suite as front
from bench.harness.accuracy import WrongResultError
from bench.harness.cases import Variant
from bench.harness.machine import ROOT
from python_tests.bench import toy


def pytest_bench(*arguments: str) -> str:
    command = [sys.executable, "-m", "pytest", "bench", "-q", "--quick"]
    command += ["-p", "no:cacheprovider", *arguments]
    # As if nobody had started it: a process of xdist's would not be timed.
    environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_every_kernel_is_collected() -> None:
    lines = set(pytest_bench("--collect-only").splitlines())
    for kernel in suite.KERNELS.values():
        for case in kernel.cases("quick"):
            name = f"{kernel.name}-{case.title}-{kernel.variants[0].name}"
            assert f"bench/test_suite.py::test_kernel[{name}]" in lines


def test_a_quick_case_is_timed(tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    chosen = ("-k", "sample_tokens and powerkernels", f"--benchmark-json={out}")
    pytest_bench("--benchmark-only", "--benchmark-max-time=0.1", *chosen)
    data = json.loads(out.read_text())
    (entry,) = data["benchmarks"]
    (case,) = suite.KERNELS["sample_tokens"].cases("quick")
    assert entry["group"] == f"sample_tokens: {case.title}"
    assert entry["extra_info"]["shape"] == case.shape
    assert entry["extra_info"]["errors"]["token"] == 0
    assert entry["stats"]["median"] > 0
    assert "commit" in data["machine_info"]["powerkernels"]


class Recorder:
    """In the place of the `benchmark` fixture."""

    def __init__(self) -> None:
        self.calls, self.extra_info = 0, dict[str, object]()

    def __call__(self, run: object) -> None:
        self.calls += 1


def test_a_wrong_result_is_not_timed() -> None:
    wrong = Variant("wrong", toy.bound(toy.wrong))
    kernel, right = toy.kernel([wrong]), Recorder()
    (case,) = kernel.cases("quick")
    front.test_kernel(right, kernel, case, toy.OURS)
    assert (right.calls, right.extra_info["errors"]) == (1, {"y": 0.0})
    benchmark = Recorder()
    with pytest.raises(WrongResultError, match="y is off by"):
        front.test_kernel(benchmark, kernel, case, wrong)
    assert benchmark.calls == 0
