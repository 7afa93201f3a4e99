"""Which groups of a step still have to be sampled: none is lost and none is counted twice.

::

    state      event                         next state
    --------   ---------------------------   ----------
    WAITING    take                          TAKEN
    TAKEN      finish                        FINISHED
    TAKEN      requeue (its worker died)     WAITING
    FINISHED   finish again                  FINISHED, the second result is dropped
    any        restart                       WAITING

A group keeps its id through all of this, and its id decides its random numbers.
"""

from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

GroupT = TypeVar("GroupT")


class GroupLedger(Generic[GroupT]):
    """Books of one step; plain and synchronous, so whoever awaits results cannot confuse them.

    Example::

        ledger = GroupLedger(["0/a", "0/b"])
        ledger.take()                      # ["0/a", "0/b"]
        ledger.finish("0/b", group_b)
        ledger.requeue(["0/a", "0/b"])     # only "0/a" waits again
    """

    def __init__(self, group_ids: Sequence[str]) -> None:
        """Let every group wait.

        Raises:
            ValueError: If an id occurs twice; its rollouts would be the same.
        """
        if len(set(group_ids)) != len(group_ids):
            raise ValueError(f"group ids must be unique within a step, found {sorted(group_ids)}")
        self._order = list(group_ids)
        self._waiting = list(group_ids)
        self._finished: dict[str, GroupT] = {}
        self.num_requeued = 0
        """How often a group had to be sampled again."""

        self.num_repeated = 0
        """Results that came a second time and were dropped."""

    @property
    def is_done(self) -> bool:
        """Whether every group is finished."""
        return len(self._finished) == len(self._order)

    @property
    def finished(self) -> list[GroupT]:
        """Finished groups in the order of the ids."""
        return [self._finished[name] for name in self._order if name in self._finished]

    def take(self) -> list[str]:
        """Hand out everything that waits, in order."""
        taken, self._waiting = self._waiting, []
        return taken

    def finish(self, group_id: str, group: GroupT) -> None:
        """Book a result; the first one counts."""
        if group_id in self._finished:
            self.num_repeated += 1
            return
        self._finished[group_id] = group
        if group_id in self._waiting:
            self._waiting.remove(group_id)

    def requeue(self, group_ids: Iterable[str]) -> None:
        """Let those wait again that are not finished."""
        for name in group_ids:
            if name not in self._finished and name not in self._waiting:
                self._waiting.append(name)
                self.num_requeued += 1

    def restart(self) -> None:
        """Forget all results: everything is sampled again, together, as the first time."""
        self.num_requeued += len(self._order) - len(self._waiting)
        self._waiting = list(self._order)
        self._finished = {}
