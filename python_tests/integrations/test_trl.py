"""CovGRPOTrainer against TRL's own GRPOTrainer, and whole runs of it, on a tiny random Llama."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from python_tests.tiny_model import WORDS, save_tiny_model

pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

import transformers  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from powerkernels.integrations.trl import CovGRPOConfig, CovGRPOTrainer, why_not_fused  # noqa: E402

# accelerate and datasets say these of themselves, whatever one does with them.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(accelerate|datasets|trl|transformers)"),
    pytest.mark.filterwarnings("ignore::FutureWarning:(accelerate|datasets|trl|transformers)"),
    # So few tokens need large shares.
    pytest.mark.filterwarnings("ignore:.*% of all tokens:UserWarning"),
]

BATCH, PROMPT, LENGTH = 4, 3, 12
LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo"]
COV_LOSSES = ["clip_cov", "kl_cov"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), template=None)


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps a process-wide state, which would carry one test's settings to the next."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)


def rewards(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]


def config(folder: Path, kind: type = CovGRPOConfig, **settings: Any) -> Any:
    defaults = dict(
        output_dir=str(folder / "out"),
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        per_device_train_batch_size=BATCH,
        num_generations=BATCH,
        max_completion_length=LENGTH + 2,
        logging_steps=1,
        learning_rate=1e-2,
        temperature=0.8,
    )
    return kind(**{**defaults, **settings})


def trainer_of(folder: Path, kind: type, args: Any) -> Any:
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    dataset = datasets.Dataset.from_dict({"prompt": ["one two", "three", "four five", "two"] * 4})
    trainer = kind(
        model,
        rewards,
        args=args,
        train_dataset=dataset,
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    return trainer


def pair(folder: Path, **settings: Any) -> tuple[Any, Any]:
    """TRL's trainer and ours, alike."""
    plain = trainer_of(folder, GRPOTrainer, config(folder, GRPOConfig, **settings))
    return plain, trainer_of(folder, CovGRPOTrainer, config(folder, **settings))


def micro_batch(
    generator: torch.Generator,
    trainer: Any,
    *,
    by_token: bool = False,
    with_old: bool = True,
    with_tools: bool = True,
    with_empty: bool = True,
) -> dict[str, Tensor]:
    """What TRL's generation hands to the loss, with left-padded prompts.

    Old and reference log-probs are near the trainer's own: ratios are clipped on both sides.
    """
    rows = torch.tensor([LENGTH, 2, 9, 0 if with_empty else 1])
    mask = (torch.arange(LENGTH) < rows.unsqueeze(1)).int()
    tools = (torch.rand(BATCH, LENGTH, generator=generator) < 0.7).int()
    tools[:, 0] = 1
    prompt_mask = torch.ones(BATCH, PROMPT, dtype=torch.int64)
    prompt_mask[1, 0] = 0
    advantages = torch.randn(BATCH, LENGTH, generator=generator)
    made = dict(
        prompt_ids=torch.randint(2, len(WORDS), (BATCH, PROMPT), generator=generator),
        prompt_mask=prompt_mask,
        completion_ids=torch.randint(1, len(WORDS), (BATCH, LENGTH), generator=generator),
        completion_mask=mask,
        advantages=advantages if by_token else advantages[:, 0],
        # Of the whole generation batch, hence more than here.
        num_items_in_batch=torch.tensor(31),
    )
    log_prob = scores(trainer, made, entropy=False)[0].detach()
    old, ref = 0.4 * torch.randn(2, BATCH, LENGTH, generator=generator)
    made["ref_per_token_logps"] = log_prob + ref
    if with_old:
        made["old_per_token_logps"] = log_prob + old
    if with_tools:
        made["tool_mask"] = tools
    return made


