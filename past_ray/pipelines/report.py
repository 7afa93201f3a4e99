"""The report of a run: ``report.json`` for programs and one ``report.html`` for people.

The page holds everything it shows, pictures included, and asks no server for anything.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from past_ray.pipelines import plots
from past_ray.pipelines.report_types import ArmResult, CosineEntry, Report, TextCounts
from past_ray.storage import write_json, write_text

TEMPLATES = Path(__file__).parent / "templates"

QUESTION_INTERVAL = "95 % bootstrap intervals over questions"
SEED_INTERVAL = "the range over seeds"

PAIR_LABELS = {
    "sft_source__rl_source": "source SFT and source RL",
    "sft_target__rl_source": "target SFT and source RL",
    "sft_source__sft_target": "source SFT and target SFT (control)",
    "rl__rl": "two RL runs (control)",
}
"""Pairs of updates whose cosines are compared; same-kind pairs are the controls."""

HEAT_MAP_PAIRS = ("sft_source__rl_source", "sft_source__sft_target")
"""The paper's Figure 2 and its control, Figure 4."""


def write_report(report: Mapping[str, Any], run_dir: Path) -> None:
    """Write ``report.json`` and ``report.html`` into ``run_dir``.

    The page shows what the file holds, so a number that is not finite is missing in both.

    Args:
        report: ``report_types.Report``, of one run or of several seeds.
        run_dir: Created if needed.

    Raises:
        StorageError: The disk is full; older files are intact.
    """
    path = run_dir / "report.json"
    write_json(path, report)
    write_text(run_dir / "report.html", render_report(json.loads(path.read_text())))


