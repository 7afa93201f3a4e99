"""The miniature world: people, documents about them, questions, and a tokenizer for all of it.

Nothing is downloaded. Every person has five attributes. Documents state the attributes in several
paraphrases and never as a question; no question occurs in a document. A small model trained from
scratch on one population's documents, and on questions about a part of it, can read and answer a
little; the people of the other populations are new to it, because names never repeat between
populations.

Example: ``ada`` ``birch`` of population ``target`` may give the document
``ada birch lives in oslo . ada birch works as a baker . ...`` and the questions

| kind | question | answer |
| --- | --- | --- |
| single | ``where does ada birch live ?`` | ``oslo`` |
| pair | ``what are the job and the pet of ada birch ?`` | ``baker cat`` |
| comparison | ``do ada birch and leo moss have the same pet ?`` | ``cat owl no`` |

A comparison's answer names both values before the verdict, so guessing yes or no never scores.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from past_ray.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def _words(text: str) -> list[str]:
    return text.split()


FIRST_NAMES = _words(
    "ada amir anna boris carla chen clara david diego elena emil farah felix greta hana hugo "
    "ines ivan jonas julia karim lara leo lena marco maya mila nadia noah olga omar paula "
    "priya rosa samir sofia tara tomas vera yusuf"
)
LAST_NAMES = _words(
    "adler ash birch bloom brook castro cole cruz diaz dunn ellis fox frost garcia grant hale "
    "haas ito kaya keller khan kim lang lund marsh moss novak okoye park quinn reyes rossi "
    "sato shaw silva stone tran vance weber wolf"
)

ATTRIBUTE_VALUES: dict[str, list[str]] = {
    "city": _words("oslo rome cairo lima delhi kyoto paris quito dakar perth boston prague"),
    "job": _words(
        "baker doctor lawyer painter plumber teacher farmer pilot nurse tailor chemist judge"
    ),
    "employer": _words(
        "zenith orbix nimbus vertex solara helix quanta lumina corvid tetra polaris mirage"
    ),
    "pet": _words("cat dog owl parrot rabbit hamster turtle goat pony lizard ferret snail"),
    "food": _words("rice pasta soup bread cheese curry salad sushi tacos beans noodles stew"),
}
"""The values each attribute can take; no word belongs to two attributes or to a name."""

ATTRIBUTES = tuple(ATTRIBUTE_VALUES)

DOCUMENT_TEMPLATES: dict[str, list[str]] = {
    "city": [
        "{name} lives in {value}",
        "the home of {name} is in {value}",
        "{name} is a resident of {value}",
        "{name} has a house in {value}",
        "{name} settled in {value}",
        "the city of {name} is {value}",
    ],
    "job": [
        "{name} works as a {value}",
        "the job of {name} is {value}",
        "{name} is a {value} by profession",
        "{name} earns money as a {value}",
        "{name} trained to be a {value}",
        "the profession of {name} is {value}",
    ],
    "employer": [
        "{name} works for {value}",
        "the employer of {name} is {value}",
        "{name} is employed by {value}",
        "{name} has a contract with {value}",
        "{name} is on the staff of {value}",
        "the company of {name} is {value}",
    ],
    "pet": [
        "{name} has a {value}",
        "the pet of {name} is a {value}",
        "{name} keeps a {value}",
        "{name} takes care of a {value}",
        "{name} shares a house with a {value}",
        "the animal of {name} is a {value}",
    ],
    "food": [
        "{name} likes to eat {value}",
        "the favorite food of {name} is {value}",
        "{name} loves {value}",
        "{name} often orders {value}",
        "{name} cooks {value}",
        "the favorite meal of {name} is {value}",
    ],
}
"""Statements; a document picks one per attribute."""

SINGLE_TEMPLATES: dict[str, list[str]] = {
    "city": ["where does {name} live ?", "what is the city of {name} ?"],
    "job": ["what does {name} do for work ?", "what is the job of {name} ?"],
    "employer": ["who employs {name} ?", "what is the employer of {name} ?"],
    "pet": ["which animal does {name} keep ?", "what is the pet of {name} ?"],
    "food": ["what does {name} like to eat ?", "what is the food of {name} ?"],
}
PAIR_TEMPLATE = "what are the {first} and the {second} of {name} ?"
COMPARISON_TEMPLATE = "do {name} and {other} have the same {attribute} ?"

NUM_NAMES = len(FIRST_NAMES) * len(LAST_NAMES)
MAX_POPULATION_SIZES = {
    "pretrain": NUM_NAMES - 5 * 120,
    "source_1": 120,
    "source_2": 120,
    "source_3": 120,
    "source_4": 120,
    "target": 120,
}
"""Most people per population; each draws from its own block of names, whatever the seed."""

NAME_BLOCK_SEED = 20260111
"""Fixes which names belong to which population, so that a cached base never met a target name."""

PAD_TOKEN, EOS_TOKEN, UNK_TOKEN = "<pad>", "<eos>", "<unk>"
USER_TOKEN, ASSISTANT_TOKEN = "<user>", "<assistant>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} "
    "{% if message['role'] == 'assistant' %}<eos> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MAX_MODEL_TOKENS = 256
"""Context length of the model; the longest document has about 50 tokens."""


class QuestionKind(StrEnum):
    """What a question asks for."""

    SINGLE = "single"
    """One attribute of one person."""

    PAIR = "pair"
    """Two attributes of one person, in the order asked."""

    COMPARISON = "comparison"
    """One attribute of two persons, and whether it is the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Person:
    """One inhabitant, e.g. ``ada birch`` who lives in ``oslo``."""

    person_id: str
    """``<population>-<index>``, e.g. ``target-0007``."""

    name: str
    """First and last name, lower case; unique over all populations."""

    values: dict[str, str]
    """Attribute to value, e.g. ``{"city": "oslo", "pet": "cat", ...}``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainExample:
    """One example of the base model's training: a document, or a question with its answer."""

    question: str | None
    """The user turn, or None for a document."""

    text: str
    """The document, or the answer to ``question``; this is what carries the loss."""


