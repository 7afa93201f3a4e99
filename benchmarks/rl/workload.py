"""What both trainers do: one model, the same prompts, rewards and step sizes.

Needs neither past_ray nor TRL, because it is imported in the environments of both.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

VOCABULARY = 4096
END, PAD, ASSISTANT = "<eos>", "<pad>", "<assistant>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    f"{{% if add_generation_prompt %}}{ASSISTANT}{{% endif %}}"
)
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
    """Return prompts that differ from their second word on; the template adds the last token."""
    words = workload.prompt_tokens - 1
    return [
        " ".join(f"w{(index * words + position) % (VOCABULARY - 3)}" for position in range(words))
        for index in range(workload.num_questions)
    ]


def hashed_reward(text: str) -> float:
    """Return a number in [0, 1) that only the text decides, so that groups get a spread."""
    return hashlib.sha256(text.encode()).digest()[0] / 256


def write_model(folder: Path, *, layers: int = 4, hidden_size: int = 256) -> None:
    """Write a random fp32 Qwen2 with tied embeddings and a tokenizer of one word per token."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    words = [END, PAD, ASSISTANT, *(f"w{i}" for i in range(VOCABULARY - 3))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=END, pad_token=PAD, auto_map=KEEP_TOKENIZER_JSON
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=hidden_size // 64,
            num_key_value_heads=hidden_size // 64,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=1,
        )
    )
    model.float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
