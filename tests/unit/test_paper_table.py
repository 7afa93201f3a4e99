from dataclasses import replace

import pytest

from past_ray.errors import DataError
from past_ray.pipelines.paper_table import arm_figures, differences_from_paper, paper_table
from past_ray.tasks.published import PAPER_SETUPS, Setup

QUESTIONS = [f"q{index}" for index in range(40)]
PASSAGE_OF = {key: f"p{index // 4}" for index, key in enumerate(QUESTIONS)}


def first(num_right):
    return {key: float(index < num_right) for index, key in enumerate(QUESTIONS)}


ARMS = {
    "past": first(24),
    "base": first(4),
    "target_sft": first(12),
    "sequential": first(10),
    "in_context": first(36),
}
WORDS = {"past": 12.25, "base": 3.0, "target_sft": 6.0, "sequential": 6.5, "in_context": 4.0}


def figures(**options):
    return arm_figures(ARMS, mean_words=WORDS, num_bootstrap=500, seed=0, **options)


def rows(table):
    return {row.method: row for row in table.rows}


def test_gain_is_points_over_target_sft_on_the_same_questions():
    found = figures()
    assert found["past"].accuracy == 0.6
    assert found["past"].gain.difference == pytest.approx(0.3)
    assert found["sequential"].gain.difference == pytest.approx(-0.05)
    assert found["target_sft"].gain is None
    assert found["past"].mean_words == 12.25


def test_known_passages_widen_accuracy_and_gain():
    plain, clustered = figures()["past"], figures(passage_of=PASSAGE_OF)["past"]
    width = plain.ci95[1] - plain.ci95[0]
    assert clustered.ci95[1] - clustered.ci95[0] > 1.5 * width
    assert clustered.gain.num_resampled == 10
    assert clustered.gain.p_value > plain.gain.p_value


def test_without_target_sft_there_is_no_gain():
    found = arm_figures({"past": first(3)}, mean_words={"past": 1.0}, num_bootstrap=10, seed=0)
    assert found["past"].gain is None
    assert rows(paper_table(found, regime="cpt_200", differences=[]))["PaST, one round"].gain == ""


def test_an_arm_without_answers_and_a_question_without_passage_are_refused():
    with pytest.raises(DataError, match="at least one value"):
        arm_figures({"base": {}}, mean_words={"base": 1.0}, num_bootstrap=10, seed=0)
    with pytest.raises(DataError, match="q39"):
        figures(passage_of=dict.fromkeys(QUESTIONS[:-1], "p"))


def test_rows_come_in_the_papers_order_with_the_ceiling_last():
    table = paper_table(figures(), regime="single_passage", differences=[])
    assert [row.method for row in table.rows] == [
        "Base",
        "Train on Passage",
        "Passage + Synthetic (target SFT)",
        "Passage + GPT-4.1 Synthetic",
        "SEAL, one round",
        "SEAL",
        "Sequential fine-tuning",
        "PaST, one round",
        "PaST, one round on twice the data",
        "PaST, two rounds",
        "Base, passage in the prompt",
    ]


def test_ours_and_published_stand_side_by_side_in_percent():
    row = rows(paper_table(figures(), regime="single_passage", differences=[]))["PaST, one round"]
    assert row.ours.startswith("60.0 [")
    assert row.gain.startswith("+30.0 [+")
    assert row.published == "50.8 (+11.1)"
    assert row.mean_words == "12.2"
    assert row.note == ""


def test_arms_that_no_method_is_credited_for_show_no_gain():
    found = rows(paper_table(figures(), regime="single_passage", differences=[]))
    assert found["Base"].gain == found["Base, passage in the prompt"].gain == ""
    assert found["Base"].published == "32.7"


def test_what_was_not_run_or_not_published_says_so():
    found = rows(paper_table(figures(), regime="single_passage", differences=[]))
    assert (found["SEAL"].ours, found["SEAL"].published) == ("-", "47.0 (+7.3)")
    assert found["SEAL"].note.startswith("not run here; prompt")
    assert found["Base, passage in the prompt"].note == "ceiling; not in the paper"
    assert found["Sequential fine-tuning"].published == "-"


def test_places_of_injection_are_published_for_loogle_only():
    row = rows(paper_table(figures(), regime="loogle", differences=[]))["Sequential fine-tuning"]
    assert row.published == "30.3 (-2.6)"
    assert row.note == "Table 5; on 10 documents, where PaST has 44.6"


def test_every_published_number_is_marked_where_we_measured_otherwise():
    differences = ["the model is tiny, in the paper Qwen2.5-7B", "the judge is a rule"]
    table = paper_table(figures(), regime="cpt_200", differences=differences)
    shown = [row.published for row in table.rows if row.published != "-"]
    assert len(shown) == 8
    assert all("*" in text for text in shown)
    assert table.footnotes[-1] == f"* Measured otherwise than ours: {'; '.join(differences)}."
    unmarked = paper_table(figures(), regime="cpt_200", differences=[])
    assert not any("*" in line for line in [r.published for r in unmarked.rows])
    assert len(unmarked.footnotes) == 1


def test_text_shows_every_cell_and_takes_brackets_for_what_they_are():
    table = paper_table(figures(), regime="single_passage", differences=["the model is [bold]"])
    past = rows(table)["PaST, one round"]
    line = next(line for line in table.text.splitlines() if past.method + " " in line)
    for cell in (past.ours, past.gain, past.mean_words, past.published):
        assert cell in line
    assert "the model is [bold]." in table.text
    assert table.text.isascii()


def test_an_arm_without_a_place_is_refused_by_name():
    with pytest.raises(DataError, match="target_rl"):
        paper_table({"target_rl": figures()["past"]}, regime="loogle", differences=[])


def test_the_papers_own_setup_differs_in_nothing():
    for regime, setup in PAPER_SETUPS.items():
        assert differences_from_paper(setup, regime=regime) == []
    located = replace(PAPER_SETUPS["cpt_200"], model="/models/Qwen2.5-7B/")
    assert differences_from_paper(located, regime="cpt_200") == []


def test_differences_name_ours_and_the_papers():
    ours = Setup(
        model="org/SmolLM2-135M",
        judge="gold_token_recall >= 0.67",
        num_passages=8,
        num_questions=974,
        source_size=None,
    )
    assert differences_from_paper(ours, regime="cpt_2067") == [
        "the model is SmolLM2-135M, in the paper Qwen2.5-7B",
        "the judge is gold_token_recall >= 0.67, in the paper GPT-4.1",
        "target passages or documents are 8, in the paper 2,067",
        "questions are 974, in the paper 10,570",
        "source passages or documents per round are not known, in the paper 50",
    ]


def test_an_unpublished_size_is_no_difference():
    ours = replace(PAPER_SETUPS["loogle"], num_questions=5)
    assert differences_from_paper(ours, regime="loogle") == []
