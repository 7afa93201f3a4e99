"""The stages that use no label of the target: the choice of the scale, and signs of damage."""

import asyncio
import json
from pathlib import Path

import pytest

from past_ray.config.experiment import ExperimentConfig
from past_ray.engine.perplexity import TokenNLL
from past_ray.envs.rollout import completion_seed
from past_ray.pipelines import diagnosis
from past_ray.pipelines.answering import Knowledge
from past_ray.pipelines.data import prepare_tables
from past_ray.pipelines.diagnosis import diagnose_target, finished_samples
from past_ray.pipelines.laboratory import Laboratory
from past_ray.pipelines.progress import ProgressDisplay
from past_ray.pipelines.selection import choose_skill_scale, validation_stage
from past_ray.rl.types import Completion, Rollout, RolloutGroup, RolloutStatus, Turn
from past_ray.runtime.session import RLSession
from tests.tiny_model import make_tiny_model

NUM_PASSAGES, QUESTIONS_EACH = 2, 10
SCALES = (0.5, 1.0, 1.5)


def passages(name: str) -> list[dict]:
    return [
        {
            "title": f"{name} {index}",
            "context": "anna lives in rome .",
            "completions": [],
            "questions": [
                {"question": f"who is {name} {index} {number}", "answer": "anna"}
                for number in range(QUESTIONS_EACH)
            ],
        }
        for index in range(NUM_PASSAGES)
    ]


class QuietLaboratory(Laboratory):
    """A laboratory whose engines are given: none is started."""

    def __init__(self, config: ExperimentConfig, *, session=None, answers=None) -> None:
        super().__init__(config, ProgressDisplay())
        self.given_session, self.given_answers = session, answers

    def model(self, name: str) -> Path:
        return self.run.model(name)

    def session(self) -> RLSession:
        return self.given_session

    def answers(self):
        return self.given_answers


@pytest.fixture
def make_lab(tmp_path, monkeypatch):
    monkeypatch.setenv("PAST_RAY_DATA", str(tmp_path))
    names = ("source", "target", "validation")
    for name in names:
        (tmp_path / f"{name}.json").write_text(json.dumps(passages(name)))
    splits = {name: {"path": f"{name}.json"} for name in names}
    task = {"kind": "squad", "num_completions": 0, "sources": [splits.pop("source")], **splits}

    def make(*, session=None, answers=None, **fields) -> QuietLaboratory:
        config = ExperimentConfig.model_validate(
            {
                "run_dir": tmp_path / "run",
                "task": task,
                "model": {"kind": "checkpoint", "path": tmp_path / "unused"},
                "seed": 3,
                **fields,
            }
        )
        lab = QuietLaboratory(config, session=session, answers=answers)
        prepare_tables(config.task, lab.run, num_rounds=1, seed=0)
        return lab

    return make


@pytest.fixture
def scale_lab(make_lab):
    """Evaluations in which the best scale answers all; ``num_right`` says what each other does."""

    def make(num_right: dict[float, tuple[int, int]]) -> QuietLaboratory:
        lab = make_lab(skill_scale=None, evaluation={"scales": SCALES})
        passage_of = lab.domain("validation").passage_of
        for scale, right in num_right.items():
            left = dict(zip(sorted(set(passage_of.values())), right, strict=True))
            correct = {}
            for question, passage in passage_of.items():
                correct[question] = float(left[passage] > 0)
                left[passage] -= 1
            lab.run.run(validation_stage(scale), lambda correct=correct: {"correct": correct})
        lab.execute([choose_skill_scale(lab)])
        return lab

    return make


def test_the_best_scale_is_the_scale_of_the_run_where_no_smaller_one_is_close(scale_lab):
    lab = scale_lab({0.5: (2, 2), 1.0: (9, 9), 1.5: (1, 1)})
    assert lab.skill_scale() == 1.0
    choice = lab.result("scale_choice")
    assert (choice["accuracy"], choice["best_scale"]) == (0.9, 1.0)
    assert "no smaller scale is within the noise of 20 questions" in choice["reason"]


def test_a_smaller_scale_that_answers_as_well_is_taken(scale_lab):
    assert scale_lab({0.5: (9, 9), 1.0: (9, 9), 1.5: (10, 9)}).skill_scale() == 0.5


def test_a_lead_on_one_passage_alone_is_noise_for_whole_passages_are_resampled(scale_lab):
    # 10 of 20 questions gained, but all of one passage: one resample in four has only the other.
    lab = scale_lab({0.5: (0, 5), 1.0: (10, 5), 1.5: (0, 0)})
    assert lab.skill_scale() == 0.5
    assert lab.result("scale_choice")["best_scale"] == 1.0


TALK, LOOP = ["anna lives in rome ."], ["rome paris oslo berlin " * 5]
"""What the model says without and with a skill vector that breaks it; both in known words."""


class ScriptedAnswers:
    """Stands where ``AdapterAnswers`` stands: what it says depends on the base weights alone."""

    def __init__(self, tokenizer) -> None:
        self._tokenizer = tokenizer
        self._scripts = iter((TALK, LOOP))
        self.asked = []

    def load_base(self, weights, version) -> None:
        self._script = next(self._scripts)

    def answer(self, requests, sampling, on_done):
        self.asked.append((requests, sampling))
        ids = self._tokenizer(self._script[0])["input_ids"]
        return [completion(ids) for _ in requests]


