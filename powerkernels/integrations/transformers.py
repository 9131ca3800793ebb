"""Load a causal LM and its tokenizer with transformers, from safetensors only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

INSTALL_TRANSFORMERS = "pip install 'powerkernels[demo]'"

# Formats that hold pickled Python objects: reading one runs whatever code is in it.
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def load_causal_lm(
    model: str | Path,
    *,
    dtype: torch.dtype | Literal["auto"] = "auto",
    device: torch.device | str = "cpu",
) -> tuple[Any, Any]:
    """Load a model and its tokenizer, ready for `PowerSampler`.

    Args:
        model: a folder with `config.json`, `*.safetensors` and a tokenizer, or a hub name such as
            `owner/name`.
        dtype: of the weights; "auto" is what the checkpoint says.
        device: where the model goes.

    Returns:
        (model in eval mode, tokenizer).

    Raises:
        ModuleNotFoundError: transformers is not installed.
        FileNotFoundError: there is no such folder, and no such model on the hub (or no hub:
            HF_HUB_OFFLINE is respected).
        ValueError: the folder has no safetensors weights. Pickled weights are never read.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"transformers is not installed; get it with: {INSTALL_TRANSFORMERS}",
            name="transformers",
        ) from error

    is_local = Path(model).expanduser().exists()
    source = str(Path(model).expanduser()) if is_local else str(model)
    if is_local:
        check_folder(Path(source))
    elif not _could_be_hub_name(source):
        raise FileNotFoundError(
            f"model: there is no folder {source!r}; "
            "give a folder, a hub name (owner/name) or smollm2"
        )

    try:
        # No pickled weights and no code from the checkpoint.
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source, local_files_only=is_local, trust_remote_code=False
        )
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=is_local,
            trust_remote_code=False,
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if is_local:
            raise ValueError(f"model: {source!r} cannot be loaded: {reason}") from error
        raise FileNotFoundError(
            f"model: {source!r} is no local folder, and the hub did not give it "
            f"(check the name and the network, or give a folder): {reason}"
        ) from error
    return loaded.to(device).eval(), tokenizer


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing bars while it loads, which it does on a pipe as well."""
    try:
        from transformers.utils import logging
    except ModuleNotFoundError:  # the loader says what to install
        yield
        return
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _could_be_hub_name(name: str) -> bool:
    return bool(name) and not name.startswith(("/", ".", "~")) and name.count("/") <= 1


def check_folder(folder: Path) -> None:
    """Refuse what transformers would answer with a long message, or read with pickle."""
    if not folder.is_dir():
        raise ValueError(
            f"model: {str(folder)!r} is a file; "
            "expected the folder that holds config.json and *.safetensors"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"model: {str(folder)!r} has no config.json; expected a transformers model folder"
        )
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if pickled:
        raise ValueError(
            f"model: {str(folder)!r} has only pickled weights ({', '.join(pickled)}), which can "
            "run code when read; where you trust it, load it and save_pretrained() it again"
        )
    raise ValueError(f"model: {str(folder)!r} has no *.safetensors weights")
