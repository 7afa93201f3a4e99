"""Dealing groups to workers that die, over fakes of the actors."""

import asyncio

import pytest

from past_ray.errors import ActorLostError
from past_ray.rl.types import RolloutGroup, SamplingParams
from past_ray.runtime.rollout_pool import RolloutPool
from past_ray.runtime.rollout_worker import GroupTask, RolloutPlan, Share
from tests.fake_session import examples

PLAN = RolloutPlan(
    group_size=1,
    sampling=SamplingParams(temperature=1.0, max_new_tokens=4),
    seed=0,
    env_timeout_s=1.0,
)
TASKS = [GroupTask(group_id=f"0/{e.question_id}", example=e) for e in examples(6)]


class FakeGenerator:
    """Ready until it is reported."""

    is_ready = True
    failure = None

    def __init__(self):
        self.handle = object()
        self.num_reports = 0

    def report_lost(self):
        self.num_reports += 1

    async def wait_settled(self):
        pass


class FakeWorker(FakeGenerator):
    """Answers each call as its script says: everything, a part, or with its death."""

    def __init__(self, *script):
        super().__init__()
        self._script = list(script)
        self.asked: list[list[str]] = []

    async def result_of(self, call):
        class Collect:
            @staticmethod
            def remote(tasks, generators, plan):
                return tasks

        class Handle:
            collect = Collect

        tasks = call(Handle)
        self.asked.append([task.group_id for task in tasks])
        outcome = self._script.pop(0) if self._script else "all"
        if outcome == "dies":
            raise ActorLostError("worker died")
        finished = tasks if outcome == "all" else tasks[:1]
        lost = [] if outcome == "all" else [0]
        return Share(
            groups={
                t.group_id: RolloutGroup(question_id=t.group_id, rollouts=[]) for t in finished
            },
            lost_generators=lost,
        )


def collect(workers, *, is_exact=False, generators=None, started_over=None):
    async def start_over():
        if started_over is not None:
            started_over.append(True)

    pool = RolloutPool(workers, generators or [FakeGenerator()], start_over=start_over)
    groups = asyncio.run(asyncio.wait_for(pool.collect(TASKS, PLAN, is_exact=is_exact), 5))
    assert [group.question_id for group in groups] == [task.group_id for task in TASKS]
    return pool


def test_tasks_are_shared_by_all_workers():
    workers = [FakeWorker(), FakeWorker()]
    collect(workers)
    assert workers[0].asked == [["0/q0", "0/q2", "0/q4"]]
    assert workers[1].asked == [["0/q1", "0/q3", "0/q5"]]


def test_the_share_of_a_dead_worker_is_dealt_again_under_the_same_ids():
    workers = [FakeWorker("dies"), FakeWorker()]
    pool = collect(workers)
    again = [ids for worker in workers for ids in worker.asked[1:]]
    assert sorted(i for ids in again for i in ids) == ["0/q0", "0/q2", "0/q4"]
    assert pool.num_requeued == 3


def test_only_what_a_dead_generator_kept_is_sampled_again_and_it_is_reported():
    worker, generator = FakeWorker("part"), FakeGenerator()
    pool = collect([worker], generators=[generator])
    assert worker.asked[1] == [f"0/q{i}" for i in range(1, 6)]
    assert generator.num_reports == 1
    assert pool.num_requeued == 5


def test_an_exact_step_is_repeated_as_a_whole_from_the_same_state():
    worker = FakeWorker("part")
    started_over: list[bool] = []
    collect([worker], is_exact=True, started_over=started_over)
    assert worker.asked == [[t.group_id for t in TASKS]] * 2
    assert started_over == [True]


def test_a_worker_that_dies_again_and_again_is_asked_again():
    worker = FakeWorker("dies", "dies", "dies")
    collect([worker])
    assert len(worker.asked) == 4


def test_an_error_that_is_no_death_ends_the_collection():
    class Broken(FakeWorker):
        async def result_of(self, call):
            raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        collect([Broken()])
