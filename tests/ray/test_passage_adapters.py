import os
import signal

import psutil
import pytest
import torch
from ray.util.placement_group import placement_group, remove_placement_group
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from past_ray.config.runtime import RuntimeConfig
from past_ray.config.sft import LoraConfig
from past_ray.config.single_passage import SinglePassageConfig
from past_ray.engine.passage_adapter import PassageTrainer
from past_ray.errors import ClusterError, ConfigError, DataError
from past_ray.runtime.passage_adapters import PassageJob, train_passage_adapters
from past_ray.sft.examples import SFTExample
from past_ray.skill.checkpoint import hash_weights
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.ray

CONFIG = SinglePassageConfig(
    lora=LoraConfig(rank=8, alpha=16), num_epochs=5, learning_rate=1e-2, precision="fp32"
)
JOBS = [
    PassageJob(
        passage_id=f"squad-{index:04d}",
        examples=tuple(
            SFTExample(
                token_ids=tuple(3 + (7 * index + position) % 60 for position in range(length)),
                num_prompt_tokens=0,
            )
            for length in (4 + index, 9, 14)
        ),
    )
    for index in range(5)
]
WEIGHTS_FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def one_by_one(base, tmp_path_factory):
    """Folder of the adapters as a trainer without Ray makes them, and their trainings."""
    torch.set_num_threads(1)  # as in the workers; another number rounds otherwise
    folder = tmp_path_factory.mktemp("one")
    trainer = PassageTrainer(base, CONFIG, base_hash=hash_weights(base), device="cpu")
    return folder, [trainer.train(job.examples, folder / job.passage_id) for job in JOBS]


def train(base, folder, *, jobs=JOBS, num_workers=2, on_done=None, config=CONFIG, **runtime):
    return train_passage_adapters(
        jobs,
        model_folder=base,
        config=config,
        runtime=RuntimeConfig(
            num_sft_workers=num_workers, **({"cpus_per_sft_worker": 0.5} | runtime)
        ),
        out_folder=folder,
        on_done=on_done,
    )


def are_same(left, right, passage_id):
    tensors = [load_file(folder / passage_id / WEIGHTS_FILE) for folder in (left, right)]
    return tensors[0].keys() == tensors[1].keys() and all(
        torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0]
    )


