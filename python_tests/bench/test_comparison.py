"""A slowed kernel is caught; noise, and a machine that is slower as a whole, are not reported."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.harness import comparison, results
from bench.harness.cases import Variant
from python_tests import tiers
from python_tests.bench import toy

# A lognormal with a tail: as times on a machine that others use too.
SPREAD, TAIL_SHARE, TAIL = 0.08, 0.05, 3.0
SAMPLES = 40  # the most that a run takes


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    peer = Variant("peer", toy.bound(toy.doubled), peer="eager")
    return toy.measure(toy.kernel([toy.OURS, peer])).data


def made(
    template: dict[str, Any],
    generator: np.random.Generator,
    *,
    num_rows: int = 1,
    slower: float = 1.0,
    machine: float = 1.0,
    load: float = 0.0,
    samples: int = SAMPLES,
) -> dict[str, Any]:
    """`num_rows` copies of the template's cases with times that are drawn; the first is slower."""
    data = copy.deepcopy(template)
    entries = data["benchmarks"]
    data["benchmarks"] = []
    for number in range(num_rows):
        drift = machine * np.exp(0.02 * generator.standard_normal())
        for entry in copy.deepcopy(entries):
            info = entry["extra_info"]
            info["case"] = f"case {number}"
            factor = drift * (slower if number == 0 and info["ours"] else 1.0)
            if not info["is_ceiling"]:
                factor *= np.exp(load * generator.standard_normal())
            times = 1e-3 * factor * np.exp(SPREAD * generator.standard_normal(samples))
            times *= np.where(generator.random(samples) < TAIL_SHARE, TAIL, 1.0)
            entry["stats"] = results.summary(times.tolist())
            data["benchmarks"].append(entry)
    return data


def verdicts(found: comparison.Comparison) -> dict[tuple[str, ...], str]:
    return {change.key: change.verdict for change in found.changes}


@pytest.mark.parametrize("seed", tiers.every(5, range(5)))
def test_noise_is_not_reported(measured: dict[str, Any], seed: int) -> None:
    """Two runs of 60 cases each in both modes."""
    generator = np.random.default_rng(seed)
    found = comparison.compare(*(made(measured, generator, num_rows=60) for _ in range(2)))
    assert len(found.changes) == 240
    assert not {"slower", "faster"} & set(verdicts(found).values())
    assert not found.regressions


@pytest.mark.parametrize("seed", tiers.every(5, range(5)))
def test_one_slower_kernel_among_many_is_found(measured: dict[str, Any], seed: int) -> None:
    generator = np.random.default_rng(100 + seed)
    before = made(measured, generator, num_rows=60)
    after = made(measured, generator, num_rows=60, slower=1.3)
    found = comparison.compare(before, after)
    assert {change.key[1] for change in found.regressions} == {"case 0"}
    assert comparison.compare(after, before).regressions == []
    assert "faster" in verdicts(comparison.compare(after, before)).values()


def test_a_slower_machine_is_not_a_regression(measured: dict[str, Any]) -> None:
    generator = np.random.default_rng(7)
    found = comparison.compare(made(measured, generator), made(measured, generator, machine=1.6))
    assert set(verdicts(found).values()) == {"machine"}
    assert not found.regressions


@pytest.mark.parametrize("seed", tiers.every(5, range(5)))
def test_load_that_lasts_for_a_run_is_noise(measured: dict[str, Any], seed: int) -> None:
    """Each row of a run has a load of its own, 10% of its time, in all of its samples."""
    generator = np.random.default_rng(200 + seed)
    before, after = (made(measured, generator, num_rows=20, load=0.1) for _ in range(2))
    assert not comparison.compare(before, after).regressions
    slower = made(measured, generator, num_rows=20, load=0.1, slower=3.0)
    regressions = comparison.compare(before, slower).regressions
    assert {change.key[1] for change in regressions} == {"case 0"}


