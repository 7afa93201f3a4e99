import json
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import ray
import torch
from transformers import AutoTokenizer

from past_ray.config.runtime import RuntimeConfig
from past_ray.config.sft import LoraConfig, SFTConfig
from past_ray.errors import ConfigError
from past_ray.runtime.sft_trainer import train_sft
from past_ray.sft.examples import document_examples
from past_ray.skill.checkpoint import load_weights
from tests.tiny_model import make_tiny_model, make_tiny_tokenizer

pytestmark = pytest.mark.ray

SFT = {"num_steps": 12, "batch_size": 6, "learning_rate": 1e-3, "checkpoint_every_steps": 4}
WORDS = [
    "bread",
    "soup",
    "rice",
    "fish",
    "cat",
    "dog",
    "bird",
    "doctor",
    "baker",
    "teacher",
    "berlin",
]
TEXTS = [f"anna {'likes ' * (index % 4 + 1)}{word} ." for index, word in enumerate(WORDS)]


@pytest.fixture(scope="module")
def cluster():
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        _temp_dir="/tmp/r_sft_test",
        log_to_driver=False,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    return make_tiny_model(folder, tie_word_embeddings=True)


def train(tiny_folder, tmp_path, *, num_workers=1, name="out", seed=0, **options):
    changes = options.pop("sft", {})
    return train_sft(
        examples=document_examples(TEXTS, make_tiny_tokenizer(), max_length=32),
        init_folder=tiny_folder,
        out_folder=tmp_path / name,
        sft=SFTConfig(**(SFT | changes)),
        runtime=RuntimeConfig(
            num_sft_workers=num_workers, cpus_per_sft_worker=0.25, cpus_for_data=1
        ),
        seed=seed,
        work_dir=tmp_path / f"{name}-work",
        **options,
    )


@pytest.fixture(scope="module")
def one_worker(cluster, tiny_folder, tmp_path_factory):
    """An uninterrupted run: its folder, result and the records that on_step saw."""
    folder = tmp_path_factory.mktemp("one")
    records = []
    result = train(tiny_folder, folder, on_step=records.append, keep_steps=(5,))
    return folder, result, records


def test_a_run_learns_and_reports_every_step_in_order(one_worker):
    _, result, records = one_worker
    assert [record["step"] for record in records] == list(range(12))
    assert [record["loss"] for record in records] == result.losses
    assert set(records[0]) == {"step", "loss", "lr", "grad_norm", "tokens", "seconds"}
    assert sum(record["tokens"] for record in records) == result.num_tokens
    assert result.losses[-1] < 0.7 * result.losses[0]


def test_the_result_is_a_plain_fp32_folder_with_tokenizer_and_chat_template(one_worker):
    folder, _, _ = one_worker
    weights = load_weights(folder / "out")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    tokenizer = AutoTokenizer.from_pretrained(folder / "out")
    assert tokenizer.encode("anna likes bread") == make_tiny_tokenizer().encode("anna likes bread")
    assert tokenizer.chat_template == make_tiny_tokenizer().chat_template


def test_a_kept_step_is_the_model_in_the_middle_of_the_run(one_worker, tiny_folder):
    folder, _, _ = one_worker
    kept, final, start = (
        load_weights(path)["model.norm.weight"]
        for path in (folder / "out-step5", folder / "out", tiny_folder)
    )
    assert 0 < (kept - start).norm() < (final - start).norm()


def test_two_workers_give_the_loss_curve_and_weights_of_one(one_worker, tiny_folder, tmp_path):
    folder, expected, _ = one_worker
    result = train(tiny_folder, tmp_path, num_workers=2)
    assert result.losses == pytest.approx(expected.losses, abs=1e-4)
    assert result.num_tokens == expected.num_tokens
    torch.testing.assert_close(
        load_weights(tmp_path / "out"), load_weights(folder / "out"), rtol=1e-3, atol=1e-4
    )


def test_a_finished_run_is_not_repeated_and_another_recipe_is_refused(one_worker, tiny_folder):
    folder, expected, _ = one_worker
    started = time.monotonic()
    assert train(tiny_folder, folder, keep_steps=(5,)) == expected
    assert time.monotonic() - started < 2
    with pytest.raises(ConfigError, match=r"\['sft'\] differ"):
        train(tiny_folder, folder, sft={"learning_rate": 2e-3})
    with pytest.raises(ConfigError, match=r"\['seed'\] differ"):
        train(tiny_folder, folder, seed=1)


def test_lora_trains_over_two_workers_and_saves_the_adapter(cluster, tiny_folder, tmp_path):
    result = train(
        tiny_folder,
        tmp_path,
        num_workers=2,
        sft={"lora": LoraConfig(rank=4, alpha=8), "learning_rate": 1e-2, "num_steps": 6},
    )
    assert result.losses[-1] < result.losses[0]
    merged, before = load_weights(tmp_path / "out"), load_weights(tiny_folder)
    changed = {name for name in before if not torch.equal(merged[name], before[name])}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "v_proj"}
    assert (tmp_path / "out-adapter" / "adapter_config.json").exists()


def test_impossible_requests_are_refused_before_anything_starts(cluster, tiny_folder, tmp_path):
    with pytest.raises(ConfigError, match=r"sft.batch_size .* runtime.num_sft_workers, got 6 over"):
        train(tiny_folder, tmp_path, num_workers=4)
    with pytest.raises(ConfigError, match=r"24 \* 0.25 \+ 1.0 = 7.0 over 2"):
        train(tiny_folder, tmp_path, num_workers=24, sft={"batch_size": 24})
    with pytest.raises(ConfigError, match="keep_steps"):
        train(tiny_folder, tmp_path, keep_steps=(13,))


def test_a_failing_worker_raises_its_own_error(cluster, tiny_folder, tmp_path):
    with pytest.raises(ConfigError, match=r"must stay finite.* sft.learning_rate"):
        train(tiny_folder, tmp_path, sft={"learning_rate": 1e30})


LONG = {"num_steps": 300, "checkpoint_every_steps": 40}
DRIVER = """
    import os, signal, sys
    from pathlib import Path
    import ray
    from tests.ray import test_sft_trainer as module

    def kill(record):
        if record["step"] == 60:
            os.kill(os.getpid(), signal.SIGKILL)

    ray.init(address="local", num_cpus=2, include_dashboard=False, _temp_dir="/tmp/r_sft_kill")
    folder, tmp_path = Path(sys.argv[1]), Path(sys.argv[2])
    module.train(folder, tmp_path, sft=module.LONG, keep_steps=(50,), on_step=kill)
"""


def test_a_killed_driver_resumes_to_the_weights_of_an_uninterrupted_run(
    cluster, tiny_folder, tmp_path
):
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(DRIVER), str(tiny_folder), str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL
    metrics_file = tmp_path / "out-work" / "metrics.jsonl"
    assert 60 < len(metrics_file.read_text().splitlines()) < 300
    assert not (tmp_path / "out").exists()
    records = []
    result = train(tiny_folder, tmp_path, sft=LONG, keep_steps=(50,), on_step=records.append)
    assert [record["step"] for record in records] == list(range(300))
    assert [json.loads(line) for line in metrics_file.read_text().splitlines()] == records
    expected = train(tiny_folder, tmp_path, name="whole", sft=LONG, keep_steps=(50,))
    assert result.losses == expected.losses
    for name in ("", "-step50"):
        weights = load_weights(tmp_path / f"out{name}")
        reference = load_weights(tmp_path / f"whole{name}")
        assert all(torch.equal(weights[key], reference[key]) for key in reference)
