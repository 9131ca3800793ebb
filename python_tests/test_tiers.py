"""What stands for what in the fast tier, and what CI runs of the rest."""

from __future__ import annotations

import itertools
from collections import Counter
from types import SimpleNamespace

import pytest

from python_tests import durations, tiers, triton_device

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


# What each op keeps in the fast tier: files and tests, by what they show.
Kept = dict[str, str]
KEPT: dict[str, Kept] = {
    "score_tokens": {
        "truth": "logprob/test_score_tokens.py::test_scores_are_the_truth",
        "gradients": "logprob/test_score_tokens.py::test_gradients_are_the_truth",
        "bad input": "logprob/test_score_tokens.py::test_bad_arguments",
        "a bad row": "logprob/test_score_tokens.py::test_a_bad_row_is_nan_alone",
        "interpreted": "logprob/test_kernels.py::test_small_vocabularies",
        "ranks": "logprob/test_vocab_parallel.py::test_a_split_vocabulary_is_the_whole",
    },
    "sample_tokens": {
        "truth": "logprob/test_sample_tokens.py::test_law_of_a_small_vocabulary",
        "bad input": "logprob/test_sample_tokens.py::test_bad_arguments",
        "wrong": "logprob/test_sample_tokens.py::test_the_chi_square_test_rejects_what_is_wrong",
        "interpreted": "logprob/test_kernels.py::test_draws_the_tokens_of_the_reference",
    },
    "top_k, top_p, min_p": {
        "truth": "logprob/test_support.py::test_the_support",
        "bad input": "logprob/test_support.py::test_bad_arguments",
        "wrong": "logprob/test_support.py::test_the_chi_square_test_rejects_another_support",
        "interpreted": "logprob/test_support.py::test_the_support_by_the_kernels",
    },
    "sequence_log_likelihood": {
        "truth": "logprob/test_sequence_log_likelihood.py::test_padded",
        "gradients": "logprob/test_sequence_log_likelihood.py::test_gradient",
        "bad input": "logprob/test_sequence_log_likelihood.py::test_bad_arguments",
    },
    "linear_score_tokens": {
        "truth and gradients": "linear_logprob/test_linear_score_tokens.py"
        "::test_values_and_gradients_are_the_truth",
        "bad input": "linear_logprob/test_linear_score_tokens.py::test_bad_arguments",
        "interpreted": "linear_logprob/test_kernels.py::test_fused_scores_are_the_truth",
        "interpreted gradients": "linear_logprob/test_kernels.py"
        "::test_fused_forward_and_chunked_backward",
    },
    "covariance": {
        "truth": "covariance/test_token_covariance.py::test_covariance_is_its_definition",
        "selection": "covariance/test_selection.py::test_top_is_that_of_a_sort",
        "band": "covariance/test_selection.py::test_band_has_the_largest_numbers",
        "bad input": "covariance/test_bad_input.py::test_wrong_types",
        "wrong": "covariance/test_accumulator.py"
        "::test_a_selection_for_each_micro_batch_is_a_wrong_one",
        "interpreted": "covariance/test_kernels.py::test_covariance",
        "interpreted selection": "covariance/test_kernels.py::test_top",
        "ranks": "covariance/test_ranks.py::test_ranks_are_as_one",
    },
    "policy losses": {
        "truth and gradients": "policy_loss/test_policy_loss.py::test_loss_is_that_of_the_textbook",
        "verl's": "policy_loss/test_verl_equality.py::test_vanilla",
        "bad input": "policy_loss/test_bad_input.py::test_wrong_tensors",
        "interpreted": "policy_loss/test_kernels.py::test_loss",
    },
    "decode_attention": {
        "truth": "decode_attention/test_decode_attention.py::test_against_float64",
        "bad input": "decode_attention/test_decode_attention.py::test_bad_input",
        "interpreted": "decode_attention/test_kernels.py::test_against_float64",
    },
    "move_positions": {
        "truth": "lane_moves/test_move_positions.py::test_random_moves",
        "bad input": "lane_moves/test_move_positions.py::test_bad_input",
        "interpreted": "lane_moves/test_move_positions.py::test_random_moves_in_the_kernel",
    },
    "philox": {
        "truth": "philox/test_philox.py::test_known_answers",
        "bad input": "philox/test_philox.py::test_bad_arguments",
    },
    "power sampling": {
        "law": "power_sampling/test_law.py::test_chain_has_its_exact_law_at_every_length",
        "wrong length term": "power_sampling/test_law.py"
        "::test_without_length_term_the_law_is_wrong",
        "wrong growth": "power_sampling/test_law.py::test_with_growth_capped_the_law_is_wrong",
        "compiled": "power_sampling/test_transition.py::test_compiled",
        "interpreted": "power_sampling/test_transition.py::test_kernels",
        "bad input": "power_sampling/test_sampler.py::test_bad_settings_name_the_argument",
    },
}


@pytest.mark.parametrize(("op", "what"), [(op, what) for op, kept in KEPT.items() for what in kept])
def test_an_op_keeps_its_tests(op, what, request):
    """One case or more that runs here, of all that are collected."""
    file, _, name = KEPT[op][what].partition("::")
    path = request.config.rootpath / "python_tests" / file
    assert path.exists()
    of_file = [item for item in request.session.items if item.path == path]
    if not of_file or request.config.option.keyword or "::" in str(request.config.args):
        pytest.skip("only a part of the tests is run")
    cases = [item for item in of_file if item.originalname == name]
    fast = [item for item in cases if not tiers.is_marked(item, "slow", "gpu")]
    assert fast
    if "interpreted" in what:
        assert any(map(tiers.is_interpreted, fast)) == triton_device.INTERPRETED
    backends = {str(tiers.parameters_of(item).get("backend", "")) for item in fast}
    if backends != {""}:
        top = tiers.highest_simd_level()
        assert backends == ({"reference"} if top is None else {"reference", f"cpp-{top}"})


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


def test_files_that_the_fast_tier_leaves_out_are_named():
    pytest.importorskip("coverage")
    from python_tests.coverage_of_tiers import table

    fast = {"a.py": set(range(95)), "b.py": {1}}
    slow = {"a.py": set(range(90, 100)), "b.py": {2}, "c.py": {1}, "d.py": set()}
    text, below = table(fast, slow)
    assert below == ["b.py", "c.py"]
    assert [line.split() for line in text.splitlines()[1:]] == [
        ["0.0%", "0", "1", "c.py"],
        ["50.0%", "1", "2", "b.py"],
        ["95.0%", "95", "100", "a.py"],
        ["93.2%", "96", "103", "all"],
    ]
