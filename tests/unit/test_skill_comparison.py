import json
import math

import matplotlib.image
import numpy as np
import pytest
import torch

from past_ray.cli.skill_tables import comparison_json, plot_comparisons, print_comparisons
from past_ray.errors import SkillVectorError
from past_ray.skill import StreamSettings, compare, extract, load_skill, select
from past_ray.skill.geometry import cosine_table, mean_cosine
from past_ray.skill.stream import cut
from tests.skill_folders import flip_byte, nudged, random_tensors
from tests.skill_models import (
    D1,
    Q0,
    SHAPES,
    SMALL,
    WIDE,
    make_adapter,
    make_model,
    make_skill,
    make_skill_of,
)


@pytest.fixture
def one(tmp_path):
    make_skill(tmp_path / "one", seed=1)
    return tmp_path / "one"


@pytest.fixture
def two(tmp_path):
    make_skill(tmp_path / "two", seed=2, by=0.03)
    return tmp_path / "two"


def related(folder, *, seed, common, own):
    """Write a vector of ``common * c + own * noise``; ``c`` is the same for every seed."""
    sft = random_tensors(0, SMALL)
    shared, noise = random_tensors(77, SMALL), random_tensors(seed, SMALL)
    rl = {name: sft[name] + common * shared[name] + own * noise[name] for name in sft}
    make_skill_of(folder, rl=rl, sft=sft)
    return folder


def opposite(folder, out):
    """Write the vector of the exchanged parents: minus the one in ``folder``."""
    extract(folder.with_suffix(".sft"), folder.with_suffix(".rl"), out)
    return out


def as_dicts(rows):
    return {(row.layer, row.module): row for row in rows}


def assert_same_rows(found, expected):
    assert [(row.layer, row.module) for row in found] == [
        (row.layer, row.module) for row in expected
    ]
    for left, right in zip(found, expected, strict=True):
        assert left.cosine == pytest.approx(right.cosine, rel=1e-9, abs=1e-12)
        assert left.norm_a == pytest.approx(right.norm_a, rel=1e-12)
        assert left.norm_b == pytest.approx(right.norm_b, rel=1e-12)


# Cosines


def test_rows_and_mean_are_those_of_the_table_in_memory(one, two):
    (found,) = compare([one, two])
    expected = cosine_table(load_skill(one).vector, load_skill(two).vector)
    assert_same_rows(found.rows, expected)
    assert found.mean == pytest.approx(mean_cosine(expected), rel=1e-9)
    assert (found.left, found.right) == (str(one), str(two))


def test_the_cosine_of_the_whole_vectors_is_that_of_their_entries(one, two):
    a, b = (load_skill(folder).vector for folder in (one, two))
    flat_a, flat_b = (torch.cat([x[n].double().reshape(-1) for n in sorted(x)]) for x in (a, b))
    expected = torch.dot(flat_a, flat_b) / (flat_a.norm() * flat_b.norm())
    (found,) = compare([one, two])
    assert found.overall == pytest.approx(expected.item(), rel=1e-9)


def test_a_vector_has_cosine_1_to_itself_and_minus_1_to_its_opposite(one, tmp_path):
    same, other = compare([one, one, opposite(one, tmp_path / "opposite")])[:2]
    assert all(row.cosine == pytest.approx(1, abs=1e-12) for row in same.rows)
    assert all(row.cosine == pytest.approx(-1, abs=1e-12) for row in other.rows)
    assert (same.mean, same.overall) == pytest.approx((1, 1), abs=1e-12)
    assert (other.mean, other.overall) == pytest.approx((-1, -1), abs=1e-12)


def test_biases_count_for_the_whole_but_have_no_row(one, two):
    (found,) = compare([one, two])
    assert len(found.rows) == len([name for name in SHAPES if name.endswith(".weight")])
    assert as_dicts(found.rows).keys() == {
        (None, "embed_tokens"),
        (None, "norm"),
        (0, "down_proj"),
        (0, "input_layernorm"),
        (0, "q_proj"),
        (1, "down_proj"),
        (1, "q_proj"),
    }


