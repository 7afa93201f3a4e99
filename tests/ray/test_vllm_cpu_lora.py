"""LoRA by runs of tokens: against vLLM's CPU kernels, and inside real engines."""

import inspect
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from past_ray.config.runtime import GeneratorConfig
from past_ray.engine.generators import build_generator
from past_ray.engine.vllm_adapter_bank import VLLMAdapterBank
from tests.peft_adapters import make_peft_adapter
from tests.tiny_model import make_tiny_model
from tests.vllm_engines import full_forward_logprobs, load, make_adapter, sampling, weights_of

pytestmark = pytest.mark.ray

NUM_SLOTS, RANK, NUM_INPUTS = 4, 8, 16
SLICES = (24, 8, 8)
"""Outputs of a fused q, k and v."""

SLOTS = st.lists(st.integers(-1, NUM_SLOTS - 1), min_size=1, max_size=24)
SCALE = 0.7
PROMPT = [3, 6, 7, 8, 9, 1, 4]
PROMPTS = [PROMPT, [3, 10, 11, 4], [5, 6, 7, 8, 12, 13, 14, 15, 16, 17, 4]]


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose own files name no end of sequence to vLLM, which reads only the first."""
    folder = make_tiny_model(tmp_path_factory.mktemp("tiny") / "base")
    (folder / "generation_config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def bank(folder):
    config = GeneratorConfig(max_model_len=256, kv_cache_gib=0.125)
    return VLLMAdapterBank(folder, config, max_rank=8, max_loras=3)


@pytest.fixture(scope="module")
def generator(folder):
    config = GeneratorConfig(max_model_len=256, kv_cache_gib=0.125, on_sync="finish")
    generator = build_generator(config, folder, lora_rank=4)
    # No token ends a completion, so all are as long as they may be.
    generator._engine._stop_token_ids = []
    return generator


@pytest.fixture(scope="module", autouse=True)
def closed_together(bank, generator):
    """VLLM's process groups are global, and end with the first engine that closes."""
    yield
    bank.close()
    generator.close()


@pytest.fixture(scope="module")
def adapters(folder):
    """Adapters of three ranks, and what PEFT's merge adds to the base."""
    found = {}
    for seed, rank in enumerate((2, 5, 8)):
        place = folder.parent / f"adapter-{seed}"
        modules = ["q_proj", "v_proj", "gate_proj", "down_proj"][: 2 + seed]
        found[place] = make_peft_adapter(
            folder, place, seed=seed, r=rank, lora_alpha=2 * rank, target_modules=modules
        )
    return found


def merged(folder, changes):
    model = load(folder)
    with torch.no_grad():
        for name, change in changes.items():
            parameter = model.get_parameter(name)
            parameter.copy_(parameter.double() + change)
    return model


def gaps(model, prompts, completions):
    """Largest difference of each completion's log-probabilities from a transformers forward."""
    return [
        max(
            abs(a - b)
            for a, b in zip(
                completion.logprobs,
                full_forward_logprobs(model, prompt, completion.token_ids, 0.7),
                strict=True,
            )
        )
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def mixed(bank, adapters):
    """Base and adapters in turn, so that every step has both; bases first in the result."""
    places = [place for adapter in adapters for place in (None, adapter)]
    prompts = [[*PROMPT, 10 + index] for index in range(len(places))]
    params = [sampling(seed=seed, max_new_tokens=16) for seed in range(len(places))]
    bank._vllm.reset_prefix_cache()
    step, seen = bank._engine.step, []

    def watched():
        seen.append({adapter and adapter.lora_name for _, adapter in bank._in_flight.values()})
        return step()

    bank._engine.step = watched
    try:
        completions = bank.generate(prompts, params, places)
    finally:
        bank._engine.step = step
    assert max(len(names) for names in seen if None in names) == 4
    return prompts, params, completions


def test_the_base_beside_three_adapters_is_the_base_and_each_adapter_its_own(
    bank, folder, adapters
):
    prompts, params, completions = mixed(bank, adapters)
    assert max(gaps(load(folder), prompts[::2], completions[::2])) < 1e-4
    for index, changes in enumerate(adapters.values()):
        own = slice(2 * index + 1, 2 * index + 2)
        assert max(gaps(merged(folder, changes), prompts[own], completions[own])) < 1e-4
        assert min(gaps(load(folder), prompts[own], completions[own])) > 0.05
    bank._vllm.reset_prefix_cache()
    alone = bank.generate(prompts[::2], params[::2], [None] * 3)
    for one, other in zip(alone, completions[::2], strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_the_same_requests_through_vllms_kernels_get_a_wrong_base(
    bank, folder, adapters, cpu_lora, vllms
):
    """What the wrapper is for; the day this fails, vLLM has repaired it."""

    def use(kind):
        def change(worker):
            manager = worker.model_runner.lora_manager._adapter_manager
            for found in manager.punica_wrapper_mapping.values():
                assert found.__class__ is not kind
                found.__class__ = kind
            manager._last_mapping = None

        bank._vllm.collective_rpc(change)

    use(vllms)
    try:
        prompts, _, completions = mixed(bank, adapters)
    finally:
        use(cpu_lora.RunsWrapper)
    assert max(gaps(load(folder), prompts[::2], completions[::2])) > 0.05


def test_requests_of_the_base_in_flight_stay_the_base_while_a_first_adapter_is_used(
    generator, folder
):
    generator.update_weights(weights_of(load(folder)), 0)
    adapter, model = make_adapter(load(folder))
    step, num_steps, beside = generator._engine.step, [0], []

    def use_adapter():
        generator.load_adapter(adapter, 1)
        beside.extend(generator.generate([PROMPT], [sampling(max_new_tokens=20)]))

    syncing = threading.Thread(target=use_adapter)

    def counted():
        ended = step()
        num_steps[0] += 1
        if num_steps[0] == 10:
            syncing.start()
            while not generator._loop._queue:
                time.sleep(0.001)
        return ended

    generator._engine.step = counted
    try:
        params = [sampling(seed=seed, max_new_tokens=200) for seed in range(3)]
        completions = generator.generate(PROMPTS, params)
    finally:
        generator._engine.step = step
        syncing.join(60)
    # Beside the base from step 11 on: 20 tokens of its own do not take 190 steps.
    assert num_steps[0] == 200
    assert [len(completion.token_ids) for completion in completions] == [200] * 3
    assert {completion.policy_version for completion in completions} == {0}
    assert max(gaps(load(folder), PROMPTS, completions)) < 1e-4
    assert beside[0].policy_version == 1
    assert max(gaps(model, [PROMPT], beside)) < 1e-4
    assert min(gaps(load(folder), [PROMPT], beside)) > 0.05
