"""All kernels of the suite, by the folders that they are in."""

from __future__ import annotations

import difflib

from bench.decode_attention import cases as decode_attention
from bench.harness.cases import Kernel
from bench.jobs import cases as jobs
from bench.linear_logprob import cases as linear_logprob
from bench.logprob import cases as logprob
from bench.logprob import sequence_cases as sequences
from bench.policy_loss import cases as policy_loss
from bench.power_sampling import cases as power_sampling

MODULES = (
    logprob,
    sequences,
    linear_logprob,
    policy_loss,
    decode_attention,
    power_sampling,
    jobs,
)
KERNELS: dict[str, Kernel] = {
    kernel.name: kernel for module in MODULES for kernel in module.KERNELS
}
PARTS = tuple(dict.fromkeys(kernel.part for kernel in KERNELS.values()))


def chosen(names: list[str], parts: list[str]) -> list[Kernel]:
    """The kernels of these names and parts; all without either.

    Raises:
        ValueError: a name or a part is unknown.
    """
    for what, given, known in (("kernel", names, KERNELS), ("--part", parts, PARTS)):
        for name in given:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f" (did you mean {close[0]}?)" if close else ""
                raise ValueError(f"{what}: unknown {name!r}{hint}; known: {', '.join(known)}")
    return [
        kernel
        for kernel in KERNELS.values()
        if (not names and not parts) or kernel.name in names or kernel.part in parts
    ]
