"""LoRA by runs of tokens against sums by hand and vLLM's CPU kernels."""

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.ray

NUM_SLOTS, RANK, NUM_INPUTS = 4, 8, 16
SLICES = (24, 8, 8)
"""Outputs of a fused q, k and v."""

SLOTS = st.lists(st.integers(-1, NUM_SLOTS - 1), min_size=1, max_size=24)
SCALE = 0.7


@pytest.fixture(scope="module")
def cpu_lora():
    """The module under test; vLLM is imported with it, not while tests are collected."""
    from past_ray.engine import vllm_cpu_lora

    return vllm_cpu_lora


@pytest.fixture(scope="module")
def vllms():
    """The wrapper of vLLM that ours takes the place of."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    return PunicaWrapperCPU


def wrapper(kind, slots, *, is_prefill):
    """A wrapper whose next step has these slots; slot s holds the adapter of id s + 1."""
    from vllm.lora.layers import LoRAMapping

    made = kind(64, 64, device="cpu")
    ids = tuple(slot + 1 for slot in slots)
    mapping = LoRAMapping(ids, ids, is_prefill=is_prefill)
    made.update_metadata(mapping, [slot + 1 for slot in range(NUM_SLOTS)], NUM_SLOTS + 1, 100)
    return made


def drawn(slots, *, num_outputs, seed=0, dtype=torch.float32):
    """Inputs, outputs of the base, and factors of which slot s has rank 2 * (s + 1)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    downs = tuple(normal(NUM_SLOTS, 1, RANK, NUM_INPUTS) for _ in num_outputs)
    ups = tuple(normal(NUM_SLOTS, 1, size, RANK) for size in num_outputs)
    for factor in downs:
        for slot in range(NUM_SLOTS):
            factor[slot, :, 2 * (slot + 1) :] = 0
    return normal(len(slots), NUM_INPUTS), normal(len(slots), sum(num_outputs)), downs, ups


def by_hand(x, y, downs, ups, slots, *, scale=SCALE):
    """Row by row in float64: ``y[n] + scale * B[slot] A[slot] x[n]``, or ``y[n]`` for -1."""
    rows = []
    for n, slot in enumerate(slots):
        row = y[n].double()
        if slot >= 0:
            added = [
                b[slot, 0].double() @ a[slot, 0].double() for a, b in zip(downs, ups, strict=True)
            ]
            row = row + scale * torch.cat([product @ x[n].double() for product in added])
        rows.append(row)
    return torch.stack(rows)


def linear(kind, slots, x, y, downs, ups, *, is_prefill=True):
    result = y.clone()
    made = wrapper(kind, slots, is_prefill=is_prefill)
    made.add_lora_linear(result, x, downs, ups, SCALE, tuple(b.shape[2] for b in ups))
    return result


@pytest.mark.parametrize("is_prefill", [True, False])
@given(slots=SLOTS)
def test_fused_slices_equal_the_sum_by_hand_and_rows_without_an_adapter_keep_every_bit(
    cpu_lora, is_prefill, slots
):
    x, y, downs, ups = drawn(slots, num_outputs=SLICES)
    result = linear(cpu_lora.RunsWrapper, slots, x, y, downs, ups, is_prefill=is_prefill)
    torch.testing.assert_close(
        result.double(), by_hand(x, y, downs, ups, slots), atol=1e-4, rtol=1e-5
    )
    bare = torch.tensor(slots) == -1
    assert torch.equal(result[bare], y[bare])


