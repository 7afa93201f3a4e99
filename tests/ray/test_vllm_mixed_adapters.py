"""Requests with and without an adapter in the same steps of real vLLM engines on CPU."""

import threading
import time

import pytest
import torch

from past_ray.config.runtime import GeneratorConfig
from past_ray.engine.generators import build_generator
from past_ray.engine.vllm_adapter_bank import VLLMAdapterBank
from tests.peft_adapters import make_peft_adapter
from tests.tiny_model import make_tiny_model
from tests.vllm_engines import full_forward_logprobs, load, make_adapter, sampling, weights_of

pytestmark = pytest.mark.ray

PROMPT = [3, 6, 7, 8, 9, 1, 4]
PROMPTS = [PROMPT, [3, 10, 11, 4], [5, 6, 7, 8, 12, 13, 14, 15, 16, 17, 4]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose own files name no end of sequence to vLLM, which reads only the first."""
    folder = make_tiny_model(tmp_path_factory.mktemp("tiny") / "base")
    (folder / "generation_config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def bank(folder):
    config = GeneratorConfig(max_model_len=256, kv_cache_gib=0.125)
    return VLLMAdapterBank(folder, config, max_rank=8, max_loras=3)


@pytest.fixture(scope="module")
def generator(folder):
    config = GeneratorConfig(max_model_len=256, kv_cache_gib=0.125, on_sync="finish")
    generator = build_generator(config, folder, lora_rank=4)
    # No token ends a completion, so all are as long as they may be.
    generator._engine._stop_token_ids = []
    return generator


@pytest.fixture(scope="module", autouse=True)
def closed_together(bank, generator):
    """VLLM's process groups are global, and end with the first engine that closes."""
    yield
    bank.close()
    generator.close()


@pytest.fixture(scope="module")
def adapters(folder):
    """Adapters of three ranks, and what PEFT's merge adds to the base."""
    found = {}
    for seed, rank in enumerate((2, 5, 8)):
        place = folder.parent / f"adapter-{seed}"
        modules = ["q_proj", "v_proj", "gate_proj", "down_proj"][: 2 + seed]
        found[place] = make_peft_adapter(
            folder, place, seed=seed, r=rank, lora_alpha=2 * rank, target_modules=modules
        )
    return found


def merged(folder, changes):
    model = load(folder)
    with torch.no_grad():
        for name, change in changes.items():
            parameter = model.get_parameter(name)
            parameter.copy_(parameter.double() + change)
    return model


def gaps(model, prompts, completions):
    """Largest difference of each completion's log-probabilities from a transformers forward."""
    return [
        max(
            abs(a - b)
            for a, b in zip(
                completion.logprobs,
                full_forward_logprobs(model, prompt, completion.token_ids, 0.7),
                strict=True,
            )
        )
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def mixed(bank, adapters):
    """Base and adapters in turn, so that every step has both; bases first in the result."""
    places = [place for adapter in adapters for place in (None, adapter)]
    prompts = [[*PROMPT, 10 + index] for index in range(len(places))]
    params = [sampling(seed=seed, max_new_tokens=16) for seed in range(len(places))]
    bank._vllm.reset_prefix_cache()
    step, seen = bank._engine.step, []

    def watched():
        seen.append({adapter and adapter.lora_name for _, adapter in bank._in_flight.values()})
        return step()

    bank._engine.step = watched
    try:
        completions = bank.generate(prompts, params, places)
    finally:
        bank._engine.step = step
    assert max(len(names) for names in seen if None in names) == 4
    return prompts, params, completions


def test_the_base_beside_three_adapters_is_the_base_and_each_adapter_its_own(
    bank, folder, adapters
):
    prompts, params, completions = mixed(bank, adapters)
    assert max(gaps(load(folder), prompts[::2], completions[::2])) < 1e-4
    for index, changes in enumerate(adapters.values()):
        own = slice(2 * index + 1, 2 * index + 2)
        assert max(gaps(merged(folder, changes), prompts[own], completions[own])) < 1e-4
        assert min(gaps(load(folder), prompts[own], completions[own])) > 0.05
    bank._vllm.reset_prefix_cache()
    alone = bank.generate(prompts[::2], params[::2], [None] * 3)
    for one, other in zip(alone, completions[::2], strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_the_same_requests_through_vllms_kernels_get_a_wrong_base(bank, folder, adapters):
    """What the wrapper is for; the day this fails, vLLM has repaired it."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    from past_ray.engine.vllm_cpu_lora import RunsWrapper

    def use(kind):
        def change(worker):
            manager = worker.model_runner.lora_manager._adapter_manager
            for found in manager.punica_wrapper_mapping.values():
                assert found.__class__ is not kind
                found.__class__ = kind
            manager._last_mapping = None

        bank._vllm.collective_rpc(change)

    use(PunicaWrapperCPU)
    try:
        prompts, _, completions = mixed(bank, adapters)
    finally:
        use(RunsWrapper)
    assert max(gaps(load(folder), prompts[::2], completions[::2])) > 0.05


def test_requests_of_the_base_in_flight_stay_the_base_while_two_adapters_are_loaded(
    generator, folder
):
    """Two, since the engine has two slots and it is the last one's adapter that vLLM adds."""
    generator.update_weights(weights_of(load(folder)), 0)
    versions = {1 + seed: make_adapter(load(folder), seed=seed) for seed in range(2)}
    step, num_steps, beside, last_steps = generator._engine.step, [0], [], []

    def use_adapters():
        for version, (adapter, _) in versions.items():
            generator.load_adapter(adapter, version)
            beside.extend(generator.generate([PROMPT], [sampling(max_new_tokens=20)]))
            last_steps.append(num_steps[0])

    syncing = threading.Thread(target=use_adapters)

    def counted():
        ended = step()
        num_steps[0] += 1
        if num_steps[0] == 10:
            syncing.start()
            while not generator._loop._queue:
                time.sleep(0.001)
        return ended

    generator._engine.step = counted
    try:
        params = [sampling(seed=seed, max_new_tokens=200) for seed in range(3)]
        completions = generator.generate(PROMPTS, params)
    finally:
        generator._engine.step = step
        syncing.join(60)
    assert {len(completion.token_ids) for completion in completions} == {200}
    assert {completion.policy_version for completion in completions} == {0}
    assert max(gaps(load(folder), PROMPTS, completions)) < 1e-4
    assert [completion.policy_version for completion in beside] == [1, 2]
    for completion in beside:
        _, model = versions[completion.policy_version]
        assert max(gaps(model, [PROMPT], [completion])) < 1e-4
        assert min(gaps(load(folder), [PROMPT], [completion])) > 0.05
    assert last_steps[-1] < 200, "the second adapter came when the base had ended"
