"""Steps within a budget: what is kept, what is run again, and what ends a run."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from bench.gpu import session as session_module
from bench.gpu.record import KEY, Record, load, problems
from bench.gpu.session import Session, Step, Stopped
from bench.harness import machine
from bench.harness.machine import ROOT, digest
from python_tests import tiers

ENVIRONMENT = {
    "device": "NVIDIA H100 80GB HBM3",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "python": "3.12.3",
    "sources": "0123456789abcdef",
    "rehearsal": False,
}


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Session]:
    def session(budget: float = 60.0, said: list[str] | None = None, **options: Any) -> Session:
        record = Record("loop", dict(ENVIRONMENT), tmp_path / "gpu-loop.json")
        said = [] if said is None else said
        return Session(record, tmp_path / "gpu.log", budget, said.append, **options)

    return session


def step(name: str, code: str = "", **options: Any) -> Step:
    options = {"seconds": 30, "sources": (), **options}
    return Step(name, [sys.executable, "-c", code], **options)


def counting(path: Path) -> str:
    """A program that leaves a line in a file each time it runs."""
    return f"open({str(path)!r}, 'a').write('run\\n')"


def is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_outcomes_are_in_the_file_and_the_log(make: Callable[..., Session], tmp_path: Path) -> None:
    said: list[str] = []
    steps = [
        step("good", "print('fine')", read=lambda: {"detail": "all of it", "found": [1, 2]}),
        step("bad", "import sys; print('why it is bad'); sys.exit(3)"),
        step("killed", "import os; os.kill(os.getpid(), 9)"),
        step("absent", why_not=lambda: "ncu is not on PATH"),
        step("waits", ready=lambda seconds: "the build failed"),
        Step("no program", ["/nonexistent/program"], 5, sources=()),
    ]
    assert not make(said=said).run(steps)
    data = load(tmp_path / "gpu-loop.json")
    found = {name: (each["status"], each["detail"]) for name, each in data["steps"].items()}
    assert found == {
        "good": ("passed", "all of it"),
        "bad": ("failed", "exit status 3"),
        "killed": ("failed", "ended by SIGKILL"),
        "absent": ("skipped", "ncu is not on PATH"),
        "waits": ("failed", "the build failed"),
        "no program": (
            "failed",
            "/nonexistent/program does not start: No such file or directory",
        ),
    }
    assert data["steps"]["good"]["found"] == [1, 2]
    assert "fine" in (tmp_path / "gpu.log").read_text()
    assert any("why it is bad" in line for line in said)
    assert list(problems(data)) == []


def test_a_step_that_hangs_ends_with_its_children(
    make: Callable[..., Session], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "GRACE_SECONDS", 0.2)
    child = tmp_path / "child"
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "deaf = ('import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); '\n"
        "        'time.sleep(99)')\n"
        "process = subprocess.Popen([sys.executable, '-c', deaf])\n"
        f"open({str(child)!r}, 'w').write(str(process.pid))\n"
        "print('begun', flush=True)\n"
        "time.sleep(99)"
    )
    hanging = step("hangs", code, seconds=3, read=lambda: {"detail": "what it had left"})
    session = make()
    monkeypatch.setattr(session_module, "MIN_SECONDS", 1.0)
    begin = time.monotonic()
    assert not session.run([hanging, step("next")])
    assert time.monotonic() - begin < 20
    steps = load(tmp_path / "gpu-loop.json")["steps"]
    assert steps["hangs"]["status"] == "timed out"
    assert steps["hangs"]["detail"] == "after 3 s; what it had left"
    assert steps["next"]["status"] == "passed"
    process = int(child.read_text())
    for _ in range(100):  # until what was killed is reaped
        if not is_there(process):
            break
        time.sleep(0.05)
    assert not is_there(process)


def test_what_the_budget_does_not_hold_is_not_reached(
    make: Callable[..., Session], tmp_path: Path
) -> None:
    said: list[str] = []
    budget = session_module.MIN_SECONDS - 1
    assert not make(budget, said).run([step("first"), step("second")])
    steps = load(tmp_path / "gpu-loop.json")["steps"]
    assert {each["status"] for each in steps.values()} == {"not reached"}
    assert said == [f"{name}: not reached, the time was used up" for name in ("first", "second")]


def test_a_later_run_goes_on(make: Callable[..., Session], tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    broken = [step("good", counting(runs)), step("bad", "raise SystemExit(1)")]
    assert not make().run(broken)
    mended = [step("good", counting(runs)), step("bad")]
    said: list[str] = []
    assert make(said=said).run(mended)
    assert said[0] == "good: passed before"
    assert len(runs.read_text().splitlines()) == 1
    assert make(fresh=True).run(mended)
    assert len(runs.read_text().splitlines()) == 2


def test_what_passed_at_other_sources_comes_last(
    make: Callable[..., Session], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = tmp_path / "order"

    def noting(name: str, status: int = 0) -> Step:
        code = f"open({str(order)!r}, 'a').write({name + chr(10)!r}); raise SystemExit({status})"
        return step(name, code)

    make().run([noting("a"), noting("b", 1), noting("c")])
    monkeypatch.setattr(session_module, "digest", lambda sources: "of other sources")
    order.unlink()
    assert make().run([noting("a"), noting("b"), noting("c")])
    assert order.read_text().split() == ["b", "a", "c"]
    sources = {each["sources"] for each in load(tmp_path / "gpu-loop.json")["steps"].values()}
    assert sources == {"of other sources"}


def test_a_pass_at_other_sources_is_kept_where_the_time_is_up(
    make: Callable[..., Session], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make().run([step("a")])
    before = load(tmp_path / "gpu-loop.json")["steps"]["a"]
    monkeypatch.setattr(session_module, "digest", lambda sources: "of other sources")
    assert make(budget=1).run([step("a")])
    assert load(tmp_path / "gpu-loop.json")["steps"]["a"] == before


def test_a_bench_goes_on_behind_a_broken_context(
    make: Callable[..., Session], tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    code = (
        f"{counting(runs)}; import sys; sys.exit(70 * (len(open({str(runs)!r}).readlines()) < 3))"
    )
    assert make().run([step("a", code, goes_on=True)])
    assert len(runs.read_text().splitlines()) == 3
    runs.unlink()
    assert not make(fresh=True).run([step("a", code)])


def test_what_never_ran_comes_before_what_failed(
    make: Callable[..., Session], tmp_path: Path
) -> None:
    order = tmp_path / "order"

    def noting(name: str, status: int = 0) -> Step:
        code = f"open({str(order)!r}, 'a').write({name + chr(10)!r}); raise SystemExit({status})"
        return step(name, code)

    make().run([noting("a", 1)])
    make().run([noting("a", 1), noting("b")])
    assert order.read_text().split() == ["a", "b", "a"]


def test_what_an_earlier_run_found_is_kept(make: Callable[..., Session], tmp_path: Path) -> None:
    """Where the time is up, and where only a part is asked for."""
    bad = step("a", "raise SystemExit(1)", read=lambda: {"found": 7})
    make().run([bad, step("b")])
    before = load(tmp_path / "gpu-loop.json")["steps"]
    assert not make(budget=1).run([bad])
    assert load(tmp_path / "gpu-loop.json")["steps"] == before
    assert before["a"]["found"] == 7


def test_a_device_that_is_gone_ends_the_run(make: Callable[..., Session], tmp_path: Path) -> None:
    said: list[str] = []
    asked: list[str] = []

    def fault() -> str:
        asked.append("asked")
        return "RuntimeError: CUDA error: unspecified launch failure"

    steps = [step("good"), step("bad", "raise SystemExit(1)"), step("c"), step("d")]
    assert not make(said=said, device_fault=fault).run(steps)
    assert asked == ["asked"]
    found = {name: s["status"] for name, s in load(tmp_path / "gpu-loop.json")["steps"].items()}
    assert found == {"good": "passed", "bad": "failed", "c": "not reached", "d": "not reached"}
    line = next(text for text in said if "no longer answers" in text)
    assert line.startswith("the device no longer answers after bad: RuntimeError: CUDA error")
    assert str(tmp_path / "gpu-loop.json") in line


@pytest.mark.parametrize("number", tiers.every(2, [signal.SIGTERM, signal.SIGINT]))
def test_a_signal_keeps_what_is_done(tmp_path: Path, number: signal.Signals) -> None:
    """A process of its own, as the command line has it."""
    program = f"""
