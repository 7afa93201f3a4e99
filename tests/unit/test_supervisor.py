"""Replaceable actors over fake handles: heartbeat, restart with backoff, no call left waiting."""

import asyncio
import time

import pytest
from ray.exceptions import RayActorError

from past_ray.errors import ActorLostError, ClusterError
from past_ray.runtime.supervisor import RestartPolicy, SupervisedActor, ready_among

POLICY = RestartPolicy(
    heartbeat_interval_s=0.01,
    heartbeat_timeout_s=0.05,
    backoff_s=0.02,
    max_backoff_s=0.05,
    max_restarts=3,
)


class Remote:
    """A method of a fake actor: ``.remote(...)`` gives an awaitable."""

    def __init__(self, method):
        self.remote = method


class FakeActor:
    """Dies or hangs on demand."""

    def __init__(self):
        self.is_dead = False
        self.is_hung = False
        self.prepared = False
        self.ping = Remote(self._answer)
        self.work = Remote(self._answer)

    async def _answer(self, value="pong"):
        while True:
            if self.is_dead:
                raise RayActorError()
            if not self.is_hung:
                return value
            await asyncio.sleep(0.005)


def supervised(made: list[FakeActor], *, failing: int = 0, policy=POLICY) -> SupervisedActor:
    """The first ``failing`` successors of the first actor do not come up."""

    def create():
        made.append(FakeActor())
        return made[-1]

    async def prepare(handle):
        if 1 < len(made) <= 1 + failing:
            raise RayActorError()
        handle.prepared = True

    return SupervisedActor("generator 0", create=create, prepare=prepare, policy=policy)


async def back(actor: SupervisedActor, made: list[FakeActor], count: int) -> None:
    async with asyncio.timeout(5):
        while not (actor.is_ready and len(made) >= count):
            await asyncio.sleep(0.005)


def run(test):
    asyncio.run(asyncio.wait_for(test, 10))


def test_a_dead_actor_is_replaced_and_prepared_before_it_is_handed_out():
    async def test():
        made: list[FakeActor] = []
        actor = supervised(made)
        await actor.start()
        made[0].is_dead = True
        await back(actor, made, 2)
        assert actor.handle is made[1]
        assert made[1].prepared
        assert actor.num_restarts == 1
        actor.close()

    run(test())


def test_a_silent_actor_is_replaced_after_the_heartbeat_timeout():
    async def test():
        made: list[FakeActor] = []
        actor = supervised(made)
        await actor.start()
        made[0].is_hung = True
        await back(actor, made, 2)
        actor.close()

    run(test())


def test_a_call_to_a_hanging_actor_fails_when_the_heartbeat_does():
    async def test():
        made: list[FakeActor] = []
        actor = supervised(made)
        await actor.start()
        made[0].is_hung = True
        started = time.perf_counter()
        with pytest.raises(ActorLostError, match="generator 0 stopped answering"):
            await actor.result_of(lambda handle: handle.work.remote(1))
        assert time.perf_counter() - started < 1
        actor.close()

    run(test())


def test_a_call_to_a_dying_actor_fails_and_reports_it():
    async def test():
        made: list[FakeActor] = []
        patient = RestartPolicy(
            heartbeat_interval_s=100,
            heartbeat_timeout_s=100,
            backoff_s=0.0,
            max_backoff_s=0.0,
            max_restarts=1,
        )
        actor = supervised(made, policy=patient)
        await actor.start()
        made[0].is_dead = True
        with pytest.raises(ActorLostError, match="generator 0 died"):
            await actor.result_of(lambda handle: handle.work.remote(1))
        await back(actor, made, 2)  # No heartbeat was due for 100 s.
        assert await actor.result_of(lambda handle: handle.work.remote(7)) == 7
        actor.close()

    run(test())


def test_pauses_double_between_restarts_in_a_row():
    async def test():
        made: list[FakeActor] = []
        actor = supervised(made, failing=2)
        await actor.start()
        made[0].is_dead = True
        started = time.perf_counter()
        await back(actor, made, 4)
        # 0.02 + 0.04 + 0.05 (the longest) s of pauses, within what a busy machine adds.
        assert 0.11 <= time.perf_counter() - started < 2
        actor.close()

    run(test())


def test_an_actor_that_never_comes_back_is_given_up_with_an_error():
    async def test():
        made: list[FakeActor] = []
        actor = supervised(made, failing=99)
        await actor.start()
        made[0].is_dead = True
        while actor.failure is None:
            await asyncio.sleep(0.01)
        with pytest.raises(ClusterError, match="3 restarts in a row failed"):
            await ready_among([actor])
        assert len(made) == 4
        actor.close()

    run(test())


def test_the_others_go_on_while_one_is_away():
    async def test():
        gone: list[FakeActor] = []
        here: list[FakeActor] = []
        away, stays = supervised(gone, failing=99), supervised(here)
        await away.start()
        await stays.start()
        gone[0].is_dead = True
        while away.is_ready:
            await asyncio.sleep(0.005)
        assert await ready_among([away, stays]) == [stays]
        away.close()
        stays.close()

    run(test())


def test_who_waits_for_any_actor_gets_the_first_that_returns():
    async def test():
        made: list[FakeActor] = []
        actor = supervised(made, failing=1)
        await actor.start()
        actor.report_lost()
        assert await ready_among([actor]) == [actor]
        assert actor.handle is made[2]
        actor.close()

    run(test())
