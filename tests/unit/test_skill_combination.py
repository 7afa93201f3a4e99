"""Sums, TIES and DARE of dense vectors, and what their results say."""

import numpy as np
import pytest
import torch

from past_ray.errors import SkillVectorError
from past_ray.skill import (
    MergeRule,
    Provenance,
    StreamSettings,
    combine,
    extract,
    inject,
    load_skill,
    select,
    verify,
)
from past_ray.skill.blocks import BLOCK
from past_ray.skill.checkpoint import load_weights
from tests.skill_folders import contents, nudged, random_tensors
from tests.skill_ingredients import (
    CUTS,
    one_fixture,  # noqa: F401
    sft_fixture,  # noqa: F401
    two_fixture,  # noqa: F401
    vector,
)
from tests.skill_models import (
    D1,
    Q0,
    Q1,
    SHAPES,
    SMALL,
    WIDE,
    is_absent,
    make_skill,
    make_skill_of,
    same_bits,
    unruly,
)


@pytest.fixture
def three(tmp_path):
    make_skill(tmp_path / "three", seed=3)
    return tmp_path / "three"


def flat(tensors):
    """All entries of a vector as one float32 array, in the order of the names."""
    return np.concatenate([tensors[name].reshape(-1).numpy() for name in sorted(tensors)])


# Linear


def test_linear_is_the_float32_sum_from_first_to_last(one, two, three, tmp_path):
    weights = (1.5, -0.7, 0.1)
    combine([one, two, three], tmp_path / "sum", weights=weights)
    a, b, c = (flat(vector(folder)) for folder in (one, two, three))
    x, y, z = (np.float32(weight) for weight in weights)
    expected = (x * a + y * b) + z * c
    assert expected.dtype == np.float32
    assert flat(vector(tmp_path / "sum")).tobytes() == expected.tobytes()


def test_weights_of_one_are_the_default(one, two, tmp_path):
    combine([one, two], tmp_path / "sum")
    combine([one, two], tmp_path / "ones", weights=[1.0, 1.0])
    assert contents(tmp_path / "sum") == contents(tmp_path / "ones")
    assert np.array_equal(flat(vector(tmp_path / "sum")), flat(vector(one)) + flat(vector(two)))


def test_a_vector_minus_itself_is_zero(one, tmp_path):
    manifest = combine([one, one], tmp_path / "nothing", weights=[1, -1])
    assert manifest.norm == 0
    assert not any(tensor.any() for tensor in vector(tmp_path / "nothing").values())


def test_one_vector_of_weight_one_comes_back_bit_for_bit(one, tmp_path):
    manifest = combine([one], tmp_path / "same", weights=[1.0])
    assert same_bits(vector(tmp_path / "same"), vector(one))
    assert manifest.vector_hash == load_skill(one).manifest.vector_hash


def test_injecting_a_sum_is_injecting_one_after_the_other(one, two, sft, tmp_path):
    combine([one, two], tmp_path / "sum", weights=[0.5, -2.0])
    inject(sft, tmp_path / "sum", tmp_path / "at once")
    inject(sft, one, tmp_path / "first", scale=0.5)
    inject(tmp_path / "first", two, tmp_path / "second", scale=-2.0)
    at_once, after = load_weights(tmp_path / "at once"), load_weights(tmp_path / "second")
    for name, tensor in at_once.items():
        assert (tensor - after[name]).abs().max() < 1e-6
        assert (tensor - load_weights(sft)[name]).abs().max() > 0.01


# TIES


def ties_by_the_paper(vectors, weights, density):
    """Section 4 of the paper on whole flat vectors; each is trimmed among its own entries.

    ``vectors`` maps every vector's entries, NaN where it has none.
    """
    trimmed = []
    for values in vectors:
        magnitudes = np.sort(np.abs(values[~np.isnan(values)]))
        num_kept = max(1, round(density * len(magnitudes)))
        kept = np.abs(values) >= magnitudes[-num_kept]
        trimmed.append(np.where(kept, values, 0).astype(np.float64))
    masses = [weight * values for weight, values in zip(weights, trimmed, strict=True)]
    sign = np.sign(sum(masses))
    agrees = [(np.sign(values) == sign) & (sign != 0) for values in trimmed]
    total = sum(np.where(ok, mass, 0) for ok, mass in zip(agrees, masses, strict=True))
    weight = sum(ok * weight for ok, weight in zip(agrees, weights, strict=True))
    return np.divide(total, weight, out=np.zeros_like(total), where=weight > 0).astype(np.float32)


