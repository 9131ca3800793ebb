"""One selection over several micro-batches, and over ranks: an optimiser step's."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from powerkernels import _process_group
from powerkernels._arguments import LOGIT_DTYPES, MASK_DTYPES, check_bounds, seed_tensor
from powerkernels.covariance import reference
from powerkernels.covariance.functional import (
    Selection,
    check_band,
    check_number_of_tokens,
    check_sequence_index,
    clip_bounds,
    select,
    without_clipped,
)
from powerkernels.covariance.reference import Rule
from powerkernels.covariance.tokens import Tokens, check_like, check_tokens, tokens_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class SelectionStats(NamedTuple):
    """Of all micro-batches on all ranks; scalars on the tokens' device."""

    count: Tensor  # type: ignore[assignment]  # int64 [], tokens of the masks
    selected: Tensor  # int64 []
    nonfinite: Tensor  # int64 [], tokens with a NaN or infinity; if any, none is selected
    mean_log_prob: Tensor  # float64 []
    mean_advantage: Tensor  # float64 []


class SelectionAccumulator:
    """Takes the tokens of a step micro-batch by micro-batch, then gives each one's mask.

    The masks are those that one call on all micro-batches together would give: which tokens are
    selected does not depend on how the step is divided into micro-batches, nor, with process_group,
    into ranks. (Sequences count through from rank to rank, and on a rank in the order they are
    added, unless sequence_index numbers them; of equal covariances the first in that order goes
    first.)

        step = SelectionAccumulator.top(ratio=2e-3)
        for batch in micro_batches:
            step.add(batch.log_prob, batch.advantages, batch.mask)
        for batch, selected in zip(micro_batches, step.masks()):
            loss = kl_cov_loss(..., selected=selected)

    It keeps the tensors that it is given until `masks`: 9 bytes a token in float32. Nothing waits
    for the device.
    """

    def __init__(self, rule: Rule, seed: int | Tensor | None, group: str) -> None:
        self._rule, self._seed, self._group = rule, seed, group
        self._parts: list[Tokens] = []
        self._shapes: list[torch.Size] = []
        self._selection: Selection | None = None

    @classmethod
    def top(
        cls,
        *,
        ratio: float | None = None,
        k: int | None = None,
        process_group: ProcessGroup | None = None,
    ) -> SelectionAccumulator:
        """The largest covariances; arguments as of `select_top_cov`."""
        ratio, k = check_number_of_tokens(ratio, k)
        return cls(Rule(False, ratio, k), None, _process_group.name_of(process_group))

    @classmethod
    def band(
        cls,
        *,
        ratio: float | None = None,
        k: int | None = None,
        lb: float,
        ub: float,
        seed: int | Tensor,
        process_group: ProcessGroup | None = None,
    ) -> SelectionAccumulator:
        """A uniform subset of a band; arguments as of `select_cov_band`."""
        ratio, k = check_number_of_tokens(ratio, k)
        check_band(lb, ub)
        seed_tensor(seed, torch.device("cpu"))  # refused here and not at the end
        rule = Rule(True, ratio, k, float(lb), float(ub))
        return cls(rule, seed, _process_group.name_of(process_group))

    def add(
        self,
        log_prob: Tensor,
        advantages: Tensor,
        mask: Tensor | None = None,
        *,
        exclude: Tensor | None = None,
        old_log_prob: Tensor | None = None,
        clip_ratio_low: float = 0.2,
        clip_ratio_high: float | None = None,
        cu_seqlens: Tensor | None = None,
        sequence_index: Tensor | None = None,
    ) -> None:
        """One micro-batch: arguments as of `select_cov_band`.

        old_log_prob, shaped as log_prob, leaves out what PPO's clipping to
        [1 - clip_ratio_low, 1 + clip_ratio_high] makes constant, as Clip-Cov does; clip_ratio_high
        is clip_ratio_low where it is None.

        Raises:
            RuntimeError: `masks` has been called.
            TypeError, ValueError: as `select_cov_band`.
        """
        if self._selection is not None:
            raise RuntimeError("masks() was called: this selection takes no more micro-batches")
        check_tokens(log_prob, advantages, mask, cu_seqlens)
        check_like("exclude", exclude, log_prob, MASK_DTYPES)
        check_like("old_log_prob", old_log_prob, log_prob, LOGIT_DTYPES)
        check_sequence_index(sequence_index, log_prob, cu_seqlens)
        low, high = clip_bounds(clip_ratio_low, clip_ratio_high)
        if not torch.compiler.is_compiling():
            check_bounds(cu_seqlens, log_prob)
        if sequence_index is not None:
            sequence_index = sequence_index.long()
        tokens = tokens_of(log_prob, advantages, mask, exclude, cu_seqlens, sequence_index)
        if old_log_prob is not None:
            tokens = without_clipped(tokens, old_log_prob, low, high)
        first = sum(part.num_sequences for part in self._parts)
        self._parts.append(tokens._replace(first_sequence=tokens.first_sequence + first))
        self._shapes.append(log_prob.shape)

    def masks(self) -> list[Tensor]:
        """bool masks of the micro-batches, in the order they were added, each in its own shape.

        With process_group all ranks call together; each has added one micro-batch or more.

        Raises:
            RuntimeError: nothing has been added.
        """
        found = self._found()
        return [mask.view(s) for mask, s in zip(found.masks, self._shapes, strict=True)]

    def stats(self) -> SelectionStats:
        """What the masks were found by; calls for them as `masks` does."""
        found = self._found()
        counts = found.moments.long()
        return SelectionStats(
            counts[reference.COUNT],
            found.state[reference.CHOSEN],
            counts[reference.NONFINITE],
            *reference.means(found.moments),
        )

    def _found(self) -> Selection:
        if self._selection is None:
            if not self._parts:
                raise RuntimeError("no micro-batch has been added")
            seed = self._seed
            if seed is not None:
                seed = seed_tensor(seed, self._parts[0].log_prob.device)
            self._selection = select(self._parts, self._rule, seed, self._group)
            self._parts = []  # not needed any more
        return self._selection
