"""Whole jobs: the sampler over lanes and lengths, and a trainer's step at the head of a model."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.harness.cases import (
    LLAMA_8B,
    QWEN_1B,
    QWEN_7B,
    SMOLLM2,
    Call,
    Case,
    Kernel,
    Model,
    Outputs,
    Size,
    Variant,
)
from bench.linear_logprob import cases as heads
from bench.logprob.cases import float32_copies
from bench.policy_loss import cases as losses
from powerkernels import PowerSampler, PowerSamplingConfig, kl_cov_loss, linear_score_tokens

# ---- the sampler

ALPHA, NUM_BLOCKS, NUM_MCMC_STEPS = 4.0, 2, 2
PROMPT_TOKENS = 16
CHECKED_SAMPLES = 2
# Of Qwen2.5-1.5B, whose other sizes are in the harness.
QWEN_1B_LAYERS, QWEN_1B_INTERMEDIATE = 28, 8960
# Of a random model, where there is no real one of the size.
TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
# Set by the command: the folder of the public sampler.
PUBLIC_SAMPLER: list[Path] = []


@dataclass
class Job:
    model: Any
    prompts: list[list[int]]
    lanes: int
    length: int
    metrics: dict[str, Callable[[float], dict[str, float]]] = field(default_factory=dict)

    @functools.cached_property
    def wide_model(self) -> Any:
        return copy.deepcopy(self.model).double()


def sampler_cases(size: Size) -> list[Case]:
    sizes = {
        "device": [(64, 256), (16, 256), (256, 256), (64, 64), (64, 512)],
        "host": [(8, 8), (2, 8), (16, 8), (8, 16)],
        "quick": [(2, 8)],
    }
    model = {"device": QWEN_1B, "host": SMOLLM2, "quick": None}[size]
    parameters = {"device": 1.6e9, "host": 1.4e8, "quick": 1e6}[size]
    lanes_at, length_at = sizes[size][0]
    return [
        Case(
            f"{model.name if model else 'tiny model'}, {lanes} lanes, {length} tokens",
            {"lanes": lanes, "length": length, "chains": lanes},
            torch.float32 if model is None else torch.bfloat16,
            memory=int(parameters * 12),  # weights, and a float64 copy to check with
            sweep=(
                *(("lanes",) if length == length_at else ()),
                *(("length",) if lanes == lanes_at else ()),
            ),
        )
        for lanes, length in sizes[size]
    ]


def make_job(case: Case, device: torch.device) -> Job:
    model = _model(case, device)
    generator = torch.Generator().manual_seed(0)
    vocab = model.config.vocab_size
    shape = (case.shape["chains"], PROMPT_TOKENS)
    prompts = torch.randint(10, vocab, shape, generator=generator).tolist()
    return Job(model, prompts, case.shape["lanes"], case.shape["length"])


def _model(case: Case, device: torch.device) -> Any:
    if case.label.startswith(SMOLLM2.name):
        from powerkernels.integrations.smollm2 import load_smollm2

        return load_smollm2(dtype=case.dtype, device=device)[0]
    return random_model(
        QWEN_1B if case.label.startswith(QWEN_1B.name) else None, case.dtype, device
    )


def random_model(model: Model | None, dtype: torch.dtype, device: torch.device) -> Any:
    """A causal LM of random weights: of the shape of Qwen2.5-1.5B, or a tiny one for None."""
    import transformers

    settings: dict[str, Any] = dict(TINY, num_attention_heads=4, num_key_value_heads=2)
    if model is not None:
        settings = {
            "vocab_size": model.vocab,
            "hidden_size": model.hidden,
            "intermediate_size": QWEN_1B_INTERMEDIATE,
            "num_hidden_layers": QWEN_1B_LAYERS,
            "num_attention_heads": model.heads,
            "num_key_value_heads": model.kv_heads,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
        }
    torch.manual_seed(0)
    with torch.device(device):
        made = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**settings))
    return made.to(dtype).eval()


def bind_sampler(name: str, num_mcmc_steps: int, **switches: bool) -> Callable[[Job], Call]:
    def bind(job: Job) -> Call:
        config = PowerSamplingConfig(
            alpha=ALPHA,
            max_new_tokens=job.length,
            block_size=job.length // NUM_BLOCKS,
            num_mcmc_steps=num_mcmc_steps,
            num_lanes=job.lanes,
            eos_token_id=(),  # completions of one length: the work is that of every model
            **switches,
        )
        sampler = PowerSampler(job.model, config=config)

        def metrics(seconds: float) -> dict[str, float]:
            stats = sampler.stats
            accepted = stats.accepted_transitions
            return {
                "decoded_tokens": stats.decoded_tokens,
                "kept_tokens": stats.kept_tokens,
                "model_steps": stats.model_steps,
                "decoded_tokens_per_second": stats.decoded_tokens / seconds,
                "kept_tokens_per_second": stats.kept_tokens / seconds,
                "accepted_transitions": accepted,
                **({"seconds_per_accepted_transition": seconds / accepted} if accepted else {}),
                "lane_occupancy": stats.lane_occupancy,
            }

        job.metrics[name] = metrics

        def call() -> Outputs:
            samples = sampler.sample(job.prompts, progress=False)
            return {
                "tokens": torch.stack([torch.as_tensor(s.tokens) for s in samples]),
                "log_prob": torch.stack([torch.as_tensor(s.log_prob) for s in samples]),
            }

        return call

    return bind


def public_sampler(job: Job) -> Call:
    """One prompt after the other, as it is; its log-probs are those of its own forward passes."""
    from types import SimpleNamespace

    import numpy

    from bench.power_sampling.compare_sampler import public_module

    module = public_module(PUBLIC_SAMPLER[0])
    never = job.model.config.vocab_size  # no token, so that no completion ends early
    tokenizer = SimpleNamespace(eos_token_id=never, pad_token_id=0, decode=lambda *a, **k: "")
    sampler = module.AutoregressiveSampler(job.model, tokenizer, job.model.device)

    def call() -> Outputs:
        random.seed(0)
        numpy.random.seed(0)
        torch.manual_seed(0)
        tokens, log_prob = [], []
        for prompt in job.prompts:
            quiet = io.StringIO()
            with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
                generated, _, unnormalised, _ = module.mcmc_power_samp(
                    sampler, prompt, 1 / ALPHA, NUM_MCMC_STEPS, job.length, block_num=NUM_BLOCKS
                )
            tokens.append(torch.tensor(generated[len(prompt) :]))
            log_prob.append(torch.tensor(unnormalised) / ALPHA)
        kept = sum(len(each) for each in tokens)
        job.metrics["public sampler"] = lambda seconds: {
            "kept_tokens": kept,
            "kept_tokens_per_second": kept / seconds,
        }
        return {"tokens": torch.stack(tokens), "log_prob": torch.stack(log_prob)}

    return call


def metrics_of(name: str) -> Callable[[Job, float], dict[str, float]]:
    return lambda job, seconds: job.metrics[name](seconds)


def few_samples(outputs: Outputs) -> Outputs:
    return {name: value[:CHECKED_SAMPLES] for name, value in outputs.items()}


def rescored(model: Any, job: Job, tokens: Tensor) -> Outputs:
    """The log-probs of the completions by one forward pass each."""
    found = []
    for prompt, completion in zip(job.prompts, tokens, strict=False):
        ids = torch.cat((torch.tensor(prompt), completion.cpu()))[None].to(model.device)
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt) - 1 : -1]
        log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
        found.append(log_p.gather(-1, ids[0, len(prompt) :, None])[:, 0].cpu())
    return {"tokens": tokens, "log_prob": torch.stack(found)}


POWER_SAMPLER = Kernel(
    name="power_sampler",
    part="jobs",
    summary=f"a chain a lane to its end: {NUM_BLOCKS} blocks of {NUM_MCMC_STEPS} transitions, α = "
    f"{ALPHA:g}, prompts of {PROMPT_TOKENS} random tokens, no EOS",
    cases=sampler_cases,
    inputs=make_job,
    few=lambda job: job,
    picked=few_samples,
    expected=lambda job, found: rescored(job.wide_model, job, found["tokens"]),
    yardstick=lambda job, found: rescored(job.model, job, found["tokens"]),
    by_outcome=True,
    rotates=False,
    whole_job=True,
    variants=[
        Variant(
            "powerkernels",
            bind_sampler("powerkernels", NUM_MCMC_STEPS),
            ours=True,
            metrics=metrics_of("powerkernels"),
        ),
        Variant(
            "without rejection and skip",
            bind_sampler(
                "without", NUM_MCMC_STEPS, early_rejection=False, shared_prefix_skip=False
            ),
            ours=True,
            metrics=metrics_of("without"),
        ),
        Variant(
            "no transitions",
            bind_sampler("no transitions", 0),
            ours=True,
            metrics=metrics_of("no transitions"),
        ),
        Variant(
            "public sampler",
            public_sampler,
            peer="public-sampler",
            metrics=metrics_of("public sampler"),
        ),
    ],
)


# ---- a trainer's step

ENTROPY_COEF = 0.01
SEQUENCES = 8


class Step(NamedTuple):
    head: heads.Inputs
    old_log_prob: Tensor  # float32 [B, T], B T = N
    advantages: Tensor
    mask: Tensor


def make_step(case: Case, device: torch.device) -> Step:
    head = heads.make(case, device)
    generator = torch.Generator(device).manual_seed(1)
    rows = case.shape["rows"]
    shape = (SEQUENCES, rows // SEQUENCES)
    old = torch.empty(rows, dtype=torch.float32, device=device)
    with torch.no_grad():
        for part in torch.arange(rows, device=device).split(heads.ROWS_AT_ONCE):
            scores = linear_score_tokens(head.hidden[part], head.weight, head.targets[part])
            old[part] = scores.log_prob
    place: Any = {"generator": generator, "device": device}
    old = old.view(shape) + 0.05 * torch.randn(shape, **place)
    advantages = torch.randn(SEQUENCES, 1, **place).expand(shape).contiguous()
    lengths = torch.randint(shape[1] // 2, shape[1] + 1, (SEQUENCES, 1), **place)
    return Step(head, old, advantages, torch.arange(shape[1], device=device) < lengths)


def step_cases(size: Size) -> list[Case]:
    dtype = torch.bfloat16 if size == "device" else torch.float32
    sizes = {
        "device": [(QWEN_7B, 8192), (LLAMA_8B, 8192), (QWEN_7B, 2048)],
        "host": [(SMOLLM2, 64)],
        "quick": [(SMOLLM2, 16)],
    }
    found = []
    for model, rows in sizes[size]:
        of_head = (rows + model.vocab) * model.hidden * dtype.itemsize
        found.append(
            Case(
                f"{model.name} head, {rows} tokens",
                {"rows": rows, "hidden": model.hidden, "vocab": model.vocab},
                dtype,
                bytes=3 * of_head,
                flops=8 * rows * model.hidden * model.vocab,
                memory=2 * of_head,
                sweep=("rows",),
                main=(model, rows) == sizes[size][0],
            )
        )
    return found


def step_of(scores: heads.Scores, loss: Callable[[losses.Batch], Tensor]) -> Callable[[Step], Call]:
    """Scores, KL-Cov with an entropy bonus, and the gradients of hidden states and head."""

    def bind(x: Step) -> Call:
        leaves = [tensor.detach().requires_grad_() for tensor in x.head[:2]]

        def call() -> Outputs:
            log_prob, *_, entropy = scores(*leaves, x.head.targets)
            value = total(x, log_prob, entropy, loss)
            dhidden, dweight = torch.autograd.grad(value, leaves)
            return {"loss": value, "dhidden": dhidden, "dweight": dweight}

        return call

    return bind


def total(
    x: Step, log_prob: Tensor, entropy: Tensor, loss: Callable[[losses.Batch], Tensor]
) -> Tensor:
    shape = x.mask.shape
    batch = losses.Batch(log_prob.view(shape), x.old_log_prob, x.advantages, x.mask)
    return loss(batch) - ENTROPY_COEF * losses.masked_mean(batch, entropy.view(shape))


def our_scores(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    found = linear_score_tokens(hidden, weight, targets, entropy=True)
    assert found.entropy is not None
    return found.log_prob, found.entropy


def usual_scores(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    log_p = torch.log_softmax(hidden @ weight.T, dim=-1, dtype=torch.float32)
    return log_p.gather(-1, targets[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


@functools.cache
def _compiled() -> heads.Scores:
    return torch.compile(usual_scores, fullgraph=True, dynamic=False)


def our_loss(batch: losses.Batch) -> Tensor:
    return kl_cov_loss(*batch, kl_cov_ratio=losses.RATIO, ppo_kl_coef=losses.KL_COEF).loss


def torch_loss(batch: losses.Batch) -> Tensor:
    return losses.torch_loss("kl_cov_loss", batch)


def verl_step(x: Step) -> Call:
    def scores(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        log_prob, entropy = heads.verl_scores(hidden, weight, targets)
        return log_prob, entropy.float()

    return step_of(scores, losses.verl_loss("kl_cov_loss"))(x)


def exact_step(x: Step, found: Outputs) -> Outputs:
    """In float64: the scores of all rows, the loss's gradient, and back, some rows at a time."""
    weight, parts = x.head.weight.double(), []
    for hidden, targets in zip(
        x.head.hidden.split(heads.ROWS_AT_ONCE),
        x.head.targets.split(heads.ROWS_AT_ONCE),
        strict=True,
    ):
        scores = heads.exact_scores_of_logits(hidden.double() @ weight.T, targets)
        parts.append(torch.stack((scores[0], scores[2])))
    log_prob, entropy = (score.requires_grad_() for score in torch.cat(parts, dim=1))
    wide = Step(x.head, x.old_log_prob.double(), x.advantages.double(), x.mask)
    value = total(wide, log_prob, entropy, our_loss)
    of_scores = torch.autograd.grad(value, (log_prob, entropy))
    dhidden, dweight = heads.exact_gradients(
        x.head, lambda rows: (of_scores[0][rows], 0.0, of_scores[1][rows])
    )
    return {"loss": value.detach(), "dhidden": dhidden, "dweight": dweight}


