"""Records work as a CUDA graph; where that fails, the process can still be used.

The sampler and the benches capture here alone. `torch.cuda.graph` leaves the capture stream current
and its pool unusable where the capture's end fails.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from powerkernels import _extension

# Kinds of nodes that do something: without any of them a graph is empty.
WORK = ("kernel", "memcpy", "memset")

# Failed captures. torch's allocators may still ask them which stream was theirs.
_failed_captures: list[torch.cuda.CUDAGraph] = []


class EmptyGraphError(RuntimeError):
    """What was recorded does nothing: the work is not on the capture's device and stream."""


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes a CUDA device the current one; nothing to do for others.

    Streams, events, graphs and what Triton launches belong to the current device, not to that of
    the tensors.
    """
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def is_capturing(device: torch.device) -> bool:
    """Whether the device's current stream is in a capture."""
    if device.type != "cuda":
        return False
    with on_device(device):
        return torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def waits_are_errors() -> Iterator[None]:
    """Inside, an operation of torch that waits for a CUDA device raises RuntimeError.

    torch warns that the mode is young after it has set it: the mode is put back even where that
    warning, or another, is an error.
    """
    before = torch.cuda.get_sync_debug_mode()
    try:
        _set_sync_debug_mode("error")
        yield
    finally:
        _set_sync_debug_mode(before)


def _set_sync_debug_mode(mode: int | str) -> None:
    with warnings.catch_warnings():
        # It does not find every wait, which is what the capture is for.
        warnings.filterwarnings("ignore", ".*prototype feature", UserWarning)
        torch.cuda.set_sync_debug_mode(mode)


def moved(name: str, tensor: Tensor, device: torch.device) -> Tensor:
    """A small argument on the device of the others, if a capture can hold the copy.

    Raises:
        RuntimeError: the tensor is on the CPU, and a CUDA graph is being captured.
    """
    from_host = tensor.device.type == "cpu" and device.type == "cuda"
    if from_host and not torch.compiler.is_compiling() and is_capturing(device):
        raise RuntimeError(
            f"{name} must be on {device} while a CUDA graph is captured, or a number, got a tensor "
            "on the CPU: its copy would wait for the device, and a replay would not see a new value"
        )
    return tensor.to(device)


def record(
    work: Callable[[], object],
    stream: torch.cuda.Stream,
    *,
    pool: Any = None,
    needs: Sequence[str] = WORK,
) -> torch.cuda.CUDAGraph:
    """Record a call of `work` on a stream, which and whose device are current meanwhile.

    What happens once (compilation, loading of kernels) must have happened. A failure leaves
    streams, allocator and generator usable, and the graphs of its pool; but the pool takes no
    further graph, as torch 2.11's allocator of pinned memory believes it in a recording for ever.

    Args:
        work: waits for nothing, copies nothing from unpinned memory.
        stream: not a default stream. cuBLAS keeps a workspace for each stream it was used on: two
            graphs that may run at once are recorded on two streams.
        pool: where the graph's memory comes from; None is a pool of its own. Graphs share one if
            they never run at once and nobody reads the results of one after another has run.
        needs: kinds of nodes of which there must be one.

    Returns:
        The graph, made with ``keep_graph=True``.

    Raises:
        EmptyGraphError: nothing of `needs` was recorded.
        Exception: what `work` or the capture raised.
    """
    device = stream.device
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # of the warm-up's blocks: a graph allocates from its pool
        with torch.cuda.stream(stream), _no_collection():
            graph, said = _captured(work, device, pool)
    refuse_without(graph, needs, device, said)
    return graph


def _captured(
    work: Callable[[], object], device: torch.device, pool: Any
) -> tuple[torch.cuda.CUDAGraph, list[str]]:
    """The graph, and what torch warns of at its end."""
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    try:
        # Other threads may go on using CUDA.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        work()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            graph.capture_end()
    except BaseException:
        _clean_up(graph, pool, device)
        raise
    said = [str(warning.message) for warning in caught]
    for text in said:
        if not _says_empty(text):
            warnings.warn(text, stacklevel=4)
    return graph, said


def _says_empty(text: str) -> bool:
    return "graph is empty" in text.lower()


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage is collected: it may hold graphs and events, whose end disturbs a capture."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def node_kinds(graph: torch.cuda.CUDAGraph) -> dict[str, int] | None:
    """How many nodes of each kind a graph holds; None where nobody can tell."""
    count = getattr(_extension.extension(), "graph_node_kinds", None)
    if count is None:
        return None
    try:
        return dict(count(graph.raw_cuda_graph()))
    except RuntimeError:  # made without keep_graph
        return None


def refuse_without(
    graph: torch.cuda.CUDAGraph,
    needs: Sequence[str],
    device: torch.device,
    said: Sequence[str] = (),
) -> None:
    """Refuse a graph with no node of the kinds, as far as anybody can tell.

    Raises:
        EmptyGraphError: there is none.
    """
    kinds = node_kinds(graph)
    if kinds is None:
        kinds = {} if any(map(_says_empty, said)) else dict.fromkeys(needs, 1)
    if not any(kinds.get(kind) for kind in needs):
        held = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "nothing"
        raise EmptyGraphError(
            f"the CUDA graph must hold a {' or '.join(needs)} node, it holds {held}: the work is "
            f"not done on {device} and its current stream"
        )


def _clean_up(graph: torch.cuda.CUDAGraph, pool: Any, device: torch.device) -> None:
    """Put back what torch leaves behind where a capture fails."""
    _failed_captures.append(graph)
    with contextlib.suppress(Exception):
        graph.capture_end()
    try:
        graph.pool()  # raises unless the end went well, and reset gives the pool back
    except Exception:
        with contextlib.suppress(Exception):
            torch._C._cuda_endAllocateToPool(device.index, pool)
            # Only of a capture that had begun: the pool may be that of other graphs too, and one
            # release too many ends the process.
            torch._C._cuda_releasePool(device.index, pool)
    with contextlib.suppress(Exception):
        graph.reset()
    # torch's generator may believe that it is in a capture until one ends well.
    with contextlib.suppress(Exception):
        _capture_nothing()


def _capture_nothing() -> None:
    graph = torch.cuda.CUDAGraph()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the graph is empty
        graph.capture_begin(capture_error_mode="thread_local")
        graph.capture_end()
