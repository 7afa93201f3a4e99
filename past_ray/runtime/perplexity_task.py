"""Token likelihoods of several models as Ray tasks, one model each."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from past_ray.engine.perplexity import TokenNLL, token_nll
from past_ray.errors import ClusterError, PastRayError
from past_ray.runtime.placement import Resources

MAX_RETRIES = 3
"""A task whose node dies is run again from the start."""


def token_nll_of_models(
    model_folders: Mapping[str, Path],
    texts: Sequence[str],
    *,
    max_length: int,
    batch_tokens: int,
    resources: Resources,
) -> dict[str, TokenNLL]:
    """Score the same texts with several models, as many at a time as the cluster has room for.

    Args:
        model_folders: Model folders by name, on storage that every node sees.
        texts: Documents.
        max_length: Tokens of a window.
        batch_tokens: Padded tokens of one forward pass.
        resources: CPUs and GPUs of one task, ``{"CPU": 1.0, "GPU": 0.0}``; with a GPU it computes
            there.

    Raises:
        ConfigError, DataError, SkillVectorError: See ``engine.perplexity.token_nll``.
        ClusterError: A task was lost more than ``MAX_RETRIES`` times or failed otherwise.
    """
    remote: Any = ray.remote(_score).options(
        num_cpus=resources["CPU"], num_gpus=resources["GPU"], max_retries=MAX_RETRIES
    )
    shared = ray.put(list(texts))
    device = "cuda" if resources["GPU"] else "cpu"
    references = [
        remote.remote(folder, shared, max_length, batch_tokens, device)
        for folder in model_folders.values()
    ]
    try:
        return dict(zip(model_folders, _results(references), strict=True))
    finally:
        for reference in references:
            ray.cancel(reference)


def _score(
    folder: Path, texts: list[str], max_length: int, batch_tokens: int, device: str
) -> TokenNLL:
    return token_nll(folder, texts, max_length=max_length, batch_tokens=batch_tokens, device=device)


def _results(references: "list[ray.ObjectRef[TokenNLL]]") -> list[TokenNLL]:
    try:
        return ray.get(references)
    except RayTaskError as error:
        if isinstance(error.cause, PastRayError):
            raise error.cause from None
        raise ClusterError(
            f"scoring texts must not fail, but it raised {error.cause!r}. Check that every node"
            " sees the model folders."
        ) from error
    except RayError as error:
        raise ClusterError(
            f"scoring texts must finish, but its node or worker was lost: {error}. Run it again;"
            " lower batch_tokens if memory ran out."
        ) from error
