import json
from itertools import combinations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from past_ray.config.skill import ScaleConfig
from past_ray.errors import SkillVectorError
from past_ray.skill import (
    Rounding,
    StreamSettings,
    blocks,
    extract,
    inject,
    load_manifest,
    load_skill,
    select,
    sweep,
)
from past_ray.skill.arithmetic import inject_skill_vector
from past_ray.skill.checkpoint import hash_weights, load_weights
from past_ray.skill.noise import uniform_bits
from past_ray.skill.rounding import round_stochastic
from past_ray.skill.weights import StoredWeights
from tests.skill_folders import (
    assert_same_bits,
    bits,
    contents,
    make_checkpoint,
    names,
    nudged,
    random_tensors,
    write_json,
)
from tests.tiny_model import make_tiny_model

SCALES = ScaleConfig.model_validate(
    {"scale": 0.7, "layers": {"0": 0.5, "1": -2}, "modules": {"mlp": 0, "q_proj": 3}}
)
FACTORS = {
    "model.embed_tokens.weight": 0.7,
    "model.layers.0.self_attn.q_proj.weight": 0.7 * 0.5 * 3,
    "model.layers.0.self_attn.q_proj.bias": 0.7 * 0.5 * 3,
    "model.layers.0.mlp.up_proj.weight": 0.0,
    "model.layers.1.self_attn.q_proj.weight": 0.7 * -2 * 3,
    "model.layers.1.mlp.up_proj.weight": -0.0,
    "model.norm.weight": 0.7,
    "lm_head.weight": 0.7,
}
"""What ``SCALES`` says of every parameter."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Let the small tensors of these tests have several blocks each."""
    monkeypatch.setattr(blocks, "BLOCK", 16)


@pytest.fixture
def base():
    return random_tensors(0)


@pytest.fixture
def target(base, tmp_path):
    return make_checkpoint(tmp_path / "target", nudged(base, 3))


@pytest.fixture
def skill(base, tmp_path):
    """Extract a vector that float32 holds exactly, so that there are no corrections."""
    sft = nudged(base, 1)
    rl = {name: weight + torch.round(weight * 64) / 1024 for name, weight in sft.items()}
    make_checkpoint(tmp_path / "sft", sft)
    make_checkpoint(tmp_path / "rl", rl)
    extract(tmp_path / "rl", tmp_path / "sft", tmp_path / "skill")
    assert not load_skill(tmp_path / "skill").corrections
    return tmp_path / "skill"


@pytest.fixture
def corrected_skill(base, tmp_path):
    """Extract a vector between weights that have little to do with each other."""
    make_checkpoint(tmp_path / "other sft", base)
    make_checkpoint(tmp_path / "other rl", random_tensors(8))
    extract(tmp_path / "other rl", tmp_path / "other sft", tmp_path / "corrected")
    assert load_skill(tmp_path / "corrected").corrections
    return tmp_path / "corrected"


def reference(target, vector, factors):
    """Compute ``target + factor * vector`` in NumPy's float32: one product, one sum."""
    adapted = {}
    for name, weight in target.items():
        product = np.float32(factors[name]) * vector[name].numpy()
        assert product.dtype == np.float32
        adapted[name] = torch.from_numpy(np.asarray(weight.float().numpy() + product))
    return adapted


@pytest.mark.parametrize("scale", [1.0, 0.3, -1.0, SCALES])
def test_injection_is_float32_arithmetic_with_one_product_and_one_sum(
    target, skill, tmp_path, scale
):
    inject(target, skill, tmp_path / "adapted", scale=scale)
    weights, vector = load_weights(target), load_skill(skill).vector
    factors = FACTORS if scale is SCALES else dict.fromkeys(weights, scale)
    adapted = load_weights(tmp_path / "adapted")
    assert_same_bits(adapted, reference(weights, vector, factors))
    assert any((adapted[name] != weights[name]).any() for name in weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.3, SCALES])