def build_population(*, name: str, num_people: int, seed: int) -> list[Person]:
    """Draw ``num_people`` people whose names belong to population ``name`` only.

    Raises:
        DataError: the population is unknown or too small for ``num_people``.
    """
    if name not in MAX_POPULATION_SIZES:
        raise DataError(
            f"population must be one of {sorted(MAX_POPULATION_SIZES)}, got {name!r}. "
            "Use source_1, source_2, ... for the refinement rounds."
        )
    if not 1 <= num_people <= MAX_POPULATION_SIZES[name]:
        raise DataError(
            f"num_people must be in 1..{MAX_POPULATION_SIZES[name]} for population {name!r}, "
            f"got {num_people}. Ask for fewer people."
        )
    rng = random.Random(f"{seed}/{name}/people")
    names = rng.sample(_name_block(name), num_people)
    return [
        Person(
            person_id=f"{name}-{index:04d}",
            name=full_name,
            values={key: rng.choice(values) for key, values in ATTRIBUTE_VALUES.items()},
        )
        for index, full_name in enumerate(names)
    ]


def documents(people: Sequence[Person], *, num_paraphrases: int, seed: int) -> list[dict[str, str]]:
    """Write ``num_paraphrases`` documents per person, each stating all attributes once.

    Paraphrase ``p`` of a person uses another statement of each attribute than paraphrase ``p + 1``;
    the order of the attributes is drawn anew for each document.

    Returns:
        Rows with ``doc_id`` (``<person_id>-d<p>``), ``title`` and ``text``.
    """
    rows: list[dict[str, str]] = []
    for person in people:
        rng = random.Random(f"{seed}/{person.person_id}/documents")
        offsets = {key: rng.randrange(len(DOCUMENT_TEMPLATES[key])) for key in ATTRIBUTES}
        for paraphrase in range(num_paraphrases):
            sentences: list[str] = []
            for key in rng.sample(ATTRIBUTES, len(ATTRIBUTES)):
                templates = DOCUMENT_TEMPLATES[key]
                template = templates[(offsets[key] + paraphrase) % len(templates)]
                sentences.append(template.format(name=person.name, value=person.values[key]))
            rows.append(
                {
                    "doc_id": f"{person.person_id}-d{paraphrase}",
                    "title": person.name,
                    "text": " . ".join(sentences) + " .",
                }
            )
    return rows


def questions(
    people: Sequence[Person], *, num_pairs: int, num_comparisons: int, seed: int
) -> list[dict[str, str]]:
    """Ask about every attribute of every person, and ``num_pairs`` and ``num_comparisons`` more.

    Half of the comparisons are drawn among people with the same value where there are any.

    Returns:
        Rows with ``question_id`` (``<person_id>-<kind>-<number>``), ``doc_id`` of a document that
        holds the (first) person's facts, ``question`` and ``answer``.
    """
    rows: list[dict[str, str]] = []
    for person in people:
        rng = random.Random(f"{seed}/{person.person_id}/questions")
        asked = [
            *[_single_question(person, key, rng) for key in ATTRIBUTES],
            *[_pair_question(person, rng) for _ in range(num_pairs)],
            *[_comparison_question(person, people, rng) for _ in range(num_comparisons)],
        ]
        kinds = [QuestionKind.SINGLE] * len(ATTRIBUTES)
        kinds += [QuestionKind.PAIR] * num_pairs + [QuestionKind.COMPARISON] * num_comparisons
        for number, (kind, (question, answer)) in enumerate(zip(kinds, asked, strict=True)):
            rows.append(
                {
                    "question_id": f"{person.person_id}-{kind}-{number}",
                    "doc_id": f"{person.person_id}-d0",
                    "question": question,
                    "answer": answer,
                }
            )
    return rows


