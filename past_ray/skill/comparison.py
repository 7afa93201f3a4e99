"""Angles between skill vectors of any size, by layer and module.

Any difference of two checkpoints that ``extract`` wrote can be compared: an SFT update is
``extract(sft, base)``. The paper's controls are pairs of the same kind: two SFT updates, two RL
updates.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from torch import Tensor

from past_ray.errors import SkillVectorError
from past_ray.locations import Place
from past_ray.skill.artefact import SkillVector
from past_ray.skill.blocks import (
    Chunk,
    Measures,
    TensorTotals,
    Workspace,
    block_digests,
    blocks,
    digests_of,
    inner_product,
)
from past_ray.skill.compatibility import check_same_fingerprint, check_same_parameters
from past_ray.skill.geometry import ModuleCosine, mean_cosine, sort_rows
from past_ray.skill.parameter_names import parse
from past_ray.skill.stream import StreamSettings, measure


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The angles of one pair."""

    left: str
    """Folder of the first vector."""

    right: str
    """Folder of the second."""

    rows: list[ModuleCosine]
    """One for each weight that both have, layers first."""

    mean: float
    """Over the projection matrices, every one counting the same; NaN without any."""

    overall: float
    """Of the two vectors as a whole."""


def compare(skills: Sequence[Place], *, settings: StreamSettings | None = None) -> list[Comparison]:
    """Return the angles of every pair of skill vectors; each vector is read once.

    ``cos = <A, B>_F / (|A|_F |B|_F)``, accumulated in float64. Parameters that only one vector of
    a pair has are left out of that pair.

    Args:
        skills: Two or more skill folders. The first two are the pair of interest; more of them
            are the controls to see it against.
        settings: How the work is shared out.

    Raises:
        SkillVectorError: Fewer than two vectors, or they do not fit together.
        StorageError: A folder is unreadable.

    Reference:
        PaST https://arxiv.org/abs/2601.11258 section 5, Figures 2 and 4, Tables 10 and 11.
    """
    if len(skills) < 2:
        raise SkillVectorError(f"a comparison needs at least two skill vectors, got {len(skills)}.")
    vectors = [SkillVector(place) for place in skills]
    shapes: dict[str, tuple[int, ...]] = {}
    for vector in vectors:
        check_same_fingerprint(
            str(vectors[0].folder),
            vectors[0].manifest.fingerprint,
            str(vector.folder),
            vector.manifest.fingerprint,
        )
        theirs = vector.manifest.shapes
        shared = {name: shapes[name] for name in shapes if name in theirs}
        check_same_parameters(
            str(vectors[0].folder), shared, str(vector.folder), {n: theirs[n] for n in shared}
        )
        shapes |= theirs
    totals = measure(
        {name: shapes[name] for name in sorted(shapes)},
        _InnerProducts(vectors),
        settings=settings or StreamSettings(),
    )
    for number, vector in enumerate(vectors):
        vector.check_digests(digests_of(totals, f"vector {number}"))
    return [
        _comparison(vectors, left, right, totals)
        for left, right in combinations(range(len(vectors)), 2)
    ]


class _InnerProducts:
    """Sums the products of every pair, and the squares, block by block."""

    def __init__(self, vectors: Sequence[SkillVector]) -> None:
        self._vectors = vectors

    def __call__(self, chunk: Chunk, workspace: Workspace) -> Measures:
        measures = Measures()
        parts: dict[int, list[Tensor]] = {}
        for number, vector in enumerate(self._vectors):
            if chunk.name in vector.manifest.tensors:
                values = vector.read(chunk, workspace, role=f"vector {number}")
                parts[number] = list(blocks(values))
                if vector.needs_check:
                    measures.digests[f"vector {number}"] = block_digests(values)
        for left in parts:
            for right in parts:
                if left <= right:
                    measures.sums[f"{left} {right}"] = [
                        inner_product(a, b) for a, b in zip(parts[left], parts[right], strict=True)
                    ]
        return measures


def _comparison(
    vectors: Sequence[SkillVector], left: int, right: int, totals: dict[str, TensorTotals]
) -> Comparison:
    pair, squares_left, squares_right = f"{left} {right}", f"{left} {left}", f"{right} {right}"
    shared = {name: total.sums for name, total in totals.items() if pair in total.sums}
    rows = [
        _row(name, sums[pair], sums[squares_left], sums[squares_right])
        for name, sums in shared.items()
        if name.endswith(".weight")
    ]
    inner, square_a, square_b = (
        math.fsum(sums[key] for sums in shared.values())
        for key in (pair, squares_left, squares_right)
    )
    try:
        mean = mean_cosine(rows)
    except SkillVectorError:
        mean = math.nan
    return Comparison(
        left=str(vectors[left].folder),
        right=str(vectors[right].folder),
        rows=sort_rows(rows),
        mean=mean,
        overall=_cosine(inner, square_a, square_b),
    )


def _row(name: str, inner: float, square_a: float, square_b: float) -> ModuleCosine:
    place = parse(name)
    return ModuleCosine(
        layer=place.layer,
        module=place.module,
        cosine=_cosine(inner, square_a, square_b),
        norm_a=math.sqrt(square_a),
        norm_b=math.sqrt(square_b),
    )


def _cosine(inner: float, square_a: float, square_b: float) -> float:
    return inner / math.sqrt(square_a * square_b) if square_a > 0 and square_b > 0 else math.nan
