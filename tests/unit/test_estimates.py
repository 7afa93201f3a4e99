"""Formulas against models that exist, and against arithmetic that fits on a line."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from past_ray.config.plan import ModelShape
from past_ray.engine.flops import decoder_shape, step_flops
from past_ray.pipelines.estimates import (
    activation_bytes_per_token,
    adapter_seconds,
    forward_flops,
    generation_memory,
    generation_seconds,
    kv_bytes_per_token,
    lora_parameters,
    training_flops,
    training_memory,
)

QWEN_7B = ModelShape(
    name="Qwen2.5-7B",
    num_layers=28,
    hidden_size=3584,
    intermediate_size=18944,
    num_heads=28,
    num_kv_heads=4,
    vocab_size=152064,
    tie_word_embeddings=False,
    attention_bias=True,
)
SMOLLM = ModelShape(
    name="SmolLM2-135M",
    num_layers=30,
    hidden_size=576,
    intermediate_size=1536,
    num_heads=9,
    num_kv_heads=3,
    vocab_size=49152,
    tie_word_embeddings=True,
    attention_bias=False,
)
SMALL = ModelShape(
    name="small",
    num_layers=8,
    hidden_size=64,
    intermediate_size=336,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=50,
    tie_word_embeddings=False,
    attention_bias=True,
)
M = QWEN_7B.matrix_parameters
N = QWEN_7B.num_parameters


def small_model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=336,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return Qwen2ForCausalLM(config).float().train()


def memory(**changes):
    settings = {
        "num_ranks": 8,
        "num_tokens": 1000,
        "num_logits": 1000,
        "gradient_checkpointing": False,
    }
    return training_memory(QWEN_7B, **(settings | changes))


def generation(**changes) -> float:
    settings = {
        "num_sequences": 1,
        "prompt_tokens": 100,
        "new_tokens": 200,
        "num_engines": 1,
        "tensor_parallel": 1,
        "flops_per_s": 1e30,
        "bytes_per_s": 1e12,
    }
    return generation_seconds(QWEN_7B, **(settings | changes))


def test_parameters_of_published_models_are_exact():
    assert QWEN_7B.num_parameters == 7_615_616_512
    assert SMOLLM.num_parameters == 134_515_008


def test_parameters_are_those_of_the_model_that_transformers_builds():
    assert SMALL.num_parameters == sum(p.numel() for p in small_model().parameters())


def test_matrix_parameters_leave_out_what_is_looked_up_or_added():
    names = [n for n, p in small_model().named_parameters() if p.dim() == 2]
    sizes = {n: p.numel() for n, p in small_model().named_parameters()}
    assert SMALL.matrix_parameters == sum(sizes[n] for n in names if "embed" not in n)


@pytest.mark.parametrize(
    "targets",
    [
        ("q_proj", "v_proj"),
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ],
)
def test_adapter_has_the_parameters_that_peft_adds(targets):
    adapted = get_peft_model(small_model(), PeftConfig(r=5, target_modules=list(targets)))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert lora_parameters(SMALL, rank=5, target_modules=targets) == trained


def test_full_training_keeps_sixteen_bytes_per_parameter_over_the_ranks():
    assert memory(num_ranks=1).state == 16 * N
    assert memory(num_ranks=8).state == 2 * N


def test_a_reference_adds_four_bytes_per_parameter_over_the_ranks():
    assert memory(has_reference=True).state == (16 + 4) * N / 8


def test_an_adapter_freezes_all_but_its_own_weights():
    assert memory(num_ranks=1, num_adapter_parameters=1000).state == 4 * N + 16 * 1000


def test_a_frozen_base_in_bf16_takes_two_bytes_per_parameter_and_no_copy():
    base = memory(num_ranks=1, num_adapter_parameters=1000, frozen_bytes=2)
    assert (base.state, base.gathered) == (2 * N + 16 * 1000, 0)


def test_one_rank_gathers_nothing_and_keeps_bf16_copies():
    assert memory(num_ranks=1).gathered == 2 * M


def test_ranks_gather_two_layers_and_the_embeddings_with_their_gradients():
    gathered = memory(num_ranks=8).gathered - 2 * M
    layer = 2 * 3584 * (3584 + 512) + 3 * 3584 * 18944
    assert gathered == 8 * (2 * layer + 2 * 152064 * 3584)
    frozen = memory(num_ranks=8, num_adapter_parameters=1000).gathered - 2 * M
    assert frozen == gathered / 2


def test_logits_are_counted_only_where_they_are_computed():
    assert memory(num_logits=10).logits == 12 * 152064 * 10
    assert memory(num_logits=10).activations == memory(num_logits=1000).activations


def bytes_saved_per_token(model: Qwen2ForCausalLM) -> float:
    """Measure what autograd keeps: the difference of two lengths, so that weights cancel."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def saved_bytes(num_tokens: int) -> int:
        saved = []

        def keep(tensor):
            saved.append(tensor)
            return tensor

        ids = torch.zeros(1, num_tokens, dtype=torch.long)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", dtype=torch.bfloat16),
        ):
            model.model(input_ids=ids)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
        return sum(size for pointer, size in storages.items() if pointer not in weights)

    return (saved_bytes(128) - saved_bytes(64)) / 64


