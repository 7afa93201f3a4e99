"""Documents longer than the model's context, written about and trained in two phases."""

import json

import pytest

from past_ray.config.experiment import ExperimentConfig
from past_ray.pipelines.data import PAIRS, WINDOWS, texts_file
from past_ray.pipelines.laboratory import Laboratory
from past_ray.pipelines.long_documents import document_figures, window_sft
from past_ray.pipelines.preparation import base_model, tables
from past_ray.pipelines.progress import ProgressDisplay
from past_ray.pipelines.window_texts import write_window_texts
from past_ray.skill.checkpoint import LINEAGE_FILE, hash_weights
from past_ray.tasks.tables import read_documents
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.ray

CONTEXT = 128
MAX_LENGTH = 64
NUM_SENTENCES = 50
SENTENCE = "anna lives in oslo . ben has a dog ."


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    pairs = "[{'Q': 'where does anna live ?', 'A': 'oslo'}, {'Q': 'what has ben ?', 'A': 'a dog'}]"
    records = [
        {"title": title, "input": " ".join([SENTENCE] * NUM_SENTENCES), "qa_pairs": pairs}
        for title in ("oslo", "rome")
    ]
    file = folder / "qa.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    recipe = {"num_epochs": 1, "batch_size": 4, "max_length": MAX_LENGTH}
    splits = [{"path": str(file), "start": index, "count": 1} for index in range(2)]
    return ExperimentConfig.model_validate(
        {
            "run_dir": folder / "run",
            "task": {"kind": "loogle", "sources": splits[:1], "target": splits[1]},
            "model": {"kind": "checkpoint", "path": make_tiny_model(folder / "tiny")},
            "texts": {
                "kind": "windows",
                "text_sizes": [32],
                "text_overlap": 0,
                "texts_per_window": 2,
                "pair_sizes": [16],
                "pair_overlap": 0,
                "max_windows_per_document": 3,
                "max_new_tokens": 12,
                "on_no_pairs": "gold",
            },
            "sft": {**recipe, "max_tokens_per_micro_batch": 2 * MAX_LENGTH},
            "sft_pairs": recipe,
            "rl": {"max_new_tokens": 8},
            "runtime": {
                "num_sft_workers": 1,
                "generator": {"backend": "transformers", "max_model_len": CONTEXT},
            },
        }
    )


@pytest.fixture(scope="module")
def lab(cluster, config, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAST_RAY_CACHE", str(tmp_path_factory.mktemp("cache")))
        with ProgressDisplay() as progress, Laboratory(config, progress) as lab:
            stages = [tables(lab), base_model(lab)]
            for name, domain in {"texts_source": "source_1", "texts_target": "target"}.items():
                stages.append(
                    write_window_texts(
                        lab, name, config.texts, writer="own", model="base", domains=[domain]
                    )
                )
            stages += [
                window_sft(lab, f"sft_{domain}", init="base", domain=domain, texts="own")
                for domain in ("source_1", "target")
            ]
            lab.execute(stages)
            yield lab


def test_a_document_longer_than_the_context_is_read_trained_and_dropped_to_the_last_token(lab):
    figures = document_figures(lab)
    num_tokens = NUM_SENTENCES * len(SENTENCE.split())
    assert num_tokens > CONTEXT
    for of_domain in figures.values():
        assert of_domain["tokens"] == num_tokens
        assert of_domain["text_windows"]["tokens_read"] == 3 * 32
        assert of_domain["text_windows"]["tokens_dropped"] == num_tokens - 3 * 32
        assert of_domain["pair_windows"]["tokens_read"] == 3 * 16
        assert of_domain["texts"] + of_domain["empty"] >= 3


def test_phase_one_trains_every_token_of_windows_and_texts(lab):
    encode = lab.tokenizer().encode
    for domain, figures in document_figures(lab).items():
        rows = [
            row
            for writer in (WINDOWS, "own")
            for row in read_documents(texts_file(lab.run, domain, writer)).to_pylist()
        ]
        # The first token of a text has no loss, its end of sequence has.
        expected = sum(len(encode(f"{row['title']}\n{row['text']}")) for row in rows)
        phase = figures["phases"][0]
        assert phase["tokens"] == expected
        assert phase["examples"] == len(rows)
        assert phase["max_tokens_at_once"] == 2 * MAX_LENGTH


def test_no_question_of_the_target_is_trained_where_the_source_lends_its_own(lab):
    source, target = document_figures(lab)["source_1"], document_figures(lab)["target"]
    assert (source["gold_questions"], len(source["phases"])) == (2, 2)
    assert (target["gold_questions"], len(target["phases"])) == (0, 1)
    assert not (lab.run.tables("target") / PAIRS).exists()
    trained = lab.domain("source_1", questions=PAIRS).examples()
    assert {example.answer for example in trained} == {"oslo", "a dog"}
    # Two answers with their ends of sequence.
    assert source["phases"][1]["tokens"] == (1 + 1) + (2 + 1)


def test_a_model_of_two_phases_names_the_base_of_the_first(lab):
    record = json.loads((lab.model("sft_source_1") / LINEAGE_FILE).read_text())
    assert record["base_hash"] == hash_weights(lab.model("base"))


def test_only_the_last_model_of_the_phases_is_kept(lab):
    assert (lab.model("sft_source_1") / "config.json").exists()
    assert not (lab.run.work("sft_source_1") / "between").exists()
    assert len(lab.result("sft_source_1")["losses"]) == sum(
        phase["steps"] for phase in document_figures(lab)["source_1"]["phases"]
    )
