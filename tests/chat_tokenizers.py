"""Small byte-level tokenizers with the chat templates of well-known models, written in brief."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }} {{ eos_token }}"
    "{% else %}{{ raise_exception('roles: user, assistant') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
"""Ends an answer by a token that is not the tokenizer's end of sequence."""

DROPS_REASONING = CHATML.replace(
    "{{ m.content }}",
    "{{ m.content if loop.last or m.role != 'assistant' else m.content.split('</think>')[-1] }}",
)
"""As Qwen3's: reasoning stays in the last answer only."""

MOVES_SYSTEM_PROMPT = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}\n{% endif %}"
    "{{ m.content }}[/INST]{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
"""As Mistral's: the system prompt stands in the last user message."""

OPENS_REASONING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
"""As QwQ's: the policy continues a block that history does not show."""

NUMBERS_ANSWERS = CHATML.replace(
    "<|im_end|>\n",
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<|im_end|>{{ loop.index }}\n",
)
"""What stands behind an answer depends on its place."""

SPECIAL_TOKENS = {
    CHATML: ("<|im_end|>", None),
    DROPS_REASONING: ("<|im_end|>", None),
    OPENS_REASONING: ("<|im_end|>", None),
    NUMBERS_ANSWERS: ("<|im_end|>", None),
    LLAMA3: ("<|eot_id|>", "<|begin_of_text|>"),
    LLAMA2: ("</s>", "<s>"),
    MOVES_SYSTEM_PROMPT: ("</s>", "<s>"),
    GEMMA: ("<eos>", "<bos>"),
}
"""End and beginning of sequence of each template."""

MARKERS = ("<|im_start|>", "<|start_header_id|>", "<|end_header_id|>")
TURN_MARKERS = ("<start_of_turn>", "<end_of_turn>")


def make_chat_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Build one; ``encode`` puts its beginning of sequence, if any, before every text.

    ``yes`` is three bytes or one token, so decoding and encoding is no identity.
    """
    eos_token, bos_token = SPECIAL_TOKENS[template]
    vocabulary = {
        byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    merges = [("y", "e"), ("ye", "s")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=eos_token,
        bos_token=bos_token,
        additional_special_tokens=[*MARKERS, *TURN_MARKERS],
        clean_up_tokenization_spaces=False,
    )
    if bos_token is not None:
        core = tokenizer.backend_tokenizer
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos_token} $A", special_tokens=[(bos_token, tokenizer.bos_token_id)]
        )
    tokenizer.chat_template = template
    return tokenizer
