"""The actor around a real vLLM engine: it answers whatever the engine is doing."""

import statistics
import time

import pytest
import ray

from past_ray.config.runtime import GeneratorConfig
from past_ray.engine.shared_weights import SharedWeights
from past_ray.errors import GenerationError
from past_ray.runtime.generator_actor import GeneratorActor
from tests.tiny_model import make_tiny_model
from tests.vllm_engines import load, make_adapter, sampling, weights_of

pytestmark = pytest.mark.ray

PROMPT = [3, 6, 7, 8, 9, 1, 4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def pings_of_setup():
    return []


@pytest.fixture(scope="module")
def actor(cluster, folder, pings_of_setup):
    config = GeneratorConfig(max_model_len=256, kv_cache_gib=0.125)
    actor = GeneratorActor.options(num_cpus=0.5).remote(config, folder, lora_rank=4)
    ray.get(actor.ping.remote())
    pings_of_setup.extend(pings_while(actor, actor.setup.remote()))
    return actor


def pings_while(actor, call):
    """Ping the actor until a call has ended; return how long each ping took, in seconds."""
    seconds = []
    while not ray.wait([call], timeout=0)[0]:
        started = time.perf_counter()
        ray.get(actor.ping.remote())
        seconds.append(time.perf_counter() - started)
    ray.get(call)
    return seconds


def test_ping_answers_during_setup_generation_and_sync(actor, folder, pings_of_setup):
    # Imports and other calls into C hold the interpreter for moments: the median shows the rest.
    assert len(pings_of_setup) > 20
    assert statistics.median(pings_of_setup) < 0.1
    long = [sampling(seed=seed, max_new_tokens=200) for seed in range(64)]
    during = pings_while(actor, actor.generate.remote([PROMPT] * 64, long))
    assert len(during) > 5
    assert statistics.median(during) < 0.1
    weights = ray.put(SharedWeights(weights_of(load(folder))))
    pings_while(actor, actor.update_weights.remote(weights, 1))
    assert ray.get(actor.version.remote()) == ray.get(actor.ping.remote()).policy_version == 1


def test_hundreds_of_calls_wait_at_once_and_ping_still_answers(actor):
    calls = [
        actor.generate_each.remote([PROMPT], [sampling(seed=seed, max_new_tokens=100)])
        for seed in range(400)
    ]
    started = time.perf_counter()
    stats = ray.get(actor.ping.remote())
    assert time.perf_counter() - started < 5
    outcomes = ray.get(calls)
    assert len(outcomes) == 400
    after = ray.get(actor.ping.remote())
    assert after.num_in_flight == 0
    assert after.num_requests >= 400
    assert after.busy_s > stats.busy_s


def test_a_prompt_that_does_not_fit_gets_its_error_and_the_others_their_completion(actor):
    fitting, error = ray.get(
        actor.generate_each.remote([PROMPT, [6] * 250], [sampling(), sampling()])
    )
    assert fitting.token_ids
    assert isinstance(error, GenerationError)


def test_an_adapter_passes_the_object_store_and_the_probe_finds_it(actor, folder):
    adapter, _ = make_adapter(load(folder))
    ray.get(actor.load_adapter.remote(ray.put(adapter), 2))
    completions = ray.get(actor.probe.remote([PROMPT], [sampling()], 2))
    assert completions[0].policy_version == 2


def test_it_can_be_closed_and_set_up_again(actor):
    ray.get(actor.close.remote())
    assert ray.get(actor.ping.remote()).policy_version == -1
    ray.get(actor.setup.remote())
    assert ray.get(actor.generate.remote([PROMPT], [sampling()]))[0].token_ids
