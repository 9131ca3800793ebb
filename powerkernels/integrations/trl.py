"""TRL's GRPO trainer with the covariance losses and with token scores that need no logits.

    from powerkernels.integrations.trl import CovGRPOConfig, CovGRPOTrainer

    args = CovGRPOConfig("out", policy_loss="kl_cov", kl_cov_ratio=0.02, cov_scope="step")
    CovGRPOTrainer(model, reward_funcs, args=args, train_dataset=dataset).train()

Everything else is TRL's: generation, rewards, advantages, the schedule of the updates, logging.
Needs trl >= 1.16; the losses hook into two methods of `GRPOTrainer` and into the forward that it
gives the model, none of which trl promises to keep.

Sources: Cui et al. 2025, "The Entropy Mechanism of Reinforcement Learning for Reasoning Language
Models" (Clip-Cov, KL-Cov); TRL 1.16's documentation of `GRPOConfig` for its normalisations.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from powerkernels import (
    clip_cov_loss,
    entropy_bonus,
    kl_cov_loss,
    linear_score_tokens,
    ppo_clip_loss,
)
from powerkernels.covariance import SelectionAccumulator
from powerkernels.policy_loss import PolicyLoss

INSTALL_TRL = "pip install 'trl>=1.16'"

try:
    from transformers.utils import ModelOutput
    from trl import GRPOConfig, GRPOTrainer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{error.name} is not installed, and powerkernels.integrations.trl needs it; "
        f"get it with: {INSTALL_TRL}",
        name=error.name,
    ) from error

PolicyLossName = Literal["ppo_clip", "clip_cov", "kl_cov"]
CovScope = Literal["micro_batch", "step"]
LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo"]

IGNORED = -100

# What a micro-batch may hold for the model beside its tokens; absent for a text model.
_MODEL_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)

# Factors that some architectures put on their logits; `linear_score_tokens` has none.
_LOGIT_FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")

logger = logging.getLogger(__name__)


@dataclass
class CovGRPOConfig(GRPOConfig):
    """`GRPOConfig` and what the covariance losses need.

    TRL's `loss_type` says how token losses are normalised; of its kinds "grpo", "bnpo", "dr_grpo"
    and "dapo" are known here. `epsilon` and `epsilon_high` clip in "ppo_clip" and "clip_cov";
    `delta` (two-sided clipping) belongs to "ppo_clip" alone and must exceed 1 + epsilon_high.

    Args:
        policy_loss: "ppo_clip", what `GRPOTrainer` does; "clip_cov", a random few of the tokens
            whose covariance is in a band get no gradient; "kl_cov", the tokens of the highest
            covariance get a penalty, and nothing is clipped.
        clip_cov_ratio: in (0, 1], the share of the tokens that Clip-Cov selects.
        clip_cov_lb, clip_cov_ub: the band's ends, lb < ub, in nats times advantage.
        kl_cov_ratio: in (0, 1], the share of the tokens that KL-Cov selects.
        ppo_kl_coef: >= 0, weight of KL-Cov's penalty |log_prob - old_log_prob|.
        cov_seed: >= 0, seed of Clip-Cov's choice; `seed` has no part in it.
        cov_scope: over what tokens the covariance is taken and the share is selected.
            "micro_batch": those of one forward pass on one rank, which knows nothing of the others.
            "step": those of all micro-batches of an optimiser step, on all data-parallel ranks. It
            is made before the first of them is scored for the loss, from `old_per_token_logps`
            where TRL has them, else (TRL's default, where sampling and current policy are one)
            from one more forward pass over the step's micro-batches, without gradients. With old
            log-probs, the covariance is that of the policy which the samples came from, and
            Clip-Cov's choice does not pass over tokens that the ratio already clips. Needs a
            steps_per_generation that gradient_accumulation_steps divides. In an evaluation, which
            has no optimiser step, it is as "micro_batch".
        cov_metrics: whether to log the covariance and its table (the paper's table 1) with each
            loss and scope, at the price of a sort. Without it the mean covariance is logged where
            it is known by the way: by "clip_cov" and "kl_cov" in the scope "micro_batch".
        fused_scores: log-probs and entropies by `powerkernels.linear_score_tokens`; False leaves
            them to TRL.

    Raises:
        ValueError: a setting is out of range, unknown, or cannot go with the others.
    """

    policy_loss: str = field(
        default="ppo_clip",
        metadata={"help": "Policy loss: 'ppo_clip', 'clip_cov' or 'kl_cov'."},
    )
    clip_cov_ratio: float = field(
        default=2e-4, metadata={"help": "Share of the tokens that Clip-Cov selects."}
    )
    clip_cov_lb: float = field(
        default=1.0, metadata={"help": "Lower end of Clip-Cov's covariance band."}
    )
    clip_cov_ub: float = field(
        default=5.0, metadata={"help": "Upper end of Clip-Cov's covariance band."}
    )
    kl_cov_ratio: float = field(
        default=2e-4, metadata={"help": "Share of the tokens that KL-Cov selects."}
    )
    ppo_kl_coef: float = field(default=1.0, metadata={"help": "Weight of KL-Cov's penalty."})
    cov_seed: int = field(default=0, metadata={"help": "Seed of Clip-Cov's random choice."})
    cov_scope: str = field(
        default="micro_batch",
        metadata={"help": "Tokens among which is selected: of a 'micro_batch' or of a 'step'."},
    )
    cov_metrics: bool = field(
        default=False, metadata={"help": "Log the covariance and its table with each loss."}
    )
    fused_scores: bool = field(
        default=True, metadata={"help": "Log-probs and entropies by powerkernels instead of TRL."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("policy_loss", self.policy_loss, get_args(PolicyLossName))
        _check_choice("cov_scope", self.cov_scope, get_args(CovScope))
        _check_choice("loss_type", self.loss_type, get_args(LossType))
        if self.importance_sampling_level != "token":
            raise ValueError(
                "importance_sampling_level must be 'token' (the covariance losses have a ratio per "
                f"token), got {self.importance_sampling_level!r}"
            )
        for name in ("clip_cov_ratio", "kl_cov_ratio"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)}")
        if not self.clip_cov_lb < self.clip_cov_ub:
            raise ValueError(
                "clip_cov_lb must be below clip_cov_ub, "
                f"got {self.clip_cov_lb} and {self.clip_cov_ub}"
            )
        if not self.ppo_kl_coef >= 0.0:
            raise ValueError(f"ppo_kl_coef must be >= 0, got {self.ppo_kl_coef}")
        if self.cov_seed < 0:
            raise ValueError(f"cov_seed must be >= 0, got {self.cov_seed}")
        self._check_delta()
        self._check_scope()

    def _check_delta(self) -> None:
        if self.delta is None:
            return
        if self.policy_loss != "ppo_clip":
            raise ValueError(
                f"delta belongs to policy_loss='ppo_clip'; {self.policy_loss!r} has no such bound"
            )
        highest = 1.0 + (self.epsilon if self.epsilon_high is None else self.epsilon_high)
        if self.delta <= highest:
            raise ValueError(f"delta must exceed 1 + epsilon_high = {highest}, got {self.delta}")

    def _check_scope(self) -> None:
        parts, whole = self.gradient_accumulation_steps, self.steps_per_generation
        assert whole is not None  # TRL has filled it in
        if self.cov_scope == "step" and whole % parts:
            raise ValueError(
                "cov_scope='step' needs all micro-batches of an optimiser step from one generation:"
                f" gradient_accumulation_steps ({parts}) must divide steps_per_generation ({whole})"
            )


class CovGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` with the policy losses of `CovGRPOConfig`.

    With policy_loss="ppo_clip" loss and gradient are `GRPOTrainer`'s, within rounding (and but for
    log-ratios beyond 20, which are clamped). The KL to the reference, the entropy bonus, the
    off-policy and high-entropy masks and vLLM's correction keep their meaning with each loss;
    tokens that those masks leave without weight still take part in the selection.

    Metrics, beside TRL's: those of the loss, means over ranks and micro-batches, not weighted by
    tokens. What concerns the covariance is under "cov/": selected_frac, selected_tokens,
    covariance, constant, and with cov_metrics top_* and quantile_*; the rest keeps its "actor/"
    name. TRL's "clip_ratio/*" keep TRL's definition, also for "kl_cov", which clips nothing: there
    they say what PPO would have clipped.

    Attributes:
        scored_by: "powerkernels", or "trl: " and why.

    Args:
        args: a `CovGRPOConfig`; the rest as `GRPOTrainer` takes it.

    Raises:
        TypeError: args is no `CovGRPOConfig`.
    """

    # Looser than TRL's, which has None where there is none after the constructor.
    args: Any
    model: Any
    _buffered_inputs: Any

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: Any = None, *more: Any, **others: Any
    ) -> None:
        if not isinstance(args, CovGRPOConfig):
            raise TypeError(f"args must be a CovGRPOConfig, got {type(args).__name__}")
        self._heads: list[_FusedHead] = []
        self._recorded: _Scored | None = None
        self._is_recording = False
        self._step_selection: list[Tensor] = []
        super().__init__(model, reward_funcs, args, *more, **others)
        self.scored_by = self._fuse_heads()

    # ---- scores

    def _fuse_heads(self) -> str:
        reason = self._why_not_fused()
        if reason:
            logger.warning("log-probs are left to TRL: %s", reason)
            return f"trl: {reason}"
        for model in filter(None, (self.model, self.ref_model)):
            self._heads.append(_FusedHead(_plain_model(self, model), self.temperature))
        return "powerkernels"

    def _why_not_fused(self) -> str | None:
        if not self.args.fused_scores:
            return "fused_scores is False"
        if self.args.cast_lm_head_to_fp32:
            return "cast_lm_head_to_fp32 is set"
        if self.aux_loss_enabled:
            return "the load-balancing loss of a mixture of experts needs the router's logits"
        for model in filter(None, (self.model, self.ref_model)):
            reason = why_not_fused(_plain_model(self, model))
            if reason:
                return reason
        return None

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **others: Any,
    ) -> Any:
        """TRL's, with entropies only where they are asked for, and kept while `_recording`."""
        for head in self._heads:
            head.entropy = compute_entropy
        found = _Scored(
            *super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy,
                **others,
            )
        )
        if not self._is_recording:
            return found
        self._recorded = found
        return tuple(None if value is None else value.detach() for value in found)

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        """Within, the scores are kept in `_recorded`, and TRL gets them without their graph."""
        self._is_recording = True
        try:
            yield
        finally:
            self._is_recording = False

    # ---- selection over an optimiser step

    def _prepare_inputs(self, generation_batch: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(generation_batch)
        if not (self.model.training and self._selects_by_step):
            return inputs
        position = self._step % self.args.gradient_accumulation_steps
        if position == 0:
            self._step_selection = self._select_for_step()
        return {**inputs, "cov_selected": self._step_selection[position]}

    @property
    def _selects_by_step(self) -> bool:
        return self.args.cov_scope == "step" and self.args.policy_loss != "ppo_clip"

    def _select_for_step(self) -> list[Tensor]:
        """A bool mask [B, T] for each micro-batch of the optimiser step that begins."""
        num_batches = self.args.gradient_accumulation_steps
        first = self._step % self.args.steps_per_generation
        accumulator = self._accumulator(self._step // num_batches)
        for batch in self._buffered_inputs[first : first + num_batches]:
            log_prob = batch.get("old_per_token_logps")
            if log_prob is None:
                log_prob = self._current_log_prob(batch)
            accumulator.add(log_prob, _by_token(batch["advantages"], log_prob), _loss_mask(batch))
        return accumulator.masks()

    def _accumulator(self, optimizer_step: int) -> SelectionAccumulator:
        is_alone = self.accelerator.num_processes == 1
        group = None if is_alone else torch.distributed.group.WORLD
        if self.args.policy_loss == "kl_cov":
            return SelectionAccumulator.top(ratio=self.args.kl_cov_ratio, process_group=group)
        return SelectionAccumulator.band(
            ratio=self.args.clip_cov_ratio,
            lb=self.args.clip_cov_lb,
            ub=self.args.clip_cov_ub,
            seed=self.args.cov_seed + optimizer_step,
            process_group=group,
        )

    @torch.no_grad()
    def _current_log_prob(self, batch: dict[str, Any]) -> Tensor:
        log_prob, _, _ = self._get_per_token_logps_and_entropies(
            self.model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            batch["completion_ids"].shape[1],
            **{name: batch[name] for name in _MODEL_INPUTS if name in batch},
        )
        return log_prob

    # ---- loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        entropy_coef = self._entropy_coef()
        with self._recording():
            super()._compute_loss(model, inputs)  # for TRL's metrics, and its entropy controller
        scored, self._recorded = self._recorded, None
        assert scored is not None
        batch = self._batch(inputs, scored)
        found = self._policy_loss(batch)
        self._add_metrics(found.metrics)

        loss = found.loss
        if self.beta != 0.0:
            loss = loss + self._reference_kl(batch, inputs["ref_per_token_logps"])
        self._note_policy_loss(loss)
        loss = loss * batch.scale
        per_step = 1.0 / self._accumulation
        if self._entropy_bonus_enabled:
            loss = loss + per_step * self._entropy_bonus(batch, entropy_coef)
        if scored.aux_loss is not None:
            loss = loss + per_step * self.router_aux_loss_coef * scored.aux_loss
        return loss

    def _batch(self, inputs: dict[str, Any], scored: _Scored) -> _Batch:
        assert scored.entropy is not None  # TRL asks for it with each loss
        mask = _loss_mask(inputs)
        old = inputs.get("old_per_token_logps")
        entropy_mask = None
        if self.top_entropy_quantile < 1.0:
            entropy_mask = self.get_high_entropy_mask(
                scored.entropy.detach(), mask, 1 - self.top_entropy_quantile
            )
        batch = _Batch(
            log_prob=scored.log_prob,
            old_log_prob=scored.log_prob.detach() if old is None else old,
            entropy=scored.entropy,
            advantages=_by_token(inputs["advantages"], scored.log_prob),
            mask=mask,
            entropy_mask=entropy_mask,
            selected=inputs.get("cov_selected"),
            aggregation=self._aggregation(inputs, mask),
            scale=1.0 if self.loss_type == "dapo" else 1.0 / self._accumulation,
        )
        batch.weights = self._token_weights(inputs, batch)
        return batch

    @property
    def _accumulation(self) -> int:
        return self.current_gradient_accumulation_steps if self.model.training else 1

    def _aggregation(self, inputs: dict[str, Any], mask: Tensor) -> dict[str, Any]:
        """TRL's normalisation, without 1 / accumulation steps, as the losses' arguments."""
        if self.loss_type == "grpo":
            return dict(loss_agg_mode="seq-mean-token-mean", global_batch_size=len(mask))
        if self.loss_type == "bnpo":
            tokens = mask.sum().clamp(min=1.0)
            return dict(loss_agg_mode="token-mean", batch_num_tokens=tokens)
        if self.loss_type == "dr_grpo":
            return dict(
                loss_agg_mode="seq-mean-token-sum-norm",
                global_batch_size=len(mask),
                loss_scale_factor=self.max_completion_length,
            )
        # Of all ranks and of a whole generation: brought down to one optimiser step.
        tokens = inputs["num_items_in_batch"].clamp(min=1.0)
        if self.model.training:
            tokens = tokens * (self._accumulation / self.args.steps_per_generation)
        return dict(
            loss_agg_mode="token-mean",
            batch_num_tokens=tokens,
            dp_size=self.accelerator.num_processes,
        )

    def _token_weights(self, inputs: dict[str, Any], batch: _Batch) -> Tensor | None:
        """What TRL multiplies a token's policy loss with, [B, T], or None for 1."""
        factors = []
        if self.off_policy_mask_threshold is not None:
            factors.append(
                self.get_off_policy_mask(
                    advantages=batch.advantages,
                    per_token_logps=batch.log_prob,
                    sampling_per_token_logps=inputs.get(
                        "sampling_per_token_logps", batch.old_log_prob
                    ),
                    mask=batch.mask,
                    off_policy_threshold=self.off_policy_mask_threshold,
                )
            )
        if batch.entropy_mask is not None:
            factors.append(batch.entropy_mask)
        if self.use_vllm and self.vllm_importance_sampling_correction:
            factors.append(inputs["importance_sampling_ratio"])
        if not factors:
            return None
        weights = torch.ones_like(batch.old_log_prob)
        for factor in factors:
            weights = weights * factor
        return weights

    def _policy_loss(self, batch: _Batch) -> PolicyLoss:
        shared: dict[str, Any] = dict(
            log_prob=batch.log_prob,
            old_log_prob=batch.old_log_prob,
            advantages=batch.advantages,
            response_mask=batch.mask,
            rollout_is_weights=batch.weights,
            covariance_metrics=self.args.cov_metrics,
            **batch.aggregation,
        )
        if self.args.policy_loss == "kl_cov":
            return kl_cov_loss(
                **shared,
                kl_cov_ratio=self.args.kl_cov_ratio,
                ppo_kl_coef=self.args.ppo_kl_coef,
                selected=batch.selected,
            )
        shared.update(clip_ratio_low=self.epsilon_low, clip_ratio_high=self.epsilon_high)
        if self.args.policy_loss == "ppo_clip":
            return ppo_clip_loss(**shared, clip_ratio_c=self.args.delta)
        return clip_cov_loss(
            **shared,
            clip_cov_ratio=self.args.clip_cov_ratio,
            clip_cov_lb=self.args.clip_cov_lb,
            clip_cov_ub=self.args.clip_cov_ub,
            seed=self._micro_batch_seed(),
            selected=batch.selected,
        )

    def _micro_batch_seed(self) -> int:
        """Another one for each micro-batch and rank, the same again in a repeated run."""
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        return self.args.cov_seed + self._step * ranks + rank

    def _reference_kl(self, batch: _Batch, ref_log_prob: Tensor) -> Tensor:
        """TRL's, which unlike `reference_kl_loss` has no bounds, and may weigh with the ratio."""
        log_ratio = ref_log_prob - batch.log_prob
        divergence = torch.exp(log_ratio) - log_ratio - 1.0
        if self.args.use_bias_correction_kl:
            divergence = divergence * torch.exp(batch.log_prob - batch.old_log_prob)
        # Aggregated as entropies are: a value a token, here to be kept small.
        return entropy_bonus(-divergence, batch.mask, coef=self.beta, **batch.aggregation).loss

    def _entropy_coef(self) -> float:
        """As TRL applies it in this step: its controller moves it for the next one."""
        if self.use_adaptive_entropy and self._last_world_entropy > self.args.entropy_target:
            return 0.0
        return self.entropy_coef

    def _entropy_bonus(self, batch: _Batch, coef: float) -> Tensor:
        """TRL's: a mean over the micro-batch's tokens, whatever loss_type is."""
        mask = batch.mask if batch.entropy_mask is None else batch.mask * batch.entropy_mask
        tokens = mask.sum().clamp(min=1.0)
        return entropy_bonus(batch.entropy, mask, coef=coef, batch_num_tokens=tokens).loss

    # ---- metrics

    def _add_metrics(self, metrics: dict[str, Tensor]) -> None:
        """Means over the ranks, left on the device: `log` is the first to wait for them."""
        values = torch.stack([value.detach().float() for value in metrics.values()])
        means = self.accelerator.reduce(values, "mean")
        for name, mean in zip(metrics, means, strict=True):
            self._metrics[self._mode][_logged_name(name)].append(mean)

    def _note_policy_loss(self, loss: Tensor) -> None:
        """TRL logs this one where there is an entropy bonus; what it has is of its own loss."""
        if self._entropy_bonus_enabled:
            mean = self.accelerator.gather(loss.detach()).nanmean().item()
            self._metrics[self._mode]["policy_loss"][-1] = mean

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        metrics = self._metrics[self._mode]
        for name in metrics:
            if name.startswith(("cov/", "actor/")):
                metrics[name] = torch.stack(metrics[name]).tolist()
        super().log(logs, start_time)


class _Scored(NamedTuple):
    """Of one micro-batch: log_prob [B, T], entropy [B, T] or None, aux_loss [] or None."""

    log_prob: Tensor
    entropy: Tensor | None
    aux_loss: Tensor | None


@dataclass
class _Batch:
    """One micro-batch as the losses take it; tensors are [B, T]."""

    log_prob: Tensor
    old_log_prob: Tensor
    entropy: Tensor
    advantages: Tensor
    mask: Tensor
    entropy_mask: Tensor | None
    selected: Tensor | None
    aggregation: dict[str, Any]
    scale: float
    weights: Tensor | None = None


def _logged_name(name: str) -> str:
    """actor/covariance -> cov/covariance, actor/cov_clipfrac -> cov/selected_frac; others as is."""
    if name == "actor/cov_clipfrac":
        return "cov/selected_frac"
    if name.startswith("actor/cov"):
        return "cov/" + name.removeprefix("actor/").removeprefix("cov_")
    return name


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def _loss_mask(inputs: dict[str, Any]) -> Tensor:
    """[B, T]: 1 for the tokens that the policy wrote, 0 for padding and for tools' answers."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def _by_token(advantages: Tensor, like: Tensor) -> Tensor:
    """[B] or [B, T] -> [B, T]."""
    return advantages.unsqueeze(1).expand_as(like) if advantages.ndim == 1 else advantages


# ---- the head


@dataclass
class _HeadOutput(ModelOutput):
    """log_probs and entropy [B, L - 1], 0 where the label is ignored. What TRL reads of a model."""

    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    aux_loss: Tensor | None = None


class _FusedHead:
    """Answers `model(..., labels=..., fused_lm_head=True)`, TRL's request for token scores.

    TRL has replaced the model's forward with one that answers it; this one goes around TRL's, and
    leaves to it all other calls. Being the model's own forward, it is reached through whatever
    wraps the model (DDP, FSDP, autocast), so that their hooks run as ever.
    """

    def __init__(self, model: Any, temperature: float) -> None:
        self.temperature = temperature
        self.entropy = True
        self.softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        trl_forward = model.forward

        # `generate` checks its arguments against the signature of the model's class.
        @functools.wraps(type(model).forward)
        def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
            is_split = _is_split(module.get_output_embeddings().weight)
            if is_split or not kwargs.get("fused_lm_head") or "shift_labels" in kwargs:
                return trl_forward(*args, **kwargs)
            del kwargs["fused_lm_head"]
            return self.scores(module, kwargs.pop("labels"), *args, **kwargs)

        model.forward = types.MethodType(forward, model)

    def scores(self, model: Any, labels: Tensor, *args: Any, **kwargs: Any) -> _HeadOutput:
        """labels: [B, L] token ids, or -100 where no score is wanted."""
        kwargs["use_cache"] = False
        hidden = model.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        head = model.get_output_embeddings()
        weight, bias = head.weight, head.bias
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        with torch.autocast(device, enabled=False):
            found = linear_score_tokens(
                hidden,
                weight,
                labels[:, 1:],
                bias=bias,
                temperature=self.temperature,
                entropy=self.entropy,
                softcap=self.softcap,
                ignore_index=IGNORED,
            )
        return _HeadOutput(log_probs=found.log_prob, entropy=found.entropy)


def why_not_fused(model: Any) -> str | None:
    """Why `linear_score_tokens` cannot stand in for the head of a transformers model, or None.

    Covered is a text model with a backbone (`base_model`) and a head that is a plain `nn.Linear`
    on the backbone's last hidden states, with or without softcapping.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return f"its LM head is {type(head).__name__}, not a plain nn.Linear"
    if model.base_model is model:
        return "it has no backbone apart from its LM head"
    config = model.config.get_text_config()
    if config is not model.config:
        return "it takes more than text"
    for name in _LOGIT_FACTORS:
        if getattr(config, name, None) not in (None, 1.0):
            return f"its logits are scaled ({name})"
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return "it is split over devices"
    return None


def _is_split(weight: Tensor) -> bool:
    """Whether this rank has only a part: FSDP2's DTensor, DeepSpeed's ZeRO-3."""
    return hasattr(weight, "full_tensor") or hasattr(weight, "ds_id")


def _plain_model(trainer: Any, model: Any) -> Any:
    """The transformers model inside what accelerate and PEFT wrapped around it."""
    inner = trainer.accelerator.unwrap_model(model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner
