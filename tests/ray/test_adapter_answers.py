"""Adapters spread over two engines in Ray actors, against dense merges."""

from pathlib import Path

import pytest
import ray
import torch

from past_ray.config.runtime import GeneratorConfig, RuntimeConfig
from past_ray.errors import ClusterError, ConfigError, StorageError
from past_ray.runtime.adapter_answers import AdapterAnswers, AdapterRequest, deal
from tests.peft_adapters import make_peft_adapter
from tests.tiny_model import make_tiny_model
from tests.vllm_engines import (
    full_forward_logprobs,
    perturbed,
    sampling,
    weights_of,
)

pytestmark = pytest.mark.ray

PROMPT = [3, 6, 7, 8, 9, 1, 4]
SETTINGS = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
CONFIG = RuntimeConfig(
    num_generators=2,
    cpus_per_generator=0.5,
    generator=GeneratorConfig(max_model_len=256, kv_cache_gib=0.125),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="module")
def adapters(folder):
    places = [folder.parent / f"passage-{seed}" for seed in range(5)]
    return {
        place: make_peft_adapter(folder, place, seed=seed, **SETTINGS)
        for seed, place in enumerate(places)
    }


@pytest.fixture(scope="module")
def answers(cluster, folder):
    with AdapterAnswers(CONFIG, folder, max_rank=4, max_loras=2) as answers:
        yield answers


def requests_of(adapters):
    """Three prompts for each adapter, in turns, and two for the base."""
    places = [*adapters, None, *adapters, *adapters, None]
    return [
        AdapterRequest(request_id=f"r{index}", prompt_ids=[*PROMPT, 10 + index], adapter=place)
        for index, place in enumerate(places)
    ]


def ignore(request_id, completion):
    pass


def test_each_request_is_answered_by_its_adapter_on_the_new_base_and_told_once(
    answers, folder, adapters
):
    answers.load_base(weights_of(perturbed(folder, 0.05)), 3)
    requests, told = requests_of(adapters), {}
    params = [sampling(seed=seed) for seed in range(len(requests))]

    def on_done(request_id, completion):
        assert request_id not in told
        told[request_id] = completion

    completions = answers.answer(requests, params, on_done)
    assert [told[request.request_id] for request in requests] == completions
    for request, completion in zip(requests, completions, strict=True):
        model = perturbed(folder, 0.05)
        if request.adapter:
            with torch.no_grad():
                for name, change in adapters[request.adapter].items():
                    model.get_parameter(name).add_(change)
        expected = full_forward_logprobs(model, request.prompt_ids, completion.token_ids, 0.7)
        assert completion.logprobs == pytest.approx(expected, abs=1e-4)
        assert completion.policy_version == 3


def test_an_error_of_an_engine_reaches_the_caller_as_it_is_and_the_actors_go_on(
    answers, adapters, tmp_path
):
    requests = requests_of(adapters)
    missing = AdapterRequest(request_id="m", prompt_ids=PROMPT, adapter=tmp_path / "missing")
    with pytest.raises(StorageError, match="found none"):
        answers.answer([*requests, missing], [sampling()] * (len(requests) + 1), ignore)
    assert len(answers.answer(requests, [sampling()] * len(requests), ignore)) == len(requests)


def test_settings_that_no_engine_can_serve_are_refused_with_their_own_error(cluster, folder):
    with pytest.raises(ConfigError, match="max_rank of 1 to 512"):
        AdapterAnswers(CONFIG, folder, max_rank=513, max_loras=2)


def test_a_dead_actor_is_a_cluster_error_that_names_it(answers, folder, adapters):
    requests = requests_of(adapters)
    ray.kill(answers._actors[1])
    with pytest.raises(ClusterError, match="actor 1 of 2 must stay alive"):
        answers.answer(requests, [sampling()] * len(requests), ignore)
    with pytest.raises(ClusterError, match="actor 1 of 2 must stay alive"):
        answers.load_base(weights_of(perturbed(folder, 0.1)), 4)


def test_an_adapter_is_never_split_and_the_base_fills_the_shorter_share():
    a, b = Path("a"), Path("b")
    assert deal([a, b, a, b, None, None], num_shares=2) == [[0, 2, 4], [1, 3, 5]]
    assert deal([a, a, a, b, None, None], num_shares=2) == [[0, 1, 2], [3, 4, 5]]
    assert deal([a], num_shares=3) == [[0], [], []]
