"""The loop with rollouts ahead of the learner: the bound, no deadlock, buffer, dynamic sampling."""

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from past_ray.config.algorithm import DAPOConfig
from past_ray.config.rl import RLConfig
from past_ray.runtime.run_state import read_buffer
from tests.fake_session import FakeSession, examples, train

RL = RLConfig(num_steps=6, prompts_per_step=2, group_size=2, checkpoint_every_steps=2)


def with_staleness(bound: int, **changes) -> RLConfig:
    return RL.model_copy(update={"max_staleness": bound, **changes})


def test_the_next_step_is_sampled_while_the_learner_works(tmp_path):
    session = FakeSession()
    train(session, tmp_path, rl=with_staleness(1, num_steps=3), examples=examples(5))
    order = [event for event in session.events if event[0] in "ct"]
    assert order[:4] == ["collect 0", "collect 1", "train 4", "collect 2"]


@settings(max_examples=15, deadline=None)
@given(bound=st.integers(0, 4), seed=st.integers(0, 1000))
def test_no_delay_makes_a_deadlock_or_breaks_the_bound(tmp_path_factory, bound, seed):
    session = FakeSession(delays=random.Random(seed))
    work_dir = tmp_path_factory.mktemp("run")

    async def bounded():
        from past_ray.runtime.controller import RLRun, train_grpo

        run = RLRun(
            init_folder=work_dir, reference_folder=work_dir, work_dir=work_dir / "rl", seed=0
        )
        rows: list[dict] = []
        await asyncio.wait_for(
            train_grpo(
                session,
                run,
                with_staleness(bound),
                examples=examples(7),
                probe=[[1]],
                on_step=rows.append,
            ),
            timeout=30,
        )
        return rows

    rows = asyncio.run(bounded())
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert max(row["staleness_max"] for row in rows) <= bound
    assert [version for version, _ in session.trained] == [0, 1, 2, 3, 4, 5]


def test_staleness_reaches_the_bound_and_is_counted_by_age(tmp_path):
    _, rows = train(FakeSession(), tmp_path, rl=with_staleness(2), examples=examples(5))
    assert [row["staleness_max"] for row in rows] == [0, 1, 2, 2, 2, 2]
    assert rows[0]["staleness_0"] == 4
    assert rows[5]["staleness_2"] == 4


def test_too_old_rollouts_are_discarded_counted_and_sampled_anew(tmp_path):
    class Late(FakeSession):
        """Its first answer to step 2 comes from weights two versions too old."""

        async def collect(self, tasks, plan, *, is_exact):
            is_first = f"collect {tasks[0].group_id[0]}" not in self.events
            self._version_lag = 2 if tasks[0].group_id[0] == "2" and is_first else 0
            return await super().collect(tasks, plan, is_exact=is_exact)

    session = Late()
    _, rows = train(session, tmp_path, rl=with_staleness(1), examples=examples(5))
    assert session.events.count("collect 2") == 2
    assert rows[1]["discarded_rollouts"] == 0
    assert rows[2]["discarded_rollouts"] == 4
    assert max(row["staleness_max"] for row in rows) <= 1


def test_a_checkpoint_holds_the_groups_sampled_ahead_and_a_run_uses_them(tmp_path):
    short = with_staleness(1, num_steps=2, checkpoint_every_steps=1)

    class Stopped(FakeSession):
        async def train_step(self, samples):
            await asyncio.sleep(0.01)  # Time for step 2 to be sampled.
            if self._version == 2:
                raise KeyboardInterrupt
            return await super().train_step(samples)

    rl = with_staleness(1, checkpoint_every_steps=1)
    del short
    with pytest.raises(KeyboardInterrupt):
        train(Stopped(), tmp_path, rl=rl, examples=examples(5))
    ahead = read_buffer(tmp_path / "step-000002")
    assert list(ahead) == [2]
    ids = [r.rollout_id for group in ahead[2] for r in group.rollouts]
    again = FakeSession()
    train(again, tmp_path, rl=rl, examples=examples(5))
    assert "collect 2" not in again.events
    assert "collect 3" in again.events
    assert [f"2/{q}/0" for q in again.trained[0][1][::2]] == ids[::2]


def test_lost_learners_drop_what_was_sampled_for_the_lost_steps(tmp_path):
    session = FakeSession(lose_learner_at=[3])
    train(session, tmp_path, rl=with_staleness(1), examples=examples(5))
    assert [version for version, _ in session.trained] == [0, 1, 2, 2, 3, 4, 5]


DAPO = {"algorithm": DAPOConfig(max_draws=3)}


def test_dynamic_sampling_draws_until_every_group_has_a_spread(tmp_path):
    session = FakeSession(constant_questions={"q0", "q1", "q2"})
    rl = with_staleness(0, num_steps=3, **DAPO)
    _, rows = train(session, tmp_path, rl=rl, examples=examples(6))
    for _, questions in session.trained:
        assert len(set(questions)) == 2
        assert not {"q0", "q1", "q2"} & set(questions)
    assert sum(row["constant_groups_dropped"] for row in rows) > 0


def test_dynamic_sampling_stops_at_its_limit_and_trains_what_it_has(tmp_path):
    session = FakeSession(constant_questions={f"q{i}" for i in range(1, 12)})
    rl = with_staleness(0, num_steps=1, **{"algorithm": DAPOConfig(max_draws=2)})
    train(session, tmp_path, rl=rl, examples=examples(12))
    assert sum(len(asked) for asked in session.questions) <= 4


def test_the_spares_of_a_step_are_the_same_in_a_repeated_run(tmp_path):
    runs = []
    for name in ("a", "b"):
        session = FakeSession(constant_questions={"q0", "q1", "q2"})
        rl = with_staleness(0, num_steps=3, **DAPO)
        train(session, tmp_path / name, rl=rl, examples=examples(6))
        runs.append(session.questions)
    assert runs[0] == runs[1]
