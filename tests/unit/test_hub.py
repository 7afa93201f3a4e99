import sys
from types import ModuleType

import pytest

from past_ray.errors import DataError
from past_ray.tasks import hub, loogle, squad


class Rows(list):
    to_list = list.copy


@pytest.fixture
def publish(monkeypatch):
    """Put a module ``datasets`` in place that serves ``rows``, or raises them."""

    def install(rows):
        def load_dataset(*names, split):
            if isinstance(rows, Exception):
                raise rows
            return Rows(rows[(*names, split)])

        module = ModuleType("datasets")
        module.load_dataset = load_dataset
        monkeypatch.setitem(sys.modules, "datasets", module)

    return install


def row(context, question, *answers):
    return {
        "title": "Notre_Dame",
        "context": context,
        "question": question,
        "answers": {"text": list(answers), "answer_start": [0] * len(answers)},
    }


def test_rows_of_one_passage_are_gathered_and_impossible_ones_counted(publish):
    rows = [row("P0.", "Who?", "Ada", "A."), row("P0.", "Why?"), row("P1.", "When?", "1900")]
    publish({("rajpurkar/squad_v2", "train"): rows})
    passages = squad.load_passages("hf:rajpurkar/squad_v2:train")
    assert [(p.passage_id, p.title, p.context, p.questions) for p in passages] == [
        ("squad_v2-train-0000", "Notre Dame", "P0.", (("Who?", "Ada"),)),
        ("squad_v2-train-0001", "Notre Dame", "P1.", (("When?", "1900"),)),
    ]
    assert [p.num_unanswerable for p in passages] == [1, 0]


def test_empty_answer_on_the_hub_is_refused_with_its_record(publish):
    publish({("rajpurkar/squad", "train"): [row("P.", "Who?", "Ada"), row("P.", "When?", "")]})
    with pytest.raises(DataError, match="squad:train: record 1 must have a text 'answer', found"):
        squad.load_passages("hf:rajpurkar/squad:train")


def test_name_with_a_configuration_reaches_it(publish):
    record = {"title": "Ada", "input": "Text.", "qa_pairs": "[{'Q': 'Who?', 'A': 'Ada'}]"}
    publish({("bigai-nlco/LooGLE", "shortdep_qa", "test"): [record]})
    (document,) = loogle.load_passages("hf:bigai-nlco/LooGLE:shortdep_qa:test")
    assert document.passage_id == "LooGLE-shortdep_qa-test-0000"
    assert document.questions == (("Who?", "Ada"),)


def test_hub_out_of_reach_says_to_pass_a_local_path(publish):
    publish(ConnectionError("Couldn't reach 'rajpurkar/squad' on the Hub"))
    with pytest.raises(DataError, match=r"Couldn't reach .* pass the path of a local file"):
        squad.load_passages("hf:rajpurkar/squad:train")


def test_missing_package_says_to_install_it_or_to_pass_a_local_path(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install datasets.* pass the path of a local file"):
        hub.load_rows("hf:rajpurkar/squad:train")


@pytest.mark.parametrize("name", ["hf:squad", "hf:squad:", "hf::train", "hf:a:b:c:d"])
def test_name_without_data_set_or_split_is_refused(name):
    with pytest.raises(DataError, match="must have the form hf:<data set>:<split>"):
        hub.load_rows(name)
