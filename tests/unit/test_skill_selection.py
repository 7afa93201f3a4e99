import pytest
import torch
from safetensors.torch import load_file

from past_ray.errors import ConfigError, SkillVectorError
from past_ray.skill import (
    StreamSettings,
    extract,
    inject,
    inspect,
    load_skill,
    select,
    verify,
)
from past_ray.skill.checkpoint import load_weights
from tests.skill_folders import bits, contents, flip_byte, random_tensors
from tests.skill_models import (
    D1,
    Q0,
    Q1,
    SHAPES,
    SMALL,
    WIDE,
    is_absent,
    make_adapter,
    make_model,
    make_skill,
    make_skill_of,
    same_bits,
    unruly,
)

LAYER_0 = {name for name in SHAPES if ".layers.0." in name}
LAYER_1 = {Q1, D1}


@pytest.fixture
def skill(tmp_path):
    """A vector with corrections in every tensor."""
    sft = random_tensors(0, SHAPES)
    manifest = make_skill_of(tmp_path / "skill", rl=unruly(sft, seed=1), sft=sft)
    assert all(record.num_corrections for record in manifest.tensors.values())
    return tmp_path / "skill"


@pytest.fixture
def target(tmp_path):
    return make_model(tmp_path / "target", seed=7)


@pytest.mark.parametrize(
    ("layers", "modules", "expected"),
    [
        ("0", None, LAYER_0),
        ("1", None, LAYER_1),
        ("0-1", None, LAYER_0 | LAYER_1),
        ("0,1", None, LAYER_0 | LAYER_1),
        (None, ["mlp"], {WIDE, D1}),
        (None, ["q_proj"], {Q0, Q1, "model.layers.0.self_attn.q_proj.bias"}),
        (None, ["norm"], {"model.norm.weight", "model.layers.0.input_layernorm.weight"}),
        (None, ["embed", "mlp"], {"model.embed_tokens.weight", WIDE, D1}),
        ("1", ["mlp"], {D1}),
        (None, None, set(SHAPES)),
    ],
)
def test_a_part_has_exactly_the_chosen_tensors_bit_for_bit(
    layers, modules, expected, skill, tmp_path
):
    manifest = select(skill, tmp_path / "part", layers=layers, modules=modules)
    whole, part = load_skill(skill), load_skill(tmp_path / "part")
    assert manifest.tensors.keys() == expected
    assert same_bits(part.vector, {name: whole.vector[name] for name in expected})
    assert part.corrections.keys() == expected
    for name, (entries, values) in part.corrections.items():
        assert torch.equal(entries, whole.corrections[name][0])
        assert torch.equal(bits(values), bits(whole.corrections[name][1]))


def test_a_part_of_everything_is_the_same_vector(skill, tmp_path):
    manifest = select(skill, tmp_path / "all")
    assert manifest.vector_hash == load_skill(skill).manifest.vector_hash
    for name in ("model.safetensors", "corrections.safetensors"):
        assert contents(tmp_path / "all")[name] == contents(skill)[name]


def test_a_part_injected_into_the_sft_parent_is_rl_there_and_sft_elsewhere(skill, tmp_path):
    select(skill, tmp_path / "part", layers="0")
    inject(skill.with_suffix(".sft"), tmp_path / "part", tmp_path / "adapted")
    rl, sft = (load_weights(skill.with_suffix(suffix)) for suffix in (".rl", ".sft"))
    expected = sft | {name: rl[name] for name in LAYER_0}
    assert same_bits(load_weights(tmp_path / "adapted"), expected)


def test_a_part_changes_only_its_own_parameters_of_a_target(skill, target, tmp_path):
    select(skill, tmp_path / "part", layers="1", modules=["mlp"])
    inject(target, tmp_path / "part", tmp_path / "adapted", scale=0.5)
    inject(target, skill, tmp_path / "whole", scale=0.5)
    before, after = load_weights(target), load_weights(tmp_path / "adapted")
    assert not torch.equal(after[D1], before[D1])
    assert same_bits(after, before | {D1: load_weights(tmp_path / "whole")[D1]})


def test_a_part_without_corrections_has_no_file_of_them(tmp_path):
    sft = random_tensors(0, SMALL)
    rl = unruly(sft, seed=1) | {D1: sft[D1] * 1.25}
    make_skill_of(tmp_path / "skill", rl=rl, sft=sft)
    select(tmp_path / "skill", tmp_path / "part", layers="1", modules=["mlp"])
    select(tmp_path / "skill", tmp_path / "other", layers="1", modules=["attn"])
    assert not (tmp_path / "part" / "corrections.safetensors").exists()
    assert load_file(tmp_path / "other" / "corrections.safetensors").keys() == {
        f"{Q1}.entries",
        f"{Q1}.values",
    }


def test_a_part_says_what_it_was_taken_from_and_verifies_with_the_parents(skill, tmp_path):
    whole = load_skill(skill).manifest
    part = select(skill, tmp_path / "part", layers="0", modules=["mlp", "norm"])
    assert part.operation == "select layers 0 modules mlp,norm"
    assert [(i.vector_hash, i.weight) for i in part.ingredients] == [(whole.vector_hash, 1.0)]
    assert part.vector_hash != whole.vector_hash
    for key in ("rl_hash", "sft_hash", "fingerprint", "base_sketch", "refinement_round", "task"):
        assert getattr(part, key) == getattr(whole, key)
    assert verify(tmp_path / "part", parents=True).parents == ("rl", "sft")


