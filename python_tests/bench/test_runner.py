"""What is timed is right, what is wrong has no figure, and what was measured is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.harness import accuracy, peers, results, runner, timing
from bench.harness.broken_context import BrokenContextError
from bench.harness.cases import Call, Variant
from python_tests import tiers
from python_tests.bench import toy


def rows(document: results.Document) -> list[results.Row]:
    return list(results.rows_of(document.data))


def test_a_row_carries_what_it_needs(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    toy.measure(toy.kernel([toy.OURS]), path)
    data = results.load(path)
    environment = data["suite"]["environment"]
    for name in ("device", "commit", "changed", "threads", "torch", "python", "clocks", "driver"):
        assert name in environment, name
    assert data["suite"]["finished"]
    assert data["suite"]["command"] == "powerkernels bench toy"
    found = {row.key: row for row in results.rows_of(data)}
    modes = {key[3] for key in found}
    assert modes == {"cold", "sustained"}
    ours = found["toy", f"{toy.SIZE} numbers, float32", "powerkernels", "cold"]
    assert ours.info["shape"] == {"n": toy.SIZE}
    assert ours.info["p20_ms"] <= ours.info["median_ms"] <= ours.info["p80_ms"]
    assert ours.stats["rounds"] >= runner.MIN_ROUNDS["quick"]
    assert len(ours.quantiles) == min(ours.stats["rounds"], results.QUANTILES)
    assert ours.info["gigabytes_per_second"] == pytest.approx(8 * toy.SIZE / ours.median / 1e9)
    ceiling = next(row for row in found.values() if row.info["is_ceiling"] and row.mode == "cold")
    assert ours.info["ratio_to_ceiling"] == pytest.approx(ceiling.median / ours.median)
    assert "peak_megabytes" in ours.info


def test_a_wrong_variant_has_no_figure() -> None:
    document = toy.measure(
        toy.kernel([toy.OURS, Variant("wrong", toy.bound(toy.wrong), peer="eager")])
    )
    assert {row.variant for row in rows(document) if not row.info["is_ceiling"]} == {"powerkernels"}
    (entry,) = document.suite["failed"]
    assert entry["variant"] == "wrong"
    assert "y is off by 0.01" in entry["reason"]


def test_a_failing_variant_stops_nothing() -> None:
    document = toy.measure(
        toy.kernel([Variant("failing", toy.bound(toy.failing), peer="eager"), toy.OURS])
    )
    assert "powerkernels" in {row.variant for row in rows(document)}
    assert "RuntimeError: this peer does not like" in document.suite["failed"][0]["reason"]


def test_what_does_not_fit_is_skipped_with_the_reason() -> None:
    document = toy.measure(toy.kernel([toy.OURS], sizes=(toy.SIZE, 2**30)), free_bytes=2**30)
    assert {row.case for row in rows(document)} == {f"{toy.SIZE} numbers, float32"}
    (entry,) = document.suite["skipped"]
    assert entry["case"] == f"{2**30} numbers, float32"
    assert "8.6 GB of memory" in entry["reason"]
    greedy = Variant("greedy", toy.bound(toy.doubled), extra_memory=lambda case: 2**40)
    document = toy.measure(toy.kernel([greedy, toy.OURS]))
    assert [entry["variant"] for entry in document.suite["skipped"]] == ["greedy"]


def test_out_of_memory_is_skipped_too() -> None:
    def too_much(x: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("tried to allocate 3 TB")

    document = toy.measure(toy.kernel([toy.OURS, Variant("huge", toy.bound(too_much))]))
    assert "tried to allocate 3 TB" in document.suite["skipped"][0]["reason"]
    assert not document.suite["failed"]


def test_an_interrupted_run_keeps_what_it_has_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    calls = []

    def interrupted(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        if len(x) == 2 * toy.SIZE and len(set(calls)) == 2:
            raise KeyboardInterrupt
        return toy.doubled(x)

    sizes = (toy.SIZE, 2 * toy.SIZE)
    kernel = toy.kernel([Variant("ours", toy.bound(interrupted), ours=True)], sizes=sizes)
    with pytest.raises(KeyboardInterrupt):
        toy.measure(kernel, path)
    kept = results.load(path)
    assert kept["suite"]["done"] == [f"toy: {toy.SIZE} numbers, float32"]
    assert not kept["suite"]["finished"]
    assert not list(tmp_path.glob(".*"))

    resumed = results.Document.resumed(kept["suite"]["environment"], "again", path)
    whole = toy.kernel([toy.OURS], sizes=sizes)
    settings = runner.Settings("quick", toy.CPU, frozenset())
    runner.run([whole], settings, resumed, say=lambda text: None, show=lambda rows: None)
    data = results.load(path)
    assert len(data["suite"]["done"]) == 2
    assert data["benchmarks"][: len(kept["benchmarks"])] == kept["benchmarks"]


@pytest.mark.parametrize("name", tiers.every(3, ["commit", "threads", "device"]))
def test_a_file_of_another_run_does_not_go_on(tmp_path: Path, name: str) -> None:
    path = tmp_path / "run.json"
    document = toy.measure(toy.kernel([toy.OURS]), path)
    other = document.suite["environment"] | {name: "another"}
    with pytest.raises(ValueError, match=f"--resume: .*{name}"):
        results.Document.resumed(other, "again", path)


def test_files_that_are_not_ours(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    document = toy.measure(toy.kernel([toy.OURS]))
    document.suite["schema"] = 99
    path.write_text(json.dumps(document.data))
    with pytest.raises(ValueError, match="schema 99, and this version reads schema 2"):
        results.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        results.load(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="no result of `powerkernels bench`"):
        results.load(path)
    with pytest.raises(ValueError, match="No such file"):
        results.load(tmp_path / "missing.json")


def test_a_file_of_the_schema_before_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    document = toy.measure(toy.kernel([toy.OURS]))
    document.suite["schema"] = results.SCHEMA - 1
    path.write_text(json.dumps(document.data))
    with pytest.raises(ValueError, match="measure again, or use the version that wrote it"):
        results.load(path)


def test_a_row_is_a_line(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    document = toy.measure(toy.kernel([toy.OURS]), path)
    lines = path.read_text().splitlines()
    for entry in document.data["benchmarks"]:
        assert sum(line.rstrip(",") == json.dumps(entry) for line in lines) == 1
    assert json.loads(path.read_text()) == document.data


def test_pytest_benchmark_reads_our_files(tmp_path: Path) -> None:
    from pytest_benchmark.logger import Logger
    from pytest_benchmark.storage.file import FileStorage

    path = tmp_path / "0001_run.json"
    toy.measure(toy.kernel([toy.OURS]), path)
    storage = FileStorage(str(tmp_path), Logger(level=Logger.QUIET), default_machine_id="here")
    found = list(storage.load_benchmarks(str(path)))
    assert {run["group"] for run in found} == {
        f"toy: {toy.SIZE} numbers, float32 ({mode})" for mode in ("cold", "sustained")
    }
    assert all(run["median"] > 0 for run in found)


# ---- what stands for the samples


def test_quantiles_of_few_samples_are_the_samples() -> None:
    samples = [float(n) for n in range(results.QUANTILES, 0, -1)]
    assert results.quantiles(samples) == sorted(samples)
    assert results.quantiles(samples[:3]) == sorted(samples[:3])


def test_quantiles_of_many_samples() -> None:
    """Each is in the middle of its share, and they have the samples' median."""
    samples = [float(n) for n in range(40 * results.QUANTILES)]
    found = results.quantiles(samples[::-1])
    assert found == [19.5 + 40 * n for n in range(results.QUANTILES)]
    assert results.summary(samples)["median"] == pytest.approx(sum(found) / len(found))


