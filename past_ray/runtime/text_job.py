"""Texts that a model writes, as a Ray Data job that can be killed and run again.

::

    requests -- render, key --+--> in the cache: done
                              |
                              +--> ray.data --+--> generator 1 --> a batch --> cache file
                                              +--> generator 2 --> a batch --> cache file
                                                                      |
                                                                 on_progress

The generators' nodes must see the model's folder and the cache: a generator saves a batch itself,
so what is finished stays whoever dies. Texts do not travel through Ray.
"""

# pyarrow's tables have no types that pyright can read.
# pyright: reportUnknownParameterType=false

import functools
import logging
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import ray
import ray.data
from ray.exceptions import RayError, RayTaskError
from transformers import AutoTokenizer

from past_ray.config.runtime import GeneratorConfig, RuntimeConfig
from past_ray.config.texts import GenerationConfig
from past_ray.engine.generator_checks import PromptLimits, prompt_error, vocab_size
from past_ray.engine.generators import build_generator
from past_ray.envs.chat import chat_codec
from past_ray.errors import ClusterError, ConfigError, DataError, PastRayError
from past_ray.rl.types import SamplingParams
from past_ray.runtime.placement import process_environment
from past_ray.runtime.text_cache import CachedText, TextCache, text_key
from past_ray.skill.checkpoint import hash_weights
from past_ray.tasks.synthesis import TextRequest

NUM_REPORTED = 5
"""Documents that an error message lists; the count is always given in full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextJobResult:
    """The texts of a job and what they took; cached texts count as when they were generated."""

    texts: dict[str, str]
    """By ``request_id``."""

    truncated_ids: frozenset[str]
    """Requests whose text reached ``max_new_tokens``."""

    num_cached: int
    """Requests that were answered from the cache."""

    num_generated: int
    """Requests whose text this call generated."""

    num_prompt_tokens: int
    """Tokens of all prompts."""

    num_new_tokens: int
    """Tokens of all texts."""


def generate_texts(
    requests: Sequence[TextRequest],
    *,
    model_folder: Path,
    generation: GenerationConfig,
    runtime: RuntimeConfig,
    cache_dir: Path,
    on_progress: Callable[[int, int], None] | None = None,
) -> TextJobResult:
    """Let a model write the text of every request; what the cache has is not generated again.

    Args:
        requests: With unique ids.
        model_folder: Hugging Face folder of the model that writes.
        generation: Sampling, and how many texts are saved at a time.
        runtime: Generators and what each asks of the cluster; Ray is initialised.
        cache_dir: Common to all jobs and models; on storage that all nodes share.
        on_progress: Called in this thread with the numbers of requests done and of all: at the
            start, and after every batch.

    Raises:
        DataError: Prompts do not fit the context; the message names their documents. Nothing runs.
        ConfigError: The cluster cannot hold the generators, or they refuse their settings.
        ClusterError: A generator failed; finished batches are in the cache.
    """
    model_folder = model_folder.resolve()
    weights_hash = hash_weights(model_folder)
    cache = TextCache(cache_dir, weights_hash)
    report = on_progress or _report_nothing
    prompts = _prompts(requests, model_folder)
    _check_prompts(requests, prompts, model_folder, generation, runtime)
    keys = [
        text_key(
            prompt,
            weights_hash=weights_hash,
            temperature=generation.temperature,
            max_new_tokens=generation.max_new_tokens,
            seed=request.seed,
        )
        for prompt, request in zip(prompts, requests, strict=True)
    ]
    cached = cache.read()
    num_cached = sum(key in cached for key in keys)
    report(num_cached, len(keys))
    pending = {
        key: {"key": key, "prompt_ids": prompt, "seed": request.seed}
        for key, prompt, request in zip(keys, prompts, requests, strict=True)
        if key not in cached
    }
    if pending:
        settings = (model_folder, generation, runtime.generator, cache)
        with closing(_run(list(pending.values()), settings, runtime)) as written:
            for num_written in written:
                report(num_cached + num_written, len(keys))
        cached = cache.read()
    texts = {request.request_id: cached[key] for request, key in zip(requests, keys, strict=True)}
    return _result(texts, num_cached=num_cached)


class _TextWriter:
    """A generator that saves what it wrote; one per actor of the job."""

    def __init__(
        self,
        model_folder: Path,
        generation: GenerationConfig,
        generator: GeneratorConfig,
        cache: TextCache,
    ) -> None:
        self._generation = generation
        self._cache = cache
        self._decode = chat_codec(AutoTokenizer.from_pretrained(model_folder)).decode
        # The error of a call keeps its class; one of a constructor would only be a dead actor.
        self._start = functools.cache(lambda: build_generator(generator, model_folder))

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Write and save a batch; only the number of its texts goes back."""
        rows: list[dict[str, Any]] = batch.to_pylist()
        prompts: list[list[int]] = [row["prompt_ids"] for row in rows]
        completions = self._start().generate(
            prompts,
            [
                SamplingParams(
                    temperature=self._generation.temperature,
                    max_new_tokens=self._generation.max_new_tokens,
                    seed=row["seed"],
                )
                for row in rows
            ],
        )
        self._cache.write(
            [
                CachedText(
                    key=row["key"],
                    text=self._decode(completion.token_ids).strip(),
                    is_truncated=completion.finish_reason != "stop",
                    num_prompt_tokens=len(prompt),
                    num_tokens=len(completion.token_ids),
                )
                for row, prompt, completion in zip(rows, prompts, completions, strict=True)
            ]
        )
        return pa.table({"num_texts": [len(rows)]})