def test_activations_are_what_autograd_saves_within_five_percent():
    measured = bytes_saved_per_token(small_model())
    estimated = activation_bytes_per_token(SMALL, gradient_checkpointing=False)
    assert estimated <= measured <= 1.05 * estimated  # the rest: last norm, sums of softmax


def test_checkpointing_keeps_the_input_of_each_layer_and_one_layer():
    model = small_model()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    one_layer = activation_bytes_per_token(SMALL, gradient_checkpointing=False) / 8
    inputs = activation_bytes_per_token(SMALL, gradient_checkpointing=True) - one_layer
    assert inputs == 8 * 4 * 64
    last_norm = 2 * 4 * 64
    assert bytes_saved_per_token(model) == pytest.approx(inputs + last_norm, rel=0.01)


def test_cache_of_one_token_holds_keys_and_values_of_all_layers():
    assert kv_bytes_per_token(QWEN_7B) == 2 * 28 * (4 * 128) * 2 == 57_344


def test_generation_holds_weights_and_the_caches_decoded_together_over_the_gpus():
    few = generation_memory(QWEN_7B, tensor_parallel=1, num_sequences=10, sequence_tokens=500)
    assert few == 2 * N + 57_344 * 10 * 500
    many = generation_memory(QWEN_7B, tensor_parallel=2, num_sequences=9999, sequence_tokens=500)
    assert many == (2 * N + 57_344 * 256 * 500) / 2


def test_flops_are_those_that_the_learner_counts():
    shape = decoder_shape(small_model().config)
    for is_training in (False, True):
        counted = step_flops(shape, lengths=[30] * 4, num_loss_tokens=120, is_training=is_training)
        if is_training:
            estimated = training_flops(
                SMALL,
                num_tokens=120,
                sequence_tokens=30,
                is_lora=False,
                gradient_checkpointing=False,
            )
        else:
            estimated = forward_flops(SMALL, num_tokens=120, sequence_tokens=30)
        assert estimated == counted


@pytest.mark.parametrize(
    ("is_lora", "gradient_checkpointing", "matrices", "attention"),
    [(False, False, 6, 3), (True, False, 4, 3), (False, True, 8, 4), (True, True, 6, 4)],
)
def test_passes_over_matrices_and_attention(is_lora, gradient_checkpointing, matrices, attention):
    flops = training_flops(
        QWEN_7B,
        num_tokens=1,
        sequence_tokens=999,
        is_lora=is_lora,
        gradient_checkpointing=gradient_checkpointing,
    )
    assert flops == matrices * M + attention * 2 * 28 * 3584 * 1000


def test_one_sequence_reads_all_weights_and_half_its_cache_for_each_token():
    expected = 200 * (2 * M + 57_344 * (100 + 200 / 2)) / 1e12
    assert generation() == pytest.approx(expected, rel=1e-6)


def test_sequences_decoded_together_share_the_reading_of_weights():
    assert generation(num_sequences=256) < 2 * generation()
    assert generation(num_sequences=512) == pytest.approx(2 * generation(num_sequences=256))


def test_engines_share_sequences_and_tensor_parallelism_shares_the_reading():
    assert generation(num_sequences=512, num_engines=2) == generation(num_sequences=256)
    assert generation(tensor_parallel=4) == pytest.approx(generation() / 4)


def test_with_endless_bandwidth_generation_costs_one_forward_pass_of_every_token():
    seconds = generation(num_sequences=64, bytes_per_s=1e30, flops_per_s=1e15)
    prompts = 2 * M * 100 + 2 * 28 * 3584 * 100 * 101
    decoding = 200 * (2 * M + 2 * 28 * 3584 * (2 * 200 + 1))
    assert seconds == pytest.approx(64 * (prompts + decoding) / 1e15)


def test_short_sequences_of_an_adapter_are_bound_by_two_readings_of_the_weights():
    rates = {"flops_per_s": 1e14, "bytes_per_s": 1e12}
    short = adapter_seconds(QWEN_7B, num_sequences=3, sequence_tokens=10, **rates)
    assert short == pytest.approx(3 * 4 * M / 1e12)
    long = adapter_seconds(QWEN_7B, num_sequences=3, sequence_tokens=2048, **rates)
    assert long > 3 * 4 * M * 2048 / 1e14


@given(ranks=st.integers(1, 32), tokens=st.integers(1, 10_000))
def test_checkpointing_never_costs_memory_and_ranks_share_only_state(ranks, tokens):
    kept = memory(num_ranks=ranks, num_tokens=tokens)
    again = memory(num_ranks=ranks, num_tokens=tokens, gradient_checkpointing=True)
    assert again.total < kept.total
    assert kept.state * ranks == pytest.approx(16 * N)
    assert kept.activations == memory(num_tokens=tokens).activations
