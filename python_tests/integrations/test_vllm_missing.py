"""Without vLLM: what to install."""

from __future__ import annotations

import importlib
import sys

import pytest


def test_missing_vllm_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "powerkernels.integrations.vllm", raising=False)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ModuleNotFoundError, match=r"vllm is not installed.*pip install 'vllm"):
        importlib.import_module("powerkernels.integrations.vllm")
