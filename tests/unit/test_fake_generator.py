import json

import pytest
import torch

from past_ray.engine.fake import FAKE_WEIGHT, FakeGenerator, FakeLearner, scripted
from past_ray.engine.generator_checks import check_weight_names, eos_token_ids
from past_ray.errors import ClusterError, ConfigError, GenerationError
from past_ray.rl.objective import StepTotals
from past_ray.rl.protocols import Generator, Learner
from past_ray.rl.types import SamplingParams, TrainSample

SAMPLE = TrainSample(
    token_ids=[4, 5, 6],
    loss_mask=[False, True, True],
    generator_logprobs=[0.0, -0.1, -0.2],
    advantages=[0.0, 1.0, 2.0],
)


def sampling(*, seed=None, max_new_tokens=4):
    return SamplingParams(temperature=1.0, max_new_tokens=max_new_tokens, seed=seed)


def test_answers_are_chosen_by_the_seed():
    generator: Generator = FakeGenerator(scripted([[1, 2], [3]]))
    completions = generator.generate([[9]] * 3, [sampling(seed=s) for s in (0, 1, 2)])
    assert [completion.token_ids for completion in completions] == [[1, 2], [3], [1, 2]]


def test_a_long_answer_is_cut_and_finishes_by_length():
    completion = FakeGenerator(scripted([[1, 2, 3]])).generate([[9]], [sampling(max_new_tokens=2)])[
        0
    ]
    assert (completion.token_ids, completion.finish_reason) == ([1, 2], "length")
    assert completion.logprobs == [-0.5, -0.5]


def test_completions_carry_the_version_of_the_weights_last_given():
    generator = FakeGenerator(scripted([[1]]))
    assert generator.generate([[9]], [sampling()])[0].policy_version == -1
    generator.update_weights({FAKE_WEIGHT: torch.ones(1)}, 3)
    assert generator.generate([[9]], [sampling()])[0].policy_version == 3
    assert generator.weights[FAKE_WEIGHT].item() == 1.0


@pytest.mark.parametrize(
    ("prompt", "max_new_tokens", "message"),
    [
        ([1] * 7, 4, "max_model_len=10"),
        ([], 4, "at least one token"),
        ([0, 100], 4, r"token ids must be in \[0, 100\)"),
        ([-1], 4, r"token ids must be in \[0, 100\)"),
        ([1], 0, "max_new_tokens must be at least 1"),
    ],
)
def test_a_prompt_that_cannot_be_completed_is_refused_with_its_index(
    prompt, max_new_tokens, message
):
    generator = FakeGenerator(scripted([[1]]), max_model_len=10, vocab_size=100)
    with pytest.raises(GenerationError, match=f"prompt 1 of 2.*{message}"):
        generator.generate([[9], prompt], [sampling(), sampling(max_new_tokens=max_new_tokens)])


def test_a_prompt_that_just_fits_is_completed():
    generator = FakeGenerator(scripted([[1]]), max_model_len=10)
    assert generator.generate([[1] * 6], [sampling(max_new_tokens=4)])[0].token_ids == [1]


def test_a_closed_generator_says_so():
    generator = FakeGenerator(scripted([[1]]))
    generator.close()
    with pytest.raises(ClusterError, match="close"):
        generator.generate([[9]], [sampling()])


def test_the_learner_adds_the_mean_advantage_of_the_step_and_counts_it():
    learner: Learner = FakeLearner()
    metrics = learner.train_step(
        [SAMPLE], totals=StepTotals(num_loss_tokens=4, num_rollouts=1, rollout_token_limit=8)
    )
    assert learner.export_weights()[FAKE_WEIGHT].tolist() == [0.75]
    assert learner.policy_version == 1
    assert metrics == {"loss": -0.75}
    assert learner.token_logprobs([SAMPLE]) == [[0.0, -0.1, -0.2]]


def test_the_learner_continues_from_what_it_saved(tmp_path):
    learner = FakeLearner()
    learner.train_step(
        [SAMPLE], totals=StepTotals(num_loss_tokens=4, num_rollouts=1, rollout_token_limit=8)
    )
    learner.save(tmp_path / "step-1")
    again = FakeLearner.load(tmp_path / "step-1")
    assert again.policy_version == 1
    assert again.export_weights()[FAKE_WEIGHT].tolist() == [0.75]


def test_a_sync_that_misses_or_adds_a_parameter_is_refused_by_name():
    check_weight_names({"a", "b"}, {"a", "b"})
    with pytest.raises(ClusterError, match=r"1 were missed: b\."):
        check_weight_names({"a"}, {"a", "b"})
    with pytest.raises(ClusterError, match=r"1 are unknown to it: c\."):
        check_weight_names({"a", "b", "c"}, {"a", "b"})


def test_an_error_over_a_whole_checkpoint_names_eight_parameters_and_counts_the_rest():
    with pytest.raises(ClusterError, match="p07 and 12 more"):
        check_weight_names(set(), {f"p{index:02d}" for index in range(20)})


@pytest.mark.parametrize(("stated", "ids"), [(1, [1]), ([2, 1], [2, 1])])
def test_the_generation_config_states_what_ends_a_completion(tmp_path, stated, ids):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 9}))
    assert eos_token_ids(tmp_path) == [9]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stated}))
    assert eos_token_ids(tmp_path) == ids


def test_a_checkpoint_without_an_end_of_sequence_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="eos_token_id"):
        eos_token_ids(tmp_path)
