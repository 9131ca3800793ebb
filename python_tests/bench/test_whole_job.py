"""The scripts that run whole jobs write the suite's kind of file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.harness import machine, results, whole_job
from bench.harness.cases import Case
from bench.linear_logprob import peak_memory
from bench.memory import peak_bytes
from bench.power_sampling import (
    compare_public_law,
    compare_public_sampler,
    compare_sampler,
    compare_vllm,
)

SCRIPTS = ("compare_sampler", "compare_vllm", "compare_public_sampler", "compare_public_law")
ENVIRONMENT = machine.environment(torch.device("cpu"))


def rows(path: Path) -> dict[str, results.Row]:
    return {row.variant: row for row in results.rows_of(results.load(path))}


def test_a_run_is_a_row(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    case = Case("2 prompts", {"prompts": 2})
    runs = [
        whole_job.Run(case, "one call", {"seconds": 3.0, "noise": {"mean": 0.5, "max": 2.0}}),
        whole_job.Run(case, "two", {"seconds": 4.0, "seconds_of_each": [1.0, 3.0]}, peer="p"),
    ]
    whole_job.document("job", "jobs", runs, ENVIRONMENT, path).write()
    found = rows(path)
    assert found["one call"].info["metrics"] == {"seconds": 3.0, "noise_mean": 0.5, "noise_max": 2}
    assert found["one call"].median == 3.0
    assert found["two"].info["metrics"] == {"seconds": 4.0}
    assert found["two"].quantiles == [1.0, 3.0]
    assert found["two"].info["peer"] == "p"
    suite = results.load(path)["suite"]
    assert suite["finished"]
    assert suite["done"] == ["job: 2 prompts, float32"]
    assert suite["environment"] == ENVIRONMENT


def test_the_samplers_runs(tmp_path: Path) -> None:
    figures = {"seconds": 2.0, "prompts": 16}
    runs = {"both": figures, "one prompt, 1 lane": figures | {"prompts": 2}, "peer": figures}
    path = tmp_path / "a.json"
    made = compare_sampler.job_runs(runs, "bfloat16")
    compare_sampler.write(path, "power_sampler", made)
    found = rows(path)
    assert found["both"].info["shape"]["num_lanes"] == compare_sampler.NUM_LANES
    assert "num_lanes" not in found["one prompt, 1 lane"].info["shape"]
    assert found["one prompt, 1 lane"].case.endswith("2 prompts, one after the other, bfloat16")
    assert (found["peer"].info["peer"], found["peer"].info["ours"]) == ("public-sampler", False)


def processes(results: dict[str, dict[str, Any]]) -> SimpleNamespace:
    """In the place of `subprocess`: a run prints the result of its name."""

    def run(command: list[str], **options: object) -> SimpleNamespace:
        name = command[command.index("--only") + 1]
        return SimpleNamespace(stdout=json.dumps(results[name]) + "\n")

    return SimpleNamespace(run=run, PIPE=subprocess.PIPE)


def test_the_commands_write_what_their_processes_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "a.json"
    monkeypatch.setattr(sys, "path", list(sys.path))
    both = {"both": {"seconds": 4.0, "prompts": 16}}
    monkeypatch.setattr(compare_sampler, "subprocess", processes(both))
    monkeypatch.setattr(sys, "argv", ["a", "--runs", "both", "--output", str(path)])
    compare_sampler.main()
    assert rows(path)["both"].median == 4.0

    found = {name: {"seconds": float(n + 2)} for n, name in enumerate(compare_vllm.RUNS)}
    monkeypatch.setattr(compare_vllm, "subprocess", processes(found))
    monkeypatch.setattr(sys, "argv", ["a", "--dtype", "float32", "--output", str(path)])
    compare_vllm.main()
    assert {row.info["dtype"] for row in rows(path).values()} == {"float32"}
    assert rows(path)["vllm"].info["metrics"] == {"seconds": 3.0, "share_of_lockstep": 1.5}


def test_the_public_samplers_runs(tmp_path: Path) -> None:
    each = [1.0, 2.0, 3.0, 4.0]
    ours = {"seconds": 10.0, "seconds_of_each": each, "prompts": 4, "kept_tokens": 20}
    public = {"seconds": 60.0, "seconds_of_each": [20.0, 40.0], "prompts": 2, "kept_tokens": 10}
    runs: dict[str, dict[str, Any]] = {
        compare_public_sampler.ONE_BY_ONE: ours | {"seconds_per_prompt": 2.5},
        compare_public_sampler.AT_ONCE: ours | {"seconds_per_prompt": 2.5},
        compare_public_sampler.PUBLIC: public | {"seconds_per_prompt": 30.0},
    }
    for run in runs.values():
        compare_public_sampler.with_rates(run)
    compare_public_sampler.compare(runs)
    path = tmp_path / "a.json"
    compare_sampler.write(path, "mcmc_power_samp", compare_public_sampler.runs_of(runs, [0, 1]))
    found = rows(path)[compare_public_sampler.ONE_BY_ONE]
    assert found.info["shape"]["prompts"] == 2
    assert found.info["metrics"]["times_faster_per_prompt"] == pytest.approx(12.0)
    assert found.stats["rounds"] == 4


def test_the_laws_of_the_public_function(tmp_path: Path) -> None:
    figures = {"seconds": 1.0, "draws": 10, **{law: {"chi2": 3.0} for law in ("a", "b")}}
    path = tmp_path / "a.json"
    compare_sampler.write(path, "mcmc_power_samp", [compare_public_law.job_run(figures)])
    metrics = rows(path)["public"].info["metrics"]
    assert metrics == {"seconds": 1.0, "draws": 10, "a_chi2": 3.0, "b_chi2": 3.0}


@pytest.mark.skipif(peak_bytes(lambda: None) is None, reason="no peak memory on this system")
def test_peak_memory_writes_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    sizes = ["--rows", "300", "--dim", "64", "--vocab", "4000", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["peak_memory.py", *sizes, "--output", str(path)])
    peak_memory.main()
    row = rows(path)["powerkernels"]
    assert row.kernel == "linear_score_tokens_fwd_bwd"
    assert row.info["metrics"]["logits_megabytes"] == 300 * 4000 * 2 / 1e6
    assert row.info["metrics"]["gradients_megabytes"] == (300 + 4000) * 64 * 2 / 1e6
    assert row.info["peak_megabytes"] == row.info["metrics"]["peak_megabytes"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_scripts_start(name: str) -> None:
    script = machine.ROOT / "bench" / "power_sampling" / f"{name}.py"
    subprocess.run([sys.executable, str(script), "--help"], check=True, capture_output=True)


def test_a_script_is_named_by_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    script = machine.ROOT / "bench" / "power_sampling" / "compare_sampler.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--runs", "one prompt, 1 lane"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    expected = "python bench/power_sampling/compare_sampler.py --runs 'one prompt, 1 lane'"
    assert machine.command_line() == expected
    monkeypatch.setattr(sys, "argv", ["/usr/bin/powerkernels", "bench"])
    assert machine.command_line() == "powerkernels bench"
