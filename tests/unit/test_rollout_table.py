"""Rollouts as Parquet: what is written is what is read, by any Arrow tool."""

import dataclasses
import math

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from past_ray.errors import DataError
from past_ray.rl.rollout_schema import SCHEMA
from past_ray.rl.rollout_table import (
    read_rollouts,
    rollouts_to_table,
    table_to_groups,
    write_rollouts,
)
from past_ray.rl.types import Completion, Rollout, RolloutGroup, RolloutStatus, Turn


def rollout(index=0, *, status=RolloutStatus.COMPLETED, reward=1.0, version=5, **changes):
    completion = Completion(
        token_ids=[7, 2], logprobs=[-0.1, -1 / 3], finish_reason="stop", policy_version=version
    )
    values = {
        "rollout_id": f"6/q1/{index}",
        "turns": [Turn(prompt_ids=[4, 5, 6], completion=completion, reward=reward or 0.0)],
        "answer": "oslo",
        "reward": reward,
        "status": status,
        "policy_version": version,
        "reward_parts": {"correct": 1.0},
    }
    return Rollout(**(values | changes))


def failed(index=0):
    return rollout(
        index,
        status=RolloutStatus.GRADING_ERROR,
        reward=None,
        version=-1,
        turns=[],
        answer="",
        error="ZeroDivisionError: division by zero",
    )


GROUPS = [
    RolloutGroup(question_id="q1", rollouts=[rollout(0), rollout(1, reward=0.0)]),
    RolloutGroup(question_id="q2", rollouts=[failed(), rollout(1, version=4)]),
]

IDS = st.lists(st.integers(0, 2**31 - 1), max_size=4)
NUMBERS = st.floats(allow_nan=False)
TEXTS = st.text(max_size=8)


@st.composite
def completions(draw):
    token_ids = draw(IDS)
    size = {"min_size": len(token_ids), "max_size": len(token_ids)}
    versions = st.integers(0, 2**40)
    return Completion(
        token_ids=token_ids,
        logprobs=draw(st.lists(NUMBERS, **size)),
        finish_reason=draw(st.sampled_from(["stop", "length", "abort"])),
        policy_version=draw(versions),
        token_versions=draw(st.just([]) | st.lists(versions, **size)),
    )


turns = st.builds(Turn, prompt_ids=IDS, completion=completions(), reward=NUMBERS)
rollouts = st.builds(
    Rollout,
    rollout_id=TEXTS,
    turns=st.lists(turns, max_size=3),
    answer=TEXTS,
    reward=NUMBERS,
    status=st.sampled_from(RolloutStatus),
    policy_version=st.integers(-1, 2**40),
    error=TEXTS,
    reward_parts=st.dictionaries(TEXTS, NUMBERS, max_size=3),
    generation_s=NUMBERS,
    environment_s=NUMBERS,
)
groups = st.builds(
    RolloutGroup, question_id=TEXTS, rollouts=st.lists(rollouts, min_size=1, max_size=3)
)


@settings(max_examples=60)
@given(st.lists(groups, max_size=4))
def test_groups_come_back_from_parquet_without_loss(tmp_path_factory, drawn):
    folder = tmp_path_factory.mktemp("run")
    write_rollouts(folder, 6, drawn)
    assert read_rollouts(folder, 6) == drawn


def test_counts_of_cached_tokens_come_back_too():
    cached = dataclasses.replace(rollout().turns[0].completion, num_cached_tokens=3)
    turn = Turn(prompt_ids=[1], completion=cached)
    group = RolloutGroup(question_id="q", rollouts=[rollout(turns=[turn])])
    back = table_to_groups(rollouts_to_table([group], step=1))
    # Left out of a completion's equality, so compared by name.
    assert back[0].rollouts[0].turns[0].completion.num_cached_tokens == 3


def test_a_nan_reward_stays_nan_and_a_missing_one_stays_none():
    group = RolloutGroup(question_id="q", rollouts=[rollout(0, reward=math.nan), failed(1)])
    first, second = table_to_groups(rollouts_to_table([group], step=1))[0].rollouts
    assert first.reward is not None
    assert math.isnan(first.reward)
    assert second.reward is None


def test_text_that_is_no_unicode_is_written_with_escapes():
    group = RolloutGroup(question_id="q", rollouts=[rollout(error="no file \udcff")])
    assert rollouts_to_table([group], step=1)["error"].to_pylist() == ["no file \\udcff"]


def test_staleness_counts_the_steps_between_sampling_and_training():
    # The step that leads to version 6 trains weights of version 5.
    table = rollouts_to_table(GROUPS, step=6)
    assert table["staleness"].to_pylist() == [0, 0, None, 1]


def test_any_arrow_tool_reads_the_folder_with_its_steps(tmp_path):
    write_rollouts(tmp_path, 5, GROUPS[:1])
    path = write_rollouts(tmp_path, 123, GROUPS)
    assert path == tmp_path / "rollouts" / "step=000123" / "rollouts.parquet"
    dataset = ds.dataset(tmp_path / "rollouts", partitioning="hive")
    table = dataset.to_table(filter=(ds.field("step") == 123) & (ds.field("reward") > 0))
    assert table["rollout_id"].to_pylist() == ["6/q1/0", "6/q1/1"]
    assert table["question_id"].to_pylist() == ["q1", "q2"]
    assert table["turns"][0].as_py()[0]["logprobs"] == [-0.1, -1 / 3]
    assert pq.read_table(tmp_path / "rollouts")["step"].to_pylist() == [5, 5, 123, 123, 123, 123]
    assert table_to_groups(dataset.to_table(filter=ds.field("step") == 123)) == GROUPS
    assert table_to_groups(pq.read_table(path)) == GROUPS


