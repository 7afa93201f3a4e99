"""Combinations of vectors some of which are adapters."""

import pytest
import torch

from past_ray.skill import MergeRule, StreamSettings, combine, extract, verify
from tests.skill_folders import contents
from tests.skill_ingredients import (
    CUTS,
    one_fixture,  # noqa: F401
    sft_fixture,  # noqa: F401
    vector,
)
from tests.skill_models import D1, Q0, SHAPES, WIDE, make_adapter


def adapter_skill(folder, sft, *names, **options):
    """Write the skill folder of an adapter and return it with the dense deltas of its modules."""
    make_adapter(folder.with_suffix(".peft"), *names, **options)
    extract(folder.with_suffix(".peft"), sft, folder)
    return folder


def test_a_sum_of_adapters_is_an_adapter_of_the_summed_deltas(sft, tmp_path):
    a = adapter_skill(tmp_path / "a", sft, Q0, WIDE, seed=1, rank=3, scaling=0.5)
    b = adapter_skill(tmp_path / "b", sft, Q0, D1, seed=2, rank=6, scaling=2.0)
    manifest = combine([a, b], tmp_path / "sum", weights=[0.7, -1.5])
    assert manifest.form == "lora"
    assert (tmp_path / "sum" / "adapter_model.safetensors").exists()
    found, left, right = vector(tmp_path / "sum"), vector(a), vector(b)
    assert found.keys() == {Q0, D1, WIDE}
    for name, tensor in found.items():
        zero = torch.zeros(SHAPES[name], dtype=torch.float64)
        expected = 0.7 * left.get(name, zero).double() - 1.5 * right.get(name, zero).double()
        assert (tensor - expected).norm() < 1e-6 * expected.norm()
    assert verify(tmp_path / "sum").num_tensors == 3


def test_adapters_with_ties_or_dare_or_a_dense_vector_give_dense(one, sft, tmp_path):
    a = adapter_skill(tmp_path / "a", sft, Q0, seed=1)
    assert combine([a, one], tmp_path / "mixed", weights=[2, 1]).form == "dense"
    expected, mixed = vector(one), vector(tmp_path / "mixed")
    expected[Q0] = 2 * vector(a)[Q0] + expected[Q0]
    assert mixed.keys() == expected.keys()
    assert all(torch.equal(mixed[name], expected[name]) for name in mixed)
    for method in ("ties", "dare"):
        manifest = combine([a, a], tmp_path / method, rule=MergeRule(method=method))
        assert (manifest.form, list(manifest.tensors)) == ("dense", [Q0])


@pytest.mark.parametrize("method", ["linear", "ties", "dare"])
def test_chunks_do_not_change_a_byte_of_a_mixture_with_an_adapter(method, one, sft, tmp_path):
    a = adapter_skill(tmp_path / "a", sft, WIDE, seed=1, scaling=1.0)
    found = []
    for workers, chunk_blocks in CUTS:
        settings = StreamSettings(workers=workers, chunk_blocks=chunk_blocks)
        combine([one, a], tmp_path / "x", rule=MergeRule(method=method), settings=settings)
        found.append(contents(tmp_path / "x"))
    assert all(files == found[0] for files in found[1:])
