import json
import math
import pickle
from datetime import UTC, datetime, timedelta

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file

import past_ray
from past_ray.build_info import git_commit
from past_ray.errors import SkillVectorError
from past_ray.skill import Provenance, extract, inject, load_manifest, load_skill
from past_ray.skill.artefact import SkillVector
from past_ray.skill.blocks import Chunk, Workspace
from past_ray.skill.checkpoint import hash_weights, load_weights
from past_ray.skill.compatibility import fingerprint
from past_ray.skill.manifest import bf16_cost, hash_files
from tests.skill_folders import (
    CHAT_TEMPLATE,
    CONFIG,
    SHAPES,
    assert_same_bits,
    edit_json,
    make_checkpoint,
    nudged,
    random_tensors,
)

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
LOST = 2.0**-33
"""What float32 loses of the difference in the first entry of the norm; see ``rl``."""

PROVENANCE = Provenance(
    task="squad",
    refinement_round=3,
    source_data_hash="b" * 64,
    rl_recipe={"learning_rate": 1e-6, "group_size": 8},
    reward="exact_match",
    seed=7,
)


@pytest.fixture
def base(tmp_path):
    return make_checkpoint(tmp_path / "base", random_tensors(0))


@pytest.fixture
def sft(base, tmp_path):
    return make_checkpoint(tmp_path / "sft", nudged(load_weights(base), 1))


@pytest.fixture
def rl(sft, tmp_path):
    """Weights after RL; one of them changed its sign in such a way that float32 loses a bit."""
    weights = nudged(load_weights(sft), 2)
    before = load_weights(sft)
    before["model.norm.weight"][0] = -1.5 * 2.0**-10
    weights["model.norm.weight"][0] = (1 + 2.0**-23) * 2.0**-10
    make_checkpoint(sft, before)
    return make_checkpoint(tmp_path / "rl", weights)


@pytest.fixture
def skill(rl, sft, tmp_path):
    extract(rl, sft, tmp_path / "skill")
    return tmp_path / "skill"


def documented_digest(tensor):
    """What docs/skill-format.md specifies, for a tensor of one block."""
    assert tensor.numel() <= 262_144
    dtype = str(tensor.dtype).removeprefix("torch.")
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    block = blake3(content).digest() if content else b""
    return blake3(f"{dtype}\0{list(tensor.shape)}\0".encode() + block).hexdigest()


def documented_hash(tensors):
    lines = (f"{name}\0{documented_digest(tensors[name])}\n" for name in sorted(tensors))
    return blake3("".join(lines).encode()).hexdigest()


def test_the_manifest_says_what_the_vector_was_made_from(base, rl, sft, tmp_path):
    extract(rl, sft, tmp_path / "earlier", provenance=Provenance(refinement_round=2))
    manifest = extract(
        rl,
        sft,
        tmp_path / "skill",
        provenance=PROVENANCE,
        base=base,
        parent=tmp_path / "earlier",
    )
    assert load_manifest(tmp_path / "skill") == manifest
    assert (manifest.format_version, manifest.form) == (2, "dense")
    assert manifest.rl_hash == documented_hash(load_weights(rl))
    assert manifest.sft_hash == documented_hash(load_weights(sft))
    assert manifest.base_hash == documented_hash(load_weights(base))
    assert manifest.parent_hash == load_manifest(tmp_path / "earlier").vector_hash
    assert (manifest.dtype, manifest.rl_dtype, manifest.sft_dtype) == ("float32",) * 3
    assert (manifest.rl_path, manifest.sft_path) == (str(rl), str(sft))
    assert (manifest.task, manifest.refinement_round, manifest.seed) == ("squad", 3, 7)
    assert manifest.source_data_hash == "b" * 64
    assert manifest.rl_recipe == {"learning_rate": 1e-6, "group_size": 8}
    assert (manifest.reward, manifest.operation) == ("exact_match", "extract")


def test_the_manifest_says_what_the_vector_fits(skill, sft):
    found = load_manifest(skill).fingerprint
    assert found == fingerprint(sft)
    assert (found.model_type, found.architectures) == ("qwen2", ("Qwen2ForCausalLM",))
    assert found.sizes["hidden_size"] == CONFIG["hidden_size"]
    assert found.tied_embeddings is False
    assert len(found.tokenizer) == len(found.chat_template) == 64
    edit_json(sft / "tokenizer.json", added_tokens=[{"content": "<new>", "id": 2}])
    (sft / "chat_template.jinja").write_text(CHAT_TEMPLATE + "{{ more }}")
    assert fingerprint(sft).tokenizer != found.tokenizer
    assert fingerprint(sft).chat_template != found.chat_template


