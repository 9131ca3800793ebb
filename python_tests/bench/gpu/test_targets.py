"""The lists of steps, the first calls, what ncu's page becomes, and the tables."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import powerkernels
from bench import suite
from bench.gpu import depth, first_calls, goals, stub_clock, targets, tick
from bench.gpu.session import Step
from bench.gpu.targets import TARGETS, Setting
from bench.harness import comparison, machine, results, timing
from bench.harness.machine import ROOT


class Built:
    """A compiled part that is there, or is not for a reason."""

    def __init__(self, reason: str | None = None) -> None:
        self.reason, self.waits = reason, 0

    def wait(self, seconds: float) -> str | None:
        self.waits += 1
        return self.reason


def setting(out: Path, *, reason: str | None = None, **options: Any) -> Setting:
    build: Any = Built(reason)
    return Setting(out, build, **{"rehearsal": False, "environment": {}, **options})


def named(steps: list[Step]) -> dict[str, Step]:
    assert len({step.name for step in steps}) == len(steps)
    return {step.name: step for step in steps}


# ---- steps


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_fits_its_time_and_its_files(target: str, tmp_path: Path) -> None:
    steps = TARGETS[target](setting(tmp_path))
    files = {
        Path(argument).name
        for step in steps
        for argument in step.command
        if argument.startswith(str(tmp_path))
    }
    assert len(files) + 2 <= 8  # and the record and the log
    assert all(0 < step.seconds <= 300 for step in steps)


def test_the_parts_are_the_folders_with_gpu_tests() -> None:
    marks = re.compile(r"mark\.gpu|kernel_device|triton_device\.DEVICES")
    found = {
        path.relative_to(ROOT / "python_tests").parts[0]
        for path in (ROOT / "python_tests").glob("*/test_*.py")
        if marks.search(path.read_text())
    }
    assert found == set(targets.PARTS) - {"captures"}
    single = {
        path.name
        for path in (ROOT / "python_tests").glob("test_*.py")
        if re.search(r"^(@|    )pytest\.mark\.gpu", path.read_text(), re.MULTILINE)
    }
    assert single - {"test_collection.py"} == set(targets.CAPTURE_TESTS)
    assert set(targets.BENCH_PARTS) | {targets.JOBS} == set(suite.PARTS)


def test_draws_come_first_and_the_loop_last(tmp_path: Path) -> None:
    steps = list(named(targets.correctness(setting(tmp_path))))
    assert steps[0] == "first calls"
    assert steps[-1] == "tests of power_sampling"
    assert first_calls.entries()[0].name.startswith("sample_tokens")
    chosen = targets.correctness(setting(tmp_path, parts=("logprob",)))
    assert list(named(chosen)) == ["tests of logprob"]


def test_what_needs_the_compiled_part_and_what_is_timed_waits_for_it(tmp_path: Path) -> None:
    """And goes on without it: tests skip by name, and the host repeats the ticks."""
    without = setting(tmp_path, reason="the build failed")
    waiting = set()
    for target in TARGETS.values():
        for step in target(without):
            before = without.build.waits  # type: ignore[attr-defined]
            assert step.ready(1.0) is None
            if without.build.waits > before:  # type: ignore[attr-defined]
                waiting.add(step.name)
    assert waiting == {
        "tests of power_sampling",
        "tests of transition",
        "tests of graph_loop",
        "tests of device_loop",
        "tick",
        "tick, compiled",
        *(f"bench of {part}" for part in (*targets.BENCH_PARTS, targets.JOBS)),
    }


def test_a_pass_is_of_a_device_and_its_versions(tmp_path: Path) -> None:
    def key(**changes: str) -> str:
        environment = {"device": "NVIDIA H100", "torch": "2.11.0", "triton": "3.6.0"} | changes
        step = named(targets.correctness(setting(tmp_path, environment=environment)))
        command = step["tests of logprob"].command
        return command[command.index("--test-log-key") + 1]

    others = ({"device": "NVIDIA H200"}, {"torch": "2.13.0"}, {"triton": "3.7.1"})
    assert len({key(), *(key(**change) for change in others)}) == 4


def test_missing_tools_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    steps = named(targets.deep(setting(tmp_path)))
    assert str(steps["ncu"].why_not()).startswith("ncu is not on PATH")
    for tool in targets.SANITIZERS:
        assert str(steps[tool].why_not()).startswith("compute-sanitizer is not on PATH")


def test_what_moves_memory_is_sanitized(tmp_path: Path) -> None:
    command = named(targets.deep(setting(tmp_path)))["racecheck"].command
    only = command[command.index("--only") + 1 :]
    for op in ("move_positions", "decode_attention", "mh_transition"):
        assert any(name.startswith(op) for name in only)


# ---- the first calls


def test_every_public_op_is_called() -> None:
    names = " ".join(entry.name for entry in first_calls.entries())
    # Checked as whole jobs, or no ops.
    others = {"PowerSampler", "PowerSample", "PowerSamplingConfig", "PolicyLoss", "TokenCovariance"}
    others |= {"TokenSamples", "TokenScores", "CovarianceTable"}
    missing = [name for name in powerkernels.__all__ if name not in names and name not in others]
    assert missing == []
    assert len({entry.name for entry in first_calls.entries()}) == len(first_calls.entries())


def test_one_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(device: torch.device) -> dict[str, float]:
        raise RuntimeError("Global variable NAN has changed\nsince we compiled this kernel")

    calls: list[str] = []

    def right(device: torch.device) -> dict[str, float]:
        calls.append(device.type)
        return {"log_prob": 1e-7}

    entries = [first_calls.Entry("draw", wrong), first_calls.Entry("score", right)]
    monkeypatch.setattr(first_calls, "entries", lambda: entries)
    out = tmp_path / "ops.json"
    assert first_calls.main(["--device", "cpu", "--out", str(out)]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "FAILED  draw: RuntimeError: Global variable NAN has changed"
    assert printed[1].startswith("ok      score: largest error 1e-07")
    assert printed[2] == "1 of 2 ops agree with float64"
    assert calls == ["cpu"] * first_calls.CALLS
    read = targets._first_calls(out)
    assert [op["name"] for op in read["ops"]] == ["draw", "score"]
    assert not out.exists()


@pytest.mark.slow
def test_the_rest_goes_on_in_a_new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_calls, "context_is_broken", lambda: True)
    names = ["sequence_log_likelihood", "token_covariance", "entropy_bonus"]
    out = tmp_path / "ops.json"
    # The first process makes one call; the new one, whose context is whole, makes the others.
    found = first_calls.run(names, torch.device("cpu"), out)
    assert [outcome["name"] for outcome in found] == names
    assert all("errors" in outcome for outcome in found)
    assert [outcome["name"] for outcome in json.loads(out.read_text())] == names
    assert list(tmp_path.iterdir()) == [out]


def test_an_unknown_op_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        first_calls.main(["--only", "no_such_op"])
    assert "unknown 'no_such_op'" in capsys.readouterr().err


# ---- figures, goals and claims


def test_goals_and_claims_are_of_cases_that_are_timed() -> None:
    assert set(goals.GOALS) <= set(suite.KERNELS)
    for claim in goals.CLAIMS:
        kernel = suite.KERNELS[claim.kernel]
        assert any(case.title == claim.case for case in kernel.cases("device")), claim
        variants = [variant.name for variant in kernel.variants if variant.ours]
        assert claim.variant in variants, claim


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the stub clock."""
    path = tmp_path_factory.mktemp("stub") / targets.FIGURES
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "interleaved", timing.interleaved)  # put back afterwards
        patch.setattr(machine, "device_name", machine.device_name)
        status = stub_clock.main(
            ["sample_tokens", "select_top_cov", "--quick", "--peers", "none", "--out", str(path)]
        )
    assert status == 0
    return path


