"""Judges by rule and by model, the endpoint's pace, and what a configuration may say."""

import math
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from pydantic import ValidationError
from transformers import AutoTokenizer

from past_ray.config.judge import (
    CalibrationConfig,
    EndpointJudgeConfig,
    ModelJudgeConfig,
    RuleJudgeConfig,
)
from past_ray.config.loading import load_config
from past_ray.config.runtime import GeneratorConfig
from past_ray.engine.endpoint_pace import Pace, retry_after_s
from past_ray.engine.generator_checks import PromptLimits
from past_ray.engine.judge import ModelJudge, RuleJudge, build_judge
from past_ray.engine.transformers_generator import TransformersGenerator
from past_ray.envs.chat import chat_codec
from past_ray.errors import ClusterError, ConfigError
from past_ray.rl.types import Completion
from past_ray.tasks.judging import JudgeFailure, JudgeItem, JudgeStats, Verdict, judge_messages
from tests.tiny_model import make_tiny_model

LIMITS = PromptLimits(max_model_len=4096, vocab_size=2000)


def item(answer="oslo", *, question="where ?", gold="oslo"):
    return JudgeItem(question=question, gold=gold, answer=answer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


class Parrot:
    """A generator that says the next of its texts, one per prompt, in the codec's own words."""

    def __init__(self, tokenizer, replies):
        self.tokenizer = tokenizer
        self.replies = list(replies)
        self.prompts = []
        self.sampling = []
        self.is_closed = False

    def generate(self, prompts, sampling):
        self.prompts += prompts
        self.sampling += sampling
        return [
            Completion(
                token_ids=self.tokenizer.encode(self.replies.pop(0), add_special_tokens=False),
                logprobs=[],
                finish_reason="stop",
                policy_version=-1,
            )
            for _ in prompts
        ]

    def close(self):
        self.is_closed = True


def parrot_judge(folder, replies, *, limits=LIMITS):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    parrot = Parrot(tokenizer, replies)
    codec = chat_codec(tokenizer)
    return ModelJudge(parrot, codec, limits=limits, max_new_tokens=4), parrot, codec


def test_a_rule_is_correct_from_its_threshold_on():
    judge = RuleJudge(RuleJudgeConfig(correct_at=0.5))
    half, third = judge.judge(
        [item("oslo", gold="oslo fjord"), item("oslo", gold="oslo fjord north")]
    )
    assert half == Verdict(score=0.5, is_correct=True)
    assert third == Verdict(score=pytest.approx(1 / 3), is_correct=False)


def test_a_rule_grades_the_first_words_only():
    answer = "rome paris berlin oslo"
    outcomes = [
        RuleJudge(RuleJudgeConfig(max_words=max_words)).judge([item(answer)])[0].score
        for max_words in (3, 4, None)
    ]
    assert outcomes == [0.0, 1.0, 1.0]


def test_a_rule_names_the_grader_that_it_uses():
    judge = build_judge(RuleJudgeConfig(rule="exact_match"))
    assert [outcome.score for outcome in judge.judge([item("in oslo"), item("Oslo.")])] == [0, 1]
    assert judge.stats() == JudgeStats()


def test_an_empty_gold_answer_is_a_failure_of_a_rule_too():
    (outcome,) = RuleJudge(RuleJudgeConfig()).judge([item(gold=" ")])
    assert isinstance(outcome, JudgeFailure)


def test_a_model_is_asked_greedily_with_the_rendered_prompt_and_its_words_decide(folder):
    judge, parrot, codec = parrot_judge(folder, ["yes", "no", "oslo"])
    items = [item("oslo"), item("rome"), item("paris")]
    right, wrong, undecided = judge.judge(items)
    assert (right.score, right.is_correct, right.explanation) == (1.0, True, "yes")
    assert (wrong.score, wrong.is_correct) == (0.0, False)
    assert isinstance(undecided, JudgeFailure)
    assert "must say yes or no, this one said 'oslo'" in undecided.error
    assert parrot.prompts == [codec.render(judge_messages(entry)) for entry in items]
    assert {params.temperature for params in parrot.sampling} == {0.0}
    assert judge.stats() == JudgeStats(num_calls=3, num_failures=1)
    judge.close()
    assert parrot.is_closed


def test_an_item_too_long_for_the_model_fails_alone(folder):
    limits = PromptLimits(max_model_len=200, vocab_size=2000)
    judge, parrot, _ = parrot_judge(folder, ["yes"], limits=limits)
    long, short = judge.judge([item("oslo " * 300), item("oslo")])
    assert isinstance(long, JudgeFailure)
    assert "must fit max_model_len=200" in long.error
    assert short.is_correct
    assert len(parrot.prompts) == 1


def test_a_real_model_gives_an_outcome_for_every_item(folder):
    generator = GeneratorConfig(backend="transformers", max_model_len=256)
    judge = build_judge(ModelJudgeConfig(path=folder, max_new_tokens=4, generator=generator))
    outcomes = judge.judge([item("oslo"), item("rome"), item("oslo"), item("")])
    assert len(outcomes) == 4
    assert outcomes[0] == outcomes[2]
    assert outcomes[3] == Verdict(score=0.0, is_correct=False, explanation="empty answer")
    assert judge.stats().num_calls == 2
    judge.close()
    with pytest.raises(ClusterError, match="open"):
        judge.judge([item()])


def test_the_model_judge_owns_a_transformers_generator_when_asked_for_one(folder):
    generator = GeneratorConfig(backend="transformers", max_model_len=256)
    judge = build_judge(ModelJudgeConfig(path=folder, generator=generator))
    assert isinstance(judge._generator, TransformersGenerator)
    judge.close()


def test_turns_are_as_far_apart_as_the_interval_over_all_threads():
    pace = Pace(0.05)
    times = []
    threads = [
        threading.Thread(target=lambda: (pace.wait_for_turn(), times.append(time.monotonic())))
        for _ in range(5)
    ]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(times) - started >= 4 * 0.05


def test_a_pause_holds_back_those_who_already_wait():
    pace = Pace(0.1)
    pace.wait_for_turn()
    times = []
    waiting = threading.Thread(
        target=lambda: (pace.wait_for_turn(), times.append(time.monotonic()))
    )
    started = time.monotonic()
    waiting.start()
    time.sleep(0.02)
    pace.pause_all(0.4)
    waiting.join()
    assert times[0] - started >= 0.4


def test_stop_wakes_everybody_up_and_nobody_has_a_turn_again():
    pace = Pace(100.0)
    assert pace.wait_for_turn()
    threading.Timer(0.05, pace.stop).start()
    started = time.monotonic()
    assert not pace.wait_for_turn()
    assert not pace.sleep(100)
    assert time.monotonic() - started < 10


def test_retry_after_holds_seconds_or_a_date():
    assert retry_after_s("7") == 7.0
    assert retry_after_s("0.5") == 0.5
    assert retry_after_s("-3") == 0.0
    later = datetime.now(UTC) + timedelta(seconds=60)
    assert retry_after_s(format_datetime(later, usegmt=True)) == pytest.approx(60, abs=5)
    assert retry_after_s("Sun, 06 Nov 1994 08:49:37 GMT") == 0.0
    assert [retry_after_s(value) for value in (None, "", "soon", "nan", "inf")] == [None] * 5
    assert not math.isnan(retry_after_s("0"))


@pytest.mark.parametrize(
    "base_url",
    ["", "api.openai.com/v1", "ftp://host/v1", "https://me:secret@host/v1", "https://h/v1?key=s"],
)
def test_an_address_with_credentials_or_without_a_scheme_is_refused_and_not_printed(base_url):
    with pytest.raises(ValidationError) as caught:
        EndpointJudgeConfig(base_url=base_url, model="m")
    assert "http:// or https://" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_key_in_place_of_its_variables_name_is_refused_and_not_printed(tmp_path):
    path = tmp_path / "judge.yaml"
    path.write_text(
        "judge: {kind: endpoint, base_url: 'http://h/v1', model: m, api_key_env: sk-abc123}"
    )
    with pytest.raises(ConfigError, match="name of an environment variable") as caught:
        load_config(CalibrationConfig, path)
    assert "abc123" not in str(caught.value)
    with pytest.raises(ValidationError) as raw:
        EndpointJudgeConfig(base_url="http://h/v1", model="m", api_key_env="sk-abc123")
    assert "abc123" not in str(raw.value)


def test_a_verdict_must_leave_room_for_its_prompt():
    with pytest.raises(ValidationError, match="max_new_tokens must be below"):
        ModelJudgeConfig(path="m", max_new_tokens=64, generator=GeneratorConfig(max_model_len=64))


def test_the_judge_without_a_file_is_recall_of_the_gold_words():
    judge = load_config(CalibrationConfig, None).judge
    assert judge == RuleJudgeConfig(rule="gold_token_recall", correct_at=0.67, max_words=48)