def test_the_manifest_says_when_and_by_what_it_was_made(skill):
    manifest = load_manifest(skill)
    age = datetime.now(UTC) - datetime.fromisoformat(manifest.created)
    assert timedelta(seconds=-1) < age < timedelta(minutes=5)
    assert manifest.past_ray_version == past_ray.__version__
    assert manifest.git_commit == git_commit()


def test_stored_dtypes_of_both_parents_are_recorded(rl, sft, tmp_path):
    half = {name: weight.bfloat16() for name, weight in load_weights(sft).items()}
    make_checkpoint(sft, half)
    manifest = extract(rl, sft, tmp_path / "skill")
    assert (manifest.rl_dtype, manifest.sft_dtype) == ("float32", "bfloat16")


def test_every_parameter_has_its_norm_and_its_counts(sft, tmp_path):
    before = load_weights(sft)
    before["model.norm.weight"] = torch.ones(6)
    after = before | {"model.norm.weight": torch.tensor([4.0, -3.0, 1.0, 1.0, 13.0, 1.0])}
    make_checkpoint(sft, before)
    manifest = extract(make_checkpoint(tmp_path / "rl", after), sft, tmp_path / "skill")
    changed, untouched = manifest.tensors["model.norm.weight"], manifest.tensors[Q_PROJ]
    assert (changed.norm, changed.num_unchanged, changed.shape) == (13.0, 3, (6,))
    assert (untouched.norm, untouched.num_unchanged, untouched.shape) == (0.0, 36, (6, 6))
    assert list(manifest.tensors) == sorted(SHAPES)
    assert manifest.norm == 13.0


def test_norms_are_those_of_the_stored_differences(skill):
    manifest, vector = load_manifest(skill), load_file(skill / "model.safetensors")
    for name, tensor in vector.items():
        expected = math.sqrt(math.fsum(x * x for x in tensor.double().reshape(-1).tolist()))
        assert manifest.tensors[name].norm == pytest.approx(expected, rel=1e-14)
    whole = math.sqrt(math.fsum(float(t.double().square().sum()) for t in vector.values()))
    assert manifest.norm == pytest.approx(whole, rel=1e-14)


def test_hashes_are_those_that_the_format_specifies(skill):
    manifest = load_manifest(skill)
    vector = load_file(skill / "model.safetensors")
    corrections = load_file(skill / "corrections.safetensors")
    name = "model.norm.weight"
    assert set(corrections) == {f"{name}.entries", f"{name}.values"}
    assert corrections[f"{name}.entries"].tolist() == [0]
    assert corrections[f"{name}.values"].tolist() == [LOST]
    for key, tensor in vector.items():
        assert manifest.tensors[key].digest == documented_digest(tensor)
    correction_hash = documented_hash(
        {key: corrections[f"{name}.{key}"] for key in ("entries", "values")}
    )
    assert manifest.tensors[name].num_corrections == 1
    assert manifest.tensors[name].corrections_digest == correction_hash
    digests = {key: documented_digest(tensor) for key, tensor in vector.items()}
    digests[f"{name}.corrections"] = correction_hash
    lines = "".join(f"{key}\0{digests[key]}\n" for key in sorted(digests))
    assert manifest.vector_hash == blake3(lines.encode()).hexdigest()


def test_without_corrections_there_is_no_file_of_them_and_a_smaller_hash(base, sft, tmp_path):
    weights = {name: 1.25 * weight for name, weight in load_weights(sft).items()}
    make_checkpoint(tmp_path / "rl", weights)
    manifest = extract(tmp_path / "rl", sft, tmp_path / "skill")
    assert not (tmp_path / "skill" / "corrections.safetensors").exists()
    assert manifest.vector_hash == documented_hash(load_skill(tmp_path / "skill").vector)


def test_what_bfloat16_parents_would_cost_is_a_direct_computation(rl, sft, skill):
    after, before = load_weights(rl), load_weights(sft)
    exact = {n: (after[n].double() - before[n].double()).float().double() for n in after}
    rounded = {n: (after[n].bfloat16().double() - before[n].bfloat16().double()) for n in after}
    manifest = load_manifest(skill)
    for name, record in manifest.tensors.items():
        cosine = torch.cosine_similarity(exact[name].flatten(), rounded[name].flatten(), dim=0)
        assert record.num_bf16_changed == int((rounded[name] != 0).sum())
        assert record.bf16_norm == pytest.approx(float(rounded[name].norm()), rel=1e-12)
        assert record.bf16_cosine == pytest.approx(float(cosine), rel=1e-12)
    wanted, found = (torch.cat([x[n].flatten() for n in after]) for x in (exact, rounded))
    cost = bf16_cost(manifest.tensors)
    assert cost is not None
    assert cost["share_changed"] == pytest.approx(float((found != 0).double().mean()))
    assert cost["cosine"] == pytest.approx(float(torch.cosine_similarity(wanted, found, dim=0)))
    noise = float((found - wanted).norm() / wanted.norm())
    assert cost["noise_to_signal"] == pytest.approx(noise, rel=1e-9)
    assert 0.1 < noise < 1  # The fixtures' updates are of the size of a bfloat16 step.


