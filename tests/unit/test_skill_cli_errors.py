"""What ``past-ray skill`` refuses, and what it never replaces."""

import shutil
from pathlib import Path

import pytest

from past_ray.skill import load_manifest
from tests.skill_cli import (
    here_fixture,  # noqa: F401
    made_fixture,  # noqa: F401
    ok,
    refused,
    run,
)
from tests.skill_folders import contents, names

EXTRACT = ("extract", "v1.rl", "v1.sft", "-o", "x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("extract", "v1.rl", "nowhere", "-o", "x"), "nowhere"),
        (("extract", "v1.rl", "v1", "-o", "x"), "config.json"),
        ((*EXTRACT, "--round", "-1"), "round"),
        ((*EXTRACT, "--workers", "0"), "workers must be at least 1, got 0"),
        ((*EXTRACT, "--chunk-mib", "0"), "--chunk-mib must be at least 1"),
        ((*EXTRACT, "--shard-gb", "0"), "--shard-gb must be"),
        ((*EXTRACT, "--shard-gb", "nan"), "--shard-gb must be"),
        ((*EXTRACT, "--rank", "0"), "rank must be at least 1, got 0"),
        ((*EXTRACT, "--recipe", "nowhere.yaml"), "nowhere.yaml must be a readable YAML file"),
        ((*EXTRACT, "--recipe", "list.yaml"), "list.yaml must hold a mapping, found list"),
        ((*EXTRACT, "--recipe", "broken.yaml"), "broken.yaml must be a readable YAML file"),
        ((*EXTRACT, "--recipe", "open.yaml"), "open.yaml must be a readable YAML file"),
        ((*EXTRACT, "--data", "nowhere.jsonl"), "nowhere.jsonl must be a readable file"),
        ((*EXTRACT, "--data", "t1"), "t1 must be a readable file"),
        ((*EXTRACT, "--parent", "v2"), "earlier refinement round"),
        (("inject", "t1", "v1", "-o", "x", "--scale", "nan"), "scale must be a finite number"),
        (("inject", "t1", "v1", "-o", "x", "--dtype", "int8"), "--dtype must be one of float32"),
        (("inject", "t1", "v1", "-o", "x", "--scales", "nowhere.yaml"), "nowhere.yaml"),
        (("inject", "t1", "v1", "-o", "x", "--scales", "typo.yaml"), "layer is not a known key"),
        (("inject", "t1", "v1", "-o", "x", "--scales", "far.yaml"), "layers '7' must name layers"),
        (("inject", "v1", "t1", "-o", "x"), "Swap the two"),
        (("inject", "t1", "nowhere", "-o", "x"), "nowhere"),
        (("sweep", "t1", "v1", "--scales", "0;1", "-o", "x"), "--scales must be numbers"),
        (("sweep", "t1", "v1", "--scales", "1,nan", "-o", "x"), "scale must be a finite number"),
        (("sweep", "t1", "v1", "--scales", "1.0000001,1", "-o", "x"), "different folders"),
        (("combine", "v1", "v2", "--weights", "1", "-o", "x"), "1 weights for 2 vectors"),
        (("combine", "v1", "v2", "--weights", "1,x", "-o", "x"), "--weights must be numbers"),
        (("combine", "v1", "v2", "--method", "sum", "-o", "x"), "--method must be one of linear"),
        (("combine", "v1", "t1", "-o", "x"), "t1 must be a skill folder"),
        (("select", "v1", "--layers", "0-", "-o", "x"), "Write 8-20 or 0,3,8-20"),
        (("select", "v1", "--layers", "7", "-o", "x"), "has 0 to 1"),
        (("select", "v1", "--modules", "k_proj", "-o", "x"), "Correct the name"),
        (("inspect", "t1"), "t1 must be a skill folder"),
        (("inspect", "v1", "--target", "v2"), "must be a model"),
        (("compare", "v1"), "at least two skill vectors, got 1"),
        (("verify", "nowhere"), "nowhere must be a skill folder"),
        (("verify", "v1", "--sft", "t1"), "must have the recorded sft_hash"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(arguments, message, here):
    Path("list.yaml").write_text("- 1\n")
    Path("broken.yaml").write_text("a: [1\nb: }\n")
    Path("open.yaml").write_text("output: ${run_dir}/x\n")
    Path("typo.yaml").write_text("layer: {0: 1}\n")
    Path("far.yaml").write_text("layers: {7: 1}\n")
    before = names(here)
    line = refused(*arguments)
    assert message in line
    assert names(here) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("extract", "v1.rl", "v1.sft", "-o", "v1.rl"),
        ("extract", "v1.rl", "v1.sft", "-o", "v1.sft"),
        ("extract", "v1.rl", "v1.sft", "--base", "t1", "-o", "t1"),
        ("extract", "v1.rl", "v1.sft", "--round", "2", "--parent", "v2", "-o", "v2"),
        ("inject", "t1", "v1", "-o", "t1"),
        ("inject", "t1", "v1", "-o", "v1"),
        ("inject", "t1", "v1", "-o", "./t1/"),
        ("inject", "t1", "v1", "-o", "t2/../t1"),
        ("inject", "t1", "v1", "-o", "link"),
        ("combine", "v1", "v2", "-o", "v2"),
        ("select", "v1", "--layers", "0", "-o", "v1"),
    ],
    ids=" ".join,
)
def test_a_result_never_replaces_what_it_is_made_of(arguments, here):
    Path("link").symlink_to("t1")
    before = {entry.name: contents(entry) for entry in here.iterdir()}
    refused(*arguments)
    assert {entry.name: contents(entry) for entry in here.iterdir()} == before


def test_a_folder_of_other_things_is_never_replaced(here):
    """``-o ~/models`` instead of ``-o ~/models/skill`` must not delete all models."""
    Path("models").mkdir()
    shutil.copytree("t1", "models/t1")
    Path("models", "notes.txt").write_text("precious")
    run("extract", "v1.rl", "v1.sft", "-o", "models")
    assert Path("models", "notes.txt").read_text() == "precious"
    assert Path("models", "t1", "model.safetensors").exists()


def test_an_older_result_is_replaced(here):
    ok("select", "v1", "--layers", "0", "-o", "part")
    ok("select", "v1", "--layers", "1", "-o", "part")
    assert load_manifest("part").operation.startswith("select layers 1")


@pytest.mark.parametrize(
    "arguments",
    [("extract", "v1.rl", "-o", "x"), ("extract", "v1.rl", "v1.sft"), ("inject", "v1", "-o", "x")],
    ids=" ".join,
)
def test_a_missing_argument_is_a_usage_error(arguments, here):
    done = run(*arguments)
    assert done.exit_code == 2
    assert "Missing" in done.stderr


def test_without_a_command_the_commands_are_listed():
    done = run()
    for command in ("extract", "inject", "sweep", "combine", "select", "inspect", "compare"):
        assert command in done.output


@pytest.mark.parametrize(
    ("arguments", "unused"),
    [
        (("--density", "0.3"), "--density"),
        (("--method", "ties", "--drop-rate", "0.5"), "--drop-rate"),
        (("--method", "ties", "--seed", "1"), "--seed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_an_option_that_the_method_ignores_is_refused(arguments, unused, here):
    assert f"does not use {unused}" in refused("combine", "v1", "v2", "-o", "x", *arguments)
