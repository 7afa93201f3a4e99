"""The end of a run: its table on the terminal, and the adapted model answering on an endpoint."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from past_ray.config.experiment import ExperimentConfig
from past_ray.config.serving import ServingConfig
from past_ray.pipelines import data
from past_ray.pipelines.stages import RunDirectory
from past_ray.serving.auth import read_token
from past_ray.serving.client import ask_policy, example_command
from past_ray.serving.launch import running_policy_app

ANSWER_TIMEOUT_S = 120.0
"""A first answer may wait for an engine that is still warming up."""


def print_arms(report: dict[str, Any], run_dir: Path) -> None:
    """Print the arms as a table and, where the paper has these tasks, its table with ours."""
    seeds = report.get("seeds")
    what = f"means of seeds {seeds}" if seeds else f"{report['num_heldout_questions']} questions"
    table = Table(title=f"{report['name']}: {what}")
    for column in ("arm", "accuracy", "95 %", "tokens", "seconds", "per target"):
        table.add_column(column, justify="left" if column == "arm" else "right", no_wrap=True)
    for name, arm in report["arms"].items():
        low, high = arm["ci95"]
        table.add_row(
            name,
            f"{arm['accuracy']:.1%}",
            f"{100 * low:.0f}-{100 * high:.0f}",
            f"{arm['answer_tokens']:.1f}",
            f"{arm['seconds']:.0f}",
            f"{arm['seconds_per_new_target']:.0f}",
        )
    console = Console()
    console.print(table)
    if paper := report.get("paper"):
        # Drawn at a width of its own: a narrow terminal should break its lines, not fold them.
        console.print(paper["text"], markup=False, highlight=False, soft_wrap=True)
    console.print(f"report: {run_dir / 'report.html'}")


def ask_adapted_model(config: ExperimentConfig, *, num_questions: int) -> None:
    """Serve the adapted model, ask it held-out questions over HTTP and print the answers."""
    console, serving = Console(), config.serving
    run = RunDirectory(config.run_dir)
    examples = data.load_domain(config.task, run, "target").examples()
    middles = [(2 * k + 1) * len(examples) // (2 * num_questions) for k in range(num_questions)]
    shown = [examples[index] for index in middles]
    model_folder = run.root / "adapted"
    token = read_token(token_env=serving.token_env, token_file=serving.token_file)
    console.print(f"serving {model_folder} ...")
    # Any free port will do here: a taken one must not spoil the end of a long run.
    with running_policy_app(serving.model_copy(update={"port": 0}), model_folder) as base_url:
        for example in shown:
            question = example.messages[-1]["content"]
            answer = ask_policy(
                base_url,
                question,
                model_id=serving.model_id,
                token=token,
                max_tokens=config.evaluation.max_new_tokens,
                timeout_s=ANSWER_TIMEOUT_S,
            )
            console.print(f"  Q {question}\n  A [bold]{answer}[/bold]   (gold: {example.answer})")
    command = example_command(
        f"http://{serving.host}:{ServingConfig().port}",
        shown[-1].messages[-1]["content"],
        model_id=serving.model_id,
        token_env=serving.token_env,
        max_tokens=config.evaluation.max_new_tokens,
    )
    console.print(f"\nTo ask more:\n  past-ray serve {model_folder}")
    console.print(f"  {command}", soft_wrap=True, highlight=False)
