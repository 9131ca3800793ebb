"""The suite's cases by pytest-benchmark's own command line.

    pytest bench --benchmark-only --quick -k "score_tokens and powerkernels"

A test is a variant of a case of `bench.suite`. Its result is compared with float64 first, then the
`benchmark` fixture times it: by itself, on one set of inputs, and beside no ceiling. `powerkernels
bench` takes variants in turn, cold and sustained, and makes the files of bench/results/.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import suite
from bench.harness import peers, runner, timing
from bench.harness.cases import Case, Kernel, Size, Variant
from powerkernels._cuda_graph import on_device
from powerkernels.models import find_device

pytestmark = pytest.mark.filterwarnings("ignore")  # of what peers and torch.compile import


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    size: Size = "device" if find_device("auto").type == "cuda" else "host"
    if metafunc.config.getoption("--quick"):
        size = "quick"
    found = [
        pytest.param(kernel, case, variant, id=f"{kernel.name}-{case.title}-{variant.name}")
        for kernel in suite.KERNELS.values()
        for case in kernel.cases(size)
        for variant in kernel.variants
        if case.main or not variant.main_only
    ]
    metafunc.parametrize(("kernel", "case", "variant"), found)


def test_kernel(benchmark: Any, kernel: Kernel, case: Case, variant: Variant) -> None:
    device = find_device("auto")
    settings = runner.Settings("quick", device, frozenset(peers.PEERS))
    if reason := runner.why_not(variant, case, settings):
        pytest.skip(reason)
    with (on_device if kernel.whole_job else timing.capture_stream)(device):
        inputs = kernel.inputs(case, device)
        call = variant.bind(inputs)
        expectation = runner.Expectation(kernel, inputs)
        errors = expectation.check(expectation.part_of(call()))

        def run() -> None:
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        benchmark.group = f"{kernel.name}: {case.title}"
        benchmark.extra_info |= {"variant": variant.name, "shape": case.shape, "errors": errors}
        if kernel.whole_job:
            benchmark.pedantic(run, rounds=1)
        else:
            benchmark(run)
