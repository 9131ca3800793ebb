"""The reference, called as the compiled implementations are."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from powerkernels.logprob import reference
from powerkernels.logprob.options import ScoreOptions, Scores, Support, score_dtype


def score_tokens(
    logits: Tensor, targets: Tensor, ignore_index: int, options: ScoreOptions
) -> Scores:
    """logits [..., V], targets [...], which are in [0, V) or ignore_index."""
    check_targets(targets, logits.shape[-1], ignore_index)
    sums = row_sums(logits, targets, ignore_index, options)
    scores = finish_scores(sums.unsqueeze(0), targets, ignore_index, options)
    return Scores(*(score.to(score_dtype(logits)) for score in scores))


def row_sums(logits: Tensor, targets: Tensor, ignore_index: int, options: ScoreOptions) -> Tensor:
    """float64 [5, N]; see the reference."""
    return reference.row_sums(
        logits.reshape(-1, logits.shape[-1]),
        targets.flatten(),
        alpha=options.alpha,
        temperature=_temperature(options),
        entropy=options.entropy,
        softcap=options.softcap,
        ignore_index=ignore_index,
    )


def finish_scores(
    sums: Tensor, targets: Tensor, ignore_index: int, options: ScoreOptions
) -> Scores:
    """float64 [K, 5, N] of K shards -> the scores of all, float64, shaped as targets."""
    log_prob, log_z, entropy, row_max, log_sum = (
        value.view(targets.shape)
        for value in reference.finish_scores(
            sums,
            (targets == ignore_index).flatten(),
            alpha=options.alpha,
            temperature=_temperature(options),
            entropy=options.entropy,
        )
    )
    return Scores(
        log_prob, log_z, entropy if options.entropy else entropy.new_empty(0), row_max, log_sum
    )


def score_tokens_bwd(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    options: ScoreOptions,
    scores: Scores,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    dlogits: Tensor,
) -> None:
    """Writes the gradient of logits [..., V] to dlogits, which may be logits."""
    if gradients[2] is None:
        scores = scores._replace(entropy=torch.zeros_like(scores.log_prob))
    temperature = _temperature(options)
    if isinstance(temperature, Tensor):
        temperature = temperature.view(targets.shape)
    gradient = reference.score_tokens_bwd(
        logits,
        targets,
        scores,
        gradients,
        alpha=options.alpha,
        temperature=temperature,
        softcap=options.softcap,
        ignore_index=ignore_index,
    )
    dlogits.copy_(gradient)


def sample_tokens(
    logits: Tensor,
    seed: Tensor,
    counters: Tensor,
    banned: Tensor | None,
    options: ScoreOptions,
    support: Support | None,
) -> tuple[Tensor, Scores]:
    """logits [C, V], seed int64 [1], counters int64 [C, 4], banned int64 [C] -> token, scores."""
    token = reference.draw_tokens(
        logits,
        alpha=options.alpha,
        seed=seed,
        counters=counters,
        banned=banned,
        support=support,
    )
    scores = score_tokens(logits, token.clamp(min=0), -100, options)
    if support is not None:
        log_z = reference.support_log_z(logits, alpha=options.alpha, support=support)
        scores = scores._replace(log_z=log_z)
    return token, scores


def support_threshold(logits: Tensor, options: ScoreOptions, support: Support) -> Tensor:
    """logits [C, V] -> float64 [C]; see the reference."""
    return reference.support_threshold(logits, alpha=options.alpha, support=support)


def check_targets(targets: Tensor, vocab: int, ignore_index: int) -> None:
    if targets.device.type != "cpu":  # would wait for the device
        return
    bad = ((targets < 0) | (targets >= vocab)) & (targets != ignore_index)
    if bad.any():
        raise_bad_target(targets, int(bad.flatten().nonzero()[0]), vocab, ignore_index)


def raise_bad_target(targets: Tensor, row: int, vocab: int, ignore_index: int) -> NoReturn:
    raise IndexError(
        f"targets must be in [0, {vocab}) or ignore_index {ignore_index}, "
        f"got {int(targets.flatten()[row])} at row {row}"
    )


def _temperature(options: ScoreOptions) -> float | Tensor:
    """A number, or float64 [N]."""
    temperatures = options.temperatures
    return options.temperature if temperatures is None else temperatures.double().flatten()
