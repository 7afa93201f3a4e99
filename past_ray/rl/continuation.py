"""A completion that is interrupted by a weight sync and goes on after it.

Each span between two interruptions is a ``Completion`` of its own, sampled by one version.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from past_ray.rl.types import Completion, SamplingParams


def remaining(
    prompt: Sequence[int], sampling: SamplingParams, spans: Sequence[Completion]
) -> tuple[list[int], SamplingParams]:
    """Return the prompt and the sampling of what is still to be sampled.

    Args:
        prompt: The first prompt.
        sampling: How the whole completion is sampled.
        spans: What has been sampled to it so far.
    """
    kept = [token_id for span in spans for token_id in span.token_ids]
    return [*prompt, *kept], replace(
        sampling,
        max_new_tokens=sampling.max_new_tokens - len(kept),
        seed=continuation_seed(sampling.seed, num_kept=len(kept)),
    )


def continuation_seed(seed: int | None, *, num_kept: int) -> int | None:
    """Seed of a completion's rest, from its own seed and the number of tokens it keeps.

    The same seed would draw the random numbers of the first tokens again. A continuation is thus
    reproducible where the interruption is; without an interruption the seed is unchanged.
    """
    if seed is None or num_kept == 0:
        return seed
    digest = hashlib.sha256(f"{seed}/{num_kept}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def joined(spans: Sequence[Completion]) -> Completion:
    """Return one completion of all spans, each token tagged with the version that sampled it.

    Its ``policy_version`` is that of its first token, the oldest; it ends as the last span did.
    """
    sampled = [span for span in spans if span.token_ids] or [spans[-1]]
    versions = [span.policy_version for span in sampled for _ in span.token_ids]
    is_mixed = len(set(versions)) > 1
    return Completion(
        token_ids=[token_id for span in sampled for token_id in span.token_ids],
        logprobs=[logprob for span in sampled for logprob in span.logprobs],
        finish_reason=spans[-1].finish_reason,
        policy_version=sampled[0].policy_version,
        token_versions=versions if is_mixed else [],
        num_cached_tokens=spans[0].num_cached_tokens,
    )
