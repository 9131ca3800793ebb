"""Models by the name that a person gives: a folder, a hub name, or smollm2."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

SMOLLM2 = "smollm2"
# Of each file of weights, its first and last MiB stand for it: training changes all of a weight.
FINGERPRINT_BYTES = 2**20


def find_device(name: str) -> Any:
    """The torch device of a name; "auto" is a GPU where there is one.

    Where several processes share a machine's GPUs (LOCAL_RANK is set, as torchrun does), "auto" and
    "cuda" are the one with that number.

    Raises:
        ValueError: the name is none, or that device is not here.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device: expected cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device: {name} is not here; see: powerkernels doctor")
    index: int | None = device.index
    if device.type == "cuda" and index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def load_model(name: str, dtype_name: str, device: Any, *, quiet: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer) by name; `dtype_name` "auto" is the checkpoint's. See `load_causal_lm`."""
    import torch

    from powerkernels.integrations import smollm2
    from powerkernels.integrations.transformers import load_causal_lm, without_progress_bars

    dtype = None if dtype_name == "auto" else getattr(torch, dtype_name)
    with without_progress_bars():
        if name != SMOLLM2:
            return load_causal_lm(name, dtype=dtype or "auto", device=device)
        if not quiet and not smollm2.converted_folder().is_dir():
            sys.stderr.write("converting SmolLM2, once: about 20 s\n")
        return smollm2.load_smollm2(dtype, device=device)


def model_path(name: str) -> str:
    """What loaders of other packages take for a name: a folder or a hub name."""
    if name != SMOLLM2:
        return name
    from powerkernels.integrations.smollm2 import smollm2_path

    return str(smollm2_path())


def model_fingerprint(name: str) -> str:
    """What tells a model from others, without loading it.

    A folder's is a hash of its files; its place does not matter. A hub name is its own, which says
    nothing about the revision.

    Raises:
        ValueError: the folder is no model that can be loaded.
    """
    if name == SMOLLM2:
        return Path(model_path(name)).name  # converted now, and not by several workers at once
    folder = Path(name).expanduser()
    if not folder.exists():
        return name
    from powerkernels.integrations.transformers import check_folder

    check_folder(folder)
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".safetensors", ".model", ".txt", ".jinja"):
            with path.open("rb") as file:
                head = file.read(FINGERPRINT_BYTES)
                size = file.seek(0, os.SEEK_END)
                file.seek(max(size - FINGERPRINT_BYTES, 0))
                digest.update(f"{path.name} {size} ".encode() + head + file.read())
    return digest.hexdigest()