def test_a_narrow_target_is_rounded_once_from_the_float32_sum(
    target, skill, tmp_path, dtype, scale
):
    weights = {name: weight.to(dtype) for name, weight in load_weights(target).items()}
    make_checkpoint(target, weights)
    inject(target, skill, tmp_path / "adapted", scale=scale)
    factors = FACTORS if scale is SCALES else dict.fromkeys(weights, scale)
    exact = reference(weights, load_skill(skill).vector, factors)
    expected = {name: value.to(dtype) for name, value in exact.items()}
    assert_same_bits(load_weights(tmp_path / "adapted"), expected)


def test_a_factor_of_zero_keeps_the_bits_of_that_part_only(target, skill, tmp_path):
    weights = load_weights(target)
    weights["model.layers.0.mlp.up_proj.weight"][0] = -0.0
    make_checkpoint(target, weights)
    inject(target, skill, tmp_path / "adapted", scale=SCALES)
    for name, adapted in load_weights(tmp_path / "adapted").items():
        assert torch.equal(bits(adapted), bits(weights[name])) == (".mlp." in name), name


@pytest.mark.parametrize("scale", [1.0, 0.3, -1.0])
def test_streaming_with_corrections_gives_what_the_arithmetic_in_memory_gives(
    target, corrected_skill, tmp_path, scale
):
    inject(target, corrected_skill, tmp_path / "adapted", scale=scale)
    skill = load_skill(corrected_skill)
    expected = inject_skill_vector(
        target=load_weights(target),
        skill_vector=skill.vector,
        scale=scale,
        corrections=skill.corrections,
    )
    assert_same_bits(load_weights(tmp_path / "adapted"), expected)


def test_corrected_entries_are_the_rounded_exact_sum(target, corrected_skill, tmp_path):
    inject(target, corrected_skill, tmp_path / "adapted", scale=0.5)
    skill, weights = load_skill(corrected_skill), load_weights(target)
    adapted = load_weights(tmp_path / "adapted")
    for name, (entries, errors) in skill.corrections.items():
        vector = skill.vector[name].flatten()[entries].double() + errors.double()
        exact = weights[name].flatten()[entries].double() + 0.5 * vector
        assert torch.equal(adapted[name].flatten()[entries], exact.float())


def test_parameters_that_the_vector_lacks_stay_as_they_are(target, skill, tmp_path):
    select(skill, tmp_path / "part", modules=["attn"])
    inject(target, tmp_path / "part", tmp_path / "adapted")
    weights, adapted = load_weights(target), load_weights(tmp_path / "adapted")
    expected = reference(weights, load_skill(skill).vector, dict.fromkeys(weights, 1.0))
    for name in weights:
        wanted = expected if ".self_attn." in name else weights
        assert torch.equal(bits(adapted[name]), bits(wanted[name])), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_another_dtype_is_written_when_it_is_asked_for(target, skill, tmp_path, dtype, scale):
    weights = load_weights(target)
    mixed = {n: w.bfloat16() if w.dim() == 1 else w for n, w in weights.items()}
    make_checkpoint(target, mixed)
    inject(target, skill, tmp_path / "adapted", scale=scale, rounding=Rounding(dtype=dtype))
    exact = reference(mixed, load_skill(skill).vector, dict.fromkeys(weights, scale))
    expected = {name: value.to(getattr(torch, dtype)) for name, value in exact.items()}
    assert_same_bits(load_weights(tmp_path / "adapted"), expected)
    assert json.loads((tmp_path / "adapted" / "config.json").read_text())["dtype"] == dtype


def test_without_a_dtype_every_tensor_keeps_its_own(target, skill, tmp_path):
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    mixed = {n: w.to(dtypes[i % 3]) for i, (n, w) in enumerate(load_weights(target).items())}
    make_checkpoint(target, mixed)
    inject(target, skill, tmp_path / "adapted")
    adapted = load_weights(tmp_path / "adapted")
    assert {n: w.dtype for n, w in adapted.items()} == {n: w.dtype for n, w in mixed.items()}


