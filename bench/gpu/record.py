"""The JSON of a target: its environment and its steps, written anew after every step."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

SCHEMA = 1
KEY = "gpu_record"
Status = Literal["passed", "failed", "timed out", "skipped", "stopped", "not reached"]
STATUSES: tuple[Status, ...] = get_args(Status)
# A record goes on only where these are as they were: figures of two devices share no file.
SAME = ("device", "rehearsal")


class Record:
    """What a target has done so far, in `path`.

    Args:
        target: its name, e.g. "correctness".
        environment: of `bench.harness.machine`, with "rehearsal".
        path: the file; what it holds of the same target and device is gone on with, and what it
            holds of another is put beside it.
    """

    def __init__(self, target: str, environment: dict[str, Any], path: Path) -> None:
        self.path = path
        self.put_aside: Path | None = None
        self.data: dict[str, Any] = {
            KEY: {"schema": SCHEMA, "target": target},
            "environment": environment,
            "started": _now(),
            "steps": {},
        }
        before = _read(path)
        if before is None:
            return
        if _goes_on(before, target, environment):
            self.data["steps"] = before["steps"]
            self.data["started"] = before["started"]
        else:
            self.put_aside = free_name(path)
            path.rename(self.put_aside)

    @property
    def steps(self) -> dict[str, dict[str, Any]]:
        """Outcome of each step that has one, by its name."""
        found: dict[str, dict[str, Any]] = self.data["steps"]
        return found

    def set(self, name: str, status: Status, **entry: Any) -> None:
        """Keep a step's outcome, in the file too."""
        self.steps[name] = {"status": status, "when": _now(), **entry}
        self.write()

    def write(self) -> None:
        """Whole or not at all: beside the file first, then in its place."""
        beside = self.path.with_name(f".{self.path.name}.part")
        beside.write_text(json.dumps(self.data, indent=1, allow_nan=False) + "\n")
        os.replace(beside, self.path)


def load(path: Path) -> dict[str, Any]:
    """A record's data.

    Raises:
        ValueError: there is no such file, or it is no record of this schema.
    """
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    for reason in problems(data):
        raise ValueError(f"{path} is no record of bench.gpu: {reason}")
    found: dict[str, Any] = data
    return found


def problems(data: Any) -> Iterator[str]:
    """What is wrong with a record, by its schema; nothing if it is one."""
    head = data.get(KEY) if isinstance(data, dict) else None
    if not isinstance(head, dict):
        yield f"it has no {KEY!r}"
        return
    if head.get("schema") != SCHEMA:
        yield f"its schema is {head.get('schema')!r}, and this version reads {SCHEMA}"
        return
    environment = data.get("environment")
    if not isinstance(environment, dict):
        yield "it has no environment"
        return
    for name in ("device", "torch", "triton", "python", "sources", "rehearsal"):
        if name not in environment:
            yield f"its environment has no {name!r}"
    if not isinstance(data.get("steps"), dict):
        yield "it has no steps"
        return
    for name, step in data["steps"].items():
        if not isinstance(step, dict):
            yield f"step {name!r} is {step!r}"
            continue
        if step.get("status") not in STATUSES:
            yield f"step {name!r} has status {step.get('status')!r}"
        if not isinstance(step.get("sources"), str):
            yield f"step {name!r} does not say of which sources it is"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        data: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:  # cut off
        return {}
    return data


def _goes_on(before: dict[str, Any], target: str, environment: dict[str, Any]) -> bool:
    if next(problems(before), None) is not None or before[KEY]["target"] != target:
        return False
    return all(before["environment"][name] == environment[name] for name in SAME)


def free_name(path: Path) -> Path:
    """Beside a file, where nothing is yet."""
    number = 1
    while (beside := path.with_name(f"{path.stem}-before-{number}{path.suffix}")).exists():
        number += 1
    return beside


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