def test_the_halves_of_a_run() -> None:
    assert results.halves_differ([1.0] * 10) == 0
    assert results.halves_differ([1.0] * 10 + [1.25] * 9) == pytest.approx(0.25)
    assert results.halves_differ([1.25] * 10 + [1.0] * 9) == pytest.approx(0.25)
    assert results.halves_differ([1.0] * 4 + [9.0] * 5) == 0  # too few to tell


# ---- accuracy


def test_nan_infinity_and_shape() -> None:
    exact = {"y": torch.tensor([1.0, -torch.inf, torch.nan], dtype=torch.float64)}
    assert accuracy.check({"y": exact["y"].float()}, exact, None) == {"y": 0.0}
    for bad in ([1.0, 0.0, torch.nan], [1.0, -torch.inf, 0.0], [torch.nan, -torch.inf, torch.nan]):
        with pytest.raises(accuracy.WrongResultError, match="y is off by"):
            accuracy.check({"y": torch.tensor(bad)}, exact, None)
    with pytest.raises(accuracy.WrongResultError, match="shape"):
        accuracy.check({"y": torch.zeros(2)}, exact, None)
    with pytest.raises(accuracy.WrongResultError, match="nothing to compare"):
        accuracy.check({"z": torch.zeros(3)}, exact, None)


