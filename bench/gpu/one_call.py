"""One warm call of a variant of ours, between the profiler's marks: what ncu is to look at.

ncu --profile-from-start off … python -m bench.gpu.one_call score_tokens "powerkernels"
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

import torch

from bench import suite
from bench.harness.cases import SIZES

WARMUP_CALLS = 2


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kernel", choices=sorted(suite.KERNELS))
    parser.add_argument("variant")
    parser.add_argument("--size", choices=SIZES, default="device")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(argv)
    kernel = suite.KERNELS[options.kernel]
    variants = {variant.name: variant for variant in kernel.variants}
    if options.variant not in variants:
        parser.error(f"variant must be one of {', '.join(variants)}, got {options.variant!r}")
    device = torch.device(options.device)
    warnings.simplefilter("ignore")
    call = variants[options.variant].bind(kernel.inputs(kernel.cases(options.size)[0], device))
    for _ in range(WARMUP_CALLS):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.cudart().cudaProfilerStart()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.cudart().cudaProfilerStop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
