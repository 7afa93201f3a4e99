import pytest
from hypothesis import given
from hypothesis import strategies as st

from past_ray.errors import DataError
from past_ray.tasks.pairs import QAPair, pair_rows, parse_pairs
from past_ray.tasks.synthesis import TextRequest

GOOD = "<question>Who fled?</question>\n<answer>The Shah</answer>"


def request(doc_id, number):
    return TextRequest(
        request_id=f"{doc_id}#pairs-{number}",
        doc_id=doc_id,
        title="",
        kind="pairs",
        passage="The Shah fled.",
        messages=(),
        seed=0,
    )


def pairs_of(text):
    parsed = parse_pairs(text)
    return [(pair.question, pair.answer) for pair in parsed.pairs], parsed.num_dropped


def test_pairs_are_found_between_prose_in_order():
    text = (
        f"Sure, here:\n1. {GOOD}\nAnd\n<QUESTION id='2'>When?</QUESTION> so <answer>1220</answer>!"
    )
    assert pairs_of(text) == ([("Who fled?", "The Shah"), ("When?", "1220")], 0)


@pytest.mark.parametrize(
    "broken",
    [
        "<question>Where to?</question><answer>An island",
        "<question>Where to?<answer>An island</answer>",
        "<question>Where to?</question>",
        "<question>Where to?</question><answer> </answer>",
        "<question>...</question><answer>...</answer>",
        "<answer>An island</answer>",
        "<question>Who  FLED?</question><answer>somebody else</answer>",
    ],
)
def test_a_broken_or_repeated_pair_is_dropped_and_counted_and_its_neighbours_stay(broken):
    last = "<question>When?</question><answer>1220</answer>"
    both = [("Who fled?", "The Shah"), ("When?", "1220")]
    assert pairs_of(f"{GOOD}\n{broken}\n{last}") == (both, 1)


def test_an_unclosed_question_never_swallows_the_next_pair():
    assert pairs_of(f"<question>Where to? {GOOD}") == ([("Who fled?", "The Shah")], 1)


def test_entities_are_resolved_and_nested_tags_removed():
    text = "<question>Is <b>R&amp;D</b>\n dear?</question><answer>x &lt; 5 &#233;</answer>"
    assert pairs_of(text) == ([("Is R&D dear?", "x < 5 \u00e9")], 0)


def test_signs_that_are_no_xml_are_kept():
    text = "<question>Is R&D dear?</question><answer>if x < 5 &amp; y > 6</answer>"
    assert pairs_of(text) == ([("Is R&D dear?", "if x < 5 & y > 6")], 0)


def test_text_without_tags_has_no_pairs_and_nothing_is_dropped():
    assert pairs_of("Who fled? The Shah.") == ([], 0)


@given(
    st.text(alphabet="ab<>&;/ \n") | st.sampled_from([GOOD, GOOD[:-1], GOOD[10:], "<question>"] * 2)
)
def test_no_text_breaks_the_parser(text):
    parsed = parse_pairs(text + GOOD)
    assert parsed.num_dropped >= 0
    assert all(pair.question and pair.answer for pair in parsed.pairs)


@given(st.lists(st.tuples(st.from_regex(r"[a-z<>&]{1,9}", fullmatch=True), st.integers(0, 99))))
def test_escaped_pairs_come_back_as_they_were(items):
    wanted = list(
        {f"q{q}": QAPair(question=f"q{q}", answer=str(a)) for q, a in items[::-1]}.values()
    )
    escaped = [
        (pair.question.replace("&", "&amp;").replace("<", "&lt;"), pair.answer) for pair in wanted
    ]
    text = "\n".join(f"<question>{q}</question><answer>{a}</answer>" for q, a in escaped)
    assert list(parse_pairs(text).pairs) == wanted


def test_rows_name_their_document_and_chunks_without_pairs_are_counted():
    requests = [request("d0", 0), request("d0", 1), request("d1", 0)]
    second = "<question>When?</question><answer>1220</answer>"
    texts = {"d0#pairs-0": GOOD + second, "d0#pairs-1": "<question>no", "d1#pairs-0": GOOD}
    made = pair_rows(requests, texts)
    assert [(row["question_id"], row["doc_id"], row["answer"]) for row in made.rows] == [
        ("d0#pairs-0.0", "d0", "The Shah"),
        ("d0#pairs-0.1", "d0", "1220"),
        ("d1#pairs-0.0", "d1", "The Shah"),
    ]
    assert (made.num_dropped, made.num_without_pairs) == (1, 1)


def test_a_document_that_gives_no_pair_at_all_is_an_error_that_names_it():
    requests = [request("d0", 0), request("d1", 0), request("d1", 1)]
    texts = {"d0#pairs-0": GOOD, "d1#pairs-0": "I cannot.", "d1#pairs-1": "<question>no"}
    with pytest.raises(DataError, match=r"1 of 2 documents .*'d1'"):
        pair_rows(requests, texts)
