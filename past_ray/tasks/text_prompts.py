"""The wording of what a model is asked to write; the passage stands before it in the prompt."""

from collections.abc import Mapping

from past_ray.config.texts import PassageKind

PASSAGE_INSTRUCTIONS: Mapping[PassageKind, str] = {
    "implications": (
        "Write down what follows from the passage: a numbered list of statements that each restate "
        "or combine facts of the passage. Every statement must be true by the passage and clear to "
        "someone who has not read it."
    ),
    "implications_long": (
        "Work out in depth what follows from the passage. Write a long numbered list of detailed "
        "statements: every name, number, date and reason that the passage gives, what they mean "
        "together, and what can be concluded from them. Leave no fact out. Each statement must be "
        "clear to someone who has not read the passage."
    ),
    "rewrite": (
        "Tell the passage again in your own words. Change the order and the wording of the "
        "sentences, keep every fact, and add none."
    ),
    "self_qa": (
        "Write questions that the passage answers, and answer each. Cover every fact. Put each on "
        "two lines, 'Question: ...' and 'Answer: ...', and name in the question what it is about, "
        "so that it is clear without the passage."
    ),
}
"""One instruction for each kind of text about a whole passage."""

SUMMARY_INSTRUCTIONS = (
    "Summarise the passage in one paragraph. Keep the names, numbers and dates.",
    "Write a short report of what the passage says, from the most important point to the least.",
    "List the main points of the passage, one sentence each, so that they can be read alone.",
    "Explain to someone who will never see the passage what it is about and what it states.",
    "Condense the passage to about a quarter of its length without losing a central fact.",
)
"""Ways to ask for a summary."""

RECALL_INSTRUCTIONS = (
    "Expand the summary into a full account, with every detail that the passage adds to it.",
    "The summary leaves things out. Write the complete text behind it, detail by detail.",
    "Starting from the summary, retell everything that the passage says, in the same order.",
    "Take each point of the summary in turn and write out all that the passage says about it.",
    "Write a long version of the summary, as close to the contents of the passage as you can.",
)
"""Ways to ask for the details behind a summary."""

PAIR_FOCUSES: Mapping[str, str] = {
    "factual_detail": "single facts: a name, a number, a date, a place",
    "why_how": "reasons and ways: why something happened, or how it was done",
    "definition": "meanings: what a term, a role or a thing is",
    "comparison": "comparisons: how two people, things or times differ or agree",
    "list_process": "lists and steps: which things belong together, or what comes after what",
    "significance": "importance: what something led to, or why it matters",
}
"""What a set of questions asks about; each set has one."""

PAIR_INSTRUCTION = (
    "Write {number} questions about the passage, each with its answer. Ask about {focus}. Name in "
    "every question what it is about, so that it is clear without the passage; do not write 'the "
    "passage' or 'the text'. Answer briefly, by the passage alone. Write each like this and nothing"
    " else:\n"
    "<question>Your question</question>\n"
    "<answer>Your answer</answer>"
)
"""Asks for ``number`` pairs with one ``focus``."""
