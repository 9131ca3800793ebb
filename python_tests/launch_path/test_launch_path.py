"""Every op launches on a GPU as far as that can be known without one, at the first call and after.

In a process of its own: in this one the kernels may be interpreted. The fast tier has the calls
that reach every kernel; the long list, and other versions of Triton, are for `make test-launches`.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed"
    ),
    pytest.mark.xdist_group("launch_path"),  # each list is called once
]

ROOT = Path(__file__).parents[2]
CALLS = "python_tests.launch_path.calls"
TOY_CALLS = "python_tests.launch_path.toy_calls"
ARCHES = (80, 90, 100)
# Set by `make test-launches`, the second to folders, each with a Triton that is not the
# installed one.
LONG = pytest.mark.skipif(not os.environ.get("LAUNCH_PATH_LONG"), reason="for make test-launches")
TRITONS = ["", *filter(None, os.environ.get("LAUNCH_PATH_TRITONS", "").split(os.pathsep))]
# Seconds, of a process that has hung.
TIMEOUT = 3600
# What is compiled by tiles of each architecture, or is as large as its shared memory; the rest is
# launched alike on all of them, and the ahead-of-time gate compiles it for all.
BY_ARCH = ("linear_score_tokens fused", "decode_attention", "score_tokens in place")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "python_tests.launch_path", *arguments],
        cwd=ROOT,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT,
    )


@functools.cache
def report_of(*arguments: str, triton: str = "") -> dict[str, Any]:
    path = [triton, str(ROOT)] if triton else [str(ROOT)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        done = run("--json", str(file), *arguments, PYTHONPATH=os.pathsep.join(path))
        assert file.exists(), done.stdout + done.stderr
        report = json.loads(file.read_text())
    sys.stdout.write("\n" + done.stdout)
    wrong = any(report[key] for key in ("failures", "not_launched", "globals"))
    assert done.returncode == (1 if wrong else 0), done.stdout + done.stderr
    return report


def check(report: dict[str, Any]) -> None:
    """Nothing that a GPU would refuse, and nothing that was not called."""
    found = [f"{f['call']}, {f['when']}: {f['error']}" for f in report["failures"]]
    found += [f"{name} was not launched" for name in report["not_launched"]]
    found += report["globals"]
    found += [
        f"{kernel}: {name} orders what nobody waits for"
        for kernel, names in report["atomics"].items()
        for name in names
        if is_ordered(name)
    ]
    if found:
        where = f"triton {report['triton']}, sm_{report['arch']}"
        pytest.fail("\n  ".join([f"{where}:", *found]), pytrace=False)


def is_ordered(atomic: str) -> bool:
    """Those of shared memory say nothing, and are relaxed."""
    return bool({"acq_rel", "acquire", "release"} & set(atomic.split(".")))


@pytest.mark.parametrize("options", [("--brief",), pytest.param((), marks=pytest.mark.slow)])
def test_calls(options: tuple[str, ...]) -> None:
    report = report_of(*options)
    check(report)
    # Twice, and once more in each of two orders.
    assert min(report["kernels"].values()) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 100])
def test_calls_by_architecture(arch: int) -> None:
    check(report_of("--arch", str(arch), *BY_ARCH))


@LONG
@pytest.mark.parametrize("triton", TRITONS)
def test_long_list(triton: str) -> None:
    report = report_of("--full", triton=triton)
    check(report)
    if triton:
        assert report["triton"] in (Path(triton) / "triton" / "__init__.py").read_text()


@LONG
@pytest.mark.parametrize("arch", [80, 100])
@pytest.mark.parametrize("triton", TRITONS)
def test_short_list_on_all_architectures(triton: str, arch: int) -> None:
    check(report_of("--arch", str(arch), triton=triton))


def toys(triton: str = "") -> dict[str, Any]:
    return report_of("--from", TOY_CALLS, triton=triton)


# Named here and not imported: the toys' module imports Triton and is for the other process.
BAD_TOYS = {
    "NaN global": "Global variable NAN has changed",
    "changed global": "Global variable FACTOR has changed",
    "empty grid": "grid x must be 1 to 2147483647, got 0",
    "grid x": "grid x must be 1 to 2147483647, got 2147483648",
    "grid y": "grid y must be 1 to 65535, got 65536",
    "grid z": "grid z must be 1 to 65535, got 65536",
    "programs": "at most 2147483647 programs, got 4294967296",
    "grid of floats": "grid x must be an int, got 40.0",
    "shared memory": "out of resource: shared memory",
    "threads": "out of resource: threads",
    "scratch": "global_scratch_size must be 0 where none is declared",
    "descriptor stride": "strides must be 16-byte aligned",
    "descriptor address": "base must be 16-byte aligned",
    "host tensor": "x_ptr is a tensor of the host's memory",
    "no guard": "x_ptr is on device 1, launched on 0",
    "unknown option": "no_such was specified but unrecognised",
    "item": "cannot be called on meta tensors",
    "copy from the host": "1 copies from the host",
    "no launch": "launches made: 0",
}


@pytest.mark.parametrize("triton", TRITONS)
@pytest.mark.parametrize(("name", "message"), BAD_TOYS.items())
def test_bad_toy_is_refused(name: str, message: str, triton: str) -> None:
    (failure,) = (f for f in toys(triton)["failures"] if f["call"] == name)
    assert message in failure["error"]
    assert failure["when"] == ("second" if name == "changed global" else "first")


@pytest.mark.parametrize("triton", TRITONS)
def test_good_toys_are_taken(triton: str) -> None:
    report = toys(triton)
    refused = {failure["call"] for failure in report["failures"]}
    assert refused == set(BAD_TOYS)
    assert set(report["calls"]) - refused == {
        "good",
        "good matmul",
        "good descriptor",
        "good atomic",
    }


TOYS = "python_tests.launch_path.toy_kernels:"


@pytest.mark.parametrize("triton", TRITONS)
def test_what_is_not_launched_is_named(triton: str) -> None:
    assert toys(triton)["not_launched"] == [
        TOYS + name
        for name in ("forgotten_helper", "forgotten_kernel", "nan_kernel", "scratch_kernel")
    ]


@pytest.mark.parametrize("triton", TRITONS)
def test_globals_that_a_second_launch_would_refuse_are_named(triton: str) -> None:
    found = toys(triton)["globals"]
    assert [line.partition(",")[0] for line in found] == [
        TOYS + "nan_kernel uses NAN",
        TOYS + "changed_kernel uses FACTOR",
    ]


@pytest.mark.parametrize("triton", TRITONS)
def test_ordered_atomics_are_seen(triton: str) -> None:
    atomics = toys(triton)["atomics"]
    assert atomics.keys() == {TOYS + "ordered_kernel"}
    assert any(map(is_ordered, atomics[TOYS + "ordered_kernel"]))


def test_interpreter_is_refused() -> None:
    done = run(TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "unset it" in done.stderr


def test_unknown_call_is_refused() -> None:
    done = run("no_such")
    assert done.returncode == 2
    assert "no call begins with ['no_such']" in done.stderr