def completion(token_ids: list[int]) -> Completion:
    return Completion(
        token_ids=token_ids,
        logprobs=[-1.0] * len(token_ids),
        finish_reason="stop",
        policy_version=1,
    )


def group(question: str, *answers: str | None) -> RolloutGroup:
    """One rollout per answer; None is a failed generation."""
    return RolloutGroup(
        question_id=question,
        rollouts=[
            Rollout(
                rollout_id=f"{question}/{index}",
                turns=[Turn(prompt_ids=[1], completion=completion([1]))] if answer else [],
                answer=answer or "",
                reward=0.0,
                status=RolloutStatus.COMPLETED,
                policy_version=1,
            )
            for index, answer in enumerate(answers)
        ],
    )


def test_every_question_is_asked_of_its_passage_s_adapter_with_equal_seeds(make_lab, caplog):
    lab = make_lab(single_passage={}, evaluation={"num_diagnostic_samples": 3})
    for model in ("base", "adapted"):
        make_tiny_model(lab.model(model))
    answers = ScriptedAnswers(lab.tokenizer())
    lab.given_answers = answers
    stage = diagnose_target(
        lab,
        before=Knowledge(model="base", adapters="sft_target"),
        after=Knowledge(model="adapted", adapters="sft_target"),
    )
    result = stage.work()
    (requests, sampling), (_, sampling_after) = answers.asked
    passage_of = lab.domain("target").passage_of
    assert [request.adapter.name for request in requests] == [
        passage for passage in passage_of.values() for _ in range(3)
    ]
    first = next(iter(passage_of))
    assert [s.seed for s in sampling[:3]] == [
        completion_seed(3, f"{first}/{index}", 0) for index in range(3)
    ]
    assert len({s.seed for s in sampling}) == 3 * NUM_PASSAGES * QUESTIONS_EACH
    assert {s.temperature for s in sampling} == {1.0}
    assert sampling == sampling_after
    assert (result["num_questions"], result["num_samples"]) == (NUM_PASSAGES * QUESTIONS_EACH, 3)
    assert (result["before"]["mean_words"], result["after"]["mean_words"]) == (5, 20)
    assert [warning["sign"] for warning in result["warnings"]] == ["repetition_frac"]
    assert "the injected model may be broken: repeated 4-grams" in caplog.text
    assert result["after"]["perplexity"] is None
    assert result["perplexity_note"].startswith("not measured: every passage has an adapter")
    json.dumps(result)


class ScriptedSession:
    """Stands where ``RLSession`` stands; fails one generation of the second model."""

    def __init__(self) -> None:
        self.plans = []

    async def load_generators(self, weights, policy_version) -> None:
        await asyncio.sleep(0)

    async def collect(self, tasks, plan):
        self.plans.append((plan, [task.group_id for task in tasks]))
        said = "anna lives in rome ." if len(self.plans) == 1 else "yes"
        answers = {task.example.question_id: [said] * plan.group_size for task in tasks}
        if len(self.plans) == 2:
            answers[tasks[0].example.question_id][0] = None
        return [group(question, *texts) for question, texts in answers.items()]

    def close(self) -> None:
        pass


def test_full_models_answer_through_the_session_and_read_the_target_s_documents(
    make_lab, monkeypatch
):
    session = ScriptedSession()
    lab = make_lab(session=session, evaluation={"num_diagnostic_samples": 2})
    for model in ("sft_target", "adapted"):
        make_tiny_model(lab.model(model))

    def score(lab, models, *, domain, max_length):
        assert models == {"before": "sft_target", "after": "adapted"}
        assert (domain, max_length) == ("target", lab.config.runtime.generator.max_model_len)
        nll = {"before": 0.0, "after": 10.0}
        return {
            label: TokenNLL(nll=nll[label], num_scored=10, num_read=11, num_predicted=0)
            for label in models
        }

    monkeypatch.setattr(diagnosis, "score_documents", score)
    stage = diagnose_target(
        lab, before=Knowledge(model="sft_target"), after=Knowledge(model="adapted")
    )
    result = stage.work()
    plan, group_ids = session.plans[0]
    assert (plan.group_size, plan.sampling.temperature, plan.seed) == (2, 1.0, 3)
    assert session.plans[1] == (plan, group_ids)
    assert result["before"]["perplexity"] == 1.0
    assert result["after"]["perplexity"] == pytest.approx(2.71828, abs=1e-4)
    assert result["num_questions"] == NUM_PASSAGES * QUESTIONS_EACH - 1
    # Five words became one, and perplexity rose by a factor of e.
    assert [warning["sign"] for warning in result["warnings"]] == ["mean_words", "perplexity"]
    assert "perplexity_note" not in result


def test_a_failed_generation_is_no_empty_answer():
    groups = [group("a", "yes", "no"), group("b", "yes", None)]
    assert finished_samples(groups) == {"a": ["yes", "no"]}
