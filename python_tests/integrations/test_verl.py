"""The adapter, through verl's own registry."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from python_tests.covariance.expected import IGNORE_LARGE_RATIO
from python_tests.logprob.test_vocab_parallel import run
from python_tests.policy_loss import verl_losses
from python_tests.policy_loss.expected import MODES
from python_tests.policy_loss.test_verl_equality import Batch, random_batch

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
    registered = adapter.register(prefix="pk-")
    assert set(registered) == {"pk-vanilla", "pk-ppo_clip", "pk-clip_cov", "pk-kl_cov"}
    assert registered["pk-ppo_clip"] == registered["pk-vanilla"]
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


class TestVerlsWorker:
    """`ppo_loss`, which verl's workers call: it adds to the loss in place."""

    PROMPTS, RESPONSES = (3, 2, 4, 1), (7, 1, 9, 4)

    def nested(self, lengths: tuple[int, ...]) -> Tensor:
        parts = [torch.randn(length) for length in lengths]
        return torch.nested.as_nested_tensor(parts, layout=torch.jagged)

    def step(self, mode: str, loss_agg_mode: str) -> tuple[Tensor, Tensor, dict[str, Any]]:
        losses = pytest.importorskip("verl.workers.utils.losses")
        tensordict = pytest.importorskip("tensordict")
        torch.manual_seed(0)
        data = tensordict.TensorDict(
            {
                "prompts": self.nested(self.PROMPTS),
                "responses": self.nested(self.RESPONSES),
                "old_log_probs": self.nested(self.RESPONSES),
                "ref_log_prob": self.nested(self.RESPONSES),
                "advantages": self.nested(self.RESPONSES),
                "response_mask": self.nested(self.RESPONSES) > -1,
            },
            batch_size=[len(self.PROMPTS)],
        )
        for name, value in (("dp_size", 2), ("batch_num_tokens", 33), ("global_batch_size", 9)):
            data[name] = tensordict.NonTensorData(value)
        whole = tuple(map(sum, zip(self.PROMPTS, self.RESPONSES, strict=True)))
        log_prob, entropy = self.nested(whole), self.nested(whole)
        leaf = log_prob.values().clone().requires_grad_()
        output = {
            "log_probs": torch.nested.nested_tensor_from_jagged(leaf, log_prob.offsets()),
            "entropy": entropy,
        }
        settings: dict[str, Any] = CALLS[mode.removeprefix("powerkernels_")]
        config = verl_losses.config(
            loss_mode=mode,
            loss_agg_mode=loss_agg_mode,
            entropy_coeff=0.1,
            use_kl_loss=True,
            **settings,
        )
        loss, metrics = losses.ppo_loss(config, output, data)
        (slope,) = torch.autograd.grad(loss, leaf)
        values = {name: value.aggregate() for name, value in metrics.items() if name != "kl_coef"}
        return loss.detach(), slope, values

    @pytest.mark.parametrize("loss_agg_mode", MODES)
    @pytest.mark.parametrize("name", CALLS)
    def test_is_as_with_verls_losses(self, name, loss_agg_mode):
        adapter.register()
        wanted, gradient, metrics = self.step(name, loss_agg_mode)
        got, slope, found = self.step("powerkernels_" + name, loss_agg_mode)
        torch.testing.assert_close(got, wanted, rtol=2e-5, atol=1e-6)
        torch.testing.assert_close(slope, gradient, rtol=2e-5, atol=1e-8)
        for key, value in metrics.items():
            assert found[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key


def test_a_batch_without_a_token():
    """As it is where every response was filtered out: verl divides 0 by 0."""
    batch = random_batch((3, 10), 0)._replace(mask=torch.zeros(3, 10, dtype=torch.bool))
    counts = {"dp_size": 2, "batch_num_tokens": 0, "global_batch_size": 0}
    as_tensors = {name: torch.tensor(value) for name, value in counts.items() if name != "dp_size"}
    for mode in MODES:
        for name in CALLS:
            for given in (counts, {**counts, **as_tensors}):
                value, slope, _ = verl_losses.loss(
                    "powerkernels_" + name, *batch, mode, None, given
                )
                assert value == 0
                assert (slope == 0).all()


def test_verls_distillation_knows_vanilla_only():
    """Its configuration has the clip ratios and nothing of Clip-Cov."""
    module = pytest.importorskip("verl.workers.config.distillation")
    config = module.DistillationLossConfig(loss_mode="k1", clip_ratio_low=0.1)
    batch = random_batch((4, 30), 3)
    wanted, _ = verl_losses.algorithms.compute_policy_loss_vanilla(
        batch.old_log_prob, batch.log_prob, *batch[2:], config=config
    )
    found, _ = adapter.VerlLosses().vanilla(
        batch.old_log_prob, batch.log_prob, *batch[2:], config=config
    )
    torch.testing.assert_close(found, wanted)


RANKS = 2
SHARDS = (slice(0, 2), slice(2, 6))  # of the rows
SETTINGS: dict[str, Any] = {
    "clip_cov_ratio": 0.02,
    "clip_cov_lb": 0.1,
    "clip_cov_ub": 3.0,
    "kl_cov_ratio": 0.02,
    "ppo_kl_coef": 1.0,
}


def gradients(losses: adapter.VerlLosses, batch: Batch) -> dict[str, Tensor]:
    found = {}
    for name in ("clip_cov", "kl_cov", "clip_cov again"):
        leaf = batch.log_prob.clone().requires_grad_()
        function = getattr(losses, name.split()[0])
        config = verl_losses.config(**SETTINGS)
        loss, _ = function(batch.old_log_prob, leaf, *batch[2:], "token-sum", config)
        (found[name],) = torch.autograd.grad(loss, leaf)
    return found


def on_a_rank(rank: int, ranks: int) -> dict[str, Tensor]:
    losses = adapter.VerlLosses(seed=-7, process_group=lambda: dist.group.WORLD)
    batch = random_batch((6, 100), 4)
    alone = adapter.VerlLosses(seed=-7)
    return {
        **gradients(losses, Batch(*(x[SHARDS[rank]] for x in batch))),
        "alone": gradients(alone, batch)["clip_cov"],
    }


@pytest.mark.slow
def test_ranks_select_together(tmp_path):
    shards = run(on_a_rank, RANKS, tmp_path)
    batch = random_batch((6, 100), 4)
    for name, wanted in gradients(adapter.VerlLosses(seed=-7), batch).items():
        assert torch.equal(torch.cat([shard[name] for shard in shards]), wanted), name
    # Ranks with the same tokens, as of tensor parallelism, choose the same without a group.
    assert torch.equal(shards[0]["alone"], shards[1]["alone"])


def test_seeds():
    losses = adapter.VerlLosses(seed=2**64 - 1)
    batch = random_batch((4, 30), 3)
    for _ in range(2):  # the second is beyond 64 bits
        value, _ = losses.clip_cov(
            batch.old_log_prob, batch.log_prob, *batch[2:], config=verl_losses.config()
        )
        assert math.isfinite(value)
    with pytest.raises(ValueError, match="seed must fit"):
        adapter.register(seed=2**64)
    with pytest.raises(TypeError, match="seed must be"):
        adapter.register(seed="7")


def test_no_config():
    batch = random_batch((2, 5), 0)
    with pytest.raises(ValueError, match="config must be"):
        adapter.VerlLosses().vanilla(*batch)


@pytest.mark.slow
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
