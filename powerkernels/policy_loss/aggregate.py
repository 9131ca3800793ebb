"""From the losses of sequences to one number, as verl's `agg_loss` defines the modes."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from torch import Tensor

from powerkernels._arguments import check_number, described
from powerkernels._cuda_graph import moved

LossAggMode = Literal[
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
]
EPSILON = 1e-8


class Aggregation(NamedTuple):
    mode: str
    dp_size: int | float
    batch_num_tokens: float | Tensor | None
    global_batch_size: float | Tensor | None
    loss_scale_factor: float | Tensor | None

    def check(self, horizon: int | None) -> None:
        """horizon: T of padded sequences, None of packed ones."""
        modes = get_args(LossAggMode)
        if self.mode not in modes:
            raise ValueError(f"loss_agg_mode must be one of {modes}, got {self.mode!r}")
        check_number("dp_size", self.dp_size, low=1)
        for name in ("batch_num_tokens", "global_batch_size", "loss_scale_factor"):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                if value.numel() != 1:
                    raise ValueError(f"{name} must be a number or one element, {described(value)}")
            elif value is not None:
                check_number(name, value, low=0, open_low=True)
        total = "batch_num_tokens" if self.mode == "token-mean" else "global_batch_size"
        if self.dp_size > 1 and self.mode != "token-sum" and getattr(self, total) is None:
            raise ValueError(f"{total}, of all ranks, must be given where dp_size > 1")
        needs_scale = self.mode == "seq-mean-token-sum-norm" and horizon is None
        if needs_scale and self.loss_scale_factor is None:
            raise ValueError("loss_scale_factor must be given for packed sequences in this mode")

    def __call__(self, row_loss: Tensor, row_count: Tensor, horizon: int | None) -> Tensor:
        """float64 []. Without a token 0, where counts are local."""
        if self.mode == "token-mean":
            tokens = self.batch_num_tokens
            count = _or("batch_num_tokens", tokens, row_count.sum())
            return row_loss.sum() / count * self.dp_size
        if self.mode == "token-sum":
            return row_loss.sum() * self.dp_size
        if self.mode == "seq-mean-token-mean":
            row_loss = row_loss / (row_count + EPSILON)
        found = (row_count > 0).sum().double()
        sequences = _or("global_batch_size", self.global_batch_size, found)
        loss = row_loss.sum() / sequences * self.dp_size
        if self.mode == "seq-mean-token-sum-norm":
            factor = self.loss_scale_factor
            if factor is None:
                factor = max(horizon or 0, 1)
            loss = loss / _on_device("loss_scale_factor", factor, loss)
        return loss


def _or(name: str, given: float | Tensor | None, local: Tensor) -> float | Tensor:
    return local.clamp(min=1) if given is None else _on_device(name, given, local)


def _on_device(name: str, given: float | Tensor, like: Tensor) -> float | Tensor:
    if isinstance(given, Tensor):
        return moved(name, given.reshape(()), like.device).double()
    return given