import signal, sys
from pathlib import Path
from bench.gpu.command import _on_signal
from bench.gpu.record import Record
from bench.gpu.session import Session, Step, Stopped
folder = Path({str(tmp_path)!r})
signal.signal(signal.SIGTERM, _on_signal)
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job lacks
record = Record("loop", {ENVIRONMENT!r}, folder / "gpu-loop.json")
session = Session(record, folder / "gpu.log", 60, lambda text: print(text, flush=True))
steps = [
    Step("good", [sys.executable, "-c", ""], 30, sources=()),
    Step("slow", [sys.executable, "-c", "import time; time.sleep(60)"], 60, sources=()),
]
try:
    session.run(steps)
except Stopped as error:
    sys.exit(f"stopped by {{error}}")
"""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("slow"):
                    break
            time.sleep(0.3)
            process.send_signal(number)
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    assert errors.splitlines()[-1] == f"stopped by {name}"
    steps = load(tmp_path / "gpu-loop.json")["steps"]
    assert steps["good"]["status"] == "passed"
    assert (steps["slow"]["status"], steps["slow"]["detail"]) == ("stopped", name)


def test_results_that_are_cut_off_do_not_end_the_run(
    make: Callable[..., Session], tmp_path: Path
) -> None:
    def cut_off() -> dict[str, Any]:
        return json.loads('{"half": ')

    assert make().run([step("a", read=cut_off), step("b")])
    detail = load(tmp_path / "gpu-loop.json")["steps"]["a"]["detail"]
    assert detail.startswith("its results are unreadable: JSONDecodeError")


# ---- the record


@pytest.mark.parametrize(
    "change", [{"device": "NVIDIA H200"}, {"rehearsal": True}], ids=["device", "rehearsal"]
)
def test_two_devices_share_no_file(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "gpu-figures.json"
    first = Record("figures", dict(ENVIRONMENT), path)
    first.set("bench of logprob", "passed", sources="", detail=None)
    other = Record("figures", ENVIRONMENT | change, path)
    assert other.steps == {}
    assert other.put_aside == tmp_path / "gpu-figures-before-1.json"
    assert load(other.put_aside)["environment"]["device"] == ENVIRONMENT["device"]
    other.write()
    again = Record("figures", dict(ENVIRONMENT), path)
    assert again.put_aside == tmp_path / "gpu-figures-before-2.json"


STEPS = json.dumps({KEY: {"schema": 1}, "environment": ENVIRONMENT, "steps": {"a": 3}})


@pytest.mark.parametrize("text", ["", '{"gpu_record": {"sch', '{"suite": {}}', "[]", STEPS])
def test_a_file_that_is_no_record_is_put_aside(tmp_path: Path, text: str) -> None:
    path = tmp_path / "gpu-loop.json"
    path.write_text(text)
    record = Record("loop", dict(ENVIRONMENT), path)
    assert record.steps == {}
    assert record.put_aside is not None
    assert record.put_aside.read_text() == text


def test_a_record_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    path = tmp_path / "gpu-loop.json"
    record = Record("loop", dict(ENVIRONMENT), path)
    record.set("a", "passed", sources="")
    good = load(path)
    for change, reason in (
        (lambda data: data.pop(KEY), "no 'gpu_record'"),
        (lambda data: data[KEY].update(schema=99), "schema is 99"),
        (lambda data: data["environment"].pop("sources"), "no 'sources'"),
        (lambda data: data["steps"]["a"].update(status="fine"), "status 'fine'"),
        (lambda data: data["steps"]["a"].pop("sources"), "of which sources"),
    ):
        data = json.loads(json.dumps(good))
        change(data)
        path.write_text(json.dumps(data))
        with pytest.raises(ValueError, match=reason):
            load(path)


def test_the_digest_is_that_of_the_sources(tmp_path: Path) -> None:
    for folder in ("powerkernels", "csrc"):
        (tmp_path / folder).mkdir()
    source = tmp_path / "powerkernels" / "a.py"
    source.write_text("x = 1\n")
    before = digest(("powerkernels", "csrc"), tmp_path)
    (tmp_path / "powerkernels" / "_C.so").write_text("built")
    (tmp_path / "powerkernels" / "a.pyc").write_text("cached")
    assert digest(("powerkernels", "csrc"), tmp_path) == before
    source.write_text("x = 2\n")
    assert digest(("powerkernels", "csrc"), tmp_path) != before
    assert digest(("csrc",), tmp_path) == digest(("csrc",), tmp_path)


def test_stopped_is_no_error_of_a_step() -> None:
    assert not issubclass(Stopped, (RuntimeError, OSError, ValueError))


# ---- in the report


@pytest.fixture
def report() -> ModuleType:
    pytest.importorskip("matplotlib")  # of the plots
    return importlib.import_module("bench.harness.report")


def test_a_record_is_a_section_of_the_report(report: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "gpu_loop_h100.json"
    record = Record("loop", ENVIRONMENT | {"commit": "0123456789abcdef"}, path)
    record.set("tests of transition", "passed", sources="", detail="17 passed", seconds=31.0)
    times = {"device loop": 4.25, "eager": {"why_not": "RuntimeError: no"}}
    record.set("tick", "passed", sources="", tick={"lanes": 64, "milliseconds": times})
    text = report.section(path)
    assert "device NVIDIA H100 80GB HBM3" in text
    assert "commit 0123456789" in text
    assert "| tests of transition | passed | 31 | 17 passed |" in text
    assert "| device loop | 4.25 |" in text
    assert "| eager | RuntimeError: no |" in text


def test_a_rehearsals_record_is_refused_by_the_report(report: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "gpu_loop.json"
    Record("loop", ENVIRONMENT | {"rehearsal": True}, path).write()
    with pytest.raises(ValueError, match="nothing in it was measured"):
        report.section(path)


def test_the_commit_of_a_tree_without_its_history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "git", lambda *arguments: None)
    monkeypatch.setenv(machine.COMMIT, "4b825dc642cb")
    environment = machine.environment(torch.device("cpu"))
    assert (environment["commit"], environment["changed"]) == ("4b825dc642cb", None)
    monkeypatch.delenv(machine.COMMIT)
    assert machine.environment(torch.device("cpu"))["commit"] is None
