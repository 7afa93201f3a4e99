"""Shards of skill operations as Ray tasks: the same folders, byte for byte."""

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import ray

from past_ray.errors import ClusterError, PastRayError, SkillVectorError, StorageError
from past_ray.runtime.skill_tasks import shards_on_ray
from past_ray.skill import (
    MergeRule,
    StreamSettings,
    combine,
    extract,
    inject,
    load_manifest,
    select,
    sweep,
)
from past_ray.skill.stream import ShardTask
from tests.skill_folders import contents, flip_byte, random_tensors
from tests.skill_models import (
    D1,
    Q0,
    SHAPES,
    SMALL,
    WIDE,
    is_absent,
    make_adapter,
    make_model,
    make_skill,
    make_skill_of,
    unruly,
)

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
SHARD_BYTES = 2000
"""Cuts the models here into six files."""

OPERATIONS: dict[str, Callable[[Path, Path, StreamSettings], object]] = {
    "extract": lambda made, out, s: extract(made / "v1.rl", made / "v1.sft", out, settings=s),
    "inject": lambda made, out, s: inject(made / "t1", made / "v1", out, scale=0.5, settings=s),
    "inject an adapter": lambda made, out, s: inject(made / "t1", made / "lora", out, settings=s),
    "sweep": lambda made, out, s: sweep(
        made / "t1", made / "v1", {0.0: f"{out} 0", 1.0: out}, settings=s
    ),
    "combine": lambda made, out, s: combine(
        [made / "v1", made / "v2"], out, rule=MergeRule(method="ties"), settings=s
    ),
    "select": lambda made, out, s: select(made / "v1", out, layers="0", settings=s),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Vectors with corrections, their parents, a target and an adapter; no test changes them."""
    folder = tmp_path_factory.mktemp("made")
    sft = random_tensors(0, SHAPES)
    make_skill_of(folder / "v1", rl=unruly(sft, seed=1), sft=sft)
    make_skill(folder / "v2", seed=2)
    make_model(folder / "t1", seed=3)
    make_adapter(folder / "adapter", WIDE, Q0, D1, seed=4, rank=300)
    extract(folder / "adapter", folder / "t1", folder / "lora")
    return folder


@pytest.fixture(scope="module")
def run_shards(made):
    # Workers cannot import a test, so its computations travel with their code.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with shards_on_ray("local") as run:
        yield run
    assert not ray.is_initialized()


def settings(run_shards=None, **options) -> StreamSettings:
    return StreamSettings(
        **{"workers": 1, "max_shard_bytes": SHARD_BYTES, "run_shards": run_shards, **options}
    )


def on_compute(run_shards, wrap):
    """What runs shards whose computations are wrapped."""

    def run(tasks: Sequence[ShardTask]):
        return run_shards([replace(task, compute=wrap(task.compute)) for task in tasks])

    return run


@dataclass(frozen=True)
class Dying:
    """Kills its worker process in the middle of the wide weight: once, or every time."""

    compute: Any
    marker: Path | None

    def __call__(self, chunk, workspace):
        if chunk.name == WIDE and chunk.start > 0:
            if self.marker is None:
                os._exit(1)
            try:
                self.marker.touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                os._exit(1)
        return self.compute(chunk, workspace)


@dataclass(frozen=True)
class Defective:
    """A bug, which is no error that past_ray raises on purpose."""

    compute: Any

    def __call__(self, chunk, workspace):
        raise ZeroDivisionError("a bug in a computation")


# The same result


@pytest.mark.parametrize("operation", OPERATIONS)
def test_shards_on_ray_are_those_of_this_process_byte_for_byte(
    operation, made, run_shards, tmp_path
):
    OPERATIONS[operation](made, tmp_path / "local", settings())
    OPERATIONS[operation](made, tmp_path / "remote", settings(run_shards, workers=2))
    local = contents(tmp_path / "local")
    assert contents(tmp_path / "remote") == local
    assert len([name for name in local if name.startswith("model-0")]) > 2
    if operation == "sweep":
        assert contents(tmp_path / "remote 0") == contents(tmp_path / "local 0")


def test_more_workers_than_the_cluster_has_are_no_deadlock(made, run_shards, tmp_path):
    OPERATIONS["extract"](made, tmp_path / "out", settings(run_shards, workers=64))
    assert load_manifest(tmp_path / "out").vector_hash == load_manifest(made / "v1").vector_hash


def test_progress_reaches_all_entries(made, run_shards, tmp_path):
    seen = []
    watched = settings(run_shards, on_progress=lambda done, total: seen.append((done, total)))
    OPERATIONS["extract"](made, tmp_path / "out", watched)
    total = seen[0][1]
    assert len(seen) > 2
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (total, total)


@pytest.mark.parametrize("operation", ["extract", "inject", "inject an adapter"])
def test_tasks_carry_no_weights(operation, made, tmp_path):
    """They are read where they are needed; this adapter has 3 MB of factors."""
    sizes = []

    def run(tasks: Sequence[ShardTask]):
        for task in tasks:
            sizes.append(len(pickle.dumps(task)))
            yield task.run()

    OPERATIONS[operation](made, tmp_path / "out", settings(run))
    assert len(sizes) > 2
    assert max(sizes) < 100_000


# What goes wrong


def test_a_worker_that_dies_once_is_replaced_and_nothing_differs(made, run_shards, tmp_path):
    marker = tmp_path / "died"
    dying = on_compute(run_shards, lambda compute: Dying(compute, marker))
    OPERATIONS["extract"](made, tmp_path / "remote", settings(dying, chunk_blocks=1))
    OPERATIONS["extract"](made, tmp_path / "local", settings())
    assert marker.exists()
    assert contents(tmp_path / "remote") == contents(tmp_path / "local")


def test_a_worker_that_always_dies_is_an_error_and_nothing_is_written(made, run_shards, tmp_path):
    dying = on_compute(run_shards, lambda compute: Dying(compute, None))
    with pytest.raises(ClusterError, match="run the same command again"):
        OPERATIONS["extract"](made, tmp_path / "out", settings(dying, chunk_blocks=1))
    assert is_absent(tmp_path / "out")


def corrupted_parents(folder):
    """Write an RL parent with NaN in its last tensor."""
    make_skill(folder / "v", seed=5, shapes=SMALL)
    file = folder / "v.rl" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\x00\x00\xc0\x7f")
    return lambda out, s: extract(folder / "v.rl", folder / "v.sft", out, settings=s)


def corrupted_vector(folder):
    """Write a vector with one bit flipped in its corrections."""
    sft = random_tensors(0, SMALL)
    make_skill_of(folder / "v", rl=unruly(sft, seed=1), sft=sft)
    make_model(folder / "t", seed=3, shapes=SMALL)
    flip_byte(folder / "v" / "corrections.safetensors", -1)
    return lambda out, s: inject(folder / "t", folder / "v", out, settings=s)


@pytest.mark.parametrize(
    ("corrupt", "kind"), [(corrupted_parents, SkillVectorError), (corrupted_vector, StorageError)]
)
def test_an_error_in_a_task_is_the_error_of_this_process(corrupt, kind, run_shards, tmp_path):
    operation = corrupt(tmp_path)
    with pytest.raises(PastRayError) as local:
        operation(tmp_path / "local", settings())
    with pytest.raises(PastRayError) as remote:
        operation(tmp_path / "remote", settings(run_shards))
    assert isinstance(local.value, kind)
    assert isinstance(remote.value, kind)
    assert str(remote.value) == str(local.value)
    assert is_absent(tmp_path / "local")
    assert is_absent(tmp_path / "remote")


def test_an_error_keeps_the_older_artefact(run_shards, tmp_path):
    operation = corrupted_parents(tmp_path)
    before = contents(tmp_path / "v")
    with pytest.raises(SkillVectorError):
        operation(tmp_path / "v", settings(run_shards))
    assert contents(tmp_path / "v") == before


def test_a_bug_in_a_task_names_itself_and_leaves_nothing(made, run_shards, tmp_path):
    broken = on_compute(run_shards, Defective)
    with pytest.raises(ClusterError, match="a bug in a computation"):
        OPERATIONS["extract"](made, tmp_path / "out", settings(broken))
    assert is_absent(tmp_path / "out")


# The command line


def past_ray(*arguments, timeout, **environment):
    """Run the program in another process, as Ray can be connected only once in this one."""
    return subprocess.run(
        [sys.executable, "-c", "from past_ray.cli import main; main()", "skill", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        | {"PYTHONPATH": str(ROOT)}
        | environment,
    )


def extract_command(made, out, address):
    parents = str(made / "v1.rl"), str(made / "v1.sft")
    return ("extract", *parents, "-o", str(out), "--address", address, "--shard-gb", "2e-6")


def test_the_command_line_starts_a_ray_of_its_own(made, tmp_path):
    OPERATIONS["extract"](made, tmp_path / "local", settings())
    done = past_ray(*extract_command(made, tmp_path / "remote", "local"), timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"wrote {tmp_path / 'remote'}: 8 tensors")
    assert contents(tmp_path / "remote") == contents(tmp_path / "local")


def test_the_command_line_joins_a_running_cluster(made, run_shards, tmp_path):
    address = ray.get_runtime_context().gcs_address
    done = past_ray(*extract_command(made, tmp_path / "out", address), timeout=60)
    assert done.returncode == 0, done.stderr
    assert load_manifest(tmp_path / "out").vector_hash == load_manifest(made / "v1").vector_hash
    failed = past_ray(
        "inject", str(made / "t1"), str(made / "v1"), "-o", str(tmp_path / "x"),
        "--scale", "3e38", "--address", address, timeout=60,
    )  # fmt: skip
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "SkillVectorError: adapted model must be finite" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert is_absent(tmp_path / "x")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense"])
def test_a_wrong_address_is_an_error_in_seconds(address, made, tmp_path):
    started = time.monotonic()
    try:
        done = past_ray(*extract_command(made, tmp_path / "out", address), timeout=20)
    except subprocess.TimeoutExpired:
        pytest.fail(f"no answer in {time.monotonic() - started:.0f} s")
    assert done.returncode == 1
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("ClusterError: --address must name a running Ray cluster")
    assert address in message
    assert "leave --address out" in message
    assert is_absent(tmp_path / "out")