# The control


def test_two_related_vectors_stand_out_from_unrelated_ones(tmp_path):
    """Shares 0.8 and 0.6 of the norm: cosine 0.64 between the related, 0 to the stranger."""
    a = related(tmp_path / "a", seed=1, common=0.008, own=0.006)
    b = related(tmp_path / "b", seed=2, common=0.008, own=0.006)
    stranger = related(tmp_path / "c", seed=3, common=0.0, own=0.01)
    skill_and_control, *others = compare([a, b, stranger])
    assert skill_and_control.mean == pytest.approx(0.64, abs=0.05)
    assert skill_and_control.overall == pytest.approx(0.64, abs=0.05)
    for found in others:
        assert abs(found.mean) < 0.08
        assert abs(found.overall) < 0.08


def test_several_vectors_give_every_pair_in_order(one, two, tmp_path):
    make_skill(tmp_path / "three", seed=3)
    make_skill(tmp_path / "four", seed=4)
    folders = [one, two, tmp_path / "three", tmp_path / "four"]
    found = compare(folders)
    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert [(c.left, c.right) for c in found] == [
        (str(folders[a]), str(folders[b])) for a, b in pairs
    ]
    for comparison, (left, right) in zip(found, pairs, strict=True):
        (alone,) = compare([folders[left], folders[right]])
        assert alone == comparison


def test_workers_and_chunks_do_not_change_a_bit(one, two):
    found = [
        compare([one, two], settings=StreamSettings(workers=workers, chunk_blocks=chunk_blocks))
        for workers, chunk_blocks in [(1, 1), (2, 2), (3, 3), (4, 4), (2, 5)]
    ]
    assert len(list(cut({WIDE: SHAPES[WIDE]}, chunk_blocks=5))) == 2
    assert all(each == found[0] for each in found[1:])


# Parts and forms


def test_only_what_both_vectors_have_is_compared(one, two, tmp_path):
    select(one, tmp_path / "part", layers="0")
    part, whole = load_skill(tmp_path / "part").vector, load_skill(two).vector
    (found,) = compare([tmp_path / "part", two])
    assert_same_rows(found.rows, cosine_table(part, {name: whole[name] for name in part}))


def test_vectors_without_a_common_parameter_have_no_cosine(one, tmp_path, capsys):
    select(one, tmp_path / "first", layers="0")
    select(one, tmp_path / "second", layers="1")
    found = compare([tmp_path / "first", tmp_path / "second"])
    assert found[0].rows == []
    assert math.isnan(found[0].mean)
    assert math.isnan(found[0].overall)
    values = json.loads(json.dumps(comparison_json(found), allow_nan=False))
    assert (values[0]["mean"], values[0]["overall"]) == (None, None)
    print_comparisons(found)
    assert "nan" not in capsys.readouterr().out


def test_a_parameter_that_did_not_change_has_no_direction(one, tmp_path):
    sft = random_tensors(0, SHAPES)
    make_skill_of(tmp_path / "still", rl=nudged(sft, seed=5) | {Q0: sft[Q0]}, sft=sft)
    (found,) = compare([one, tmp_path / "still"])
    rows = as_dicts(found.rows)
    assert math.isnan(rows[0, "q_proj"].cosine)
    assert rows[0, "q_proj"].norm_b == 0
    cosines = [row.cosine for row in found.rows if row.module in ("q_proj", "down_proj")]
    assert found.mean == pytest.approx(np.nanmean(cosines))
    assert comparison_json([found])[0]["rows"][2]["cosine"] is None


