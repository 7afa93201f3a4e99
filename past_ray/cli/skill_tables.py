"""What ``past-ray skill`` shows: tables, heat maps and a progress bar."""

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from past_ray.skill.comparison import Comparison
from past_ray.skill.geometry import PROJECTION_MODULES, ModuleCosine
from past_ray.skill.inspection import Inspection, NormRow, RoundingCost
from past_ray.skill.manifest import energy_kept

COLOURS = ((0.2, "bold red"), (0.05, "yellow"))
"""Least absolute cosine and its style; smaller ones are plain."""


SHOWN_FACTS = (
    "form",
    "operation",
    "refinement_round",
    "created",
    "vector_hash",
    "rl_hash",
    "sft_hash",
    "base_hash",
    "parent_hash",
    "rl_dtype",
    "sft_dtype",
    "reward",
    "seed",
    "source_data_hash",
)
"""Rows of the manifest that ``inspect`` prints."""


@contextmanager
def progress_bar() -> Generator[Callable[[int, int], None]]:
    """Show how far the work is, on standard error and only on a terminal."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not Console(stderr=True).is_terminal,
    )
    with bar:
        task = bar.add_task("weights", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_inspection(found: Inspection) -> None:
    """Print lineage, norms and the cost of rounding."""
    console, manifest = Console(), found.manifest
    console.print(f"Skill vector: {manifest.task}", style="bold")
    facts = {key: getattr(manifest, key) for key in SHOWN_FACTS} | {
        "norm": f"{manifest.norm:.6g}",
        "tensors": len(manifest.tensors),
        "corrections": sum(record.num_corrections for record in manifest.tensors.values()),
        "energy_kept": energy_kept(manifest.tensors),
    }
    for key, value in facts.items():
        if value is not None:
            # Not wrapped: a hash is there to be copied.
            console.print(f"  {key:<18}{value}", soft_wrap=True, highlight=False)
    console.print(_norm_table("By layer", found.by_layer))
    console.print(_norm_table("By module", found.by_module))
    for title, cost in (
        ("If both parents were stored in bfloat16", found.parents_in_bf16),
        ("Injected into the target", found.in_target),
    ):
        if cost is not None:
            console.print(f"{title}: {_cost_text(cost)}")


def print_comparisons(comparisons: Sequence[Comparison]) -> None:
    """Print the pair of interest layer by layer, and every pair's means."""
    console = Console()
    titles = _titles(comparisons)
    console.print(_cosine_table(comparisons[0], titles[0]))
    means = Table("pair", "mean of projections", "whole vectors", title="Every pair")
    for title, found in zip(titles, comparisons, strict=True):
        means.add_row(title, *(_cosine_text(value, 5) for value in (found.mean, found.overall)))
    console.print(means)


def plot_comparisons(comparisons: Sequence[Comparison], path: Path) -> None:
    """Draw one heat map, layer by module, for each pair."""
    from past_ray.pipelines.plots import draw_cosines, save_png

    tables = {
        title: [_cell(row) for row in found.rows]
        for title, found in zip(_titles(comparisons), comparisons, strict=True)
    }
    height = 2.0 + 2.6 * len(tables)
    save_png(lambda figure: draw_cosines(figure, tables), path, width=9.0, height=height)


def inspection_json(found: Inspection) -> dict[str, Any]:
    """Return an inspection as JSON values."""
    values = asdict(found) | {"manifest": found.manifest.model_dump(mode="json")}
    return _finite(values)


def comparison_json(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Return comparisons as JSON values; NaN becomes null."""
    return [_finite(asdict(found)) for found in comparisons]


def _norm_table(title: str, rows: Sequence[NormRow]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("part", "norm", "share of energy", "entries", "changed in bf16"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for row in rows:
        changed = row.share_bf16_changed
        table.add_row(
            row.part,
            f"{row.norm:.4g}",
            f"{row.share:.1%}",
            f"{row.num_entries:,}",
            "" if changed is None else f"{changed:.1%}",
        )
    return table


def _cosine_table(found: Comparison, title: str) -> Table:
    """Layers down, projection modules across."""
    cells = {(row.layer, row.module): row.cosine for row in found.rows}
    modules = [m for m in PROJECTION_MODULES if any(module == m for _, module in cells)]
    title = f"Cosines of {title}, projection matrices"
    table = Table("layer", title=title, title_justify="left")
    for module in modules:
        table.add_column(module.removesuffix("_proj"), justify="right")
    for layer in sorted({layer for layer, _ in cells if layer is not None}):
        values = [cells.get((layer, module), math.nan) for module in modules]
        table.add_row(str(layer), *map(_cosine_text, values))
    return table


def _cosine_text(cosine: float, digits: int = 4) -> str:
    if math.isnan(cosine):
        return "-"
    style = next((style for least, style in COLOURS if abs(cosine) >= least), None)
    text = f"{cosine:+.{digits}f}"
    return f"[{style}]{text}[/]" if style else text


def _cost_text(cost: RoundingCost) -> str:
    return (
        f"{cost.share_changed:.2%} of the entries change in {cost.dtype}"
        f" ({1 - cost.share_changed:.2%} cannot), cosine {cost.cosine:.4f},"
        f" noise {cost.noise_to_signal:.3g} of the signal"
    )


def _titles(comparisons: Sequence[Comparison]) -> list[str]:
    """Name each pair by as much of the end of its paths as tells all folders apart."""
    folders = {place for found in comparisons for place in (found.left, found.right)}
    parts = {place: PurePosixPath(place).parts for place in folders}
    length = next(
        length
        for length in range(1, max(map(len, parts.values())) + 1)
        if len({parts[place][-length:] for place in folders}) == len(folders)
    )
    names = {place: "/".join(parts[place][-length:]) for place in folders}
    return [f"{names[found.left]} and {names[found.right]}" for found in comparisons]


def _cell(row: ModuleCosine) -> Any:  # noqa: ANN401 - a row of the report's heat map
    cosine = None if math.isnan(row.cosine) else row.cosine
    return {"layer": row.layer, "module": row.module, "cosine": cosine}


def _finite(value: Any) -> Any:  # noqa: ANN401 - JSON
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list) else value
