"""Two small worlds in which sampling from p^alpha can be checked by hand, and a picture of them.

    python examples/toys.py        writes docs/power_vs_low_temperature.png

(a) Two tokens: sampling every token at a low temperature is not sampling from p^alpha, and can
prefer the other answer.
(b) A mixture of Gaussians: Metropolis-Hastings with proposals from p reaches p^alpha.

Source: Karan & Du 2025, "Reasoning with Sampling", the two-token example and the Gaussian mixture.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PICTURE = Path(__file__).parents[1] / "docs" / "power_vs_low_temperature.png"
Floats = NDArray[np.float64]

# ---- (a) two tokens

TWO_TOKENS = {"aa": 0.0, "ab": 0.40, "ba": 0.25, "bb": 0.25}
"""p(x) of the four completions as the paper has it; the remaining 0.10 begins with other tokens and
cancels out of every ratio."""

TWO_TOKEN_ALPHA = 2.0


def power_first_token(alpha: float = TWO_TOKEN_ALPHA) -> dict[str, float]:
    """Unnormalised weight of each first token under p^alpha: the sum of its p(x)^alpha."""
    return {first: sum(p**alpha for x, p in TWO_TOKENS.items() if x[0] == first) for first in "ab"}


def low_temperature_first_token(alpha: float = TWO_TOKEN_ALPHA) -> dict[str, float]:
    """The same at temperature 1/alpha, token by token: (the sum of its p(x))^alpha."""
    return {
        first: sum(p for x, p in TWO_TOKENS.items() if x[0] == first) ** alpha for first in "ab"
    }


def normalised(weights: dict[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {key: weight / total for key, weight in weights.items()}


# ---- (b) a mixture of Gaussians

MIXTURE_WEIGHTS = np.array([0.7, 0.3])
MIXTURE_MEANS = np.array([-2.0, 2.0])
MIXTURE_SCALES = np.array([1.2, 0.35])
"""A broad mode with most of the mass and a sharp one with the highest density: p^4 turns their
order round."""

MIXTURE_ALPHA = 4.0
GRID = np.linspace(-8.0, 6.0, 28_001)  # p^4 outside is below 1e-20


def mixture_log_density(x: Floats) -> Floats:
    """log p(x), x of any shape."""
    z = (x[..., None] - MIXTURE_MEANS) / MIXTURE_SCALES
    terms = np.log(MIXTURE_WEIGHTS / (MIXTURE_SCALES * math.sqrt(2 * math.pi))) - 0.5 * z * z
    return np.asarray(np.logaddexp.reduce(terms, axis=-1))


def power_density(alpha: float = MIXTURE_ALPHA) -> Floats:
    """p^alpha on `GRID`, normalised."""
    density = np.exp(alpha * mixture_log_density(GRID))
    return np.asarray(density / np.trapezoid(density, GRID))


def sample_mixture(count: int, rng: np.random.Generator) -> Floats:
    """Independent draws from p, [count]."""
    component = rng.choice(len(MIXTURE_WEIGHTS), size=count, p=MIXTURE_WEIGHTS)
    return np.asarray(rng.normal(MIXTURE_MEANS[component], MIXTURE_SCALES[component]))


def metropolis_hastings(
    num_chains: int,
    num_steps: int,
    *,
    seed: int,
    alpha: float = MIXTURE_ALPHA,
    accept_power: float | None = None,
) -> Floats:
    """The last state of each chain, [num_chains]; the chains are independent, start from p and
    propose from p.

    The proposal's density is p, so the acceptance ratio p(x')^alpha p(x) / (p(x)^alpha p(x')) is
    (p(x') / p(x))^(alpha - 1).
    `accept_power` puts another power there: what a wrong sampler would do.
    """
    power = alpha - 1.0 if accept_power is None else accept_power
    rng = np.random.default_rng(seed)
    x = sample_mixture(num_chains, rng)
    log_p = mixture_log_density(x)
    for _ in range(num_steps):
        proposal = sample_mixture(num_chains, rng)
        proposal_log_p = mixture_log_density(proposal)
        accepted = np.log(rng.random(num_chains)) < power * (proposal_log_p - log_p)
        x = np.where(accepted, proposal, x)
        log_p = np.where(accepted, proposal_log_p, log_p)
    return x


# ---- the picture


def draw(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (tokens, mixture) = plt.subplots(1, 2, figsize=(11, 3.8), width_ratios=(1, 1.6))

    laws = {
        "p": normalised(low_temperature_first_token(alpha=1.0)),
        "temperature 1/2": normalised(low_temperature_first_token()),
        "$p^2$": normalised(power_first_token()),
    }
    colours = {"p": "0.75", "temperature 1/2": "tab:orange", "$p^2$": "tab:blue"}
    for position, (name, law) in enumerate(laws.items()):
        bars = tokens.bar(
            np.arange(2) + 0.27 * (position - 1),
            list(law.values()),
            0.25,
            label=name,
            color=colours[name],
        )
        tokens.bar_label(bars, fmt="%.2f", fontsize=8)
    tokens.set_xticks([0, 1], ["a…", "b…"])
    tokens.set_ylim(0, 0.8)
    tokens.set_ylabel("probability of the first token")
    tokens.set_title("p(ab) = .40, p(ba) = p(bb) = .25", fontsize=10)
    tokens.legend(frameon=False, fontsize=8, loc="upper right", ncols=3, columnspacing=1.0)

    samples = metropolis_hastings(20_000, 60, seed=0)
    mixture.hist(
        samples,
        bins=120,
        density=True,
        color="tab:blue",
        alpha=0.35,
        label="Metropolis-Hastings, 20,000 chains",
    )
    mixture.plot(GRID, power_density(), color="tab:blue", linewidth=1.5, label="$p^4$, normalised")
    mixture.plot(GRID, np.exp(mixture_log_density(GRID)), color="0.45", linestyle="--", label="p")
    mixture.set_xlim(-6, 4)
    mixture.set_xlabel("x")
    mixture.set_ylabel("density")
    mixture.set_title("a mixture of two Gaussians", fontsize=10)
    mixture.legend(frameon=False, fontsize=8, loc="upper left")

    for axes in (tokens, mixture):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the two toys.")
    parser.add_argument("--output", type=Path, default=PICTURE)
    draw(parser.parse_args().output)


if __name__ == "__main__":
    main()
