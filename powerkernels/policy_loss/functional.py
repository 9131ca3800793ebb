"""The losses: checks, the torch op with its gradient, public functions."""

from __future__ import annotations

import math
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from powerkernels import _extension
from powerkernels._arguments import (
    LOGIT_DTYPES,
    MASK_DTYPES,
    check_bounds,
    check_number,
    check_shape,
    check_tensor,
)
from powerkernels.covariance import covariance_table
from powerkernels.covariance import reference as covariance_reference
from powerkernels.covariance.functional import (
    check_band,
    check_number_of_tokens,
    check_sequence_index,
    clip_bounds,
    moments_of,
    select_cov,
)
from powerkernels.covariance.reference import Rule
from powerkernels.covariance.table import SHARES
from powerkernels.covariance.tokens import (
    as_bool,
    check_like,
    check_tokens,
    layout,
    per_token,
    sequences_of,
    tokens_of,
)
from powerkernels.policy_loss import cpp, reference
from powerkernels.policy_loss import objective as objectives
from powerkernels.policy_loss.advice import check_advantage_scale
from powerkernels.policy_loss.aggregate import Aggregation
from powerkernels.policy_loss.objective import Objective, TokenInputs, result_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ESTIMATORS = {
    "k1": objectives.K1,
    "kl": objectives.K1,
    "abs": objectives.ABS,
    "k2": objectives.K2,
    "mse": objectives.K2,
    "k3": objectives.K3,
    "low_var_kl": objectives.K3,
}
NAMES = ("log_prob", "advantages", "response_mask")


class PolicyLoss(NamedTuple):
    loss: Tensor  # float32 [] (float64 where an input is), with a gradient for log_prob
    metrics: dict[str, Tensor]  # float64 [] each, on the tokens' device


def implementation(inputs: TokenInputs) -> ModuleType:
    """The module that computes these losses."""
    if inputs.dtype == torch.float64:
        return reference
    backend = _extension.backend_for(inputs.log_prob.device)
    if backend == "cpp":
        return cpp
    if backend == "triton":
        from powerkernels.policy_loss import gpu  # imports triton

        return gpu
    return reference


