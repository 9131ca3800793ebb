"""What stands for what in the fast tier, and what CI runs of the rest."""

from __future__ import annotations

import itertools
from collections import Counter
from types import SimpleNamespace

import pytest

from python_tests import durations, tiers

given = pytest.importorskip("hypothesis").given
st = pytest.importorskip("hypothesis.strategies")

AXES = ("backend", "dtype", "alpha", "bounds")


def crossing(*sizes: int) -> list[dict[str, int]]:
    return [
        dict(zip(AXES, values, strict=False)) for values in itertools.product(*map(range, sizes))
    ]


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 3), st.randoms(), st.data()
)
def test_all_that_meet_in_a_case_meet_in_a_kept_one(sizes, strength, random, data):
    cases = crossing(*sizes)
    random.shuffle(cases)
    cases = cases[: data.draw(st.integers(0, len(cases)))]
    kept = tiers.cover(cases, strength)
    assert kept == sorted(set(kept))
    for case in cases:
        for cell in itertools.combinations(case.items(), min(strength, len(case))):
            assert any(set(cell) <= set(cases[k].items()) for k in kept)


@pytest.mark.parametrize(
    ("sizes", "strength", "most"),
    [((5, 4, 10, 2), 2, 56), ((4, 4, 4), 2, 24), ((5, 4, 10), 1, 10), ((7,), 2, 7), ((), 2, 1)],
)
def test_few_cases_are_kept(sizes, strength, most):
    cases = crossing(*sizes)
    number = len(tiers.cover(cases, strength))
    assert max(sizes, default=1) <= number <= most


def test_values_are_taken_in_turn():
    cases = crossing(2, 6)
    kept = [cases[k] for k in tiers.cover(cases, 1)]
    assert Counter(case["backend"] for case in kept) == {0: 3, 1: 3}
    assert sorted(case["dtype"] for case in kept) == list(range(6))


def test_each_value_is_first_where_every_second_is_slow():
    values = tiers.every(2, ["a", ("b", 1), "c"])
    assert [value for value in values if not hasattr(value, "marks")] == ["a", "c"]
    assert values[1] == pytest.param(("b", 1), marks=pytest.mark.slow)
    assert tiers.every(2, [("a", 0), ("b", 1)], of_several=True)[1].values == ("b", 1)


class Item:
    def __init__(self, nodeid: str, group: str | None = None, **parameters: object) -> None:
        self.nodeid = nodeid
        self.group = group
        self.stash = pytest.Stash()
        self.callspec = SimpleNamespace(params=parameters)

    def iter_markers(self, name: str) -> list[pytest.Mark]:
        given = [("a", []), ("b, c", []), (("d", "e"), [])]
        return [pytest.mark.parametrize(*arguments).mark for arguments in given]

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        wanted = name == "xdist_group" and self.group is not None
        return pytest.mark.xdist_group(self.group).mark if wanted else None


def test_values_given_together_are_one():
    low, high, other = [0], [0], (1,)  # equal, and not the same
    values = [
        {"a": low, "b": low, "c": low, "d": low, "e": low, "backend": low},
        {"a": high, "b": low, "c": high, "d": low, "e": low, "backend": other},
        {"a": low, "b": high, "c": low, "d": low, "e": low, "backend": low},
    ]
    items = [Item("test_x.py::test", None, **each) for each in values]
    tiers.number_values(items)
    numbers = {name: [item.stash[tiers.INDICES][name] for item in items] for name in ("a", "b, c")}
    assert numbers == {"a": [0, 1, 0], "b, c": [0, 1, 2]}
    assert items[0].stash[tiers.INDICES].keys() == {"a", "b, c", "d, e", "backend"}


def test_shares_are_parts():
    items = [Item(f"test_x.py::test[{i}]", "some" if i % 10 == 0 else None) for i in range(300)]
    shares = [tiers.in_share(items, f"{k}/4") for k in range(1, 5)]
    assert Counter(item for share, _ in shares for item in share) == Counter(items)
    for share, others in shares:
        assert len(share) + len(others) == len(items)
        assert 40 <= len(share) <= 120
        assert len([item for item in share if item.group]) in (0, 30)
        names = {item.nodeid for item in share}
        again, _ = tiers.in_share(items[::-3], f"{shares.index((share, others)) + 1}/4")
        assert {item.nodeid for item in again} <= names  # whatever else there is


@pytest.mark.parametrize("share", ["", "1", "0/4", "5/4", "1/", "/2", "-1/2", "a/b", "1/2/3"])
def test_what_is_no_share(share):
    with pytest.raises(pytest.UsageError, match="K/N"):
        tiers.in_share([], share)


# The folders of ops with kernels of both kinds, and what stands for each there.
OPS = (
    "covariance",
    "decode_attention",
    "lane_moves",
    "linear_logprob",
    "logprob",
    "policy_loss",
    "power_sampling",
)


@pytest.mark.parametrize("op", OPS)
def test_an_op_keeps_its_paths(op, request):
    """In whatever is run here, if that is at least the fast tier."""
    chosen = [item for item in request.session.items if op in item.path.parts]
    files = {item.path for item in chosen}
    if files < set((request.config.rootpath / "python_tests" / op).glob("test_*.py")):
        pytest.skip(f"only a part of python_tests/{op} is run")
    backends = [str(tiers.parameters_of(item).get("backend", "")) for item in chosen]
    assert "reference" in backends or op in ("lane_moves", "power_sampling")
    top = tiers.highest_simd_level()
    if top is not None:
        compiled = [item for item in chosen if tiers.simd_level_of(item) == top]
        compiled += [item for item in chosen if "compiled_backend" in item.fixturenames]
        assert compiled or op == "lane_moves"
    if any(tiers.ON_KERNEL_DEVICE in item.fixturenames for item in chosen):
        assert any(map(tiers.is_interpreted, chosen)) or any(
            item.get_closest_marker("gpu") for item in chosen
        )
    wrong = [item for item in chosen if "bad" in item.name or "wrong" in item.name]
    assert wrong or op == "lane_moves"


def test_times_are_summed_by_tier_and_file():
    def row(test: str, slow: bool, kind: str, seconds: float) -> durations.Row:
        return {"test": test, "slow": slow, "kind": kind, "cpu_seconds": seconds}

    before = [
        row("python_tests/a/test_a.py::test_x", False, "other", 1.0),
        row("python_tests/a/test_a.py::test_y", True, "aot", 2.25),
    ]
    after = [row("python_tests/test_b.py::test_z", False, "other", 0.5)]
    by_tier = durations.table([before, after], "tier", durations.tier_of).splitlines()
    assert [line.split() for line in by_tier] == [
        ["tier", "tests", "CPU", "s", "tests", "CPU", "s"],
        ["all", "2", "3.2", "1", "0.5"],
        ["slow,", "aot", "1", "2.2", "0", "0.0"],
        ["fast,", "other", "1", "1.0", "1", "0.5"],
    ]
    by_file = durations.table([before, after], "file", durations.file_of)
    assert [line.split()[0] for line in by_file.splitlines()[1:]] == [
        "all",
        "a/test_a.py",
        "test_b.py",
    ]
