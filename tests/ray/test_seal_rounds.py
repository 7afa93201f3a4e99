"""SEAL in short: two rounds with real adapters, engines and writers, and the arm itself."""

import json
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from past_ray.config.experiment import ExperimentConfig
from past_ray.pipelines.answering import evaluate
from past_ray.pipelines.laboratory import Laboratory
from past_ray.pipelines.preparation import tables
from past_ray.pipelines.progress import ProgressDisplay
from past_ray.pipelines.seal import seal_knowledge, seal_stages
from past_ray.skill.checkpoint import hash_weights
from past_ray.tasks.prompts import qa_examples
from past_ray.tasks.tables import (
    read_documents,
    read_questions,
    write_documents,
    write_questions,
)
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.ray

GOLD = "not"
"""What random weights answer now and then, so that the scores of self-edits differ."""

NUM_TOKENS = 8
"""Token cap of an answer."""


def write_domain(folder: Path, names: list[str]) -> Path:
    rows = [{"doc_id": n, "title": n, "text": f"{n} lives in oslo and likes bread"} for n in names]
    write_documents(folder / "documents.parquet", rows)
    questions = [
        {"question_id": f"{n}-{verb}", "doc_id": n, "question": f"where {n} {verb} ?",
         "answer": GOLD}
        for n in names
        for verb in ("lives", "likes")
    ]  # fmt: skip
    write_questions(folder / "questions.parquet", questions)
    return folder


@pytest.fixture(scope="module")
def root(cluster, tmp_path_factory) -> Path:
    """The stages of the arm alone: nothing of PaST has to run for them."""
    root = tmp_path_factory.mktemp("seal")
    make_tiny_model(root / "model")
    config = ExperimentConfig.model_validate(
        {
            "run_dir": root / "run",
            "arms": ["seal"],
            "task": {
                "kind": "tables",
                "source_dirs": [write_domain(root / "source", ["anna", "ben"])],
                "target_dir": write_domain(root / "target", ["clara", "david"]),
            },
            "model": {"kind": "checkpoint", "path": root / "model"},
            "texts": {"kinds": ["rewrite"], "texts_per_kind": 1, "max_new_tokens": 8}
            | {"kind": "passages"},
            "single_passage": {"num_epochs": 20, "learning_rate": 1e-2, "precision": "fp32"}
            | {"lora": {"rank": 4, "alpha": 8}},
            "seal": {"num_self_edits": 3, "num_seeds": 2, "sft": {"batch_size": 2}},
            "evaluation": {"max_new_tokens": NUM_TOKENS, "num_bootstrap": 100},
            "runtime": {
                "num_sft_workers": 1,
                "cpus_per_generator": 0.4,
                "cpus_per_sft_worker": 0.4,
                "generator": {"max_model_len": 256, "kv_cache_gib": 0.25},
            },
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAST_RAY_CACHE", str(root / "cache"))
        with ProgressDisplay() as progress, Laboratory(config, progress) as lab:
            evaluation = evaluate(lab, "eval_seal", seal_knowledge(lab))
            lab.execute([tables(lab), *seal_stages(lab), evaluation])
    return root


def result(root: Path, stage: str) -> dict:
    return json.loads((root / "run" / "stages" / f"{stage}.json").read_text())["result"]


@pytest.mark.parametrize("r", [1, 2])
def test_a_round_scores_every_self_edit_by_two_adapters_and_keeps_one_per_passage(root, r):
    texts = read_documents(root / "run" / "data" / "source_1" / "texts" / f"seal_{r}.parquet")
    edits = texts["doc_id"].to_pylist()
    scores = result(root, f"seal_{r}_scores")
    assert set(scores["scores"]) == set(edits)
    assert set(scores["best"]) == {"anna", "ben"}
    assert result(root, f"seal_{r}_adapters")["adapters"] == 2 * len(edits)
    assert scores["answers"] == 2 * 2 * len(edits)
    for passage, best in scores["best"].items():
        of_passage = [s for edit, s in scores["scores"].items() if edit.startswith(f"{passage}#")]
        assert scores["scores"][best] == max(of_passage)
    folders = [root / "run" / "adapters" / f"seal_{r}" / f"seed-{seed}" for seed in (0, 1)]
    names = {edit.replace("#", ".") for edit in edits}
    assert all({path.name for path in folder.iterdir()} == names for folder in folders)


def answers_of(model: PeftModel, root: Path, passage: str) -> list[str]:
    """Greedy answers to the questions about a passage, by Transformers and PEFT."""
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    documents = read_documents(root / "source" / "documents.parquet")
    questions = read_questions(root / "source" / "questions.parquet", documents)
    answers: list[str] = []
    for example in qa_examples(documents, questions, style="topic"):
        if example.question_id.startswith(passage):
            prompt = tokenizer.apply_chat_template(
                [dict(message) for message in example.messages],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=False,
            )
            found = model.generate(input_ids=prompt, max_new_tokens=NUM_TOKENS, do_sample=False)
            answers.append(tokenizer.decode(found[0, prompt.shape[1] :]))
    return answers


@pytest.mark.parametrize(("r", "writer"), [(1, "model"), (2, "run/models/seal_writer_1")])
def test_scores_are_those_of_each_adapter_on_the_writer_before(root, r, writer):
    scores = result(root, f"seal_{r}_scores")["scores"]
    expected: dict[str, float] = {}
    for edit in scores:
        correct: list[bool] = []
        for seed in (0, 1):
            base = AutoModelForCausalLM.from_pretrained(root / writer)
            folder = root / "run" / "adapters" / f"seal_{r}" / f"seed-{seed}"
            model = PeftModel.from_pretrained(base, folder / edit.replace("#", "."))
            answers = answers_of(model, root, edit.partition("#")[0])
            correct += [GOLD in answer.split() for answer in answers]
        expected[edit] = sum(correct) / len(correct)
    assert scores == expected
    assert len(set(scores.values())) > 1


def test_each_writer_trains_two_epochs_on_the_tokens_of_the_best_self_edits_alone(root):
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    for r in (1, 2):
        folder = root / "run" / "data" / "source_1" / "texts" / f"seal_{r}.parquet"
        texts = {row["doc_id"]: row["text"] for row in read_documents(folder).to_pylist()}
        best = [texts[edit] for edit in result(root, f"seal_{r}_scores")["best"].values()]
        lengths = [len(tokenizer.encode(text, add_special_tokens=False)) + 1 for text in best]
        assert result(root, f"seal_{r}_writer")["num_tokens"] == 2 * sum(lengths)


def test_the_second_round_starts_where_the_first_ended(root):
    folder = root / "run" / "work" / "seal_2_writer"
    fingerprint = json.loads((folder / "fingerprint.json").read_text())
    assert fingerprint["init_weights"] == hash_weights(root / "run" / "models" / "seal_writer_1")


def test_the_arm_answers_every_target_question_with_adapters_on_the_last_writer(root):
    adapters = root / "run" / "adapters" / "seal"
    assert {folder.name for folder in adapters.iterdir()} == {"clara", "david"}
    assert set(result(root, "eval_seal")["answers"]) == {
        f"{name}-{verb}" for name in ("clara", "david") for verb in ("lives", "likes")
    }
