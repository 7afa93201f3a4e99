"""Skill vectors as adapters, with adapters that PEFT itself trained, saved, loads and merges."""

import json
import logging
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from past_ray.config.skill import ScaleConfig
from past_ray.errors import SkillVectorError
from past_ray.locations import open_folder
from past_ray.skill import (
    Rounding,
    StreamSettings,
    extract,
    extraction,
    inject,
    load_manifest,
    load_skill,
    sweep,
    verify,
)
from past_ray.skill.adapter import lora_delta
from past_ray.skill.adapter_folder import read_adapter
from past_ray.skill.artefact import adapter_hash
from past_ray.skill.checkpoint import hash_weights, load_weights, save_checkpoint
from tests.skill_folders import contents, make_checkpoint, nudged, random_tensors
from tests.skill_models import D1, Q0, SMALL, WIDE, is_absent, make_adapter, make_model
from tests.skill_models import make_skill as make_dense_skill
from tests.tiny_model import make_tiny_model

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FORMS = {
    "plain": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8},
    "rslora": {"target_modules": ["q_proj", "o_proj"], "r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {
        "target_modules": ALL_LINEAR,
        "r": 8,
        "lora_alpha": 4,
        "rank_pattern": {"q_proj": 5, r"layers\.1\..*down_proj": 2},
        "alpha_pattern": {"mlp.up_proj": 16, r"layers\.0\.mlp\.down_proj": 1},
    },
}
PER_LAYER = ScaleConfig.model_validate({"scale": 0.5, "layers": {"1": 3}, "modules": {"mlp": -2}})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="module")
def target(base):
    """A dense relative of the base."""
    save_checkpoint(base.parent / "target", nudged(load_weights(base), seed=5), like=base)
    return base.parent / "target"


@pytest.fixture(scope="module")
def adapters(base):
    """For each form, the folder of an adapter and what PEFT's own merge adds to each weight."""
    return {
        form: (base.parent / form, make_peft_adapter(base, base.parent / form, seed=n, **settings))
        for n, (form, settings) in enumerate(FORMS.items())
    }


