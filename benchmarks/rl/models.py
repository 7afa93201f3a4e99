"""A random model of the shape of SmolLM2-135M."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.rl.workload import write_tokenizer


def write_135m(folder: Path) -> None:
    """Write 134.5M random fp32 parameters with tied embeddings, and the toy's tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).float().save_pretrained(folder)
    write_tokenizer(folder)
