import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from past_ray.engine.flops import decoder_shape, step_flops
from past_ray.engine.packed_attention import PACKED_ATTENTION
from past_ray.engine.packing import Segment

LENGTHS = (9, 4, 12)
SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PREDICTORS = torch.tensor([2, 3, 11, 20])


@pytest.mark.parametrize("config", [LlamaConfig(**SIZES), Qwen3Config(**SIZES, head_dim=16)])
def test_count_is_that_of_pytorch_but_for_pairs_that_causality_hides(config):
    model = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED_ATTENTION)
    shape = decoder_shape(config)
    # The plain kernel multiplies whole squares, forward twice (scores, values), backward 4 times.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = model(
            input_ids=torch.zeros(1, sum(LENGTHS), dtype=torch.long),
            position_ids=torch.cat([torch.arange(n) for n in LENGTHS]).unsqueeze(0),
            segments=tuple(Segment(length=length) for length in LENGTHS),
            logits_to_keep=PREDICTORS,
            use_cache=False,
        ).logits
        forward = counter.get_total_flops()
        logits.sum().backward()
    heads = shape.num_heads * shape.head_size
    hidden = shape.num_layers * sum(2 * heads * (2 * n * n - n * (n + 1)) for n in LENGTHS)
    counts = {"lengths": LENGTHS, "num_loss_tokens": len(PREDICTORS)}
    assert step_flops(shape, **counts, is_training=False) == forward - hidden
    assert step_flops(shape, **counts) == counter.get_total_flops() - 3 * hidden


def test_tokens_that_do_not_train_cost_no_vocabulary():
    shape = decoder_shape(LlamaConfig(**SIZES))
    none, one = (step_flops(shape, lengths=[5], num_loss_tokens=n) for n in (0, 1))
    assert one - none == 6 * 32 * 50
