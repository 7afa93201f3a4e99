"""Records of data files: where a file is, what it holds, and errors that name the record.

Records are counted from 0, as Python counts them; lines from 1, as editors do. The files are not
part of this package. Relative paths are taken from the folder that the environment variable
``PAST_RAY_DATA`` names.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from past_ray.errors import DataError

DATA_VARIABLE = "PAST_RAY_DATA"
"""Environment variable with the folder of the data files."""


def resolve_data_path(path: Path) -> Path:
    """Return where a data file is: absolute paths as they are, others below ``PAST_RAY_DATA``.

    Raises:
        DataError: There is no such file; the message says whether the variable must be set.
    """
    folder = os.environ.get(DATA_VARIABLE)
    resolved = Path(folder) / path if folder else path
    if resolved.is_file():
        return resolved
    advice = (
        f"Check {DATA_VARIABLE}={folder} and the path."
        if folder and not path.is_absolute()
        else "Check the path."
        if path.is_absolute()
        else f"Set {DATA_VARIABLE} to the folder that holds it."
    )
    raise DataError(f"{path} must be a data file, found none at {resolved.absolute()}. {advice}")


def read_json_file(path: Path) -> object:
    """Return the value of a JSON file.

    Raises:
        DataError: Not UTF-8, or not JSON; the message has the record that is broken.
    """
    text = _read_utf8(path)
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(
            f"{path} must be JSON, got in record {_num_complete_records(text)}: {error}."
            " Fetch it again."
        ) from error


def read_json_lines(path: Path) -> list[object]:
    """Return the values of a file with one JSON value a line; blank lines are no records.

    Raises:
        DataError: Not UTF-8, or a line is not JSON; the message has its record and its line.
    """
    records: list[object] = []
    # Not splitlines(): a JSON text may hold U+2028, which is no end of a line there.
    for number, line in enumerate(_read_utf8(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise DataError(
                f"{path}: record {len(records)} (line {number}) must be JSON, got: {error}."
                " Fetch the file again."
            ) from error
    return records


def as_mapping(value: object, place: str) -> Mapping[str, object]:
    """Return ``value`` as an object, or refuse the record at ``place``."""
    if not isinstance(value, dict):
        raise DataError(f"{place} must be an object, found {kind_of(value)}. Repair the record.")
    return cast(dict[str, object], value)


def list_field(fields: Mapping[str, object], key: str, place: str) -> list[object]:
    """Return the list ``fields[key]``, or refuse the record at ``place``."""
    value = fields.get(key)
    if not isinstance(value, list):
        raise DataError(
            f"{place} must have a list {key!r}, found {kind_of(value)}; its keys are"
            f" {sorted(fields)}. Repair the record."
        )
    return cast(list[object], value)


def text_field(fields: Mapping[str, object], key: str, place: str) -> str:
    """Return the text ``fields[key]``, which has a visible character, or refuse the record."""
    value = fields.get(key)
    if not isinstance(value, str) or not value.strip():
        found = "an empty text" if isinstance(value, str) else kind_of(value)
        raise DataError(
            f"{place} must have a text {key!r}, found {found}; its keys are {sorted(fields)}."
            " Repair the record."
        )
    return value


def kind_of(value: object) -> str:
    """Name a JSON value's kind."""
    return "nothing" if value is None else f"a {type(value).__name__}"


def _read_utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} must be UTF-8 text, got: {error}. Fetch it again.") from error


def _num_complete_records(text: str) -> int:
    """Count the records before the one that is not JSON; they are the entries of the first list."""
    decoder, num_records = json.JSONDecoder(), 0
    position = text.find("[") + 1
    while position > 0:
        while position < len(text) and (text[position].isspace() or text[position] == ","):
            position += 1
        try:
            _, position = decoder.raw_decode(text, position)
        except ValueError:
            break
        num_records += 1
    return num_records
