"""The pictures of a report: functions that draw on a given figure, and two ways to save one.

A picture inside the HTML report is SVG whose ink is ``currentColor``, so it follows the page into
the dark. A picture in a file is PNG on white. No state of pyplot is used or changed.
"""

import io
import math
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from past_ray.pipelines.report_types import (
    ArmResult,
    CosineEntry,
    DosePoint,
    RLStep,
    ScalePoint,
)

Draw = Callable[[Figure], None]

ARM_LABELS = {
    "base": "Base model",
    "in_context": "Base, passage in prompt",
    "passage_only": "Passages alone",
    "target_sft": "Target SFT",
    "seal": "SEAL",
    "sequential": "Sequential",
    "pre_injection": "Pre-injection",
    "past": "PaST",
    "past_two_rounds": "PaST, two rounds",
    "target_rl": "RL on the target",
}
"""Arms in the order of the report, with their names in it."""

GREY, BLUE, ORANGE, GREEN, PURPLE = "#868e99", "#2a7fb8", "#d07a1f", "#2a9d78", "#a8709b"
"""After Okabe and Ito: told apart with every form of colour blindness, on white and on black."""

ARM_COLOURS = {
    "past": BLUE,
    "past_two_rounds": BLUE,
    "sequential": ORANGE,
    "pre_injection": ORANGE,
    "target_rl": GREEN,
}
"""PaST, the other places to put a skill, and the arm with target questions; the rest is grey."""

STAGE_STYLES = tuple(
    (colour, line) for line in ("-", (0, (4, 2))) for colour in (BLUE, ORANGE, GREEN, PURPLE)
)
"""Colour and line of the first, second, ... stage of a plot."""

SMOOTHING_STEPS = 9
"""Window of the centred moving average over noisy curves; the raw values stay visible."""

MAX_ANNOTATED_LAYERS = 8
"""Up to this many layers the cells of a heat map also hold their numbers."""

_SVG_INK = "#0b0c0d"
_PNG_INK = "#1f2328"


def svg(draw: Draw, *, width: float, height: float, label: str) -> str:
    """Return a picture as an ``<svg>`` element to put into HTML.

    Args:
        draw: Fills the figure.
        width: In inches; the page scales the picture to its column.
        height: In inches.
        label: What a screen reader says.
    """
    buffer = io.StringIO()
    with _style(_SVG_INK):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        no_metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_SVG_INK, "currentColor")
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    head, body = text.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{label}">{body}'


