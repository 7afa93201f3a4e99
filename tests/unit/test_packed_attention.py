"""A packed row of any decoder scores each sequence as if it stood alone."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from past_ray.engine.packed_attention import PACKED_ATTENTION, check_packable
from past_ray.engine.packing import Segment
from past_ray.errors import ConfigError

LENGTHS = (9, 4, 1, 12)
SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
CONFIGS = {
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2),
    "llama": LlamaConfig(**SIZES, num_key_value_heads=1),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16),
    "no groups": LlamaConfig(**SIZES, num_key_value_heads=4),
}


def build(config, attention: str) -> PreTrainedModel:
    torch.manual_seed(0)
    # The model keeps the config and reads the attention from it: two models must not share one.
    config = copy.deepcopy(config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.float().eval()


def sequences() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(50, (length,), generator=generator) for length in LENGTHS]


def packed_logits(model: PreTrainedModel) -> list[torch.Tensor]:
    rows = sequences()
    logits = model(
        input_ids=torch.cat(rows).unsqueeze(0),
        position_ids=torch.cat([torch.arange(len(row)) for row in rows]).unsqueeze(0),
        segments=tuple(Segment(length=length) for length in LENGTHS),
        use_cache=False,
    ).logits
    return list(logits[0].split(LENGTHS))


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_logprobs_and_gradients_equal_those_of_each_sequence_alone(name: str):
    ours, plain = build(CONFIGS[name], PACKED_ATTENTION), build(CONFIGS[name], "eager")
    found = [row.log_softmax(-1) for row in packed_logits(ours)]
    alone = [plain(row.unsqueeze(0)).logits[0].log_softmax(-1) for row in sequences()]
    for ours_row, alone_row in zip(found, alone, strict=True):
        torch.testing.assert_close(ours_row, alone_row, atol=1e-5, rtol=0)
    for rows in (found, alone):
        sum((row[:, 0] * torch.arange(len(row))).sum() for row in rows).backward()
    for (label, ours_weight), plain_weight in zip(
        ours.named_parameters(), plain.parameters(), strict=True
    ):
        scale = plain_weight.grad.abs().max().item()
        torch.testing.assert_close(
            ours_weight.grad, plain_weight.grad, atol=1e-5 * max(scale, 1.0), rtol=0, msg=label
        )


@pytest.mark.parametrize("name", CONFIGS)
def test_sequences_behind_one_prompt_score_and_learn_as_if_each_had_its_own(name: str):
    ours, plain = build(CONFIGS[name], PACKED_ATTENTION), build(CONFIGS[name], "eager")
    prompt, *answers = sequences()
    answers[1] = (answers[0] + 1) % 50  # Two of one length run together.
    segments = [Segment(length=len(prompt))]
    segments += [Segment(length=len(answer), prompt=0) for answer in answers]
    positions = [torch.arange(len(prompt))]
    positions += [torch.arange(len(prompt), len(prompt) + len(answer)) for answer in answers]
    packed = ours(
        input_ids=torch.cat([prompt, *answers]).unsqueeze(0),
        position_ids=torch.cat(positions).unsqueeze(0),
        segments=tuple(segments),
        use_cache=False,
    ).logits[0]
    found = packed.log_softmax(-1).split([len(prompt), *map(len, answers)])[1:]
    alone = [
        plain(torch.cat([prompt, answer]).unsqueeze(0)).logits[0, len(prompt) :].log_softmax(-1)
        for answer in answers
    ]
    for ours_row, alone_row in zip(found, alone, strict=True):
        torch.testing.assert_close(ours_row, alone_row, atol=1e-5, rtol=0)
    for rows in (found, alone):
        sum((row[:, 0] * (1 + torch.arange(len(row)))).sum() for row in rows).backward()
    for (label, ours_weight), plain_weight in zip(
        ours.named_parameters(), plain.parameters(), strict=True
    ):
        scale = plain_weight.grad.abs().max().item()
        torch.testing.assert_close(
            ours_weight.grad, plain_weight.grad, atol=1e-5 * max(scale, 1.0), rtol=0, msg=label
        )


def test_attention_does_not_see_other_sequences_of_the_row():
    model = build(CONFIGS["qwen2"], PACKED_ATTENTION)
    with torch.no_grad():
        before = packed_logits(model)
        model.model.embed_tokens.weight[sequences()[0][-1]] += 1
        after = packed_logits(model)
    touched = sequences()[0][-1].item()
    for row, old, new in zip(sequences(), before, after, strict=True):
        assert torch.equal(old, new) == (touched not in row.tolist())


def test_sequence_longer_than_the_sliding_window_is_refused():
    config = Qwen2Config(
        **SIZES,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=0,
    )
    with pytest.raises(ConfigError, match="sliding window of 8 tokens, got 12"):
        packed_logits(build(config, PACKED_ATTENTION))


def test_model_with_other_scores_is_refused():
    config = Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8)
    with pytest.raises(ConfigError, match="decoder of plain attention layers"):
        check_packable(Gemma2ForCausalLM(config))
