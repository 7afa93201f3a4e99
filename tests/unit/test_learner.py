import json
import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from past_ray.config.rl import RLConfig
from past_ray.config.sft import LoraConfig
from past_ray.engine.adapter import merge_adapter
from past_ray.engine.learner import GRPOLearner
from past_ray.errors import ConfigError, DataError, PastRayError, StorageError
from past_ray.rl.advantages import group_advantages
from past_ray.rl.batching import count_loss_tokens
from past_ray.rl.types import TrainSample
from tests.tiny_model import make_tiny_model

LORA = LoraConfig(rank=4, alpha=8)
SHAPES = ((9, 3), (5, 1), (12, 6), (7, 2), (3, 2))
"""Tokens and sampled tokens of each sample."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("learner") / "model")


@pytest.fixture(scope="module")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("learner") / "other", seed=1)


def make_learner(checkpoint: Path, *, resume_from: Path | None = None, **settings) -> GRPOLearner:
    reference = settings.pop("reference", None)
    config = RLConfig(**{"kl_coefficient": 0.0, "max_grad_norm": 1e9, **settings})
    learner = GRPOLearner(config, device="cpu")
    learner.load(checkpoint, reference=reference, resume_from=resume_from)
    return learner


def make_samples(seed: int = 0) -> list[TrainSample]:
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for length, num_sampled in SHAPES:
        mask = [index >= length - num_sampled for index in range(length)]
        advantage = torch.randn((), generator=generator).item()
        samples.append(
            TrainSample(
                token_ids=torch.randint(6, 60, (length,), generator=generator).tolist(),
                loss_mask=mask,
                generator_logprobs=[0.0] * length,
                advantages=[advantage if trains else 0.0 for trains in mask],
            )
        )
    return samples


def on_policy(learner: GRPOLearner, samples: list[TrainSample]) -> list[TrainSample]:
    """Give the samples the log-probabilities of the learner's own weights."""
    return [
        TrainSample(
            token_ids=sample.token_ids,
            loss_mask=sample.loss_mask,
            generator_logprobs=[
                value if trains else 0.0
                for value, trains in zip(row, sample.loss_mask, strict=True)
            ],
            advantages=sample.advantages,
        )
        for sample, row in zip(samples, learner.token_logprobs(samples), strict=True)
    ]


def step(learner: GRPOLearner, samples: list[TrainSample]) -> dict[str, float]:
    return learner.train_step(samples, num_loss_tokens=count_loss_tokens(samples))


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


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], *, atol: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, atol=atol, rtol=0, msg=lambda m, name=name: f"{name} {m}"
        )


def global_norm(gradient: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(part.square().sum()) for part in gradient.values()))


