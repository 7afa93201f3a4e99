"""``past-ray replay``: one RL step again. Heavy imports follow the parsing."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from past_ray.cli.user_errors import EXIT_FAILED, user_errors

if TYPE_CHECKING:
    from past_ray.pipelines.replay import Replay


def replay(
    work_dir: Annotated[Path, typer.Argument(help="E.g. runs/demo/work/rl_source_1.")],
    step: Annotated[int, typer.Option(help="Step to train again, from 1.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Setting of this step, e.g. rl.algorithm.kind=gspo."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the weights after it.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """Train one RL step again from its stored rollouts, without a generator.

    Fails if its metrics are not those that the run had logged, unless settings are changed.
    """
    with user_errors(on_interrupt="interrupted; nothing was written"):
        from past_ray.pipelines.replay import replay_json, replay_step

        done = replay_step(work_dir, step, overrides=overrides or [], out=out, device=device)
        if as_json:
            typer.echo(replay_json(done))
        else:
            _print(done)
        if done.differing and not done.is_changed:
            raise typer.Exit(EXIT_FAILED)


def _print(done: "Replay") -> None:
    from rich.console import Console
    from rich.table import Table

    differing = set(done.differing)
    table = Table("metric", box=None, pad_edge=False)
    for column in ("replayed", "logged"):
        table.add_column(column, justify="right")
    for key, value in done.metrics.items():
        logged = done.logged.get(key)
        cells = (key, f"{value:.6g}", "-" if logged is None else f"{logged:.6g}")
        table.add_row(*cells, style="yellow" if key in differing else "")
    Console().print(table)
    origin = f"step {done.start}" if done.start else "the start of the run"
    typer.echo(f"step {done.step}, replayed from {origin}: {_verdict(done)}")


def _verdict(done: "Replay") -> str:
    if done.is_changed:
        return "settings were changed"
    if not done.logged:
        return "the run has logged no metrics of it"
    if done.differing:
        return f"differs from the logged metrics in {', '.join(done.differing)}"
    return "equal to the logged metrics"
