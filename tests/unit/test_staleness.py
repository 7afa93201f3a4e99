import pytest

from past_ray.rl.staleness import group_version, split_by_staleness
from past_ray.rl.types import Rollout, RolloutGroup, RolloutStatus


def group(name: str, *versions: int) -> RolloutGroup:
    """A group with one rollout a version; a negative version is a failed rollout."""
    return RolloutGroup(
        question_id=name,
        rollouts=[
            Rollout(
                rollout_id=f"0/{name}/{index}",
                turns=[],
                answer="",
                reward=1.0 if version >= 0 else None,
                status=RolloutStatus.COMPLETED if version >= 0 else RolloutStatus.GENERATION_ERROR,
                policy_version=version,
            )
            for index, version in enumerate(versions)
        ],
    )


def names(groups: list[RolloutGroup]) -> list[str]:
    return [group.question_id for group in groups]


def test_synchronous_training_takes_only_the_current_version():
    groups = [group("a", 7, 7), group("b", 6, 7), group("c", 7, 7)]
    fresh, stale = split_by_staleness(groups, learner_version=7, max_staleness=0)
    assert (names(fresh), names(stale)) == (["a", "c"], ["b"])


def test_staleness_up_to_the_limit_trains():
    groups = [group("a", 5), group("b", 4), group("c", 7)]
    fresh, stale = split_by_staleness(groups, learner_version=7, max_staleness=2)
    assert (names(fresh), names(stale)) == (["a", "c"], ["b"])


def test_oldest_completed_rollout_decides_for_its_group():
    assert group_version(group("a", 7, 5, -1)) == 5


def test_group_without_completed_rollouts_is_fresh():
    assert group_version(group("a", -1, -1)) is None
    fresh, stale = split_by_staleness([group("a", -1)], learner_version=7, max_staleness=0)
    assert (names(fresh), names(stale)) == (["a"], [])


def test_rollout_from_the_future_names_both_versions():
    with pytest.raises(ValueError, match=r"version 8 of question 'a' at learner version 7"):
        split_by_staleness([group("a", 8)], learner_version=7, max_staleness=3)
