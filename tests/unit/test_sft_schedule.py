import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from past_ray.sft.schedule import cosine_learning_rate, example_order


def rates(num_steps, warmup_frac):
    return [
        cosine_learning_rate(step, num_steps=num_steps, peak=2.0, warmup_frac=warmup_frac)
        for step in range(num_steps)
    ]


def test_ten_steps_with_two_of_warm_up_rise_to_the_peak_and_fall_along_the_cosine():
    values = rates(10, 0.2)
    assert values[:3] == [1.0, 2.0, 2.0]
    assert values[6] == pytest.approx(1.0)  # half of the 8 steps after the warm-up
    assert values[8] == pytest.approx(2.0 * (1 - 2**-0.5) / 2)  # cos(3 pi / 4)
    assert values == sorted(values[:2]) + sorted(values[2:], reverse=True)


def test_no_step_has_a_rate_of_zero():
    assert min(rates(1, 0.0) + rates(3, 0.5) + rates(100, 0.05)) > 0


def test_an_epoch_uses_every_example_once_and_steps_run_across_epochs():
    order = example_order(5, num_steps=5, batch_size=3, seed=1)
    flat = [index for step in order for index in step]
    assert [len(step) for step in order] == [3] * 5
    assert sorted(flat[:5]) == sorted(flat[5:10]) == sorted(flat[10:]) == [0, 1, 2, 3, 4]
    assert flat[:5] != flat[5:10]


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_a_longer_run_starts_with_the_shorter_one(num_examples, num_steps, batch_size, seed):
    def order(steps):
        return example_order(num_examples, num_steps=steps, batch_size=batch_size, seed=seed)

    assert order(num_steps + 3)[:num_steps] == order(num_steps)


def test_another_seed_is_another_order():
    orders = {str(example_order(50, num_steps=2, batch_size=25, seed=seed)) for seed in range(4)}
    assert len(orders) == 4