def save_png(draw: Draw, path: Path, *, width: float, height: float) -> None:
    """Save a picture on white, at 160 dots per inch. Missing parents of ``path`` are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _style(_PNG_INK):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        figure.savefig(path, format="png", dpi=160, facecolor="white", metadata={"Software": None})


def draw_arms(
    figure: Figure,
    arms: Mapping[str, ArmResult],
    *,
    accuracies_by_seed: Mapping[str, Sequence[float]],
    interval_name: str,
) -> None:
    """Draw one bar per arm with its interval, and a dot per seed.

    Args:
        figure: An empty figure.
        arms: In the order from top to bottom.
        accuracies_by_seed: Arm to one accuracy per seed; empty for a single run.
        interval_name: What the whiskers are, for the axis.
    """
    axes = figure.add_subplot()
    for row, (arm, result) in enumerate(arms.items()):
        accuracy, (low, high) = 100 * result["accuracy"], (100 * edge for edge in result["ci95"])
        axes.barh(row, accuracy, height=0.62, color=ARM_COLOURS.get(arm, GREY), alpha=0.85)
        axes.plot([low, high], [row, row], color=_ink(), linewidth=1.3)
        axes.plot([low, high], [row, row], "|", color=_ink(), markersize=7)
        dots = [100 * value for value in accuracies_by_seed.get(arm, ())]
        offsets = np.linspace(-0.17, 0.17, len(dots)) if len(dots) > 1 else [0.0]
        for dot, offset in zip(dots, offsets, strict=False):
            axes.plot(dot, row + offset, "o", color="white", markeredgecolor=_ink(), markersize=4)
        axes.text(max(high, accuracy, *dots) + 1.2, row, f"{accuracy:.1f}", va="center")
    axes.set_yticks(range(len(arms)), [ARM_LABELS.get(arm, arm) for arm in arms])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 108)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel(f"held-out target questions answered correctly (%)\nwhiskers: {interval_name}")
    _grid(axes, "x")


def draw_scale_sweep(
    figure: Figure, points: Sequence[ScalePoint], *, target_sft: float | None
) -> None:
    """Draw accuracy over the scale of the skill vector, with the level of target SFT."""
    axes = figure.add_subplot()
    scales = [point["scale"] for point in points]
    axes.plot(scales, [100 * point["accuracy"] for point in points], "o-", color=BLUE, markersize=4)
    intervals = [point.get("ci95", [point["accuracy"]] * 2) for point in points]
    axes.fill_between(
        scales,
        [100 * low for low, _ in intervals],
        [100 * high for _, high in intervals],
        color=BLUE,
        alpha=0.18,
        linewidth=0,
    )
    if target_sft is not None:
        axes.axhline(100 * target_sft, color=_ink(), linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"target SFT, {100 * target_sft:.1f} %",
            (1, 100 * target_sft),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
        )
    axes.set_xlabel("scale of the skill vector")
    _accuracy_axis(axes)


def draw_dose_curve(figure: Figure, points: Sequence[DosePoint]) -> None:
    """Draw accuracy over the length of target SFT, without and with the skill vector."""
    axes = figure.add_subplot()
    steps = [point["sft_steps"] for point in points]
    without = [100 * point["target_sft"] for point in points]
    with_skill = [100 * point["past"] for point in points]
    axes.fill_between(steps, without, with_skill, color=BLUE, alpha=0.10, linewidth=0)
    axes.plot(steps, with_skill, "o-", color=BLUE, markersize=4, label="PaST")
    axes.plot(steps, without, "s-", color=GREY, markersize=4, label="target SFT")
    axes.set_xlabel("optimizer steps of target SFT")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axes.legend(loc="best")
    _accuracy_axis(axes)


def draw_sft_losses(figure: Figure, losses: Mapping[str, Sequence[float]]) -> None:
    """Draw the loss of every SFT stage over its steps."""
    axes = figure.add_subplot()
    for (stage, values), (colour, line) in zip(losses.items(), _styles(losses), strict=True):
        _curve(axes, range(1, len(values) + 1), values, colour=colour, line=line, label=stage)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_ylim(bottom=0)
    axes.legend(loc="best")
    _grid(axes, "y")


def draw_rl_curves(figure: Figure, stages: Mapping[str, Sequence[RLStep]]) -> None:
    """Draw reward, entropy, KL and gradient norm of every RL stage that recorded them."""
    titles = {
        "reward": "mean reward",
        "entropy": "entropy (nats per token)",
        "ref_kl": "KL to the reference (nats per token)",
        "grad_norm": "gradient norm",
    }
    shown = {
        key: title
        for key, title in titles.items()
        if any(row.get(key) is not None for rows in stages.values() for row in rows)
    }
    num_rows = math.ceil(len(shown) / 2)
    first: Axes | None = None
    for number, (key, title) in enumerate(shown.items(), start=1):
        axes = figure.add_subplot(num_rows, min(2, len(shown)), number)
        first = first or axes
        for (stage, rows), (colour, line) in zip(stages.items(), _styles(stages), strict=True):
            points = [(row["step"], row.get(key)) for row in rows]
            known = [(step, value) for step, value in points if isinstance(value, int | float)]
            steps, values = [step for step, _ in known], [float(value) for _, value in known]
            _curve(axes, steps, values, colour=colour, line=line, label=stage)
        axes.set_title(title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.set_xlabel("optimizer step")
        _grid(axes, "y")
    if first is not None:
        handles, labels = first.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)))


def draw_cosines(figure: Figure, tables: Mapping[str, Sequence[CosineEntry]]) -> None:
    """Draw one heat map, layer by module, per pair of updates, on one symmetric colour scale.

    Args:
        figure: An empty figure.
        tables: Title to cells. Rows outside of the layers are left out.
    """
    grids = {title: _cosine_grid(entries) for title, entries in tables.items()}
    largest = max(float(np.nanmax(np.abs(values), initial=0.0)) for _, _, values in grids.values())
    limit = largest or 1.0
    is_wide = any(len(layers) > 2 * MAX_ANNOTATED_LAYERS for layers, _, _ in grids.values())
    shape = (len(grids), 1) if is_wide else (1, len(grids))
    all_axes: list[Axes] = []
    mesh: Any = None
    for number, (title, (layers, modules, values)) in enumerate(grids.items(), start=1):
        axes = figure.add_subplot(*shape, number)
        all_axes.append(axes)
        mesh = axes.pcolormesh(
            np.ma.masked_invalid(values),
            cmap="RdBu_r",
            vmin=-limit,
            vmax=limit,
            edgecolors="face",
            linewidth=0.4,
        )
        if len(layers) <= MAX_ANNOTATED_LAYERS:
            _annotate(axes, values, limit)
        every = max(1, math.ceil(len(layers) / 16))
        shown = range(0, len(layers), every)
        axes.set_xticks([place + 0.5 for place in shown], [str(layers[place]) for place in shown])
        axes.set_yticks([place + 0.5 for place in range(len(modules))], modules)
        if number > 1 and not is_wide:
            axes.set_yticklabels([])
        axes.invert_yaxis()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(title)
        axes.set_xlabel("layer")
    figure.colorbar(mesh, ax=all_axes, label="cosine", shrink=0.9, aspect=25)


def projection_entries(entries: Sequence[CosineEntry]) -> list[CosineEntry]:
    """Return the attention and feed-forward projections inside the layers: the paper's Figure 2."""
    return [
        entry
        for entry in entries
        if entry["layer"] is not None and entry["module"].endswith("_proj")
    ]


