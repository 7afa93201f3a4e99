"""``past-ray rollouts``: the stored rollouts of a run, filtered, as a table or one by one."""

import json
import math
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from past_ray.cli.user_errors import user_errors
from past_ray.errors import ConfigError
from past_ray.rl.types import RolloutStatus


class Sort(StrEnum):
    """What the rollouts are sorted by, largest first."""

    REWARD = "reward"
    """Reward."""

    LENGTH = "length"
    """Sampled tokens."""

    STALENESS = "staleness"
    """Optimizer steps between sampling and training."""


def rollouts(
    run: Annotated[Path, typer.Argument(help="Run directory, or work directory of an RL stage.")],
    step: Annotated[int | None, typer.Option(help="One step.")] = None,
    steps: Annotated[str, typer.Option(help="Steps A:B, both included; either may be empty.")] = "",
    status: Annotated[RolloutStatus | None, typer.Option(help="How it ended.")] = None,
    min_reward: Annotated[float | None, typer.Option(help="Least reward.")] = None,
    max_reward: Annotated[float | None, typer.Option(help="Largest reward.")] = None,
    question: Annotated[str | None, typer.Option(help="Id of the question.")] = None,
    contains: Annotated[str | None, typer.Option(help="Text in the answer or the error.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Rollouts to print.")] = 20,
    sort: Annotated[Sort | None, typer.Option(help="Largest first.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Prompts and answers of each turn.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """Print and filter the rollouts of a run."""
    with user_errors():
        first, last = _step_range(step, steps)
        from past_ray.rl.rollout_search import RolloutQuery, read_turns, search_rollouts

        query = RolloutQuery(
            first_step=first,
            last_step=last,
            status=status,
            min_reward=min_reward,
            max_reward=max_reward,
            question_id=question,
            contains=contains,
        )
        column = "num_tokens" if sort is Sort.LENGTH else sort and sort.value
        table = search_rollouts(run, query, sort=column)
        rows: list[dict[str, Any]] = table.slice(0, limit).to_pylist()
        for row in rows:
            row["work_dir"] = Path(row["work_dir"])
            if full:
                row["turns"] = read_turns(row)
        summary = _summary(table["reward"].to_pylist())
        if as_json:
            typer.echo(json.dumps(_json_value({**summary, "rollouts": rows}), indent=2))
            return
        from past_ray.cli.rollout_tables import print_full, print_rows

        if full:
            print_full(rows)
        else:
            print_rows(rows, run=run)
        shown = f"{len(rows)} of {summary['num_rollouts']} matching rollouts shown"
        typer.echo(f"{shown}; mean reward {_number(summary['mean_reward'])}")


def _step_range(step: int | None, steps: str) -> tuple[int | None, int | None]:
    if step is not None and steps:
        raise ConfigError(f"--step {step} and --steps {steps} exclude each other. Give one.")
    if not steps:
        return step, step
    first, colon, last = steps.partition(":")
    if not colon or not all(part.isdigit() for part in (first, last) if part):
        raise ConfigError(f"--steps must have the form A:B, got {steps!r}. Write 10:20 or 10:.")
    return int(first) if first else None, int(last) if last else None


def _summary(rewards: list[float | None]) -> dict[str, Any]:
    graded = [reward for reward in rewards if reward is not None]
    mean = sum(graded) / len(graded) if graded else None
    return {"num_rollouts": len(rewards), "num_rewards": len(graded), "mean_reward": mean}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _json_value(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """Return JSON's own types; it has no NaN."""
    if isinstance(value, dict):
        return {key: _json_value(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
