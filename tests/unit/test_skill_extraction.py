import logging
import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from past_ray.errors import SkillVectorError, StorageError
from past_ray.skill import (
    Provenance,
    StreamSettings,
    blocks,
    extract,
    inject,
    load_manifest,
    load_skill,
)
from past_ray.skill.checkpoint import load_weights
from tests.skill_folders import (
    assert_same_bits,
    contents,
    make_checkpoint,
    names,
    nudged,
    random_tensors,
)

BLOCK = 8
"""Entries of a block in the property test, so that small tensors have several."""

LIMITS = {torch.float32: 2.0**126, torch.bfloat16: 2.0**126, torch.float16: 6e4}
"""Up to here neither the difference of two weights nor its rounding overflows."""

SHAPES_AROUND_BLOCKS = st.sampled_from(
    [(), (0,), (1,), (7,), (8,), (9,), (0, 3), (3, 0), (2, 4), (3, 8), (5, 5), (2, 3, 7), (41,)]
)
DTYPES = st.sampled_from(list(LIMITS))


def wild_numbers(shape, dtype, generator):
    """Draw bit patterns: all exponents, subnormals, zeros of both signs."""
    width = 16 if dtype.itemsize == 2 else 32
    drawn = torch.randint(-(2 ** (width - 1)), 2 ** (width - 1), shape, generator=generator)
    values = drawn.to(torch.int16 if width == 16 else torch.int32).view(dtype)
    return torch.where(values.abs().float() <= LIMITS[dtype], values, torch.tensor(-0.0).to(dtype))


def relative_of(sft, dtype, generator):
    """Draw RL weights: equal, of opposite sign, close, of another size, unrelated, or zero."""
    noise = torch.randn(sft.shape, generator=generator, dtype=torch.float64)
    wide = sft.double()
    kinds = [wide, -wide, wide * (1 + noise / 1000), wide * noise, torch.full_like(wide, -0.0)]
    kinds.append(wild_numbers(sft.shape, dtype, generator).double())
    chosen = torch.randint(0, len(kinds), sft.shape, generator=generator)
    drawn = torch.stack(kinds).gather(0, chosen[None])[0]
    limit = min(LIMITS[dtype], LIMITS[sft.dtype])
    return drawn.clamp(-limit, limit).to(dtype)


