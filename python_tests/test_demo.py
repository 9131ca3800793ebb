"""examples/demo.py from its first line to its picture, with a tiny model in place of SmolLM2."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

import powerkernels
from powerkernels.integrations.transformers import load_causal_lm
from python_tests.tiny_model import CHAT_TEMPLATE, save_tiny_model

pytest.importorskip("matplotlib")

DEMO = Path(__file__).parents[1] / "examples" / "demo.py"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = save_tiny_model(tmp_path / "model", template=CHAT_TEMPLATE)
    config = powerkernels.PowerSamplingConfig(
        max_new_tokens=8, block_size=4, num_mcmc_steps=3, seed=0
    )
    monkeypatch.setattr(module, "load_smollm2", lambda: load_causal_lm(folder))
    monkeypatch.setattr(module, "PROMPTS", ("one two", "three", "four five"))
    monkeypatch.setattr(module, "CONFIG", config)
    monkeypatch.setattr(module, "NUM_SAMPLES", 2)
    return module


def test_demo(demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "demo.png"
    assert demo.main(["--output", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "prompt 0: one two" in out
    assert "prompt 1: three" in out
    assert "prompt 2" not in out  # read by a person: two prompts are enough
    assert "all 3 prompts, 2 samples each" in out
    assert str(picture) in out


def test_runs_hold_every_sample(demo: ModuleType) -> None:
    model, tokenizer = demo.load_smollm2()
    runs = demo.sample(model, tokenizer, demo.PROMPTS, demo.CONFIG, demo.NUM_SAMPLES)
    assert [run.method for run in runs] == ["plain", "low-temperature", "power"]
    for run in runs:
        found = {(sample.prompt_index, sample.sample_index) for sample in run.samples}
        assert found == {(p, s) for p in range(3) for s in range(2)}
    assert all(len(sample.trace.accepted) == 2 * 3 for sample in runs[-1].samples)
