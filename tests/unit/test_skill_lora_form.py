"""Skill vectors as adapters, with adapters that PEFT itself trained, saved, loads and merges."""

import peft
import pytest
import torch

from past_ray.errors import SkillVectorError
from past_ray.locations import open_folder
from past_ray.skill import StreamSettings, extract, inject, load_manifest, load_skill, verify
from past_ray.skill.adapter_folder import read_adapter
from past_ray.skill.artefact import adapter_hash
from past_ray.skill.checkpoint import hash_weights, load_weights, save_checkpoint
from tests.peft_adapters import (
    FORMS,
    PER_LAYER,
    adapters_fixture,  # noqa: F401
    base_fixture,  # noqa: F401
    factor_of,
    factors_of,
    load,
    logits,
    logits_with,
    skill_fixture,  # noqa: F401
    target_fixture,  # noqa: F401
)
from tests.skill_folders import contents
from tests.skill_models import Q0, SMALL, WIDE, distance, is_absent, make_adapter, make_model

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


def test_the_folder_of_a_peft_adapter_may_hold_more_files(base, adapters, tmp_path):
    """PEFT writes a README of its own beside the adapter, and trainers write more."""
    folder = adapters["plain"][0]
    assert (folder / "README.md").exists()
    manifest = extract(folder, base, tmp_path / "skill")
    assert "Skill vector" in (tmp_path / "skill" / "README.md").read_text()
    assert manifest.tensors.keys() == adapters["plain"][1].keys()