@torch.library.custom_op("powerkernels::policy_loss_sums", mutates_args=())
def _loss_sums(
    log_prob: Tensor,
    old_log_prob: Tensor | None,
    advantages: Tensor | None,
    mask: Tensor | None,
    selected: Tensor | None,
    weights: Tensor | None,
    moments: Tensor | None,
    cu_seqlens: Tensor | None,
    kind: int,
    clip: bool,
    low: float,
    high: float,
    dual_clip: float,
    on_selected: int,
    penalty: float,
    straight_through: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_bounds(cu_seqlens, log_prob)

    def laid_out(value: Tensor | None) -> Tensor | None:
        return None if value is None else layout(value, cu_seqlens)

    inputs = TokenInputs(
        layout(log_prob, cu_seqlens),
        laid_out(old_log_prob),
        None if advantages is None else per_token(advantages, log_prob, cu_seqlens),
        layout(as_bool(mask, log_prob), cu_seqlens),
        laid_out(selected),
        laid_out(weights),
        moments,
        None if cu_seqlens is None else cu_seqlens.long().contiguous(),
    )
    objective = Objective(kind, clip, low, high, dual_clip, on_selected, penalty, straight_through)
    found = implementation(inputs).loss_sums(inputs, objective)
    return found.row_loss, found.row_count, found.sums, found.terms.view(log_prob.shape)


@_loss_sums.register_fake
def _(
    log_prob: Tensor,
    old_log_prob: Tensor | None,
    advantages: Tensor | None,
    mask: Tensor | None,
    selected: Tensor | None,
    weights: Tensor | None,
    moments: Tensor | None,
    cu_seqlens: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = sequences_of(log_prob, cu_seqlens)

    def doubles(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float64, device=log_prob.device)

    dtype = result_dtype(log_prob, old_log_prob, advantages, weights)
    terms = torch.empty(log_prob.shape, dtype=dtype, device=log_prob.device)
    return doubles(rows), doubles(rows), doubles(objectives.NUM_SUMS), terms


def _loss_sums_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[3], inputs[7])
    ctx.dtype = inputs[0].dtype
    ctx.set_materialize_grads(False)


def _loss_sums_backward(ctx: Any, grad_rows: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    terms, cu_seqlens = ctx.saved_tensors
    if grad_rows is None:
        return 16 * (None,)
    factors = grad_rows.to(terms.dtype)
    if cu_seqlens is None:
        factors = factors[:, None]
    else:
        factors = factors.repeat_interleave(cu_seqlens.diff(), output_size=terms.shape[0])
    return ((terms * factors).to(ctx.dtype),) + 15 * (None,)


_loss_sums.register_autograd(_loss_sums_backward, setup_context=_loss_sums_setup)


class _Call(NamedTuple):
    """The checked arguments that all losses share."""

    log_prob: Tensor
    old_log_prob: Tensor | None
    advantages: Tensor | None
    mask: Tensor | None
    weights: Tensor | None
    cu_seqlens: Tensor | None
    aggregation: Aggregation

    def loss(
        self, objective: Objective, selected: Tensor | None = None, moments: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The aggregated loss and the sums, without a gradient."""

        def constant(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.detach()

        row_loss, row_count, sums, _ = _loss_sums(
            self.log_prob,
            constant(self.old_log_prob),
            constant(self.advantages),
            self.mask,
            selected,
            constant(self.weights),
            moments,
            self.cu_seqlens,
            *objective,
        )
        horizon = None if self.cu_seqlens is not None else self.log_prob.shape[1]
        loss = self.aggregation(row_loss, row_count, horizon)
        dtype = result_dtype(self.log_prob, self.old_log_prob, self.advantages, self.weights)
        return loss.to(dtype), sums.detach()

    def policy_loss(
        self,
        objective: Objective,
        columns: dict[str, int],
        selected: Tensor | None,
        moments: Tensor | None,
        state: Tensor | None,
        covariance_metrics: bool,
    ) -> PolicyLoss:
        """columns: of which sums the means are metrics, by the metrics' names."""
        loss, sums = self.loss(objective, selected, moments)
        means = sums / sums[objectives.COUNT].clamp(min=1)
        metrics = {f"actor/{name}": means[column] for name, column in columns.items()}
        metrics |= _common_metrics(sums, means)
        if selected is not None:
            metrics |= _selection_metrics(sums, means, moments, state)
        if covariance_metrics:
            metrics |= _covariance_metrics(self, means)
        return PolicyLoss(loss, metrics)


def _checked(
    log_prob: Tensor,
    old_log_prob: Tensor | None,
    advantages: Tensor | None,
    mask: Tensor | None,
    weights: Tensor | None,
    cu_seqlens: Tensor | None,
    aggregation: Aggregation,
) -> _Call:
    """Of a loss that compares two policies."""
    check_tokens(log_prob, advantages, mask, cu_seqlens, names=NAMES, sequences=True)
    check_tensor("old_log_prob", old_log_prob, LOGIT_DTYPES, log_prob.device)
    assert old_log_prob is not None
    check_shape("old_log_prob", old_log_prob, log_prob.shape)
    check_like("rollout_is_weights", weights, log_prob, LOGIT_DTYPES)
    aggregation.check(None if cu_seqlens is not None else log_prob.shape[1])
    return _Call(log_prob, old_log_prob, advantages, mask, weights, cu_seqlens, aggregation)


def ppo_clip_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor | None = None,
    *,
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float | None = None,
    clip_ratio_c: float | None = 3.0,
    loss_agg_mode: str = "token-mean",
    rollout_is_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
    loss_scale_factor: float | Tensor | None = None,
    covariance_metrics: bool = False,
) -> PolicyLoss:
    """PPO's clipped objective; with clip_ratio_high > clip_ratio_low it is clip-higher.

    A token's loss is max(-A r, -A clamp(r, 1 - clip_ratio_low, 1 + clip_ratio_high)), and at
    negative advantages at most -A clip_ratio_c (dual clip). r = exp(log_prob - old_log_prob), the
    difference clamped to ±20, with no gradient beyond.

    Masked-out places may hold anything. A NaN at a place that counts makes the loss NaN; the metric
    actor/nonfinite_tokens counts tokens with a NaN or infinity in any input. Nothing waits for the
    device. The gradient of log_prob comes with one multiplication a token in the backward.

    Args:
        log_prob: float16, bfloat16, float32 or float64, [B, T], or flat [N] with cu_seqlens. The
            one argument with a gradient (once, not twice).
        old_log_prob: of any of these, shaped as log_prob; of the policy that the samples are from.
        advantages: of any of these, shaped as log_prob, or one a sequence: [B] or [B, 1]. With
            cu_seqlens [1, N] is one a token too: where N = B and a sequence is empty, only those of
            two dimensions are clear, and others an error, or on a GPU NaN.
        response_mask: shaped as log_prob, bool, integer or floating: a token counts where it is not
            0. None: all.
        clip_ratio_low, clip_ratio_high: >= 0; high is low where it is None.
        clip_ratio_c: > 1; None for no dual clip.
        loss_agg_mode: "token-mean": sum over tokens / batch_num_tokens * dp_size. "token-sum": sum
            * dp_size. "seq-mean-token-sum": sum / global_batch_size * dp_size;
            "seq-mean-token-sum-norm": that / (loss_scale_factor or T). "seq-mean-token-mean": sum
            over sequences of their tokens' mean / global_batch_size * dp_size.
        rollout_is_weights: shaped as log_prob, factors of the tokens' losses; None: 1.
        cu_seqlens: int32 or int64 [B + 1], bounds of the sequences in flat log_prob.
        dp_size: ranks over which gradients are averaged.
        batch_num_tokens, global_batch_size: tokens or sequences of all micro-batches and ranks, a
            number or a tensor of one element. None: those of this call that count, at least 1.
        loss_scale_factor: see loss_agg_mode.
        covariance_metrics: whether to add the covariance and its table to the metrics (a sort).

    Returns:
        PolicyLoss: the loss, and metrics, means over the tokens of this call where not said
        otherwise: actor/pg_clipfrac and actor/ppo_clipfrac (clipped), actor/pg_clipfrac_lower (by
        the dual clip), actor/ppo_kl and actor/approx_kl_k1 (old_log_prob - log_prob),
        actor/approx_kl_k3 (r - 1 - log r), actor/nonfinite_tokens (a number).

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype, device or range, or
            cu_seqlens do not add up.

    Source: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", equation 7; modes and
    metrics as in verl 0.9.1.
    """
    aggregation = Aggregation(
        loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor
    )
    call = _checked(
        log_prob,
        old_log_prob,
        advantages,
        response_mask,
        rollout_is_weights,
        cu_seqlens,
        aggregation,
    )
    low, high = clip_bounds(clip_ratio_low, clip_ratio_high)
    if clip_ratio_c is not None:
        check_number("clip_ratio_c", clip_ratio_c, low=1, open_low=True)
    moments = _moments(log_prob, advantages, response_mask, cu_seqlens, covariance_metrics)
    dual_clip = math.inf if clip_ratio_c is None else float(clip_ratio_c)
    objective = Objective(clip=True, low=low, high=high, dual_clip=dual_clip)
    columns = {
        "pg_clipfrac": objectives.CLIPPED,
        "ppo_kl": objectives.NEG_LOG_RATIO,
        "pg_clipfrac_lower": objectives.DUAL_CLIPPED,
        "ppo_clipfrac": objectives.CLIPPED,
    }
    return call.policy_loss(objective, columns, None, moments, None, covariance_metrics)


def clip_cov_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor | None = None,
    *,
    clip_cov_ratio: float = 0.0002,
    clip_cov_lb: float = 1.0,
    clip_cov_ub: float = 5.0,
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float | None = None,
    seed: int | Tensor | None = None,
    selected: Tensor | None = None,
    loss_agg_mode: str = "token-mean",
    rollout_is_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sequence_index: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
    loss_scale_factor: float | Tensor | None = None,
    covariance_metrics: bool = False,
) -> PolicyLoss:
    """Clip-Cov: PPO's clipped objective, without the gradient of a few tokens of high covariance.

    Of the tokens with clip_cov_lb < cov < clip_cov_ub that PPO's clipping leaves alone,
    max(1, floor(clip_cov_ratio * number of tokens)), drawn uniformly without replacement, have
    their loss set to 0. There is no dual clip. See `select_cov_band` for the selection: nothing is
    selected where every covariance is 0, as it is at constant advantages (then the metric
    actor/cov_constant is 1).

    Args:
        log_prob, old_log_prob, advantages, response_mask, clip_ratio_low, clip_ratio_high,
            loss_agg_mode, rollout_is_weights, cu_seqlens, dp_size, batch_num_tokens,
            global_batch_size, loss_scale_factor, covariance_metrics: as of `ppo_clip_loss`.
        clip_cov_ratio: in (0, 1].
        clip_cov_lb, clip_cov_ub: bounds of the covariance.
        seed: of the choice, 64 bits, an int or an int64 tensor of one element; another one each
            step. Needed where selected is None.
        selected: bool, integer or floating, shaped as log_prob: the tokens to leave out, as
            `SelectionAccumulator.band` gives them for a whole optimiser step. None: those of this
            call (and of the other ranks of process_group).
        sequence_index, process_group: as of `select_cov_band`; only where selected is None.

    Returns:
        PolicyLoss: metrics as of `ppo_clip_loss`, but actor/pg_clipfrac is, as in verl, the share
        that the covariance left out, as is actor/cov_clipfrac; actor/ppo_clipfrac is PPO's.
        actor/cov_selected_tokens is their number. Where selected is None also actor/covariance (of
        this call's tokens, around the means of all ranks) and actor/cov_constant.

    Raises: as `ppo_clip_loss`; ValueError if neither seed nor selected is given.

    Source: Cui et al. 2025, "The Entropy Mechanism of Reinforcement Learning for Reasoning Language
    Models", section 4.3; order of the steps as in verl 0.9.1.
    """
    aggregation = Aggregation(
        loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor
    )
    call = _checked(
        log_prob,
        old_log_prob,
        advantages,
        response_mask,
        rollout_is_weights,
        cu_seqlens,
        aggregation,
    )
    low, high = clip_bounds(clip_ratio_low, clip_ratio_high)
    ratio, _ = check_number_of_tokens(clip_cov_ratio, None, "clip_cov_ratio")
    check_band(clip_cov_lb, clip_cov_ub, ("clip_cov_lb", "clip_cov_ub"))
    check_sequence_index(sequence_index, log_prob, cu_seqlens)
    check_like("selected", selected, log_prob, MASK_DTYPES)
    if selected is None and seed is None:
        raise ValueError("clip_cov_loss needs a seed, another one each step, or selected")
    moments: Tensor | None
    state = None
    if selected is None:
        check_advantage_scale(advantages, response_mask)
        selected, moments, state = select_cov(
            log_prob,
            advantages,
            response_mask,
            Rule(True, ratio, -1, float(clip_cov_lb), float(clip_cov_ub)),
            old_log_prob=old_log_prob,
            clip_bounds=(low, high),
            cu_seqlens=cu_seqlens,
            sequence_index=sequence_index,
            seed=seed,
            process_group=process_group,
        )
    else:
        selected = as_bool(selected, log_prob)
        moments = _moments(log_prob, advantages, response_mask, cu_seqlens, covariance_metrics)
    objective = Objective(clip=True, low=low, high=high, selected=objectives.DROP)
    columns = {
        "pg_clipfrac": objectives.SELECTED,
        "ppo_kl": objectives.NEG_LOG_RATIO,
        "ppo_clipfrac": objectives.CLIPPED,
    }
    return call.policy_loss(objective, columns, selected, moments, state, covariance_metrics)


def kl_cov_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor | None = None,
    *,
    kl_cov_ratio: float = 0.0002,
    ppo_kl_coef: float = 1.0,
    selected: Tensor | None = None,
    loss_agg_mode: str = "token-mean",
    rollout_is_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
    loss_scale_factor: float | Tensor | None = None,
    covariance_metrics: bool = False,
) -> PolicyLoss:
    """KL-Cov: the unclipped objective -A r, with a penalty on the tokens of highest covariance.

    The max(1, floor(kl_cov_ratio * number of tokens)) tokens of the largest covariance get
    ppo_kl_coef * |log_prob - old_log_prob| added to their loss. See `select_top_cov` for the
    selection: nothing is selected where every covariance is 0.

    Args:
        log_prob, old_log_prob, advantages, response_mask, loss_agg_mode, rollout_is_weights,
            cu_seqlens, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor,
            covariance_metrics: as of `ppo_clip_loss`.
        kl_cov_ratio: in (0, 1].
        ppo_kl_coef: >= 0.
        selected: as of `clip_cov_loss`; from `SelectionAccumulator.top`.
        process_group: as of `select_top_cov`; only where selected is None.

    Returns:
        PolicyLoss: metrics as of `clip_cov_loss`, but for those of PPO's clipping; actor/ppo_kl is,
        as in verl, the mean of |log_prob - old_log_prob|.

    Raises: as `ppo_clip_loss`.

    Source: Cui et al. 2025, section 4.3; order of the steps as in verl 0.9.1.
    """
    aggregation = Aggregation(
        loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor
    )
    call = _checked(
        log_prob,
        old_log_prob,
        advantages,
        response_mask,
        rollout_is_weights,
        cu_seqlens,
        aggregation,
    )
    ratio, _ = check_number_of_tokens(kl_cov_ratio, None, "kl_cov_ratio")
    check_number("ppo_kl_coef", ppo_kl_coef, low=0)
    check_like("selected", selected, log_prob, MASK_DTYPES)
    moments: Tensor | None
    state = None
    if selected is None:
        check_advantage_scale(advantages, response_mask)
        selected, moments, state = select_cov(
            log_prob,
            advantages,
            response_mask,
            Rule(False, ratio, -1),
            cu_seqlens=cu_seqlens,
            process_group=process_group,
        )
    else:
        selected = as_bool(selected, log_prob)
        moments = _moments(log_prob, advantages, response_mask, cu_seqlens, covariance_metrics)
    objective = Objective(selected=objectives.PENALISE, penalty=float(ppo_kl_coef))
    columns = {"ppo_kl": objectives.ABS_LOG_RATIO}
    return call.policy_loss(objective, columns, selected, moments, state, covariance_metrics)


