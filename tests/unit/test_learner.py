"""Log-probabilities, gradients and steps of the GRPO learner."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from past_ray.config.sft import LoraConfig
from past_ray.engine.learner import GRPOLearner
from past_ray.errors import ConfigError, DataError, PastRayError
from past_ray.rl.advantages import group_advantages
from past_ray.rl.objective import StepTotals
from past_ray.rl.types import TrainSample
from tests.tiny_learner import (
    LORA,
    assert_same,
    checkpoint_fixture,  # noqa: F401
    make_learner,
    make_samples,
    on_policy,
    other_checkpoint_fixture,  # noqa: F401
    plain_logprobs,
    step,
)

ALGORITHMS = ("grpo", "dr_grpo", "dapo", "gspo", "cispo")


def gradients(learner: GRPOLearner, samples: list[TrainSample]) -> dict[str, Tensor]:
    """Take a step and return the gradients that the optimizer saw."""
    seen: dict[str, Tensor] = {}

    def keep(*_: object) -> None:
        for name, parameter in learner._model.named_parameters():
            if parameter.grad is not None:
                seen[name] = parameter.grad.clone()

    hook = learner._optimizer.register_step_pre_hook(keep)
    step(learner, samples)
    hook.remove()
    return seen


def near_policy(checkpoint: Path) -> list[TrainSample]:
    """Samples of a generator that is a little off, so that ratios are not 1."""
    return on_policy(make_learner(checkpoint, temperature=1.02), make_samples())


def without_advantages(samples: list[TrainSample]) -> list[TrainSample]:
    return [replace(sample, advantages=[0.0] * len(sample.token_ids)) for sample in samples]


def global_norm(gradient: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(part.square().sum()) for part in gradient.values()))


@pytest.mark.parametrize("max_tokens", [1, 24, 10_000])
def test_logprobs_equal_an_unpadded_forward_pass_at_the_same_temperature(
    checkpoint: Path, max_tokens: int
):
    learner = make_learner(checkpoint, temperature=0.7, max_tokens_per_micro_batch=max_tokens)
    samples = make_samples()
    for sample, row in zip(samples, learner.token_logprobs(samples), strict=True):
        expected = plain_logprobs(checkpoint, sample, 0.7)
        torch.testing.assert_close(torch.tensor(row), expected, atol=2e-5, rtol=0)


def test_weights_that_sampled_give_ratio_one(checkpoint: Path):
    learner = make_learner(checkpoint, temperature=0.7, max_tokens_per_micro_batch=24)
    samples = on_policy(learner, make_samples())
    assert learner.logprob_gap(samples) < 1e-5
    metrics = step(learner, samples)
    assert metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["ratio_max"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["generator_kl"] < 1e-8
    assert metrics["clip_frac"] == 0.0


def test_another_temperature_shows_as_a_gap(checkpoint: Path):
    samples = on_policy(make_learner(checkpoint, temperature=0.7), make_samples())
    assert make_learner(checkpoint, temperature=1.0).logprob_gap(samples) > 0.1


def test_gap_ignores_prompt_tokens(checkpoint: Path):
    learner = make_learner(checkpoint)
    sample = make_samples()[0]
    size = len(sample.token_ids)
    masked = replace(sample, loss_mask=[False] * size, generator_logprobs=[math.nan] * size)
    assert learner.logprob_gap([masked]) == 0.0


def test_a_gap_that_is_no_number_does_not_pass_for_none(checkpoint: Path):
    learner = make_learner(checkpoint)
    sample = make_samples()[0]
    broken = replace(sample, generator_logprobs=[math.nan] * len(sample.token_ids))
    assert math.isnan(learner.logprob_gap([broken]))


def test_gradient_is_that_of_policy_loss_plus_weighted_penalty(
    checkpoint: Path, other_checkpoint: Path
):
    learner = make_learner(
        checkpoint,
        reference=other_checkpoint,
        kl={"coefficient": 0.5, "gradient": "plain"},
        max_tokens_per_micro_batch=24,
    )
    samples = on_policy(learner, make_samples())
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    total = torch.zeros(())
    for sample in samples:
        ids = torch.tensor([sample.token_ids])
        table = torch.log_softmax(model(ids).logits[0], dim=-1)
        reference = plain_logprobs(other_checkpoint, sample, 1.0)
        for t, trains in enumerate(sample.loss_mask):
            if trains:
                logprob = table[t - 1, ids[0, t]]
                log_ratio = reference[t] - logprob
                ratio = (logprob - logprob.detach()).exp()
                total = total - ratio * sample.advantages[t]
                total = total + 0.5 * (log_ratio.exp() - 1 - log_ratio)
    (total / 14).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same(gradients(learner, samples), expected, atol=1e-6 * global_norm(expected))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("lora", [None, LORA])
def test_micro_batch_budget_does_not_change_the_gradient(
    checkpoint: Path, algorithm: str, lora: LoraConfig | None
):
    settings = {"algorithm": {"kind": algorithm}, "lora": lora, "entropy_coefficient": 0.1}
    samples = near_policy(checkpoint)
    whole = gradients(make_learner(checkpoint, max_tokens_per_micro_batch=99, **settings), samples)
    norm = global_norm(whole)
    assert norm > 1e-3
    for max_tokens in (1, 20):
        learner = make_learner(checkpoint, max_tokens_per_micro_batch=max_tokens, **settings)
        assert_same(gradients(learner, samples), whole, atol=1e-6 * norm)


def test_gradient_checkpointing_and_model_dropout_do_not_change_the_gradient(
    checkpoint: Path, tmp_path: Path
):
    dropping = tmp_path / "dropping"
    shutil.copytree(checkpoint, dropping)
    config = json.loads((dropping / "config.json").read_text())
    (dropping / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    samples = on_policy(make_learner(checkpoint), make_samples())
    plain = gradients(make_learner(checkpoint), samples)
    learner = make_learner(dropping, gradient_checkpointing=True)
    assert_same(gradients(learner, samples), plain, atol=1e-6 * global_norm(plain))


def test_repeated_steps_on_one_batch_lower_its_loss(checkpoint: Path):
    learner = make_learner(
        checkpoint,
        learning_rate=1e-3,
        algorithm={"kind": "grpo", "clip_high": 10.0, "clip_low": 0.99},
    )
    samples = on_policy(learner, make_samples())
    losses = [step(learner, samples)["policy_loss"] for _ in range(4)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.1


def test_entropy_bonus_alone_raises_the_entropy(checkpoint: Path):
    learner = make_learner(checkpoint, learning_rate=1e-3, entropy_coefficient=1.0)
    samples = without_advantages(on_policy(learner, make_samples()))
    entropies = [step(learner, samples)["entropy"] for _ in range(3)]
    assert entropies == sorted(entropies)
    assert entropies[-1] > entropies[0] + 0.1


def test_reward_of_a_bandit_goes_up(checkpoint: Path):
    """One prompt, one sampled token, reward 1 for an even id."""
    learner = make_learner(checkpoint, learning_rate=3e-3, max_grad_norm=1.0, temperature=5.0)
    vocab_size = len(AutoTokenizer.from_pretrained(checkpoint))
    generator = torch.Generator().manual_seed(0)
    prompt = [8, 9, 10]

    def candidate(token: int, logprob: float, advantage: float) -> TrainSample:
        return TrainSample(
            token_ids=[*prompt, token],
            loss_mask=[False] * 3 + [True],
            generator_logprobs=[0.0] * 3 + [logprob],
            advantages=[0.0] * 3 + [advantage],
        )

    def distribution() -> Tensor:
        rows = learner.token_logprobs([candidate(token, 0.0, 0.0) for token in range(vocab_size)])
        return torch.tensor([row[-1] for row in rows]).exp()

    before = distribution()
    torch.testing.assert_close(before.sum(), torch.tensor(1.0), atol=1e-4, rtol=0)
    for _ in range(12):
        probabilities = distribution()
        tokens = probabilities.multinomial(32, replacement=True, generator=generator)
        advantages = group_advantages((tokens % 2 == 0).float(), scale_by_std=True)
        logprobs = probabilities[tokens].log()
        step(
            learner,
            [
                candidate(*row)
                for row in zip(tokens.tolist(), logprobs.tolist(), advantages.tolist(), strict=True)
            ],
        )
    assert distribution()[::2].sum() > before[::2].sum() + 0.2


def test_penalty_alone_pulls_the_policy_to_the_reference(checkpoint: Path, other_checkpoint: Path):
    learner = make_learner(
        checkpoint, reference=other_checkpoint, kl={"coefficient": 1.0}, learning_rate=1e-3
    )
    samples = without_advantages(on_policy(learner, make_samples()))
    divergences = [step(learner, samples)["ref_kl"] for _ in range(5)]
    assert divergences[-1] < 0.8 * divergences[0]


def test_policy_that_is_its_reference_has_no_penalty_gradient(checkpoint: Path):
    learner = make_learner(checkpoint, reference=checkpoint, kl={"coefficient": 1.0})
    samples = on_policy(learner, make_samples())
    with_penalty = gradients(learner, samples)
    assert with_penalty
    assert_same(with_penalty, gradients(make_learner(checkpoint), samples), atol=1e-6)


def test_gradient_is_clipped_to_the_global_norm(checkpoint: Path):
    learner = make_learner(checkpoint, max_grad_norm=0.01)
    samples = on_policy(learner, make_samples())
    seen = gradients(learner, samples)
    assert global_norm(seen) == pytest.approx(0.01, rel=1e-3)


def test_pitfall_11_masters_are_fp32_under_bf16_so_that_small_steps_are_not_rounded_away(
    checkpoint: Path,
):
    learner = make_learner(checkpoint, precision="bf16", learning_rate=1e-6)
    before = learner.export_weights()
    step(learner, on_policy(learner, make_samples()))
    after = learner.export_weights()
    name = "model.layers.0.mlp.gate_proj.weight"
    assert after[name].dtype == torch.float32
    assert (after[name] != before[name]).float().mean() > 0.9
    assert (after[name].bfloat16() != before[name].bfloat16()).float().mean() < 0.1


def test_step_without_loss_tokens_advances_the_version_only(checkpoint: Path):
    learner = make_learner(checkpoint, weight_decay=0.1)
    step(learner, on_policy(learner, make_samples()))
    before = learner.export_weights()
    nothing = StepTotals(num_loss_tokens=0, num_rollouts=0, rollout_token_limit=8)
    assert learner.train_step([], totals=nothing) == {"num_loss_tokens": 0.0}
    assert learner.policy_version == 2
    assert_same(learner.export_weights(), before, atol=0)


@pytest.mark.parametrize(("tokens", "rollouts"), [(13, 5), (14, 4)])
def test_wrong_totals_are_refused(checkpoint: Path, tokens: int, rollouts: int):
    learner = make_learner(checkpoint)
    totals = StepTotals(num_loss_tokens=tokens, num_rollouts=rollouts, rollout_token_limit=8)
    with pytest.raises(DataError, match=f"got {tokens} for 14 loss tokens and {rollouts} for 5"):
        learner.train_step(make_samples(), totals=totals)
    assert learner.policy_version == 0


def test_nan_from_the_generator_leaves_the_weights_alone(checkpoint: Path):
    learner = make_learner(checkpoint)
    before = learner.export_weights()
    sample = make_samples()[0]
    broken = replace(sample, generator_logprobs=[math.nan] * len(sample.token_ids))
    with pytest.raises(PastRayError, match="loss and gradient must be finite, got loss nan"):
        step(learner, [broken])
    assert_same(learner.export_weights(), before, atol=0)
    assert learner.policy_version == 0


def test_penalty_without_reference_is_refused(checkpoint: Path):
    with pytest.raises(ConfigError, match=r"rl\.kl\.coefficient"):
        make_learner(checkpoint, kl={"coefficient": 0.1})


def test_adapter_dropout_is_refused(checkpoint: Path):
    with pytest.raises(ValueError, match=r"lora\.dropout must be 0 in RL"):
        make_learner(checkpoint, lora=LoraConfig(dropout=0.1))
