"""What both trainers do: one model, the same prompts, rewards and step sizes.

Needs neither past_ray nor TRL, because it is imported in the environments of both.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

VOCABULARY = 4096
SPECIAL = ("<eos>", "<pad>", "<user>", "<assistant>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} <eos> "
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEMPLATE_TOKENS = 3
"""What the template adds to one question."""

NUM_WORDS = VOCABULARY - len(SPECIAL)

KEEP_TOKENIZER_JSON = {"AutoTokenizer": [None, "PreTrainedTokenizerFast"]}
"""Without it transformers 5 puts Qwen2's byte-level pre-tokenizer around our words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One RL step in numbers; both sides get the same."""

    prompts_per_step: int = 16
    """Prompts of one optimizer step."""

    group_size: int = 8
    """Completions per prompt."""

    prompt_tokens: int = 32
    """Tokens of every prompt."""

    completion_tokens: int = 64
    """Limit of a completion. A random model ends 1 in 4096 tokens, so nearly all reach it."""

    learning_rate: float = 1e-5
    """Of AdamW."""

    num_questions: int = 512
    """Prompts in the data set."""

    @property
    def rollouts_per_step(self) -> int:
        """Completions of one optimizer step."""
        return self.prompts_per_step * self.group_size


def questions(workload: Workload) -> list[str]:
    """Return questions that make different prompts of equal length."""
    words = workload.prompt_tokens - TEMPLATE_TOKENS
    return [
        " ".join(f"w{(index * words + position) % NUM_WORDS}" for position in range(words))
        for index in range(workload.num_questions)
    ]


def hashed_reward(text: str) -> float:
    """Return a number in [0, 1) that only the text decides, so that groups get a spread."""
    return hashlib.sha256(text.encode()).digest()[0] / 256


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of one word per token, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *(f"w{i}" for i in range(NUM_WORDS))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=SPECIAL[0],
        pad_token=SPECIAL[1],
        auto_map=KEEP_TOKENIZER_JSON,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def write_model(folder: Path) -> None:
    """Write a random fp32 Qwen2 of 4.2M parameters with tied embeddings, and its tokenizer."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    Qwen2ForCausalLM(config).float().save_pretrained(folder)
    write_tokenizer(folder)
