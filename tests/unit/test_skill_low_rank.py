"""The best adapter of a rank for the difference of two dense models."""

import logging

import peft
import pytest
import torch

from past_ray.errors import SkillVectorError
from past_ray.skill import extract, extraction, inject, load_manifest, load_skill
from past_ray.skill.checkpoint import hash_weights, load_weights, save_checkpoint
from tests.peft_adapters import (
    adapters_fixture,  # noqa: F401
    base_fixture,  # noqa: F401
    load,
    logits,
    logits_with,
    summed,
    target_fixture,  # noqa: F401
)
from tests.skill_folders import make_checkpoint, nudged, random_tensors
from tests.skill_models import Q0, SMALL, WIDE, distance


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