@pytest.mark.parametrize(("weights", "density"), [((1, 1, 1), 0.2), ((2, 0.5, 1), 0.03)])
def test_ties_is_the_papers_formula_on_the_whole_vectors(
    weights, density, one, two, three, tmp_path
):
    rule = MergeRule(method="ties", density=density)
    combine([one, two, three], tmp_path / "ties", weights=weights, rule=rule)
    flats = [flat(vector(folder)) for folder in (one, two, three)]
    expected = ties_by_the_paper(flats, weights, density)
    found = flat(vector(tmp_path / "ties"))
    assert 0.5 * density < np.count_nonzero(expected) / len(expected) < 3 * density
    np.testing.assert_allclose(found, expected, rtol=2e-7, atol=0)


def test_ties_trims_over_all_tensors_at_once(tmp_path):
    """Where one tensor moved a thousand times more, the others are trimmed away completely."""
    base = random_tensors(0, SMALL)
    loud = nudged(base, seed=1, by=1e-3) | {Q0: nudged(base, seed=1, by=100.0)[Q0]}
    make_skill_of(tmp_path / "skill", rl=loud, sft=base)
    density = 0.5 * base[Q0].numel() / sum(tensor.numel() for tensor in base.values())
    rule = MergeRule(method="ties", density=density)
    combine([tmp_path / "skill"], tmp_path / "ties", rule=rule)
    merged = vector(tmp_path / "ties")
    assert {name for name, tensor in merged.items() if tensor.any()} == {Q0}
    assert torch.count_nonzero(merged[Q0]) == base[Q0].numel() // 2


def test_ties_with_density_one_is_the_mean_of_those_that_agree(one, two, tmp_path):
    combine([one, two], tmp_path / "ties", rule=MergeRule(method="ties", density=1.0))
    a, b = flat(vector(one)).astype(np.float64), flat(vector(two)).astype(np.float64)
    stronger = np.where(a + b == 0, 0, np.where(np.abs(a) > np.abs(b), a, b))
    expected = np.where(a * b > 0, (a + b) / 2, stronger).astype(np.float32)
    np.testing.assert_allclose(flat(vector(tmp_path / "ties")), expected, rtol=2e-7, atol=0)


def test_ties_refuses_a_negative_weight(one, two, tmp_path):
    with pytest.raises(SkillVectorError, match="Merge linearly to take a skill away"):
        combine([one, two], tmp_path / "x", weights=[1, -1], rule=MergeRule(method="ties"))
    assert is_absent(tmp_path / "x")


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, float("nan")])
def test_ties_refuses_a_density_that_is_no_share(density, one, two, tmp_path):
    with pytest.raises(SkillVectorError, match=r"density must be in \(0, 1\]"):
        combine([one, two], tmp_path / "x", rule=MergeRule(method="ties", density=density))
    assert is_absent(tmp_path / "x")


# DARE


def dare(folders, out, *, seed=0, drop_rate=0.9, weights=None):
    rule = MergeRule(method="dare", drop_rate=drop_rate, seed=seed)
    combine(folders, out, weights=weights, rule=rule)
    return flat(vector(out))


def test_dare_drops_the_given_share_and_rescales_the_rest(one, tmp_path):
    before = flat(vector(one))
    after = dare([one], tmp_path / "dare", drop_rate=0.8)
    dropped = after == 0
    # Five standard deviations of a binomial share.
    assert abs(dropped.mean() - 0.8) < 5 * np.sqrt(0.8 * 0.2 / len(before))
    np.testing.assert_allclose(after[~dropped], before[~dropped] / 0.2, rtol=1e-6)


def test_the_mean_of_dare_over_seeds_is_the_vector(tmp_path):
    make_skill(tmp_path / "skill", seed=1, shapes=SMALL)
    before, num_seeds = flat(vector(tmp_path / "skill")), 64
    drawn = [
        dare([tmp_path / "skill"], tmp_path / "dare", drop_rate=0.5, seed=s)
        for s in range(num_seeds)
    ]
    # Each entry is 0 or 2 v: its mean over the seeds is off by v / sqrt(64) on average.
    off = (np.mean(drawn, axis=0) - before) / np.abs(before)
    assert np.sqrt(np.mean(off**2)) < 1.1 / np.sqrt(num_seeds)
    assert abs(np.mean(off)) < 5 / np.sqrt(num_seeds * len(before))


