"""Long documents as overlapping windows of tokens that leave nothing out.

::

    tokens         0 1 2 3 4 5 6 7 8 9      size 4, overlap 1
    windows        0 1 2 3
                         3 4 5 6
                               6 7 8 9
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from past_ray.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A range of tokens, ``start`` included and ``end`` not."""

    start: int
    """First token."""

    end: int
    """One behind the last token."""


def token_windows(num_tokens: int, *, size: int, overlap: int) -> list[Window]:
    """Return windows that cover every token; the last one ends with the last token.

    All but the last have ``size`` tokens, and each starts ``size - overlap`` behind the one before.
    None lies inside another, so there are ``ceil((num_tokens - overlap) / (size - overlap))`` of
    them, and at least one.

    Args:
        num_tokens: At least 1.
        size: Tokens of a window.
        overlap: Tokens that neighbours share, below ``size``.

    Raises:
        DataError: The numbers allow no such windows.
    """
    if num_tokens < 1 or not 0 <= overlap < size:
        raise DataError(
            "windows must have at least one token and an overlap in [0, size), got num_tokens "
            f"{num_tokens}, size {size} and overlap {overlap}. Drop empty documents or lower the "
            "overlap."
        )
    last_start = max(0, num_tokens - overlap - 1)
    starts = range(0, last_start + 1, size - overlap)
    return [Window(start=start, end=min(start + size, num_tokens)) for start in starts]


def text_windows(
    text: str, tokenizer: "PreTrainedTokenizerBase", *, size: int, overlap: int
) -> list[str]:
    """Return the text behind every window, cut from ``text`` itself.

    Decoding token ids would break characters that several tokens share. Between two tokens the cut
    is where the later one starts, so whatever a tokenizer skips stays with the window before it.

    Raises:
        DataError: ``text`` has no tokens.
    """
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = cast("list[tuple[int, int]]", encoding["offset_mapping"])
    if not offsets:
        raise DataError("a document must have a token, found none. Drop empty documents.")
    cuts = [0, *(start for start, _ in offsets[1:]), len(text)]
    windows = token_windows(len(offsets), size=size, overlap=overlap)
    return [text[cuts[window.start] : cuts[window.end]] for window in windows]
