import subprocess
import sys
import threading

import pytest
import torch
from transformers import AutoModelForCausalLM

from past_ray.config.runtime import GeneratorConfig
from past_ray.engine.generators import build_generator
from past_ray.engine.transformers_generator import TransformersGenerator
from past_ray.errors import ClusterError, ConfigError, GenerationError
from past_ray.rl.types import SamplingParams
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.ray

EOS = 1
PROMPTS = [[3, 6, 7, 8, 9, EOS, 4], [3, 10, 11, 4], [5, 6, 7, 8, 12, 13, 14, 15, 16, 17, 4]]
LONG_PROMPT = [6 + index % 50 for index in range(200)]
"""Longer than vLLM's cache block on CPU, 128 tokens, so that a block of it can be reused."""


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request, tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), tie_word_embeddings=request.param)


@pytest.fixture(scope="module")
def generator(folder):
    config = GeneratorConfig(max_model_len=256, kv_cache_gib=0.125)
    generator = build_generator(config, folder)
    yield generator
    generator.close()


@pytest.fixture
def fresh(generator, folder):
    """The shared engine, back on the weights of the folder."""
    generator.update_weights(dict(load(folder).named_parameters()), 0)
    return generator


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def perturbed(folder, size):
    """The folder's model, every weight moved, so that each of them shows in the output."""
    model = load(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.sin(torch.arange(parameter.numel())).view_as(parameter)
    return model


def sampling(*, temperature=0.7, max_new_tokens=8, seed=0):
    return SamplingParams(temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)


def full_forward_logprobs(model, prompt, completion, temperature):
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion.token_ids])).logits[0]
    logprobs = (logits / temperature).log_softmax(-1)
    return [
        logprobs[len(prompt) - 1 + index, token_id].item()
        for index, token_id in enumerate(completion.token_ids)
    ]


def greedy_ids(model, prompt):
    output = model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=8, pad_token_id=0
    )
    return output[0, len(prompt) :].tolist()


def test_logprobs_equal_a_transformers_forward_with_the_temperature_applied(fresh, folder):
    completions = fresh.generate(PROMPTS, [sampling(seed=seed) for seed in range(3)])
    model = load(folder)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        expected = full_forward_logprobs(model, prompt, completion, 0.7)
        assert completion.logprobs == pytest.approx(expected, abs=1e-4)


def test_after_an_update_it_equals_a_fresh_model_with_the_new_weights(fresh, folder):
    # Twice, because the second reload starts from what the first one left.
    for version, size in ((1, 0.05), (2, 0.1)):
        model = perturbed(folder, size)
        fresh.update_weights(dict(model.named_parameters()), version)
        greedy = fresh.generate(PROMPTS, [sampling(temperature=0.0)] * 3)
        assert [c.token_ids for c in greedy] == [greedy_ids(model, prompt) for prompt in PROMPTS]
        sampled = fresh.generate(PROMPTS, [sampling(seed=seed) for seed in range(3)])
        for prompt, completion in zip(PROMPTS, sampled, strict=True):
            expected = full_forward_logprobs(model, prompt, completion, 0.7)
            assert completion.logprobs == pytest.approx(expected, abs=1e-4)
            assert completion.policy_version == fresh.policy_version == version


def test_the_prefix_cache_never_survives_an_update(fresh, folder):
    def newly_cached():
        before = fresh.stats().num_cached_prompt_tokens
        completion = fresh.generate([LONG_PROMPT], [sampling()])[0]
        return fresh.stats().num_cached_prompt_tokens - before, completion

    newly_cached()
    assert newly_cached()[0] == 128
    model = perturbed(folder, 0.05)
    fresh.update_weights(dict(model.named_parameters()), 1)
    num_cached, completion = newly_cached()
    assert num_cached == 0
    expected = full_forward_logprobs(model, LONG_PROMPT, completion, 0.7)
    assert completion.logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "missed",
    [
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.embed_tokens.weight",
    ],
)
def test_one_missed_tensor_is_named_and_the_old_weights_stay_in_use(fresh, folder, missed):
    before = fresh.generate(PROMPTS, [sampling()] * 3)
    weights = dict(perturbed(folder, 0.05).named_parameters())
    del weights[missed]
    with pytest.raises(ClusterError, match=f"1 were missed: {missed}"):
        fresh.update_weights(weights, 9)
    assert fresh.generate(PROMPTS, [sampling()] * 3) == before


def test_a_seed_reproduces_a_completion_whatever_is_decoded_beside_it(fresh):
    alone = fresh.generate(PROMPTS[:1], [sampling(seed=5)])[0]
    beside = fresh.generate(PROMPTS[::-1], [sampling(seed=seed) for seed in (8, 9, 5)])[2]
    other = fresh.generate(PROMPTS[:1], [sampling(seed=6)])[0]
    assert alone.token_ids == beside.token_ids != other.token_ids


def test_more_seeded_prompts_than_one_prefill_holds_are_all_completed(fresh):
    # 100 prompts of 100 tokens exceed the engine's prefill budget; a seeded one must not be cut.
    prompts = [[*LONG_PROMPT[:99], 6 + index % 50] for index in range(100)]
    together = fresh.generate(prompts, [sampling(seed=index) for index in range(100)])
    alone = fresh.generate(prompts[50:51], [sampling(seed=50)])[0]
    assert [len(completion.logprobs) > 0 for completion in together] == [True] * 100
    assert together[50].token_ids == alone.token_ids