def test_dare_drops_other_entries_of_every_vector_tensor_and_block(one, two, tmp_path):
    both = dare([one, two], tmp_path / "both", drop_rate=0.5)
    assert abs((both == 0).mean() - 0.25) < 0.01
    kept = vector(tmp_path / "both")
    # Masks that are independent agree where both are set, 1/16, and where neither is, 9/16.
    assert share_of_agreement(kept[Q0], kept[Q1]) == pytest.approx(10 / 16, abs=0.12)
    first, second = (kept[WIDE].view(-1)[start : start + BLOCK] for start in (0, BLOCK))
    assert share_of_agreement(first, second) == pytest.approx(10 / 16, abs=0.01)


def share_of_agreement(left, right):
    """Share of entries that are zero in both or in neither."""
    return ((left == 0) == (right == 0)).double().mean().item()


def test_the_seed_decides_what_dare_drops(one, two, tmp_path):
    first = dare([one, two], tmp_path / "first", seed=3)
    assert np.array_equal(first, dare([one, two], tmp_path / "again", seed=3))
    other = dare([one, two], tmp_path / "other", seed=4)
    # Both vectors are dropped at both seeds with probability 0.9**4.
    assert abs(((first == 0) & (other == 0)).mean() - 0.9**4) < 0.01


def test_dare_weighs_what_is_left(one, two, tmp_path):
    weighted = dare([one, two], tmp_path / "weighted", weights=[0.5, -3.0])
    parts = [dare([one], tmp_path / "a"), dare([two], tmp_path / "b")]
    # Alone, the second vector is number 0 and loses other entries; the first one is comparable.
    only_first = (weighted != 0) & (np.abs(weighted - 0.5 * parts[0]) < 1e-7)
    assert only_first.sum() > 0.8 * np.count_nonzero(parts[0])


@pytest.mark.parametrize("drop_rate", [1.0, -0.1, float("nan")])
def test_dare_refuses_to_drop_everything_or_less_than_nothing(drop_rate, one, tmp_path):
    with pytest.raises(SkillVectorError, match=r"drop_rate must be in \[0, 1\)"):
        dare([one], tmp_path / "x", drop_rate=drop_rate)
    assert is_absent(tmp_path / "x")


# The same bytes however the work is cut


@pytest.mark.parametrize("method", ["linear", "ties", "dare"])
def test_workers_and_chunks_do_not_change_a_byte(method, one, two, tmp_path):
    folders = []
    for workers, chunk_blocks in CUTS:
        folders.append(tmp_path / f"cut {workers} {chunk_blocks}")
        combine(
            [one, two],
            folders[-1],
            weights=[1.0, 0.3],
            rule=MergeRule(method=method),
            settings=StreamSettings(workers=workers, chunk_blocks=chunk_blocks),
        )
    first = contents(folders[0])
    assert {"model.safetensors", "skill.json", "README.md"} <= first.keys()
    assert all(contents(folder) == first for folder in folders[1:])


def test_shards_hold_the_same_vector(one, two, tmp_path):
    whole = combine([one, two], tmp_path / "whole")
    cut = combine(
        [one, two], tmp_path / "cut", settings=StreamSettings(max_shard_bytes=2000, workers=2)
    )
    assert len(list((tmp_path / "cut").glob("model-*.safetensors"))) > 3
    assert cut.vector_hash == whole.vector_hash
    assert same_bits(vector(tmp_path / "cut"), vector(tmp_path / "whole"))


# Other parameters


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_part_counts_as_zero_where_it_has_nothing(method, one, two, tmp_path):
    select(two, tmp_path / "part", layers="1")
    rule = MergeRule(method=method, density=0.3)
    combine([one, tmp_path / "part"], tmp_path / "out", weights=[1, 0.5], rule=rule)
    whole, part, merged = vector(one), vector(tmp_path / "part"), vector(tmp_path / "out")
    assert part.keys() == {Q1, D1}
    assert merged.keys() == whole.keys()
    nan = {name: torch.full_like(tensor, torch.nan) for name, tensor in whole.items()}
    flats = [flat(whole), flat(nan | part)]
    if method == "ties":
        expected = ties_by_the_paper(flats, [1, 0.5], 0.3)
    else:
        expected = flats[0] + np.nan_to_num(flats[1]) * np.float32(0.5)
    np.testing.assert_allclose(flat(merged), expected, rtol=2e-7, atol=0)


