"""A summed adapter served by the real vLLM on CPU; one engine for the file."""

import os
import typing

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from past_ray.locations import open_folder
from past_ray.skill.adapter import VLLM_LORA_RANKS, concatenate, lora_delta
from past_ray.skill.adapter_folder import read_adapter, write_adapter
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.ray

PROMPTS = [[3, 6, 7, 8, 9, 1, 4], [3, 10, 11, 4], [5, 6, 7, 8, 12, 13, 14, 15, 16, 17, 4]]
FORMS = (
    # The second has modules and layers that the first lacks, and the other way round.
    {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 16, "lora_alpha": 8},
    {"target_modules": r".*\.1\.(self_attn\.[qo]|mlp\.up)_proj", "r": 8, "use_rslora": True},
)
WEIGHTS = (1.0, -0.5)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engine(base):
    # Read by vLLM while it is imported.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    torch.compiler.set_stance("force_eager")
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=str(base),
            dtype="float32",
            max_model_len=256,
            enforce_eager=True,
            kv_cache_memory_bytes=1 << 27,
            distributed_executor_backend="uni",
            enable_lora=True,
            max_lora_rank=32,
            generation_config="vllm",
            skip_tokenizer_init=True,
            disable_log_stats=True,
            seed=0,
        )
    )
    yield engine
    engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def summed(base, tmp_path_factory):
    """The folder of the sum, and the base model with the dense sum added."""
    folder = tmp_path_factory.mktemp("adapters")
    adapters = []
    for index, form in enumerate(FORMS):
        save_random_adapter(base, folder / str(index), seed=index, **form)
        adapters.append(read_adapter(open_folder(str(folder / str(index)))))
    total = concatenate(list(zip(WEIGHTS, adapters, strict=True)))
    write_adapter(folder / "sum", total, base_model=str(base))
    merged = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for weight, adapter in zip(WEIGHTS, adapters, strict=True):
            for name, module in adapter.modules.items():
                merged.get_parameter(name).add_(weight * lora_delta(module))
    assert {module.rank for module in total.modules.values()} == {32}
    return folder / "sum", merged


def save_random_adapter(base, folder, *, seed, **settings):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)


def complete(engine, adapter):
    """Greedy completions of all prompts: token ids and their log-probabilities."""
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    params = SamplingParams(
        temperature=0.0,
        max_tokens=8,
        logprobs=0,
        detokenize=False,
        ignore_eos=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(str(index), tokens_input(prompt), params, lora_request=adapter)
    done = {}
    while engine.has_unfinished_requests():
        done |= {output.request_id: output.outputs[0] for output in engine.step()}
    return [
        (
            list(done[str(index)].token_ids),
            [
                entry[token_id].logprob
                for token_id, entry in zip(
                    done[str(index)].token_ids, done[str(index)].logprobs, strict=True
                )
            ],
        )
        for index in range(len(PROMPTS))
    ]


def forward_logprobs(model, prompt, token_ids):
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt + token_ids])).logits[0].log_softmax(-1)
    return [
        logprobs[len(prompt) - 1 + index, token_id].item()
        for index, token_id in enumerate(token_ids)
    ]


def test_a_served_sum_gives_the_logprobs_of_the_merged_model(engine, base, summed):
    from vllm.lora.request import LoRARequest

    folder, merged = summed
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for prompt, (token_ids, logprobs) in zip(
        PROMPTS, complete(engine, LoRARequest("sum", 1, str(folder))), strict=True
    ):
        assert logprobs == pytest.approx(forward_logprobs(merged, prompt, token_ids), abs=1e-4)
        without = forward_logprobs(plain, prompt, token_ids)
        assert max(abs(a - b) for a, b in zip(logprobs, without, strict=True)) > 1
    for prompt, (token_ids, logprobs) in zip(PROMPTS, complete(engine, None), strict=True):
        assert logprobs == pytest.approx(forward_logprobs(plain, prompt, token_ids), abs=1e-4)


def test_the_ranks_are_those_of_this_vllm():
    from vllm.config.lora import MaxLoRARanks

    assert typing.get_args(MaxLoRARanks) == VLLM_LORA_RANKS
