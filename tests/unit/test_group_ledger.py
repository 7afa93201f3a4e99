"""No group is lost and none is counted twice, whatever dies in between."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from past_ray.rl.group_ledger import GroupLedger

IDS = ["0/a", "0/b", "0/c"]


def test_groups_come_in_order_however_they_finish():
    ledger = GroupLedger(IDS)
    for name in reversed(ledger.take()):
        ledger.finish(name, name.upper())
    assert ledger.is_done
    assert ledger.finished == ["0/A", "0/B", "0/C"]


def test_only_unfinished_groups_wait_again():
    ledger = GroupLedger(IDS)
    ledger.take()
    ledger.finish("0/b", 1)
    ledger.requeue(IDS)
    assert ledger.take() == ["0/a", "0/c"]
    assert ledger.num_requeued == 2


def test_a_second_result_is_dropped_and_counted():
    ledger = GroupLedger(IDS)
    ledger.take()
    ledger.finish("0/a", "first")
    ledger.finish("0/a", "second")
    assert ledger.finished == ["first"]
    assert ledger.num_repeated == 1


def test_a_late_result_of_a_requeued_group_is_not_sampled_again():
    ledger = GroupLedger(IDS)
    ledger.take()
    ledger.requeue(["0/a"])
    ledger.finish("0/a", "late")
    assert ledger.take() == []


def test_restart_forgets_everything():
    ledger = GroupLedger(IDS)
    ledger.take()
    ledger.finish("0/a", 1)
    ledger.restart()
    assert ledger.take() == IDS
    assert ledger.finished == []


def test_equal_ids_are_refused():
    with pytest.raises(ValueError, match="unique within a step"):
        GroupLedger(["0/a", "0/a"])


@given(st.lists(st.tuples(st.sampled_from(IDS), st.booleans()), max_size=30))
def test_whatever_happens_every_group_ends_once(events):
    ledger = GroupLedger(IDS)
    for name, is_lost in events:
        ledger.take()
        if is_lost:
            ledger.requeue([name])
        else:
            ledger.finish(name, name)
    ledger.requeue(IDS)
    for name in ledger.take():
        ledger.finish(name, name)
    assert ledger.finished == IDS