def test_integers_are_equal_or_wrong() -> None:
    expected = {"token": torch.tensor([3, 4])}
    accuracy.check({"token": torch.tensor([3, 4])}, expected, None)
    with pytest.raises(accuracy.WrongResultError):
        accuracy.check({"token": torch.tensor([3, 5])}, expected, None)


def test_the_yardstick_sets_the_tolerance() -> None:
    exact = {"y": torch.ones(4, dtype=torch.float64)}
    found = {"y": torch.full((4,), 1.001)}
    accuracy.check(found, exact, {"y": torch.full((4,), 1.0005)})
    with pytest.raises(accuracy.WrongResultError):
        accuracy.check(found, exact, {"y": torch.full((4,), 1.00001)})


# ---- clocks and peers


def test_variants_are_taken_in_turn() -> None:
    order: list[str] = []
    calls = {name: [lambda name=name: order.append(name)] for name in ("a", "b", "c")}
    plan = timing.Plan(0.0, min_rounds=6, max_rounds=6, whole_job=True)
    samples = timing.interleaved(calls, toy.CPU, plan)
    assert all(len(taken.cold) == 6 for taken in samples.values())
    rounds = [order[i : i + 3] for i in range(0, 18, 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert {names[0] for names in rounds} == {"a", "b", "c"}


def test_inputs_rotate() -> None:
    used: list[int] = []
    calls = {"a": [lambda n=n: used.append(n) for n in range(4)]}
    timing.interleaved(calls, toy.CPU, timing.Plan(0.0, min_rounds=2, max_rounds=2, evict=False))
    assert used == [i % 4 for i in range(len(used))]


def test_enough_copies_to_leave_the_cache() -> None:
    cache = timing.cache_bytes(toy.CPU)
    assert timing.num_sets(4 * cache, toy.CPU) == 1
    assert timing.num_sets(cache // 4, toy.CPU) == 8
    assert timing.num_sets(1, toy.CPU) == timing.MAX_SETS


def test_quantiles() -> None:
    samples = [float(n) for n in range(11)]
    assert timing.quantile(samples, 0.2) == 2
    assert timing.quantile(samples, 0.8) == 8
    assert timing.quantile([5.0], 0.8) == 5


def test_peers() -> None:
    assert peers.chosen(None) == set(peers.PEERS)
    assert peers.chosen(["none"]) == set()
    assert peers.chosen(["trl", "eager"]) == {"trl", "eager"}
    with pytest.raises(ValueError, match=r"--peers: unknown ligre; expected some of eager"):
        peers.chosen(["ligre"])
    assert peers.why_missing("eager", toy.CPU) is None
    assert peers.why_missing("liger", toy.CPU) == "it runs on cuda only"
    assert "--peer-path" in (peers.why_missing("public-sampler", toy.CPU) or "")
    missing = peers.why_missing("public-sampler", toy.CPU, Path("/nowhere"))
    assert missing == "/nowhere holds no power_samp_utils.py"


def test_a_broken_context_ends_the_run_behind_its_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason is kept, and the next run begins with the next case."""

    def breaks(x: Tensor) -> Call:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(runner, "context_is_broken", lambda: True)
    kernel = toy.kernel([Variant("bad", breaks, ours=True)])
    document = results.Document({}, "powerkernels bench toy", tmp_path / "toy.json")
    document.suite["ceilings"] = {"copy, GB/s": 1.0}
    settings = runner.Settings("quick", torch.device("cpu"), frozenset())
    with pytest.raises(BrokenContextError, match="illegal memory access"):
        runner.run([kernel], settings, document, say=lambda text: None, show=lambda rows: None)
    suite = results.load(tmp_path / "toy.json")["suite"]
    assert "illegal memory access" in suite["failed"][0]["reason"]
    assert suite["done"] == [f"{kernel.name}: {kernel.cases('quick')[0].title}"]
    runner.run([kernel], settings, document, say=lambda text: None, show=lambda rows: None)
