"""What a generator tells about itself."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorStats:
    """Counters of one generator; all grow from its start."""

    policy_version: int = -1
    """Version of the weights that the next request gets; -1 before the first update."""

    busy_s: float = 0.0
    """Seconds in which at least one request was being decoded."""

    num_requests: int = 0
    """Requests completed."""

    num_in_flight: int = 0
    """Requests being decoded now; the only number that also falls."""

    num_cached_prompt_tokens: int = 0
    """Prompt tokens served from the prefix cache."""
