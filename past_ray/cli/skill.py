"""``past-ray skill``: skill vectors as folders. Heavy imports follow the parsing."""

import json
import math
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from past_ray.cli.user_errors import user_errors
from past_ray.errors import ConfigError

if TYPE_CHECKING:
    from past_ray.skill.stream import StreamSettings

skill_app = typer.Typer(
    no_args_is_help=True,
    help="Extract, inject, combine and check skill vectors. Folders may be on a local disk, NFS,"
    " s3:// or gs://.",
)

Out = Annotated[str, typer.Option("--out", "-o", help="Folder of the result.")]
SkillArgument = Annotated[str, typer.Argument(help="Folder of a skill vector.")]
Workers = Annotated[
    int | None, typer.Option(help="Threads; by default one for each CPU.", show_default=False)
]
ChunkMib = Annotated[int, typer.Option(help="MiB of float32 that a thread holds per tensor.")]
ShardGb = Annotated[float, typer.Option(help="Largest file of weights, in GB.")]
Address = Annotated[
    str | None,
    typer.Option(
        help="Ray cluster that does the shards, e.g. auto; by default this process.",
        show_default=False,
    ),
]
Scales = Annotated[
    Path | None,
    typer.Option(help="YAML with scales by layer and module; see docs/skill-format.md."),
]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; by default the target's.")
]
RoundingSeed = Annotated[
    int | None,
    typer.Option("--stochastic", help="Round at random, unbiased, from this seed.", metavar="SEED"),
]
OtherBase = Annotated[
    bool, typer.Option(help="Accept a target that did not grow from the vector's base.")
]
Verify = Annotated[
    bool, typer.Option("--verify", help="Hash all that is read, as `skill verify` does.")
]


@skill_app.command()
def extract(
    rl: Annotated[str, typer.Argument(help="Model after RL, or the LoRA adapter RL trained.")],
    sft: Annotated[str, typer.Argument(help="Model before RL.")],
    out: Out,
    base: Annotated[str | None, typer.Option(help="Model before SFT, for the lineage.")] = None,
    parent: Annotated[str | None, typer.Option(help="Vector of the round before.")] = None,
    rank: Annotated[int | None, typer.Option(help="Write an adapter of this rank (SVD).")] = None,
    task: Annotated[str, typer.Option(help="Source task.")] = "unnamed",
    refinement_round: Annotated[int, typer.Option("--round", help="The paper's k.")] = 1,
    seed: Annotated[int | None, typer.Option(help="Seed of the RL run.")] = None,
    reward: Annotated[str | None, typer.Option(help="Name of its reward.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML with the RL settings.")] = None,
    data: Annotated[list[Path] | None, typer.Option(help="Source data files, hashed.")] = None,
    workers: Workers = None,
    chunk_mib: ChunkMib = 2,
    shard_gb: ShardGb = 5.0,
    address: Address = None,
) -> None:
    """Write the skill vector RL - SFT."""
    with _session(workers, chunk_mib, shard_gb, address) as settings:
        from past_ray.skill import Provenance, extract

        provenance = Provenance(
            task=task,
            refinement_round=int(_at_least("--round", refinement_round, 0)),
            seed=seed,
            reward=reward,
            rl_recipe=None if recipe is None else _read_yaml(recipe),
            source_data_hash=_hash_files(data) if data else None,
        )
        manifest = extract(
            rl,
            sft,
            out,
            provenance=provenance,
            base=base,
            parent=parent,
            rank=rank,
            settings=settings,
        )
        typer.echo(
            f"wrote {out}: {len(manifest.tensors)} tensors, norm {manifest.norm:.6g},"
            f" vector {manifest.vector_hash[:16]}"
        )


@skill_app.command()
def inject(
    targets: Annotated[list[str], typer.Argument(help="Models that know the target documents.")],
    skill: SkillArgument,
    out: Out,
    scale: Annotated[
        float | None, typer.Option(help="Strength; 1 unless --scales is given.")
    ] = None,
    scales: Scales = None,
    dtype: Dtype = None,
    stochastic: RoundingSeed = None,
    allow_other_base: OtherBase = False,
    verify: Verify = False,
    workers: Workers = None,
    chunk_mib: ChunkMib = 2,
    shard_gb: ShardGb = 5.0,
    address: Address = None,
) -> None:
    """Write TARGET + scale * SKILL; several targets go into folders of their names inside OUT."""
    with _session(workers, chunk_mib, shard_gb, address) as settings:
        from past_ray.skill import check_target, inject

        strength = _scale(scale, scales)
        places = _places(targets, out)
        for target in targets:
            check_target(target, skill, allow_other_base=allow_other_base)
        for target, place in places.items():
            inject(
                target,
                skill,
                place,
                scale=strength,
                rounding=_rounding(dtype, stochastic),
                allow_other_base=allow_other_base,
                verify=verify,
                settings=settings,
            )
            typer.echo(f"wrote {place}")


