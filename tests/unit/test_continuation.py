import pickle

import pytest
import torch
from pydantic import ValidationError

from past_ray.config.runtime import GeneratorConfig, RuntimeConfig
from past_ray.engine.shared_weights import SharedWeights
from past_ray.engine.vllm_adapters import VLLM_RANKS, vllm_lora_rank
from past_ray.rl.continuation import continuation_seed, joined, remaining
from past_ray.rl.types import Completion, SamplingParams


def span(token_ids, version, reason="abort"):
    return Completion(
        token_ids=token_ids,
        logprobs=[-0.1 * token_id for token_id in token_ids],
        finish_reason=reason,
        policy_version=version,
    )


def test_what_remains_is_the_prompt_with_the_kept_tokens_and_the_rest_of_the_budget():
    sampling = SamplingParams(temperature=0.7, max_new_tokens=10, seed=3)
    prompt, rest = remaining([1, 2], sampling, [span([7, 8], 4), span([9], 5)])
    assert prompt == [1, 2, 7, 8, 9]
    assert rest.max_new_tokens == 7
    assert rest.temperature == 0.7
    assert rest.seed == continuation_seed(3, num_kept=3)
    assert remaining([1, 2], sampling, [])[1] == sampling


def test_a_continuations_seed_depends_on_seed_and_length_and_unseeded_stays_unseeded():
    seeds = [continuation_seed(seed, num_kept=kept) for seed in range(20) for kept in range(20)]
    assert len(set(seeds)) == 400
    assert continuation_seed(7, num_kept=0) == 7
    assert continuation_seed(7, num_kept=2) == continuation_seed(7, num_kept=2)
    assert continuation_seed(None, num_kept=2) is None


def test_joined_spans_tag_each_token_and_carry_the_oldest_version_and_the_last_reason():
    whole = joined([span([7, 8], 4), span([], 5), span([9], 6, "stop")])
    assert whole.token_ids == [7, 8, 9]
    assert whole.logprobs == pytest.approx([-0.7, -0.8, -0.9])
    assert whole.token_versions == [4, 4, 6]
    assert (whole.policy_version, whole.finish_reason) == (4, "stop")


def test_tokens_of_one_version_need_no_tags_and_a_span_without_tokens_does_not_count():
    whole = joined([span([], 4), span([9, 9], 5, "length")])
    assert (whole.policy_version, whole.token_versions) == (5, [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_shared_weights_survive_a_pickle_with_their_memory_out_of_band(dtype):
    tensors = {"a": torch.arange(12).view(3, 4).to(dtype), "b": torch.ones(2, 3).to(dtype).T}
    buffers = []
    data = pickle.dumps(SharedWeights(tensors), protocol=5, buffer_callback=buffers.append)
    assert len(buffers) == 2
    restored = pickle.loads(data, buffers=[bytes(buffer) for buffer in buffers])
    assert list(restored) == ["a", "b"]
    for name, tensor in tensors.items():
        assert restored[name].dtype == dtype
        assert torch.equal(restored[name], tensor)


def test_the_rank_is_rounded_up_to_one_that_vllm_accepts():
    assert [vllm_lora_rank(rank) for rank in (1, 2, 8, 9, 257, 512)] == [1, 8, 8, 16, 320, 512]
    assert vllm_lora_rank(513) is None
    assert {vllm_lora_rank(rank) for rank in range(1, 513)} == set(VLLM_RANKS)


@pytest.mark.parametrize(
    "setting", [{"weight_transfer": "nccl"}, {"on_sync": "resume"}, {"sleep_between_steps": True}]
)
def test_what_only_vllm_can_do_is_refused_for_transformers(setting):
    with pytest.raises(ValidationError, match="needs backend: vllm, got transformers"):
        GeneratorConfig(backend="transformers", **setting)


@pytest.mark.parametrize(
    ("runtime", "generator", "message"),
    [
        ({}, {"weight_transfer": "nccl"}, "nccl needs use_gpu: true"),
        ({"use_gpu": True}, {"weight_transfer": "ipc"}, "ipc needs colocate: true"),
        ({}, {"sleep_between_steps": True}, "sleep_between_steps needs colocate: true"),
        ({"use_gpu": True, "colocate": True}, {"weight_transfer": "nccl"}, "Use ipc"),
    ],
)
def test_settings_that_need_gpus_are_refused_without_them(runtime, generator, message):
    with pytest.raises(ValidationError, match=message):
        RuntimeConfig(**runtime, generator=GeneratorConfig(**generator))
