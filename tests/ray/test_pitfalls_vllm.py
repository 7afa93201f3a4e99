"""Known pitfalls of RL systems, those of the engine that samples: one real vLLM for all of them.

Each test is named after the pitfall's number: 1 mismatch, 4 adapters, 5 prefix cache, 7 end of
sequence, 14 versions of engines, 17 exports.
"""

import ast
import importlib
import json
import threading
import time
from pathlib import Path

import pytest

from past_ray.config.runtime import GeneratorConfig
from past_ray.engine.generators import build_generator
from past_ray.errors import ClusterError, ParityError
from past_ray.rl.types import TrainSample
from tests.tiny_learner import make_learner, make_samples, on_policy, step
from tests.tiny_model import make_tiny_model
from tests.vllm_engines import (
    full_forward_logprobs,
    load,
    make_adapter,
    perturbed,
    sampling,
    weights_of,
)

pytestmark = pytest.mark.ray

PROMPTS = [[3, 6, 7, 8, 9, 1, 4], [3, 10, 11, 4]]
LONG_PROMPT = [6 + index % 50 for index in range(200)]
"""Longer than vLLM's cache block on CPU, 128 tokens, so that a block of it can be reused."""

STOP_IDS = (1, 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint that a learner saved after a step; it asks for greedy sampling, as some do."""
    start = make_tiny_model(tmp_path_factory.mktemp("start"))
    asked = {"eos_token_id": list(STOP_IDS), "top_k": 1, "top_p": 0.1, "temperature": 0.1}
    (start / "generation_config.json").write_text(json.dumps(asked))
    learner = make_learner(start, learning_rate=1e-2)
    step(learner, on_policy(learner, make_samples()))
    saved = tmp_path_factory.mktemp("saved") / "step-000001"
    learner.save(saved)
    return saved


@pytest.fixture(scope="module")
def started(folder):
    """The engine and what it answered from the folder alone, before any sync."""
    config = GeneratorConfig(max_model_len=256, kv_cache_gib=0.125)
    generator = build_generator(config, folder, lora_rank=4)
    yield generator, generator.generate(PROMPTS, [sampling(seed=seed) for seed in range(2)])
    generator.close()


@pytest.fixture
def generator(started, folder):
    started[0].update_weights(weights_of(load(folder)), 0)
    return started[0]


def check_scored(model, prompt, completion):
    expected = full_forward_logprobs(model, prompt, completion.token_ids, 0.7)
    assert completion.logprobs == pytest.approx(expected, abs=1e-4)


def vllm_of(generator):
    return generator._engine._engine


def test_pitfall_17_vllm_serves_a_saved_checkpoint_as_it_is(started, folder):
    for prompt, completion in zip(PROMPTS, started[1], strict=True):
        check_scored(load(folder), prompt, completion)


def test_pitfall_01_generator_and_learner_agree_on_every_sampled_token(generator, folder):
    completions = generator.generate(PROMPTS, [sampling(seed=seed) for seed in range(2)])
    samples = [
        TrainSample(
            token_ids=prompt + completion.token_ids,
            loss_mask=[False] * len(prompt) + [True] * len(completion.token_ids),
            generator_logprobs=[0.0] * len(prompt) + completion.logprobs,
            advantages=[0.0] * (len(prompt) + len(completion.token_ids)),
        )
        for prompt, completion in zip(PROMPTS, completions, strict=True)
    ]
    assert make_learner(folder, temperature=0.7).logprob_gap(samples) < 1e-4
    # The same tokens at another temperature are far off, so a forgotten one would show.
    assert make_learner(folder, temperature=1.0).logprob_gap(samples) > 0.05


def test_pitfall_01_sampling_defaults_of_a_checkpoint_do_not_truncate(generator):
    """With ``top_k`` 1 there would be one answer and every log-probability would be 0."""
    completions = generator.generate(PROMPTS[:1] * 8, [sampling(seed=seed) for seed in range(8)])
    assert len({tuple(completion.token_ids) for completion in completions}) > 1
    assert min(min(completion.logprobs) for completion in completions) < -0.1


def test_pitfall_04_an_adapter_reaches_the_sampler_and_older_ones_are_unloaded(generator, folder):
    base = load(folder)
    for version in range(1, 5):
        adapter, merged = make_adapter(load(folder), seed=version)
        generator.load_adapter(adapter, version)
        completion = generator.generate(PROMPTS[:1], [sampling()])[0]
        assert completion.policy_version == version
        check_scored(merged, PROMPTS[0], completion)
        assert len(vllm_of(generator).list_loras()) == 1
    frozen = full_forward_logprobs(base, PROMPTS[0], completion.token_ids, 0.7)
    assert completion.logprobs != pytest.approx(frozen, abs=0.05)


def test_pitfall_04_an_adapter_that_the_engine_does_not_list_is_an_error(
    generator, folder, monkeypatch
):
    adapter, _ = make_adapter(load(folder))
    monkeypatch.setattr(vllm_of(generator), "add_lora", lambda request: True)
    with pytest.raises(ClusterError, match=r"policy-v9 is not loaded, the engine lists \[\]"):
        generator.load_adapter(adapter, 9)


def test_pitfall_04_a_request_in_flight_keeps_the_adapter_that_it_names(generator, folder):
    (old, old_merged), (new, new_merged) = (make_adapter(load(folder), seed=s) for s in (0, 1))
    generator.load_adapter(old, 1)
    completions = []
    many = [sampling(seed=seed, max_new_tokens=100) for seed in range(8)]
    thread = threading.Thread(
        target=lambda: completions.extend(generator.generate([PROMPTS[0]] * 8, many))
    )
    thread.start()
    while generator.stats().num_in_flight == 0:
        time.sleep(0.001)
    generator.load_adapter(new, 2)
    check_scored(new_merged, PROMPTS[0], generator.generate(PROMPTS[:1], [sampling()])[0])
    thread.join(60)
    assert len(completions) == 8
    for completion in completions:
        merged = {1: old_merged, 2: new_merged}[completion.policy_version]
        check_scored(merged, PROMPTS[0], completion)
    assert len(vllm_of(generator).list_loras()) == 1


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_pitfall_05_no_prefix_of_older_weights_is_reused(generator, folder, kind):
    def complete():
        return generator.generate([LONG_PROMPT], [sampling()])[0]

    complete()
    assert complete().num_cached_tokens == 128
    if kind == "full":
        model = perturbed(folder, 0.05)
        generator.update_weights(weights_of(model), 1)
    else:
        adapter, model = make_adapter(load(folder))
        generator.load_adapter(adapter, 1)
    after = complete()
    assert after.num_cached_tokens == 0
    check_scored(model, LONG_PROMPT, after)
    assert complete().num_cached_tokens == 128


def test_pitfall_05_a_cache_that_vllm_does_not_reset_fails_the_sync(generator, folder, monkeypatch):
    generator.probe(PROMPTS, [sampling()] * 2, 0)
    monkeypatch.setattr(vllm_of(generator), "reset_prefix_cache", lambda: True)
    generator.update_weights(weights_of(perturbed(folder, 0.05)), 1)
    with pytest.raises(ParityError, match="prefix cache must be empty after a sync"):
        generator.probe(PROMPTS, [sampling()] * 2, 1)


def test_pitfall_07_every_stop_id_ends_a_completion_and_is_kept(generator):
    found = generator.generate(
        PROMPTS[:1] * 100,
        [sampling(temperature=2.0, max_new_tokens=20, seed=seed) for seed in range(100)],
    )
    ended = [completion for completion in found if completion.finish_reason == "stop"]
    assert {completion.token_ids[-1] for completion in ended} == set(STOP_IDS)
    for completion in found:
        assert not set(completion.token_ids[:-1]) & set(STOP_IDS)
        assert completion.finish_reason == "stop" or len(completion.token_ids) == 20


def test_pitfall_14_every_name_that_we_import_from_vllm_exists_in_the_installed_version(started):
    names = {
        (node.module, alias.name)
        for path in (Path(__file__).parents[2] / "past_ray").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm"
        for alias in node.names
    }
    assert len(names) > 10
    missing = [
        (module, name)
        for module, name in sorted(names)
        if not hasattr(importlib.import_module(module), name)
    ]
    assert missing == []
