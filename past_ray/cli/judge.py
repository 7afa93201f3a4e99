"""``past-ray judge``: how far a judge can be trusted. Heavy imports follow the parsing."""

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from past_ray.cli.user_errors import user_errors
from past_ray.errors import GradingError

if TYPE_CHECKING:
    from past_ray.config.judge import JudgeConfig
    from past_ray.tasks.calibration import Agreement, DistinctAnswers
    from past_ray.tasks.judging import JudgeOutcome, JudgeStats

judge_app = typer.Typer(no_args_is_help=True, help="Judges: rules, local models and endpoints.")


@judge_app.callback()
def judge_commands() -> None:
    """Judges: rules, local models and endpoints."""


@judge_app.command()
def calibrate(
    files: Annotated[list[Path], typer.Argument(help="Answers with verdicts, as SEAL's results.")],
    config: Annotated[
        Path | None, typer.Option(help="YAML with a judge section; a rule if left out.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override, e.g. --set judge.max_words=16.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Judge only the first N answers.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """Compare a judge's verdicts with those in graded files."""
    with user_errors("interrupted; what a cache holds is not asked again"):
        from past_ray.config.judge import CalibrationConfig
        from past_ray.config.loading import load_config
        from past_ray.engine.judge import build_judge
        from past_ray.tasks.calibration import (
            distinct_answers,
            measure_agreement,
            read_graded_answers,
        )

        settings = load_config(CalibrationConfig, config, overrides or []).judge
        graded = [entry for path in files for entry in read_graded_answers(path)]
        answers = distinct_answers(graded)
        reference = answers.graded[:limit]
        items = [entry.item for entry in reference]
        with closing(build_judge(settings)) as judge:
            outcomes = judge.judge(items)
            report = _report(settings, answers, outcomes, judge.stats())
        if settings.kind == "rule" and settings.max_words is not None:
            uncapped = build_judge(settings.model_copy(update={"max_words": None})).judge(items)
            report["all_words"] = _measures(measure_agreement(uncapped, reference))
        if as_json:
            typer.echo(json.dumps(report, indent=2))
        else:
            _print_report(report)
        _check_any_verdict(report)


def _report(
    settings: "JudgeConfig",
    answers: "DistinctAnswers",
    outcomes: "Sequence[JudgeOutcome]",
    stats: "JudgeStats",
) -> dict[str, Any]:
    """Return everything that is shown, as JSON values."""
    from past_ray.tasks.calibration import SWEEP_THRESHOLDS, measure_agreement
    from past_ray.tasks.judging import JudgeFailure

    reference = answers.graded[: len(outcomes)]
    errors = [outcome.error for outcome in outcomes if isinstance(outcome, JudgeFailure)]
    thresholds = SWEEP_THRESHOLDS if settings.kind == "rule" else ()
    return {
        "judge": settings.model_dump(mode="json"),
        "num_repeats_left_out": answers.num_repeats,
        "num_contradictions_left_out": answers.num_contradictions,
        "num_failures": len(errors),
        "first_failure": errors[0] if errors else None,
        **_measures(measure_agreement(outcomes, reference)),
        "stats": asdict(stats),
        "sweep": [
            {
                "correct_at": threshold,
                **_measures(measure_agreement(outcomes, reference, correct_at=threshold)),
            }
            for threshold in thresholds
        ],
    }


def _measures(found: "Agreement") -> dict[str, Any]:
    return {
        "num_answers": found.num_answers,
        "agreement": found.agreement,
        "precision": found.precision,
        "recall": found.recall,
        "kappa": found.kappa,
        **asdict(found),
    }


def _print_report(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("correct at", "agreement", "precision", "recall", "kappa"):
        table.add_column(name, justify="right")
    judge = report["judge"]
    rows = [("judge", report)]
    if "all_words" in report:
        rows.append(("all words", report["all_words"]))
    rows += [(f"{row['correct_at']:g}", row) for row in report["sweep"]]
    for label, row in rows:
        measures = ("agreement", "precision", "recall", "kappa")
        table.add_row(label, *(_number(row[name]) for name in measures))
    typer.echo(_name(judge))
    typer.echo(
        f"{report['num_answers']} answers; left out: {report['num_repeats_left_out']} repeats, "
        f"{report['num_contradictions_left_out']} with contradicting verdicts, "
        f"{report['num_failures']} that the judge could not decide"
    )
    Console().print(table)
    stats = report["stats"]
    if judge["kind"] == "endpoint":
        typer.echo(
            f"{stats['num_calls']} calls, {stats['num_retries']} of them retries; "
            f"{stats['num_cache_hits']} verdicts from the cache; {stats['num_input_tokens']} + "
            f"{stats['num_output_tokens']} tokens; cost {stats['cost']:.4f}"
        )
    if report["num_failures"]:
        typer.echo(f"first failure: {report['first_failure']}", err=True)


def _check_any_verdict(report: dict[str, Any]) -> None:
    if report["num_failures"] and not report["num_answers"]:
        raise GradingError(
            f"a judge must decide about some answers, it failed on all {report['num_failures']}: "
            f"{report['first_failure']}"
        )


def _name(judge: dict[str, Any]) -> str:
    match judge["kind"]:
        case "rule":
            length = f"first {judge['max_words']} words" if judge["max_words"] else "all words"
            return f"rule {judge['rule']} >= {judge['correct_at']:g}, {length}"
        case "model":
            return f"model {judge['path']}"
        case _:
            return f"endpoint {judge['model']} at {judge['base_url']}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
