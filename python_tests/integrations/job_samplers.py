"""Samplers that workers of a job make: they note what they sample, and fail when told to.

Apart from the tests, so that a worker imports them without pytest.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from powerkernels import PowerSample, PowerSampler
from powerkernels.integrations.sharding import SamplerFactory


@dataclass(frozen=True)
class Watched:
    """Makes samplers that write each prompt to a log, and fail at one prompt.

    Args:
        factory: makes the sampler.
        log: a file that gets a line with the process and the prompt.
        fail_at: text of the prompt at which something happens, once.
        failure: "exit" ends the process; "error" and "interrupt" (Ctrl-C) come when the prompts are
            sampled.
    """

    factory: SamplerFactory
    log: Path
    fail_at: str | None = None
    failure: str = "error"

    def __call__(self) -> PowerSampler:
        sampler = self.factory()
        encode, iter_samples = sampler.encode, sampler.iter_samples
        failing = []

        def watched_encode(prompt: Any) -> list[int]:
            text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            with self.log.open("a") as file:
                file.write(f"{os.getpid()} {text}\n")
            if text == self.fail_at and self._first_time():
                if self.failure == "exit":
                    os._exit(1)
                failing.append(self.failure)
            return encode(prompt)

        def watched_samples(*args: Any, **kwargs: Any) -> Iterator[PowerSample]:
            if failing:
                raise KeyboardInterrupt if failing.pop() == "interrupt" else RuntimeError("told to")
            return iter_samples(*args, **kwargs)

        sampler.encode = watched_encode  # type: ignore[method-assign]
        sampler.iter_samples = watched_samples  # type: ignore[method-assign]
        return sampler

    def _first_time(self) -> bool:
        try:
            self.log.with_suffix(".failed").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def prompts(self) -> Counter[str]:
        """How often each prompt has been taken up."""
        return Counter(line.split(" ", 1)[1] for line in self.log.read_text().splitlines())

    def processes(self) -> set[str]:
        return {line.split(" ", 1)[0] for line in self.log.read_text().splitlines()}
