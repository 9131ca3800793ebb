"""A model small enough to list every completion, on lanes, and the laws to compare with."""

from __future__ import annotations

import functools
import itertools
from collections import Counter

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from powerkernels.power_sampling import PowerSamplingConfig

EOS = 0
PROMPT = (1,)


class EnumerableModel:
    """Random logits for every prefix of a completion; token 0 is EOS.

    As a lane model its cache is the tokens fed so far: logits are looked up from what the cache
    holds, so a wrong commit or restore changes the law.
    """

    def __init__(
        self,
        vocab_size: int,
        max_tokens: int,
        *,
        scale: float = 0.8,
        eos_logit: float = 0.0,
        seed: int = 0,
    ):
        generator = torch.Generator().manual_seed(seed)
        self.vocab_size, self.max_tokens = vocab_size, max_tokens
        # First code of the prefixes of each length; a prefix of length n is a number in base V.
        self._first_code = torch.tensor(
            [sum(vocab_size**k for k in range(n)) for n in range(max_tokens + 1)]
        )
        num_prefixes = int(self._first_code[-1])
        self.logits = scale * torch.randn(num_prefixes, vocab_size, generator=generator)
        self.logits[:, EOS] += eos_logit

    def completions(self, limit: int, *, eos: bool = True) -> list[tuple[int, ...]]:
        """Every completion of at most `limit` tokens: up to its first EOS, or `limit` long."""
        tokens = range(self.vocab_size)
        if not eos:
            return list(itertools.product(tokens, repeat=limit))
        open_tokens = [token for token in tokens if token != EOS]
        return [
            (*body, EOS) for n in range(limit) for body in itertools.product(open_tokens, repeat=n)
        ] + list(itertools.product(open_tokens, repeat=limit))

    def log_prob(self, completion: tuple[int, ...]) -> float:
        """log p of a completion, float64."""
        total = 0.0
        for t, token in enumerate(completion):
            row = self.logits[self.code(completion[:t])].double()
            total += float(row.log_softmax(-1)[token])
        return total

    def power_law(self, alpha: float, limit: int, *, eos: bool = True) -> np.ndarray:
        """p(x)^alpha / Z over `completions(limit)`."""
        log_prob = np.array([self.log_prob(x) for x in self.completions(limit, eos=eos)])
        weight = np.exp(alpha * log_prob)
        return weight / weight.sum()

    def transition_matrix(
        self, alpha: float, s: float, limit: int, *, eos: bool = True
    ) -> tuple[list[tuple[int, ...]], np.ndarray]:
        """The completions and P[i, j], the probability that one transition leads from i to j.

        Straight from the definition: uniform cut, redrawn from q ∝ p^s, accepted with
        min(1, pi(y) / pi(x) · q(x | y) / q(y | x)), the two proposals summed over nothing but the
        cut that was drawn, each with its own 1/n.
        """
        completions = self.completions(limit, eos=eos)
        log_p, log_q = self._token_log_probs(completions, s)
        matrix = np.zeros((len(completions),) * 2)
        for i, x in enumerate(completions):
            for cut in range(len(x)):
                for j, y in enumerate(completions):
                    if len(y) <= cut or y[:cut] != x[:cut]:
                        continue
                    forward = sum(log_q[j][cut:]) - np.log(len(x))
                    backward = sum(log_q[i][cut:]) - np.log(len(y))
                    log_r = alpha * (sum(log_p[j]) - sum(log_p[i])) + backward - forward
                    matrix[i, j] += np.exp(forward + min(0.0, log_r))
            matrix[i, i] += 1 - matrix[i].sum()
        return completions, matrix

    def chain_law(self, config: PowerSamplingConfig, *, eos: bool = True) -> np.ndarray:
        """The exact law of a finished chain, however few its transitions: over `completions`."""
        s = config.proposal_power
        law: dict[tuple[int, ...], float] = {(): 1.0}
        for limit in config.block_limits:
            completions = self.completions(limit, eos=eos)
            index = {x: i for i, x in enumerate(completions)}
            _, log_q = self._token_log_probs(completions, s)
            extended = np.zeros(len(completions))
            for x, mass in law.items():
                if eos and x and x[-1] == EOS:
                    extended[index[x]] += mass
                    continue
                for y, i in index.items():
                    if y[: len(x)] == x:
                        extended[i] += mass * np.exp(sum(log_q[i][len(x) :]))
            _, matrix = self.transition_matrix(config.alpha, s, limit, eos=eos)
            extended = extended @ np.linalg.matrix_power(matrix, config.num_mcmc_steps)
            law = dict(zip(completions, extended, strict=True))
        return np.array(list(law.values()))

    def public_law(
        self, config: PowerSamplingConfig, *, top_k: int | None = None
    ) -> dict[tuple[int, ...], float]:
        """The exact law of aakaran/reasoning-with-sampling's `mcmc_power_samp`, by its steps.

        A block adds `block_size` tokens to what there is. A transition redraws from a uniform cut,
        up to the current length, and compares with as much of the current completion. The chain is
        over after a block that leaves an EOS. q ∝ p^alpha over the `top_k` largest logits.
        """
        alpha = config.alpha
        log_p = self.logits.double().log_softmax(-1)
        kept = self.logits.argsort(dim=-1, descending=True)[:, : top_k or self.vocab_size]
        support = torch.full_like(log_p, -torch.inf).scatter(1, kept, 0.0)
        log_q = (alpha * log_p + support).log_softmax(-1)

        @functools.cache
        def continuations(
            prefix: tuple[int, ...], limit: int
        ) -> list[tuple[tuple[int, ...], float]]:
            if len(prefix) == limit or (prefix and prefix[-1] == EOS):
                return [(prefix, 1.0)]
            row = log_q[self.code(prefix)].exp().tolist()
            return [
                (y, row[token] * mass)
                for token in range(self.vocab_size)
                if row[token] > 0
                for y, mass in continuations((*prefix, token), limit)
            ]

        @functools.cache
        def weight(x: tuple[int, ...], first: int, last: int) -> float:
            codes = [(self.code(x[:t]), x[t]) for t in range(first, last)]
            return sum(alpha * float(log_p[at]) - float(log_q[at]) for at in codes)

        law: dict[tuple[int, ...], float] = {(): 1.0}
        over: Counter[tuple[int, ...]] = Counter()
        for _ in config.block_limits:
            extended: Counter[tuple[int, ...]] = Counter()
            for x, mass in law.items():
                for y, q in continuations(x, len(x) + config.block_limits[0]):
                    extended[y] += mass * q
            for _ in range(config.num_mcmc_steps):
                moved: Counter[tuple[int, ...]] = Counter()
                for x, mass in extended.items():
                    for cut in range(len(x)):
                        for y, q in continuations(x[:cut], len(x)):
                            log_r = weight(y, cut, len(y)) - weight(x, cut, len(y))
                            accepted = mass / len(x) * q * min(1.0, np.exp(log_r))
                            moved[y] += accepted
                            moved[x] += mass / len(x) * q - accepted
                extended = moved
            law = {x: mass for x, mass in extended.items() if x[-1] != EOS}
            for x, mass in extended.items():
                over[x] += mass if x[-1] == EOS else 0.0
        return {**over, **law}

    def _token_log_probs(
        self, completions: list[tuple[int, ...]], s: float
    ) -> tuple[list[list[float]], list[list[float]]]:
        """log p and log q, q ∝ p^s, of every token of every completion, float64."""
        log_p = self.logits.double().log_softmax(-1)
        log_q = (s * log_p).log_softmax(-1)
        codes = [[self.code(x[:t]) for t in range(len(x))] for x in completions]
        at = lambda table: [  # noqa: E731
            [float(table[c, v]) for c, v in zip(row, x, strict=True)]
            for row, x in zip(codes, completions, strict=True)
        ]
        return at(log_p), at(log_q)

    def code(self, prefix: tuple[int, ...]) -> int:
        """Row of `logits` for a prefix."""
        number = sum(token * self.vocab_size**t for t, token in enumerate(prefix))
        return int(self._first_code[len(prefix)]) + number

    def __call__(self, num_lanes: int, max_length: int) -> EnumerableLanes:
        return EnumerableLanes(self, num_lanes, max_length)


