"""Many adapters through one real vLLM engine, against dense merges scored by transformers."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from past_ray.config.runtime import GeneratorConfig
from past_ray.engine.vllm_adapter_bank import VLLMAdapterBank
from past_ray.errors import (
    ClusterError,
    ConfigError,
    GenerationError,
    SkillVectorError,
    StorageError,
)
from tests.peft_adapters import FORMS, make_peft_adapter
from tests.tiny_model import make_tiny_model
from tests.vllm_engines import full_forward_logprobs, load, perturbed, sampling, weights_of

pytestmark = pytest.mark.ray

PROMPT = [3, 6, 7, 8, 9, 1, 4]
LONG_PROMPT = [6 + index % 40 for index in range(140)]
"""Longer than one block of the prefix cache, which has 128 tokens on CPU."""

MAX_RANK, MAX_LORAS = 8, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="module")
def bank(folder):
    bank = started(folder, max_rank=MAX_RANK, max_loras=MAX_LORAS)
    yield bank
    bank.close()


@pytest.fixture(scope="module")
def adapters(folder):
    """Adapters of several forms, more than fit the engine, with what PEFT's merge adds."""
    forms = list(FORMS.values())
    found = {}
    for seed in range(2 * MAX_LORAS):
        place = folder.parent / f"adapter-{seed}"
        found[place] = make_peft_adapter(folder, place, seed=seed, **forms[seed % len(forms)])
    return found


@pytest.fixture(autouse=True)
def own_base(request, folder):
    """Every test begins with the weights of the folder, as version 0."""
    if "bank" in request.fixturenames:
        request.getfixturevalue("bank").update_base(weights_of(load(folder)), 0)


def started(folder, *, max_rank, max_loras):
    config = GeneratorConfig(max_model_len=256, kv_cache_gib=0.125)
    return VLLMAdapterBank(folder, config, max_rank=max_rank, max_loras=max_loras)


