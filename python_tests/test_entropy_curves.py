"""examples/entropy_curves.py from its first line to its picture, at tiny sizes; and its parts."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

SCRIPT = Path(__file__).parents[1] / "examples" / "entropy_curves.py"
RESULTS = SCRIPT.parents[1] / "docs" / "entropy_curves.json"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("entropy_curves", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.usefixtures("restore_threads")
def test_from_first_line_to_picture(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "curves.json"
    assert script.main(["--quick", "--steps", "2", "--seeds", "1", "--output", str(output)]) == 0
    results = json.loads(output.read_text())
    assert [run["method"] for run in results["runs"]] == list(script.METHODS)
    for run in results["runs"]:
        for name, values in run["history"].items():
            assert len(values) == 2, name
            assert all(map(math.isfinite, values)), name
        assert run["evaluations"]["step"] == [0, 2]
        # All six start from one policy and see the same first rollout.
        for name in ("entropy", "reward", "length"):
            assert run["history"][name][0] == results["runs"][0]["history"][name][0]
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert all(f"| {method} |" in out for method in script.METHODS)


@pytest.mark.parametrize("style", range(3))
def test_reward_of_worked_answers(script: ModuleType, style: int) -> None:
    rng = random.Random(style)
    for _ in range(50):
        first, second = rng.randrange(10**4), rng.randrange(10**4)
        answer = script.worked_answer(first, second, 4, style)
        assert len(answer) <= script.longest_response(4)
        assert script.decode(script.encode(answer)) == answer
        assert script.reward(first, second, answer) == 1
        assert script.reward(first, second + 1, answer) == 0
        assert script.reward(first, second, answer[:-1]) == 0  # never ended


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("#0042.", 1),
        ("#42.", 1),
        ("#9#42.", 1),  # the last answer counts
        ("#42#9.", 0),
        ("42.", 0),
        ("#.", 0),
        (".", 0),
        ("", 0),
        ("#4~2.", 0),
        ("#+42.", 0),
    ],
)
def test_reward_of_known_answers(script: ModuleType, response: str, expected: float) -> None:
    assert script.reward(40, 2, response) == expected


def test_columns_hold_the_carries(script: ModuleType) -> None:
    assert script.worked_answer(58, 67, 2, style=0) == "#125."
    assert script.worked_answer(58, 67, 2, style=1) == "~521#125."
    assert script.worked_answer(58, 67, 2, style=2) == "87>15,56>12,#125."


def test_rollout_ends_at_the_end(script: ModuleType) -> None:
    """The mask holds a response up to its end, and advantages have mean 0 in each group."""
    torch.manual_seed(0)
    settings = dataclasses.replace(script.QUICK, prompts=8)
    model = script.new_model(settings)
    rollout = script.roll_out(model, settings, random.Random(1))
    for row, mask in zip(rollout.responses.tolist(), rollout.mask.tolist(), strict=True):
        length = row.index(script.END) + 1 if script.END in row else len(row)
        assert mask == [True] * length + [False] * (len(row) - length)
        assert all(token == script.PAD for token in row[length:])
    groups = rollout.advantages.view(8, settings.samples)
    torch.testing.assert_close(groups.mean(1), torch.zeros(8), atol=1e-5, rtol=0)


def test_samples_follow_the_scored_distribution(script: ModuleType) -> None:
    """What is sampled step by step with a cache is what is scored in one pass."""
    torch.manual_seed(0)
    settings = script.QUICK
    model = script.new_model(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # far from uniform
        prompts = script.draw_problems(1, settings.digits, random.Random(0)).prompts
        prompts = prompts.repeat(4000, 1)
        responses = script.generate(model, prompts, 2, torch.Generator().manual_seed(0))
        pairs, counts = responses.unique(dim=0, return_counts=True)
        probability = script.scores(model, prompts[: len(pairs)], pairs)[0]
        ended = pairs[:, 0] == script.END  # its second token is padding
        probability = torch.where(ended, probability[:, 0], probability.sum(1)).exp()
    sigma = (probability * (1 - probability) / 4000).sqrt()
    assert ((counts / 4000 - probability).abs() < 5 * sigma + 1e-3).all()


def test_recorded_results_are_of_this_script(script: ModuleType) -> None:
    results = json.loads(RESULTS.read_text())
    settings = dataclasses.asdict(script.Settings())
    assert results["settings"] == json.loads(json.dumps(settings))
    assert {run["method"] for run in results["runs"]} == set(script.METHODS)