def entropy_bonus(
    entropy: Tensor,
    response_mask: Tensor | None = None,
    *,
    coef: float,
    loss_agg_mode: str = "token-mean",
    cu_seqlens: Tensor | None = None,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
    loss_scale_factor: float | Tensor | None = None,
) -> PolicyLoss:
    """-coef times the aggregated entropy: to be added to a policy loss.

    Args:
        entropy: of each token's distribution, in nats, as `score_tokens` gives it; dtypes and
            shapes as of log_prob in `ppo_clip_loss`, the others too.
        coef: finite, >= 0.

    Returns:
        PolicyLoss: metrics actor/entropy (mean over tokens) and actor/nonfinite_tokens.

    Raises: as `ppo_clip_loss`.

    Source: the entropy regularisation that Cui et al. 2025 compare with, section 4.1.
    """
    aggregation = Aggregation(
        loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor
    )
    names = ("entropy", *NAMES[1:])
    check_tokens(
        entropy,
        None,
        response_mask,
        cu_seqlens,
        names=names,
        sequences=True,
        has_advantages=False,
    )
    check_number("coef", coef, low=0)
    horizon = None if cu_seqlens is not None else entropy.shape[1]
    aggregation.check(horizon)
    row_loss, row_count, sums, _ = _loss_sums(
        entropy,
        None,
        None,
        response_mask,
        None,
        None,
        None,
        cu_seqlens,
        *Objective(objectives.VALUE),
    )
    sums = sums.detach()
    loss = -coef * aggregation(row_loss, row_count, horizon)
    mean = row_loss.detach().sum() / sums[objectives.COUNT].clamp(min=1)
    metrics = {"actor/entropy": mean, "actor/nonfinite_tokens": sums[objectives.NONFINITE]}
    return PolicyLoss(loss.to(result_dtype(entropy)), metrics)


