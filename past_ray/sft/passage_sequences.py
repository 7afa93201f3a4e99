"""Passages and what a model wrote about them, as the texts that are trained on.

Every text begins with a line that holds the title, because the questions name it too.

Reference: SEAL, https://arxiv.org/abs/2506.10943 (knowledge incorporation), whose rules PaST takes
over for both of its regimes on SQuAD.
"""

from collections.abc import Sequence

FIRST_ITEM = "1."
"""Begins the first line of a numbered list."""


def single_passage_sequences(title: str, *, passage: str, generation: str) -> list[str]:
    r"""Return each line of the generation under the title, and the passage itself last.

    Empty lines are dropped, and so is an introduction: a first line before one with ``1.``. Without
    a generation the passage is trained on alone.

    Example:
        >>> single_passage_sequences(
        ...     "Oslo",
        ...     passage="Oslo is in Norway.",
        ...     generation="Here they are:\n1. Oslo lies in Norway.\n\n2. Norway has Oslo.",
        ... )
        ['Oslo\n1. Oslo lies in Norway.', 'Oslo\n2. Norway has Oslo.', 'Oslo\nOslo is in Norway.']

    Args:
        title: Of the article.
        passage: The passage.
        generation: One text that a model wrote about it.
    """
    lines = [line.strip() for line in generation.split("\n") if line.strip()]
    if len(lines) > 1 and lines[1].startswith(FIRST_ITEM):
        lines = lines[1:]
    return [_titled(title, text) for text in (*lines, passage)]


def continued_pretraining_sequences(
    title: str, *, passage: str, generations: Sequence[str]
) -> list[str]:
    r"""Return each generation as one text under the title, each followed by the passage.

    The passage is repeated once per generation, so both weigh the same however many there are.
    Without a generation the passage is trained on alone, once.

    Example:
        >>> continued_pretraining_sequences(
        ...     "Oslo", passage="Oslo is in Norway.", generations=["1. A.\n2. B."]
        ... )
        ['Oslo\n1. A.\n2. B.', 'Oslo\nOslo is in Norway.']

    Args:
        title: Of the article.
        passage: The passage.
        generations: Texts that a model wrote about it.
    """
    return [
        _titled(title, text)
        for generation in generations or ("",)
        for text in (generation, passage)
        if text.strip()
    ]


def _titled(title: str, text: str) -> str:
    return f"{title}\n{text.strip()}"
