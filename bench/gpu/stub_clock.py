"""`powerkernels bench` with a clock that is none: for a rehearsal of what a GPU will be asked for.

    python -m bench.gpu.stub_clock --quick --out FILE

Every variant is checked and called once as always. Its "times" are 1 s, then 2 s, … by its place in
the case: the tables can be looked at, and nobody can take them for measurements. The file says so,
and `powerkernels bench report`, `compare` and `plot` refuse it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence

import torch

from bench.harness import machine, results, timing
from bench.harness.cases import Call
from powerkernels import cli


def interleaved(
    calls: Mapping[str, Sequence[Call]],
    device: torch.device,
    plan: timing.Plan,
    on_error: Callable[[str, Exception], None] | None = None,
) -> dict[str, timing.Samples]:
    """In place of the harness's."""
    found = {}
    for number, (name, of_variant) in enumerate(calls.items()):
        try:
            of_variant[0]()
        except Exception as error:
            if on_error is None:
                raise
            on_error(name, error)
            continue
        times = [1.0 + number] * plan.min_rounds
        found[name] = timing.Samples(cold=times, sustained=list(times))
    return found


def main(argv: Sequence[str]) -> int:
    timing.interleaved = interleaved
    machine.device_name = lambda device: results.STUB_DEVICE
    return cli.main(["bench", *argv])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
