"""From a YAML file and dotted overrides to a configuration record, and back to YAML.

Values are layered: defaults of the record, then the file, then the overrides from left to right.
Every error names the file or the override, the dotted key, what was found and what to write.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from past_ray.config.base import StrictConfig
from past_ray.config.keys import dotted_key, keys_at, keys_ending_in
from past_ray.errors import ConfigError

ConfigT = TypeVar("ConfigT", bound=StrictConfig)

_RULES = {
    "int_parsing": "an integer",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_parsing": "a number",
    "float_type": "a number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "text (quote it)",
    "path_type": "a path",
    "model_type": "a section of 'key: value' lines",
    "tuple_type": "a list",
    "list_type": "a list",
    "invalid_key": "a text key",
}
"""What must hold, by pydantic's error type, where its own wording is about Python."""

_BAD_KEY = re.compile(r"[^\w.\[\]-]")

MAX_FOUND_CHARS = 120
"""Longest excerpt of a wrong value in a message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Override:
    """One ``key=value`` of the command line."""

    text: str
    key: str
    value: object


def load_config(model: type[ConfigT], path: Path | None, overrides: Sequence[str] = ()) -> ConfigT:
    """Read ``path``, apply ``overrides`` and validate the result.

    Args:
        model: The record to build.
        path: A YAML file with a mapping; None or an empty file gives the defaults.
        overrides: ``rl.group_size=16``, ``task.source_paths[0]=a.json`` or, replacing a whole
            section, ``model={kind: checkpoint, path: /models/base}``. Values are YAML.

    Raises:
        ConfigError: No such file, not YAML, a malformed override, an unknown key or a wrong value.
    """
    content = _read_yaml(path) if path else OmegaConf.create()
    path = path or Path("the defaults")
    parsed = [_parse_override(text) for text in overrides]
    for override in parsed:
        try:
            OmegaConf.update(content, override.key, override.value, merge=False)
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            raise ConfigError(
                f"override {override.text!r}: {override.key} cannot be set, got"
                f" {_first_line(error)}. Name a key, or an existing list entry as key[0]."
            ) from error
    values = _resolved(path, content)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [
            _explain(model, details, path=path, overrides=parsed)
            for details in error.errors(include_url=False)
        ]
        raise ConfigError("\n".join(lines)) from error


def dump_config(config: StrictConfig) -> str:
    """Return all values, defaults included, as YAML that ``load_config`` reads back as equal."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def config_hash(config: StrictConfig, *, exclude: Collection[str] = ()) -> str:
    """Return 16 hex digits that change when any value outside of ``exclude`` changes.

    Args:
        config: The record.
        exclude: Dotted keys that do not change what is computed, e.g. ``runtime.address``.

    Raises:
        KeyError: The configuration has no such key.
    """
    values = config.model_dump(mode="json")
    for key in exclude:
        *sections, name = key.split(".")
        section = values
        for part in sections:
            section = section[part]
        del section[name]
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _read_yaml(path: Path) -> DictConfig:
    if not path.is_file():
        raise ConfigError(f"{path} must be a YAML file, found none there. Check --config.")
    try:
        content = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} must be valid YAML, got: {error}") from error
    except OSError:  # how OmegaConf reports a file that is one bare number or word
        content = None
    if not isinstance(content, DictConfig):
        raise ConfigError(
            f"{path} must hold keys with values, found a list or a bare value."
            " Write 'key: value' lines."
        )
    return content


def _parse_override(text: str) -> _Override:
    key, equals, raw = text.partition("=")
    if not equals or _BAD_KEY.search(key) or not all(key.split(".")):
        raise ConfigError(
            f"override {text!r} must have the form key=value with a dotted key."
            " Write it as rl.group_size=16, without spaces around the sign."
        )
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={raw}"]))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(
            f"override {text!r}: the value must be YAML, got {_first_line(error)}."
            " Quote text that has special characters."
        ) from error
    return _Override(text=text, key=key, value=cast(dict[str, object], value)["value"])


def _resolved(path: Path, content: DictConfig) -> dict[str, Any]:
    """Return plain values with interpolations replaced."""
    try:
        values = OmegaConf.to_container(content, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"{path}: {error.full_key or '?'} cannot be resolved, got {_first_line(error)}."
            " Give the value itself."
        ) from error
    return cast(dict[str, Any], values)


def _explain(
    model: type[StrictConfig],
    details: ErrorDetails,
    *,
    path: Path,
    overrides: Sequence[_Override],
) -> str:
    """Say in one line what is wrong and what to write instead."""
    kind, location, found = details["type"], details["loc"], details.get("input")
    key = dotted_key(model, location)
    origin = _origin(key, path=path, overrides=overrides)
    if kind == "extra_forbidden":
        hint = _nearest(model, location)
        return f"{origin}: {key} is not a known key (found {_excerpt(found)}). {hint}"
    context = cast(Mapping[str, Any], details.get("ctx", {}))
    if kind == "missing":
        return f"{origin}: {key} must be given, found nothing. Add it."
    if kind == "union_tag_not_found":
        tag = str(context["discriminator"]).strip("'")
        choices = keys_at(model, location, tags=True)
        return f"{origin}: {key}.{tag} must be given, found nothing. Write one of {choices}."
    if kind == "union_tag_invalid":
        tag = str(context["discriminator"]).strip("'")
        close = difflib.get_close_matches(str(context["tag"]), keys_at(model, location, tags=True))
        return (
            f"{origin}: {key}.{tag} must be one of {context['expected_tags']},"
            f" found {context['tag']!r}." + (f" Did you mean {close[0]!r}?" if close else "")
        )
    message = details["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{origin}: {key}: {message}" if key else f"{origin}: {message}"
    rule = _RULES.get(kind) or message.removeprefix("Input should be ")
    return f"{origin}: {key or 'the file'} must be {rule}, found {_excerpt(found)}."


def _origin(key: str, *, path: Path, overrides: Sequence[_Override]) -> str:
    """Name the last override that touched ``key``, or else the file.

    The rules of the whole record have no key; any override can have broken them.
    """
    if not key and overrides:
        return f"{path} with {', '.join(override.text for override in overrides)}"
    for override in reversed(overrides):
        if _is_within(key, override.key) or _is_within(override.key, key):
            return f"override {override.text!r}"
    return str(path)


def _is_within(key: str, section: str) -> bool:
    return key == section or key.startswith((f"{section}.", f"{section}["))


def _nearest(model: type[StrictConfig], location: tuple[int | str, ...]) -> str:
    """Suggest the key that was meant: a similar one beside it, or the same one elsewhere."""
    name, section = str(location[-1]), dotted_key(model, location[:-1])
    beside = keys_at(model, location[:-1])
    prefix = f"{section}." if section else ""
    close = difflib.get_close_matches(name, beside, n=1)
    if close:
        return f"Did you mean {prefix}{close[0]}?"
    elsewhere = keys_ending_in(model, name)
    if elsewhere:
        return f"Did you mean {' or '.join(elsewhere)}?"
    return f"Known {f'in {section}' if section else 'here'}: {', '.join(beside)}."


def _excerpt(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_FOUND_CHARS else f"{text[:MAX_FOUND_CHARS]}..."


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
