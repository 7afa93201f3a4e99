import pyarrow.parquet as pq
import pytest

from past_ray.errors import DataError
from past_ray.sft.examples import SFTExample
from past_ray.sft.plan import hash_examples, read_share, write_plan

EXAMPLES = [
    SFTExample(token_ids=tuple(range(1, length + 1)), num_prompt_tokens=length // 2)
    for length in (2, 5, 3, 4)
]


def rows(files):
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def test_ranks_share_each_step_by_length_and_every_example_is_read_once(tmp_path):
    files = write_plan(tmp_path, EXAMPLES, [[0, 1, 2, 3], [3, 1, 0, 2]], num_ranks=2)
    lengths = [
        [(row["step"], row["position"], len(row["token_ids"])) for row in rows(rank_files)]
        for rank_files in files
    ]
    assert lengths == [
        [(0, 0, 5), (0, 2, 3), (1, 0, 5), (1, 2, 3)],
        [(0, 1, 4), (0, 3, 2), (1, 1, 4), (1, 3, 2)],
    ]


def test_files_hold_whole_steps_and_read_in_order(tmp_path):
    order = [[0, 1]] * 5
    (files,) = write_plan(tmp_path, EXAMPLES, order, num_ranks=1, examples_per_file=4)
    assert [file.name for file in files] == [f"part_0000{i}.parquet" for i in range(3)]
    assert [row["step"] for row in rows(files)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_a_share_read_back_is_the_examples_of_that_rank(tmp_path):
    files = write_plan(tmp_path, EXAMPLES, [[0, 1, 2, 3]], num_ranks=2)
    columns = pq.read_table(files[1][0]).to_pydict()
    assert read_share(columns, step=0, rank=1, num_ranks=2) == [EXAMPLES[3], EXAMPLES[0]]


@pytest.mark.parametrize(("step", "rank"), [(1, 1), (0, 0)])
def test_rows_of_another_step_or_rank_are_refused(tmp_path, step, rank):
    files = write_plan(tmp_path, EXAMPLES, [[0, 1, 2, 3]], num_ranks=2)
    columns = pq.read_table(files[1][0]).to_pydict()
    with pytest.raises(DataError, match="preserve_order"):
        read_share(columns, step=step, rank=rank, num_ranks=2)


def test_the_hash_sees_order_and_prompt_lengths():
    other = [SFTExample(token_ids=EXAMPLES[0].token_ids, num_prompt_tokens=0), *EXAMPLES[1:]]
    hashes = {hash_examples(EXAMPLES), hash_examples(EXAMPLES[::-1]), hash_examples(other)}
    assert len(hashes) == 3
    assert hash_examples(list(EXAMPLES)) in hashes
