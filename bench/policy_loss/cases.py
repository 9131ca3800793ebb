"""Selection by covariance and the losses, forward and backward, over the tokens of an RL step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.harness.accuracy import WrongResultError
from bench.harness.cases import Call, Case, Kernel, Outputs, Size, Variant
from powerkernels import clip_cov_loss, kl_cov_loss, ppo_clip_loss, select_top_cov

# The papers' settings.
RATIO, KL_COEF = 2e-4, 1.0
BAND = (1.0, 5.0)
CLIP_LOW, CLIP_HIGH, DUAL_CLIP = 0.8, 1.2, 3.0
LENGTH = 4096
# log_prob, old_log_prob and advantages read, the gradient written: float32; the mask: a byte.
BYTES_PER_TOKEN = 4 * 4 + 1
LOSSES = {"ppo_clip_loss": "vanilla", "clip_cov_loss": "clip_cov", "kl_cov_loss": "kl_cov"}


class Batch(NamedTuple):
    log_prob: Tensor  # float32 [B, T]
    old_log_prob: Tensor
    advantages: Tensor
    mask: Tensor  # bool

    def double(self) -> Batch:
        values = [value.detach().double() for value in self[:3]]
        return Batch(values[0].requires_grad_(), values[1], values[2], self.mask)


def make(case: Case, device: torch.device) -> Batch:
    """Log-probs whose covariances are spread about as in the paper's table: 2% are above 1."""
    generator = torch.Generator(device).manual_seed(0)
    shape = rows, length = case.shape["sequences"], case.shape["length"]
    place: Any = {"generator": generator, "device": device}
    log_prob = 0.4 * torch.rand(shape, **place).clamp(min=1e-7).log()
    old_log_prob = log_prob + 0.05 * torch.randn(shape, **place)
    advantages = torch.randn(rows, 1, **place).expand(shape).contiguous()
    lengths = torch.randint(length // 2, length + 1, (rows, 1), **place)
    mask = torch.arange(length, device=device) < lengths
    return Batch(log_prob.requires_grad_(), old_log_prob, advantages, mask)


def cases(size: Size) -> list[Case]:
    sequences = {"device": (256, 2048, 32), "host": (256, 16), "quick": (2,)}[size]
    found = []
    for number in sequences:
        tokens = number * LENGTH
        found.append(
            Case(
                f"{number} sequences of {LENGTH}",
                {"sequences": number, "length": LENGTH, "tokens": tokens},
                bytes=BYTES_PER_TOKEN * tokens,
                memory=BYTES_PER_TOKEN * tokens,
                sweep=("tokens",),
                main=number == sequences[0],
            )
        )
    return found


# ---- in plain torch


def ppo_terms(x: Batch) -> tuple[Tensor, Tensor]:
    """-A r clipped, and -A r."""
    ratio = (x.log_prob - x.old_log_prob).exp()
    plain = -x.advantages * ratio
    clipped = torch.maximum(plain, -x.advantages * ratio.clamp(CLIP_LOW, CLIP_HIGH))
    return clipped, plain


def covariances(x: Batch) -> Tensor:
    def centred(value: Tensor) -> Tensor:
        return value - value[x.mask].mean()

    return centred(x.log_prob.detach()) * centred(x.advantages)


def masked_mean(x: Batch, terms: Tensor) -> Tensor:
    return torch.where(x.mask, terms, 0.0).sum() / x.mask.sum()


def num_chosen(x: Batch) -> int:
    return max(1, int(RATIO * int(x.mask.sum())))


def top_of(x: Batch) -> Tensor:
    cov = torch.where(x.mask, covariances(x), -torch.inf).flatten()
    chosen = torch.zeros_like(cov, dtype=torch.bool)
    chosen[cov.topk(num_chosen(x)).indices] = True
    return chosen.view(x.mask.shape)


def random_of_band(x: Batch) -> Tensor:
    clipped, plain = (terms.detach() for terms in ppo_terms(x))
    cov = covariances(x)
    eligible = (cov > BAND[0]) & (cov < BAND[1]) & x.mask & (clipped <= plain)
    indices = eligible.flatten().nonzero()[:, 0]
    taken = indices[torch.randperm(len(indices), device=indices.device)[: num_chosen(x)]]
    chosen = torch.zeros(x.mask.numel(), dtype=torch.bool, device=x.mask.device)
    chosen[taken] = True
    return chosen.view(x.mask.shape)


def torch_loss(name: str, x: Batch, selected: Tensor | None = None) -> Tensor:
    """selected: what is chosen; None chooses here."""
    clipped, plain = ppo_terms(x)
    if name == "ppo_clip_loss":
        dual = torch.minimum(clipped, -DUAL_CLIP * x.advantages)
        return masked_mean(x, torch.where(x.advantages < 0, dual, clipped))
    if name == "kl_cov_loss":
        selected = top_of(x) if selected is None else selected
        penalty = KL_COEF * (x.log_prob - x.old_log_prob).abs()
        return masked_mean(x, torch.where(selected, plain + penalty, plain))
    selected = random_of_band(x) if selected is None else selected
    return masked_mean(x, torch.where(selected, 0.0, clipped))


@functools.cache
def _compiled() -> Callable[[Batch], Tensor]:
    return torch.compile(lambda x: torch_loss("ppo_clip_loss", x), fullgraph=True, dynamic=False)


# ---- ours and verl's


def our_loss(name: str, x: Batch, selected: Tensor | None = None) -> Tensor:
    if name == "ppo_clip_loss":
        return ppo_clip_loss(*x).loss
    if name == "kl_cov_loss":
        settings: dict[str, Any] = {"kl_cov_ratio": RATIO, "ppo_kl_coef": KL_COEF}
        return kl_cov_loss(*x, selected=selected, **settings).loss
    bounds = {"clip_cov_lb": BAND[0], "clip_cov_ub": BAND[1], "clip_cov_ratio": RATIO}
    return clip_cov_loss(*x, seed=0, selected=selected, **bounds).loss


def verl_loss(name: str) -> Callable[[Batch], Tensor]:
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import ActorConfig
    from verl.workers.config.actor import PolicyLossConfig

    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        use_dynamic_bsz=True,
        policy_loss=PolicyLossConfig(ppo_kl_coef=KL_COEF),
    )
    function = get_policy_loss_fn(LOSSES[name])

    def loss(x: Batch) -> Tensor:
        inputs = (x.old_log_prob, x.log_prob, x.advantages, x.mask)
        return function(*inputs, "token-mean", config)[0]

    return loss