def _cosine_grid(
    entries: Sequence[CosineEntry],
) -> tuple[list[int], list[str], np.ndarray[Any, np.dtype[np.float64]]]:
    """Return layers, modules and ``[modules, layers]`` cosines, NaN where there is none."""
    inside = projection_entries(entries)
    layers = sorted({entry["layer"] for entry in inside if entry["layer"] is not None})
    modules = list(dict.fromkeys(entry["module"] for entry in inside))
    values = np.full((len(modules), len(layers)), np.nan)
    for entry in inside:
        if entry["layer"] is not None and entry["cosine"] is not None:
            place = modules.index(entry["module"]), layers.index(entry["layer"])
            values[place] = entry["cosine"]
    return layers, modules, values


def _annotate(axes: Axes, values: np.ndarray[Any, np.dtype[np.float64]], limit: float) -> None:
    for (row, column), value in np.ndenumerate(values):
        if math.isnan(value):
            continue
        colour = "white" if abs(value) > 0.6 * limit else "#20242a"
        digits = 3 if limit < 0.1 else 2
        text = f"{round(value, digits) + 0.0:.{digits}f}"
        axes.text(
            column + 0.5, row + 0.5, text, ha="center", va="center", color=colour, fontsize=7.5
        )


def _curve(
    axes: Axes,
    steps: Sequence[int],
    values: Sequence[float],
    *,
    colour: str,
    line: Any,  # noqa: ANN401 (matplotlib's line styles are names or tuples)
    label: str,
) -> None:
    """Draw raw values thinly and their moving average over them."""
    label = label.replace("_", " ")
    if len(values) < 2 * SMOOTHING_STEPS:
        axes.plot(steps, values, color=colour, linestyle=line, linewidth=1.5, label=label)
        return
    axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.3)
    half = SMOOTHING_STEPS // 2
    smooth = [
        float(np.mean(values[max(0, place - half) : place + half + 1]))
        for place in range(len(values))
    ]
    axes.plot(steps, smooth, color=colour, linestyle=line, linewidth=1.6, label=label)


def _styles(stages: Mapping[str, object]) -> list[tuple[str, Any]]:
    return [STAGE_STYLES[number % len(STAGE_STYLES)] for number in range(len(stages))]


def _accuracy_axis(axes: Axes) -> None:
    axes.set_ylabel("accuracy (%)")
    axes.set_ylim(0, 102)
    _grid(axes, "y")


def _grid(axes: Axes, axis: str) -> None:
    axes.grid(axis="x" if axis == "x" else "y", color=_ink(), alpha=0.13, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _ink() -> str:
    return str(matplotlib.rcParams["text.color"])


@contextmanager
def _style(ink: str) -> Generator[None]:
    """Use our fonts and ``ink`` for text and axes, and leave matplotlib's settings as they were."""
    inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    sizes = ("font.size", "axes.titlesize", "axes.labelsize", "legend.fontsize")
    settings: dict[str, Any] = {
        **dict.fromkeys(inks, ink),
        **dict.fromkeys(sizes, 9.0),
        "svg.fonttype": "none",
        "svg.hashsalt": "past_ray",
        "font.sans-serif": ["DejaVu Sans"],
        "axes.linewidth": 0.8,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "legend.frameon": False,
        "lines.linewidth": 1.6,
    }
    with matplotlib.rc_context(cast(Any, settings)):
        yield