def test_the_rank_test_of_quantiles_holds_its_level() -> None:
    """It finds no more than its level where nothing changed, and a change that is one."""
    generator = np.random.default_rng(11)

    def p_value(effect: float) -> float:
        pair = np.exp(SPREAD * generator.standard_normal((2, SAMPLES))) * [[1.0], [effect]]
        return comparison._p_value(*(np.asarray(results.quantiles(list(each))) for each in pair))

    level = 0.05
    null = [p_value(1.0) for _ in range(2000)]
    # Three standard deviations above the level.
    assert np.mean(np.array(null) < level) < level + 3 * (level * (1 - level) / len(null)) ** 0.5
    # Two standard deviations of the samples apart, in a table of 300 rows.
    assert np.mean([p_value(np.exp(2 * SPREAD)) < 0.05 / 300 for _ in range(200)]) > 0.9


def test_few_samples_say_so(measured: dict[str, Any]) -> None:
    generator = np.random.default_rng(8)
    found = comparison.compare(
        made(measured, generator, samples=3), made(measured, generator, samples=3, slower=2.0)
    )
    assert set(verdicts(found).values()) == {"too few samples"}


def calm(variant: Variant) -> dict[str, Any]:
    """A run whose halves agree: what else the machine does may make them differ tenfold, and a
    comparison then rightly says nothing."""
    for _ in range(10):
        data = toy.measure(toy.kernel([variant]), size="host").data
        if all(row.stats["halves_differ"] < 0.5 for row in results.rows_of(data)):
            return data
    pytest.skip("the machine is too busy for its times to mean anything")


@pytest.mark.slow
def test_a_real_slowed_kernel_and_two_real_runs(restore_threads: None) -> None:
    """The same op, timed twice, and then one that does its work ten times.

    One thread, and a change that is far above what other tests on the same cores do to the times.
    """
    torch.set_num_threads(1)
    slowed = Variant("powerkernels", toy.bound(toy.repeated(10)), ours=True)
    first, second, slow = map(calm, (toy.OURS, toy.OURS, slowed))
    assert not comparison.compare(first, second, min_effect=1.0).regressions
    caught = comparison.compare(first, slow, min_effect=1.0).regressions
    assert {change.key[2] for change in caught} == {"powerkernels"}


def test_files_that_cannot_be_compared(measured: dict[str, Any]) -> None:
    other = copy.deepcopy(measured)
    other["suite"]["environment"]["device"] = "another"
    with pytest.raises(ValueError, match="different machines: device"):
        comparison.compare(measured, other)
    other = copy.deepcopy(measured)
    for entry in other["benchmarks"]:
        entry["extra_info"]["kernel"] = "another"
    with pytest.raises(ValueError, match="no row in common"):
        comparison.compare(measured, other)
    with pytest.raises(ValueError, match="--min-effect"):
        comparison.compare(measured, measured, min_effect=0.0)


def test_the_text_names_the_row(measured: dict[str, Any]) -> None:
    generator = np.random.default_rng(9)
    before, after = made(measured, generator), made(measured, generator, slower=2.0)
    after["suite"]["environment"]["torch"] = "9.9"
    after["benchmarks"].append(copy.deepcopy(after["benchmarks"][0]))
    after["benchmarks"][-1]["extra_info"]["case"] = "a new case"
    text = comparison.text(comparison.compare(before, after))
    assert "slower" in text
    assert "toy: case 0: powerkernels" in text
    assert "note: torch differs" in text
    assert "in one file only: toy: a new case" in text
    assert "2 of ours became slower" in text


def test_times_taken_in_two_ways_are_not_compared(measured: dict[str, Any]) -> None:
    generator = np.random.default_rng(9)
    before, after = made(measured, generator), made(measured, generator, slower=2.0)
    for entry in after["benchmarks"]:
        if entry["extra_info"]["ours"]:
            entry["extra_info"]["timed_by"] = "plain calls"
    found = comparison.compare(before, after)
    assert not found.regressions
    assert len(found.changes) == 2  # the peer's, cold and sustained
    text = comparison.text(found)
    name = "toy: case 0: powerkernels, cold"
    assert f"note: {name} is not compared: timed by wall clock and by plain calls" in text
    for entry in before["benchmarks"]:
        del entry["extra_info"]["timed_by"]  # a file of an earlier version
    assert len(comparison.compare(before, after).changes) == 4


def test_an_own_peer_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    toy.measure(toy.kernel([toy.OURS]), path)
    found = comparison.compare(results.load(path), results.load(path))
    assert {change.ratio for change in found.changes} == {1.0}
