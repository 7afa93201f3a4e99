"""``past-ray skill`` in processes of its own."""

import importlib.metadata
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import torch

from past_ray.skill import load_manifest
from tests.skill_cli import (
    here_fixture,  # noqa: F401
    made_fixture,  # noqa: F401
)
from tests.skill_folders import contents, make_checkpoint
from tests.skill_models import SMALL, make_skill

PROGRAM = [sys.executable, "-c", "from past_ray.cli import main; main()"]


def test_help_imports_no_framework_and_takes_well_under_a_second():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *PROGRAM[1:], "skill", "extract", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "Usage" in done.stdout
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "typer" in loaded
    assert not {"torch", "ray", "vllm", "transformers", "numpy", "matplotlib"} & loaded
    # Time of a processor: tests share their cores.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.8


def test_the_console_script_is_this_program():
    (script,) = (
        entry
        for entry in importlib.metadata.entry_points(group="console_scripts")
        if entry.name == "past-ray"
    )
    assert script.value == "past_ray.cli:main"


def test_a_real_process_extracts_and_reports_errors_on_standard_error(here):
    command = [Path(sys.executable).with_name("past-ray"), "skill", "extract", "v1.rl"]
    done = subprocess.run([*command, "v1.sft", "-o", "out"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("wrote out: 7 tensors")
    assert load_manifest("out").vector_hash == load_manifest("v1").vector_hash
    failed = subprocess.run([*command, "nowhere", "-o", "other"], capture_output=True, text=True)
    assert (failed.returncode, failed.stdout) == (1, "")
    (line,) = failed.stderr.splitlines()
    assert "Error: " in line
    assert "nowhere" in line
    assert not (here / "other").exists()


def test_python_m_runs_it_too(here):
    done = subprocess.run(
        [sys.executable, "-m", "past_ray.cli", "skill", "verify", "v1"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.stdout.startswith("ok: 7 tensors"), done.stderr


def make_large_model(folder):
    """Write a model of 8 GB of zeros that takes no space: a hole in a file."""
    make_checkpoint(folder, {"model.embed_tokens.weight": torch.zeros(2, 2)})
    shape = [1 << 16, 1 << 15]
    size = 4 * shape[0] * shape[1]
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}
    header = json.dumps({"model.layers.0.mlp.up_proj.weight": entry}).encode()
    header += b" " * (-len(header) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)


def written_bytes(folder, known):
    """Bytes of all files that are in none of the ``known`` folders."""
    return sum(
        file.stat().st_blocks * 512
        for entry in folder.iterdir()
        if entry.name not in known
        for file in entry.rglob("*")
    )


def test_ctrl_c_in_the_middle_writes_nothing_and_says_so(tmp_path):
    known = {"rl", "sft", "older"}
    for role in ("rl", "sft"):
        make_large_model(tmp_path / role)
    make_skill(tmp_path / "older", seed=1, shapes=SMALL)
    known |= {entry.name for entry in tmp_path.iterdir()}
    before = contents(tmp_path / "older")
    process = subprocess.Popen(
        [*PROGRAM, "skill", "extract", "rl", "sft", "-o", "older", "--workers", "1"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    try:
        deadline = time.monotonic() + 60
        while written_bytes(tmp_path, known) < 1 << 20:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        interrupted = time.monotonic()
        out, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert time.monotonic() - interrupted < 5
    assert process.returncode == 130
    assert out == ""
    assert errors.strip().splitlines() == ["interrupted; what was not finished is not there"]
    assert {entry.name for entry in tmp_path.iterdir()} == known
    assert contents(tmp_path / "older") == before
