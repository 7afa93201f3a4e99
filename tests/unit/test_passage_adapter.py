import json
import math

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from past_ray.config.sft import LoraConfig
from past_ray.config.single_passage import SinglePassageConfig
from past_ray.engine.passage_adapter import (
    PassageTrainer,
    adapter_fingerprint,
    finished_training,
)
from past_ray.errors import ConfigError
from past_ray.sft.examples import SFTExample
from past_ray.skill.checkpoint import hash_weights
from tests.tiny_model import make_tiny_model

LORA = LoraConfig(rank=4, alpha=8)


def examples_of(*lengths, first=3):
    return tuple(
        SFTExample(token_ids=tuple(range(first, first + length)), num_prompt_tokens=0)
        for length in lengths
    )


PASSAGE = examples_of(6, 9, 3, 12)
OTHER = examples_of(5, 7, first=20)
NUM_LOSS_TOKENS = 5 + 8 + 2 + 11


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model", tie_word_embeddings=True)


def settings_of(**changes):
    return SinglePassageConfig(**{"lora": LORA, "num_epochs": 4, "precision": "fp32"} | changes)


def trainer(base, **changes):
    return PassageTrainer(base, settings_of(**changes), base_hash=hash_weights(base), device="cpu")


def factors(folder):
    return load_file(folder / "adapter_model.safetensors")


def are_equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def load(base):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


@pytest.mark.parametrize(
    "changes", [{}, {"batch_size": 3, "precision": "bf16"}, {"lora": {"rank": 4, "dropout": 0.3}}]
)
def test_an_adapter_does_not_depend_on_those_trained_before_it_bit_for_bit(base, tmp_path, changes):
    alone = trainer(base, **changes)
    alone_training = alone.train(PASSAGE, tmp_path / "alone")
    later = trainer(base, **changes)
    later.train(OTHER, tmp_path / "first")
    later.train(PASSAGE[:2], tmp_path / "second")
    torch.randn(3)  # the state of the global generator does not matter either
    later_training = later.train(PASSAGE, tmp_path / "later")
    assert are_equal(factors(tmp_path / "alone"), factors(tmp_path / "later"))
    assert not are_equal(factors(tmp_path / "alone"), factors(tmp_path / "second"))
    assert later_training.loss_first == alone_training.loss_first
    assert later_training.loss_last == alone_training.loss_last


def test_training_leaves_the_global_generator_alone(base, tmp_path):
    run = trainer(base, lora={"rank": 4, "dropout": 0.3})
    torch.manual_seed(1)
    expected = torch.randn(4)
    torch.manual_seed(1)
    run.train(PASSAGE, tmp_path / "out")
    assert torch.equal(torch.randn(4), expected)


def test_steps_on_the_whole_passage_equal_those_of_the_hf_trainer(base, tmp_path):
    """One step per epoch, so that the order of the sequences, which differs, does not matter."""
    run = trainer(base, batch_size=4, learning_rate=1e-2)
    fresh = {name: p.detach().clone() for name, p in run._model.named_parameters()}
    training = run.train(PASSAGE, tmp_path / "out")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]
    )
    model = peft.get_peft_model(load(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(fresh[name])
    reference = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path / "hf"),
            num_train_epochs=4,
            learning_rate=1e-2,
            per_device_train_batch_size=4,
            logging_steps=1,
            logging_strategy="steps",
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=[{"input_ids": list(example.token_ids)} for example in PASSAGE],
        data_collator=masked_collator,
    )
    reference.train()
    losses = [entry["loss"] for entry in reference.state.log_history if "loss" in entry]
    assert training.loss_first == pytest.approx(losses[0], abs=1e-4)  # logged with few digits
    assert training.loss_last == pytest.approx(losses[-1], abs=1e-4)
    model.save_pretrained(tmp_path / "hf")
    ours, theirs = factors(tmp_path / "out"), factors(tmp_path / "hf")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-5)


def masked_collator(rows):
    length = max(len(row["input_ids"]) for row in rows)
    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": torch.tensor([row + [0] * (length - len(row)) for row in ids]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids]),
        "labels": torch.tensor([row + [-100] * (length - len(row)) for row in ids]),
    }


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_the_first_loss_is_the_mean_over_tokens_of_sequences_scored_alone(
    base, tmp_path, batch_size
):
    # With so small a rate the fresh adapter, which changes nothing, stays what it is.
    run = trainer(base, batch_size=batch_size, num_epochs=1, learning_rate=1e-9)
    training = run.train(PASSAGE, tmp_path / "out")
    model, total = load(base), 0.0
    for example in PASSAGE:
        ids = torch.tensor([example.token_ids])
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1)
        total -= logprobs.gather(1, ids[0, 1:, None]).sum().item()
    assert training.loss_first == pytest.approx(total / NUM_LOSS_TOKENS, rel=1e-5)
    assert training.loss_last == training.loss_first
    assert training.num_tokens == NUM_LOSS_TOKENS


