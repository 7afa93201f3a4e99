"""The single-passage regime in short: texts, adapters, vLLM with many adapters, all its arms."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from past_ray.tasks.tables import write_documents, write_questions
from tests.tiny_model import make_tiny_model

ROOT = Path(__file__).parents[2]
ARMS = ["base", "in_context", "passage_only", "target_sft", "past"]

pytestmark = pytest.mark.ray


def write_domain(folder: Path, names: list[str]) -> Path:
    write_documents(
        folder / "documents.parquet",
        [
            {"doc_id": name, "title": name, "text": f"{name} lives in oslo and likes bread"}
            for name in names
        ],
    )
    write_questions(
        folder / "questions.parquet",
        [
            {"question_id": f"{name}-q", "doc_id": name, "question": f"where {name} lives ?",
             "answer": "oslo"}
            for name in names
        ],
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("single")
    config = {
        "run_dir": str(root / "run"),
        "arms": ARMS,
        "task": {
            "kind": "tables",
            "source_dirs": [str(write_domain(root / "source", ["anna", "ben"]))],
            "target_dir": str(write_domain(root / "target", ["clara", "david", "emma"])),
        },
        "model": {"kind": "checkpoint", "path": str(make_tiny_model(root / "model"))},
        "texts": {
            "kind": "passages",
            "kinds": ["rewrite"],
            "texts_per_kind": 1,
            "max_new_tokens": 8,
        },
        "single_passage": {"num_epochs": 2, "lora": {"rank": 4, "alpha": 8}, "precision": "fp32"},
        "sft": {"num_epochs": 1, "batch_size": 2},
        "rl": {"num_steps": 1, "prompts_per_step": 2, "group_size": 2, "max_new_tokens": 4},
        "evaluation": {"max_new_tokens": 4, "scales": [0.0, 1.0], "num_bootstrap": 100},
        "runtime": {
            "cpus_per_generator": 0.2,
            "cpus_per_learner": 0.2,
            "cpus_per_rollout_worker": 0.1,
            "cpus_per_sft_worker": 0.2,
            "generator": {"max_model_len": 256, "kv_cache_gib": 0.25},
        },
    }
    file = root / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-m", "past_ray.cli", "run", str(file)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PAST_RAY_CACHE": str(root / "cache")},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return root / "run"


def test_every_arm_is_evaluated_with_its_own_adapters(run_dir):
    report = json.loads((run_dir / "report.json").read_text())
    assert set(report["arms"]) == set(ARMS)
    for arm in ("passage_only", "sft_target"):
        folders = {path.name for path in (run_dir / "adapters" / arm).iterdir()}
        assert folders == {"clara", "david", "emma"}
    assert report["texts_target"]["texts"] == 3


def test_adapters_on_the_base_plus_v_answer_as_the_scale_sweep_says(run_dir):
    records = {
        name: json.loads((run_dir / "stages" / f"{name}.json").read_text())["result"]
        for name in ("eval_target_sft", "eval_past", "eval_scale_0", "eval_scale_1")
    }
    assert records["eval_scale_0"]["answers"] == records["eval_target_sft"]["answers"]
    assert records["eval_scale_1"]["answers"] == records["eval_past"]["answers"]
