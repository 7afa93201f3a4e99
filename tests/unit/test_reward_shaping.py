import pytest

from past_ray.rl.reward_shaping import overlong_penalty


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [(0, 0.0), (12, 0.0), (13, -0.5), (14, -1.0), (16, -2.0), (99, -2.0)],
)
def test_penalty_falls_linearly_over_the_buffer_and_no_further(num_tokens: int, expected: float):
    found = overlong_penalty(num_tokens, max_new_tokens=16, buffer_tokens=4, penalty=2.0)
    assert found == pytest.approx(expected)


def test_buffer_longer_than_the_limit_punishes_from_the_first_token():
    # The line starts at 16 - 32 = -16 tokens: half of the penalty is lost before the first.
    assert overlong_penalty(0, max_new_tokens=16, buffer_tokens=32, penalty=1.0) == -0.5
