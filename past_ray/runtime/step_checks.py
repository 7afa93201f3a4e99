"""When a run must stop because going on would teach nothing, and what it says then."""

from collections.abc import Sequence

from past_ray.config.rl import RLConfig
from past_ray.errors import ClusterError, DataError, PastRayError
from past_ray.rl.batching import is_constant_group
from past_ray.rl.metrics import rollout_metrics
from past_ray.rl.types import RolloutGroup, RolloutStatus

MAX_ANSWER_SHOWN = 120
"""Characters of the answer that a diagnosis quotes."""


def check_failures(groups: Sequence[RolloutGroup], step: int, *, max_frac: float) -> None:
    """Stop a step of which too much failed.

    Raises:
        ClusterError: With the first rollout's error.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    failed = [rollout for rollout in rollouts if rollout.reward is None]
    if len(failed) > max_frac * len(rollouts):
        raise ClusterError(
            f"at most {max_frac:.0%} of a step's rollouts may fail (rl.max_rollout_error_frac), "
            f"{len(failed)} of {len(rollouts)} did in step {step}; first: {failed[0].error}"
        )


class SpreadWatch:
    """Counts steps in a row in which no group's rewards differ, so nothing is learned."""

    def __init__(self, rl: RLConfig) -> None:
        """Start at 0; ``rl.max_constant_steps`` in a row end the run."""
        self._rl = rl
        self._num_constant = 0

    def add(self, groups: Sequence[RolloutGroup], step: int) -> None:
        """Count a step.

        Raises:
            DataError: With a diagnosis, if there were too many in a row.
        """
        if not all(is_constant_group(group, rl=self._rl) for group in groups):
            self._num_constant = 0
            return
        self._num_constant += 1
        if self._num_constant >= self._rl.max_constant_steps:
            raise DataError(self._diagnosis(groups, step))

    def _diagnosis(self, groups: Sequence[RolloutGroup], step: int) -> str:
        metrics = rollout_metrics(groups)
        completed = [
            r for group in groups for r in group.rollouts if r.status is RolloutStatus.COMPLETED
        ]
        answer = completed[0].answer[:MAX_ANSWER_SHOWN] if completed else ""
        return (
            f"rewards must differ within some group, or there is nothing to learn; they did not in "
            f"{self._num_constant} steps in a row up to step {step} (rl.max_constant_steps). Mean "
            f"reward {metrics['reward']:.3g}, {metrics['truncated_frac']:.0%} of the answers hit "
            f"rl.max_new_tokens, {metrics['error_frac']:.0%} of the rollouts failed; one answer: "
            f"{answer!r}. {_advice(metrics)}"
        )


def stopped_on_request(step: int) -> PastRayError:
    """Return the error of a run that was told to stop and has saved step ``step``."""
    return PastRayError(
        f"the run was told to stop (SIGTERM) and saved step {step}. The same command continues it."
    )


def _advice(metrics: dict[str, float]) -> str:
    if metrics["truncated_frac"] > 0.5:
        return "Most answers are cut off before they end: raise rl.max_new_tokens."
    if metrics["reward"] > 0:
        return "The questions are solved or the reward is too coarse: use harder questions."
    return (
        "No answer earns anything: check the prompt and the reward function, raise rl.temperature "
        "or rl.group_size, or begin with a model that solves some questions."
    )
