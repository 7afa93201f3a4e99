"""Dotted keys of a configuration record, read from its type annotations.

pydantic locates an error as ``("model", "scratch", "hidden_size")``: the tag of the chosen variant
is part of it. What the user wrote is ``model.hidden_size``. This module translates, and lists the
keys that exist at a place, for suggestions.
"""

import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, Union, get_args, get_origin

from pydantic import BaseModel

Location = Sequence[int | str]


def dotted_key(model: type[BaseModel], location: Location) -> str:
    """Return ``model.hidden_size`` or ``task.source_paths[0]`` for pydantic's location."""
    key = ""
    for part, _ in _walk(model, location):
        key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else part
    return key


def keys_at(model: type[BaseModel], location: Location, *, tags: bool = False) -> list[str]:
    """Return the keys of the section at ``location``; with ``tags`` its variants' names."""
    steps = list(_walk(model, location, keep_tags=True))
    variants = _variants(steps[-1][1] if steps else model)
    if tags:
        return [str(tag) for variant in variants for tag in _tags(variant)]
    return list(dict.fromkeys(name for variant in variants for name in variant.model_fields))


def keys_ending_in(model: type[BaseModel], name: str) -> list[str]:
    """Return all dotted keys whose last part is ``name``, anywhere below ``model``."""
    return list(dict.fromkeys(key for key in _all_keys(model) if key.split(".")[-1] == name))


def _all_keys(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield name
        for variant in _variants(field.annotation):
            yield from (f"{name}.{key}" for key in _all_keys(variant))


def _walk(
    model: type[BaseModel], location: Location, *, keep_tags: bool = False
) -> Iterator[tuple[int | str, object]]:
    """Yield each part that the user wrote, with the annotation of what lies there.

    Args:
        model: The record at the root.
        location: pydantic's location.
        keep_tags: Also yield the tags of variants, with the variant as annotation.
    """
    annotation: object = model
    for part in location:
        variants = _variants(annotation)
        chosen = [variant for variant in variants if part in _tags(variant)]
        if len(variants) > 1 and chosen:
            annotation = chosen[0]
            if keep_tags:
                yield part, annotation
            continue
        annotation = _child(annotation, part)
        yield part, annotation


def _child(annotation: object, part: int | str) -> object:
    """Return the annotation one level down; None where the types do not say."""
    for variant in _variants(annotation):
        if part in variant.model_fields:
            return variant.model_fields[str(part)].annotation
    arguments = [entry for entry in _union_members(annotation) if get_args(entry)]
    if not arguments:
        return None
    inner = get_args(arguments[0])
    if isinstance(part, int):
        return inner[part] if Ellipsis not in inner and part < len(inner) else inner[0]
    return inner[-1]


def _variants(annotation: object) -> list[type[BaseModel]]:
    """Return the records that a value of this annotation can be."""
    return [
        entry
        for entry in _union_members(annotation)
        if isinstance(entry, type) and issubclass(entry, BaseModel)
    ]


def _union_members(annotation: object) -> list[object]:
    if get_origin(annotation) is Annotated:
        return _union_members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for entry in get_args(annotation) for member in _union_members(entry)]
    return [annotation]


def _tags(variant: type[BaseModel]) -> tuple[object, ...]:
    """Return the values of the variant's ``kind``."""
    kind = variant.model_fields.get("kind")
    if kind is None or get_origin(kind.annotation) is not Literal:
        return ()
    return get_args(kind.annotation)
