import json
import logging

import pytest

from past_ray.config.task import LoogleTaskConfig, SquadTaskConfig, WorldTaskConfig
from past_ray.errors import ConfigError, DataError
from past_ray.pipelines.data import further_domain_names, load_domain, prepare_tables
from past_ray.pipelines.stages import RunDirectory

LOOGLE_PAIRS = "[{'Q': 'Who?', 'A': 'Ada'}]"


def record(title):
    return {
        "title": title,
        "context": f"About {title}.",
        "questions": [{"question": f"What is {title}?", "answer": title}],
        "completions": [f"{title} one.", f"{title} two."],
    }


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.setenv("PAST_RAY_DATA", str(tmp_path))

    def write_file(name, titles):
        (tmp_path / name).write_text(json.dumps([record(title) for title in titles]))

    return write_file


@pytest.fixture
def prepare(tmp_path, write):
    """Write one file a domain, then its tables."""

    def prepare_domains(files, *, num_rounds=1, **fields):
        for name, titles in files.items():
            write(f"{name}.json", titles)
        splits = {name: {"path": f"{name}.json"} for name in files}
        sources = [split for name, split in splits.items() if name.startswith("source")]
        others = {name: s for name, s in splits.items() if not name.startswith("source")}
        task = SquadTaskConfig.model_validate(
            {"num_completions": 1, "sources": sources, **others, **fields}
        )
        run = RunDirectory(tmp_path / "run")
        prepare_tables(task, run, num_rounds=num_rounds, seed=0)
        return lambda name, **options: load_domain(task, run, name, **options)

    return prepare_domains


def test_each_text_is_followed_by_its_passage(prepare):
    domain = prepare({"source": ["A"], "target": ["B", "C"]})("target")
    assert domain.sequences == ["B\nB one.", "B\nAbout B.", "C\nC one.", "C\nAbout C."]
    assert domain.passage_sequences == {
        "target-0000": ["B\nB one.", "B\nAbout B."],
        "target-0001": ["C\nC one.", "C\nAbout C."],
    }
    assert domain.documents["doc_id"].to_pylist() == ["target-0000", "target-0001"]
    assert domain.written["doc_id"].to_pylist() == ["target-0000#1", "target-0001#1"]
    assert set(domain.passage_of.values()) == {"target-0000", "target-0001"}
    assert domain.resampled_by == domain.passage_of


def test_without_texts_passages_are_alone(prepare):
    prepare({"source": ["A"], "target": ["B"]}, num_completions=1)
    domain = prepare({"source": ["A"], "target": ["B"]}, num_completions=0)("target")
    assert domain.sequences == ["B\nAbout B."]
    assert domain.resampled_by is None
    with_texts = prepare({"source": ["A"], "target": ["B"]}, num_completions=1)
    assert with_texts("target", texts=None).sequences == ["B\nAbout B."]


def test_texts_of_a_writer_must_have_been_written(prepare):
    with pytest.raises(DataError, match=r"own\.parquet"):
        prepare({"source": ["A"], "target": ["B"]})("target", texts="own")


def test_validation_and_held_out_are_domains_and_held_out_takes_no_completions(prepare):
    files = {"source": ["A"], "target": ["B"], "validation": ["A", "C"], "held_out": ["D"]}
    domain = prepare(files)
    assert domain("validation").sequences == [
        "A\nA one.", "A\nAbout A.", "C\nC one.", "C\nAbout C."
    ]  # fmt: skip
    assert domain("held_out").sequences == ["D\nAbout D."]
    assert len(domain("held_out").questions) == 1


@pytest.mark.parametrize(
    ("files", "names"),
    [
        ({"source": ["A", "B"], "target": ["B"]}, "source_1 and target"),
        ({"source": ["A"], "target": ["B"], "validation": ["B"]}, "target and validation"),
        ({"source": ["A"], "target": ["B"], "held_out": ["B"]}, "target and held_out"),
        ({"source": ["A"], "target": ["B"], "held_out": ["A"]}, "source_1 and held_out"),
    ],
)
def test_domains_that_must_not_share_an_article_are_refused(prepare, files, names):
    with pytest.raises(DataError, match=f"{names} must have no title in common, found 1"):
        prepare(files)


def test_source_of_the_second_round_must_not_share_an_article_with_the_target(prepare):
    files = {"source_a": ["A"], "source_b": ["A", "B"], "target": ["B"]}
    prepare(files)
    with pytest.raises(DataError, match="source_2 and target"):
        prepare(files, num_rounds=2)


def test_fewer_sources_than_rounds_is_refused(prepare):
    with pytest.raises(ConfigError, match=r"task.sources must have one entry per refinement"):
        prepare({"source": ["A"], "target": ["B"]}, num_rounds=2)


def test_repeated_question_is_refused_unless_the_split_keeps_it(prepare, tmp_path):
    prepare({"source": ["A"], "target": ["B"]})
    repeated = record("A")
    repeated["questions"] *= 2
    (tmp_path / "twice.json").write_text(json.dumps([repeated]))
    with pytest.raises(DataError, match=r"twice-0000 must ask 'What is A.' once"):
        prepare({"target": ["B"]}, sources=[{"path": "twice.json"}])
    kept = [{"path": "twice.json", "keep_repeated": True}]
    assert len(prepare({"target": ["B"]}, sources=kept)("source_1").questions) == 2


def test_number_of_unanswerable_questions_left_out_is_reported(prepare, tmp_path, caplog):
    qas = [
        {"question": "Why?", "answers": [], "is_impossible": True},
        {"question": "Who?", "answers": [{"text": "Ada"}]},
    ]
    article = {"title": "V2", "paragraphs": [{"context": "Text.", "qas": qas}]}
    (tmp_path / "dev.json").write_text(json.dumps({"data": [article]}))
    with caplog.at_level(logging.WARNING):
        prepare({"source": ["A"], "target": ["B"]}, held_out={"path": "dev.json"})
    assert "held_out: left out 1 questions" in caplog.text


def test_documents_of_loogle_are_passages_without_given_texts(tmp_path):
    lines = [
        {"title": f"T{index}", "input": f"Text {index}.", "qa_pairs": LOOGLE_PAIRS}
        for index in range(3)
    ]
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = LoogleTaskConfig.model_validate(
        {
            "sources": [{"path": str(path), "start": 2}],
            "target": {"path": str(path), "count": 2},
        }
    )
    run = RunDirectory(tmp_path / "run")
    prepare_tables(task, run, num_rounds=1, seed=0)
    assert load_domain(task, run, "source_1").sequences == ["T2\nText 2."]
    target = load_domain(task, run, "target")
    assert target.sequences == ["T0\nText 0.", "T1\nText 1."]
    assert target.questions["doc_id"].to_pylist() == ["docs-0000", "docs-0001"]


def test_passages_of_the_world_are_its_documents_bare(tmp_path):
    task, run = WorldTaskConfig(num_people=2, num_paraphrases=1), RunDirectory(tmp_path)
    prepare_tables(task, run, num_rounds=1, seed=0)
    domain = load_domain(task, run, "target")
    assert domain.sequences == domain.documents["text"].to_pylist()
    assert further_domain_names(task) == []
