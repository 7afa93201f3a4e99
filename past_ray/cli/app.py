"""``past-ray``: parse, call a pipeline, show what came out. Heavy imports follow the parsing."""

import logging
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from past_ray.errors import PastRayError

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Adapt language models to new documents on Ray and keep their skills.",
)

ConfigArgument = Annotated[
    Path, typer.Argument(help="YAML file, e.g. jobs/configs/demo.yaml.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Dotted overrides, e.g. rl.group_size=16.", show_default=False),
]
Seeds = Annotated[str, typer.Option(help="Several seeds, e.g. 0,1,2; reports their means.")]


@contextmanager
def user_errors() -> Generator[None]:
    """End the process with a message and an exit code instead of a traceback."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr
    )
    for noisy in ("httpx", "ray", "vllm", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        yield
    except KeyboardInterrupt:
        typer.secho("interrupted; the same command continues", err=True, fg="yellow")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except PastRayError as error:
        # Ray hands over an actor's error as a class of both; its own text is a whole traceback.
        cause = getattr(error, "cause", None) or error
        typer.secho(f"{type(cause).__name__}: {cause}", err=True, fg="red")
        raise typer.Exit(EXIT_FAILED) from error


def run_experiment(config: Path, overrides: list[str] | None, seeds: str, ask: int) -> None:
    """Load the config and run it; shared by ``past-ray run`` and ``jobs/run_past.py``."""
    with user_errors():
        from past_ray.config.experiment import ExperimentConfig
        from past_ray.config.loading import load_config

        experiment = load_config(ExperimentConfig, config, overrides or [])
        from past_ray.pipelines.demonstration import ask_adapted_model, print_arms

        if seeds:
            from past_ray.pipelines.seeds import parse_seeds, run_seeds

            print_arms(run_seeds(experiment, parse_seeds(seeds)), experiment.run_dir)
            return
        from past_ray.pipelines.past import run_past

        print_arms(run_past(experiment), experiment.run_dir)
        if ask:
            ask_adapted_model(experiment, num_questions=ask)


@app.command()
def run(
    config: ConfigArgument,
    overrides: Overrides = None,
    seeds: Seeds = "",
    ask: Annotated[
        int, typer.Option(help="Serve the model at the end and ask it N questions.")
    ] = 0,
) -> None:
    """Run, or continue, a whole experiment: SFT, RL, skill vector, injection, all arms."""
    run_experiment(config, overrides, seeds, ask)


@app.command()
def serve(
    model: Annotated[Path, typer.Argument(help="Hugging Face folder, e.g. runs/demo/adapted.")],
    config: Annotated[Path | None, typer.Option(help="YAML with serving settings.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override, e.g. --set port=8001.")
    ] = None,
) -> None:
    """Serve a model behind an OpenAI-compatible endpoint until Ctrl-C."""
    with user_errors():
        from past_ray.config.loading import load_config
        from past_ray.config.serving import ServingConfig
        from past_ray.serving.client import example_command
        from past_ray.serving.launch import serve_forever

        serving = load_config(ServingConfig, config, overrides or [])

        def on_ready(base_url: str) -> None:
            typer.echo(f"serving {model} as {serving.model_id!r} at {base_url}; Ctrl-C stops it")
            typer.echo(
                example_command(
                    base_url,
                    "...",
                    model_id=serving.model_id,
                    token_env=serving.token_env,
                    max_tokens=32,
                )
            )

        serve_forever(serving, model, on_ready=on_ready)


@app.command()
def extract(
    rl: Annotated[Path, typer.Argument(help="Checkpoint after RL.")],
    sft: Annotated[Path, typer.Argument(help="Checkpoint before RL.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the skill vector.")],
    task: Annotated[str, typer.Option(help="Source domain, kept in the manifest.")] = "unnamed",
) -> None:
    """Write the skill vector RL - SFT."""
    with user_errors():
        from past_ray.skill.artefact import extract_to_folder

        extract_to_folder(rl, sft, out, task=task, refinement_round=1, seed=0)
        typer.echo(f"wrote {out}")


@app.command()
def inject(
    target: Annotated[Path, typer.Argument(help="Checkpoint that knows the target documents.")],
    skill: Annotated[Path, typer.Argument(help="Folder of a skill vector.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the adapted model.")],
    scale: Annotated[float, typer.Option(help="Strength of the skill.")] = 1.0,
) -> None:
    """Write the adapted model TARGET + scale * SKILL."""
    with user_errors():
        from past_ray.skill.artefact import inject_to_folder

        inject_to_folder(target, skill, out, scale=scale)
        typer.echo(f"wrote {out}")


def main() -> None:
    """Entry point of the console script."""
    app()
