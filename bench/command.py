"""`powerkernels bench`, without its parser, which is in powerkernels/cli.py."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from bench import suite
from bench.harness import machine, peers, results, runner, table
from bench.harness.broken_context import BROKEN_EXIT, BrokenContextError
from bench.harness.cases import Size
from powerkernels.models import find_device

EXIT_REGRESSION = 1
EXIT_INTERRUPT = 130


def main(arguments: argparse.Namespace) -> int:
    """Measures, or does what the first word asks for; returns the exit status."""
    actions = {"compare": _compare, "plot": _plot, "report": _report, "list": _list}
    words = arguments.what
    if words and words[0] in actions:
        return actions[words[0]](arguments, [Path(word) for word in words[1:]])
    return _measure(arguments)


def _measure(arguments: argparse.Namespace) -> int:
    kernels = suite.chosen(arguments.what, arguments.part or [])
    chosen_peers = peers.chosen(arguments.peers)
    device = find_device(arguments.device)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    size: Size = arguments.size or ("device" if device.type == "cuda" else "host")
    if arguments.quick:
        size = "quick"
    if arguments.peer_path is not None:
        from bench.jobs.cases import PUBLIC_SAMPLER

        PUBLIC_SAMPLER[:] = [arguments.peer_path]
    settings = runner.Settings(size, device, frozenset(chosen_peers), arguments.peer_path)
    document = _document(arguments, machine.environment(device))

    def show(rows: list[dict[str, Any]]) -> None:
        if rows:
            print(table.text(rows), flush=True)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what peers and torch.compile import
            runner.run(kernels, settings, document, _say, show)
    except BrokenContextError as error:
        print(f"the device's context is broken ({error}); --resume goes on", file=sys.stderr)
        return BROKEN_EXIT
    except KeyboardInterrupt:
        kept = f"{len(document.suite['done'])} cases are measured"
        where = f" and kept in {arguments.out}; --resume goes on" if arguments.out else ""
        print(f"interrupted: {kept}{where}", file=sys.stderr)
        return EXIT_INTERRUPT
    _sum_up(document)
    return EXIT_REGRESSION if document.suite["failed"] else 0


def _document(arguments: argparse.Namespace, environment: dict[str, Any]) -> results.Document:
    path, command = arguments.out, machine.command_line()
    if path is None:
        if arguments.resume:
            raise ValueError("--resume needs --out FILE, the file that goes on")
        return results.Document(environment, command, None)
    if not path.parent.is_dir() or path.is_dir():
        raise ValueError(f"--out: cannot write {path}; expected a file in a folder that exists")
    if arguments.resume:
        return results.Document.resumed(environment, command, path)
    return results.Document(environment, command, path)


def _sum_up(document: results.Document) -> None:
    found = document.suite
    _say(
        f"{len(found['done'])} cases, {len(found['skipped'])} skipped variants, "
        f"{len(found['failed'])} wrong ones"
        + (f"; written to {document.path}" if document.path else "")
    )


def _say(text: str) -> None:
    print(text, flush=True)


def _compare(arguments: argparse.Namespace, paths: list[Path]) -> int:
    from bench.harness import comparison

    if len(paths) != 2:
        raise ValueError(f"bench compare needs two files, a.json b.json, got {len(paths)}")
    found = comparison.compare(
        *(results.load(path) for path in paths), min_effect=arguments.min_effect
    )
    print(comparison.text(found))
    return EXIT_REGRESSION if found.regressions else 0


def _plot(arguments: argparse.Namespace, paths: list[Path]) -> int:
    from bench.harness import plots

    folder = arguments.out or plots.FOLDER
    for path in plots.draw(paths or plots.committed(), folder):
        print(path)
    return 0


def _report(arguments: argparse.Namespace, paths: list[Path]) -> int:
    from bench.harness import readme, report

    if paths:
        raise ValueError("bench report takes no files: it reads those of bench/results/")
    pages = {arguments.out or report.TARGET: report.markdown()}
    if arguments.out is None:
        pages[readme.TARGET] = readme.rewritten(readme.TARGET.read_text())
    for target, text in pages.items():
        target.write_text(text)
        print(target)
    return 0


def _list(arguments: argparse.Namespace, paths: list[Path]) -> int:
    device = find_device(arguments.device)
    for kernel in suite.KERNELS.values():
        print(f"{kernel.part}/{kernel.name}: {kernel.summary}")
    print()
    for name, peer in peers.PEERS.items():
        reason = peers.why_missing(name, device, arguments.peer_path)
        print(f"{name}: {reason or 'here'} ({peer.install})" if not reason else f"{name}: {reason}")
    return 0