def test_the_defaults_learn_a_passage_and_count_its_tokens_in_every_epoch(base, tmp_path):
    config = SinglePassageConfig()
    run = PassageTrainer(base, config, base_hash="", device="cpu")
    training = run.train(PASSAGE, tmp_path / "out")
    assert training.loss_last < 0.6 * training.loss_first
    assert training.num_tokens == 10 * NUM_LOSS_TOKENS
    assert {factor.dtype for factor in factors(tmp_path / "out").values()} == {torch.float32}


def test_bf16_computes_nearly_the_same_adapter(base, tmp_path):
    exact = trainer(base).train(PASSAGE, tmp_path / "fp32")
    rounded = trainer(base, precision="bf16").train(PASSAGE, tmp_path / "bf16")
    assert rounded.loss_first != exact.loss_first
    assert rounded.loss_first == pytest.approx(exact.loss_first, rel=0.02)
    assert rounded.loss_last == pytest.approx(exact.loss_last, rel=0.1)


def test_peft_loads_the_folder_and_computes_what_the_trainer_computes(base, tmp_path):
    run = trainer(base)
    run.train(PASSAGE, tmp_path / "out")
    ids = torch.tensor([PASSAGE[3].token_ids])
    loaded = peft.PeftModel.from_pretrained(load(base), tmp_path / "out")
    with torch.no_grad():
        logits, plain = loaded(ids).logits, load(base)(ids).logits
        torch.testing.assert_close(logits, run._model(ids).logits)
    assert (logits - plain).abs().max() > 0.1


def test_the_base_stays_what_it_was_and_gets_no_gradients(base, tmp_path):
    run = trainer(base)
    run.train(PASSAGE, tmp_path / "out")
    frozen = {n: p for n, p in run._model.named_parameters() if "lora_" not in n}
    before = dict(load(base).named_parameters())
    for name, parameter in frozen.items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert torch.equal(parameter, before[plain])
        assert parameter.grad is None


def test_the_lineage_names_the_base_and_the_settings(base, tmp_path):
    trainer(base).train(PASSAGE, tmp_path / "out")
    lineage = json.loads((tmp_path / "out" / "past_ray.json").read_text())
    assert lineage["operation"] == "passage_adapter"
    assert lineage["base_hash"] == hash_weights(base)
    assert lineage["config"] == settings_of().model_dump(mode="json")


def find(base, folder, examples=PASSAGE, base_hash=None, **changes):
    fingerprint = adapter_fingerprint(
        examples, settings_of(**changes), base_hash=base_hash or hash_weights(base)
    )
    return finished_training(folder, fingerprint)


def test_a_finished_adapter_is_found_by_everything_that_decides_it(base, tmp_path):
    folder = tmp_path / "out"
    assert find(base, folder) is None
    training = trainer(base).train(PASSAGE, folder)
    assert find(base, folder) == training
    assert find(base, folder, examples=PASSAGE[::-1]) is None
    assert find(base, folder, base_hash="another") is None
    assert find(base, folder, seed=1) is None


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "past_ray.json"]
)
@pytest.mark.parametrize("tear", [lambda file: file.unlink(), lambda file: cut(file)])
def test_a_torn_adapter_counts_as_absent(base, tmp_path, name, tear):
    folder = tmp_path / "out"
    trainer(base, num_epochs=1).train(PASSAGE, folder)
    tear(folder / name)
    assert find(base, folder, num_epochs=1) is None


def cut(file):
    file.write_bytes(file.read_bytes()[:-5])


def test_a_loss_that_is_not_finite_writes_nothing_and_names_the_setting(base, tmp_path):
    run = trainer(base)
    with torch.no_grad():
        next(run._model.parameters()).fill_(math.nan)
    with pytest.raises(ConfigError, match=r"out has nan .* learning_rate"):
        run.train(PASSAGE, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("examples", [(), examples_of(1)])
def test_a_passage_without_tokens_to_train_on_is_refused(base, tmp_path, examples):
    with pytest.raises(ConfigError, match="out has none"):
        trainer(base).train(examples, tmp_path / "out")
