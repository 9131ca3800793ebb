"""`python -m bench.gpu`: statuses and last words, with steps that take no time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from signal import getsignal
from typing import Any

import pytest

from bench.gpu import command, readiness
from bench.gpu.record import load
from bench.gpu.session import Step
from bench.harness.machine import ROOT

NAMES = ("correctness", "loop", "figures", "depth")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Runs the command; `build` is what the build says, `bad` the target whose step fails."""

    def run(*arguments: str, build: str | None = None, bad: str = "", signal: bool = False) -> int:
        class Build:
            def __init__(self, log: Path) -> None:
                pass

            def wait(self, seconds: float) -> str | None:
                return build

            def end(self) -> None:
                pass

        def steps(target: str) -> Callable[[Any], list[Step]]:
            code = "raise SystemExit(1)" if target == bad else ""
            if signal and target == bad:
                code = "import os, signal; os.kill(os.getppid(), signal.SIGTERM)"
            step = Step(f"step of {target}", [sys.executable, "-c", code], 30, sources=())
            return lambda setting: [step]

        monkeypatch.setattr(readiness, "Build", Build)
        monkeypatch.setattr(command, "TARGETS", {target: steps(target) for target in NAMES})
        before = [getsignal(number) for number in command.STOPPING]
        code = command.main([*arguments, "--out", str(tmp_path / "out")])
        # Else what stops this process later would be taken for a signal to the command.
        assert [getsignal(number) for number in command.STOPPING] == before
        return int(code)

    return run


def test_a_rehearsal_goes_through_all_four(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("rehearsal") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("a rehearsal: no GPU is used, nothing is measured")
    assert printed.rstrip().endswith("the compiled part with CUDA: built")
    for target in NAMES:
        data = load(tmp_path / "out" / f"gpu-{target}.json")
        assert data["environment"]["rehearsal"] is True
        assert data["environment"]["device"] == "none (stub clock)"
        assert data["steps"][f"step of {target}"]["status"] == "passed"
    assert (tmp_path / "out" / "gpu.log").exists()


@pytest.mark.parametrize("target", NAMES)
def test_a_rehearsal_says_what_would_not_go_through(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], target: str
) -> None:
    assert run("rehearsal", bad=target) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"would not go through: gpu-{target}"
    assert f"step of {target}: failed in" in "\n".join(printed)


def test_a_build_that_fails_fails_the_rehearsal_where_there_is_an_nvcc(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readiness, "why_no_program", lambda name, advice: None)
    assert run("rehearsal", build="error: no such header") == 1
    assert capsys.readouterr().out.splitlines()[-1] == "would not go through: the build"
    monkeypatch.setattr(readiness, "why_no_program", lambda name, advice: "not on PATH")
    assert run("rehearsal", build="nvcc is neither on PATH nor under CUDA_HOME") == 0
    assert "the compiled part with CUDA: nvcc is neither" in capsys.readouterr().out


def test_a_signal_ends_it_with_a_line(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("rehearsal", bad="loop", signal=True) == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"bench.gpu: stopped by SIGTERM; what was done is in {tmp_path / 'out'}"
    )
    assert load(tmp_path / "out" / "gpu-correctness.json")["steps"]


@pytest.mark.parametrize("budget", ["0", "-1", "nan", "soon"])
def test_a_budget_that_is_none(budget: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["rehearsal", "--budget", budget])
    assert "--budget" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["loop", "rehearsal", "figures"])
def test_a_part_that_a_target_does_not_have(
    target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main([target, "--part", "covariance"])
    assert f"{target} has no part 'covariance'" in capsys.readouterr().err


def test_fresh_figures_are_beside_the_old(run: Callable[..., int], tmp_path: Path) -> None:
    assert run("rehearsal") == 0
    kept = tmp_path / "out" / "gpu-bench.json"
    kept.write_text("figures")
    assert run("rehearsal") == 0
    assert kept.exists()
    assert run("rehearsal", "--fresh") == 0
    assert not kept.exists()
    assert (tmp_path / "out" / "gpu-bench-before-1.json").read_text() == "figures"


def test_make_asks_for_no_pip_with_an_interpreter_of_ones_own() -> None:
    for target in ("gpu-correctness", "gpu-loop", "gpu-figures", "gpu-depth", "gpu-rehearsal"):
        made = subprocess.run(
            ["make", "-n", target, "SYSTEM_PYTHON=1", f"PYTHON={sys.executable}", "OUT=/tmp/out"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert (
            f"{sys.executable} -m bench.gpu {target.removeprefix('gpu-')} --out '/tmp/out'" in made
        )
        assert "pip" not in made


def test_make_names_what_such_an_interpreter_lacks(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    made = subprocess.run(
        ["make", "gpu-loop", "SYSTEM_PYTHON=1", f"PYTHON={bare}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert made.returncode != 0
    assert "lacks torch, triton, numpy, pytest, pytest_benchmark" in made.stderr


def test_options_reach_the_command() -> None:
    options = ["OUT=/an o", "PART=logprob covariance", "BUDGET=100", "FRESH=1"]
    made = subprocess.run(
        ["make", "-n", "gpu-correctness", "SYSTEM_PYTHON=1", f"PYTHON={sys.executable}", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "--out '/an o' --part logprob --part covariance --budget 100 --fresh" in made
