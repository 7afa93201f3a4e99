"""How much of a skill vector is added, and where."""

import re
from itertools import combinations
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from past_ray.config.base import StrictConfig
from past_ray.errors import ConfigError

FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]

LayerRanges = Annotated[str, Field(coerce_numbers_to_str=True)]
"""Text for ``parse_layers``. YAML reads a single layer as a number."""

_RANGE = re.compile(r"(?P<first>\d{1,4})(?:-(?P<last>\d{1,4}))?")


def parse_layers(text: str) -> frozenset[int]:
    """Return the layers of ``8-20`` or ``0,3,8-20``; both ends of a range belong to it.

    Raises:
        ConfigError: The text has another form, or a range runs backwards.
    """
    return frozenset(layer for part in text.split(",") for layer in _parse_range(part.strip()))


class ScaleConfig(StrictConfig):
    """The paper's lambda, for all of a model or different by layer and module.

    A parameter's scale is the product of ``scale`` and of every entry that names its layer, its
    module or its block. A plain number stands for ``{scale: number}``.

    Example::

        scale: 0.5
        layers: {0-7: 0, 8-20: 1.5}     # 0.75 in layers 8 to 20, 0.5 above
        modules: {attn: 2, q_proj: 0.5} # q_proj is part of attn: its factor is 1
    """

    scale: FiniteFloat = 1.0
    """Factor of everything; 1 in all the paper's experiments, negative takes the skill away."""

    layers: dict[LayerRanges, FiniteFloat] = Field(default_factory=dict)
    """Factor by layers, such as ``8-20`` or ``0,3,8-20``. No layer may occur in two entries."""

    modules: dict[str, FiniteFloat] = Field(default_factory=dict)
    """Factor by module (``q_proj``) or block (``attn``, ``mlp``, ``norm``, ``embed``, ``head``)."""

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, value: object) -> object:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return {"scale": value} if is_number else value

    @field_validator("layers")
    @classmethod
    def _no_layer_twice(cls, layers: dict[str, float]) -> dict[str, float]:
        parsed = {text: parse_layers(text) for text in layers}
        for (first, first_layers), (second, second_layers) in combinations(parsed.items(), 2):
            shared = first_layers & second_layers
            if shared:
                raise ValueError(
                    f"no layer may have two factors, got layer {min(shared)} in {first!r} and in"
                    f" {second!r}. Write ranges that do not overlap."
                )
        return layers


def _parse_range(text: str) -> range:
    match = _RANGE.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"layers must be numbers and ranges of at most four digits each, got {text!r}."
            " Write 8-20 or 0,3,8-20."
        )
    first, last = int(match["first"]), int(match["last"] or match["first"])
    if last < first:
        raise ConfigError(f"a range of layers must not run backwards, got {text!r}. Swap its ends.")
    return range(first, last + 1)
