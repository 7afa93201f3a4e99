import os
from typing import get_args

import pytest

from past_ray.config.task import LoogleTaskConfig, SplitPreset, SquadTaskConfig
from past_ray.errors import DataError
from past_ray.tasks import loogle, squad
from past_ray.tasks.passages import Passage, check_questions_differ
from past_ray.tasks.splits import PRESETS, Split, preset_split, selected

RANGES = {
    "seal_round_1": ("squad/source_round1.json", 0, 49),
    "seal_round_2": ("squad/source_round2.json", 0, 49),
    "seal_target_200": ("squad/target_200.json", 0, 199),
    "loogle_source_1": ("loogle/shortdep_qa.jsonl", 100, 104),
    "loogle_source_2": ("loogle/shortdep_qa.jsonl", 95, 99),
    "loogle_validation": ("loogle/shortdep_qa.jsonl", 90, 94),
    "loogle_test": ("loogle/shortdep_qa.jsonl", 0, 49),
    "loogle_ablation": ("loogle/shortdep_qa.jsonl", 0, 9),
}

PASSAGES = [
    Passage(passage_id=f"a-{index:04d}", title="T", context="C", questions=())
    for index in range(105)
]


def indices(split):
    return [int(passage.passage_id[2:]) for passage in selected(PASSAGES, split)]


def test_every_preset_name_of_the_configuration_has_a_split():
    assert set(PRESETS) == set(get_args(SplitPreset)) == set(RANGES)


@pytest.mark.parametrize("preset", [name for name in RANGES if name != "seal_target_200"])
def test_preset_is_the_published_range_of_its_file(preset):
    path, first, last = RANGES[preset]
    split = preset_split(preset, path=None, start=0, count=None)
    assert split.path == path
    assert indices(split) == list(range(first, last + 1))


def test_part_of_a_preset_is_counted_from_its_own_beginning():
    assert indices(preset_split("loogle_source_2", path=None, start=1, count=2)) == [96, 97]
    assert indices(preset_split("loogle_source_2", path=None, start=3, count=None)) == [98, 99]


def test_path_replaces_the_file_of_a_preset_and_keeps_its_range():
    split = preset_split("loogle_source_1", path="full.jsonl", start=0, count=None)
    assert split == Split(path="full.jsonl", start=100, count=5)


@pytest.mark.parametrize(("start", "count"), [(0, 6), (4, 2), (5, None), (7, None)])
def test_part_that_leaves_the_preset_is_refused(start, count):
    with pytest.raises(DataError, match=f"loogle_source_1 has 5 passages, found start {start}"):
        preset_split("loogle_source_1", path=None, start=start, count=count)


def test_range_beyond_the_file_is_refused_with_both_numbers():
    split = preset_split("loogle_source_1", path="part.jsonl", start=0, count=None)
    with pytest.raises(DataError, match=r"part.jsonl must have at least 105 .* found 104"):
        selected(PASSAGES[:104], split)
    with pytest.raises(DataError, match="at least 106 passages to start at 105, found 105"):
        selected(PASSAGES, Split(path="a", start=105, count=None))


def test_without_a_count_the_rest_of_the_file_is_taken():
    assert indices(Split(path="a", start=102, count=None)) == [102, 103, 104]


def test_defaults_of_the_tasks_are_the_published_splits():
    assert [split.preset for split in SquadTaskConfig().sources] == ["seal_round_1", "seal_round_2"]
    assert SquadTaskConfig().target.preset == "seal_target_200"
    loogle_task = LoogleTaskConfig()
    assert [s.preset for s in loogle_task.sources] == ["loogle_source_1", "loogle_source_2"]
    assert loogle_task.target.preset == "loogle_test"


def test_name_of_a_preset_stands_for_a_split():
    written = SquadTaskConfig.model_validate({"sources": ["seal_round_2"], "held_out": None})
    assert written.sources[0] == SquadTaskConfig().sources[1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target": "loogle_test"}, "must start with seal_, got loogle_test"),
        ({"validation": "loogle_validation"}, "must start with seal_, got loogle_validation"),
        ({"target": {"start": 3}}, "must have a preset or a path, got neither"),
        ({"target": {"path": "a.json", "count": 0}}, "greater than or equal to 1"),
        ({"sources": []}, "at least 1 item"),
    ],
)
def test_impossible_split_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SquadTaskConfig.model_validate(fields)


@pytest.mark.skipif("PAST_RAY_DATA" not in os.environ, reason="PAST_RAY_DATA is not set")
@pytest.mark.parametrize(
    ("preset", "num_questions"),
    [("seal_round_1", 225), ("seal_round_2", 243), ("seal_target_200", 974)],
)
def test_published_splits_have_the_published_numbers_of_questions(preset, num_questions):
    split = preset_split(preset, path=None, start=0, count=None)
    passages = selected(squad.load_passages(split.path), split)
    assert sum(len(passage.questions) for passage in passages) == num_questions
    if not split.keep_repeated:
        check_questions_differ(passages)


@pytest.mark.skipif("PAST_RAY_DATA" not in os.environ, reason="PAST_RAY_DATA is not set")
def test_sample_of_loogle_is_too_short_for_the_published_sources():
    split = preset_split("loogle_source_1", path=None, start=0, count=None)
    with pytest.raises(DataError, match=r"must have at least 105 passages .* found 5"):
        selected(loogle.load_passages(split.path), split)