def test_a_rehearsals_times_are_not_taken_for_measured(stub: Path) -> None:
    pytest.importorskip("matplotlib")  # of the plots
    report = importlib.import_module("bench.harness.report")
    for read in (
        results.load,
        report.section,
        lambda path: comparison.compare(results.load(path), results.load(path)),
    ):
        with pytest.raises(ValueError, match="its times were not measured"):
            read(stub)
    assert results.load(stub, stub_clock=True)


def test_the_table_holds_goals_and_no_others_claims(stub: Path) -> None:
    printed = targets._figure_lines(stub)
    assert printed[0] == f"{results.STUB_DEVICE}: not one of these was measured:"
    assert any("sample_tokens" in line and "(goal 77%)" in line for line in printed)
    assert not any("H100" in line for line in printed)


def with_device(stub: Path, path: Path, device: str, ratio: float = 0.5) -> Path:
    """As if it had been measured on a device."""
    data = json.loads(stub.read_text())
    data[results.KEY]["environment"]["device"] = device
    for entry in data["benchmarks"]:
        info = entry["extra_info"]
        if info["kernel"] == "sample_tokens":
            claim = goals.CLAIMS[0]
            info |= {"kernel": claim.kernel, "case": claim.case}
            if info["ours"]:
                info["variant"] = claim.variant
        if info["ours"]:
            info["ratio_to_ceiling"] = ratio
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize(
    ("device", "held"), [("NVIDIA H100 80GB HBM3", True), ("NVIDIA H200", False)]
)
def test_a_claim_stands_beside_figures_of_its_device_only(
    stub: Path, tmp_path: Path, device: str, held: bool
) -> None:
    printed = targets._figure_lines(with_device(stub, tmp_path / "f.json", device))
    assert any("0.89 ms on an H100" in line for line in printed) == held


