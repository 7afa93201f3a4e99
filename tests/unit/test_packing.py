"""Packs hold every sample once, without padding, shifted by one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from past_ray.engine.packing import filler_pack, pack_samples
from past_ray.errors import DataError
from past_ray.rl.types import TrainSample


def sample(length: int, *, trains: set[int] | None = None, first_id: int = 10) -> TrainSample:
    """Ids count up; the last token trains unless ``trains`` says which."""
    chosen = {length - 1} if trains is None else trains
    mask = [index in chosen for index in range(length)]
    return TrainSample(
        token_ids=list(range(first_id, first_id + length)),
        loss_mask=mask,
        generator_logprobs=[-float(index) if on else 0.0 for index, on in enumerate(mask)],
        advantages=[index / 10 if on else 0.0 for index, on in enumerate(mask)],
    )


def test_samples_lie_end_to_end_and_predictors_stand_one_before_their_targets():
    samples = [sample(3, trains={1, 2}), sample(5, trains={2, 4}, first_id=30)]
    (pack,) = pack_samples(samples, max_tokens=8)
    assert pack.indices == (1, 0)
    assert pack.lengths == (5, 3)
    assert pack.token_ids.tolist() == [[30, 31, 32, 33, 34, 10, 11, 12]]
    assert pack.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]
    assert pack.predictors.tolist() == [1, 3, 5, 6]
    assert pack.targets.tolist() == [32, 34, 11, 12]


def test_grid_has_a_row_for_each_sample_without_what_does_not_train():
    samples = [sample(4, trains={1}), sample(9, trains={2, 4, 8})]
    (pack,) = pack_samples(samples, max_tokens=100)
    assert pack.loss_mask.tolist() == [[True, True, True], [True, False, False]]
    assert pack.generator_logprobs.tolist() == [[-2.0, -4.0, -8.0], [-1.0, 0.0, 0.0]]
    torch.testing.assert_close(pack.advantages, torch.tensor([[0.2, 0.4, 0.8], [0.1, 0, 0]]))
    values = torch.tensor([5.0, 6.0, 7.0, 8.0], requires_grad=True)
    grid = pack.grid(values)
    assert grid.tolist() == [[5.0, 6.0, 7.0], [8.0, 0.0, 0.0]]
    (grid * torch.tensor([[1.0, 2.0, 3.0], [4.0, 9.0, 9.0]])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_every_token_but_the_first_can_be_scored():
    (pack,) = pack_samples([sample(3), sample(2)], max_tokens=100, every_token=True)
    assert pack.predictors.tolist() == [0, 1, 3]
    assert pack.targets.tolist() == [11, 12, 11]
    assert pack.loss_mask.tolist() == [[True, True], [True, False]]


@given(st.lists(st.integers(2, 30), max_size=20), st.integers(1, 60))
def test_every_sample_is_in_one_pack_whole_and_within_the_budget(lengths, max_tokens):
    samples = [sample(length, first_id=100 * index) for index, length in enumerate(lengths)]
    packs = pack_samples(samples, max_tokens=max_tokens)
    assert sorted(index for pack in packs for index in pack.indices) == list(range(len(samples)))
    for pack in packs:
        assert sum(pack.lengths) <= max_tokens or len(pack.lengths) == 1
        assert sum(pack.lengths) == pack.token_ids.numel()
        rows = pack.token_ids[0].split(pack.lengths)
        for index, row in zip(pack.indices, rows, strict=True):
            assert row.tolist() == samples[index].token_ids


@given(st.lists(st.integers(2, 30), min_size=1, max_size=30), st.integers(30, 60))
def test_at_most_one_pack_is_less_than_half_full(lengths, max_tokens):
    packs = pack_samples([sample(length) for length in lengths], max_tokens=max_tokens)
    assert sum(2 * sum(pack.lengths) < max_tokens for pack in packs) <= 1


def test_the_longest_sample_comes_first():
    packs = pack_samples([sample(2), sample(9), sample(4)], max_tokens=4)
    assert [pack.lengths for pack in packs] == [(9,), (4,), (2,)]


def test_filler_trains_nothing_and_stands_for_no_sample():
    pack = filler_pack()
    assert pack.indices == ()
    assert pack.token_ids.shape == (1, 2)
    assert pack.predictors.numel() == 0
    assert not pack.loss_mask.any()
    assert pack.loss_mask.shape == (1, 1)


def test_sample_without_a_token_that_trains_keeps_its_row():
    (pack,) = pack_samples([sample(3, trains=set()), sample(2)], max_tokens=9)
    assert pack.loss_mask.tolist() == [[False], [True]]
    assert pack.targets.tolist() == [11]


def test_first_token_that_trains_is_refused():
    with pytest.raises(DataError, match="first token of a sample must not train"):
        pack_samples([sample(3, trains={0, 2})], max_tokens=9)
