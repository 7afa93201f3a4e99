"""The ordered plan of a run as Parquet: which rank trains on what, in which step.

Each rank has its own files and reads them in order, so its share of a step does not depend on how
a reader distributes blocks::

    FOLDER/rank_0/part_00000.parquet    step  position  token_ids      num_prompt_tokens
                                           0         0  [7, 8, 9, 2]                   0
                                           0         2  [7, 8, 2]                      0
                                           1         0  [5, 2]                         0
    FOLDER/rank_1/part_00000.parquet       0         1  [6, 8, 9, 2]                   0

``position`` is the place in the whole step, sorted by length: ranks get examples of like lengths.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from past_ray.errors import DataError
from past_ray.sft.examples import SFTExample

PLAN_SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("position", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        ("num_prompt_tokens", pa.int32()),
    ]
)

EXAMPLES_PER_FILE = 16384
"""A file is read as one block: this bounds a reader's memory (64 MiB at 1,024 tokens each)."""


def write_plan(
    folder: Path,
    examples: Sequence[SFTExample],
    order: Sequence[Sequence[int]],
    *,
    num_ranks: int,
    examples_per_file: int = EXAMPLES_PER_FILE,
) -> list[list[Path]]:
    """Write every rank's files.

    Args:
        folder: Existing directory to write into.
        examples: The data set.
        order: Per step, indices into ``examples``; as many as ``num_ranks`` divides.
        num_ranks: Ranks that train together.
        examples_per_file: Rough size of one file; a step is never cut.

    Returns:
        Per rank, its files in reading order.
    """
    steps_per_file = max(1, examples_per_file * num_ranks // len(order[0]))
    files: list[list[Path]] = [[] for _ in range(num_ranks)]
    for rank in range(num_ranks):
        rank_folder = folder / f"rank_{rank}"
        rank_folder.mkdir()
        for start in range(0, len(order), steps_per_file):
            steps = range(start, min(start + steps_per_file, len(order)))
            rows = [
                row
                for step in steps
                for row in _rank_rows(step, examples, order[step], rank=rank, num_ranks=num_ranks)
            ]
            file = rank_folder / f"part_{start // steps_per_file:05d}.parquet"
            pq.write_table(pa.Table.from_pylist(rows, schema=PLAN_SCHEMA), file)
            files[rank].append(file)
    return files


def read_share(
    columns: Mapping[str, list[int] | list[list[int]]], *, step: int, rank: int, num_ranks: int
) -> list[SFTExample]:
    """Turn the rows that one rank read for one step into examples.

    Raises:
        DataError: The rows are not this rank's share of ``step``, in order.
    """
    steps, positions = columns["step"], columns["position"]
    expected = [rank + num_ranks * index for index in range(len(positions))]
    if steps != [step] * len(steps) or positions != expected:
        raise DataError(
            f"Rank {rank} must read positions {expected[:3]}... of step {step}, found positions "
            f"{positions[:3]}... of steps {steps[:3]}... . The reader has lost the plan's order; "
            "Ray Data must run with preserve_order."
        )
    return [
        SFTExample(token_ids=tuple(token_ids), num_prompt_tokens=num_prompt_tokens)
        for token_ids, num_prompt_tokens in zip(
            columns["token_ids"], columns["num_prompt_tokens"], strict=True
        )
        if isinstance(token_ids, list) and isinstance(num_prompt_tokens, int)
    ]


def hash_examples(examples: Sequence[SFTExample]) -> str:
    """Return a SHA-256 that changes with any example or with their order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((example.token_ids, example.num_prompt_tokens)).encode())
    return digest.hexdigest()


def _rank_rows(
    step: int,
    examples: Sequence[SFTExample],
    indices: Sequence[int],
    *,
    rank: int,
    num_ranks: int,
) -> list[dict[str, object]]:
    by_length = sorted(indices, key=lambda index: -len(examples[index].token_ids))
    return [
        {
            "step": step,
            "position": position,
            "token_ids": examples[by_length[position]].token_ids,
            "num_prompt_tokens": examples[by_length[position]].num_prompt_tokens,
        }
        for position in range(rank, len(by_length), num_ranks)
    ]
