"""What the sampler and the losses cost, on paper: bytes, FLOP, all-reduce bytes, steps.

    python -m bench.cost_model [--gpus 1 8 64 1024 10000]

prints the tables of docs/cost_model.md, which says where each count comes from.
python_tests/bench/test_cost_model.py holds the counts to what is counted here at small scale. What
the times are computed from is in `Machine`: predictions, not measurements.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bench.harness.cases import LLAMA_8B, QWEN_7B, Model
from powerkernels.covariance import reference as covariance

FLOAT64, INT64 = 8, 8
DEFAULT_GPUS = (1, 8, 64, 1024, 10000)


@dataclass(frozen=True)
class Machine:
    """One GPU and what joins them; the first two as measured on an H200."""

    copy_bandwidth: float = 4.3e12  # bytes a second
    matmul: float = 790e12  # FLOP a second, bfloat16
    # Assumed, of a ring over InfiniBand at 50 GB/s a GPU, 10 µs a step of a tree.
    link_bandwidth: float = 50e9
    link_latency: float = 10e-6


class Collectives(NamedTuple):
    """What a rank hands over: `reduced` is added up over the ranks, `gathered` comes from each."""

    reduced: int = 0  # bytes
    gathered: int = 0  # bytes
    calls: int = 0

    def received(self, ranks: int) -> int:
        """Bytes that a rank has afterwards."""
        return self.reduced + ranks * self.gathered

    def seconds(self, machine: Machine, ranks: int) -> float:
        """A ring sends reduced bytes twice and gathered ones on; a call waits for a tree."""
        if ranks == 1:
            return 0.0
        sent = 2 * self.reduced * (ranks - 1) / ranks + self.gathered * (ranks - 1)
        latency = self.calls * math.ceil(math.log2(ranks)) * machine.link_latency
        return sent / machine.link_bandwidth + latency


class Cost(NamedTuple):
    """Of one GPU."""

    bytes: float
    flops: float
    collectives: Collectives

    def seconds(self, machine: Machine, ranks: int) -> float:
        """Memory and matrix units overlap at best; collectives do not."""
        work = max(self.bytes / machine.copy_bandwidth, self.flops / machine.matmul)
        return work + self.collectives.seconds(machine, ranks)


# ---- scores


def score_tokens_bytes(rows: int, vocab: int, itemsize: int, *, entropy: bool) -> int:
    """Forward: every logit and target read once; the scores and what the backward needs written.

    Row maximum and log-sum are kept beside log_prob, log_z and, if asked for, entropy.
    """
    return rows * vocab * itemsize + rows * INT64 + rows * 4 * (4 + entropy)


def linear_flops(rows: int, hidden: int, vocab: int, *, backward: bool) -> int:
    """Forward one product; with the backward three more: the logits again, and two gradients."""
    return (4 if backward else 1) * 2 * rows * hidden * vocab


# ---- the covariance losses


def moments_bytes() -> int:
    """A rank's moments and its number of sequences."""
    return (covariance.NUM_MOMENTS + 1) * FLOAT64


def histogram_bytes() -> int:
    """Of one digit."""
    return (covariance.NUM_BINS + 1) * INT64


def selection_collectives(ranks: int) -> Collectives:
    """Of one exact selection: the moments, a histogram a digit, the ties.

    What a rank hands over does not depend on the number of tokens or ranks.
    """
    if ranks == 1:
        return Collectives()
    digits = len(covariance.DIGITS)
    return Collectives(digits * histogram_bytes(), moments_bytes() + INT64, digits + 2)


def loss_bytes(tokens: int) -> int:
    """Selection and loss, forward and backward, in float32 with a bool mask.

    The pass of the moments and a pass a digit read log_prob, advantages and mask; the loss reads
    those, old_log_prob and the chosen, and writes the gradient's terms; the backward scales them.
    """
    read = 4 + 4 + 1
    passes = 1 + len(covariance.DIGITS)
    return tokens * (passes * read + 1 + (read + 4 + 1) + 4 + 4 + 4)


def trainer_step(tokens: int, model: Model, gpus: int, itemsize: int = 2) -> Cost:
    """Scores from hidden states, an exact selection over all GPUs, the loss, all gradients.

    tokens: of each GPU. The gradients of the model's own layers are not counted.
    """
    head = (tokens + model.vocab) * model.hidden * itemsize
    # A chunk's logits are written and read forward; backward twice written and twice read.
    chunks = 6 * tokens * model.vocab * itemsize
    return Cost(
        bytes=4 * head + chunks + loss_bytes(tokens),
        flops=linear_flops(tokens, model.hidden, model.vocab, backward=True),
        collectives=selection_collectives(gpus),
    )