def scores(
    trainer: Any, inputs: dict[str, Tensor], *, entropy: bool = True
) -> tuple[Tensor, Tensor | None]:
    """log_prob and entropy, [B, T] each."""
    log_prob, entropies, aux_loss = trainer._get_per_token_logps_and_entropies(
        trainer.model,
        torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
        LENGTH,
        compute_entropy=entropy,
        batch_size=3,  # and a remainder
    )
    assert aux_loss is None
    return log_prob, entropies


def loss_and_gradients(trainer: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, dict(inputs))
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in trainer.model.parameters()]


def assert_same(trainers: tuple[Any, Any], inputs: dict[str, Tensor]) -> None:
    (expected, expected_grads), (loss, grads) = (
        loss_and_gradients(trainer, inputs) for trainer in trainers
    )
    # Both in float32, in another order: a gradient adds up those of all tokens, of either sign.
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    largest = max(float(grad.abs().max()) for grad in expected_grads)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-5 * largest)


# ---- as GRPOTrainer


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_ppo_clip_is_grpo_trainer(folder: Path, loss_type: str, beta: float) -> None:
    trainers = pair(folder, loss_type=loss_type, beta=beta, epsilon_high=0.4)
    generator = torch.Generator().manual_seed(1)
    for by_token, with_old, with_tools in itertools.product([False, True], repeat=3):
        inputs = micro_batch(
            generator, trainers[0], by_token=by_token, with_old=with_old, with_tools=with_tools
        )
        assert_same(trainers, inputs)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradient_accumulation(folder: Path, loss_type: str) -> None:
    trainers = pair(
        folder,
        loss_type=loss_type,
        beta=0.1,
        gradient_accumulation_steps=3,
        steps_per_generation=6,
    )
    assert_same(trainers, micro_batch(torch.Generator().manual_seed(2), trainers[0]))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_evaluation(folder: Path, loss_type: str) -> None:
    trainers = pair(
        folder, loss_type=loss_type, gradient_accumulation_steps=2, steps_per_generation=4
    )
    for trainer in trainers:
        trainer.model.eval()
    assert_same(trainers, micro_batch(torch.Generator().manual_seed(3), trainers[0]))


@pytest.mark.parametrize(
    "settings",
    [
        dict(delta=1.5),
        dict(beta=0.2, use_bias_correction_kl=False),
        dict(off_policy_mask_threshold=0.01, beta=0.2),
        dict(top_entropy_quantile=0.5, entropy_coef=0.05),
        dict(entropy_coef=0.05, gradient_accumulation_steps=2, steps_per_generation=4),
        dict(use_adaptive_entropy=True, entropy_target=0.1, entropy_coef=0.02),
        dict(use_adaptive_entropy=True, entropy_target=5.0, entropy_coef=0.02),
    ],
    ids=lambda settings: ",".join(settings),
)
def test_what_else_trl_adds(folder: Path, settings: dict[str, Any]) -> None:
    trainers = pair(folder, **settings)
    generator = torch.Generator().manual_seed(4)
    for _ in range(3):  # the entropy controller moves from one to the next
        assert_same(trainers, micro_batch(generator, trainers[0]))
    plain, ours = trainers
    assert ours.entropy_coef == plain.entropy_coef


def test_trl_metrics_are_kept(folder: Path) -> None:
    trainers = pair(folder, beta=0.2, entropy_coef=0.01)
    inputs = micro_batch(
        torch.Generator().manual_seed(5), trainers[0], by_token=True, with_empty=False
    )
    assert_same(trainers, inputs)
    plain, ours = (trainer._metrics["train"] for trainer in trainers)
    assert {"entropy", "kl", "policy_loss", "clip_ratio/low_mean"} < set(plain)
    for name in plain:
        assert ours[name] == pytest.approx(plain[name], rel=1e-5), name
    assert plain["clip_ratio/low_mean"][0] > 0
    assert plain["clip_ratio/high_mean"][0] > 0
    assert all(name.startswith("actor/") for name in set(ours) - set(plain))