@st.composite
def parents(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    shapes = draw(st.lists(SHAPES_AROUND_BLOCKS, min_size=1, max_size=5))
    sft = {f"w{n}": wild_numbers(s, draw(DTYPES), generator) for n, s in enumerate(shapes)}
    return {n: relative_of(w, draw(DTYPES), generator) for n, w in sft.items()}, sft


@given(
    parents=parents(),
    shard_bytes=st.tuples(*[st.none() | st.integers(1, 200)] * 2),
    workers=st.integers(1, 4),
    chunk_blocks=st.integers(1, 5),
)
@settings(max_examples=60)
def test_extract_then_inject_on_the_sft_parent_gives_the_rl_weights_bit_for_bit(
    parents, shard_bytes, workers, chunk_blocks
):
    rl, sft = parents
    options = StreamSettings(workers=workers, chunk_blocks=chunk_blocks)
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK", BLOCK)
        folder = Path(name)
        make_checkpoint(folder / "rl", rl, shard_bytes=shard_bytes[0])
        make_checkpoint(folder / "sft", sft, shard_bytes=shard_bytes[1])
        extract(folder / "rl", folder / "sft", folder / "skill", settings=options)
        for scale in (1.0, 0.0):
            inject(
                folder / "sft",
                folder / "skill",
                folder / f"at {scale}",
                scale=scale,
                allow_other_base=True,
                settings=options,
            )
        assert_same_bits(load_weights(folder / "at 0.0"), sft)
        rounded = {name: rl[name].float().to(sft[name].dtype) for name in sft}
        assert_same_bits(load_weights(folder / "at 1.0"), rounded)
        vector = load_skill(folder / "skill").vector
        for name in sft:
            wide = rl[name].double() - sft[name].double()
            assert torch.equal(vector[name], wide.float()), name


@pytest.mark.parametrize("size", [2**18 - 1, 2**18, 2**18 + 1, 2 * 2**18 + 3])
def test_the_round_trip_is_exact_around_the_true_size_of_a_block(tmp_path, size):
    generator = torch.Generator().manual_seed(size)
    sft = {"w": torch.randn(size, generator=generator)}
    rl = {"w": sft["w"] * torch.randn(size, generator=generator)}
    make_checkpoint(tmp_path / "sft", sft)
    make_checkpoint(tmp_path / "rl", rl)
    options = StreamSettings(workers=2, chunk_blocks=1)
    manifest = extract(tmp_path / "rl", tmp_path / "sft", tmp_path / "skill", settings=options)
    inject(tmp_path / "sft", tmp_path / "skill", tmp_path / "adapted", settings=options)
    assert_same_bits(load_weights(tmp_path / "adapted"), rl)
    assert manifest.tensors["w"].num_corrections > size // 10


@pytest.fixture
def sft(tmp_path):
    return make_checkpoint(tmp_path / "sft", random_tensors(0))


@pytest.fixture
def rl(sft, tmp_path):
    return make_checkpoint(tmp_path / "rl", nudged(load_weights(sft), 1))


def test_the_vector_on_disk_is_rl_minus_sft_in_float32(rl, sft, tmp_path):
    extract(rl, sft, tmp_path / "skill")
    after, before = load_weights(rl), load_weights(sft)
    expected = {name: after[name] - before[name] for name in after}
    assert_same_bits(load_file(tmp_path / "skill" / "model.safetensors"), expected)


def test_a_tied_head_is_not_part_of_the_vector(tmp_path):
    sft = random_tensors(0)
    rl = nudged(sft, 1)
    for weights in (sft, rl):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    del sft["lm_head.weight"]  # Stored by one parent only, as transformers versions differ.
    make_checkpoint(tmp_path / "sft", sft, config={"tie_word_embeddings": True})
    make_checkpoint(tmp_path / "rl", rl, config={"tie_word_embeddings": True})
    manifest = extract(tmp_path / "rl", tmp_path / "sft", tmp_path / "skill")
    inject(tmp_path / "sft", tmp_path / "skill", tmp_path / "adapted")
    assert sorted(manifest.tensors) == sorted(sft)
    del rl["lm_head.weight"]
    assert_same_bits(load_weights(tmp_path / "adapted"), rl)


def test_a_later_round_records_its_parent_and_subtracts_its_own_sft(rl, sft, tmp_path):
    first = extract(rl, sft, tmp_path / "first")
    second = extract(
        rl,
        sft,
        tmp_path / "second",
        provenance=Provenance(refinement_round=2),
        parent=tmp_path / "first",
    )
    assert second.parent_hash == first.vector_hash
    assert second.tensors == first.tensors


def test_a_parent_that_is_not_earlier_is_refused(rl, sft, tmp_path):
    extract(rl, sft, tmp_path / "first")
    with pytest.raises(SkillVectorError, match=r"got round 1 in .*first for round 1\. Give the"):
        extract(rl, sft, tmp_path / "second", parent=tmp_path / "first")
    assert not (tmp_path / "second").exists()


def test_a_parent_of_another_model_is_refused(rl, sft, tmp_path):
    extract(rl, sft, tmp_path / "first")
    for folder in (rl, sft):
        (folder / "chat_template.jinja").write_text("{{ other }}")
    provenance = Provenance(refinement_round=2)
    with pytest.raises(SkillVectorError, match=r"this round and parent .* chat_template is"):
        extract(rl, sft, tmp_path / "out", provenance=provenance, parent=tmp_path / "first")


def test_equal_parents_and_rounded_parents_are_warned_about(sft, tmp_path, caplog):
    half = {name: weight.bfloat16() for name, weight in load_weights(sft).items()}
    make_checkpoint(tmp_path / "half", half)
    with caplog.at_level(logging.WARNING):
        manifest = extract(tmp_path / "half", tmp_path / "half", tmp_path / "skill")
    assert "the vector is zero" in caplog.text
    assert "stored in bfloat16" in caplog.text
    assert "Save parents in float32" in caplog.text
    assert manifest.norm == 0
    assert all(r.num_unchanged == math.prod(r.shape) for r in manifest.tensors.values())


def test_float32_parents_that_differ_are_not_warned_about(rl, sft, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        extract(rl, sft, tmp_path / "skill")
    assert caplog.text == ""


def test_a_failed_extraction_keeps_the_previous_skill(rl, sft, tmp_path):
    extract(rl, sft, tmp_path / "skill")
    before = contents(tmp_path / "skill")
    (rl / "model.safetensors").unlink()
    with pytest.raises(StorageError):
        extract(rl, sft, tmp_path / "skill")
    assert contents(tmp_path / "skill") == before
    assert names(tmp_path) == ["rl", "sft", "skill"]


def test_weights_up_to_the_largest_float32_are_subtracted_and_recorded(tmp_path):
    largest = torch.finfo(torch.float32).max
    sft = {"w": torch.tensor([[largest, 1.0]])}
    rl = {"w": torch.tensor([[largest / 2, largest]])}
    make_checkpoint(tmp_path / "sft", sft)
    make_checkpoint(tmp_path / "rl", rl)
    manifest = extract(tmp_path / "rl", tmp_path / "sft", tmp_path / "skill")
    inject(tmp_path / "sft", tmp_path / "skill", tmp_path / "adapted")
    assert_same_bits(load_weights(tmp_path / "adapted"), rl)
    assert load_manifest(tmp_path / "skill") == manifest


def test_a_truncated_svd_keeps_the_matrices_of_layers_and_says_what_it_left_out(
    rl, sft, tmp_path, caplog
):
    with caplog.at_level(logging.WARNING):
        manifest = extract(rl, sft, tmp_path / "skill", rank=6)
    matrices = [n for n, t in load_weights(sft).items() if ".layers." in n and t.dim() == 2]
    after, before = load_weights(rl), load_weights(sft)
    assert sorted(manifest.tensors) == sorted(matrices)
    assert (manifest.form, manifest.operation) == ("lora", "truncated_svd rank 6")
    assert "4 other tensors are left out (first: lm_head.weight" in caplog.text
    for name, found in load_skill(tmp_path / "skill").vector.items():
        # The rank is full: nothing but rounding is lost.
        assert torch.allclose(found, after[name] - before[name], atol=1e-7)
        assert manifest.tensors[name].energy_kept == pytest.approx(1.0)


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_refused(rl, sft, tmp_path, rank):
    with pytest.raises(SkillVectorError, match=f"rank must be at least 1, got {rank}"):
        extract(rl, sft, tmp_path / "skill", rank=rank)
    assert names(tmp_path) == ["rl", "sft"]