def workers():
    """The actors' processes, all of them descendants of this one."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "PassageWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.mark.parametrize("num_workers", [1, 2])
def test_adapters_are_those_of_one_trainer_bit_for_bit_on_any_number_of_workers(
    cluster, base, one_by_one, tmp_path, num_workers
):
    folder, trainings = one_by_one
    seen = []
    results = train(base, tmp_path, num_workers=num_workers, on_done=seen.append)
    assert [result.passage_id for result in results] == [job.passage_id for job in JOBS]
    assert sorted(seen, key=lambda result: result.passage_id) == results
    assert [result.folder for result in results] == [tmp_path / job.passage_id for job in JOBS]
    assert [(r.loss_first, r.loss_last, r.num_tokens) for r in results] == [
        (t.loss_first, t.loss_last, t.num_tokens) for t in trainings
    ]
    assert all(are_same(tmp_path, folder, job.passage_id) for job in JOBS)


def test_a_repeated_run_trains_only_what_is_missing_torn_or_changed(
    cluster, base, one_by_one, tmp_path
):
    first = train(base, tmp_path)
    assert train(base, tmp_path) == first  # with the seconds of the first run
    torn = tmp_path / JOBS[1].passage_id / WEIGHTS_FILE
    torn.write_bytes(torn.read_bytes()[:-4])
    changed = PassageJob(passage_id=JOBS[2].passage_id, examples=JOBS[2].examples[:1])
    seen = []
    again = train(
        base, tmp_path, jobs=[*JOBS[:2], changed, *JOBS[3:]], on_done=seen.append, num_workers=1
    )
    is_reused = [
        before.seconds == after.seconds for before, after in zip(first, again, strict=True)
    ]
    assert is_reused == [True, False, False, True, True]
    assert [result.passage_id[-1] for result in seen] == ["0", "3", "4", "1", "2"]
    assert are_same(tmp_path, one_by_one[0], JOBS[1].passage_id)
    assert not are_same(tmp_path, one_by_one[0], JOBS[2].passage_id)


def test_the_passages_of_killed_workers_are_trained_by_others(cluster, base, one_by_one, tmp_path):
    """Both workers are killed, one after the first and one after the third adapter."""
    # Those of earlier tests end in the background, and must not be taken for victims.
    assert psutil.wait_procs(workers(), timeout=30)[1] == []
    killed = []

    def kill(_):
        if len(killed) in (0, 2):
            victim = workers()[0]
            os.kill(victim.pid, signal.SIGKILL)
            victim.wait()
            killed.append(victim.pid)
        else:
            killed.append(None)

    results = train(base, tmp_path, on_done=kill)
    assert len({pid for pid in killed if pid}) == 2
    assert [result.passage_id for result in results] == [job.passage_id for job in JOBS]
    assert all(are_same(tmp_path, one_by_one[0], job.passage_id) for job in JOBS)


def test_a_failure_in_a_worker_reaches_the_caller_as_itself_and_the_rest_goes_on_later(
    cluster, base, tmp_path
):
    empty = PassageJob(passage_id="empty", examples=())
    with pytest.raises(ConfigError, match="empty has none"):
        train(base, tmp_path, jobs=[*JOBS[:2], empty, *JOBS[2:]], num_workers=1)
    assert psutil.wait_procs(workers(), timeout=10)[1] == []
    assert sorted(folder.name for folder in tmp_path.iterdir()) == [j.passage_id for j in JOBS[:2]]
    assert len(train(base, tmp_path)) == len(JOBS)


def test_no_worker_outlives_an_interrupted_call(cluster, base, tmp_path):
    processes = []

    def interrupt(_):
        processes.extend(workers())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(base, tmp_path, on_done=interrupt)
    assert processes
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert alive == []


def test_workers_that_cannot_be_placed_end_the_call_with_what_is_free(cluster, base, tmp_path):
    blocker = placement_group([{"CPU": 2}])
    assert blocker.wait(30)
    try:
        with pytest.raises(ClusterError, match=r"within 1 s.*'CPU': 0"):
            train(base, tmp_path, placement_timeout_s=0.5, setup_timeout_s=0.5)
    finally:
        remove_placement_group(blocker)


@pytest.mark.parametrize("ids", [["a", "a"], ["a/b", "c"], ["..", "c"], ["", "c"]])
def test_ids_that_cannot_name_folders_are_refused(cluster, base, tmp_path, ids):
    jobs = [PassageJob(passage_id=i, examples=JOBS[0].examples) for i in ids]
    with pytest.raises(DataError, match="unique and name a folder"):
        train(base, tmp_path, jobs=jobs)


def test_a_worker_larger_than_the_cluster_is_refused(cluster, base, tmp_path):
    with pytest.raises(ConfigError, match=r"runtime\.cpus_per_sft_worker"):
        train(base, tmp_path, cpus_per_sft_worker=3)


def test_no_jobs_give_no_results(cluster, base, tmp_path):
    assert train(base, tmp_path, jobs=[]) == []


def test_the_real_vllm_serves_an_adapter_as_peft_would_merge_it(base, one_by_one):
    # Read by vLLM while it is imported.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    import peft
    from vllm.engine.arg_utils import EngineArgs
    from vllm.inputs import tokens_input
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine

    torch.compiler.set_stance("force_eager")
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=str(base),
            dtype="float32",
            max_model_len=64,
            enforce_eager=True,
            kv_cache_memory_bytes=1 << 26,
            distributed_executor_backend="uni",
            enable_lora=True,
            max_lora_rank=8,
            generation_config="vllm",
            skip_tokenizer_init=True,
            disable_log_stats=True,
        )
    )
    folder, prompt = one_by_one[0] / JOBS[0].passage_id, list(JOBS[0].examples[2].token_ids[:5])
    params = SamplingParams(
        temperature=0.0,
        max_tokens=8,
        logprobs=0,
        detokenize=False,
        ignore_eos=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    request = LoRARequest("passage", 1, str(folder))
    engine.add_request("0", tokens_input(prompt), params, lora_request=request)
    done = []
    while engine.has_unfinished_requests():
        done += engine.step()
    engine.engine_core.shutdown()
    output = done[0].outputs[0]
    served = [e[t].logprob for t, e in zip(output.token_ids, output.logprobs, strict=True)]
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids = [*prompt, *output.token_ids]
    before = score(plain, ids)[-8:]
    after = score(peft.PeftModel.from_pretrained(plain, folder).merge_and_unload(), ids)[-8:]
    assert served == pytest.approx(after, abs=1e-4)
    assert max(abs(a - b) for a, b in zip(before, after, strict=True)) > 1


def score(model, ids):
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