@pytest.mark.parametrize("is_prefill", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(slots=SLOTS)
def test_rows_with_an_adapter_equal_those_of_vllms_kernels(
    cpu_lora, vllms, is_prefill, dtype, slots
):
    drawing = drawn(slots, num_outputs=SLICES, dtype=dtype)
    ours, theirs = (
        linear(kind, slots, *drawing, is_prefill=is_prefill).float()
        for kind in (cpu_lora.RunsWrapper, vllms)
    )
    chosen = torch.tensor(slots) >= 0
    # Two bfloat16 sums in another order differ by a rounding step.
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6
    torch.testing.assert_close(ours[chosen], theirs[chosen], atol=tolerance, rtol=tolerance)


def test_vllms_kernel_puts_the_last_slots_adapter_on_rows_without_one_and_ours_does_not(
    cpu_lora, vllms
):
    """The day this fails, vLLM has repaired it."""
    slots = [0, -1]
    x, y, downs, ups = drawn(slots, num_outputs=SLICES)
    theirs = linear(vllms, slots, x, y, downs, ups)
    wrong = by_hand(x, y, downs, ups, [0, NUM_SLOTS - 1])
    torch.testing.assert_close(theirs.double(), wrong, atol=1e-4, rtol=1e-5)
    assert (theirs[1] - y[1]).abs().max() > 1
    assert torch.equal(linear(cpu_lora.RunsWrapper, slots, x, y, downs, ups)[1], y[1])


@given(slots=SLOTS)
def test_logits_and_embeddings_follow_the_same_rule(cpu_lora, slots):
    # The head has more outputs in the adapter than in the logits: vLLM pads vocabularies.
    x, y, (down,), (up,) = drawn(slots, num_outputs=(20,))
    bare = torch.tensor(slots) == -1
    made = wrapper(cpu_lora.RunsWrapper, slots, is_prefill=True)
    logits = y[:, :18].clone()
    made.add_lora_logits(logits, x, down, up, SCALE)
    expected = by_hand(x, y, (down,), (up,), slots)
    torch.testing.assert_close(logits.double(), expected[:, :18], atol=1e-4, rtol=1e-5)
    assert torch.equal(logits[bare], y[bare, :18])
    # An embedding's first factor is looked up, not multiplied: its rows are the input.
    eye = torch.eye(RANK).expand(NUM_SLOTS, 1, RANK, RANK)
    embedded = y.clone()
    made.add_lora_embedding(embedded, x[:, :RANK], up)
    expected = by_hand(x[:, :RANK], y, (eye,), (up,), slots, scale=1.0)
    torch.testing.assert_close(embedded.double(), expected, atol=1e-4, rtol=1e-5)
    assert torch.equal(embedded[bare], y[bare])


def test_replacing_leaves_rows_without_an_adapter_and_other_columns(cpu_lora):
    slots = [1, -1]
    _, _, _, (up,) = drawn(slots, num_outputs=(5,))
    x, result = torch.ones(2, RANK), torch.zeros(2, 9)
    runs = cpu_lora.adapter_runs(torch.tensor(slots))
    cpu_lora.expand(result, x=x, factors=up, runs=runs, begin=2, adds=False)
    torch.testing.assert_close(result[0, 2:7], up[1, 0].sum(1))
    result[0, 2:7] = 0
    assert not result.any()


def test_runs_are_consecutive_rows_and_minus_one_is_in_none(cpu_lora):
    runs = cpu_lora.adapter_runs(torch.tensor([2, 2, 2, 2, -1, -1, 0, 0, 0, 2]))
    assert runs == [(slice(0, 4), 2), (slice(6, 9), 0), (slice(9, 10), 2)]


@pytest.mark.parametrize(
    "name", ["add_lora_embedding", "add_lora_logits", "_apply_shrink", "_apply_expand"]
)
def test_what_is_replaced_still_has_vllms_parameters(cpu_lora, vllms, name):
    ours, theirs = (
        list(inspect.signature(getattr(kind, name)).parameters.values())
        for kind in (cpu_lora.RunsWrapper, vllms)
    )
    plain = [
        [(p.name, p.kind, p.default) for p in found if p.kind is not p.VAR_KEYWORD]
        for found in (ours, theirs)
    ]
    assert plain[0] == plain[1]