def merged(model, changes):
    """Add the float64 changes of an adapter to a model's weights, in place."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in changes:
                parameter.copy_(parameter.double() + changes[name])
    return model


def check_scored_by(model, prompt, completion):
    expected = full_forward_logprobs(model, prompt, completion.token_ids, 0.7)
    assert completion.token_ids
    assert completion.logprobs == pytest.approx(expected, abs=1e-4)


def far_apart(model, other, prompt, token_ids):
    """Whether two models give one of the tokens log-probabilities that differ by 0.05 or more."""
    one, two = (full_forward_logprobs(m, prompt, token_ids, 0.7) for m in (model, other))
    return max(abs(a - b) for a, b in zip(one, two, strict=True)) > 0.05


def test_each_request_is_answered_by_the_dense_merge_of_its_adapter_and_none_by_the_base(
    bank, folder, adapters
):
    places = [None, *adapters, None, *reversed(adapters)]
    prompts = [PROMPT, *[[*PROMPT, 10 + index] for index in range(len(places) - 1)]]
    params = [sampling(seed=seed) for seed in range(len(places))]
    completions = bank.generate(prompts, params, places)
    base = load(folder)
    for place, prompt, completion in zip(places, prompts, completions, strict=True):
        model = merged(load(folder), adapters[place]) if place else base
        check_scored_by(model, prompt, completion)
        assert completion.policy_version == 0
        if place:
            assert far_apart(model, base, prompt, completion.token_ids)


def test_after_a_new_base_the_adapter_is_added_to_it_and_no_cached_prefix_survives(
    bank, folder, adapters
):
    place, changes = next(iter(adapters.items()))
    params = [sampling(seed=1, max_new_tokens=8)] * 2

    def answers():
        return bank.generate([LONG_PROMPT] * 2, params, [place, None])

    answers()
    assert all(completion.num_cached_tokens >= 128 for completion in answers())
    bank.update_base(weights_of(perturbed(folder, 0.05)), 5)
    assert bank.base_version == 5
    new = answers()
    check_scored_by(merged(perturbed(folder, 0.05), changes), LONG_PROMPT, new[0])
    check_scored_by(perturbed(folder, 0.05), LONG_PROMPT, new[1])
    assert [completion.num_cached_tokens for completion in new] == [0, 0]
    assert far_apart(
        merged(load(folder), changes),
        merged(perturbed(folder, 0.05), changes),
        LONG_PROMPT,
        new[0].token_ids,
    )


def test_equal_prompts_of_two_adapters_and_of_a_rewritten_one_share_no_prefix(
    bank, folder, adapters, tmp_path
):
    (first, _), (second, changes) = list(adapters.items())[:2]
    place = tmp_path / "passage"
    shutil.copytree(first, place)
    params = [sampling(seed=2)]
    for other in (None, first, place):
        bank.generate([LONG_PROMPT], params, [other])
    shutil.rmtree(place)
    shutil.copytree(second, place)
    (completion,) = bank.generate([LONG_PROMPT], params, [place])
    assert completion.num_cached_tokens == 0
    check_scored_by(merged(load(folder), changes), LONG_PROMPT, completion)


def test_an_evicted_adapter_comes_back_with_its_own_answer(bank, adapters):
    first, *others = adapters
    params = [sampling(seed=3)]
    (before,) = bank.generate([PROMPT], params, [first])
    bank.generate([PROMPT] * len(others), params * len(others), others)
    held = bank._vllm.list_loras()
    assert len(held) == MAX_LORAS
    assert bank._name(first).lora_int_id not in held
    (after,) = bank.generate([PROMPT], params, [first])
    assert after.token_ids == before.token_ids
    assert after.logprobs == pytest.approx(before.logprobs, abs=1e-5)


def test_no_more_adapters_are_in_flight_than_the_engine_holds_and_the_base_beside_them(
    bank, adapters
):
    step, seen = bank._engine.step, []

    def watched():
        seen.append({adapter and adapter.lora_name for _, adapter in bank._in_flight.values()})
        return step()

    bank._engine.step = watched
    try:
        places = [None, *(place for place in adapters for _ in range(2)), None]
        params = [sampling(seed=seed) for seed in range(len(places))]
        bank.generate([PROMPT] * len(places), params, places)
    finally:
        bank._engine.step = step
    assert max(len(names - {None}) for names in seen) == MAX_LORAS
    assert any(len(names) == 1 + MAX_LORAS for names in seen if None in names)


def test_a_call_that_is_left_early_leaves_nothing_in_flight(bank, folder, adapters):
    places = list(adapters)
    stream = bank.stream([PROMPT] * len(places), [sampling()] * len(places), places)
    next(stream)
    with pytest.raises(ClusterError, match="one call at a time"):
        bank.generate([PROMPT], [sampling()], [None])
    stream.close()
    (completion,) = bank.generate([PROMPT], [sampling()], [None])
    check_scored_by(load(folder), PROMPT, completion)


def test_after_an_error_inside_the_engine_everything_is_refused(bank, folder, monkeypatch):
    def fail():
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(bank._engine, "step", fail)
        with pytest.raises(ClusterError, match="the engine failed: RuntimeError"):
            bank.generate([PROMPT], [sampling()], [None])
    with pytest.raises(ClusterError, match="it failed before: RuntimeError"):
        bank.generate([PROMPT], [sampling()], [None])
    with pytest.raises(ClusterError, match="it failed before: RuntimeError"):
        bank.update_base(weights_of(load(folder)), 1)
    bank._failure = None  # Nothing has really happened to it.


def rewrite(folder, *, change):
    tensors = change(load_file(folder / "adapter_model.safetensors"))
    save_file(tensors, folder / "adapter_model.safetensors")


def truncate(place):
    content = (place / "adapter_model.safetensors").read_bytes()
    (place / "adapter_model.safetensors").write_bytes(content[: len(content) // 2])


def raise_rank(place):
    config = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps({**config, "r": 9}))
    rewrite(
        place,
        change=lambda tensors: {
            name: torch.zeros(9, t.shape[1]) if ".lora_A." in name else torch.zeros(t.shape[0], 9)
            for name, t in tensors.items()
        },
    )


def rename_layer(place):
    rewrite(
        place, change=lambda found: {n.replace("layers.1", "layers.7"): t for n, t in found.items()}
    )


def widen(place):
    rewrite(
        place,
        change=lambda found: {
            name: tensor.repeat(1, 2) if ".lora_A." in name else tensor
            for name, tensor in found.items()
        },
    )


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (shutil.rmtree, StorageError, "adapter_config.json must be a file, found none"),
        (truncate, StorageError, "complete safetensors file"),
        (raise_rank, SkillVectorError, "started for, 8; .* has 9"),
        (rename_layer, SkillVectorError, r"layers\.7\.self_attn\.q_proj.*the base has none"),
        (widen, SkillVectorError, r"q_proj.weight \(64, 128\), the base has \(64, 64\)"),
    ],
)
def test_a_bad_adapter_is_refused_before_anything_is_sampled_and_the_engine_goes_on(
    bank, folder, adapters, tmp_path, damage, error, message
):
    good = next(iter(adapters))
    bad = tmp_path / "bad"
    shutil.copytree(good, bad)
    damage(bad)
    with pytest.raises(error, match=message):
        bank.stream([PROMPT] * 2, [sampling()] * 2, [good, bad])
    (completion,) = bank.generate([PROMPT], [sampling()], [good])
    check_scored_by(merged(load(folder), adapters[good]), PROMPT, completion)


def test_an_adapter_that_vllm_itself_refuses_is_an_error_and_the_engine_goes_on(
    bank, folder, adapters, tmp_path
):
    place = tmp_path / "head"
    # PEFT wraps any linear layer; vLLM puts no adapter on Qwen2's output head.
    make_peft_adapter(folder, place, seed=0, r=4, target_modules=["lm_head"])
    with pytest.raises(SkillVectorError, match="vLLM must be able to serve"):
        bank.generate([PROMPT] * 2, [sampling()] * 2, [None, place])
    good = next(iter(adapters))
    (completion,) = bank.generate([PROMPT], [sampling()], [good])
    check_scored_by(merged(load(folder), adapters[good]), PROMPT, completion)


def test_a_prompt_that_does_not_fit_is_refused_by_its_index(bank, adapters):
    place = next(iter(adapters))
    with pytest.raises(GenerationError, match=r"prompt 1 of 2: .*max_model_len=256"):
        bank.stream([PROMPT, [3] * 250], [sampling()] * 2, [place, place])


def test_a_base_with_a_missing_weight_is_refused_and_the_old_one_stays(bank, folder, adapters):
    place, changes = next(iter(adapters.items()))
    weights = weights_of(perturbed(folder, 0.05))
    del weights["model.norm.weight"]
    with pytest.raises(ClusterError, match=r"model\.norm\.weight"):
        bank.update_base(weights, 6)
    (completion,) = bank.generate([PROMPT], [sampling()], [place])
    assert completion.policy_version == 0
    check_scored_by(merged(load(folder), changes), PROMPT, completion)


@pytest.mark.parametrize(
    "settings", [{"max_rank": 513, "max_loras": 1}, {"max_rank": 8, "max_loras": 0}]
)
def test_settings_that_vllm_cannot_serve_are_refused_before_it_starts(folder, settings):
    with pytest.raises(ConfigError, match="max_loras of at least 1 and max_rank of 1 to 512"):
        started(folder, **settings)


def test_a_hundred_adapters_through_one_engine_each_give_their_own_answer(folder, tmp_path):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    places = [tmp_path / f"passage-{seed}" for seed in range(100)]
    changes = [
        make_peft_adapter(folder, place, seed=seed, **settings) for seed, place in enumerate(places)
    ]
    bank = started(folder, max_rank=4, max_loras=8)
    try:
        completions = bank.generate([PROMPT] * 100, [sampling(seed=4)] * 100, places)
    finally:
        bank.close()
    for change, completion in zip(changes, completions, strict=True):
        check_scored_by(merged(load(folder), change), PROMPT, completion)
    assert len({tuple(completion.logprobs) for completion in completions}) == 100