class EnumerableLanes:
    """`EnumerableModel` on lanes, for prompts of one token or more."""

    device = torch.device("cpu")

    def __init__(self, model: EnumerableModel, num_lanes: int, max_length: int):
        self.num_lanes, self.vocab_size = num_lanes, model.vocab_size
        self._model = model
        self._prompt_length = torch.ones(num_lanes, dtype=torch.int64)
        # Poison: what a lane reads before writing it would be no token at all.
        self.cache = torch.full((2, num_lanes, max_length), -(10**6))
        self.steps = 0

    def prefill(self, lane: int, tokens: tuple[int, ...]) -> None:
        self._prompt_length[lane] = len(tokens)
        if len(tokens) == 1:  # tens of thousands of chains begin so
            return
        self.cache[:, lane, : len(tokens) - 1] = torch.tensor(tokens[:-1], dtype=torch.int64)

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        self.steps += 1
        lane = torch.arange(self.num_lanes)
        self.cache[0, lane, positions] = tokens
        length = positions + 1 - self._prompt_length  # of the completion's prefix
        code = self._model._first_code[length.clamp(min=0)].clone()
        for t in range(int(length.max())):
            at = (self._prompt_length + t).clamp(max=self.cache.shape[2] - 1)
            token = self.cache[0, lane, at]
            code += torch.where(t < length, token * self._model.vocab_size**t, 0)
        return self._model.logits[code]

    def move(self, moves: Tensor, offset: Tensor) -> None:
        source_lane, source_copy, first, count, both_from = moves.unbind(1)
        self._prompt_length = offset + 1  # a lane that joins a chain gets its prompt in this way
        position = torch.arange(self.cache.shape[2])
        first = (offset + first)[:, None]
        moved = (position >= first) & (position < first + count[:, None])
        lane, column = moved.nonzero(as_tuple=True)
        own = source_lane[lane] == lane
        moving = self.cache[source_copy[lane], source_lane[lane], column]
        for copy in (0, 1):
            is_of_source = source_copy[lane] == copy
            late = column >= (offset + both_from)[lane]
            into = ~is_of_source | (~own & late)
            self.cache[copy, lane[into], column[into]] = moving[into]


def chi2_p_value(counts: np.ndarray, law: np.ndarray) -> float:
    """p-value of the counts against the law; cells with under 5 expected are joined into one."""
    if counts[law == 0].any():
        return 0.0  # something the law cannot give
    counts, law = counts[law > 0], law[law > 0]
    expected = law * counts.sum()
    small = expected < 5
    if small.any():
        counts = np.append(counts[~small], counts[small].sum())
        expected = np.append(expected[~small], expected[small].sum())
    return float(stats.chisquare(counts, expected).pvalue)


def total_variation(counts: np.ndarray, law: np.ndarray) -> float:
    """Total variation distance of the counts' frequencies from the law."""
    return 0.5 * float(np.abs(counts / counts.sum() - law).sum())
