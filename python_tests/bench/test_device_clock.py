"""The clock of a GPU: graphs where calls can be captured, plain calls where they cannot."""

from __future__ import annotations

import pytest
import torch

from bench.harness import ceilings, timing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.xdist_group("gpu_clock"),  # what else the device does would be timed too
]

PLAN = timing.Plan(0.0, min_rounds=5, max_rounds=5)
BYTES = 2**26


def test_graphs_and_calls_that_wait_for_the_host() -> None:
    device = torch.device("cuda")
    x = torch.randn(BYTES // 4, device=device)
    calls = {
        "captured": [lambda: x.mul(2.0)],
        "waits": [lambda: float(x.sum())],
        "four times": [lambda: [x.mul(2.0) for _ in range(4)]],
    }
    samples = timing.interleaved(calls, device, PLAN)
    assert samples["captured"].graph
    assert samples["waits"].graph is False
    assert samples["waits"].why_no_graph
    for taken in samples.values():
        assert len(taken.cold) == len(taken.sustained) == 5
        assert min(taken.cold + taken.sustained) > 0
    ratio = timing.median(samples["four times"].sustained) / timing.median(
        samples["captured"].sustained
    )
    assert 2.5 < ratio < 6


def test_ceilings_are_of_the_order_of_the_machine() -> None:
    found = ceilings.measure(torch.device("cuda"), "host")
    assert found["copy, GB/s"] > 50
    assert found["read, GB/s"] > 50
    assert found["matmul bfloat16, TFLOP/s"] > 0.1