def with_gradient(loss: Callable[[Batch], Tensor]) -> Callable[[Batch], Call]:
    def bind(x: Batch) -> Call:
        def call() -> Outputs:
            value = loss(x)
            return {"loss": value, "dlog_prob": torch.autograd.grad(value, x.log_prob)[0]}

        return call

    return bind


def bind_verl(name: str) -> Callable[[Batch], Call]:
    return lambda x: with_gradient(verl_loss(name))(x)


# ---- checks


def chosen_by(x: Batch, dlog_prob: Tensor) -> Tensor:
    """The tokens without a gradient where PPO's clipping leaves one: Clip-Cov's.

    Raises:
        WrongResultError: they are not as many as there must be, or one is outside of the band.
    """
    clipped, _ = ppo_terms(x)
    (ppo,) = torch.autograd.grad(masked_mean(x, clipped), x.log_prob)
    chosen = (dlog_prob == 0) & (ppo != 0)
    cov = covariances(x)
    slack = 1e-4  # of covariances in float32
    eligible = (cov > BAND[0] - slack) & (cov < BAND[1] + slack) & (ppo != 0)
    wanted = min(num_chosen(x), int(eligible.sum()))
    if int(chosen.sum()) != wanted or bool((chosen & ~eligible).any()):
        raise WrongResultError(
            f"{int(chosen.sum())} tokens without a gradient, {wanted} in the band were to be chosen"
        )
    return chosen


def exact(name: str, x: Batch, found: Outputs) -> Outputs:
    wide = x.double()
    chosen = chosen_by(wide, found["dlog_prob"]) if name == "clip_cov_loss" else None
    return with_gradient(lambda batch: our_loss(name, batch, chosen))(wide)()


def in_torch(name: str, x: Batch, found: Outputs) -> Outputs:
    chosen = chosen_by(x, found["dlog_prob"]) if name == "clip_cov_loss" else None
    return with_gradient(lambda batch: torch_loss(name, batch, chosen))(x)()


def loss_kernel(name: str) -> Kernel:
    def of_tokens(count: int) -> Callable[[Case], int]:
        return lambda case: 4 * count * case.shape["tokens"]

    variants = [
        Variant("powerkernels", with_gradient(functools.partial(our_loss, name)), ours=True),
        Variant(
            "torch eager",
            with_gradient(functools.partial(torch_loss, name)),
            peer="eager",
            extra_memory=of_tokens(12),
        ),
        Variant("verl", bind_verl(name), peer="verl", extra_memory=of_tokens(16)),
    ]
    if name == "ppo_clip_loss":
        variants.append(
            Variant(
                "torch.compile",
                with_gradient(lambda x: _compiled()(x)),
                peer="compile",
                main_only=True,
            )
        )
    return Kernel(
        name=name,
        part="policy_loss",
        summary="the loss and its gradient, with the selection that it needs; "
        "one read of the tokens and one write are the floor",
        cases=cases,
        inputs=make,
        few=lambda x: x,
        expected=functools.partial(exact, name),
        yardstick=functools.partial(in_torch, name),
        by_outcome=name == "clip_cov_loss",
        ceiling="copy",
        variants=variants,
    )


# ---- the selection alone


def our_selection(x: Batch) -> Call:
    def call() -> Outputs:
        return {"selected": select_top_cov(x.log_prob, x.advantages, x.mask, ratio=RATIO)}

    return call


def torch_selection(x: Batch) -> Call:
    return lambda: {"selected": top_of(x)}


def exact_selection(x: Batch, found: Outputs) -> Outputs:
    return {"selected": top_of(x.double())}


SELECT_TOP_COV = Kernel(
    name="select_top_cov",
    part="policy_loss",
    summary="the tokens with the largest covariances alone; one read of them is the floor",
    cases=lambda size: [
        Case(c.label, c.shape, bytes=9 * c.shape["tokens"], memory=c.memory, sweep=c.sweep)
        for c in cases(size)
    ],
    inputs=make,
    few=lambda x: x,
    expected=exact_selection,
    ceiling="read",
    variants=[
        Variant("powerkernels", our_selection, ours=True),
        Variant("torch eager, topk", torch_selection, peer="eager"),
    ],
)

KERNELS = [*(loss_kernel(name) for name in LOSSES), SELECT_TOP_COV]
