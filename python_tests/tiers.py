"""Which tests are in the fast tier, `make test`: all that are not `slow`.

A test is slow where it says so, and where another stands for it:

- Of a parametrised test the fast tier takes so many cases that every two values of its parameters
  meet in one of them (each value is in one, for interpreted kernels, whose cases cost seconds, and
  for what is marked `each_value`).
  A fault shows at one value or where two meet, and seldom needs a third: Kuhn, Wallace and Gallo,
  "Software fault interactions and implications for software testing", IEEE TSE 30(6), 2004, found
  that one or two conditions made two thirds to nine tenths of the failures that they looked at.
- Of the levels of SIMD it takes the highest that the machine has, whose code is the least like the
  reference's; none without the compiled part.
- Of values that `every` thins out, some are wholly left out: those of a kernel that takes seconds,
  where the reference and the compiled code are followed through all of them.

`make test-all` takes all, and `make test-share` a share of what is slow: `in_share`.
"""

from __future__ import annotations

import itertools
import zlib
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import pytest

from powerkernels import _extension

SIMD_LEVELS = ("baseline", "avx2", "avx512")
# The fixtures that run a test at a level of SIMD, by the end of their parameters.
AT_SIMD_LEVELS = ("backend", "simd_level")
ON_KERNEL_DEVICE = "kernel_device"

KIND_OF_FOLDER = {
    "ahead_of_time": pytest.mark.aot,
    "launch_path": pytest.mark.aot,
    "integrations": pytest.mark.integration,
}

Cell = frozenset[tuple[str, int]]
INDICES = pytest.StashKey[dict[str, int]]()


def every(step: int, values: Iterable[Any], *, of_several: bool = False) -> list[Any]:
    """Values for `pytest.mark.parametrize`, all but each `step`-th slow, from the first on.

    of_several: each is a tuple, with a value for each of several parameters.
    """
    return [
        value
        if k % step == 0
        else pytest.param(*(value if of_several else (value,)), marks=pytest.mark.slow)
        for k, value in enumerate(values)
    ]


def examples(share: float, **options: Any) -> Any:
    """Hypothesis's settings with this share of the profile's examples; a test has all without.

    Less where an example takes long, more where what it draws is large and cheap to look at.
    """
    import hypothesis

    profile = hypothesis.settings.default
    assert profile is not None
    number = max(1, round(share * profile.max_examples))
    return hypothesis.settings(max_examples=number, **options)


def highest_simd_level() -> str | None:
    module = _extension.extension()
    return None if module is None else module.highest_simd_level()


def mark(items: Sequence[pytest.Item]) -> None:
    """Marks what kind of test each is, and as slow those for which others stand."""
    top = highest_simd_level()
    for item in items:
        for folder in KIND_OF_FOLDER.keys() & set(item.path.parts):
            item.add_marker(KIND_OF_FOLDER[folder])
        if is_interpreted(item):
            item.add_marker(pytest.mark.interpreted)
        if simd_level_of(item) not in (None, top):
            item.add_marker(pytest.mark.slow)
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        tests.setdefault(function_of(item), []).append(item)
    for of_test in tests.values():
        number_values(of_test)
        cases = [item for item in of_test if not is_marked(item, "slow", "gpu")]
        once = any(is_interpreted(item) or is_marked(item, "each_value") for item in cases)
        strength = 1 if once else 2
        kept = cover([case.stash[INDICES] for case in cases], strength)
        for k in set(range(len(cases))).difference(kept):
            cases[k].add_marker(pytest.mark.slow)


def is_marked(item: pytest.Item, *names: str) -> bool:
    return any(item.get_closest_marker(name) is not None for name in names)


def function_of(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


def parameters_of(item: pytest.Item) -> dict[str, object]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def number_values(cases: Sequence[pytest.Item]) -> None:
    """Which of its values each parameter of a case has, of all that these cases of a test have.

    Parameters that one `parametrize` gives together are one, and its values tuples.
    """
    # By identity: values need not be hashable, and the cases of a test share those of a parameter.
    # callspec.indices does not have it: pytest numbers the cases there.
    seen: dict[str, dict[tuple[int, ...], int]] = {}
    for case in cases:
        parameters, indices = parameters_of(case), {}
        together = [names for names in names_given_together(case) if len(names) > 1]
        alone = set(parameters).difference(*together)
        for names in (*together, *((name,) for name in sorted(alone))):
            values = seen.setdefault(", ".join(names), {})
            key = tuple(id(parameters[name]) for name in names)
            indices[", ".join(names)] = values.setdefault(key, len(values))
        case.stash[INDICES] = indices


def names_given_together(item: pytest.Item) -> list[tuple[str, ...]]:
    """The parameters of each `parametrize` of a test."""
    found = []
    for marker in item.iter_markers("parametrize"):
        names = marker.args[0] if marker.args else marker.kwargs["argnames"]
        names = names.split(",") if isinstance(names, str) else names
        found.append(tuple(name.strip() for name in names))
    return found


def is_interpreted(item: pytest.Item) -> bool:
    return parameters_of(item).get(ON_KERNEL_DEVICE) == "cpu"


def simd_level_of(item: pytest.Item) -> str | None:
    for name in AT_SIMD_LEVELS:
        level = str(parameters_of(item).get(name)).rpartition("-")[2]
        if level in SIMD_LEVELS:
            return level
    return None


def cover(cases: Sequence[dict[str, int]], strength: int) -> list[int]:
    """Some of the cases, by index: any values of so many parameters that meet in a case meet in
    one of these.

    Greedy: first the case with the most that is new; of several the one whose values have been
    taken least, and of those the earliest.
    """
    cells = [cells_of(case, strength) for case in cases]
    left: set[Cell] = set().union(*cells)
    taken: Counter[tuple[str, int]] = Counter()
    kept: list[int] = []

    def worth(k: int) -> tuple[int, int, int]:
        return len(cells[k] & left), -sum(taken[value] for value in cases[k].items()), -k

    while left:
        best = max(range(len(cases)), key=worth)
        kept.append(best)
        left -= cells[best]
        taken.update(cases[best].items())
    return sorted(kept)


def cells_of(case: dict[str, int], strength: int) -> set[Cell]:
    size = min(strength, len(case))
    return set(map(frozenset, itertools.combinations(case.items(), size)))


def in_share(items: Iterable[pytest.Item], share: str) -> tuple[list[pytest.Item], ...]:
    """The items of a share, and the others. Share "2/5" is the second of five.

    By a hash of the name: a test stays in its share while others come and go. Those of one
    `xdist_group` stay together, as what they share is costly.

    Raises:
        pytest.UsageError: it is no share.
    """
    number, count = numbers_of(share)
    parts: tuple[list[pytest.Item], ...] = ([], [])
    for item in items:
        parts[zlib.crc32(str(kin_of(item)).encode()) % count != number - 1].append(item)
    return parts


def numbers_of(share: str) -> tuple[int, int]:
    number, _, count = share.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise pytest.UsageError(f"--share must be K/N with K of 1 to N, got {share!r}")
    return int(number), int(count)


def kin_of(item: pytest.Item) -> Hashable:
    marker = item.get_closest_marker("xdist_group")
    if marker is None:
        return item.nodeid
    return marker.args[0] if marker.args else marker.kwargs["name"]