def test_an_update_below_a_bfloat16_step_leaves_nothing_in_bfloat16(tmp_path):
    make_checkpoint(tmp_path / "sft", {"w": torch.ones(2, 2)})
    make_checkpoint(tmp_path / "rl", {"w": torch.full((2, 2), 1 + 2.0**-10)})
    manifest = extract(tmp_path / "rl", tmp_path / "sft", tmp_path / "skill")
    record = manifest.tensors["w"]
    assert (record.norm, record.bf16_norm, record.num_bf16_changed) == (2.0**-9, 0.0, 0)
    assert record.bf16_cosine is None
    cost = bf16_cost(manifest.tensors)
    assert cost is not None
    assert (cost["share_changed"], cost["noise_to_signal"]) == (0.0, 1.0)
    assert math.isnan(cost["cosine"])


def test_the_readme_tells_a_human_what_the_folder_is(base, rl, sft, tmp_path):
    manifest = extract(rl, sft, tmp_path / "skill", provenance=PROVENANCE, base=base)
    text = (tmp_path / "skill" / "README.md").read_text()
    assert text.startswith("# Skill vector: squad, refinement round 3\n")
    assert "differences of weights, not a model" in text
    for value in (manifest.vector_hash, manifest.rl_hash, manifest.sft_hash, manifest.base_hash):
        assert f"| {value} |" in text
    assert f"| Frobenius norm | {manifest.norm:.6g} |" in text
    assert "| reward | exact_match |" in text
    assert "| seed | 7 |" in text
    assert "past-ray skill inject TARGET THIS_FOLDER" in text
    cost = bf16_cost(manifest.tensors)
    assert cost is not None
    assert f"cosine {cost['cosine']:.4f}" in text
    assert "None" not in text


def test_the_index_lists_every_tensor_and_the_folder_loads_with_safetensors(skill):
    index = json.loads((skill / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == dict.fromkeys(sorted(SHAPES), "model.safetensors")
    assert index["metadata"]["total_size"] == 4 * sum(math.prod(s) for s in SHAPES.values())
    assert_same_bits(load_file(skill / "model.safetensors"), load_skill(skill).vector)


def test_a_skill_loads_into_memory_with_its_corrections_and_manifest(rl, sft, skill):
    loaded = load_skill(skill)
    assert loaded.manifest == load_manifest(skill)
    assert loaded.corrections.keys() == {"model.norm.weight"}
    entries, values = loaded.corrections["model.norm.weight"]
    assert (entries.tolist(), values.tolist()) == ([0], [LOST])
    assert {name: tuple(t.shape) for name, t in loaded.vector.items()} == SHAPES


def test_an_open_skill_survives_pickling(skill):
    original = SkillVector(skill)
    copy = pickle.loads(pickle.dumps(original))
    chunk = Chunk(name="model.norm.weight", start=0, stop=6)
    assert copy.read(chunk, Workspace()).tolist() == original.read(chunk, Workspace()).tolist()
    assert copy.corrections(chunk)[1].tolist() == [LOST]


def test_a_model_folder_is_no_skill_folder_and_the_other_way_round(base, skill, tmp_path):
    with pytest.raises(SkillVectorError, match=r"skill folder with a skill\.json"):
        inject(base, base, tmp_path / "adapted")
    extract(tmp_path / "rl", tmp_path / "sft", tmp_path / "lora", rank=4)
    for vector in (skill, tmp_path / "lora"):
        with pytest.raises(SkillVectorError, match=r"must be a model, but .* is a skill vector"):
            inject(vector, vector, tmp_path / "adapted")
    assert not (tmp_path / "adapted").exists()


def test_an_unknown_key_in_the_manifest_is_refused(skill):
    edit_json(skill / "skill.json", refinment_round=3)
    with pytest.raises(SkillVectorError, match="refinment_round"):
        load_manifest(skill)


def test_the_hash_of_source_files_depends_on_their_names_and_bytes_not_on_their_order(tmp_path):
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("ab")
    two.write_text("c")
    digest = hash_files([one, two])
    assert hash_files([two, one]) == digest
    one.write_text("a")
    two.write_text("bc")
    assert hash_files([one, two]) != digest
    assert hash_weights(make_checkpoint(tmp_path / "model", random_tensors(0))) != digest
