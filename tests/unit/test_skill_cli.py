"""``past-ray skill`` as a user types it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

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
from tests.skill_cli import (
    here_fixture,  # noqa: F401
    made_fixture,  # noqa: F401
    ok,
    refused,
)
from tests.skill_folders import contents, edit_json, flip_byte, names
from tests.skill_models import D1, Q0, SMALL, make_adapter, same_bits

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
