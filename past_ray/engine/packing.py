"""Samples laid end to end in one row, so that no layer ever computes on padding.

``samples -> pack_samples -> packs -> engine.scoring``

Two samples of 3 and 2 tokens, the last token of each sampled::

    token_ids      [[4, 5, 7, 4, 2]]     position_ids  [[0, 1, 2, 0, 1]]     lengths  (3, 2)
    predictors     [1, 3]                what stands there predicts the tokens that train
    targets        [7, 2]                those tokens: the shift by one happens here, nowhere else
    slots          [0, 1]                their places in the [B, L] grid below, row after row
    loss_mask      [[T], [T]]            row b is sample b without what does not train

Losses see the grid: B = samples, L = the most tokens that train in one of them. A sample is never
split, so that terms of a whole rollout find it in one row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from past_ray.errors import DataError
from past_ray.rl.types import TrainSample


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """Samples of one forward pass. N = tokens of all of them, n = tokens that train."""

    token_ids: Tensor  # [1, N]
    """All samples, one after the other."""

    position_ids: Tensor  # [1, N]
    """Counts from 0 in each sample."""

    lengths: tuple[int, ...]
    """Tokens of each sample."""

    predictors: Tensor  # [n]
    """Positions in the row before each token that trains; only they reach the vocabulary."""

    targets: Tensor  # [n]
    """The tokens that train."""

    slots: Tensor  # [n]
    """Place of each in the flattened ``[B, L]`` grid."""

    loss_mask: Tensor  # [B, L]
    """True where the grid holds a token."""

    generator_logprobs: Tensor  # [B, L]
    """0 where ``loss_mask`` is False."""

    advantages: Tensor  # [B, L]
    """0 where ``loss_mask`` is False."""

    indices: tuple[int, ...]
    """Place of each sample in the sequence that was packed; empty for a filler."""

    def to(self, device: str) -> "Pack":
        """Return the pack with its tensors on ``device``."""
        tensors = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **tensors)

    def grid(self, values: Tensor) -> Tensor:
        """Lay ``[n]`` values out as ``[B, L]`` with 0 elsewhere; differentiable."""
        flat = values.new_zeros(self.loss_mask.numel())
        return flat.scatter(0, self.slots, values).view(self.loss_mask.shape)


def pack_samples(
    samples: Sequence[TrainSample], *, max_tokens: int, every_token: bool = False
) -> list[Pack]:
    """Fill packs of at most ``max_tokens`` real tokens: longest first, each to the first with room.

    A run that lacks memory so fails in its first pass. A sample longer than the budget gets a pack
    of its own.

    Args:
        samples: What to pack.
        max_tokens: Budget of a pack.
        every_token: Score all tokens but the first instead of those that train.

    Raises:
        DataError: If the first token of a sample trains: nothing predicts it.
    """
    members: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(samples)), key=lambda i: (-len(samples[i].token_ids), i)):
        length = len(samples[index].token_ids)
        place = next((i for i, left in enumerate(room) if left >= length), len(room))
        if place == len(room):
            members.append([])
            room.append(max_tokens)
        members[place].append(index)
        room[place] -= length
    return [_pack(samples, indices, every_token=every_token) for indices in members]


def filler_pack() -> Pack:
    """Return a pack in which nothing trains, for a rank that has fewer packs than the others.

    Every rank must run the same number of passes, or sharded layers wait forever.
    """
    sample = TrainSample(
        token_ids=[0, 0],
        loss_mask=[False, False],
        generator_logprobs=[0.0, 0.0],
        advantages=[0.0, 0.0],
    )
    return replace(_pack([sample], [0], every_token=False), indices=())


def _pack(samples: Sequence[TrainSample], indices: Sequence[int], *, every_token: bool) -> Pack:
    rows = [samples[index] for index in indices]
    lengths = [len(row.token_ids) for row in rows]
    trained = [_trained_positions(row, every_token=every_token) for row in rows]
    width = max(1, *map(len, trained))
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    positions = [
        start + position for start, row in zip(starts, trained, strict=False) for position in row
    ]
    slots = [row * width + column for row, at in enumerate(trained) for column in range(len(at))]
    token_ids = torch.tensor([token for row in rows for token in row.token_ids])
    chosen = torch.tensor(positions, dtype=torch.long)

    def grid(name: str) -> Tensor:
        filled = torch.zeros(len(rows), width)
        for target, row, at in zip(filled, rows, trained, strict=True):
            values: list[float] = getattr(row, name)
            target[: len(at)] = torch.tensor([values[position] for position in at])
        return filled

    counts = torch.tensor([len(at) for at in trained])
    return Pack(
        token_ids=token_ids.unsqueeze(0),
        position_ids=torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),
        lengths=tuple(lengths),
        predictors=chosen - 1,
        targets=token_ids[chosen],
        slots=torch.tensor(slots, dtype=torch.long),
        loss_mask=torch.arange(width) < counts.unsqueeze(1),
        generator_logprobs=grid("generator_logprobs"),
        advantages=grid("advantages"),
        indices=tuple(indices),
    )


def _trained_positions(sample: TrainSample, *, every_token: bool) -> list[int]:
    if every_token:
        return list(range(1, len(sample.token_ids)))
    if sample.loss_mask[0]:
        raise DataError(
            "The first token of a sample must not train, because nothing predicts it, got a "
            f"loss_mask that is True there ({len(sample.token_ids)} tokens). Give the prompt at "
            "least a start token."
        )
    return [position for position, trains in enumerate(sample.loss_mask) if trains]
