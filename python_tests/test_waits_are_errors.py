"""The switch that makes waits for the device errors is put back, however its block ends."""

from __future__ import annotations

import warnings

import pytest
import torch

from powerkernels._cuda_graph import waits_are_errors

PROTOTYPE = "Synchronization debug mode is a prototype feature and does not yet detect all"
MODES = ("default", "warn", "error")


class Switch:
    """Of torch.cuda, which sets the mode first and says that it is young afterwards."""

    def __init__(self, message: str) -> None:
        self.mode, self.message = 1, message

    def get(self) -> int:
        return self.mode

    def set(self, mode: int | str) -> None:
        self.mode = MODES.index(mode) if isinstance(mode, str) else mode
        if self.mode == 2:
            warnings.warn(self.message, UserWarning, stacklevel=2)


@pytest.fixture(params=[f"{PROTOTYPE} synchronizing operations", "another"])
def switch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Switch:
    made = Switch(request.param)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", made.get)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", made.set)
    return made


def test_the_mode_is_put_back(switch: Switch) -> None:
    """Any other warning is an error here, raised after the mode was set."""
    if "prototype" not in switch.message:
        with pytest.raises(UserWarning, match="another"), waits_are_errors():
            raise AssertionError("the block must not begin")
        assert switch.mode == 1
        return
    with waits_are_errors():
        assert switch.mode == 2
    assert switch.mode == 1
    with pytest.raises(KeyError), waits_are_errors():
        raise KeyError
    assert switch.mode == 1


def test_warnings_of_the_block_are_errors_still(switch: Switch) -> None:
    switch.message = PROTOTYPE
    with pytest.raises(UserWarning, match="of the block"), waits_are_errors():
        warnings.warn("of the block", UserWarning, stacklevel=1)
    assert switch.mode == 1