@pytest.fixture
def skill(base, adapters, tmp_path):
    extract(adapters["patterns"][0], base, tmp_path / "skill")
    return tmp_path / "skill"


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def make_peft_adapter(base, folder, *, seed, **settings):
    """Save an adapter of random factors; return float64 changes of the weights it changes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(load(base), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder, save_embedding_layers=False)
    # In float64, so that PEFT's merge is exact for our purposes.
    merged, before = model.double().merge_and_unload().state_dict(), load_weights(base)
    changes = {name: merged[name] - before[name].double() for name in before}
    return {name: change for name, change in changes.items() if change.any()}


def factors_of(folder):
    return read_adapter(open_folder(folder)).modules


def delta_of(folder):
    return {name: lora_delta(module).double() for name, module in factors_of(folder).items()}


def distance(found, expected):
    """Relative, in the Frobenius norm."""
    return ((found.double() - expected).norm() / expected.norm()).item()


def factor_of(name):
    """The product that the documentation promises, written out for ``PER_LAYER``."""
    return 0.5 * (3 if ".layers.1." in name else 1) * (-2 if ".mlp." in name else 1)


def logits(model):
    ids = torch.tensor([[3, 6, 7, 8, 9, 20, 21, 1, 4]])
    with torch.no_grad():
        return model(ids).logits


def logits_with(base, folder, changes):
    """Logits of the base after float64 changes of its weights."""
    weights = {name: tensor.double() for name, tensor in load_weights(base).items()}
    for name, change in changes.items():
        weights[name] += change
    model = load(base).double()
    model.load_state_dict(weights)
    return logits(model)


def summed(*parts):
    total = {}
    for part in parts:
        for name, change in part.items():
            total[name] = total.get(name, 0) + change
    return total


# Extracted from what RL with LoRA leaves


@pytest.mark.parametrize("form", FORMS)
def test_the_vector_is_what_peft_adds_to_the_sft_weights(form, base, adapters, tmp_path):
    folder, changes = adapters[form]
    manifest = extract(folder, base, tmp_path / "skill")
    found = load_skill(tmp_path / "skill").vector
    assert manifest.form == "lora"
    assert found.keys() == changes.keys() == manifest.tensors.keys()
    for name, change in changes.items():
        assert distance(found[name], change) < 1e-6
        assert manifest.tensors[name].norm == pytest.approx(change.norm().item(), rel=1e-6)


def test_the_manifest_names_the_adapter_and_the_sft_weights(base, adapters, skill):
    manifest = load_manifest(skill)
    adapter = read_adapter(open_folder(adapters["patterns"][0]))
    assert manifest.rl_hash == adapter_hash(adapter)
    assert manifest.sft_hash == hash_weights(base)
    assert (manifest.rl_path, manifest.sft_path) == (str(adapters["patterns"][0]), str(base))
    assert verify(skill, parents=True).parents == ("rl", "sft")


def test_peft_loads_the_skill_folder_itself(base, adapters, skill):
    model = peft.PeftModel.from_pretrained(load(base), skill)
    expected = logits_with(base, skill, adapters["patterns"][1])
    assert (logits(model) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_module_that_the_sft_model_lacks_is_refused(base, adapters, tmp_path):
    weights = {n: t for n, t in load_weights(base).items() if "1.self_attn.v_proj" not in n}
    save_checkpoint(tmp_path / "sft", weights, like=base)
    with pytest.raises(SkillVectorError, match=r"1\.self_attn\.v_proj\.weight"):
        extract(adapters["plain"][0], tmp_path / "sft", tmp_path / "skill")
    assert is_absent(tmp_path / "skill")


def test_a_module_of_another_shape_is_refused(tmp_path):
    sft = make_model(tmp_path / "sft", seed=1, shapes=SMALL)
    make_adapter(tmp_path / "adapter", Q0, seed=1, shapes=SMALL | {Q0: (24, 17)})
    with pytest.raises(SkillVectorError, match=r"q_proj\.weight \(24, 16\) and \(24, 17\)"):
        extract(tmp_path / "adapter", sft, tmp_path / "skill")


def test_a_rank_for_what_is_an_adapter_already_is_refused(base, adapters, tmp_path):
    with pytest.raises(SkillVectorError, match="Leave the rank out"):
        extract(adapters["plain"][0], base, tmp_path / "skill", rank=4)


# Injected into a dense target


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [1.0, -0.3])
def test_a_dense_target_moves_by_the_scaled_deltas(form, scale, base, target, adapters, tmp_path):
    folder, changes = adapters[form]
    extract(folder, base, tmp_path / "skill")
    inject(target, tmp_path / "skill", tmp_path / "adapted", scale=scale)
    before, after = load_weights(target), load_weights(tmp_path / "adapted")
    for name, tensor in after.items():
        expected = before[name].double() + scale * changes.get(name, 0)
        assert (tensor - expected).abs().max() < 1e-6
        if name not in changes:
            assert torch.equal(tensor, before[name])


def test_a_dense_target_moves_by_other_scales_in_other_layers(target, adapters, skill, tmp_path):
    inject(target, skill, tmp_path / "adapted", scale=PER_LAYER)
    before, after = load_weights(target), load_weights(tmp_path / "adapted")
    for name, change in adapters["patterns"][1].items():
        expected = before[name].double() + factor_of(name) * change
        assert (after[name] - expected).abs().max() < 1e-6


def test_the_own_sft_parent_becomes_what_peft_merges(base, adapters, skill, tmp_path):
    inject(base, skill, tmp_path / "adapted")
    merged = peft.PeftModel.from_pretrained(load(base), adapters["patterns"][0]).merge_and_unload()
    found, expected = logits(load(tmp_path / "adapted")), logits(merged)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_bfloat16_target_rounds_the_float32_sum_once(target, skill, tmp_path):
    half = {name: tensor.bfloat16() for name, tensor in load_weights(target).items()}
    save_checkpoint(tmp_path / "half", half, like=target)
    inject(tmp_path / "half", skill, tmp_path / "adapted")
    vector, found = load_skill(skill).vector, load_weights(tmp_path / "adapted")
    for name, change in vector.items():
        assert torch.equal(found[name], (half[name].float() + change).bfloat16())


def test_workers_and_chunks_do_not_change_a_byte(tmp_path):
    sft = make_model(tmp_path / "sft", seed=1)
    make_adapter(tmp_path / "adapter", WIDE, Q0, seed=2, rank=7)
    extract(tmp_path / "adapter", sft, tmp_path / "skill")
    found = []
    for workers, chunk_blocks in [(1, 1), (2, 1), (1, 5), (3, 2), (4, 3), (2, 4)]:
        settings = StreamSettings(workers=workers, chunk_blocks=chunk_blocks)
        inject(sft, tmp_path / "skill", tmp_path / "x", scale=0.3, settings=settings)
        found.append(contents(tmp_path / "x"))
    assert all(files == found[0] for files in found[1:])
    before, after = load_weights(sft)[WIDE].double(), load_weights(tmp_path / "x")[WIDE].double()
    module = factors_of(tmp_path / "adapter")[WIDE]
    delta = 0.3 * module.scaling * (module.b.double() @ module.a.double())
    assert (after - before - delta).abs().max() < 1e-6
    assert delta.abs().max() > 0.01


# Injected into a target that is an adapter


@pytest.mark.parametrize("target_form", FORMS)
@pytest.mark.parametrize("skill_form", ["rslora", "patterns"])
def test_peft_gives_the_base_and_both_deltas(target_form, skill_form, base, adapters, tmp_path):
    """rsLoRA, alpha_pattern and rank_pattern of either side are folded into the factors."""
    (target, of_target), (adapter, of_skill) = adapters[target_form], adapters[skill_form]
    extract(adapter, base, tmp_path / "skill")
    inject(target, tmp_path / "skill", tmp_path / "adapted", scale=-0.7)
    changes = summed(of_target, {name: -0.7 * change for name, change in of_skill.items()})
    found = logits(peft.PeftModel.from_pretrained(load(base), tmp_path / "adapted"))
    expected = logits_with(base, tmp_path, changes)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (found - logits_with(base, tmp_path, of_target)).abs().max() > 0.01


def test_scales_by_layer_and_module_reach_the_factors(base, adapters, skill, tmp_path):
    target, of_target = adapters["plain"]
    inject(target, skill, tmp_path / "adapted", scale=PER_LAYER)
    found, of_skill = delta_of(tmp_path / "adapted"), adapters["patterns"][1]
    expected = summed(of_target, {n: factor_of(n) * change for n, change in of_skill.items()})
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        assert distance(found[name], change) < 1e-6


def test_ranks_are_laid_side_by_side_and_filled_up_to_one_that_vllm_serves(tmp_path):
    sft = make_model(tmp_path / "sft", seed=1)
    make_adapter(tmp_path / "target", Q0, D1, seed=2, rank=5, scaling=2.0)
    make_adapter(tmp_path / "adapter", Q0, WIDE, seed=3, rank=6, scaling=0.5)
    extract(tmp_path / "adapter", sft, tmp_path / "skill")
    inject(tmp_path / "target", tmp_path / "skill", tmp_path / "adapted", scale=3.0)
    # Written adapters have ranks that vLLM accepts, 8 each.
    target, skill, adapted = (factors_of(tmp_path / n) for n in ("target", "skill", "adapted"))
    assert (target[Q0].rank, skill[Q0].rank) == (8, 8)
    assert {name: module.rank for name, module in adapted.items()} == {Q0: 16, D1: 16, WIDE: 16}
    assert torch.equal(adapted[Q0].a, torch.cat([target[Q0].a, skill[Q0].a]))
    assert torch.equal(adapted[Q0].b, torch.cat([target[Q0].b, 3 * skill[Q0].b], dim=1))
    assert not adapted[D1].a[8:].any()


def test_scale_zero_gives_the_target_adapter(base, adapters, skill, tmp_path):
    target, of_target = adapters["rslora"]
    inject(target, skill, tmp_path / "adapted", scale=0.0)
    for name, change in delta_of(tmp_path / "adapted").items():
        expected = of_target.get(name)
        assert not change.any() if expected is None else distance(change, expected) < 1e-6


def test_a_sweep_gives_an_adapter_for_each_scale(adapters, skill, tmp_path):
    target = adapters["plain"][0]
    sweep(target, skill, {0.5: tmp_path / "half", 1.0: tmp_path / "one"})
    inject(target, skill, tmp_path / "alone", scale=0.5)
    assert contents(tmp_path / "half") == contents(tmp_path / "alone")
    half, one = (load_file(tmp_path / x / "adapter_model.safetensors") for x in ("half", "one"))
    assert half.keys() == one.keys()
    assert any(not torch.equal(half[key], one[key]) for key in half)


def test_the_adapted_adapter_says_what_it_is_made_of(adapters, skill, tmp_path):
    target = adapters["plain"][0]
    inject(target, skill, tmp_path / "adapted", scale=0.5)
    lineage = json.loads((tmp_path / "adapted" / "past_ray.json").read_text())
    config = json.loads((tmp_path / "adapted" / "adapter_config.json").read_text())
    original = json.loads((target / "adapter_config.json").read_text())
    assert lineage["skill_hash"] == load_manifest(skill).vector_hash
    assert lineage["scale"] == 0.5
    assert config["base_model_name_or_path"] == original["base_model_name_or_path"]


def test_the_adapted_adapter_records_the_target_adapter(adapters, skill, tmp_path):
    """A dense target is recorded by its hash; an adapter has one too."""
    target = adapters["plain"][0]
    inject(target, skill, tmp_path / "adapted")
    lineage = json.loads((tmp_path / "adapted" / "past_ray.json").read_text())
    assert lineage["target_hash"] == adapter_hash(read_adapter(open_folder(target)))


def test_a_dense_vector_for_an_adapter_is_refused_with_what_to_do(tmp_path):
    make_dense_skill(tmp_path / "dense", seed=1)
    make_adapter(tmp_path / "target", Q0, seed=2)
    with pytest.raises(SkillVectorError, match=r"Extract it with --rank, or merge the target's"):
        inject(tmp_path / "target", tmp_path / "dense", tmp_path / "adapted")
    assert is_absent(tmp_path / "adapted")


def test_an_adapter_of_a_model_of_another_size_is_refused(adapters, skill, tmp_path):
    name = "model.layers.0.self_attn.q_proj.weight"
    make_adapter(tmp_path / "target", name, seed=2)
    with pytest.raises(SkillVectorError, match=r"q_proj\.weight \(24, 16\) and \(64, 64\)"):
        inject(tmp_path / "target", skill, tmp_path / "adapted")
    assert is_absent(tmp_path / "adapted")


@pytest.mark.parametrize("rounding", [Rounding(dtype="bfloat16"), Rounding(seed=3)], ids=str)
def test_rounding_that_an_adapter_does_not_get_is_refused(rounding, adapters, skill, tmp_path):
    """Adapters are written in float32; what was asked for must not be dropped silently."""
    with pytest.raises(SkillVectorError, match="adapter"):
        inject(adapters["plain"][0], skill, tmp_path / "adapted", rounding=rounding)


def test_an_adapter_that_records_another_base_is_refused(base, adapters, target, tmp_path):
    """As for a dense target; only where nothing is recorded have shapes to decide."""
    extract(adapters["patterns"][0], base, tmp_path / "skill", base=base)
    extract(adapters["plain"][0], target, tmp_path / "other", base=target)
    make_peft_adapter(base, tmp_path / "start", seed=9, **FORMS["plain"])
    inject(tmp_path / "start", tmp_path / "other", tmp_path / "target")
    lineage = json.loads((tmp_path / "target" / "past_ray.json").read_text())
    assert lineage["base_hash"] == hash_weights(target) != hash_weights(base)
    with pytest.raises(SkillVectorError, match="it records the base"):
        inject(tmp_path / "target", tmp_path / "skill", tmp_path / "adapted")


def test_a_sum_of_ranks_beyond_vllm_is_refused_with_what_to_do(tmp_path):
    shapes = {WIDE: (600, 600)}
    sft = make_checkpoint(tmp_path / "sft", random_tensors(0, shapes))
    make_adapter(tmp_path / "target", WIDE, seed=1, rank=320, shapes=shapes)
    make_adapter(tmp_path / "adapter", WIDE, seed=2, rank=256, shapes=shapes)
    extract(tmp_path / "adapter", sft, tmp_path / "skill")
    with pytest.raises(SkillVectorError, match=r"at most 512, .* got 576 .* merge it"):
        inject(tmp_path / "target", tmp_path / "skill", tmp_path / "adapted")
    assert is_absent(tmp_path / "adapted")


# The best adapter of a rank


@pytest.fixture
def parents(base, target, tmp_path):
    """RL and SFT weights whose difference has a few strong directions and weak noise."""
    sft, noise = load_weights(target), random_tensors(3, shapes_of(target))
    rl = dict(sft)
    for name, tensor in sft.items():
        rl[name] = tensor + 0.003 * noise[name]
        if tensor.dim() == 2 and ".layers." in name:
            rl[name] = rl[name] + 0.02 * noise[name][:, :3] @ noise[name][:3, :]
    save_checkpoint(tmp_path / "rl", rl, like=target)
    return tmp_path / "rl", target


def shapes_of(folder):
    return {name: tuple(tensor.shape) for name, tensor in load_weights(folder).items()}


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_what_a_low_rank_loses_is_exactly_the_energy_it_records(rank, parents, tmp_path):
    extract(*parents, tmp_path / "dense")
    manifest = extract(*parents, tmp_path / "low", rank=rank)
    dense, low = (load_skill(tmp_path / name).vector for name in ("dense", "low"))
    assert low.keys() == {n for n, t in dense.items() if t.dim() == 2 and ".layers." in n}
    for name, tensor in low.items():
        exact, kept = dense[name].double(), manifest.tensors[name].energy_kept
        lost = (exact - tensor.double()).norm() ** 2 / exact.norm() ** 2
        assert lost.item() == pytest.approx(1 - kept, abs=1e-6)
        singular = torch.linalg.svdvals(exact)
        best = (singular[:rank].square().sum() / singular.square().sum()).item()
        assert kept == pytest.approx(best, abs=1e-5)
        assert torch.linalg.matrix_rank(tensor, tol=1e-4) <= rank


def test_a_low_rank_injected_is_off_by_what_it_lost_and_only_there(parents, tmp_path):
    rl, sft = parents
    manifest = extract(rl, sft, tmp_path / "low", rank=3)
    inject(sft, tmp_path / "low", tmp_path / "adapted")
    after, before, found = (load_weights(f) for f in (rl, sft, tmp_path / "adapted"))
    for name, tensor in found.items():
        if name not in manifest.tensors:
            assert torch.equal(tensor, before[name])
            continue
        change = (after[name].double() - before[name].double()).norm() ** 2
        off = (after[name].double() - tensor.double()).norm() ** 2
        assert (off / change).item() == pytest.approx(
            1 - manifest.tensors[name].energy_kept, abs=1e-5
        )
        assert manifest.tensors[name].energy_kept > 0.9


def test_a_full_rank_loses_nothing(parents, tmp_path):
    extract(*parents, tmp_path / "dense")
    manifest = extract(*parents, tmp_path / "full", rank=64)
    dense, full = (load_skill(tmp_path / name).vector for name in ("dense", "full"))
    for name, tensor in full.items():
        assert manifest.tensors[name].energy_kept == pytest.approx(1, abs=1e-6)
        assert distance(tensor, dense[name].double()) < 1e-5


def test_a_low_rank_goes_into_an_adapter_and_into_peft(base, adapters, parents, tmp_path):
    target, of_target = adapters["plain"]
    extract(*parents, tmp_path / "low", rank=3)
    inject(target, tmp_path / "low", tmp_path / "adapted", scale=2.0)
    low = load_skill(tmp_path / "low").vector
    changes = summed(of_target, {name: 2.0 * change.double() for name, change in low.items()})
    found = logits(peft.PeftModel.from_pretrained(load(base), tmp_path / "adapted"))
    expected = logits_with(base, tmp_path, changes)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_low_rank_vector_says_how_it_was_made(parents, tmp_path):
    manifest = extract(*parents, tmp_path / "low", rank=3)
    assert (manifest.form, manifest.operation) == ("lora", "truncated_svd rank 3")
    assert manifest.rl_hash == hash_weights(parents[0])
    assert manifest.sft_hash == hash_weights(parents[1])
    energies = [record.energy_kept for record in load_manifest(tmp_path / "low").tensors.values()]
    assert all(0 < energy < 1 for energy in energies)


def test_a_module_that_did_not_change_is_kept_whole_by_any_rank(tmp_path):
    sft = random_tensors(0, SMALL)
    make_checkpoint(tmp_path / "sft", sft)
    make_checkpoint(tmp_path / "rl", nudged(sft, seed=1) | {Q0: sft[Q0]})
    manifest = extract(tmp_path / "rl", tmp_path / "sft", tmp_path / "low", rank=2)
    assert manifest.tensors[Q0].energy_kept == 1
    assert manifest.tensors[Q0].norm == 0


def test_a_rank_that_vllm_cannot_serve_is_refused_before_the_work(tmp_path, monkeypatch):
    """The SVD of a large model takes hours."""
    shapes = {WIDE: (600, 600)}
    for name, seed in (("rl", 1), ("sft", 2)):
        make_checkpoint(tmp_path / name, random_tensors(seed, shapes))
    monkeypatch.setattr(
        extraction, "truncated_svd", lambda *_, **__: pytest.fail("it was decomposed first")
    )
    with pytest.raises(SkillVectorError, match="at most 512"):
        extract(tmp_path / "rl", tmp_path / "sft", tmp_path / "low", rank=513)


def test_energies_are_in_the_card_or_the_log(parents, tmp_path, caplog):
    """How much a rank keeps decides whether it is enough; nobody reads a manifest for it."""
    with caplog.at_level(logging.INFO):
        extract(*parents, tmp_path / "low", rank=3)
    text = (tmp_path / "low" / "README.md").read_text() + caplog.text
    assert "energy" in text


def test_the_folder_of_a_peft_adapter_may_hold_more_files(base, adapters, tmp_path):
    """PEFT writes a README of its own beside the adapter, and trainers write more."""
    folder = adapters["plain"][0]
    assert (folder / "README.md").exists()
    manifest = extract(folder, base, tmp_path / "skill")
    assert "Skill vector" in (tmp_path / "skill" / "README.md").read_text()
    assert manifest.tensors.keys() == adapters["plain"][1].keys()
