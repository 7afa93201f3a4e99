"""The commands of ``past-ray``. Heavy imports follow the parsing."""

from pathlib import Path
from typing import Annotated

import typer

from past_ray.cli.judge import judge_app
from past_ray.cli.models import models_app
from past_ray.cli.replay import replay
from past_ray.cli.rollouts import rollouts
from past_ray.cli.skill import skill_app
from past_ray.cli.user_errors import user_errors

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Adapt language models to new documents on Ray and keep their skills.",
)

app.add_typer(skill_app, name="skill")
app.add_typer(models_app, name="models")
app.add_typer(judge_app, name="judge")

ConfigArgument = Annotated[
    Path, typer.Argument(help="YAML file, e.g. jobs/configs/demo.yaml.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Dotted overrides, e.g. rl.group_size=16.", show_default=False),
]
Seeds = Annotated[str, typer.Option(help="Several seeds, e.g. 0,1,2; reports their means.")]


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


app.command()(rollouts)
app.command()(replay)


def main() -> None:
    """Entry point of the console script."""
    app()
