"""Samples laid end to end in one row, so that no layer computes on padding or twice on a prompt.

``samples -> pack_samples -> packs -> engine.scoring``

The rollouts of a group begin with the same prompt; it stands in the row once, and each of them goes
on from it. Two samples ``4 5 | 2 3`` and ``4 5 | 7`` with the prompt ``4 5``::

    token_ids      [[4, 5, 2, 3, 7]]     position_ids  [[0, 1, 2, 3, 2]]
    segments       (2, no prompt), (2, prompt 0), (1, prompt 0)
    predictors     [1, 2, 1]             what stands there predicts the tokens that train
    targets        [2, 3, 7]             those tokens: the shift by one happens here, nowhere else
    slots          [0, 1, 2]             their places in the [B, L] grid below, row after row
    loss_mask      [[T, T], [T, F]]      row b is a sample without what does not train

Losses see the grid: B = samples, L = the most tokens that train in one of them. A sample is never
split, so that terms of a whole rollout find it in one row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from past_ray.errors import DataError
from past_ray.rl.types import TrainSample


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A stretch of the row whose tokens follow each other."""

    length: int
    """Tokens."""

    prompt: int | None = None
    """Place of the segment that comes before this one in its sequence; None where it begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """Samples of one forward pass. N = tokens of all of them, n = tokens that train."""

    token_ids: Tensor  # [1, N]
    """All segments, one after the other."""

    position_ids: Tensor  # [1, N]
    """Counts from 0 in each sample."""

    segments: tuple[Segment, ...]
    """What the row is made of."""

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
    """Fill packs of at most ``max_tokens`` tokens: largest first, each to the first with room.

    A run that lacks memory so fails in its first pass. Samples with the same prompt stay together
    as far as the budget allows; one that is longer than the budget gets a pack of its own.

    Args:
        samples: What to pack.
        max_tokens: Budget of a pack; a shared prompt counts once.
        every_token: Score all tokens but the first instead of those that train.

    Raises:
        DataError: If the first token of a sample trains: nothing predicts it.
    """
    members: list[list[list[int]]] = []
    room: list[int] = []
    families = _families(samples, max_tokens)
    sizes = [_num_tokens(samples, family) for family in families]
    for index in sorted(range(len(families)), key=lambda i: (-sizes[i], i)):
        place = next((i for i, left in enumerate(room) if left >= sizes[index]), len(room))
        if place == len(room):
            members.append([])
            room.append(max_tokens)
        members[place].append(families[index])
        room[place] -= sizes[index]
    return [_pack(samples, family, every_token=every_token) for family in members]


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
    return replace(_pack([sample], [[0]], every_token=False), indices=())


def _prompt_length(sample: TrainSample) -> int:
    """Tokens before the first that trains; at least one token follows."""
    first = sample.loss_mask.index(True) if any(sample.loss_mask) else 0
    return min(first, len(sample.token_ids) - 1)


def _families(samples: Sequence[TrainSample], max_tokens: int) -> list[list[int]]:
    """Group samples by their prompts, each group within the budget if it has several."""
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for index, sample in enumerate(samples):
        by_prompt.setdefault(tuple(sample.token_ids[: _prompt_length(sample)]), []).append(index)
    families: list[list[int]] = []
    for prompt, indices in by_prompt.items():
        left = 0
        # Neighbours of equal length attend in one call.
        by_length = sorted(indices, key=lambda i: -len(samples[i].token_ids))
        for position, index in enumerate(by_length):
            rest = len(samples[index].token_ids) - len(prompt)
            if position == 0 or rest > left or not prompt:
                families.append([])
                left = max_tokens - len(prompt)
            families[-1].append(index)
            left -= rest
    return families


def _num_tokens(samples: Sequence[TrainSample], family: Sequence[int]) -> int:
    shared = _prompt_length(samples[family[0]]) * (len(family) - 1)
    return sum(len(samples[index].token_ids) for index in family) - shared


@dataclass(slots=True)
class _Row:
    """A row while it grows."""

    token_ids: list[int] = field(default_factory=list[int])
    position_ids: list[int] = field(default_factory=list[int])
    segments: list[Segment] = field(default_factory=list[Segment])

    def add(self, token_ids: list[int], *, first_position: int, prompt: int | None) -> int:
        """Append a segment; return where it begins."""
        start = len(self.token_ids)
        self.token_ids += token_ids
        self.position_ids += range(first_position, first_position + len(token_ids))
        self.segments.append(Segment(length=len(token_ids), prompt=prompt))
        return start

    def add_family(self, rows: Sequence[TrainSample]) -> list[list[int]]:
        """Append samples with one prompt; return where each token of each sample stands."""
        if len(rows) == 1:
            ids = rows[0].token_ids
            start = self.add(ids, first_position=0, prompt=None)
            return [list(range(start, start + len(ids)))]
        num_prompt = _prompt_length(rows[0])
        place = len(self.segments)
        start = self.add(rows[0].token_ids[:num_prompt], first_position=0, prompt=None)
        shared = list(range(start, start + num_prompt))
        places: list[list[int]] = []
        for row in rows:
            rest = row.token_ids[num_prompt:]
            start = self.add(rest, first_position=num_prompt, prompt=place)
            places.append(shared + list(range(start, start + len(rest))))
        return places


def _pack(
    samples: Sequence[TrainSample], families: Sequence[Sequence[int]], *, every_token: bool
) -> Pack:
    row = _Row()
    indices = [index for family in families for index in family]
    places = [
        place for family in families for place in row.add_family([samples[i] for i in family])
    ]
    rows = [samples[index] for index in indices]
    trained = [_trained_positions(sample, every_token=every_token) for sample in rows]
    width = max(1, *map(len, trained))
    slots = [r * width + column for r, at in enumerate(trained) for column in range(len(at))]

    def grid(name: str) -> Tensor:
        filled = torch.zeros(len(rows), width)
        for target, sample, at in zip(filled, rows, trained, strict=True):
            values: list[float] = getattr(sample, name)
            target[: len(at)] = torch.tensor([values[position] for position in at])
        return filled

    counts = torch.tensor([len(at) for at in trained])
    chosen = list(zip(rows, places, trained, strict=True))
    return Pack(
        token_ids=torch.tensor([row.token_ids]),
        position_ids=torch.tensor([row.position_ids]),
        segments=tuple(row.segments),
        predictors=torch.tensor([at[p - 1] for _, at, ps in chosen for p in ps], dtype=torch.long),
        targets=torch.tensor([s.token_ids[p] for s, _, ps in chosen for p in ps], dtype=torch.long),
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
