"""``past-ray skill``: skill vectors as folders. Heavy imports follow the parsing."""

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from past_ray.cli.skill_options import (
    Address,
    ChunkMib,
    Dtype,
    OtherBase,
    Out,
    RoundingSeed,
    Scales,
    ShardGb,
    SkillArgument,
    Verify,
    Workers,
    at_least,
    hash_files,
    merge_rule,
    numbers,
    places,
    read_yaml,
    rounding,
    strength,
)
from past_ray.cli.user_errors import user_errors

if TYPE_CHECKING:
    from past_ray.skill.stream import StreamSettings

skill_app = typer.Typer(
    no_args_is_help=True,
    help="Extract, inject, combine and check skill vectors. Folders may be on a local disk, NFS,"
    " s3:// or gs://.",
)


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
            refinement_round=int(at_least("--round", refinement_round, 0)),
            seed=seed,
            reward=reward,
            rl_recipe=None if recipe is None else read_yaml(recipe),
            source_data_hash=hash_files(data) if data else None,
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

        amount = strength(scale, scales)
        folders = places(targets, out)
        for target in targets:
            check_target(target, skill, allow_other_base=allow_other_base)
        for target, place in folders.items():
            inject(
                target,
                skill,
                place,
                scale=amount,
                rounding=rounding(dtype, stochastic),
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

        outs = {value: f"{out}/scale-{value:g}" for value in numbers("--scales", scales)}
        sweep(
            target,
            skill,
            outs,
            rounding=rounding(dtype, stochastic),
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
            weights=None if weights is None else numbers("--weights", weights),
            rule=merge_rule(method, density=density, drop_rate=drop_rate, seed=seed),
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
            "chunk_blocks": int(at_least("--chunk-mib", chunk_mib, 1)),
            "max_shard_bytes": int(at_least("--shard-gb", shard_gb, 1e-9) * 1e9),
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