def test_end_of_sequence_is_kept_and_ends_the_completion(fresh):
    found = fresh.generate(
        PROMPTS[:1] * 100, [sampling(temperature=2.0, seed=seed) for seed in range(100)]
    )
    assert any(completion.finish_reason == "stop" for completion in found)
    for completion in found:
        ends = completion.token_ids[-1] == EOS
        assert completion.finish_reason == ("stop" if ends else "length")
        assert ends or len(completion.token_ids) == 8
        assert EOS not in completion.token_ids[:-1]
        assert len(completion.logprobs) == len(completion.token_ids)


def test_a_prompt_that_does_not_fit_or_is_refused_leaves_the_engine_working(fresh):
    with pytest.raises(GenerationError, match=r"prompt 1 of 2.*max_model_len=256"):
        fresh.generate([PROMPTS[0], [6] * 249], [sampling()] * 2)
    with pytest.raises(GenerationError, match="prompt 1 of 2: token ids must be in"):
        fresh.generate([PROMPTS[0], [1_000_000]], [sampling()] * 2)
    with pytest.raises(GenerationError, match="prompt 1 of 2 was refused: temperature"):
        fresh.generate(PROMPTS[:2], [sampling(), sampling(temperature=3.0)])
    assert len(fresh.generate([[6] * 248], [sampling()])) == 1


def test_two_threads_and_an_update_between_them_share_one_engine(fresh, folder):
    expected = fresh.generate(PROMPTS * 8, [sampling(seed=seed) for seed in range(24)])
    results = {}

    def generate(key, start):
        results[key] = fresh.generate(
            (PROMPTS * 8)[start::2], [sampling(seed=seed) for seed in range(start, 24, 2)]
        )

    threads = [threading.Thread(target=generate, args=(start, start)) for start in range(2)]
    for thread in threads:
        thread.start()
    fresh.update_weights(dict(load(folder).named_parameters()), 1)
    for thread in threads:
        thread.join(60)
    for start in range(2):
        assert len({completion.policy_version for completion in results[start]}) == 1
        assert [c.token_ids for c in results[start]] == [c.token_ids for c in expected[start::2]]


def test_the_transformers_backend_answers_greedily_with_the_same_tokens_and_logprobs(fresh, folder):
    plain = TransformersGenerator(folder, dtype="float32", max_model_len=256, max_num_seqs=8)
    greedy = [sampling(temperature=0.0)] * 3
    for ours, theirs in zip(
        fresh.generate(PROMPTS, greedy), plain.generate(PROMPTS, greedy), strict=True
    ):
        assert ours.token_ids == theirs.token_ids
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def test_settings_that_vllm_refuses_are_a_config_error(folder):
    config = GeneratorConfig(max_model_len=100_000, kv_cache_gib=0.125)
    with pytest.raises(ConfigError, match="vLLM refused"):
        build_generator(config, folder)


def test_an_nccl_generator_checks_names_before_it_receives_and_takes_nothing_by_hand(folder):
    """What can be shown without GPUs; the transfer itself cannot."""
    config = GeneratorConfig(max_model_len=256, kv_cache_gib=0.125, weight_transfer="nccl")
    generator = build_generator(config, folder)
    weights = dict(load(folder).named_parameters())
    names = [name for name in weights if "q_proj.bias" not in name]
    with pytest.raises(ClusterError, match=r"2 were missed: model\.layers\.0\.self_attn\.q_proj"):
        generator.receive_weights({"names": names, "dtype_names": [], "shapes": []}, 1)
    with pytest.raises(ClusterError, match="object_store"):
        generator.update_weights(weights, 1)
    assert generator.generate(PROMPTS, [sampling()] * 3)
    generator.close()


def test_a_prefix_cache_that_vllm_refuses_to_reset_fails_the_sync(folder, monkeypatch):
    generator = build_generator(GeneratorConfig(max_model_len=64, kv_cache_gib=0.125), folder)
    monkeypatch.setattr(generator._engine._engine, "reset_prefix_cache", lambda: False)
    with pytest.raises(ClusterError, match="kept its prefix cache"):
        generator.update_weights(dict(load(folder).named_parameters()), 1)
    with pytest.raises(ClusterError, match="failed"):
        generator.generate(PROMPTS, [sampling()] * 3)
    generator.close()


def test_without_vllm_the_error_names_the_extra_and_the_other_backend(folder):
    script = (
        "import sys; sys.modules['vllm'] = None\n"
        "from pathlib import Path\n"
        "from past_ray.config.runtime import GeneratorConfig\n"
        "from past_ray.engine.generators import build_generator\n"
        "from past_ray.errors import ConfigError\n"
        f"folder = Path({str(folder)!r})\n"
        "try:\n"
        "    build_generator(GeneratorConfig(), folder)\n"
        "except ConfigError as error:\n"
        "    assert 'past-ray[cpu]' in str(error) and 'past-ray[gpu]' in str(error), error\n"
        "else:\n"
        "    raise AssertionError('no error')\n"
        "build_generator(GeneratorConfig(backend='transformers'), folder).close()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
