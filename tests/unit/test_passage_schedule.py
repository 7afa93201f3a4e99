"""The schedules and orders that passages are trained with, and a run's length in epochs."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from past_ray.config.sft import SFTConfig
from past_ray.sft.schedule import bucketed_order, cosine_learning_rate, learning_rate


def rates(schedule, num_steps, warmup_frac):
    return [
        learning_rate(
            step, schedule=schedule, num_steps=num_steps, peak=2.0, warmup_frac=warmup_frac
        )
        for step in range(num_steps)
    ]


def test_linear_without_warm_up_falls_by_one_part_a_step_from_the_peak():
    assert rates("linear", 4, 0.0) == [2.0, 1.5, 1.0, 0.5]


def test_linear_after_two_warm_up_steps_starts_again_at_the_peak():
    assert rates("linear", 6, 0.3) == [1.0, 2.0, 2.0, 1.5, 1.0, 0.5]


def test_constant_stays_at_the_peak_after_the_warm_up():
    assert rates("constant", 5, 0.4) == [1.0, 2.0, 2.0, 2.0, 2.0]


def test_cosine_is_the_cosine_schedule_bit_for_bit():
    expected = [
        cosine_learning_rate(step, num_steps=9, peak=2.0, warmup_frac=0.3) for step in range(9)
    ]
    assert rates("cosine", 9, 0.3) == expected


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.integers(1, 3), st.integers(1, 5))
def test_every_epoch_holds_every_example_once_in_the_fewest_steps(lengths, num_epochs, batch_size):
    order = bucketed_order(lengths, num_epochs=num_epochs, batch_size=batch_size, seed=0)
    per_epoch = -(-len(lengths) // batch_size)
    assert len(order) == num_epochs * per_epoch
    for start in range(0, len(order), per_epoch):
        epoch = order[start : start + per_epoch]
        assert sorted(index for step in epoch for index in step) == list(range(len(lengths)))
        assert max(map(len, epoch)) <= batch_size


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.integers(1, 5))
def test_batches_of_one_epoch_do_not_overlap_in_length(lengths, batch_size):
    order = bucketed_order(lengths, num_epochs=1, batch_size=batch_size, seed=0)
    spans = sorted((min(s), max(s)) for s in ([lengths[i] for i in step] for step in order))
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))


def test_epochs_and_seeds_differ_in_their_order():
    order = bucketed_order(range(1, 9), num_epochs=2, batch_size=1, seed=0)
    assert order[:8] != order[8:]
    assert order != bucketed_order(range(1, 9), num_epochs=2, batch_size=1, seed=1)


@pytest.mark.parametrize(
    ("num_epochs", "num_examples", "batch_size", "num_steps"),
    [(1, 2000, 8, 250), (1, 2001, 8, 251), (10, 11, 1, 110), (0.5, 10, 4, 2), (0.07, 100, 1, 7)],
)
def test_epochs_become_steps(num_epochs, num_examples, batch_size, num_steps):
    sft = SFTConfig(num_epochs=num_epochs, batch_size=batch_size)
    resolved = sft.resolved(num_examples)
    assert (resolved.num_steps, resolved.num_epochs) == (num_steps, None)
    assert resolved.resolved(7) == resolved


def test_a_recipe_in_steps_is_resolved_to_itself():
    assert SFTConfig(num_steps=30).resolved(1000) == SFTConfig(num_steps=30)


def test_only_one_of_steps_and_epochs_decides_the_length():
    with pytest.raises(ValidationError, match="one of num_steps and num_epochs"):
        SFTConfig(num_steps=30, num_epochs=2)


def test_a_recipe_in_epochs_survives_being_written_and_read():
    sft = SFTConfig(num_epochs=1.5)
    assert SFTConfig.model_validate_json(sft.model_dump_json()) == sft