def reference_kl_loss(
    log_prob: Tensor,
    ref_log_prob: Tensor,
    response_mask: Tensor | None = None,
    *,
    coef: float,
    estimator: str = "k3",
    loss_agg_mode: str = "token-mean",
    cu_seqlens: Tensor | None = None,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
    loss_scale_factor: float | Tensor | None = None,
) -> PolicyLoss:
    """coef times an estimate of KL(policy || reference): to be added to a policy loss.

    With d = log_prob - ref_log_prob the estimators of a token are k1 (or "kl") d; "abs" |d|; k2 (or
    "mse") d²/2; k3 (or "low_var_kl") e^-d + d - 1, with d clamped to ±20 and the result to at most
    10, without a gradient beyond. A "+" after it takes the gradient of k2, which on the policy's
    own samples is in the mean that of the divergence.

    Args:
        log_prob, response_mask and the others: as of `ppo_clip_loss`.
        ref_log_prob: of the reference policy, shaped as log_prob.
        coef: finite, >= 0.
        estimator: k1, kl, abs, k2, mse, k3 or low_var_kl, each also with a "+".

    Returns:
        PolicyLoss: metrics actor/kl_loss (the estimate, aggregated as the loss is),
        actor/nonfinite_tokens.

    Raises: as `ppo_clip_loss`.

    Source: Schulman 2020, "Approximating KL Divergence"; names and bounds as in verl 0.9.1.
    """
    aggregation = Aggregation(
        loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor
    )
    check_tokens(
        log_prob,
        None,
        response_mask,
        cu_seqlens,
        names=NAMES,
        sequences=True,
        has_advantages=False,
    )
    check_tensor("ref_log_prob", ref_log_prob, LOGIT_DTYPES, log_prob.device)
    check_shape("ref_log_prob", ref_log_prob, log_prob.shape)
    aggregation.check(None if cu_seqlens is not None else log_prob.shape[1])
    call = _Call(log_prob, ref_log_prob, None, response_mask, None, cu_seqlens, aggregation)
    check_number("coef", coef, low=0)
    known = isinstance(estimator, str)
    kind = ESTIMATORS.get(estimator.removesuffix("+")) if known else None
    if kind is None:
        raise ValueError(f"estimator must be one of {tuple(ESTIMATORS)}, got {estimator!r}")
    objective = Objective(kind, straight_through=estimator.endswith("+"))
    divergence, sums = call.loss(objective)
    metrics = {
        "actor/kl_loss": divergence.detach().double(),
        "actor/nonfinite_tokens": sums[objectives.NONFINITE],
    }
    return PolicyLoss(coef * divergence, metrics)


