"""What every generator checks before it samples or takes new weights, whatever its engine."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from past_ray.errors import ClusterError, ConfigError, GenerationError, ParityError
from past_ray.rl.types import SamplingParams

MAX_NAMES_SHOWN = 8
"""Names listed in an error; a whole checkpoint would drown the message."""


VOCABULARY_TENSORS = ("embed_tokens.weight", "lm_head.weight", "wte.weight")
"""Ends of the names of the tensors that have one row per token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLimits:
    """What an engine can take."""

    max_model_len: int
    """Longest prompt plus completion, in tokens."""

    vocab_size: int
    """Token ids end below this; an engine that looks up another one does not recover."""


def prompt_error(
    prompt: Sequence[int], sampling: SamplingParams, limits: PromptLimits
) -> GenerationError | None:
    """Return why this prompt cannot be completed, or None when it can.

    A prompt is never cut and a completion's limit never lowered in silence: both would change what
    is trained without a trace.
    """
    if not prompt:
        return GenerationError("a prompt must hold at least one token; it is empty")
    if min(prompt) < 0 or max(prompt) >= limits.vocab_size:
        return GenerationError(
            f"token ids must be in [0, {limits.vocab_size}); the prompt's are in "
            f"[{min(prompt)}, {max(prompt)}]. Use the tokenizer saved with the model."
        )
    if sampling.max_new_tokens < 1:
        return GenerationError(
            f"max_new_tokens must be at least 1, found {sampling.max_new_tokens}"
        )
    if len(prompt) + sampling.max_new_tokens > limits.max_model_len:
        return GenerationError(
            f"prompt and completion must fit max_model_len={limits.max_model_len} tokens; the "
            f"prompt has {len(prompt)} and may be completed by {sampling.max_new_tokens}. Raise "
            "runtime.generator.max_model_len or leave out the example."
        )
    return None


def check_prompts(
    prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams], limits: PromptLimits
) -> None:
    """Refuse a batch before anything of it is sampled.

    Raises:
        GenerationError: Naming the first prompt that does not fit, by its index.
    """
    if len(prompts) != len(sampling):
        raise GenerationError(
            f"every prompt needs its sampling parameters; found {len(prompts)} prompts and "
            f"{len(sampling)} parameters"
        )
    for index, (prompt, params) in enumerate(zip(prompts, sampling, strict=True)):
        if error := prompt_error(prompt, params, limits):
            raise GenerationError(f"prompt {index} of {len(prompts)}: {error}")


def check_version(found: int, expected: int) -> None:
    """Check that a sync reached a generator.

    Raises:
        ParityError: Naming both versions.
    """
    if found != expected:
        raise ParityError(
            f"the generator must hold policy version {expected} after the sync, it holds {found}. "
            "Its last sync did not reach it."
        )


def check_weight_names(given: Collection[str], expected: Collection[str]) -> None:
    """Refuse weights that would leave a parameter as it was, or that belong to another model.

    Raises:
        ClusterError: Naming the parameters that are missing or unknown.
    """
    missed = sorted(set(expected) - set(given))
    unknown = sorted(set(given) - set(expected))
    if missed:
        raise ClusterError(
            f"a weight sync must reach all {len(set(expected))} parameters of the generator; "
            f"{len(missed)} were missed: {_shown(missed)}. Export the full weights under Hugging "
            "Face names."
        )
    if unknown:
        raise ClusterError(
            f"a weight sync must only hold parameters of the generator's model; {len(unknown)} are "
            f"unknown to it: {_shown(unknown)}. Both sides must load the same checkpoint."
        )


def check_weight_shapes(
    given: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]
) -> None:
    """Refuse weights of another size before any of them is loaded.

    Args:
        given: Shapes by name.
        expected: What the generator's model has; names that are not in it are not checked.

    Raises:
        ClusterError: Naming both sizes; a vocabulary of another size is called that.
    """
    for name, shape in expected.items():
        found = tuple(given[name])
        if found == tuple(shape):
            continue
        is_vocabulary = found[1:] == tuple(shape)[1:] and name.endswith(VOCABULARY_TENSORS)
        what = (
            f"the vocabulary must have {shape[0]} tokens as the generator's does, the learner's "
            f"has {found[0]} ({name})"
            if is_vocabulary
            else f"{name} must have shape {tuple(shape)}, the weight sync has {found}"
        )
        raise ClusterError(f"{what}. Both sides must load the same checkpoint.")


def vocab_size(model_folder: Path) -> int:
    """Rows of the checkpoint's embedding table.

    Raises:
        ConfigError: If ``config.json`` does not state it.
    """
    config = json.loads((model_folder / "config.json").read_text())
    size = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    if size is None:
        raise ConfigError(
            f"{model_folder / 'config.json'} must state vocab_size; it does not. Save the model "
            "together with its configuration."
        )
    return int(size)


def eos_token_ids(model_folder: Path) -> list[int]:
    """Ids that end a completion, as the checkpoint's own configuration states them.

    ``generation_config.json`` wins over ``config.json``: chat models add their end-of-turn there.

    Raises:
        ConfigError: If neither file names one; completions would then only end by length.
    """
    for name in ("generation_config.json", "config.json"):
        path = model_folder / name
        if path.is_file():
            ids = json.loads(path.read_text()).get("eos_token_id")
            if ids is not None:
                return [int(ids)] if isinstance(ids, int) else [int(i) for i in ids]
    raise ConfigError(
        f"{model_folder} must state eos_token_id in generation_config.json or config.json; "
        "neither does. Save the model together with its configuration."
    )


def is_tied(hf_config: object) -> bool:
    """Whether the output head is the embedding table, which a checkpoint then holds once."""
    return bool(getattr(hf_config, "tie_word_embeddings", False))


def _shown(names: Sequence[str]) -> str:
    rest = len(names) - MAX_NAMES_SHOWN
    text = ", ".join(names[:MAX_NAMES_SHOWN])
    return f"{text} and {rest} more" if rest > 0 else text