def picked_step(outputs: Outputs) -> Outputs:
    found = heads.picked({name: outputs[name] for name in ("dhidden", "dweight")})
    return {"loss": outputs["loss"], **found}


TRAINER_STEP = Kernel(
    name="trainer_step",
    part="jobs",
    summary="scores from hidden states and head, KL-Cov with an entropy bonus, all gradients; "
    "8 N D V FLOP without the logits in memory",
    cases=step_cases,
    inputs=make_step,
    few=lambda x: x,
    picked=picked_step,
    expected=exact_step,
    yardstick=lambda x, found: picked_step(step_of(usual_scores, torch_loss)(x)()),
    ceiling=lambda case, x: heads.four_matmuls(case, x.head),
    variants=[
        Variant("powerkernels", step_of(our_scores, our_loss), ours=True),
        Variant(
            "usual chain of ops",
            step_of(usual_scores, torch_loss),
            peer="eager",
            extra_memory=float32_copies(5),
        ),
        Variant(
            "usual chain, torch.compile",
            step_of(lambda *inputs: _compiled()(*inputs), torch_loss),
            peer="compile",
            extra_memory=float32_copies(3),
            main_only=True,
        ),
        Variant("verl head and loss", verl_step, peer="verl", extra_memory=float32_copies(2)),
    ],
)

KERNELS = [POWER_SAMPLER, TRAINER_STEP]
