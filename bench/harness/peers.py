"""The peers: what each needs, and why one is not here."""

from __future__ import annotations

import functools
import importlib
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Peer:
    """modules: what is imported of it; device: the only one it runs on, if there is one."""

    name: str
    install: str
    modules: tuple[str, ...] = ()
    device: str | None = None


PEERS = {
    peer.name: peer
    for peer in (
        Peer("eager", "part of torch"),
        Peer("compile", "part of torch; needs a C++ compiler on a CPU"),
        Peer(
            "liger",
            "pip install liger-kernel",
            ("liger_kernel.transformers.functional",),
            device="cuda",
        ),
        Peer("cce", "pip install cut-cross-entropy", ("cut_cross_entropy",), device="cuda"),
        Peer("quack", "pip install quack-kernels", ("quack.cross_entropy",), device="cuda"),
        Peer("flashinfer", "pip install flashinfer-python", ("flashinfer",), device="cuda"),
        Peer(
            "verl",
            "pip install --no-deps verl==0.9.1",
            ("verl.trainer.ppo.core_algos", "verl.utils.experimental.torch_functional"),
        ),
        Peer(
            "verl-triton",
            "pip install --no-deps verl==0.9.1",
            ("verl.utils.kernel.linear_cross_entropy",),
            device="cuda",
        ),
        Peer("trl", "pip install trl", ("trl.trainer.utils",)),
        Peer("transformers", "pip install transformers", ("transformers",)),
        Peer("public-sampler", "--peer-path FOLDER, the one with power_samp_utils.py"),
    )
}


@functools.cache
def _import_error(name: str) -> str | None:
    for module in PEERS[name].modules:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what it imports
                importlib.import_module(module)
        except Exception as error:  # a peer for another torch, Python or CUDA
            return (
                f"{module} does not import: {str(error).splitlines()[0] if str(error) else error!r}"
            )
    return None


def why_missing(name: str, device: torch.device, peer_path: Path | None = None) -> str | None:
    """Why the peer cannot run on the device, with the remedy; None if it can."""
    peer = PEERS[name]
    if peer.device is not None and peer.device != device.type:
        return f"it runs on {peer.device} only"
    if name == "public-sampler":
        if peer_path is None:
            return f"no path was given: {peer.install}"
        if not (peer_path / "power_samp_utils.py").is_file():
            return f"{peer_path} holds no power_samp_utils.py"
    error = _import_error(name)
    return f"{error} ({peer.install})" if error else None


def chosen(names: list[str] | None) -> set[str]:
    """The peers of these names; all for None.

    Raises:
        ValueError: a name is not a peer's.
    """
    if names is None:
        return set(PEERS)
    unknown = sorted(set(names) - set(PEERS) - {"none"})
    if unknown:
        raise ValueError(
            f"--peers: unknown {', '.join(unknown)}; expected some of {', '.join(PEERS)}, or none"
        )
    return set(names) - {"none"}