def test_norms_and_counts_of_a_part_are_those_of_the_whole(skill, tmp_path):
    whole, part = load_skill(skill).manifest, select(skill, tmp_path / "part", layers="0")
    for name, record in part.tensors.items():
        for key in ("shape", "digest", "norm", "num_unchanged", "num_corrections"):
            assert getattr(record, key) == getattr(whole.tensors[name], key)


def test_a_part_still_knows_what_bfloat16_parents_would_cost(tmp_path):
    """Its parents are those of the whole, and were measured tensor by tensor."""
    whole = make_skill(tmp_path / "skill", seed=1, shapes=SMALL)
    part = select(tmp_path / "skill", tmp_path / "part", layers="0")
    for name, record in part.tensors.items():
        assert record.num_bf16_changed == whole.tensors[name].num_bf16_changed
        assert record.bf16_cosine == whole.tensors[name].bf16_cosine
    assert inspect(tmp_path / "part").parents_in_bf16 is not None


def test_workers_chunks_and_shards_do_not_change_a_part(skill, tmp_path):
    select(skill, tmp_path / "first", layers="0", settings=StreamSettings(workers=1))
    for workers, chunk_blocks in [(2, 1), (3, 2), (4, 3), (1, 5), (2, 4)]:
        settings = StreamSettings(workers=workers, chunk_blocks=chunk_blocks)
        select(skill, tmp_path / "next", layers="0", settings=settings)
        assert contents(tmp_path / "next") == contents(tmp_path / "first")
    settings = StreamSettings(max_shard_bytes=1000)
    cut = select(skill, tmp_path / "cut", layers="0", settings=settings)
    assert len(list((tmp_path / "cut").glob("model-0*.safetensors"))) == 4
    assert cut.vector_hash == load_skill(tmp_path / "first").manifest.vector_hash


# Adapters


@pytest.fixture
def adapter_skill(target, tmp_path):
    make_adapter(tmp_path / "adapter", Q0, WIDE, D1, seed=3, rank=6, scaling=1.5)
    extract(tmp_path / "adapter", target, tmp_path / "lora")
    return tmp_path / "lora"


def test_a_part_of_an_adapter_is_an_adapter_with_the_same_factors(adapter_skill, target, tmp_path):
    manifest = select(adapter_skill, tmp_path / "part", modules=["mlp"])
    whole = load_file(adapter_skill / "adapter_model.safetensors")
    part = load_file(tmp_path / "part" / "adapter_model.safetensors")
    assert (manifest.form, manifest.tensors.keys()) == ("lora", {WIDE, D1})
    assert len(part) == 4
    assert all(torch.equal(tensor, whole[key]) for key, tensor in part.items())
    inject(target, tmp_path / "part", tmp_path / "adapted")
    before, delta = load_weights(target), load_skill(adapter_skill).vector
    expected = before | {name: before[name] + delta[name] for name in (WIDE, D1)}
    assert same_bits(load_weights(tmp_path / "adapted"), expected)
    assert verify(tmp_path / "part", parents=True).parents == ("rl", "sft")


def test_a_part_of_a_truncated_vector_keeps_the_energies(tmp_path):
    make_skill(tmp_path / "dense", seed=1, shapes=SMALL)
    parents = tmp_path / "dense.rl", tmp_path / "dense.sft"
    whole = extract(*parents, tmp_path / "low", rank=2)
    part = select(tmp_path / "low", tmp_path / "part", layers="1")
    assert part.tensors.keys() == LAYER_1
    for name, record in part.tensors.items():
        assert record.energy_kept == whole.tensors[name].energy_kept


# What is refused


@pytest.mark.parametrize(
    ("layers", "modules", "error", "message"),
    [
        ("2", None, SkillVectorError, r"layers '2' must name layers .* which has 0 to 1"),
        ("0,7-9", None, SkillVectorError, "layers '7-9' must name layers"),
        ("1-0", None, ConfigError, "must not run backwards, got '1-0'"),
        ("first", None, ConfigError, "Write 8-20 or 0,3,8-20"),
        ("", None, ConfigError, "Write 8-20"),
        ("-1", None, ConfigError, "got '-1'"),
        (None, ["mpl"], SkillVectorError, r"got \['mpl'\]; there are \['attn', 'embed', 'mlp'"),
        (None, ["mlp", "k_proj"], SkillVectorError, r"got \['k_proj'\]"),
        ("1", ["norm"], SkillVectorError, r"got \['norm'\]; there are \['attn', 'mlp'"),
        (None, [], SkillVectorError, "must select a parameter"),
    ],
)
def test_what_selects_nothing_is_refused_with_what_there_is(
    layers, modules, error, message, skill, tmp_path
):
    with pytest.raises(error, match=message):
        select(skill, tmp_path / "part", layers=layers, modules=modules)
    assert is_absent(tmp_path / "part")


def test_a_damaged_vector_is_not_passed_on(skill, tmp_path):
    flip_byte(skill / "model.safetensors", -1)
    with pytest.raises(SkillVectorError, match="tensors differ"):
        select(skill, tmp_path / "part", modules=["norm"])
    assert is_absent(tmp_path / "part")


def test_damage_outside_of_the_part_does_not_matter(skill, tmp_path):
    """The last byte of the file belongs to the last name, ``model.norm.weight``."""
    flip_byte(skill / "model.safetensors", -1)
    select(skill, tmp_path / "part", layers="0")
    assert verify(tmp_path / "part").num_tensors == len(LAYER_0)


def test_a_part_must_not_replace_its_whole(skill):
    before = contents(skill)
    with pytest.raises(SkillVectorError, match="different folders"):
        select(skill, skill, layers="0")
    assert contents(skill) == before
