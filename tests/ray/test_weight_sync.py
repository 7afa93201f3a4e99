"""Each part of a weight sync is broken on purpose, in a real vLLM engine."""

import pytest
import torch

from past_ray.config.runtime import GeneratorConfig
from past_ray.engine import vllm_direct_load, weight_transfer
from past_ray.engine.generators import build_generator
from past_ray.errors import ClusterError, ParityError
from tests.tiny_model import make_tiny_model
from tests.vllm_engines import load, make_adapter, perturbed, sampling, weights_of

pytestmark = pytest.mark.ray

PROBE = [[3, 6, 7, 8, 9, 1, 4], [3, 10, 11, 4]]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request, tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), tie_word_embeddings=request.param)


@pytest.fixture(scope="module")
def started(folder):
    """One engine for all: vLLM's process groups are global, and end with the first that closes."""
    config = GeneratorConfig(max_model_len=192, kv_cache_gib=0.125)
    generator = build_generator(config, folder, lora_rank=4)
    yield generator
    generator.close()


@pytest.fixture
def generator(started, folder):
    started.update_weights(weights_of(load(folder)), 0)
    probe(started, 0)
    return started


def probe(generator, version):
    return generator.probe(PROBE, [sampling(seed=seed) for seed in range(2)], version)


def vllm_of(generator):
    return generator._engine._engine


def test_a_sync_whose_parts_all_happened_passes_the_probe_again_and_again(generator, folder):
    for version in (1, 2):
        generator.update_weights(weights_of(perturbed(folder, 0.05 * version)), version)
        first = probe(generator, version)
        assert [c.policy_version for c in first] == [version] * 2
        # A second probe of the same weights finds its own blocks in the cache, rightly.
        assert probe(generator, version) == first


def test_a_prefix_cache_that_was_not_reset_is_named(generator, folder, monkeypatch):
    monkeypatch.setattr(vllm_of(generator), "reset_prefix_cache", lambda: True)
    generator.update_weights(weights_of(perturbed(folder, 0.05)), 1)
    with pytest.raises(ParityError, match=r"cache .* was not reset: 128 of 129 prompt tokens"):
        probe(generator, 1)


def test_a_sync_that_never_came_is_named_with_both_versions(generator):
    with pytest.raises(ParityError, match="policy version 1 after the sync, it holds 0"):
        probe(generator, 1)


def test_a_tensor_skipped_in_the_export_is_named_and_the_old_weights_stay(generator, folder):
    before = probe(generator, 0)
    weights = weights_of(perturbed(folder, 0.05))
    del weights["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(ClusterError, match=r"1 were missed: model\.layers\.1\.self_attn\.k_proj"):
        generator.update_weights(weights, 1)
    assert probe(generator, 0) == before


@pytest.mark.parametrize(
    "missed",
    [
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.1.self_attn.k_proj.bias",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "model.embed_tokens.weight",
    ],
)
def test_a_tensor_that_the_loader_silently_leaves_is_named(generator, folder, monkeypatch, missed):
    old, new = weights_of(load(folder)), weights_of(perturbed(folder, 0.05))
    honest = weight_transfer.load_directly
    monkeypatch.setattr(
        weight_transfer,
        "load_directly",
        lambda model, weights, places: honest(model, {**weights, missed: old[missed]}, places),
    )
    generator.update_weights(new, 1)
    with pytest.raises(ParityError, match=f"1 kept other values: {missed}|2 kept .* {missed}, lm_"):
        probe(generator, 1)


def test_a_head_that_multiplies_by_a_stale_copy_is_named(generator, folder, monkeypatch):
    def forget_head(layer):
        if type(layer).__name__ != "ParallelLMHead":
            honest(layer)

    honest = vllm_direct_load._pack_own
    monkeypatch.setattr(vllm_direct_load, "_pack_own", forget_head)
    generator.update_weights(weights_of(perturbed(folder, 0.05)), 1)
    if "lm_head.weight" in weights_of(load(folder)):
        pytest.skip("an untied head is read back from its parameter, see its own test")
    with pytest.raises(ParityError, match=r"1 kept other values: lm_head\.weight"):
        probe(generator, 1)


def test_vllms_own_reload_reaches_every_tensor_too(generator, folder, monkeypatch):
    monkeypatch.setattr(weight_transfer, "can_load_directly", lambda model: False)
    direct = {}
    for version in (1, 2):
        generator.update_weights(weights_of(perturbed(folder, 0.05)), version)
        direct[version] = probe(generator, version)
        monkeypatch.undo()
    assert [c.token_ids for c in direct[1]] == [c.token_ids for c in direct[2]]
    assert [c.logprobs for c in direct[1]] == [c.logprobs for c in direct[2]]


def test_weights_of_another_vocabulary_are_refused_naming_both_sizes(generator, folder):
    weights = weights_of(load(folder))
    rows = len(weights["model.embed_tokens.weight"])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:
            weights[name] = torch.zeros(rows + 3, 64)
    before = probe(generator, 0)
    message = f"vocabulary must have {rows} tokens as the generator's does, the learner's has "
    with pytest.raises(ClusterError, match=f"{message}{rows + 3}"):
        generator.update_weights(weights, 1)
    assert probe(generator, 0) == before


def test_an_adapter_that_is_not_loaded_fails_the_sync_by_name(generator, folder, monkeypatch):
    adapter, _ = make_adapter(load(folder))
    generator.load_adapter(adapter, 6)
    before = probe(generator, 6)
    monkeypatch.setattr(vllm_of(generator), "add_lora", lambda request: True)
    with pytest.raises(ClusterError, match=r"policy-v7 is not loaded, .* lists \['policy-v6'\]"):
        generator.load_adapter(adapter, 7)
    assert probe(generator, 6) == before


def test_an_adapter_that_the_engine_lost_later_fails_the_probe(generator, folder):
    adapter, _ = make_adapter(load(folder))
    generator.load_adapter(adapter, 8)
    vllm = vllm_of(generator)
    (lora_id,) = vllm.list_loras()
    generator._loop.run(lambda: vllm.remove_lora(lora_id) and None)
    with pytest.raises(ClusterError, match=r"policy-v8 is not loaded, the engine lists \[\]"):
        probe(generator, 8)
