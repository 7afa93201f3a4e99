"""Packs hold every sample once, without padding, shifted by one."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from past_ray.engine.packing import Pack, Segment, filler_pack, pack_samples
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


def lengths(pack: Pack) -> list[int]:
    return [segment.length for segment in pack.segments]


def sequences(pack: Pack) -> list[list[int]]:
    """The samples that a row stands for, put together again from its segments."""
    parts = [part.tolist() for part in pack.token_ids[0].split(lengths(pack))]
    prompts = {segment.prompt for segment in pack.segments}
    return [
        (parts[segment.prompt] if segment.prompt is not None else []) + part
        for index, (segment, part) in enumerate(zip(pack.segments, parts, strict=True))
        if index not in prompts
    ]


def test_samples_lie_end_to_end_and_predictors_stand_one_before_their_targets():
    samples = [sample(3, trains={1, 2}), sample(5, trains={2, 4}, first_id=30)]
    (pack,) = pack_samples(samples, max_tokens=8)
    assert pack.indices == (1, 0)
    assert lengths(pack) == [5, 3]
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


@given(st.lists(st.tuples(st.integers(2, 30), st.integers(0, 29)), max_size=20), st.integers(1, 60))
def test_every_sample_is_in_one_pack_whole_and_within_the_budget(shapes, max_tokens):
    samples = [
        replace(sample(length), token_ids=[*prompt, *range(9, 9 + length - len(prompt))])
        for length, prompt in ((n, [7] * min(k, n - 1)) for n, k in shapes)
    ]
    packs = pack_samples(samples, max_tokens=max_tokens)
    assert sorted(index for pack in packs for index in pack.indices) == list(range(len(samples)))
    for pack in packs:
        assert pack.token_ids.numel() <= max_tokens or len(pack.indices) == 1
        assert sequences(pack) == [samples[index].token_ids for index in pack.indices]


@given(st.lists(st.integers(2, 30), min_size=1, max_size=30), st.integers(30, 60))
def test_at_most_one_pack_is_less_than_half_full(sizes, max_tokens):
    packs = pack_samples([sample(length) for length in sizes], max_tokens=max_tokens)
    assert sum(2 * pack.token_ids.numel() < max_tokens for pack in packs) <= 1


def test_a_prompt_that_samples_share_stands_in_the_row_once():
    short = replace(sample(3), token_ids=[4, 5, 7])
    long = replace(sample(4, trains={2, 3}), token_ids=[4, 5, 2, 3])
    other = sample(3, first_id=50)
    (pack,) = pack_samples([short, long, other], max_tokens=99)
    assert pack.token_ids.tolist() == [[4, 5, 2, 3, 7, 50, 51, 52]]
    assert pack.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1, 2]]
    expected = (Segment(length=2), Segment(length=2, prompt=0), Segment(length=1, prompt=0))
    assert pack.segments == (*expected, Segment(length=3))
    # Both first answers are predicted by the prompt's last token.
    assert pack.predictors.tolist() == [1, 2, 1, 6]
    assert pack.targets.tolist() == [2, 3, 7, 52]
    assert pack.indices == (1, 0, 2)


def test_a_family_larger_than_the_budget_repeats_its_prompt():
    family = [replace(sample(6), token_ids=[1, 2, 3, 4, 5, 60 + i]) for i in range(4)]
    packs = pack_samples(family, max_tokens=7)
    assert [lengths(pack) for pack in packs] == [[5, 1, 1], [5, 1, 1]]


def test_the_longest_sample_comes_first():
    packs = pack_samples([sample(2), sample(9), sample(4)], max_tokens=4)
    assert [lengths(pack) for pack in packs] == [[9], [4], [2]]


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