def _prompts(requests: Sequence[TextRequest], model_folder: Path) -> list[list[int]]:
    codec = chat_codec(AutoTokenizer.from_pretrained(model_folder))
    return [codec.render(request.messages) for request in requests]


def _check_prompts(
    requests: Sequence[TextRequest],
    prompts: Sequence[list[int]],
    model_folder: Path,
    generation: GenerationConfig,
    runtime: RuntimeConfig,
) -> None:
    """Refuse prompts that the engine would refuse in the middle of the job."""
    limits = PromptLimits(
        max_model_len=runtime.generator.max_model_len, vocab_size=vocab_size(model_folder)
    )
    sampling = SamplingParams(
        temperature=generation.temperature, max_new_tokens=generation.max_new_tokens
    )
    reasons = {
        request.doc_id: error
        for request, prompt in zip(requests, prompts, strict=True)
        if (error := prompt_error(prompt, sampling, limits))
    }
    if reasons:
        raise DataError(
            f"every prompt must fit the generator; those about {len(reasons)} documents do not "
            f"(first: {list(reasons)[:NUM_REPORTED]}): {next(iter(reasons.values()))} Use smaller "
            "windows for long documents."
        )


def _run(
    rows: Sequence[dict[str, Any]],
    settings: tuple[Path, GenerationConfig, GeneratorConfig, TextCache],
    runtime: RuntimeConfig,
) -> Generator[int]:
    """Generate all rows; yield after every batch how many are done.

    Closing the generator ends the job and frees the cluster.
    """
    _check_supply(runtime)
    dataset = _dataset(rows, settings, runtime)
    blocks = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    num_done = 0
    try:
        with closing(cast("Generator[Any]", iter(blocks))) as iterator:
            for block in iterator:
                num_done += sum(block["num_texts"].to_pylist())
                yield num_done
    except RayError as error:
        raise _explained(error) from error


def _dataset(
    rows: Sequence[dict[str, Any]],
    settings: tuple[Path, GenerationConfig, GeneratorConfig, TextCache],
    runtime: RuntimeConfig,
) -> ray.data.Dataset:
    """Describe the job: a block is a batch, and a batch is a task of one of the generators."""
    num_batches = math.ceil(len(rows) / settings[1].batch_size)
    num_batches = min(len(rows), max(num_batches, runtime.num_generators))
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    # Without a limit Ray Data waits forever for generators that find no place.
    context.wait_for_min_actors_s = math.ceil(runtime.placement_timeout_s)
    return ray.data.from_items(list(rows), override_num_blocks=num_batches).map_batches(
        _TextWriter,
        fn_constructor_args=settings,
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(runtime.num_generators, num_batches)),
        num_cpus=runtime.cpus_per_generator,
        num_gpus=runtime.generator.tensor_parallel_size if runtime.use_gpu else 0,
        runtime_env={"env_vars": process_environment(runtime)},
    )


def _check_supply(runtime: RuntimeConfig) -> None:
    num_cpus = runtime.num_generators * runtime.cpus_per_generator
    num_gpus = runtime.num_generators * runtime.generator.tensor_parallel_size
    supply = ray.cluster_resources()
    if num_cpus > supply.get("CPU", 0) or (runtime.use_gpu and num_gpus > supply.get("GPU", 0)):
        raise ConfigError(
            "runtime.num_generators must fit the cluster, got "
            f"{runtime.num_generators} of {runtime.cpus_per_generator} CPUs and "
            f"{runtime.generator.tensor_parallel_size if runtime.use_gpu else 0} GPUs each over "
            f"{supply.get('CPU', 0)} CPUs and {supply.get('GPU', 0)} GPUs. Ask for fewer."
        )


def _explained(error: RayError) -> PastRayError:
    """Turn what Ray Data raises into the generator's own error, where it has one."""
    cause = error.cause if isinstance(error, RayTaskError) else None
    if isinstance(cause, PastRayError):
        return cause
    return ClusterError(
        f"generators must write all texts, but one failed: {error}. Finished batches are saved; "
        "run the same command again."
    )


def _result(texts: Mapping[str, CachedText], *, num_cached: int) -> TextJobResult:
    return TextJobResult(
        texts={name: text.text for name, text in texts.items()},
        truncated_ids=frozenset(name for name, text in texts.items() if text.is_truncated),
        num_cached=num_cached,
        num_generated=len(texts) - num_cached,
        num_prompt_tokens=sum(text.num_prompt_tokens for text in texts.values()),
        num_new_tokens=sum(text.num_tokens for text in texts.values()),
    )


def _report_nothing(_num_done: int, _num_all: int) -> None:
    """Stand in for a callback."""
