"""Peak memory of linear_score_tokens, forward and backward, at the size of a 7B model's head.

    python -m bench.linear_logprob.peak_memory [--rows 8192] [--dim 4096] [--vocab 151936]

What the call takes beyond hidden, weight and their gradients, and the size of the logits that it
does without; --output writes it as `powerkernels bench` writes its figures. On a CPU this is some
minutes of matmuls.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from bench.harness import machine, table, whole_job
from bench.harness.cases import Case
from bench.linear_logprob.cases import LINEAR_SCORE_TOKENS_FWD_BWD
from bench.memory import peak_bytes
from powerkernels import linear_score_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)

    generator = torch.Generator().manual_seed(0)
    place = {"dtype": dtype, "device": options.device}
    hidden = torch.randn(options.rows, options.dim, generator=generator).to(**place)
    weight = torch.empty(options.vocab, options.dim, **place)
    for rows in weight.split(4096):
        rows.copy_(torch.randn(rows.shape, generator=generator) * options.dim**-0.5)
    targets = torch.randint(options.vocab, (options.rows,), generator=generator).to(options.device)
    hidden.requires_grad_()
    weight.requires_grad_()

    def step(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
        scores = linear_score_tokens(hidden, weight, targets, alpha=4.0, entropy=True)
        total = scores.log_prob.sum() + scores.log_z.sum() + scores.entropy.sum()
        total.backward()

    # What the libraries take once, whatever the size.
    few = [tensor.detach()[:300].clone().requires_grad_() for tensor in (hidden, weight)]
    step(*few, targets[:300] % 300)
    del few
    start = time.perf_counter()
    peak = peak_bytes(lambda: step(hidden, weight, targets), options.device)
    seconds = time.perf_counter() - start
    if peak is None:
        raise SystemExit("this system does not tell a process's peak memory")
    assert hidden.grad is not None
    assert weight.grad is not None
    gradients = hidden.grad.nbytes + weight.grad.nbytes
    logits = options.rows * options.vocab * dtype.itemsize
    figures = {
        "seconds": seconds,
        "peak_megabytes": peak / 1e6,
        "gradients_megabytes": gradients / 1e6,
        "beyond_gradients_megabytes": (peak - gradients) / 1e6,
        "logits_megabytes": logits / 1e6,
        "logits_over_beyond": logits / (peak - gradients),
    }
    case = Case(
        f"head of {options.dim} × {options.vocab}, {options.rows} rows",
        {"rows": options.rows, "hidden": options.dim, "vocab": options.vocab},
        dtype,
    )
    kernel = LINEAR_SCORE_TOKENS_FWD_BWD
    document = whole_job.document(
        kernel.name,
        kernel.part,
        [whole_job.Run(case, "powerkernels", figures)],
        machine.environment(torch.device(options.device)),
        options.output,
    )
    print(table.text(document.data["benchmarks"]))
    document.write()


if __name__ == "__main__":
    main()