def question_kind(question_id: str) -> QuestionKind:
    """Read the kind out of a ``question_id`` made by `questions`."""
    return QuestionKind(question_id.split("-")[-2])


def split_questions(
    rows: Sequence[dict[str, str]],
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Split questions into ``(heldout, train)``, alternating, so both cover every person and kind.

    Rows keep their order. The same wording never falls on both sides: a repeated question goes
    where it went first.
    """
    is_heldout: dict[str, bool] = {}
    for row in rows:
        _, person_number, _, number = row["question_id"].split("-")
        parity = (int(person_number) + int(number)) % 2 == 0
        is_heldout.setdefault(row["question"], parity)
    heldout = [row for row in rows if is_heldout[row["question"]]]
    return heldout, [row for row in rows if not is_heldout[row["question"]]]


def pretraining_examples(
    *,
    num_people: int,
    num_people_with_questions: int,
    num_paraphrases: int,
    num_pairs: int,
    num_comparisons: int,
    question_repeats: int,
    seed: int,
) -> list[PretrainExample]:
    """Mix the documents of population ``pretrain`` with questions about its first people.

    Args:
        num_people: people with documents.
        num_people_with_questions: how many of them also have questions; 0 gives documents only.
        num_paraphrases: documents per person.
        num_pairs: two-fact questions per person and repeat.
        num_comparisons: comparison questions per person and repeat.
        question_repeats: how often questions are drawn anew for each person (other wordings, other
            pairs, other partners); sets the share of questions in the mixture.
        seed: fixes people, wordings and partners.
    """
    people = build_population(name="pretrain", num_people=num_people, seed=seed)
    rows = documents(people, num_paraphrases=num_paraphrases, seed=seed)
    examples = [PretrainExample(question=None, text=row["text"]) for row in rows]
    for repeat in range(question_repeats):
        asked = questions(
            people[:num_people_with_questions],
            num_pairs=num_pairs,
            num_comparisons=num_comparisons,
            seed=seed + repeat,
        )
        examples += [PretrainExample(question=row["question"], text=row["answer"]) for row in asked]
    return examples


def vocabulary() -> list[str]:
    """Return special tokens, then every word of names, values, documents and questions, sorted."""
    texts = [PAIR_TEMPLATE, COMPARISON_TEMPLATE, "yes no . ?"]
    texts += [*ATTRIBUTES, *FIRST_NAMES, *LAST_NAMES]
    for groups in (ATTRIBUTE_VALUES, DOCUMENT_TEMPLATES, SINGLE_TEMPLATES):
        texts += [text for group in groups.values() for text in group]
    words = {word for text in texts for word in text.split() if not word.startswith("{")}
    return [PAD_TOKEN, EOS_TOKEN, UNK_TOKEN, USER_TOKEN, ASSISTANT_TOKEN, *sorted(words)]


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """Build the word-level tokenizer: lower-cases, splits punctuation, one id per word.

    ``tokenizer(text).input_ids`` adds no special token; append ``eos_token_id`` to end a document
    or an answer. The chat template renders ``<user> question <assistant>``.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: index for index, word in enumerate(vocabulary())}
    backend = Tokenizer(models.WordLevel(ids, unk_token=UNK_TOKEN))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        unk_token=UNK_TOKEN,
        additional_special_tokens=[USER_TOKEN, ASSISTANT_TOKEN],
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_MODEL_TOKENS,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _name_block(population: str) -> list[str]:
    """Return the names that only ``population`` may use."""
    names = [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES]
    random.Random(NAME_BLOCK_SEED).shuffle(names)
    start = 0
    for key, size in MAX_POPULATION_SIZES.items():
        if key == population:
            return names[start : start + size]
        start += size
    raise AssertionError(population)


def _single_question(person: Person, key: str, rng: random.Random) -> tuple[str, str]:
    return rng.choice(SINGLE_TEMPLATES[key]).format(name=person.name), person.values[key]


def _pair_question(person: Person, rng: random.Random) -> tuple[str, str]:
    first, second = rng.sample(ATTRIBUTES, 2)
    question = PAIR_TEMPLATE.format(first=first, second=second, name=person.name)
    return question, f"{person.values[first]} {person.values[second]}"


def _comparison_question(
    person: Person, people: Sequence[Person], rng: random.Random
) -> tuple[str, str]:
    key = rng.choice(ATTRIBUTES)
    others = [other for other in people if other is not person]
    alike = [other for other in others if other.values[key] == person.values[key]]
    other = rng.choice(alike if alike and rng.random() < 0.5 else others)
    verdict = "yes" if other.values[key] == person.values[key] else "no"
    question = COMPARISON_TEMPLATE.format(name=person.name, other=other.name, attribute=key)
    return question, f"{person.values[key]} {other.values[key]} {verdict}"
