"""The adapter, through verl's own registry."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from python_tests.covariance.expected import IGNORE_LARGE_RATIO
from python_tests.policy_loss import verl_losses
from python_tests.policy_loss.test_verl_equality import random_batch

from powerkernels.integrations import verl as adapter  # isort: skip

pytestmark = pytest.mark.filterwarnings(IGNORE_LARGE_RATIO)

ALL_OF_THE_BAND = {"clip_cov_ratio": 0.9, "clip_cov_lb": 0.2, "clip_cov_ub": 1.5}
CALLS = {
    "vanilla": {"clip_ratio_low": 0.1, "clip_ratio_high": 0.3, "clip_ratio_c": 1.5},
    "clip_cov": ALL_OF_THE_BAND,
    "kl_cov": {"kl_cov_ratio": 0.05, "ppo_kl_coef": 0.3},
}


@pytest.fixture(autouse=True)
def same_registry(monkeypatch):
    registry = verl_losses.algorithms.POLICY_LOSS_REGISTRY
    monkeypatch.setattr(verl_losses.algorithms, "POLICY_LOSS_REGISTRY", dict(registry))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum-norm"])
def test_verls_names_and_settings(name, mode):
    adapter.register()
    batch = random_batch((6, 50), 1)
    counts = {"dp_size": 2, "batch_num_tokens": 321, "global_batch_size": 13}
    wanted, gradient, metrics = verl_losses.loss(name, *batch, mode, None, counts, **CALLS[name])
    got, slope, found = verl_losses.loss(
        "powerkernels_" + name, *batch, mode, None, counts, **CALLS[name]
    )
    torch.testing.assert_close(got, wanted, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(slope, gradient, rtol=2e-5, atol=1e-9)
    for key, value in metrics.items():
        assert found[key] == pytest.approx(value, rel=1e-5)
    assert all(isinstance(value, float) for value in found.values())


def test_replace_takes_verls_names():
    before = verl_losses.algorithms.get_policy_loss_fn("kl_cov")
    registered = adapter.register(replace=True)
    assert set(registered) == set(CALLS)
    assert verl_losses.algorithms.get_policy_loss_fn("kl_cov") == registered["kl_cov"] != before


def test_prefix():
    assert set(adapter.register(prefix="pk-")) == {"pk-vanilla", "pk-clip_cov", "pk-kl_cov"}
    with pytest.raises(ValueError, match="prefix must not be empty"):
        adapter.register(prefix="")


def test_another_choice_each_call_and_the_same_in_another_run():
    batch = random_batch((16, 200), 2)
    settings = {"clip_cov_ratio": 0.01, "clip_cov_lb": 0.1, "clip_cov_ub": 3.0}

    def chosen(losses: adapter.VerlLosses) -> torch.Tensor:
        leaf = batch.log_prob.clone().requires_grad_()
        config = verl_losses.config(**settings)
        loss, _ = losses.clip_cov(batch.old_log_prob, leaf, *batch[2:], config=config)
        return torch.autograd.grad(loss, leaf)[0] == 0

    first, second = adapter.VerlLosses(), adapter.VerlLosses()
    runs = [[chosen(losses) for _ in range(3)] for losses in (first, second)]
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(runs[0][0], runs[0][1])
    assert not torch.equal(runs[0][0], chosen(adapter.VerlLosses(seed=1)))


def test_no_config():
    batch = random_batch((2, 5), 0)
    with pytest.raises(ValueError, match="config must be"):
        adapter.VerlLosses().vanilla(*batch)


def test_verl_loads_it_as_an_external_module():
    code = (
        "from verl.trainer.ppo.core_algos import get_policy_loss_fn\n"
        "print(get_policy_loss_fn('powerkernels_clip_cov').__module__)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "VERL_USE_EXTERNAL_MODULES": "powerkernels.integrations.verl"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split()[-1] == "powerkernels.integrations.verl"


def test_without_verl():
    code = (
        "import sys\n"
        "sys.modules['verl'] = None\n"
        "try:\n"
        "    import powerkernels.integrations.verl\n"
        "except ModuleNotFoundError as error:\n"
        "    print(error)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'verl>=0.9'" in ran.stdout, ran.stderr