# ---- the sampler


def expected_decoded(length: int, block_size: int, num_mcmc_steps: int) -> float:
    """Tokens a chain decodes, without EOS, rejection or skip: every count is exact.

    A block decodes its own tokens once; a transition from a completion of n redraws n - m, m
    uniform on 0 … n - 1: (n + 1) / 2 on average.
    """
    total, n = 0.0, 0
    while n < length:
        previous, n = n, min(n + block_size, length)
        total += n - previous + num_mcmc_steps * (n + 1) / 2
    return total


class Sampling(NamedTuple):
    """A run of `chains` over `gpus`, `lanes` on each; nothing is sent between them."""

    steps: float  # of the model, on each GPU
    seconds_per_step: float
    seconds: float


def sampling(
    *,
    model_bytes: float,
    cache_bytes_per_token: float,
    chains: int,
    lanes: int,
    gpus: int,
    decoded_per_chain: float,
    mean_context: float,
    machine: Machine,
) -> Sampling:
    """A step reads the weights once and each lane's cache; chains are dealt out whole.

    With no more chains than lanes on all GPUs one chain's own steps are what is left, less what
    prefetching saves, which depends on the acceptance and is not counted here.
    """
    on_each = math.ceil(chains / gpus)
    rounds = math.ceil(on_each / lanes)
    busy = min(lanes, on_each)
    step = (model_bytes + busy * mean_context * cache_bytes_per_token) / machine.copy_bandwidth
    steps = rounds * decoded_per_chain
    return Sampling(steps, step, steps * step)


# ---- the tables

# A batch of the papers' sizes: tokens of an optimiser step, and answers with 3072 tokens.
TOKENS_PER_GPU = 8192
CHAINS = 10000
LANES = 64
LENGTH, BLOCK, STEPS = 3072, 192, 10
# Weights of a 7B model in bfloat16; keys and values of 28 layers.
WEIGHT_BYTES = 15.2e9
LAYERS = 28


def losses_table(gpus: Sequence[int], machine: Machine) -> str:
    lines = [
        "| GPUs | tokens in all | head of | TFLOP a GPU | GB a GPU | handed over by a rank, KB | "
        "received, KB | collectives | step, ms (predicted) | of it collectives |",
        "| --- " * 10 + "|",
    ]
    for model in (QWEN_7B, LLAMA_8B):
        for number in gpus:
            cost = trainer_step(TOKENS_PER_GPU, model, number)
            sent = cost.collectives
            seconds = cost.seconds(machine, number)
            lines.append(
                f"| {number} | {number * TOKENS_PER_GPU} | {model.name} | "
                f"{cost.flops / 1e12:.1f} | {cost.bytes / 1e9:.1f} | "
                f"{(sent.reduced + sent.gathered) / 1e3:.1f} | "
                f"{sent.received(number) / 1e3:.1f} | {sent.calls} | {1e3 * seconds:.1f} | "
                f"{sent.seconds(machine, number) / seconds:.2%} |"
            )
    return "\n".join(lines)


def sampler_table(gpus: Sequence[int], machine: Machine) -> str:
    lines = [
        "| GPUs | chains a GPU | model steps | step, ms (predicted) | hours (predicted) | sent |",
        "| --- " * 6 + "|",
    ]
    decoded = expected_decoded(LENGTH, BLOCK, STEPS)
    per_token = 2 * LAYERS * QWEN_7B.kv_heads * QWEN_7B.head_size * 2
    for number in gpus:
        found = sampling(
            model_bytes=WEIGHT_BYTES,
            cache_bytes_per_token=per_token,
            chains=CHAINS,
            lanes=LANES,
            gpus=number,
            decoded_per_chain=decoded,
            mean_context=LENGTH / 2,
            machine=machine,
        )
        lines.append(
            f"| {number} | {math.ceil(CHAINS / number)} | {found.steps:.0f} | "
            f"{1e3 * found.seconds_per_step:.2f} | {found.seconds / 3600:.2f} | 0 |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, nargs="+", default=list(DEFAULT_GPUS))
    options = parser.parse_args()
    if min(options.gpus) < 1:
        parser.error("--gpus must be >= 1")
    machine = Machine()
    print(losses_table(options.gpus, machine))
    print()
    print(sampler_table(options.gpus, machine))


if __name__ == "__main__":
    main()