def test_two_parts_without_a_common_parameter_are_put_side_by_side(one, tmp_path):
    select(one, tmp_path / "first", layers="0")
    select(one, tmp_path / "second", layers="1")
    combine([tmp_path / "second", tmp_path / "first"], tmp_path / "both")
    both, whole = vector(tmp_path / "both"), vector(one)
    assert any((tensor == 0).any() for tensor in whole.values())
    # Bit for bit: an unchanged entry is -0.0, which alone leaves every weight as it is.
    assert same_bits(both, {name: whole[name] for name in whole if ".layers." in name})


@pytest.mark.parametrize("method", ["linear", "ties", "dare"])
def test_a_tensor_without_entries_goes_through(method, tmp_path):
    for seed, name in enumerate(("a", "b")):
        make_skill(tmp_path / name, seed=seed, shapes=SMALL | {"model.empty.weight": (0, 4)})
    skills = [tmp_path / "a", tmp_path / "b"]
    manifest = combine(skills, tmp_path / "out", rule=MergeRule(method=method))
    assert manifest.tensors["model.empty.weight"].norm == 0
    assert vector(tmp_path / "out")["model.empty.weight"].shape == (0, 4)


# What the result says and does


def test_the_manifest_names_ingredients_weights_and_operation(one, two, tmp_path):
    hashes = []
    for refinement_round, (skill, task) in enumerate(((one, "world"), (two, "squad")), start=1):
        provenance = Provenance(task=task, refinement_round=refinement_round)
        parents = skill.with_suffix(".rl"), skill.with_suffix(".sft")
        hashes.append(extract(*parents, skill, provenance=provenance).vector_hash)
    manifest = combine([one, two], tmp_path / "sum", weights=[1, -0.5])
    assert [(i.vector_hash, i.weight, i.task) for i in manifest.ingredients] == [
        (hashes[0], 1.0, "world"),
        (hashes[1], -0.5, "squad"),
    ]
    assert (manifest.operation, manifest.task) == ("combine linear", "world+squad")
    assert manifest.refinement_round == 2
    assert (manifest.rl_hash, manifest.sft_hash, manifest.rl_path) == (None, None, None)
    readme = (tmp_path / "sum" / "README.md").read_text()
    assert f"{hashes[1]} * -0.5" in readme


@pytest.mark.parametrize(
    ("rule", "operation"),
    [
        (MergeRule(method="ties", density=0.25), "combine ties density 0.25"),
        (MergeRule(method="dare", drop_rate=0.5, seed=7), "combine dare drop_rate 0.5 seed 7"),
    ],
)
def test_the_operation_holds_its_settings(rule, operation, one, tmp_path):
    assert combine([one], tmp_path / "x", rule=rule).operation == operation


@pytest.mark.parametrize("method", ["linear", "ties", "dare"])
def test_a_combination_verifies_and_is_injected_entry_by_entry(method, one, two, sft, tmp_path):
    manifest = combine([one, two], tmp_path / "x", rule=MergeRule(method=method))
    found = verify(tmp_path / "x")
    assert (found.vector_hash, found.num_tensors) == (manifest.vector_hash, len(SHAPES))
    inject(sft, tmp_path / "x", tmp_path / "adapted", scale=-0.5)
    before, merged = load_weights(sft), vector(tmp_path / "x")
    expected = {name: before[name] + merged[name] * -0.5 for name in before}
    assert same_bits(load_weights(tmp_path / "adapted"), expected)


def test_combinations_combine_again(one, two, three, tmp_path):
    combine([one, two], tmp_path / "first")
    manifest = combine([tmp_path / "first", three], tmp_path / "second")
    assert (
        manifest.ingredients[0].vector_hash == load_skill(tmp_path / "first").manifest.vector_hash
    )
    expected = flat(vector(one)) + flat(vector(two)) + flat(vector(three))
    assert np.array_equal(flat(vector(tmp_path / "second")), expected)


def test_without_corrections_a_combination_is_off_by_one_rounding_of_the_difference(tmp_path):
    before = random_tensors(0, SMALL)
    after = unruly(before, seed=1)
    make_skill_of(tmp_path / "skill", rl=after, sft=before)
    combine([tmp_path / "skill"], tmp_path / "same")
    inject(tmp_path / "skill.sft", tmp_path / "same", tmp_path / "adapted")
    for name, found in load_weights(tmp_path / "adapted").items():
        exact = after[name].double() - before[name].double()
        # Half a step of the rounded difference, and half a step of the rounded sum.
        allowed = 2**-24 * (exact.abs() + after[name].abs())
        assert ((found.double() - after[name].double()).abs() <= allowed).all()