def plain_logprobs(folder: Path, sample: TrainSample, temperature: float) -> Tensor:
    """Score one sample without padding, batches or any code of ours."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([sample.token_ids])
    with torch.no_grad():
        table = torch.log_softmax(model(ids).logits[0] / temperature, dim=-1)
    return torch.tensor([0.0] + [table[t - 1, ids[0, t]].item() for t in range(1, ids.shape[1])])


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
    masked = TrainSample(
        token_ids=sample.token_ids,
        loss_mask=[False] * len(sample.token_ids),
        generator_logprobs=[math.nan] * len(sample.token_ids),
        advantages=sample.advantages,
    )
    assert learner.logprob_gap([masked]) == 0.0


def test_gradient_is_that_of_policy_loss_plus_weighted_penalty(
    checkpoint: Path, other_checkpoint: Path
):
    learner = make_learner(
        checkpoint, reference=other_checkpoint, kl_coefficient=0.5, max_tokens_per_micro_batch=24
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
    (total / count_loss_tokens(samples)).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same(gradients(learner, samples), expected, atol=1e-6 * global_norm(expected))


def test_micro_batch_budget_does_not_change_the_gradient(checkpoint: Path):
    samples = on_policy(make_learner(checkpoint), make_samples())
    whole = gradients(make_learner(checkpoint, max_tokens_per_micro_batch=10_000), samples)
    norm = global_norm(whole)
    for max_tokens in (1, 20, 40):
        learner = make_learner(checkpoint, max_tokens_per_micro_batch=max_tokens)
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
    learner = make_learner(checkpoint, learning_rate=1e-3, clip_high=10.0, clip_low=0.99)
    samples = on_policy(learner, make_samples())
    losses = [step(learner, samples)["policy_loss"] for _ in range(4)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.1


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
        checkpoint, reference=other_checkpoint, kl_coefficient=1.0, learning_rate=1e-3
    )
    samples = [
        TrainSample(
            token_ids=sample.token_ids,
            loss_mask=sample.loss_mask,
            generator_logprobs=sample.generator_logprobs,
            advantages=[0.0] * len(sample.token_ids),
        )
        for sample in on_policy(learner, make_samples())
    ]
    divergences = [step(learner, samples)["ref_kl"] for _ in range(5)]
    assert divergences[-1] < 0.8 * divergences[0]


def test_policy_that_is_its_reference_has_no_penalty_gradient(checkpoint: Path):
    learner = make_learner(checkpoint, reference=checkpoint, kl_coefficient=1.0)
    samples = on_policy(learner, make_samples())
    with_penalty = gradients(learner, samples)
    assert with_penalty
    assert_same(with_penalty, gradients(make_learner(checkpoint), samples), atol=1e-6)


def test_gradient_is_clipped_to_the_global_norm(checkpoint: Path):
    learner = make_learner(checkpoint, max_grad_norm=0.01)
    samples = on_policy(learner, make_samples())
    seen = gradients(learner, samples)
    assert global_norm(seen) == pytest.approx(0.01, rel=1e-3)


def test_masters_are_fp32_under_bf16_so_that_small_steps_are_not_rounded_away(checkpoint: Path):
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
    assert learner.train_step([], num_loss_tokens=0) == {"num_loss_tokens": 0.0}
    assert learner.policy_version == 2
    assert_same(learner.export_weights(), before, atol=0)


def test_exported_weights_do_not_change_with_further_training(checkpoint: Path):
    learner = make_learner(checkpoint)
    exported = learner.export_weights()
    copies = {name: value.clone() for name, value in exported.items()}
    step(learner, on_policy(learner, make_samples()))
    assert_same(exported, copies, atol=0)


def test_tied_head_is_exported_once(tmp_path: Path):
    tied = make_tiny_model(tmp_path / "tied", tie_word_embeddings=True)
    weights = make_learner(tied).export_weights()
    assert "model.embed_tokens.weight" in weights
    assert "lm_head.weight" not in weights


@pytest.mark.parametrize("lora", [None, LORA])
def test_resumed_run_continues_bit_for_bit(
    checkpoint: Path, tmp_path: Path, lora: LoraConfig | None
):
    settings = {"lora": lora, "weight_decay": 0.01, "learning_rate": 1e-3}
    learner = make_learner(checkpoint, **settings)
    batches = [on_policy(learner, make_samples(seed)) for seed in range(4)]
    for batch in batches[:2]:
        step(learner, batch)
    learner.save(tmp_path / "saved")
    uninterrupted = [step(learner, batch) for batch in batches[2:]]

    resumed = make_learner(checkpoint, resume_from=tmp_path / "saved", **settings)
    assert resumed.policy_version == 2
    assert [step(resumed, batch) for batch in batches[2:]] == uninterrupted
    assert_same(resumed.export_weights(), learner.export_weights(), atol=0)
    assert resumed.policy_version == learner.policy_version == 4


@pytest.mark.parametrize("lora", [None, LORA])
def test_saved_folder_is_a_plain_checkpoint_of_the_policy(
    checkpoint: Path, tmp_path: Path, lora: LoraConfig | None
):
    learner = make_learner(checkpoint, lora=lora, learning_rate=1e-2)
    samples = on_policy(learner, make_samples())
    step(learner, samples)
    learner.save(tmp_path / "saved")
    row = torch.tensor(learner.token_logprobs(samples)[2])
    expected = plain_logprobs(tmp_path / "saved", samples[2], 1.0)
    assert (row - torch.tensor(samples[2].generator_logprobs))[-6:].abs().max() > 1e-3
    torch.testing.assert_close(row, expected, atol=5e-5, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer.decode([tokenizer.convert_tokens_to_ids("anna")]) == "anna"


def test_save_replaces_an_older_checkpoint(checkpoint: Path, tmp_path: Path):
    learner = make_learner(checkpoint)
    learner.save(tmp_path / "saved")
    step(learner, on_policy(learner, make_samples()))
    learner.save(tmp_path / "saved")
    assert make_learner(checkpoint, resume_from=tmp_path / "saved").policy_version == 1


def test_adapter_changes_its_target_modules_and_nothing_else(checkpoint: Path):
    learner = make_learner(checkpoint, lora=LORA, learning_rate=1e-2)
    before = make_learner(checkpoint).export_weights()
    step(learner, on_policy(learner, make_samples()))
    after = learner.export_weights()
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    targets = {f"{name}.weight" for name in LORA.target_modules}
    assert {".".join(name.split(".")[-2:]) for name in changed} == targets
    assert len(changed) == 2 * len(targets)


def test_fresh_adapter_exports_the_checkpoint_itself(checkpoint: Path):
    exported = make_learner(checkpoint, lora=LORA).export_weights()
    assert_same(exported, make_learner(checkpoint).export_weights(), atol=0)


def test_merging_adds_scaled_product_of_the_factors():
    state = {
        "base_model.model.q_proj.base_layer.weight": torch.tensor([[1.0, 2.0]]),
        "base_model.model.q_proj.base_layer.bias": torch.tensor([5.0]),
        "base_model.model.q_proj.lora_A.default.weight": torch.tensor([[1.0, -1.0], [0.0, 2.0]]),
        "base_model.model.q_proj.lora_B.default.weight": torch.tensor([[3.0, 4.0]]),
        "base_model.model.norm.weight": torch.tensor([7.0]),
    }
    merged = merge_adapter(state, scaling=0.5)
    # B A = [3, -3 + 8] = [3, 5].
    assert {name: value.tolist() for name, value in merged.items()} == {
        "q_proj.weight": [[2.5, 4.5]],
        "q_proj.bias": [5.0],
        "norm.weight": [7.0],
    }


def test_loading_again_starts_over(checkpoint: Path, other_checkpoint: Path):
    learner = make_learner(checkpoint)
    step(learner, on_policy(learner, make_samples()))
    assert learner.load(other_checkpoint, reference=None, resume_from=None) == 0
    assert_same(learner.export_weights(), make_learner(other_checkpoint).export_weights(), atol=0)


def test_wrong_count_of_loss_tokens_is_refused(checkpoint: Path):
    learner = make_learner(checkpoint)
    with pytest.raises(DataError, match="got 13 for 14 tokens"):
        learner.train_step(make_samples(), num_loss_tokens=13)
    assert learner.policy_version == 0


def test_nan_from_the_generator_leaves_the_weights_alone(checkpoint: Path):
    learner = make_learner(checkpoint)
    before = learner.export_weights()
    sample = make_samples()[0]
    broken = TrainSample(
        token_ids=sample.token_ids,
        loss_mask=sample.loss_mask,
        generator_logprobs=[math.nan] * len(sample.token_ids),
        advantages=sample.advantages,
    )
    with pytest.raises(PastRayError, match="loss and gradient must be finite, got loss nan"):
        step(learner, [broken])
    assert_same(learner.export_weights(), before, atol=0)
    assert learner.policy_version == 0


def test_penalty_without_reference_is_refused(checkpoint: Path):
    with pytest.raises(ConfigError, match=r"rl\.kl_coefficient"):
        make_learner(checkpoint, kl_coefficient=0.1)


def test_adapter_dropout_is_refused(checkpoint: Path):
    with pytest.raises(ValueError, match=r"lora\.dropout must be 0 in RL"):
        make_learner(checkpoint, lora=LoraConfig(dropout=0.1))


def test_k1_warns_that_it_does_nothing(checkpoint: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        GRPOLearner(RLConfig(kl_coefficient=0.1, kl_estimator="k1"), device="cpu")
    assert "rl.kl_estimator=k1" in caplog.text


def test_folder_without_a_model_is_named(tmp_path: Path):
    with pytest.raises(StorageError, match=str(tmp_path)):
        make_learner(tmp_path)


def test_full_checkpoint_cannot_continue_an_adapter_run(checkpoint: Path, tmp_path: Path):
    make_learner(checkpoint).save(tmp_path / "saved")
    with pytest.raises(StorageError, match=r"adapter\.pt"):
        make_learner(checkpoint, lora=LORA, resume_from=tmp_path / "saved")