def test_training_is_grpo_trainer(folder: Path) -> None:
    weights = []
    for trainer in pair(
        folder,
        beta=0.1,
        gradient_accumulation_steps=2,
        steps_per_generation=4,
        num_iterations=2,
        max_steps=3,
        optim="sgd",
    ):
        transformers.set_seed(3)
        trainer.train()
        assert trainer.state.global_step == 3
        weights.append([parameter.detach() for parameter in trainer.model.parameters()])
    for theirs, ours in zip(*weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# ---- scores


def test_scores_and_their_gradients(folder: Path) -> None:
    trainers = pair(folder)
    inputs = micro_batch(torch.Generator().manual_seed(6), trainers[0])
    found = []
    for trainer in trainers:
        log_prob, entropy = scores(trainer, inputs)
        assert entropy is not None
        weights = torch.linspace(-1, 1, log_prob.numel()).view_as(log_prob)
        (weights * log_prob + weights.square() * entropy).sum().backward()
        gradients = [parameter.grad for parameter in trainer.model.parameters()]
        found.append((log_prob.detach(), entropy.detach(), gradients))
    (log_prob, entropy, gradients), ours = found
    assert trainer.scored_by == "powerkernels"
    # log_prob may be near 0, and has the rounding of logits that are not.
    torch.testing.assert_close(ours[0], log_prob, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1], entropy, rtol=1e-5, atol=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    torch.testing.assert_close(ours[2], gradients, rtol=1e-4, atol=1e-5 * largest)
    assert scores(trainer, inputs, entropy=False)[1] is None


def test_scores_without_fusion(folder: Path) -> None:
    plain = trainer_of(folder, GRPOTrainer, config(folder, GRPOConfig))
    inputs = micro_batch(torch.Generator().manual_seed(7), plain)
    ours = trainer_of(folder, CovGRPOTrainer, config(folder, fused_scores=False))
    assert ours.scored_by == "trl: fused_scores is False"
    torch.testing.assert_close(scores(ours, inputs), scores(plain, inputs), rtol=0, atol=0)


def test_softcapped_head_with_bias(folder: Path) -> None:
    found = []
    for trainer in pair(folder):
        # Llama has neither: the head is given both, and TRL's forward is made anew to see them.
        model = transformers.LlamaForCausalLM.from_pretrained(folder)
        model.config.final_logit_softcapping = 2.0
        torch.manual_seed(0)
        model.lm_head.bias = torch.nn.Parameter(torch.randn(len(WORDS)))
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(model, trainer.temperature, outputs=("log_probs", "entropy"))
        trainer.model = model
        if isinstance(trainer, CovGRPOTrainer):
            assert trainer._fuse_heads() == "powerkernels"
        found.append(scores(trainer, micro_batch(torch.Generator().manual_seed(8), trainer)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_bfloat16_autocast(folder: Path) -> None:
    found = []
    for trainer in pair(folder, bf16=True):
        inputs = micro_batch(torch.Generator().manual_seed(9), trainer)
        with trainer.accelerator.autocast():
            log_prob, entropy = scores(trainer, inputs)
        log_prob.sum().backward()
        assert all(parameter.grad is not None for parameter in trainer.model.parameters())
        found.append((log_prob.detach(), entropy))
    assert found[1][0].dtype == torch.float32
    torch.testing.assert_close(found[1], found[0], rtol=2e-2, atol=2e-2)


def test_models_that_are_not_fused(folder: Path) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    assert why_not_fused(model) is None
    model.config.logit_scale = 0.5
    assert why_not_fused(model) == "its logits are scaled (logit_scale)"
    model.config.logit_scale = 1.0
    model.lm_head = torch.nn.Sequential(model.lm_head)
    assert why_not_fused(model) == "its LM head is Sequential, not a plain nn.Linear"
    assert why_not_fused(model.model) == "its LM head is NoneType, not a plain nn.Linear"


# ---- the covariance losses


def by_hand(trainer: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Float64 of the counted tokens: covariance, log-ratio, ratio, advantage, each [N]."""
    log_prob, _ = scores(trainer, inputs)
    counted = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
    log_prob, old = log_prob.detach()[counted].double(), inputs["old_per_token_logps"][counted]
    advantages = inputs["advantages"].unsqueeze(1).expand(BATCH, LENGTH)[counted].double()
    covariance = (advantages - advantages.mean()) * (log_prob - log_prob.mean())
    log_ratio = log_prob - old.double()
    return covariance, log_ratio, log_ratio.exp(), advantages


def test_kl_cov_by_hand(folder: Path) -> None:
    trainer = trainer_of(
        folder,
        CovGRPOTrainer,
        config(folder, policy_loss="kl_cov", kl_cov_ratio=0.3, ppo_kl_coef=0.7, loss_type="bnpo"),
    )
    inputs = micro_batch(torch.Generator().manual_seed(10), trainer)
    covariance, log_ratio, ratio, advantages = by_hand(trainer, inputs)
    losses = -advantages * ratio
    top = covariance.topk(int(0.3 * len(covariance))).indices
    losses[top] += 0.7 * log_ratio[top].abs()
    loss, gradients = loss_and_gradients(trainer, inputs)
    assert float(loss) == pytest.approx(float(losses.mean()), rel=1e-5)
    assert any(gradient.any() for gradient in gradients)


def test_clip_cov_by_hand(folder: Path) -> None:
    # A share of 1 leaves nothing to chance: the whole band is selected.
    trainer = trainer_of(
        folder,
        CovGRPOTrainer,
        config(
            folder,
            policy_loss="clip_cov",
            clip_cov_ratio=1.0,
            clip_cov_lb=0.05,
            clip_cov_ub=2.0,
            loss_type="bnpo",
        ),
    )
    inputs = micro_batch(torch.Generator().manual_seed(11), trainer)
    covariance, _, ratio, advantages = by_hand(trainer, inputs)
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    is_clipped = -advantages * ratio.clamp(0.8, 1.2) > -advantages * ratio
    in_band = (covariance > 0.05) & (covariance < 2.0) & ~is_clipped
    assert 0 < in_band.sum() < len(in_band)
    losses[in_band] = 0.0
    loss, _ = loss_and_gradients(trainer, inputs)
    assert float(loss) == pytest.approx(float(losses.mean()), rel=1e-5)


@pytest.mark.parametrize("policy_loss", COV_LOSSES)
def test_selection_of_the_step_is_used(folder: Path, policy_loss: str) -> None:
    args = config(folder, policy_loss=policy_loss, loss_type="bnpo")
    trainer = trainer_of(folder, CovGRPOTrainer, args)
    generator = torch.Generator().manual_seed(13)
    inputs = micro_batch(generator, trainer)
    counted = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
    given = (torch.rand(BATCH, LENGTH, generator=generator) < 0.5) & counted
    _, log_ratio, ratio, advantages = by_hand(trainer, inputs)
    losses = -advantages * ratio
    if policy_loss == "kl_cov":
        losses += given[counted] * log_ratio.abs()
    else:
        losses = torch.maximum(losses, -advantages * ratio.clamp(0.8, 1.2)) * ~given[counted]
    loss, _ = loss_and_gradients(trainer, {**inputs, "cov_selected": given})
    assert float(loss) == pytest.approx(float(losses.mean()), rel=1e-5)
    assert trainer._metrics["train"]["cov/selected_tokens"] == [given.sum()]


def test_clip_cov_seed(folder: Path) -> None:
    trainer = trainer_of(
        folder,
        CovGRPOTrainer,
        config(
            folder,
            policy_loss="clip_cov",
            clip_cov_ratio=0.3,
            clip_cov_lb=-100.0,
            clip_cov_ub=100.0,
        ),
    )
    inputs = micro_batch(torch.Generator().manual_seed(12), trainer)
    del inputs["old_per_token_logps"]

    def loss(step: int) -> float:
        trainer._step = step
        return float(loss_and_gradients(trainer, inputs)[0])

    losses = [loss(step) for step in range(6)]
    assert losses == [loss(step) for step in range(6)]
    assert len(set(losses)) > 1


def test_clip_cov_seed_of_a_step(folder: Path) -> None:
    settings = dict(clip_cov_ratio=0.3, clip_cov_lb=-100.0, clip_cov_ub=100.0)
    args = config(folder, policy_loss="clip_cov", cov_scope="step", **settings)
    trainer = trainer_of(folder, CovGRPOTrainer, args)
    trainer._buffered_inputs = [micro_batch(torch.Generator().manual_seed(14), trainer)]

    def selected(step: int) -> list[Any]:
        trainer._step = step
        (mask,) = trainer._select_for_step()
        return mask.flatten().tolist()

    masks = [selected(step) for step in range(4)]
    assert masks == [selected(step) for step in range(4)]
    assert any(mask != masks[0] for mask in masks)


COV_SETTINGS: dict[str, dict[str, Any]] = {
    "ppo_clip": {},
    "clip_cov": dict(clip_cov_ratio=0.25, clip_cov_lb=0.01, clip_cov_ub=100.0),
    "kl_cov": dict(kl_cov_ratio=0.25),
}


@pytest.mark.parametrize("scope", ["micro_batch", "step"])
@pytest.mark.parametrize("policy_loss", list(COV_SETTINGS))
def test_training(folder: Path, policy_loss: str, scope: str) -> None:
    args = config(
        folder,
        policy_loss=policy_loss,
        cov_scope=scope,
        cov_metrics=True,
        gradient_accumulation_steps=2,
        max_steps=2,
        **COV_SETTINGS[policy_loss],
    )
    trainer = trainer_of(folder, CovGRPOTrainer, args)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train()
    after = list(trainer.model.parameters())
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for entry in logs:
        names = [name for name in entry if name.startswith(("cov/", "actor/"))]
        assert {"cov/covariance", "cov/top_0.02", "actor/ppo_kl"} <= set(names)
        for name in [*names, "loss", "grad_norm", "entropy", "clip_ratio/region_mean"]:
            assert type(entry[name]) is float, name
            assert math.isfinite(entry[name]), name
    if policy_loss != "ppo_clip":
        assert max(entry["cov/selected_frac"] for entry in logs) > 0


# ---- selection over an optimiser step


@pytest.mark.parametrize(("num_iterations", "steps_per_generation"), [(1, 2), (2, 2), (1, 4)])
def test_step_selects_over_all_micro_batches(
    folder: Path, num_iterations: int, steps_per_generation: int
) -> None:
    """The top quarter of the step's tokens, however they lie in its micro-batches."""
    args = config(
        folder,
        policy_loss="kl_cov",
        kl_cov_ratio=0.25,
        cov_scope="step",
        gradient_accumulation_steps=2,
        num_iterations=num_iterations,
        steps_per_generation=steps_per_generation,
        max_steps=3,
        logging_steps=10,
        loss_type="bnpo",
    )
    trainer = trainer_of(folder, CovGRPOTrainer, args)
    seen: list[dict[str, Tensor]] = []
    compute_loss = trainer._compute_loss

    def spy(model: Any, inputs: dict[str, Tensor]) -> Tensor:
        if "old_per_token_logps" in inputs:
            log_prob = inputs["old_per_token_logps"]
        else:
            with torch.no_grad():
                log_prob = trainer._current_log_prob(inputs)
        seen.append({**inputs, "log_prob": log_prob})
        return compute_loss(model, inputs)

    trainer._compute_loss = spy
    trainer.train()
    assert len(seen) == 6
    is_on_policy = num_iterations * steps_per_generation == 2
    assert ("old_per_token_logps" in seen[0]) != is_on_policy
    for step in range(3):
        batches = seen[2 * step : 2 * step + 2]
        parts = []
        for batch in batches:
            counted = batch["completion_mask"].bool()
            assert not (batch["cov_selected"] & ~counted).any()
            advantages = batch["advantages"].unsqueeze(1).expand_as(counted)
            parts.append(
                torch.stack(
                    [
                        batch["log_prob"][counted].double(),
                        advantages[counted].double(),
                        batch["cov_selected"][counted].double(),
                    ]
                )
            )
        log_prob, advantages, selected = torch.cat(parts, dim=1)
        covariance = (log_prob - log_prob.mean()) * (advantages - advantages.mean())
        count = int(0.25 * len(covariance))
        assert selected.sum() == count
        chosen = covariance[selected.bool()]
        rest = covariance[~selected.bool()]
        assert chosen.min() >= rest.max() - 1e-6


@pytest.mark.parametrize("policy_loss", COV_LOSSES)
def test_evaluation_of_scope_step(folder: Path, policy_loss: str) -> None:
    """An evaluation has no optimiser step: each of its batches selects among its own tokens."""
    settings = COV_SETTINGS[policy_loss]
    args = config(folder, policy_loss=policy_loss, cov_scope="step", **settings)
    trainer = trainer_of(folder, CovGRPOTrainer, args)
    found = trainer.evaluate(datasets.Dataset.from_dict({"prompt": ["one two", "three"]}))
    assert math.isfinite(found["eval_loss"])
    logged = trainer.state.log_history[-1]
    assert 0 < logged["eval_cov/selected_frac"] < 0.3
    assert math.isfinite(logged["eval_cov/covariance"])


# ---- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(policy_loss="ppo"), r"policy_loss must be one of .*'kl_cov'.*, got 'ppo'"),
        (dict(cov_scope="batch"), r"cov_scope must be one of .*, got 'batch'"),
        (dict(loss_type="cispo"), r"loss_type must be one of .*'dapo'.*, got 'cispo'"),
        (dict(loss_type="luspo"), r"loss_type must be one of .*, got 'luspo'"),
        (dict(importance_sampling_level="sequence"), r"importance_sampling_level must be 'token'"),
        (dict(clip_cov_ratio=1.5), r"clip_cov_ratio must be in \(0, 1\], got 1.5"),
        (dict(kl_cov_ratio=0.0), r"kl_cov_ratio must be in \(0, 1\], got 0.0"),
        (dict(kl_cov_ratio=math.nan), r"kl_cov_ratio must be in \(0, 1\], got nan"),
        (dict(clip_cov_lb=5.0), r"clip_cov_lb must be below clip_cov_ub, got 5.0 and 5.0"),
        (dict(ppo_kl_coef=-1.0), r"ppo_kl_coef must be >= 0, got -1.0"),
        (dict(cov_seed=-1), r"cov_seed must be >= 0, got -1"),
        (dict(policy_loss="kl_cov", delta=2.0), r"delta belongs to policy_loss='ppo_clip'"),
        (dict(delta=1.1), r"delta must exceed 1 \+ epsilon_high = 1.2, got 1.1"),
        (
            dict(cov_scope="step", gradient_accumulation_steps=2, steps_per_generation=3),
            r"gradient_accumulation_steps \(2\) must divide steps_per_generation \(3\)",
        ),
    ],
)
def test_bad_settings(folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(folder, **settings)


def test_settings_of_trl_alone(folder: Path) -> None:
    with pytest.raises(TypeError, match="args must be a CovGRPOConfig, got GRPOConfig"):
        trainer_of(folder, CovGRPOTrainer, config(folder, GRPOConfig))


def test_defaults_are_the_papers() -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(CovGRPOConfig)}
    assert defaults["clip_cov_ratio"] == defaults["kl_cov_ratio"] == 2e-4
    assert (defaults["clip_cov_lb"], defaults["clip_cov_ub"]) == (1.0, 5.0)
    assert defaults["ppo_kl_coef"] == 1.0


def test_without_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "powerkernels.integrations.trl"
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ModuleNotFoundError, match=r"trl is not installed.*pip install 'trl>=1.16'"):
        __import__(name)
