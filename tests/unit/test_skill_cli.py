"""``past-ray skill`` as a user types it."""

import importlib.metadata
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from past_ray.cli import app
from past_ray.config.skill import ScaleConfig
from past_ray.skill import (
    MergeRule,
    Rounding,
    combine,
    extract,
    inject,
    load_manifest,
    load_skill,
    select,
)
from past_ray.skill.checkpoint import load_weights
from tests.skill_folders import contents, edit_json, flip_byte, make_checkpoint, names
from tests.skill_models import D1, Q0, SMALL, make_adapter, make_model, make_skill, same_bits

PROGRAM = [sys.executable, "-c", "from past_ray.cli import main; main()"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two vectors with their parents, and two targets; no test changes them."""
    folder = tmp_path_factory.mktemp("made")
    make_skill(folder / "v1", seed=1, shapes=SMALL)
    make_skill(folder / "v2", seed=2, shapes=SMALL)
    make_model(folder / "t1", seed=3, shapes=SMALL)
    make_model(folder / "t2", seed=4, shapes=SMALL)
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A working directory with copies of them, so that commands read as in the README."""
    for entry in made.iterdir():
        shutil.copytree(entry, tmp_path / entry.name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, ["skill", *map(str, arguments)])


def ok(*arguments):
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    return done


def refused(*arguments):
    """The one line that a user sees; nothing else may be shown and nothing raised."""
    done = run(*arguments)
    assert isinstance(done.exception, SystemExit), repr(done.exception)
    assert done.exit_code == 1
    assert "Traceback" not in done.output
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    return line


# Extract


def test_extract_writes_what_the_library_writes(here):
    done = ok("extract", "v1.rl", "v1.sft", "-o", "out")
    manifest = extract("v1.rl", "v1.sft", "expected")
    assert contents(here / "out") == contents(here / "expected")
    assert "wrote out: 7 tensors" in done.stdout
    assert manifest.vector_hash[:16] in done.stdout
    assert f"norm {manifest.norm:.6g}" in done.stdout


def test_extract_keeps_what_the_user_knows(here):
    Path("recipe.yaml").write_text("lr: 1.0e-6\ngroup_size: 8\nrewards: [exact_match, length]\n")
    Path("train.jsonl").write_text("{}\n")
    ok("extract", "v1.rl", "v1.sft", "-o", "round 1", "--task", "world", "--base", "v1.sft")
    ok(
        *("extract", "v2.rl", "v2.sft", "-o", "round 2", "--task", "squad", "--round", 2),
        *("--parent", "round 1", "--seed", 7, "--reward", "exact_match"),
        *("--recipe", "recipe.yaml", "--data", "train.jsonl"),
    )
    first, second = load_manifest("round 1"), load_manifest("round 2")
    assert (first.task, first.refinement_round, first.parent_hash) == ("world", 1, None)
    assert first.base_hash == first.sft_hash
    assert (second.task, second.refinement_round) == ("squad", 2)
    assert second.parent_hash == first.vector_hash
    assert (second.seed, second.reward) == (7, "exact_match")
    assert second.rl_recipe == {
        "lr": 1e-6,
        "group_size": 8,
        "rewards": ["exact_match", "length"],
    }
    assert len(second.source_data_hash) == 64


def data_hash(*files):
    ok("extract", "v1.rl", "v1.sft", "-o", "out", *(x for file in files for x in ("--data", file)))
    return load_manifest("out").source_data_hash


def test_the_hash_of_source_data_tells_contents_and_names_but_not_their_order(here):
    Path("a.jsonl").write_text("one\n")
    Path("b.jsonl").write_text("two\n")
    first = data_hash("a.jsonl", "b.jsonl")
    assert data_hash("b.jsonl", "a.jsonl") == first
    assert data_hash("a.jsonl") != first
    Path("b.jsonl").write_text("too\n")
    assert data_hash("a.jsonl", "b.jsonl") != first
    # The same bytes, cut elsewhere.
    Path("a.jsonl").write_text("one\ntw")
    Path("b.jsonl").write_text("o\n")
    assert data_hash("a.jsonl", "b.jsonl") != first


def test_the_hash_of_source_data_does_not_depend_on_where_the_files_are(here):
    for folders in (("x", "y"), ("y", "x")):
        for folder, name in zip(folders, ("a.jsonl", "b.jsonl"), strict=True):
            Path(folder).mkdir(exist_ok=True)
            Path(folder, name).write_text(name)
    assert data_hash("x/a.jsonl", "y/b.jsonl") == data_hash("y/a.jsonl", "x/b.jsonl")


def test_extract_with_a_rank_writes_an_adapter(here):
    done = ok("extract", "v1.rl", "v1.sft", "-o", "low", "--rank", 2)
    assert load_manifest("low").form == "lora"
    assert "wrote low: 3 tensors" in done.stdout


def test_workers_chunks_and_shards_are_passed_on(here):
    ok(
        *("extract", "v1.rl", "v1.sft", "-o", "out"),
        *("--workers", 1, "--chunk-mib", 1, "--shard-gb", 1e-6),
    )
    assert len(list(here.glob("out/model-0*.safetensors"))) == 6
    assert load_manifest("out").vector_hash == load_manifest("v1").vector_hash


# Inject and sweep


def injected(*options, target="t1", scale=1.0, **settings):
    """Run ``inject`` and compare with the library; return the lineage."""
    ok("inject", target, "v1", "-o", "adapted", *options)
    inject(target, "v1", "expected", scale=scale, **settings)
    assert contents(Path("adapted")) == contents(Path("expected"))
    return json.loads(Path("adapted", "past_ray.json").read_text())


def test_inject_adds_the_vector_once_by_default(here):
    done = ok("inject", "t1", "v1", "-o", "m")
    before, vector = load_weights("t1"), load_skill("v1").vector
    assert same_bits(load_weights("m"), {name: before[name] + vector[name] for name in before})
    assert done.stdout == "wrote m\n"


def test_inject_takes_a_scale(here):
    assert injected("--scale", 0.5, scale=0.5)["scale"] == 0.5
    assert injected("--scale", -1, scale=-1.0)["scale"] == -1
    assert injected("--scale=-0.25", scale=-0.25)["scale"] == -0.25


def test_inject_takes_scales_by_layer_and_module(here):
    scales = {"scale": 2.0, "layers": {0: 0.25, "1": 3}, "modules": {"mlp": -1, "q_proj": 0.5}}
    Path("scales.yaml").write_text(yaml.dump(scales))
    config = ScaleConfig.model_validate(scales)
    assert injected("--scales", "scales.yaml", scale=config)["modules"] == scales["modules"]
    before, after = load_weights("t1"), load_weights("adapted")
    vector = load_skill("v1").vector
    for name, factor in ((Q0, 2 * 0.25 * 0.5), (D1, 2 * 3 * -1), ("model.norm.weight", 2)):
        assert torch.equal(after[name], before[name] + vector[name] * factor)


def test_scale_overrides_that_of_the_file_and_keeps_the_rest(here):
    Path("scales.yaml").write_text("scale: 2\nlayers: {1: 3}\n")
    config = ScaleConfig(scale=0.5, layers={"1": 3.0})
    lineage = injected("--scales", "scales.yaml", "--scale", 0.5, scale=config)
    assert (lineage["scale"], lineage["layers"]) == (0.5, {"1": 3.0})


def test_inject_takes_a_dtype(here):
    injected("--dtype", "bfloat16", rounding=Rounding(dtype="bfloat16"))
    assert {tensor.dtype for tensor in load_weights("adapted").values()} == {torch.bfloat16}


def test_inject_rounds_stochastically_from_a_seed(here):
    options = ("--dtype", "bfloat16", "--stochastic", 3)
    lineage = injected(*options, rounding=Rounding(dtype="bfloat16", seed=3))
    assert "stochastic" in lineage["rounding"]
    assert "3" in lineage["rounding"]
    other = ("--dtype", "bfloat16", "--stochastic", 4)
    ok("inject", "t1", "v1", "-o", "other", *other)
    third, fourth = load_weights("adapted"), load_weights("other")
    assert any(not torch.equal(third[name], fourth[name]) for name in third)


def test_several_targets_of_one_run_go_into_folders_of_their_names(here):
    done = ok("inject", "t1", "t2/", "v1", "-o", "all", "--scale", 0.5)
    assert done.stdout == "wrote all/t1\nwrote all/t2\n"
    assert names(here / "all") == ["t1", "t2"]
    for target in ("t1", "t2"):
        inject(target, "v1", "alone", scale=0.5)
        assert contents(here / "all" / target) == contents(here / "alone")


def test_targets_of_one_name_are_refused(here):
    shutil.copytree("t1", "other/t1")
    assert "different folder names, got t1, t1" in refused(
        "inject", "t1", "other/t1", "v1", "-o", "all"
    )
    assert not (here / "all").exists()


def test_all_targets_are_checked_before_the_first_is_written(here):
    edit_json(here / "t2" / "config.json", hidden_size=99)
    assert "hidden_size is 99 and 6" in refused("inject", "t1", "t2", "v1", "-o", "all")
    assert not (here / "all").exists()


def test_sweep_writes_one_model_for_each_scale(here):
    done = ok("sweep", "t1", "v1", "--scales", "0,0.5,1,-2", "-o", "out")
    assert names(here / "out") == ["scale--2", "scale-0", "scale-0.5", "scale-1"]
    assert done.stdout.splitlines()[1] == "wrote out/scale-0.5"
    for scale in (0, 0.5, 1, -2):
        inject("t1", "v1", "alone", scale=float(scale))
        assert same_bits(load_weights(f"out/scale-{scale}"), load_weights("alone"))
    assert same_bits(load_weights("out/scale-0"), load_weights("t1"))


def test_sweep_rounds_as_inject_does(here):
    options = ("--dtype", "bfloat16", "--stochastic", 3)
    ok("sweep", "t1", "v1", "--scales", "0.5", "-o", "out", *options)
    ok("inject", "t1", "v1", "--scale", 0.5, "-o", "alone", *options)
    assert same_bits(load_weights("out/scale-0.5"), load_weights("alone"))


# Combine and select


@pytest.mark.parametrize(
    ("options", "weights", "rule"),
    [
        ((), None, MergeRule()),
        (("--weights", "1,0.5"), (1, 0.5), MergeRule()),
        (("--weights", "-1,0.5"), (-1, 0.5), MergeRule()),
        (("--method", "ties"), None, MergeRule(method="ties")),
        (
            ("--method", "ties", "--density", 0.5, "--weights", "2,1"),
            (2, 1),
            MergeRule(method="ties", density=0.5),
        ),
        (("--method", "dare"), None, MergeRule(method="dare")),
        (
            ("--method", "dare", "--drop-rate", 0.5, "--seed", 7),
            None,
            MergeRule(method="dare", drop_rate=0.5, seed=7),
        ),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_combine_passes_its_options_on(options, weights, rule, here):
    done = ok("combine", "v1", "v2", *options, "-o", "sum")
    manifest = combine(["v1", "v2"], "expected", weights=weights, rule=rule)
    assert contents(here / "sum") == contents(here / "expected")
    assert f"wrote sum: {manifest.operation}, norm {manifest.norm:.6g}" in done.stdout


def test_select_takes_layers_and_modules(here):
    done = ok("select", "v1", "--layers", 0, "--modules", "attn,norm", "-o", "part")
    select("v1", "expected", layers="0", modules=["attn", "norm"])
    assert contents(here / "part") == contents(here / "expected")
    assert "wrote part: 3 tensors" in done.stdout
    ok("select", "v1", "--layers", "0-1", "--modules", " mlp , q_proj ", "-o", "part")
    assert load_manifest("part").tensors.keys() == {n for n in SMALL if "_proj" in n}


# Inspect, compare and verify


def test_inspect_shows_lineage_norms_and_the_cost_of_bfloat16(here):
    shown = ok("inspect", "v1").stdout
    manifest = load_manifest("v1")
    assert f"{manifest.norm:.6g}" in shown
    for part in ("layer 0", "layer 1", "outside layers", "q_proj", "bfloat16"):
        assert part in shown
    assert "Injected into the target" not in shown
    assert "Injected into the target" in ok("inspect", "v1", "--target", "t1").stdout


def test_inspect_json_is_all_that_is_printed(here):
    values = json.loads(ok("inspect", "v1", "--json").stdout)
    assert values["manifest"]["vector_hash"] == load_manifest("v1").vector_hash
    assert values["in_target"] is None
    half = json.loads(ok("inspect", "v1", "--target", "t1", "--scale", 0.5, "--json").stdout)
    whole = json.loads(ok("inspect", "v1", "--target", "t1", "--json").stdout)
    assert half["in_target"]["noise_to_signal"] > 1.5 * whole["in_target"]["noise_to_signal"]


def test_compare_shows_and_plots_every_pair(here):
    ok("combine", "v1", "v2", "-o", "sum")
    done = ok("compare", "v1", "v2", "sum", "--plot", "plots/cosines.png")
    for pair in ("v1 and v2", "v1 and sum", "v2 and sum"):
        assert pair in done.stdout
    assert Path("plots", "cosines.png").read_bytes().startswith(b"\x89PNG")
    assert "wrote plots/cosines.png" in done.stderr


def test_compare_json_is_all_that_is_printed(here):
    done = ok("compare", "v1", "v2", "--json", "--plot", "cosines.png")
    (pair,) = json.loads(done.stdout)
    assert (pair["left"], pair["right"]) == (str(here / "v1"), str(here / "v2"))
    assert len(pair["rows"]) == 6
    assert abs(pair["overall"]) < 0.2


def test_verify_says_what_was_checked(here):
    assert ok("verify", "v1").stdout.startswith("ok: 7 tensors, 1976 entries, vector ")
    assert ok("verify", "v1", "--parents").stdout.endswith(", parents rl and sft agree\n")
    shutil.move("v1.rl", "moved")
    done = ok("verify", "v1", "--rl", "moved")
    assert done.stdout.endswith(", parents rl and sft agree\n")


def test_verify_of_a_damaged_vector_fails_with_the_name_of_the_tensor(here):
    flip_byte(here / "v1" / "model.safetensors", -1)
    line = refused("verify", "v1")
    assert line.startswith("SkillVectorError: ")
    assert "model.norm.weight" in line


def test_a_whole_session_with_an_adapter(here):
    """RL trained an adapter on the SFT model; it goes into a model and into an adapter."""
    make_adapter(here / "rl", Q0, D1, seed=1)
    make_adapter(here / "target", Q0, seed=2)
    ok("extract", "rl", "t1", "-o", "skill", "--task", "world")
    ok("verify", "skill", "--parents")
    ok("select", "skill", "--layers", "1", "-o", "part")
    ok("combine", "skill", "part", "--weights", "1,-0.5", "-o", "sum")
    ok("inject", "t2", "sum", "-o", "dense")
    ok("inject", "target", "sum", "-o", "adapter")
    ok("compare", "skill", "sum")
    ok("inspect", "sum", "--target", "t2")
    delta = load_skill("skill").vector
    before, after = load_weights("t2"), load_weights("dense")
    for name, factor in ((Q0, 1.0), (D1, 0.5)):
        assert (after[name] - before[name] - factor * delta[name]).abs().max() < 1e-6
    assert Path("adapter", "adapter_model.safetensors").exists()


# What is refused


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


# Real processes


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
