"""Which generator a configuration asks for."""

from pathlib import Path

from past_ray.config.runtime import GeneratorConfig
from past_ray.rl.protocols import Generator


def build_generator(
    config: GeneratorConfig, model_folder: Path, *, lora_rank: int | None = None
) -> Generator:
    """Start the generator that ``config.backend`` names; never another one in its place.

    Args:
        config: Backend and its settings.
        model_folder: Hugging Face folder.
        lora_rank: Largest rank that ``load_adapter`` will be given; None for no adapters.

    Raises:
        ConfigError: If the backend is not installed or refuses the settings.
    """
    if config.backend == "transformers":
        from past_ray.engine.transformers_generator import TransformersGenerator

        return TransformersGenerator(
            model_folder,
            dtype=config.dtype,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
        )
    from past_ray.engine.vllm_generator import VLLMGenerator

    return VLLMGenerator(model_folder, config, lora_rank=lora_rank)
