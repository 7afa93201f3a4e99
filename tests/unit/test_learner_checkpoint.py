"""Weights that the GRPO learner exports, saves and loads again, adapters merged."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model_state_dict
from transformers import AutoTokenizer

from past_ray.config.sft import LoraConfig
from past_ray.engine.adapter import merge_adapter
from past_ray.errors import StorageError
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
from tests.tiny_model import make_tiny_model


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


def test_folder_without_a_model_is_named(tmp_path: Path):
    with pytest.raises(StorageError, match=str(tmp_path)):
        make_learner(tmp_path)


def test_full_checkpoint_cannot_continue_an_adapter_run(checkpoint: Path, tmp_path: Path):
    make_learner(checkpoint).save(tmp_path / "saved")
    with pytest.raises(StorageError, match=r"adapter\.pt"):
        make_learner(checkpoint, lora=LORA, resume_from=tmp_path / "saved")


def test_adapter_export_merges_to_the_exported_weights(checkpoint: Path):
    learner = make_learner(checkpoint, lora=LORA, learning_rate=1e-2)
    step(learner, on_policy(learner, make_samples()))
    adapter = learner.export_adapter()
    assert adapter is not None
    assert (adapter.rank, adapter.alpha) == (4, 8)
    assert adapter.target_modules == ("q_proj", "v_proj")
    assert len(adapter.tensors) == 2 * 2 * 2
    weights, base = learner.export_weights(), make_learner(checkpoint).export_weights()
    for layer in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"):
        prefix = f"base_model.model.{layer}"
        up, down = (adapter.tensors[f"{prefix}.lora_{x}.weight"] for x in "BA")
        assert up.abs().max() > 0
        expected = base[f"{layer}.weight"] + 2 * up @ down
        torch.testing.assert_close(weights[f"{layer}.weight"], expected)


def test_adapter_export_has_the_names_of_peft_files(checkpoint: Path):
    learner = make_learner(checkpoint, lora=LORA)
    adapter = learner.export_adapter()
    assert adapter is not None
    assert adapter.tensors.keys() == get_peft_model_state_dict(learner._model).keys()


def test_full_run_has_no_adapter_to_export(checkpoint: Path):
    assert make_learner(checkpoint).export_adapter() is None


def test_random_state_is_that_of_the_moment_of_saving(checkpoint: Path, tmp_path: Path):
    learner = make_learner(checkpoint)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        learner.save(tmp_path / "saved")
        expected = torch.rand(3)
        torch.manual_seed(6)
        make_learner(checkpoint, resume_from=tmp_path / "saved")
        assert torch.equal(torch.rand(3), expected)
