"""The paper's two-token example, by enumeration, and its Gaussian mixture, by χ² against the exact
density.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

TOYS = Path(__file__).parents[2] / "examples" / "toys.py"

NUM_CHAINS = 20_000
# Proposals from p with p^4 as target: sup p^3 / Z is 3.8, so 60 steps are within (1 - 1/3.8)^60 =
# 1e-8 of p^4.
NUM_STEPS = 60
NUM_BINS = 24
# Fixed seeds: a right sampler fails none of the three but by a change of numpy's streams, and then
# once in 300.
P_VALUE = 1e-3
WRONG_P_VALUE = 1e-12


@pytest.fixture(scope="module")
def toys() -> ModuleType:
    spec = importlib.util.spec_from_file_location("toys", TOYS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_tokens_power_law(toys: ModuleType) -> None:
    assert toys.power_first_token() == pytest.approx({"a": 0.160, "b": 0.125}, abs=1e-12)


def test_two_tokens_low_temperature(toys: ModuleType) -> None:
    assert toys.low_temperature_first_token() == pytest.approx({"a": 0.160, "b": 0.250}, abs=1e-12)


def test_two_tokens_prefer_opposite_answers(toys: ModuleType) -> None:
    power, low = (
        toys.normalised(toys.power_first_token()),
        toys.normalised(toys.low_temperature_first_token()),
    )
    assert power["a"] > 0.5 > low["a"]


def test_two_tokens_same_law_at_alpha_one(toys: ModuleType) -> None:
    assert toys.power_first_token(1.0) == pytest.approx(
        toys.low_temperature_first_token(1.0), abs=1e-12
    )


def test_two_tokens_token_by_token_enumeration(toys: ModuleType) -> None:
    """Low temperature as a sampler runs it: renormalise p(first)^α, then p(second | first)^α, and
    sum over the second.
    """
    first = {f: toys.TWO_TOKENS[f + "a"] + toys.TWO_TOKENS[f + "b"] for f in "ab"}
    law = {}
    for x, p in toys.TWO_TOKENS.items():
        seconds = [(toys.TWO_TOKENS[x[0] + s] / first[x[0]]) ** 2 for s in "ab"]
        law[x] = (
            first[x[0]] ** 2
            / sum(q**2 for q in first.values())
            * (p / first[x[0]]) ** 2
            / sum(seconds)
        )
    assert math.fsum(law.values()) == pytest.approx(1.0)
    assert law["aa"] + law["ab"] == pytest.approx(
        toys.normalised(toys.low_temperature_first_token())["a"]
    )


def test_mixture_density_is_that_of_its_samples(toys: ModuleType) -> None:
    samples = toys.sample_mixture(NUM_CHAINS, np.random.default_rng(1))
    assert chi_square_p_value(toys, samples, alpha=1.0) > P_VALUE


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_mixture_reaches_the_power_density(toys: ModuleType, seed: int) -> None:
    samples = toys.metropolis_hastings(NUM_CHAINS, NUM_STEPS, seed=seed)
    assert chi_square_p_value(toys, samples, alpha=4.0) > P_VALUE


def test_mixture_other_alpha(toys: ModuleType) -> None:
    samples = toys.metropolis_hastings(NUM_CHAINS, NUM_STEPS, seed=3, alpha=2.0)
    assert chi_square_p_value(toys, samples, alpha=2.0) > P_VALUE


@pytest.mark.parametrize(
    "accept_power",
    [
        pytest.param(1.0, id="ratio of p in place of p^alpha"),
        pytest.param(4.0, id="proposal density left out"),
        pytest.param(0.0, id="everything accepted"),
    ],
)
def test_mixture_wrong_acceptance_is_rejected(toys: ModuleType, accept_power: float) -> None:
    samples = toys.metropolis_hastings(NUM_CHAINS, NUM_STEPS, seed=0, accept_power=accept_power)
    assert chi_square_p_value(toys, samples, alpha=4.0) < WRONG_P_VALUE


def test_picture_is_drawn(toys: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    toys.draw(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def chi_square_p_value(toys: ModuleType, samples: np.ndarray, alpha: float) -> float:
    """Of samples in `NUM_BINS` bins that hold equal mass of p^alpha, against that equal mass."""
    density = toys.power_density(alpha)
    steps = 0.5 * (density[1:] + density[:-1]) * np.diff(toys.GRID)
    cdf = np.concatenate([[0.0], np.cumsum(steps)])
    edges = np.interp(np.arange(1, NUM_BINS) / NUM_BINS, cdf / cdf[-1], toys.GRID)
    counts = np.bincount(np.searchsorted(edges, samples), minlength=NUM_BINS)
    expected = len(samples) / NUM_BINS
    statistic = float(((counts - expected) ** 2 / expected).sum())
    half = torch.tensor([(NUM_BINS - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))
