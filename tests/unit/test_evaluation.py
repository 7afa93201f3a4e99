import pytest

from past_ray.config.judge import RuleJudgeConfig
from past_ray.engine.judge import RuleJudge
from past_ray.errors import DataError
from past_ray.pipelines.evaluation import Answer, judged_answers, summarise_answers
from past_ray.rl.types import Completion
from past_ray.tasks.examples import QAExample
from past_ray.tasks.judging import JudgeFailure, Verdict

EXAMPLES = [
    QAExample(question_id=f"q{i}", messages=(), answer="oslo", question="where ?")
    for i in range(12)
]


def answer(outcome, *, num_tokens=2):
    return Answer(
        text="oslo", num_tokens=num_tokens, is_truncated=False, has_failed=False, outcome=outcome
    )


RIGHT, WRONG = (Verdict(score=float(right), is_correct=right) for right in (True, False))
FAILED = JudgeFailure(error="no answer in time")


def summary(outcomes, **options):
    return summarise_answers(
        EXAMPLES[: len(outcomes)],
        [answer(outcome) for outcome in outcomes],
        num_bootstrap=200,
        kind_of=lambda question_id: "even" if question_id in ("q0", "q2") else "odd",
        **options,
    )


def test_a_question_that_the_judge_failed_on_is_left_out_and_counted():
    result = summary([RIGHT, FAILED, RIGHT, WRONG])
    assert result["accuracy"] == pytest.approx(2 / 3)
    assert result["judge_failures"] == 1
    assert result["num_questions"] == 4
    assert result["correct"] == {"q0": 1.0, "q2": 1.0, "q3": 0.0}
    assert result["accuracy_by_kind"] == {"even": 1.0, "odd": 0.0}
    assert set(result["answers"]) == {"q0", "q1", "q2", "q3"}


def test_a_judge_that_always_fails_is_an_error_with_its_reason():
    with pytest.raises(DataError, match=r"failed on all 4.*no answer in time"):
        summary([FAILED] * 4)


def test_the_interval_is_wider_where_questions_of_a_passage_go_together():
    outcomes = [RIGHT] * 6 + [WRONG] * 6
    passages = {f"q{i}": "ab"[i // 6] for i in range(12)}
    alone, clustered = summary(outcomes), summary(outcomes, passage_of=passages)
    widths = [result["ci95"][1] - result["ci95"][0] for result in (alone, clustered)]
    assert widths[0] < widths[1] == 1.0


def test_completions_are_decoded_and_judged_in_order():
    completions = [
        Completion(token_ids=ids, logprobs=[0.0] * len(ids), finish_reason=reason, policy_version=1)
        for ids, reason in (([1], "stop"), ([2, 1], "length"))
    ]
    words = {1: "oslo", 2: "in"}
    answers = judged_answers(
        EXAMPLES[:2],
        completions,
        decode=lambda ids: " ".join(words[token] for token in ids),
        judge=RuleJudge(RuleJudgeConfig(rule="exact_match", correct_at=1.0)),
    )
    assert [a.text for a in answers] == ["oslo", "in oslo"]
    assert [a.outcome.is_correct for a in answers] == [True, False]
    assert [(a.num_tokens, a.is_truncated) for a in answers] == [(1, False), (2, True)]