@pytest.mark.parametrize("name", ["sources", "device", "commit"])
def test_figures_of_another_share_no_file(stub: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / targets.FIGURES
    path.write_text(stub.read_text())
    environment = json.loads(stub.read_text())[results.KEY]["environment"]
    targets.put_aside_of_another(path, environment)
    assert path.exists()
    targets.put_aside_of_another(path, environment | {name: "another"})
    assert not path.exists()
    assert (tmp_path / "gpu-bench-before-1.json").read_text() == stub.read_text()
    path.write_text('{"cut": ')
    targets.put_aside_of_another(path, environment)
    assert (tmp_path / "gpu-bench-before-2.json").exists()


def test_ncu_looks_at_what_misses_its_goal(stub: Path, tmp_path: Path) -> None:
    missed = with_device(stub, tmp_path / "missed.json", "NVIDIA H100", ratio=0.5)
    assert depth.looked_at(missed) == [("score_tokens", goals.CLAIMS[0].variant)]
    other = json.loads(missed.read_text().replace(goals.CLAIMS[0].case, "one row"))
    missed.write_text(json.dumps(other))  # of a size that has no goal
    assert depth.looked_at(missed) == [(kernel, "powerkernels") for kernel in goals.GOALS]
    reached = with_device(stub, tmp_path / "reached.json", "NVIDIA H100", ratio=0.99)
    assert depth.looked_at(reached) == [(kernel, "powerkernels") for kernel in goals.GOALS]
    assert depth.looked_at(tmp_path / "none.json") == depth.looked_at(reached)


# ---- ncu

COLUMNS = (
    "ID",
    "Process ID",
    "Kernel Name",
    "gpu__time_duration.sum",
    "dram__bytes.sum",
    "launch__registers_per_thread",
    "unknown",
)
PAGE = f"""==PROF== Connected to process 4711 (/usr/bin/python3)
some line of the program
==PROF== Profiling "row_sums_kernel" - 0: 0%....100% - 1 pass
{",".join(f'"{column}"' for column in COLUMNS)}
"","","","nsecond","byte","register/thread",""
"0","4711","row_sums_kernel","812,345","2,489,319,424","64","1"
"1","4711","merge_kernel","2,100","n/a","32","1"
"""


def test_ncus_page_becomes_launches() -> None:
    first, second = depth.kernels_of(PAGE)
    assert first == {
        "kernel": "row_sums_kernel",
        "duration": 812345.0,
        "duration_unit": "nsecond",
        "dram_bytes": 2489319424.0,
        "registers": 64.0,
    }
    assert "dram_bytes" not in second
    assert list(depth.kernels_of("==ERROR== nothing was profiled\n")) == []


def test_ncu_leaves_the_clocks_alone() -> None:
    command = depth.command("score_tokens", "powerkernels", "device")
    assert command[command.index("--clock-control") + 1] == "none"
    assert "bench.gpu.one_call" in command


def test_a_kernel_that_ncu_fails_on_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examined: list[str] = []
    launches = list(depth.kernels_of(PAGE))

    def examine(kernel: str, variant: str, size: str) -> dict[str, Any]:
        examined.append(kernel)
        found: dict[str, Any] = {"kernel": kernel, "variant": variant}
        bad = kernel == "sample_tokens" and examined.count(kernel) == 1
        return found | ({"why_not": "==ERROR== driver"} if bad else {"launches": launches})

    monkeypatch.setattr(depth, "examine", examine)
    out = tmp_path / "ncu.json"
    assert depth.main(["--out", str(out)]) == 1
    assert targets._ncu(out)["ncu"][-1]["why_not"] == "==ERROR== driver"
    assert out.exists()
    assert depth.main(["--out", str(out)]) == 0
    assert examined == [*goals.GOALS, "sample_tokens"]
    assert all("launches" in one for one in targets._ncu(out)["ncu"])
    assert not out.exists()


# ---- the tick


def test_a_tick_as_far_as_it_goes_here(tmp_path: Path) -> None:
    out = tmp_path / "tick.json"
    assert tick.main(["--out", str(out), "--rehearsal"]) == 0
    found = json.loads(out.read_text())
    times = found["milliseconds"]
    assert list(times) == [
        "replayed",
        "eager",
        "model step, replayed",
        "one read of the weights",
        "device loop",  # which may hang
    ]
    assert times["eager"] == pytest.approx(1e3 / 2)  # the stub clock's second, over two ticks
    if not torch.cuda.is_available():
        assert "the host drives the loop" in times["device loop"]["why_not"]
        assert "no graph of one" in times["replayed"]["why_not"]
    printed = tick.lines(found)
    assert any("(stub clock)" in line for line in printed)
    assert not any(" ms" in line for line in printed)
