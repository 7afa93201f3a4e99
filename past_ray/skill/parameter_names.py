"""What a parameter's name says about where it sits in a model.

Names follow the model classes of transformers: a stem, the layer's number, and inside the layer a
path of modules that ends in ``weight`` or ``bias``. A model with two stacks of layers, say a vision
tower, numbers both from 0.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from past_ray.config.skill import ScaleConfig, parse_layers
from past_ray.errors import SkillVectorError

MAX_SHOWN = 12
"""Known names that a message lists."""

_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")

_BLOCKS: tuple[tuple[str, re.Pattern[str]], ...] = (
    # The order matters: a norm inside of attention is a norm, and embed_out is a head.
    ("norm", re.compile(r"norm[^.]*$|(?:^|\.)ln_\w+$")),
    ("mlp", re.compile(r"(?:^|\.)(?:mlp|ffn|feed_forward|\w*moe)\.")),
    ("attn", re.compile(r"(?:attn|attention)[^.]*\.")),
    ("head", re.compile(r"(?:^|\.)(?:lm_head|embed_out|output)$")),
    ("embed", re.compile(r"embed|(?:^|\.)w[tp]e$")),
)
"""What the path of a module holds, searched in it from the layer's number on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterPlace:
    """Where a parameter sits.

    Example: ``model.layers.3.self_attn.q_proj.weight`` is
    ``ParameterPlace(layer=3, module="q_proj", block="attn")``.
    """

    layer: int | None
    """Index of the transformer layer; None outside of the layers."""

    module: str
    """Last module of the path: ``q_proj``, ``input_layernorm``, ``embed_tokens``, ``norm``."""

    block: str
    """``attn``, ``mlp``, ``norm`` (wherever it is), ``embed``, ``head`` or ``other``."""


def parse(name: str) -> ParameterPlace:
    """Return the place of the parameter called ``name``; a bias is where its weight is."""
    layer = _LAYER.search(name)
    path = re.sub(r"\.(?:weight|bias)$", "", name[layer.end() :] if layer else name)
    return ParameterPlace(
        layer=int(layer[1]) if layer else None,
        module=path.rpartition(".")[2],
        block=next((block for block, pattern in _BLOCKS if pattern.search(path)), "other"),
    )


def select_names(
    names: Iterable[str], *, layers: str | None, modules: Sequence[str] | None
) -> list[str]:
    """Return those of ``names`` that lie in ``layers`` and belong to ``modules``, in their order.

    Args:
        names: Parameters of one model.
        layers: Such as ``8-20`` or ``0,3,8-20``; None selects all, also those outside of layers,
            which no number selects.
        modules: Names of modules (``q_proj``) or blocks (``attn``); None selects all.

    Raises:
        ConfigError: ``layers`` has another form.
        SkillVectorError: A range or a module selects nothing.
    """
    places = {name: parse(name) for name in names}
    if layers is not None:
        _check_layers(layers, places.values())
        wanted = parse_layers(layers)
        places = {name: place for name, place in places.items() if place.layer in wanted}
    if modules is not None:
        _check_modules(modules, places.values())
        places = {
            name: place
            for name, place in places.items()
            if place.module in modules or place.block in modules
        }
    return list(places)


def scale_of(name: str, config: ScaleConfig) -> float:
    """Return the factor of the parameter called ``name``.

    ``scale * (factor of its layer) * (factor of its module) * (factor of its block)``, where a
    factor that ``config`` does not give is 1.
    """
    place = parse(name)
    scale = config.scale
    for text, factor in config.layers.items():
        if place.layer in parse_layers(text):
            scale *= factor
    for module, factor in config.modules.items():
        if module in (place.module, place.block):
            scale *= factor
    return scale


def check_scales_match(names: Iterable[str], config: ScaleConfig) -> None:
    """Refuse a configuration with an entry that names nothing in this model.

    Raises:
        SkillVectorError: A range or a module matches none of ``names``.
    """
    places = [parse(name) for name in names]
    for text in config.layers:
        _check_layers(text, places)
    _check_modules(list(config.modules), places)


def _check_layers(text: str, places: Iterable[ParameterPlace]) -> None:
    """Refuse each comma-separated part of ``text`` without a layer, not only the whole."""
    known = sorted({place.layer for place in places if place.layer is not None})
    for part in text.split(","):
        if parse_layers(part).isdisjoint(known):
            raise SkillVectorError(
                f"layers {part.strip()!r} must name layers of this model, which has"
                f" {f'{known[0]} to {known[-1]}' if known else 'none'}. Correct the range."
            )


def _check_modules(modules: Sequence[str], places: Iterable[ParameterPlace]) -> None:
    places = list(places)
    blocks, names = {place.block for place in places}, {place.module for place in places}
    known = [*sorted(blocks), *sorted(names - blocks)]
    unknown = [module for module in modules if module not in known]
    if unknown:
        more = f" and {len(known) - MAX_SHOWN} more" if len(known) > MAX_SHOWN else ""
        raise SkillVectorError(
            f"modules must name modules or blocks that are there, got {unknown}; there are"
            f" {known[:MAX_SHOWN]}{more}. Correct the name."
        )