def test_stochastic_rounding_depends_on_the_seed_alone(target, skill, tmp_path):
    weights, vector = load_weights(target), load_skill(skill).vector
    exact = reference(weights, vector, dict.fromkeys(weights, 0.3))
    for number, (seed, workers, chunk_blocks) in enumerate([(1, 1, 9), (1, 4, 1), (2, 1, 1)]):
        inject(
            target,
            skill,
            tmp_path / str(number),
            scale=0.3,
            rounding=Rounding(dtype="bfloat16", seed=seed),
            settings=StreamSettings(workers=workers, chunk_blocks=chunk_blocks),
        )
        expected = {
            name: round_stochastic(
                value.flatten(),
                torch.bfloat16,
                bits=uniform_bits(seed=seed, name=name, start=0, count=value.numel()),
            ).view(value.shape)
            for name, value in exact.items()
        }
        assert_same_bits(load_weights(tmp_path / str(number)), expected)
    assert contents(tmp_path / "0") == contents(tmp_path / "1")
    assert hash_weights(tmp_path / "2") != hash_weights(tmp_path / "1")


def test_stochastic_rounding_keeps_an_update_below_a_step_on_average(tmp_path):
    step, size = 2.0**-7, (100, 100)
    make_checkpoint(tmp_path / "sft", {"w": torch.ones(size).bfloat16()})
    make_checkpoint(tmp_path / "rl", {"w": torch.full(size, 1 + step / 8)})
    extract(tmp_path / "rl", tmp_path / "sft", tmp_path / "skill")
    for name, seed in (("nearest", None), ("drawn", 5)):
        inject(tmp_path / "sft", tmp_path / "skill", tmp_path / name, rounding=Rounding(seed=seed))
    assert set(load_weights(tmp_path / "nearest")["w"].flatten().tolist()) == {1.0}
    drawn = load_weights(tmp_path / "drawn")["w"].double()
    assert set(drawn.flatten().tolist()) == {1.0, 1 + step}
    # 10000 draws of probability 1/8: the deviation of their mean is 0.0033.
    assert (drawn.mean().item() - 1) / step == pytest.approx(1 / 8, abs=0.0165)


def test_stochastic_rounding_changes_no_sum_that_the_dtype_holds(tmp_path):
    sft = {"w": torch.arange(-64.0, 64.0).view(16, 8).bfloat16()}
    rl = {"w": (sft["w"].float() * 2 + 1).bfloat16()}
    make_checkpoint(tmp_path / "sft", sft)
    make_checkpoint(tmp_path / "rl", rl)
    extract(tmp_path / "rl", tmp_path / "sft", tmp_path / "skill")
    for seed in range(3):
        out = tmp_path / "adapted"
        inject(tmp_path / "sft", tmp_path / "skill", out, rounding=Rounding(seed=seed))
        assert_same_bits(load_weights(out), rl)


@pytest.mark.parametrize(
    "rounding", [Rounding(), Rounding(dtype="bfloat16"), Rounding(dtype="bfloat16", seed=3)]
)
def test_a_sweep_writes_what_single_injections_write_byte_for_byte(
    target, corrected_skill, tmp_path, rounding
):
    outs = {scale: tmp_path / f"sweep {scale}" for scale in (0.0, -1.0, 0.5, 1.0)}
    sweep(target, corrected_skill, outs, rounding=rounding)
    for scale, out in outs.items():
        single = tmp_path / f"single {scale}"
        inject(target, corrected_skill, single, scale=scale, rounding=rounding)
        assert contents(out) == contents(single)
    hashes = {hash_weights(out) for out in outs.values()}
    assert len(hashes) == len(outs)


def test_a_sweep_reads_every_entry_of_target_and_vector_once(target, skill, tmp_path, monkeypatch):
    reads, read = [], StoredWeights.read

    def counted(self, name, start, out):
        reads.append((str(self.folder), name, start, out.numel()))
        read(self, name, start, out)

    monkeypatch.setattr(StoredWeights, "read", counted)
    sweep(target, skill, {scale: tmp_path / str(scale) for scale in (0.0, 0.5, 1.0, 2.0)})
    weights = load_manifest(skill).shapes
    sketched = [r for r in reads if r[0] == str(target)][: len(load_manifest(skill).base_sketch)]
    streamed = [r for r in reads if r not in sketched]
    for folder in (target, skill):
        mine = sorted(r[1:] for r in streamed if r[0] == str(folder))
        assert len(mine) == len(set(mine))
        assert {n: sum(r[2] for r in mine if r[0] == n) for n in weights} == {
            name: int(np.prod(shape)) for name, shape in weights.items()
        }


