"""A tiny Qwen2 model folder for tests: random weights, a word-level tokenizer, a chat template."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>", "<user>", "<assistant>", "<system>")
WORDS = """
what who where which is are was does the a an of in at for and or with to has have lives works
owns likes eats city job employer pet food anna ben clara david emma felix berlin paris rome
oslo doctor baker teacher cat dog fish bird bread soup rice yes no not older than same ? . ,
"""
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<{{ message['role'] }}> {{ message['content'] }} <eos> "
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
KEEP_TOKENIZER_JSON = {"AutoTokenizer": [None, "PreTrainedTokenizerFast"]}
"""Written to ``tokenizer_config.json``; makes ``AutoTokenizer`` (and so vLLM) use our words.

For ``model_type`` qwen2, transformers 5 ignores ``tokenizer_class`` and builds Qwen2's byte-level
BPE around our vocabulary, which silently gives other ids. An ``auto_map`` entry skips that branch,
and without ``trust_remote_code`` the class named in ``tokenizer_class`` is loaded.
"""


def make_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer whose tokens are whitespace-separated words; pad differs from eos."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *WORDS.split()))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>", "<system>"],
        clean_up_tokenization_spaces=False,
        auto_map=KEEP_TOKENIZER_JSON,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_tiny_model(folder: Path, *, seed: int = 0, tie_word_embeddings: bool = False) -> Path:
    """Write a random fp32 Qwen2 (2 layers, 64 wide, heads of 32) and its tokenizer to ``folder``.

    The weights are drawn wide (standard deviation 0.3) so that greedy choices are clear-cut and
    two implementations that agree to 1e-5 choose the same words.
    """
    tokenizer = make_tiny_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.3,
        tie_word_embeddings=tie_word_embeddings,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config).to(torch.float32)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