def test_steps_are_kept_apart_and_in_order():
    table = pa.concat_tables(rollouts_to_table(GROUPS, step=step) for step in (7, 6))
    assert table_to_groups(table) == [*GROUPS, *GROUPS]


def test_rows_may_be_shuffled_or_filtered_away():
    table = rollouts_to_table(GROUPS, step=6)
    assert table_to_groups(table.take([3, 1, 0, 2])) == GROUPS
    filtered = table_to_groups(table.filter(pc.field("status") == "completed"))
    assert [len(group.rollouts) for group in filtered] == [2, 1]
    assert table_to_groups(table.slice(2)) == GROUPS[1:]


def test_the_file_names_its_schema_version_and_is_compressed(tmp_path):
    file = pq.ParquetFile(write_rollouts(tmp_path, 1, GROUPS))
    assert file.schema_arrow.metadata[b"past_ray.rollouts"] == b"1"
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"


def test_a_failed_write_leaves_the_older_file(tmp_path, monkeypatch):
    write_rollouts(tmp_path, 1, GROUPS)

    def fail(table, where, **_):
        where.write_bytes(b"PAR1 half")
        raise OSError("gone")

    monkeypatch.setattr(pq, "write_table", fail)
    with pytest.raises(OSError, match="gone"):
        write_rollouts(tmp_path, 1, GROUPS[:1])
    assert read_rollouts(tmp_path, 1) == GROUPS
    assert [path.name for path in (tmp_path / "rollouts").iterdir()] == ["step=000001"]


def test_a_group_without_rollouts_is_refused():
    with pytest.raises(DataError, match="group 'q9' of step 3 must have at least one rollout"):
        rollouts_to_table([RolloutGroup(question_id="q9", rollouts=[])], step=3)


def test_a_missing_step_is_named(tmp_path):
    with pytest.raises(DataError, match=r"step=000004/rollouts.parquet must be a Parquet file"):
        read_rollouts(tmp_path, 4)


def test_a_torn_file_is_named(tmp_path):
    path = write_rollouts(tmp_path, 4, GROUPS)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match=r"step=000004/rollouts.parquet must be readable"):
        read_rollouts(tmp_path, 4)


def changed(name, values):
    table = rollouts_to_table(GROUPS, step=6)
    array = pa.array(values, SCHEMA.field(name).type if values[0] != "oops" else None)
    return table.set_column(table.column_names.index(name), name, array)


def with_turn(row, **changes):
    turns = rollouts_to_table(GROUPS, step=6)["turns"].to_pylist()
    turns[row][0] |= changes
    return changed("turns", turns)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rollouts_to_table(GROUPS, step=6).drop_columns("turns"), r"add \['turns'\]"),
        (lambda: changed("index", ["oops"] * 4), "index must be of type int32, found string"),
        (lambda: changed("answer", ["a", "b", None, "d"]), "answer must not be null.* in row 2"),
        (
            lambda: changed("reward_parts", [{"a": 1.0}, {}, {}, {"a": None}]),
            "reward_parts must not be null.* in row 3",
        ),
        (lambda: changed("reward", [1.0, None, None, 1.0]), "row 1 must have a reward"),
        (
            lambda: changed("status", ["completed", "completed", "lost", "completed"]),
            "status must be one of .* found 'lost' in row 2",
        ),
        (lambda: changed("index", [0, 0, 0, 1]), "must be unique, found rows 0 and 1 alike"),
        (lambda: with_turn(3, logprobs=[-0.1]), "row 3 must have one log-prob.*found 1 and 0"),
        (lambda: with_turn(1, token_versions=[5]), "row 1 must have one log-prob.*found 2 and 1"),
        (lambda: with_turn(1, logprobs=[None, -1.0]), "turns must not be null.* in row 1"),
        (lambda: with_turn(0, finish_reason="bored"), "row 0 must have finish reasons"),
        (
            lambda: rollouts_to_table(GROUPS, step=6).replace_schema_metadata(
                {"past_ray.rollouts": "2"}
            ),
            "must have schema version 1, found 2",
        ),
    ],
)
def test_a_malformed_table_is_refused_with_its_row(make, message):
    with pytest.raises(DataError, match=f"here.parquet.*{message}"):
        table_to_groups(make(), source="here.parquet")


def test_what_a_failed_rollout_holds_is_not_judged():
    torn = dataclasses.replace(rollout().turns[0].completion, logprobs=[])
    turn = Turn(prompt_ids=[1], completion=torn)
    lost = rollout(turns=[turn], status=RolloutStatus.GENERATION_ERROR, reward=None)
    group = RolloutGroup(question_id="q", rollouts=[lost])
    assert table_to_groups(rollouts_to_table([group], step=1)) == [group]