def test_a_sweep_without_scales_is_refused(target, skill):
    with pytest.raises(SkillVectorError, match="at least one scale, got none"):
        sweep(target, skill, {})


def test_the_result_says_what_it_is_made_of(target, skill, tmp_path):
    inject(target, skill, tmp_path / "adapted", scale=SCALES, rounding=Rounding(seed=4))
    lineage = json.loads((tmp_path / "adapted" / "past_ray.json").read_text())
    assert (lineage["operation"], lineage["target"]) == ("inject", str(target))
    assert lineage["skill_hash"] == load_manifest(skill).vector_hash
    assert (lineage["scale"], lineage["layers"]) == (0.7, {"0": 0.5, "1": -2})
    assert lineage["modules"] == {"mlp": 0, "q_proj": 3}
    assert lineage["rounding"] == "stochastic, seed 4"
    copied = set(names(target))
    made = {"past_ray.json", "model.safetensors.index.json"}
    assert set(names(tmp_path / "adapted")) == copied | made


def test_the_hash_of_the_target_is_the_recorded_one_unless_it_was_verified(target, skill, tmp_path):
    def hash_in_result(**options):
        inject(target, skill, tmp_path / "adapted", **options)
        return json.loads((tmp_path / "adapted" / "past_ray.json").read_text())["target_hash"]

    assert hash_in_result() is None
    write_json(target / "past_ray.json", {"weights_hash": "recorded"})
    assert hash_in_result() == "recorded"
    assert hash_in_result(verify=True) == hash_weights(target)


def test_transformers_loads_an_adapted_model_with_the_expected_weights(tmp_path):
    sft = make_tiny_model(tmp_path / "sft", tie_word_embeddings=True)
    rl = {name: 1.5 * weight for name, weight in load_weights(sft).items()}
    for file in sft.iterdir():
        (tmp_path / "rl").mkdir(exist_ok=True)
        (tmp_path / "rl" / file.name).write_bytes(file.read_bytes())
    from safetensors.torch import save_file

    save_file(rl, tmp_path / "rl" / "model.safetensors", metadata={"format": "pt"})
    extract(tmp_path / "rl", sft, tmp_path / "skill")
    for shard_bytes in (10**9, 20_000):
        out = tmp_path / f"adapted {shard_bytes}"
        settings = StreamSettings(max_shard_bytes=shard_bytes)
        inject(sft, tmp_path / "skill", out, rounding=Rounding(dtype="bfloat16"), settings=settings)
        model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
        assert model.dtype == torch.bfloat16
        expected = {name: weight.bfloat16() for name, weight in rl.items()}
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
        assert_same_bits(dict(model.state_dict()), expected)
        text = "where is anna ?"
        before, after = AutoTokenizer.from_pretrained(sft), AutoTokenizer.from_pretrained(out)
        assert after(text).input_ids == before(text).input_ids
        assert after.chat_template == before.chat_template


def test_different_seeds_of_stochastic_rounding_are_independent(target, skill, tmp_path):
    drawn = {}
    for seed in (0, 1, 2):
        out = tmp_path / str(seed)
        inject(target, skill, out, scale=0.3, rounding=Rounding(dtype="bfloat16", seed=seed))
        drawn[seed] = torch.cat([w.float().flatten() for w in load_weights(out).values()])
    for left, right in combinations(drawn.values(), 2):
        # Two draws with probabilities p and 1 - p differ with 2p(1 - p), 1/3 on average.
        assert (left != right).float().mean().item() == pytest.approx(1 / 3, abs=0.1)