@skill_app.command()
def sweep(
    target: Annotated[str, typer.Argument(help="Model that knows the target documents.")],
    skill: SkillArgument,
    out: Out,
    scales: Annotated[str, typer.Option(help="Such as 0,0.5,1.")],
    dtype: Dtype = None,
    stochastic: RoundingSeed = None,
    allow_other_base: OtherBase = False,
    verify: Verify = False,
    workers: Workers = None,
    chunk_mib: ChunkMib = 2,
    shard_gb: ShardGb = 5.0,
    address: Address = None,
) -> None:
    """Write TARGET + scale * SKILL for each scale, as OUT/scale-0.5; the inputs are read once."""
    with _session(workers, chunk_mib, shard_gb, address) as settings:
        from past_ray.skill import sweep

        outs = {value: f"{out}/scale-{value:g}" for value in _numbers("--scales", scales)}
        sweep(
            target,
            skill,
            outs,
            rounding=_rounding(dtype, stochastic),
            allow_other_base=allow_other_base,
            verify=verify,
            settings=settings,
        )
        for place in outs.values():
            typer.echo(f"wrote {place}")


@skill_app.command()
def combine(
    skills: Annotated[list[str], typer.Argument(help="Folders of skill vectors.")],
    out: Out,
    weights: Annotated[str | None, typer.Option(help="Such as 1,0.5; 1 each if left out.")] = None,
    method: Annotated[str, typer.Option(help="linear, ties or dare.")] = "linear",
    density: Annotated[
        float | None, typer.Option(help="TIES: share of entries kept, 0.2 if left out.")
    ] = None,
    drop_rate: Annotated[
        float | None, typer.Option(help="DARE: share of entries dropped, 0.9 if left out.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="DARE: decides which.")] = None,
    workers: Workers = None,
    chunk_mib: ChunkMib = 2,
    shard_gb: ShardGb = 5.0,
    address: Address = None,
) -> None:
    """Write one skill vector made of several."""
    with _session(workers, chunk_mib, shard_gb, address) as settings:
        from past_ray.skill import combine

        manifest = combine(
            skills,
            out,
            weights=None if weights is None else _numbers("--weights", weights),
            rule=_merge_rule(method, density=density, drop_rate=drop_rate, seed=seed),
            settings=settings,
        )
        typer.echo(f"wrote {out}: {manifest.operation}, norm {manifest.norm:.6g}")


@skill_app.command()
def select(
    skill: SkillArgument,
    out: Out,
    layers: Annotated[str | None, typer.Option(help="Such as 8-20 or 0,3,8-20.")] = None,
    modules: Annotated[
        str | None, typer.Option(help="Modules or blocks, such as mlp or q_proj,k_proj.")
    ] = None,
    workers: Workers = None,
    chunk_mib: ChunkMib = 2,
    shard_gb: ShardGb = 5.0,
    address: Address = None,
) -> None:
    """Write the chosen layers and modules of a skill vector, for partial injection."""
    with _session(workers, chunk_mib, shard_gb, address) as settings:
        from past_ray.skill import select

        chosen = None if modules is None else [name.strip() for name in modules.split(",")]
        manifest = select(skill, out, layers=layers, modules=chosen, settings=settings)
        typer.echo(f"wrote {out}: {len(manifest.tensors)} tensors, norm {manifest.norm:.6g}")


@skill_app.command()
def inspect(
    skill: SkillArgument,
    target: Annotated[
        str | None, typer.Option(help="Also measure what rounding leaves of it in this model.")
    ] = None,
    scale: Annotated[float, typer.Option(help="Strength, with --target.")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    workers: Workers = None,
) -> None:
    """Show lineage, norms by layer and module, and what bfloat16 costs."""
    with _session(workers) as settings:
        from past_ray.cli.skill_tables import inspection_json, print_inspection
        from past_ray.skill import inspect

        found = inspect(skill, target=target, scale=scale, settings=settings)
        if as_json:
            typer.echo(json.dumps(inspection_json(found), indent=2))
        else:
            print_inspection(found)


@skill_app.command()
def compare(
    skills: Annotated[
        list[str], typer.Argument(help="Two vectors; any more are controls to compare with.")
    ],
    plot: Annotated[Path | None, typer.Option(help="Also draw heat maps into this PNG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    workers: Workers = None,
) -> None:
    """Show the cosines of every pair, by layer and module."""
    with _session(workers) as settings:
        from past_ray.cli.skill_tables import comparison_json, plot_comparisons, print_comparisons
        from past_ray.skill import compare

        found = compare(skills, settings=settings)
        if as_json:
            typer.echo(json.dumps(comparison_json(found), indent=2))
        else:
            print_comparisons(found)
        if plot is not None:
            plot_comparisons(found, plot)
            typer.echo(f"wrote {plot}", err=True)


@skill_app.command()
def verify(
    skill: SkillArgument,
    parents: Annotated[bool, typer.Option("--parents", help="Also read both parents.")] = False,
    rl: Annotated[str | None, typer.Option(help="Where the RL model is now.")] = None,
    sft: Annotated[str | None, typer.Option(help="Where the SFT model is now.")] = None,
    workers: Workers = None,
) -> None:
    """Check hashes, shapes and NaN; exit code 1 if anything is wrong."""
    with _session(workers) as settings:
        from past_ray.skill import verify

        found = verify(skill, parents=parents, rl=rl, sft=sft, settings=settings)
        agreed = f", parents {' and '.join(found.parents)} agree" if found.parents else ""
        typer.echo(
            f"ok: {found.num_tensors} tensors, {found.num_entries} entries, vector"
            f" {found.vector_hash[:16]}{agreed}"
        )


@contextmanager
def _session(
    workers: int | None, chunk_mib: int = 2, shard_gb: float = 5.0, address: str | None = None
) -> Generator["StreamSettings"]:
    """Give the settings of a run, with a progress bar on a terminal and user errors."""
    with user_errors("interrupted; what was not finished is not there"):
        from past_ray.cli.skill_tables import progress_bar
        from past_ray.skill.stream import StreamSettings

        options: dict[str, Any] = {
            "chunk_blocks": int(_at_least("--chunk-mib", chunk_mib, 1)),
            "max_shard_bytes": int(_at_least("--shard-gb", shard_gb, 1e-9) * 1e9),
        }
        if workers is not None:
            options["workers"] = workers
        with progress_bar() as on_progress:
            if address is None:
                yield StreamSettings(on_progress=on_progress, **options)
                return
            from past_ray.runtime.skill_tasks import shards_on_ray

            with shards_on_ray(address) as run_shards:
                yield StreamSettings(on_progress=on_progress, run_shards=run_shards, **options)


def _scale(scale: float | None, scales: Path | None) -> Any:  # noqa: ANN401 - a number or a config
    from past_ray.config.loading import load_config
    from past_ray.config.skill import ScaleConfig

    if scales is None:
        return 1.0 if scale is None else scale
    return load_config(ScaleConfig, scales, [] if scale is None else [f"scale={scale}"])


def _rounding(dtype: str | None, seed: int | None) -> Any:  # noqa: ANN401 - imported late
    from past_ray.skill import Rounding

    if dtype is not None:
        _one_of("--dtype", dtype, ("float32", "bfloat16", "float16"))
    return Rounding(dtype=dtype, seed=seed)  # type: ignore[arg-type]


def _merge_rule(method: str, **options: float | None) -> Any:  # noqa: ANN401 - imported late
    """Refuse an option that the method would ignore."""
    from past_ray.skill import MergeRule

    _one_of("--method", method, ("linear", "ties", "dare"))
    given = {name: value for name, value in options.items() if value is not None}
    used = {"linear": set[str](), "ties": {"density"}, "dare": {"drop_rate", "seed"}}[method]
    if unused := sorted(given.keys() - used):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        raise ConfigError(
            f"--method {method} does not use {names}. Leave it out, or choose the method that does."
        )
    return MergeRule(method=method, **given)  # type: ignore[arg-type]


def _places(targets: list[str], out: str) -> dict[str, str]:
    """Where each target's result goes."""
    if len(targets) == 1:
        return {targets[0]: out}
    names = [target.rstrip("/").rpartition("/")[2] for target in targets]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"targets of one run must have different folder names, got {', '.join(names)}."
            " Inject them one by one."
        )
    return {target: f"{out}/{name}" for target, name in zip(targets, names, strict=True)}


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{option} must be numbers such as 0,0.5,1, got {text!r}.") from error


def _at_least(option: str, value: float, least: float) -> float:
    if not least <= value < math.inf:
        raise ConfigError(f"{option} must be at least {least:g}, got {value:g}.")
    return value


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> Any:  # noqa: ANN401 - a literal
    if value not in allowed:
        raise ConfigError(f"{option} must be one of {', '.join(allowed)}, got {value!r}.")
    return value


def _read_yaml(path: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        found = " ".join(str(error).split())
        raise ConfigError(f"{path} must be a readable YAML file: {found}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping, found {type(values).__name__}.")
    return {str(key): value for key, value in values.items()}


def _hash_files(paths: list[Path]) -> str:
    from past_ray.skill.manifest import hash_files

    return hash_files(paths)