def write_pictures(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Save the arms, and the heat maps if there are cosines, as PNG files; return their paths."""
    content = cast(Report, report)
    arms_path, cosines_path = folder / "arms.png", folder / "cosines.png"
    draw_arms = partial(
        plots.draw_arms,
        arms=_ordered(content["arms"]),
        accuracies_by_seed=_accuracies_by_seed(content),
        interval_name=_interval_name(content),
    )
    plots.save_png(draw_arms, arms_path, width=7.2, height=1.1 + 0.36 * len(content["arms"]))
    heat_maps = _heat_maps(content)
    if not heat_maps:
        return [arms_path]
    width, height = _heat_map_size(heat_maps)
    draw_cosines = partial(plots.draw_cosines, tables=heat_maps)
    plots.save_png(draw_cosines, cosines_path, width=width, height=height)
    return [arms_path, cosines_path]


def render_report(report: Mapping[str, Any]) -> str:
    """Return the HTML page of one run, or of several seeds where ``report`` has ``per_seed``."""
    content = cast(Report, report)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    arms = _ordered(content["arms"])
    target_sft = arms.get("target_sft")
    return environment.get_template("report.html.j2").render(
        report=content,
        arms=arms,
        labels=plots.ARM_LABELS,
        colours={arm: plots.ARM_COLOURS.get(arm, plots.GREY) for arm in arms},
        seed_accuracies=_accuracies_by_seed(content),
        kinds=_question_kinds(arms),
        judge_failures=_judge_failures(arms),
        written=_written(content),
        has_target_cost=any("seconds_per_new_target" in result for result in arms.values()),
        reference=target_sft["accuracy"] if target_sft else None,
        verdict=verdict(content),
        interval_name=_interval_name(content),
        pair_labels=PAIR_LABELS,
        cosine_finding=cosine_finding(content),
        figures=_figures(content),
        duration=duration,
        signed=signed,
    )


def verdict(report: Report) -> str:
    """Say in one sentence whether the skill vector helped, from the numbers alone."""
    arms = report["arms"]
    if "past" not in arms or "target_sft" not in arms:
        return f"This run compares {', '.join(plots.ARM_LABELS.get(arm, arm) for arm in arms)}."
    past, sft = arms["past"], arms["target_sft"]
    gain = 100 * (past["accuracy"] - sft["accuracy"])
    num_questions = report.get("num_heldout_questions")
    questions = f"the {num_questions} held-out" if num_questions else "held-out"
    change = f"{abs(gain):.1f} points {'more' if gain >= 0 else 'fewer'} than"
    opening = (
        f"PaST answers {100 * past['accuracy']:.1f} % of {questions} target questions correctly,"
        f" {change} target SFT ({100 * sft['accuracy']:.1f} %)"
    )
    return f"{opening}, {_strength(report, gain)}."


def cosine_finding(report: Report) -> str | None:
    """Compare the cosine of source SFT and source RL with the SFT control, in one sentence."""
    cosines = report.get("cosines", {})
    mixed = cosines.get("sft_source__rl_source")
    control = cosines.get("sft_source__sft_target")
    if mixed is None or control is None or control == 0:
        return None
    ratio = abs(mixed / control)
    return (
        f"The updates of source SFT and source RL have a cosine of {signed(mixed, 4)}, in"
        f" size {ratio:.2g} times that of two SFT updates ({signed(control, 4)})."
    )


def signed(value: float, digits: int) -> str:
    """Return a number with its sign and a proper minus, e.g. ``+22.1``."""
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def duration(seconds: float) -> str:
    """Return ``0 s``, ``0.35 s``, ``42.0 s``, ``3 min 05 s`` or ``2 h 10 min``."""
    if seconds == 0:
        return "0 s"
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _strength(report: Report, gain: float) -> str:
    """Say how sure the difference between PaST and target SFT is."""
    past, sft = report["arms"]["past"], report["arms"]["target_sft"]
    seeds = [seed["arms"] for seed in report.get("per_seed", {}).values()]
    if seeds:
        better = sum(arms["past"]["accuracy"] > arms["target_sft"]["accuracy"] for arms in seeds)
        return f"and is ahead of it for {better} of {len(seeds)} seeds"
    if gain > 0 and past["ci95"][0] > sft["ci95"][1]:
        return "and the two 95 % intervals do not meet"
    if gain < 0 and past["ci95"][1] < sft["ci95"][0]:
        return "so here the skill vector did harm: the two 95 % intervals do not meet"
    return "but the two 95 % intervals overlap, so these questions alone do not settle it"


def _ordered(arms: Mapping[str, ArmResult]) -> dict[str, ArmResult]:
    """Return the known arms in the order of the report, then any others."""
    known = [arm for arm in plots.ARM_LABELS if arm in arms]
    return {arm: arms[arm] for arm in [*known, *(arm for arm in arms if arm not in known)]}


def _accuracies_by_seed(report: Report) -> dict[str, list[float]]:
    seeds = report.get("per_seed", {}).values()
    return {
        arm: [seed["arms"][arm]["accuracy"] for seed in seeds if arm in seed["arms"]]
        for arm in report["arms"]
    }


def _interval_name(report: Report) -> str:
    return SEED_INTERVAL if "per_seed" in report else QUESTION_INTERVAL


def _question_kinds(arms: Mapping[str, ArmResult]) -> list[str]:
    kinds = [kind for result in arms.values() for kind in result.get("accuracy_by_kind", {})]
    return list(dict.fromkeys(kinds)) if len(set(kinds)) > 1 else []


def _judge_failures(arms: Mapping[str, ArmResult]) -> dict[str, int]:
    """Count ungraded answers by the label of the arm, where there are any."""
    counts = {arm: result.get("judge_failures", 0) for arm, result in arms.items()}
    return {plots.ARM_LABELS.get(arm, arm): count for arm, count in counts.items() if count}


def _written(report: Report) -> dict[str, TextCounts]:
    """Return what was written about the source and the target, where anything was."""
    written: dict[str, TextCounts] = {}
    if "texts_source" in report:
        written["Source"] = report["texts_source"]
    if "texts_target" in report:
        written["Target"] = report["texts_target"]
    return written


def _heat_maps(report: Report) -> dict[str, list[CosineEntry]]:
    tables = report.get("cosine_modules", {})
    return {
        PAIR_LABELS[pair]: tables[pair]
        for pair in HEAT_MAP_PAIRS
        if plots.projection_entries(tables.get(pair, []))
    }


def _heat_map_size(heat_maps: Mapping[str, list[CosineEntry]]) -> tuple[float, float]:
    num_layers = max(len({entry["layer"] for entry in rows}) for rows in heat_maps.values())
    if num_layers > 2 * plots.MAX_ANNOTATED_LAYERS:
        return 8.0, 0.6 + 2.4 * len(heat_maps)
    return 1.9 + 3.1 * len(heat_maps), 3.1


def _figures(report: Report) -> dict[str, Markup]:
    """Draw what the report has data for, by the name that the template uses."""
    figures: dict[str, str] = {}
    target_sft = report["arms"].get("target_sft")
    if sweep := report.get("scale_sweep"):
        level = target_sft["accuracy"] if target_sft else None
        draw = partial(plots.draw_scale_sweep, points=sweep, target_sft=level)
        label = "Accuracy over the scale of the skill vector"
        figures["scale_sweep"] = plots.svg(draw, width=4.4, height=3.1, label=label)
    if dose := report.get("dose_curve"):
        draw = partial(plots.draw_dose_curve, points=dose)
        label = "Accuracy over the steps of target SFT"
        figures["dose_curve"] = plots.svg(draw, width=4.4, height=3.1, label=label)
    training = report.get("training", {})
    if rl := {stage: rows for stage, rows in training.get("rl", {}).items() if rows}:
        draw = partial(plots.draw_rl_curves, stages=rl)
        figures["rl"] = plots.svg(draw, width=8.6, height=5.0, label="Curves of the RL stages")
    if sft := {stage: values for stage, values in training.get("sft", {}).items() if values}:
        draw = partial(plots.draw_sft_losses, losses=sft)
        figures["sft"] = plots.svg(draw, width=8.6, height=3.0, label="Loss of the SFT stages")
    if heat_maps := _heat_maps(report):
        width, height = _heat_map_size(heat_maps)
        draw = partial(plots.draw_cosines, tables=heat_maps)
        label = "Cosine per layer and module"
        figures["cosines"] = plots.svg(draw, width=width, height=height, label=label)
    return {name: Markup(text) for name, text in figures.items()}
