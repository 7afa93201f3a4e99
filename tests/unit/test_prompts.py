import pyarrow as pa
import pytest

from past_ray.tasks.prompts import closed_book_messages, in_context_messages, qa_examples

DOCUMENTS = pa.table(
    {
        "doc_id": ["d0", "d1"],
        "title": ["Force", "Genghis Khan"],
        "text": ["Newton wrote.", "The Shah fled."],
    }
)
QUESTIONS = pa.table(
    {
        "question_id": ["q1", "q0"],
        "doc_id": ["d1", "d0"],
        "question": ["Who fled?", "Who wrote?"],
        "answer": ["The Shah", "Newton"],
    }
)


def test_closed_book_prompt_names_the_topic_before_the_question():
    (message,) = closed_book_messages("Who fled?", title="Genghis Khan")
    assert message["role"] == "user"
    lines = message["content"].splitlines()
    assert lines[-3:] == ["Topic: Genghis Khan", "Question: Who fled?", "Answer:"]


@pytest.mark.parametrize("title", [None, ""])
def test_closed_book_prompt_without_a_title_has_no_topic_line(title):
    (message,) = closed_book_messages("Who fled?", title=title)
    assert "Topic" not in message["content"]


def test_in_context_prompt_is_the_closed_book_prompt_behind_the_passage():
    (closed,) = closed_book_messages("Who fled?", title="Genghis Khan")
    (shown,) = in_context_messages("Who fled?", "The Shah fled.", title="Genghis Khan")
    assert shown["content"] == f"Passage: The Shah fled.\n\n{closed['content']}"


def test_bare_examples_ask_the_question_alone_in_table_order():
    examples = qa_examples(DOCUMENTS, QUESTIONS, style="bare")
    assert [example.question_id for example in examples] == ["q1", "q0"]
    assert examples[0].messages == ({"role": "user", "content": "Who fled?"},)
    assert [example.question for example in examples] == ["Who fled?", "Who wrote?"]
    assert [example.answer for example in examples] == ["The Shah", "Newton"]


@pytest.mark.parametrize(
    ("style", "shown", "hidden"),
    [("topic", "Genghis Khan", "The Shah"), ("in_context", "The Shah fled.", "Newton")],
)
def test_each_question_is_joined_with_its_own_document(style, shown, hidden):
    content = qa_examples(DOCUMENTS, QUESTIONS, style=style)[0].messages[0]["content"]
    assert shown in content
    assert hidden not in content


def test_closed_book_prompts_never_show_the_gold_answer():
    for style in ("bare", "topic"):
        for example in qa_examples(DOCUMENTS, QUESTIONS, style=style):
            assert example.answer not in example.messages[0]["content"]
