"""``past-ray models``: where a model comes from, what is printed, and what is refused."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from past_ray.cli.models import HUB_MODELS, WHEEL_MODEL, models_app
from past_ray.config.model import HubModelConfig, WheelModelConfig
from past_ray.engine.model_cache import cached_base
from past_ray.skill.checkpoint import hash_weights
from tests.tiny_model import make_tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PAST_RAY_CACHE", str(tmp_path / "cache"))


def succeed(*arguments):
    done = CliRunner().invoke(models_app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def fail(*arguments):
    done = CliRunner().invoke(models_app, [str(argument) for argument in arguments])
    assert done.exit_code == 1, done.output
    assert done.stdout == ""
    return done.stderr


def test_a_folder_is_checked_and_its_absolute_path_is_all_that_is_printed(tmp_path, monkeypatch):
    folder = make_tiny_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert succeed("prepare", "./model") == f"{folder}\n"
    assert succeed("prepare", "model") == f"{folder}\n"


def test_a_prepared_wheel_model_is_used_from_the_cache(tmp_path):
    folder = make_tiny_model(cached_base(WheelModelConfig()))
    assert succeed("prepare", WHEEL_MODEL) == f"{folder}\n"


def test_a_copy_stands_alone_and_holds_only_what_a_model_needs(tmp_path):
    folder = make_tiny_model(tmp_path / "model")
    wanted = {file.name for file in folder.iterdir()}
    stored = folder / "model.safetensors"
    stored.rename(tmp_path / "blob")
    stored.symlink_to(tmp_path / "blob")
    (folder / "optimizer.pt").write_text("x")
    (folder / "checkpoint-1").mkdir()
    out = tmp_path / "new" / "copy"
    assert succeed("prepare", folder, "--out", out) == f"{out}\n"
    assert {file.name for file in out.iterdir()} == wanted
    assert not any(file.is_symlink() for file in out.iterdir())
    assert hash_weights(out) == hash_weights(folder)


def test_a_copy_replaces_neither_its_source_nor_a_folder_of_other_things(tmp_path):
    folder = make_tiny_model(tmp_path / "model")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.pdf").write_text("x")
    assert "different folders" in fail("prepare", folder, "--out", folder)
    assert "thesis.pdf" in fail("prepare", folder, "--out", tmp_path / "home")
    assert (tmp_path / "home" / "thesis.pdf").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("smollm2", f"must be {WHEEL_MODEL}, a folder or a hub name"),
        ("a/b/c", "must be"),
        ("./absent", "found none at absent"),
        ("/absent/model", "found none at /absent/model"),
    ],
)
def test_what_is_no_model_is_refused(model, message):
    assert message in fail("prepare", model)


def test_a_revision_is_refused_where_it_would_be_ignored(tmp_path):
    assert "--revision" in fail("prepare", WHEEL_MODEL, "--revision", "v1")
    assert "--revision" in fail("prepare", tmp_path, "--revision", "v1")


def test_list_shows_known_and_prepared_models_with_size_and_folder():
    wheel = make_tiny_model(cached_base(WheelModelConfig()))
    hub = make_tiny_model(cached_base(HubModelConfig(name="someone/tiny")))
    size = sum(file.stat().st_size for file in wheel.iterdir()) / 1e6
    lines = [line.split() for line in succeed("list").splitlines()]
    assert lines[0] == [WHEEL_MODEL, f"{size:.1f}", "MB", str(wheel)]
    for name, line in zip(HUB_MODELS, lines[1:], strict=False):
        assert line == [name, "-", "past-ray", "models", "prepare", name]
    assert lines[1 + len(HUB_MODELS) :] == [[hub.name, f"{size:.1f}", "MB", str(hub)]]


def test_an_unreachable_hub_fails_in_seconds_and_prints_no_folder(tmp_path):
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    started = time.perf_counter()
    code = "from past_ray.cli.models import models_app; models_app()"
    done = subprocess.run(
        [sys.executable, "-c", code, "prepare", HUB_MODELS[0]],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "give its folder instead" in done.stderr
    # Nearly all of it is imports, which are slow where tests share their cores.
    assert time.perf_counter() - started < 60


def test_help_loads_no_framework():
    code = (
        "import sys\nfrom past_ray.cli.models import models_app\n"
        "models_app(['prepare', '--help'], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
