"""SEAL: which self-edit is the best, when the arm is refused, its stages and what they cost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from past_ray.config.experiment import ExperimentConfig
from past_ray.config.seal import SealConfig
from past_ray.errors import DataError
from past_ray.pipelines.edit_choice import choose_edits
from past_ray.pipelines.laboratory import Laboratory
from past_ray.pipelines.past import all_stages
from past_ray.pipelines.progress import ProgressDisplay
from past_ray.pipelines.seal import seal_figures
from past_ray.pipelines.summary import ADAPTATION_STAGES, SOURCE_STAGES
from past_ray.storage import write_json
from past_ray.tasks.judging import JudgeFailure, Verdict

RIGHT, WRONG = Verdict(score=1.0, is_correct=True), Verdict(score=0.6, is_correct=False)
FAILURE = JudgeFailure(error="no answer in time")


def config_of(tmp_path, **fields) -> ExperimentConfig:
    return ExperimentConfig.model_validate(
        {
            "run_dir": tmp_path / "run",
            "arms": ["base", "target_sft", "seal", "past"],
            "task": {"kind": "tables", "source_dirs": [tmp_path], "target_dir": tmp_path},
            "model": {"kind": "checkpoint", "path": tmp_path},
            "texts": {"kind": "passages"},
            "single_passage": {},
            "evaluation": {"scales": []},
            **fields,
        }
    )


def test_the_best_self_edit_has_the_largest_share_of_correct_answers():
    choice = choose_edits(
        {
            "p": {"p#a": [RIGHT, WRONG, WRONG], "p#b": [RIGHT, WRONG, RIGHT]},
            "q": {"q#a": [WRONG, RIGHT], "q#b": [WRONG, WRONG]},
        }
    )
    assert choice.best == {"p": "p#b", "q": "q#a"}
    assert choice.scores == {"p#a": 1 / 3, "p#b": 2 / 3, "q#a": 1 / 2, "q#b": 0}
    assert (choice.num_tied, choice.unscored) == (0, ())


def test_an_answer_counts_by_its_verdict_and_not_by_its_score():
    choice = choose_edits({"p": {"p#a": [WRONG, WRONG, WRONG], "p#b": [RIGHT, WRONG, WRONG]}})
    assert choice.scores == {"p#a": 0, "p#b": 1 / 3}


@pytest.mark.parametrize("verdict", [RIGHT, WRONG])
def test_of_equal_self_edits_the_first_is_kept_and_the_passage_counted_as_tied(verdict):
    choice = choose_edits({"p": {"p#b": [verdict], "p#a": [verdict], "p#c": [verdict]}})
    assert choice.best == {"p": "p#b"}
    assert choice.num_tied == 1


def test_two_equal_best_self_edits_above_a_third_are_no_tied_passage():
    choice = choose_edits({"p": {"p#a": [WRONG], "p#b": [RIGHT], "p#c": [RIGHT]}})
    assert choice.best == {"p": "p#b"}
    assert choice.num_tied == 0


def test_failures_of_the_judge_are_left_out_and_never_wrong_answers():
    choice = choose_edits(
        {"p": {"p#a": [RIGHT, WRONG, WRONG], "p#b": [RIGHT, FAILURE, FAILURE], "p#c": [FAILURE]}}
    )
    assert choice.best == {"p": "p#b"}
    assert choice.scores == {"p#a": 1 / 3, "p#b": 1}


def test_a_passage_without_a_verdict_or_a_question_has_no_best_self_edit():
    choice = choose_edits({"p": {"p#a": [WRONG]}, "q": {"q#a": [FAILURE]}, "r": {}})
    assert choice.best == {"p": "p#a"}
    assert choice.unscored == ("q", "r")


def test_a_round_without_any_verdict_is_refused():
    with pytest.raises(DataError, match="decided on none about 1 passages"):
        choose_edits({"p": {"p#a": [FAILURE]}})


@given(st.lists(st.lists(st.sampled_from([RIGHT, WRONG]), min_size=4, max_size=4), min_size=1))
def test_no_self_edit_of_the_passage_is_better_than_the_best_and_none_before_it_as_good(edits):
    choice = choose_edits({"p": {str(index): found for index, found in enumerate(edits)}})
    best = int(choice.best["p"])
    numbers = [found.count(RIGHT) for found in edits]
    assert numbers[best] == max(numbers)
    assert max(numbers) not in numbers[:best]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"single_passage": None}, "arm seal needs single_passage"),
        ({"texts": None}, "arm seal needs single_passage"),
        ({"texts": {"kind": "windows"}, "single_passage": None}, "texts of kind passages"),
        ({"texts": {"kind": "passages", "temperature": 0}}, r"texts\.temperature above 0"),
        ({"runtime": {"num_sft_workers": 4}}, r"seal\.sft\.batch_size must be a multiple"),
        ({"seal": {"num_self_edits": 1}}, "greater than or equal to 2"),
    ],
)
def test_what_the_arm_cannot_run_with_is_refused(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        config_of(tmp_path, **fields)


def test_settings_of_an_arm_that_is_not_run_are_not_checked(tmp_path):
    config = config_of(tmp_path, arms=["past"], runtime={"num_sft_workers": 4})
    assert config.seal == SealConfig()


def test_a_changed_setting_of_the_writer_leaves_the_published_ones():
    sft = SealConfig.model_validate({"sft": {"batch_size": 4}}).sft
    assert (sft.batch_size, sft.num_epochs, sft.learning_rate) == (4, 2, 3e-4)
    assert sft.lora is not None
    assert (sft.lora.rank, sft.lora.alpha, len(sft.lora.target_modules)) == (64, 128, 7)


def test_the_rounds_follow_each_other_after_the_skill_and_before_the_evaluation(tmp_path):
    with Laboratory(config_of(tmp_path), ProgressDisplay()) as lab:
        names = [stage.name for stage in all_stages(lab)]
    assert len(names) == len(set(names))
    first = names.index("seal_1_texts")
    assert names[first : first + 10] == [
        *("seal_1_texts", "seal_1_adapters", "seal_1_scores", "seal_1_writer"),
        *("seal_2_texts", "seal_2_adapters", "seal_2_scores", "seal_2_writer"),
        *ADAPTATION_STAGES["seal"],
    ]
    assert names.index("one_round") < first < names.index("adapted") < names.index("eval_seal")


def test_a_run_without_the_arm_has_none_of_its_stages(tmp_path):
    with Laboratory(config_of(tmp_path, arms=["past"]), ProgressDisplay()) as lab:
        assert not [stage.name for stage in all_stages(lab) if "seal" in stage.name]


def test_the_cost_has_every_round_and_leaves_the_target_out(tmp_path):
    records = {
        "texts_source": {"new_tokens": 100, "cached": 1},
        "sft_source_1": {"num_tokens": 30},
        "rl_source_1": {"metrics": [{"num_tokens": 7, "num_loss_tokens": 5}, {"num_tokens": 8}]},
        "one_round": {},
        "texts_seal": {"new_tokens": 9999, "cached": 0},
        "seal": {"adapters": 9999, "num_tokens": 9999},
    }
    for r, scale in ((1, 1), (2, 10)):
        records[f"seal_{r}_texts"] = {"new_tokens": 20 * scale, "cached": 2 * scale}
        records[f"seal_{r}_adapters"] = {"adapters": 3 * scale, "num_tokens": 40 * scale}
        records[f"seal_{r}_writer"] = {"num_tokens": 4 * scale}
        records[f"seal_{r}_scores"] = {
            **{"num_passages": 2, "num_tied": r, "unscored": ["p"], "judge_failures": 6},
            **{"mean_score": 0.25, "mean_best_score": 0.5, "new_tokens": 6 * scale, "best": {}},
        }
    with Laboratory(config_of(tmp_path), ProgressDisplay()) as lab:
        for number, (stage, result) in enumerate(records.items()):
            seconds = 1.0 if stage not in ("texts_seal", "seal") else 1000.0
            record = {"stage": stage, "seconds": seconds, "finished": number, "result": result}
            write_json(lab.run.record(stage), record)
        figures = seal_figures(lab)
    assert figures["seal_cost"] == {
        "seal": {
            "adapters_trained": 33,
            "sampled_tokens": 220 + 66,
            "answer_tokens": 66,
            "trained_tokens": 440 + 44,
            "cached_texts": 22,
            "seconds": 8.0,
        },
        "past": {
            "adapters_trained": 0,
            "sampled_tokens": 115,
            "answer_tokens": 15,
            "trained_tokens": 35,
            "cached_texts": 1,
            "seconds": 4.0,
        },
    }
    assert [found["num_tied"] for found in figures["seal_rounds"]] == [1, 2]
    assert not SOURCE_STAGES & set(ADAPTATION_STAGES["seal"])