def test_an_adapter_is_compared_as_its_dense_form(one, tmp_path):
    sft = make_model(tmp_path / "sft", seed=7)
    make_adapter(tmp_path / "adapter", Q0, WIDE, D1, seed=3)
    extract(tmp_path / "adapter", sft, tmp_path / "lora")
    (found,) = compare([one, tmp_path / "lora"])
    dense, low = load_skill(one).vector, load_skill(tmp_path / "lora").vector
    assert_same_rows(found.rows, cosine_table({name: dense[name] for name in low}, low))


# Output


def test_the_plot_is_a_picture_with_a_heat_map_of_every_pair(one, two, tmp_path):
    make_skill(tmp_path / "three", seed=3)
    plot_comparisons(compare([one, two]), tmp_path / "new" / "pair.png")
    plot_comparisons(compare([one, two, tmp_path / "three"]), tmp_path / "all.png")
    content = (tmp_path / "new" / "pair.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    pair, every = (matplotlib.image.imread(tmp_path / f) for f in ("new/pair.png", "all.png"))
    assert pair.size > 100_000
    # Heat maps are colourful; text and axes are grey.
    coloured = [int((np.ptp(image[..., :3], -1) > 0.05).sum()) for image in (pair, every)]
    assert coloured[0] > 10_000
    assert coloured[1] > 1.5 * coloured[0]


def test_vectors_without_a_common_parameter_can_be_plotted(one, tmp_path):
    select(one, tmp_path / "first", layers="0")
    select(one, tmp_path / "second", layers="1")
    plot_comparisons(compare([tmp_path / "first", tmp_path / "second"]), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_folders_of_the_same_name_are_told_apart(tmp_path, capsys, monkeypatch):
    """Runs keep their vectors under one name, as runs/NAME/skill."""
    for seed, run in enumerate(("world", "squad", "control")):
        (tmp_path / run).mkdir()
        make_skill(tmp_path / run / "skill", seed=seed, shapes=SMALL)
    found = compare([tmp_path / run / "skill" for run in ("world", "squad", "control")])
    titles = []
    monkeypatch.setattr(
        "past_ray.pipelines.plots.draw_cosines", lambda _, tables: titles.extend(tables)
    )
    plot_comparisons(found, tmp_path / "plot.png")
    print_comparisons(found)
    shown = capsys.readouterr().out
    assert len(titles) == 3, "one heat map for each pair"
    assert all(run in shown for run in ("world", "squad", "control"))


def test_the_tables_show_layers_modules_and_every_pair(one, two, tmp_path, capsys):
    make_skill(tmp_path / "three", seed=3)
    found = compare([one, two, tmp_path / "three"])
    print_comparisons(found)
    shown = capsys.readouterr().out
    assert "Cosines of one and two" in shown
    assert f"{as_dicts(found[0].rows)[1, 'q_proj'].cosine:+.4f}" in shown
    for comparison in found:
        assert f"{comparison.mean:+.5f}" in shown
        assert f"{comparison.overall:+.5f}" in shown


# What is refused


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_vectors_are_refused(count, one):
    with pytest.raises(SkillVectorError, match=f"at least two skill vectors, got {count}"):
        compare([one] * count)


def test_another_architecture_is_refused(one, tmp_path):
    parents = [make_model(tmp_path / role, seed=5, model_type="other") for role in ("rl", "sft")]
    extract(*parents, tmp_path / "other")
    with pytest.raises(SkillVectorError, match="model_type is qwen2 and other"):
        compare([one, tmp_path / "other"])


def test_another_shape_is_refused_by_name(one, two, tmp_path):
    weights = random_tensors(0, SHAPES) | {Q0: torch.ones(24, 17)}
    make_skill_of(tmp_path / "other", rl=weights, sft=weights)
    with pytest.raises(SkillVectorError, match=r"0\.self_attn\.q_proj\.weight \(24, 16\)"):
        compare([one, two, tmp_path / "other"])


def test_a_damaged_vector_is_refused_by_name(one, two):
    flip_byte(two / "model.safetensors", -1)
    with pytest.raises(SkillVectorError, match=r"two .*model\.norm\.weight"):
        compare([one, two])
