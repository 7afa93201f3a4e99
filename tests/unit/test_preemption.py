"""Notices of machines that are about to go: SIGTERM and drained nodes."""

import asyncio
import os
import signal

import pytest

from past_ray.runtime import preemption
from past_ray.runtime.preemption import PreemptionNotice


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(preemption, "NOTICE_INTERVAL_S", 0.01)


def run(test):
    asyncio.run(asyncio.wait_for(test, 5))


def test_a_drained_node_asks_for_a_checkpoint_once():
    draining: set[str] = set()

    async def test():
        async with PreemptionNotice(find_draining=lambda: set(draining)) as notice:
            await asyncio.sleep(0.05)
            assert not notice.given.is_set()
            draining.add("node-1")
            await notice.given.wait()
            assert not notice.must_stop
            notice.answered()
            await asyncio.sleep(0.05)
            assert not notice.given.is_set()
            draining.add("node-2")
            await notice.given.wait()

    run(test())


def test_sigterm_asks_for_a_checkpoint_and_the_end():
    async def test():
        async with PreemptionNotice(find_draining=set) as notice:
            os.kill(os.getpid(), signal.SIGTERM)
            await notice.given.wait()
            assert notice.must_stop

    run(test())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_without_a_cluster_no_node_is_drained():
    assert preemption.draining_nodes() == set()
