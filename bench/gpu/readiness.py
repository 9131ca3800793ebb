"""Why this machine cannot do it, in a line; and the build of the compiled part."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

from bench.harness.machine import ROOT, digest

# Of the machine that is meant: Hopper. Asked of the device where there is one.
ARCHITECTURES = "90"
DEVICE_SECONDS = 60  # a device that does not answer by then is gone
ROOM_BYTES = 2**22  # what a target writes
BUILD = ROOT / "csrc" / "build.py"
# The digest of the sources that the extension in the tree was built from. A tree that is copied
# to a machine once more may have new times and the old extension.
STAMP = ROOT / "build" / "compiled-sources"


def why_no_device() -> str | None:
    """Why torch cannot use a GPU, in a line; None if it can."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        with warnings.catch_warnings():
            # What torch says of a driver that is too old is a warning of is_available, and the
            # error of init.
            warnings.simplefilter("ignore")
            torch.cuda.init()
            torch.zeros(1, device="cuda").item()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().splitlines()[0]
    return None


def device_fault() -> str | None:
    """Why the device does not answer a new process, in a line; None if it does."""
    look = "import torch; torch.zeros(1, device='cuda').item()"
    try:
        found = subprocess.run(
            [sys.executable, "-c", look], capture_output=True, text=True, timeout=DEVICE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"a kernel has not ended in {DEVICE_SECONDS} s"
    if found.returncode == 0:
        return None
    lines = found.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit status {found.returncode}"


def why_no_folder(folder: Path) -> str | None:
    """Why nothing can be kept in a folder, in a line; makes it if it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * ROOM_BYTES)
    except OSError as error:
        return f"--out: nothing can be kept in {folder}: {error.strerror}"
    return None


def why_no_program(name: str, advice: str) -> str | None:
    return None if shutil.which(name) else f"{name} is not on PATH ({advice})"


def architectures() -> str:
    import torch

    if not torch.cuda.is_available():
        return ARCHITECTURES
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}"


class Build:
    """The compiled part with CUDA, built in place in the background while other steps run.

    Args:
        log: file for the compiler's output.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._reason: str | None = None
        if has_cuda_part():
            return
        command = [sys.executable, str(BUILD), "--cuda", "on", "--architectures", architectures()]
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # the compilers that it starts end with it
            )

    def wait(self, seconds: float) -> str | None:
        """Wait for its end; why there is no compiled part with CUDA, or None."""
        if self._process is not None:
            try:
                code = self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                return f"the build of the compiled part takes longer than {seconds:.0f} s"
            self._process = None
            if code == 0:
                STAMP.parent.mkdir(exist_ok=True)
                STAMP.write_text(compiled_sources())
                self._log.unlink()
            else:
                lines = self._log.read_text(errors="replace").strip().splitlines()
                self._reason = lines[-1] if lines else f"the build ended with status {code}"
        if self._reason is None and not has_cuda_part():
            self._reason = "the compiled part is without CUDA: python csrc/build.py --cuda on"
        return self._reason

    def end(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def compiled_sources() -> str:
    return digest(["csrc"])


def has_cuda_part() -> bool:
    """Whether the extension in the tree is of these sources and has the CUDA part.

    Asked of a process of its own: this one would keep the module that it has loaded.
    """
    look = (
        "from powerkernels import _extension as e; m = e.extension(); "
        "print(m.__file__ if m and m.has_cuda and hasattr(m, 'GraphLoop') else '')"
    )
    found = subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True)
    module = found.stdout.strip()
    if found.returncode != 0 or not module:
        return False
    if STAMP.exists() and STAMP.read_text() == compiled_sources():
        return True
    sources = [*(ROOT / "csrc").rglob("*"), ROOT / "CMakeLists.txt"]
    newest = max(path.stat().st_mtime for path in sources if path.is_file())
    return Path(module).stat().st_mtime >= newest
