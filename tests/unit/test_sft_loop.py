import json

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from past_ray.config.sft import LoraConfig, SFTConfig
from past_ray.engine.sft_loop import SFTLearner, split_into_micro_batches
from past_ray.errors import ConfigError
from past_ray.sft.examples import SFTExample
from past_ray.skill.checkpoint import load_weights
from tests.tiny_model import make_tiny_model

BATCH = [
    SFTExample(token_ids=tuple(range(3, 3 + length)), num_prompt_tokens=prompt)
    for length, prompt in ((6, 0), (9, 4), (3, 1), (12, 0), (9, 8))
]
NUM_LOSS_TOKENS = 5 + 5 + 2 + 11 + 1
LORA = LoraConfig(rank=2, alpha=4)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model", tie_word_embeddings=True)


def learner(folder, **changes):
    sft = SFTConfig(**{"num_steps": 8, "learning_rate": 1e-3, "warmup_frac": 0.0} | changes)
    return SFTLearner(folder, sft, seed=3, device="cpu")


def export(run, folder):
    run.export(folder)
    return load_weights(folder)


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), max_size=12), st.integers(1, 60))
def test_micro_batches_hold_every_example_once_within_the_budget(lengths, max_tokens):
    examples = [SFTExample(token_ids=(1,) * n, num_prompt_tokens=0) for n in lengths]
    groups = split_into_micro_batches(examples, max_tokens=max_tokens)
    assert sorted(len(e.token_ids) for group in groups for e in group) == sorted(lengths)
    for group in groups:
        padded = len(group) * max(len(example.token_ids) for example in group)
        assert padded <= max_tokens or len(group) == 1


def test_the_loss_is_the_mean_over_loss_tokens_of_documents_scored_alone(tiny_folder):
    record = learner(tiny_folder).train_step(BATCH)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    total = 0.0
    for example in BATCH:
        ids = torch.tensor([example.token_ids])
        logprobs = model(ids).logits.log_softmax(-1)[0]
        for position in range(max(1, example.num_prompt_tokens), ids.shape[1]):
            total -= logprobs[position - 1, ids[0, position]].item()
    assert record.tokens == NUM_LOSS_TOKENS
    assert record.loss == pytest.approx(total / NUM_LOSS_TOKENS, rel=1e-5)


def test_the_token_budget_changes_neither_losses_nor_weights(tiny_folder, tmp_path):
    runs = [learner(tiny_folder, max_tokens_per_micro_batch=budget) for budget in (10_000, 20, 1)]
    losses = [[run.train_step(BATCH).loss for _ in range(3)] for run in runs]
    weights = [export(run, tmp_path / str(index)) for index, run in enumerate(runs)]
    for other_losses, other_weights in zip(losses[1:], weights[1:], strict=True):
        assert other_losses == pytest.approx(losses[0], rel=1e-5)
        # Adam divides a gradient by its own size, which magnifies rounding: hence 1e-4.
        torch.testing.assert_close(other_weights, weights[0], rtol=1e-4, atol=1e-4)


def test_training_lowers_the_loss_and_follows_the_schedule(tiny_folder):
    run = learner(tiny_folder)
    records = [run.train_step(BATCH) for _ in range(8)]
    assert records[-1].loss < 0.8 * records[0].loss
    assert records[0].lr == 1e-3
    assert records[4].lr == pytest.approx(0.5e-3)


@pytest.mark.parametrize("lora", [None, LORA.model_copy(update={"dropout": 0.3})])
def test_resuming_equals_no_interruption_bit_for_bit(tiny_folder, tmp_path, lora):
    whole = learner(tiny_folder, lora=lora)
    for _ in range(5):
        whole.train_step(BATCH)
    first = learner(tiny_folder, lora=lora)
    for _ in range(2):
        first.train_step(BATCH)
    first.save(tmp_path)
    second = learner(tiny_folder, lora=lora)
    second.load(tmp_path)
    assert second.next_step == 2
    for _ in range(3):
        second.train_step(BATCH)
    assert [r.loss for r in second.records] == [r.loss for r in whole.records]
    weights, expected = export(second, tmp_path / "a"), export(whole, tmp_path / "b")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_an_adapter_checkpoint_holds_no_frozen_weights(tiny_folder, tmp_path):
    run = learner(tiny_folder, lora=LORA)
    run.train_step(BATCH)
    run.save(tmp_path)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert len(state["weights"]) == 2 * 2 * 2  # layers * (q, v) * (A, B)
    assert all("lora_" in name for name in state["weights"])


def test_a_lora_run_changes_only_its_targets_and_saves_its_adapter(tiny_folder, tmp_path):
    run = learner(tiny_folder, lora=LORA, learning_rate=1e-2)
    for _ in range(3):
        run.train_step(BATCH)
    merged, before = export(run, tmp_path / "out"), load_weights(tiny_folder)
    changed = {name for name in before if not torch.equal(before[name], merged[name])}
    assert set(merged) == set(before)
    assert changed == {
        f"model.layers.{layer}.self_attn.{module}.weight"
        for layer in (0, 1)
        for module in ("q_proj", "v_proj")
    }
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with_adapter = peft.PeftModel.from_pretrained(base, tmp_path / "out-adapter")
    ids = torch.tensor([BATCH[3].token_ids])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(with_adapter(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_changes_nothing(tiny_folder):
    plain = learner(tiny_folder).train_step(BATCH)
    recomputed = learner(tiny_folder, gradient_checkpointing=True).train_step(BATCH)
    assert recomputed.loss == pytest.approx(plain.loss, rel=1e-6)
    assert recomputed.grad_norm == pytest.approx(plain.grad_norm, rel=1e-5)


def test_bf16_computes_in_bf16_but_keeps_fp32_masters(tiny_folder, tmp_path):
    exact, rounded = learner(tiny_folder), learner(tiny_folder, precision="bf16")
    losses = [run.train_step(BATCH).loss for run in (exact, rounded)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    weights = export(rounded, tmp_path / "out")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_a_loss_that_is_not_finite_stops_the_run_with_the_setting_to_change(tiny_folder):
    run = learner(tiny_folder)
    with torch.no_grad():
        next(run._model.parameters()).fill_(float("nan"))
    with pytest.raises(ConfigError, match="learning_rate"):
        run.train_step(BATCH)
