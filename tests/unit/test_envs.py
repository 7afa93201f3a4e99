import pytest

from past_ray.envs.closed_book_qa import ClosedBookQA
from past_ray.tasks.examples import QAExample
from past_ray.tasks.grading import GRADERS

EXAMPLE = QAExample(
    question_id="target/p3/city",
    messages=({"role": "user", "content": "where does ada live ?"},),
    answer="oslo",
)


def test_the_prompt_is_the_examples_own_messages_and_never_holds_the_answer():
    messages = ClosedBookQA(EXAMPLE, GRADERS["exact_match"]).reset()
    assert messages == [{"role": "user", "content": "where does ada live ?"}]


@pytest.mark.parametrize(("answer", "reward"), [("oslo", 1.0), ("rome", 0.0)])
def test_one_answer_is_graded_against_the_gold_answer_and_ends_the_rollout(answer, reward):
    outcome = ClosedBookQA(EXAMPLE, GRADERS["exact_match"]).step(answer)
    assert (outcome.reward, outcome.is_done, outcome.messages) == (reward, True, [])


def test_the_grader_gets_the_answer_first_and_the_gold_answer_second():
    seen = []

    def grade(answer, gold):
        seen.append((answer, gold))
        return 0.25

    assert ClosedBookQA(EXAMPLE, grade).step("rome").reward == 0.25
    assert seen == [("rome", "oslo")]
