"""Which rollouts are recent enough to train on."""

from collections.abc import Sequence

from past_ray.rl.types import RolloutGroup, RolloutStatus


def group_version(group: RolloutGroup) -> int | None:
    """Return the oldest policy version behind a completed rollout; None if none completed.

    A rollout of several turns may span versions; it has the oldest of them.
    """
    versions = [
        rollout.policy_version
        for rollout in group.rollouts
        if rollout.status is RolloutStatus.COMPLETED
    ]
    return min(versions) if versions else None


def split_by_staleness(
    groups: Sequence[RolloutGroup], *, learner_version: int, max_staleness: int
) -> tuple[list[RolloutGroup], list[RolloutGroup]]:
    """Split groups into those that may train and those that are too old, each in given order.

    Staleness is ``learner_version - group_version``, in optimizer steps. A group is judged as a
    whole, because its advantages compare its rollouts. One without a completed rollout has no
    tokens to train on and counts as fresh.

    Args:
        groups: Finished groups.
        learner_version: Optimizer steps the learner has taken.
        max_staleness: Largest staleness that trains; 0 is fully synchronous.

    Returns:
        ``(fresh, stale)``.

    Raises:
        ValueError: If a rollout is newer than the learner.
    """
    fresh: list[RolloutGroup] = []
    stale: list[RolloutGroup] = []
    for group in groups:
        version = group_version(group)
        if version is not None and version > learner_version:
            raise ValueError(
                f"rollouts must not be newer than the learner, got version {version} of question "
                f"{group.question_id!r} at learner version {learner_version}. Sync the weights of "
                "every generator after loading a learner."
            )
        is_fresh = version is None or learner_version - version <= max_staleness
        (fresh if is_fresh else stale).append(group)
    return fresh, stale