def _common_metrics(sums: Tensor, means: Tensor) -> dict[str, Tensor]:
    return {
        "actor/approx_kl_k1": means[objectives.NEG_LOG_RATIO],
        "actor/approx_kl_k3": means[objectives.K3_ESTIMATE],
        "actor/nonfinite_tokens": sums[objectives.NONFINITE],
    }


def _selection_metrics(
    sums: Tensor, means: Tensor, moments: Tensor | None, state: Tensor | None
) -> dict[str, Tensor]:
    metrics = {
        "actor/cov_clipfrac": means[objectives.SELECTED],
        "actor/cov_selected_tokens": sums[objectives.SELECTED],
    }
    if state is not None:
        assert moments is not None
        some = moments[covariance_reference.COUNT] > 0
        finite = moments[covariance_reference.NONFINITE] == 0
        constant = some & finite & (state[covariance_reference.NUM_NONZERO] == 0)
        metrics["actor/covariance"] = means[objectives.COVARIANCE]
        metrics["actor/cov_constant"] = constant.double()
    return metrics


def _covariance_metrics(call: _Call, means: Tensor) -> dict[str, Tensor]:
    assert call.advantages is not None
    table = covariance_table(call.log_prob, call.advantages, call.mask, cu_seqlens=call.cu_seqlens)
    metrics = {"actor/covariance": means[objectives.COVARIANCE]}
    for place, share in enumerate(SHARES):
        metrics[f"actor/cov_top_{share:g}"] = table.mean_cov[place]
        metrics[f"actor/cov_quantile_{share:g}"] = table.quantile[place]
    return metrics


@torch.library.custom_op("powerkernels::cov_moments", mutates_args=())
def _cov_moments(
    log_prob: Tensor, advantages: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    check_bounds(cu_seqlens, log_prob)
    return moments_of([tokens_of(log_prob, advantages, mask, None, cu_seqlens)], "")[0]


@_cov_moments.register_fake
def _(log_prob: Tensor, *_: Any) -> Tensor:
    size = covariance_reference.NUM_MOMENTS
    return torch.empty(size, dtype=torch.float64, device=log_prob.device)


def _moments(
    log_prob: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    wanted: bool,
) -> Tensor | None:
    if not wanted:
        return None
    return _cov_moments(log_prob.detach(), advantages.detach(), mask, cu_seqlens)
