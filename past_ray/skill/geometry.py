"""Angles between weight updates, per layer and module.

The paper's evidence that knowledge and skill can be added: the updates of SFT and of RL are nearly
orthogonal, while two SFT updates (or two RL updates) of different data visibly are not.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from past_ray.errors import SkillVectorError
from past_ray.skill.compatibility import check_float_tensors, check_same_parameters
from past_ray.skill.parameter_names import parse

PROJECTION_MODULES = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)
"""The paper's W_Q, W_K, W_V, W_O, W_gate, W_up and W_down, by their names in Llama and Qwen2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleCosine:
    """The angle between two updates of one weight.

    Example: ``ModuleCosine(layer=3, module="q_proj", cosine=-0.002, norm_a=1.4, norm_b=0.1)``.
    """

    layer: int | None
    """Index of the transformer layer; None outside of the layers."""

    module: str
    """``q_proj`` ... ``down_proj``, ``input_layernorm``, ``embed_tokens``, ``norm`` and so on."""

    cosine: float
    """In [-1, 1]; NaN where one of the updates is zero and has no direction."""

    norm_a: float
    """Frobenius norm of the first update."""

    norm_b: float
    """Frobenius norm of the second update."""


def update(after: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``after - before`` in float32: what one stage of training changed.

    The paper's section 5 compares ``update(sft, base)`` with ``update(rl, sft)``.

    Raises:
        SkillVectorError: Names or shapes differ, or a tensor is not floating point.
    """
    _check("after", after, "before", before)
    return {name: after[name].float() - before[name].float() for name in after}


def cosine_table(
    update_a: Mapping[str, Tensor], update_b: Mapping[str, Tensor]
) -> list[ModuleCosine]:
    """Return one row per weight, layers first, in the order of ``update_a``.

    ``cos = <A, B>_F / (|A|_F |B|_F)``, accumulated in float64: the cosines of interest are around
    1e-3, sums of millions of products of both signs. Biases have no row.

    Raises:
        SkillVectorError: Names or shapes differ, or a tensor is not floating point.

    Reference:
        PaST https://arxiv.org/abs/2601.11258 section 5, Figures 2 and 4, Tables 10 and 11.
    """
    _check("update_a", update_a, "update_b", update_b)
    rows = [
        _module_cosine(name, update_a[name], update_b[name])
        for name in update_a
        if name.endswith(".weight")
    ]
    return sort_rows(rows)


def sort_rows(rows: Sequence[ModuleCosine]) -> list[ModuleCosine]:
    """Return the rows with the layers first, otherwise in their order."""
    return sorted(rows, key=lambda row: math.inf if row.layer is None else row.layer)


def mean_cosine(
    table: Sequence[ModuleCosine], modules: Sequence[str] = PROJECTION_MODULES
) -> float:
    """Return the mean over all layers of ``modules``, every weight counting the same.

    Rows without a direction (NaN) are left out; NaN if no row has one.

    Raises:
        SkillVectorError: The table has none of ``modules``.
    """
    rows = [row for row in table if row.module in modules]
    if not rows:
        raise SkillVectorError(
            f"the table must have rows for some of {list(modules)}, found only"
            f" {sorted({row.module for row in table})}. Name the modules of this architecture."
        )
    cosines = [row.cosine for row in rows if not math.isnan(row.cosine)]
    return math.fsum(cosines) / len(cosines) if cosines else math.nan


def frobenius_norm(tensor: Tensor) -> float:
    """Return the square root of the sum of squares, accumulated in float64."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def _check(
    left_name: str, left: Mapping[str, Tensor], right_name: str, right: Mapping[str, Tensor]
) -> None:
    shapes = [{name: tuple(tensor.shape) for name, tensor in x.items()} for x in (left, right)]
    check_same_parameters(left_name, shapes[0], right_name, shapes[1])
    check_float_tensors(left_name, left)
    check_float_tensors(right_name, right)


def _module_cosine(name: str, a: Tensor, b: Tensor) -> ModuleCosine:
    place = parse(name)
    norm_a, norm_b = frobenius_norm(a), frobenius_norm(b)
    inner = float(torch.dot(a.flatten().double(), b.flatten().double()))
    return ModuleCosine(
        layer=place.layer,
        module=place.module,
        cosine=inner / (norm_a * norm_b) if norm_a > 0 and norm_b > 0 else math.nan,
        norm_a=norm_a,
        norm_b=norm_b,
    )
