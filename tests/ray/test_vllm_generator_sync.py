"""What a weight sync does to completions in flight: a real vLLM engine."""

import threading
from pathlib import Path

import pytest

from past_ray.config.runtime import GeneratorConfig
from past_ray.engine.generators import build_generator
from past_ray.engine.transformers_generator import TransformersGenerator
from past_ray.errors import ClusterError, ConfigError
from tests.tiny_model import make_tiny_model
from tests.vllm_engines import (
    full_forward_logprobs,
    load,
    make_adapter,
    perturbed,
    sampling,
    weights_of,
)

pytestmark = pytest.mark.ray

PROMPTS = [[3, 6, 7, 8, 9, 1, 4], [3, 10, 11, 4], [5, 6, 7, 8, 12, 13, 14, 15, 16, 17, 4]]
NUM_TOKENS = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose own files name no end of sequence to vLLM, which reads only the first."""
    folder = make_tiny_model(tmp_path_factory.mktemp("tiny"))
    (folder / "generation_config.json").write_text("{}")
    return folder


def started(folder, *, on_sync, lora_rank=None):
    config = GeneratorConfig(max_model_len=256, kv_cache_gib=0.125, on_sync=on_sync)
    generator = build_generator(config, folder, lora_rank=lora_rank)
    # No token ends a completion, so all are as long as they may be.
    generator._engine._stop_token_ids = []
    generator.update_weights(weights_of(load(folder)), 0)
    return generator


@pytest.fixture(scope="module")
def resuming(folder):
    return started(folder, on_sync="resume", lora_rank=4)


@pytest.fixture(scope="module")
def finishing(folder):
    return started(folder, on_sync="finish", lora_rank=4)


@pytest.fixture(scope="module", autouse=True)
def closed_together(resuming, finishing):
    """VLLM's process groups are global, and end with the first engine that closes."""
    yield
    resuming.close()
    finishing.close()


def sync_after(generator, num_steps, sync, *, num_tokens=NUM_TOKENS):
    """Start three completions, sync once they have taken ``num_steps``, return them."""
    engine, reached = generator._engine, threading.Event()
    step, num_done = engine.step, [0]

    def counted():
        ended = step()
        num_done[0] += 1
        if num_done[0] == num_steps:
            # The sync is queued before the next step, so its place is the same in every run.
            waiting = threading.Thread(target=sync)
            waiting.start()
            threads.append(waiting)
            while not generator._loop._queue:
                reached.wait(0.001)
        return ended

    threads = []
    engine.step = counted
    try:
        completions = generator.generate(
            PROMPTS, [sampling(seed=seed, max_new_tokens=num_tokens) for seed in range(3)]
        )
    finally:
        engine.step = step
    for thread in threads:
        thread.join(60)
    return completions


def spans(completion):
    """The versions of a completion and how many tokens each sampled, in order."""
    counts = {}
    for version in completion.token_versions:
        counts[version] = counts.get(version, 0) + 1
    return list(counts.items())


def check_scored_by_its_versions(models, prompt, completion):
    """Every span's log-probabilities are those of its own weights, given all tokens before it."""
    done = 0
    for version, count in spans(completion):
        before = prompt + completion.token_ids[:done]
        expected = full_forward_logprobs(
            models[version], before, completion.token_ids[done : done + count], 0.7
        )
        assert completion.logprobs[done : done + count] == pytest.approx(expected, abs=1e-4)
        done += count
    assert done == len(completion.token_ids) == len(completion.logprobs)


def test_resume_keeps_tokens_tags_both_versions_and_each_span_scores_by_its_own_weights(
    resuming, folder
):
    old, new = load(folder), perturbed(folder, 0.05)
    resuming.update_weights(weights_of(old), 3)
    completions = sync_after(resuming, 40, lambda: resuming.update_weights(weights_of(new), 4))
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        assert spans(completion) == [(3, 40), (4, NUM_TOKENS - 40)]
        assert completion.policy_version == 3
        assert completion.finish_reason == "length"
        check_scored_by_its_versions({3: old, 4: new}, prompt, completion)
        # The two sets of weights differ enough for a wrong one to show.
        wrong = full_forward_logprobs(old, prompt, completion.token_ids, 0.7)
        assert max(abs(a - b) for a, b in zip(wrong, completion.logprobs, strict=True)) > 0.1


def test_a_resumed_completion_is_reproduced_by_its_seed_and_draws_no_number_twice(resuming, folder):
    weights = weights_of(load(folder))

    def run():
        resuming.update_weights(weights, 5)
        return sync_after(resuming, 30, lambda: resuming.update_weights(weights, 6))

    first, again = run(), run()
    assert [c.token_ids for c in first] == [c.token_ids for c in again]
    # Up to the sync it is the undisturbed completion, after it another draw.
    undisturbed = resuming.generate(
        PROMPTS, [sampling(seed=seed, max_new_tokens=NUM_TOKENS) for seed in range(3)]
    )
    for cut, whole in zip(first, undisturbed, strict=True):
        assert cut.token_ids[:30] == whole.token_ids[:30]
        assert cut.token_ids[30:] != whole.token_ids[30:]


def test_finish_lets_completions_end_under_their_version(finishing, folder):
    old, new = load(folder), perturbed(folder, 0.05)
    finishing.update_weights(weights_of(old), 3)
    completions = sync_after(finishing, 40, lambda: finishing.update_weights(weights_of(new), 4))
    assert finishing.policy_version == 4
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        assert completion.policy_version == 3
        assert completion.token_versions == []
        expected = full_forward_logprobs(old, prompt, completion.token_ids, 0.7)
        assert completion.logprobs == pytest.approx(expected, abs=1e-4)


def test_a_refused_sync_resumes_what_it_interrupted_under_the_old_weights(resuming, folder):
    old = load(folder)
    resuming.update_weights(weights_of(old), 7)
    errors = []

    def refused():
        with pytest.raises(ClusterError, match="were missed") as caught:
            resuming.update_weights({}, 8)
        errors.append(caught)

    completions = sync_after(resuming, 20, refused)
    assert len(errors) == 1
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        assert completion.policy_version == 7
        assert completion.token_versions == []
        expected = full_forward_logprobs(old, prompt, completion.token_ids, 0.7)
        assert completion.logprobs == pytest.approx(expected, abs=1e-4)


def test_an_adapter_equals_the_merged_weights_and_a_full_sync_drops_it(finishing, folder):
    base = load(folder)
    finishing.update_weights(weights_of(base), 10)
    for version, seed in ((11, 0), (12, 1)):
        adapter, merged = make_adapter(load(folder), seed=seed)
        finishing.load_adapter(adapter, version)
        completion = finishing.generate(PROMPTS[:1], [sampling()])[0]
        assert completion.policy_version == version
        expected = full_forward_logprobs(merged, PROMPTS[0], completion.token_ids, 0.7)
        assert completion.logprobs == pytest.approx(expected, abs=1e-4)
    finishing.update_weights(weights_of(base), 13)
    completion = finishing.generate(PROMPTS[:1], [sampling()])[0]
    expected = full_forward_logprobs(base, PROMPTS[0], completion.token_ids, 0.7)
    assert completion.logprobs == pytest.approx(expected, abs=1e-4)


def test_requests_in_flight_keep_their_adapter_and_the_last_one_evicts_it(finishing, folder):
    """Pitfall 4: adapters are evicted, and never while a request still names them."""
    finishing.update_weights(weights_of(load(folder)), 20)
    (old, old_merged), (new, new_merged) = (make_adapter(load(folder), seed=s) for s in (0, 1))
    finishing.load_adapter(old, 21)
    seen = []

    def sync():
        finishing.load_adapter(new, 22)
        seen.append(finishing.generate(PROMPTS[:1], [sampling()])[0])
        seen.append(len(finishing._engine._adapters._loaded))

    completions = sync_after(finishing, 20, sync, num_tokens=200)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        assert completion.policy_version == 21
        expected = full_forward_logprobs(old_merged, prompt, completion.token_ids, 0.7)
        assert completion.logprobs == pytest.approx(expected, abs=1e-4)
    beside, num_loaded = seen
    assert (beside.policy_version, num_loaded) == (22, 2)
    expected = full_forward_logprobs(new_merged, PROMPTS[0], beside.token_ids, 0.7)
    assert beside.logprobs == pytest.approx(expected, abs=1e-4)
    assert len(finishing._engine._engine.list_loras()) == 1


def test_an_adapter_sync_resumes_completions_with_the_new_adapter(resuming, folder):
    resuming.update_weights(weights_of(load(folder)), 30)
    (old, old_merged), (new, new_merged) = (make_adapter(load(folder), seed=s) for s in (0, 1))
    resuming.load_adapter(old, 31)
    completions = sync_after(resuming, 20, lambda: resuming.load_adapter(new, 32))
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        assert spans(completion) == [(31, 20), (32, NUM_TOKENS - 20)]
        check_scored_by_its_versions({31: old_merged, 32: new_merged}, prompt, completion)


def test_many_adapters_leave_one_in_the_engine_and_one_folder_on_disk(finishing, folder):
    adapter, _ = make_adapter(load(folder))
    for version in range(40, 46):
        finishing.load_adapter(adapter, version)
    store = finishing._engine._adapters
    assert [path.name[-3:] for path in Path(store._folder.name).iterdir()] == ["v45"]
    assert finishing._engine._engine.list_loras() == {store.current.lora_int_id}


def test_an_adapter_of_too_high_a_rank_is_refused_before_it_is_written(finishing, folder):
    adapter, _ = make_adapter(load(folder), rank=8)
    with pytest.raises(ClusterError, match=r"at most the rank .* 4; it has 8"):
        finishing.load_adapter(adapter, 50)


def test_both_backends_agree_on_an_adapter(finishing, folder):
    base = weights_of(load(folder))
    plain = TransformersGenerator(folder, dtype="float32", max_model_len=256, max_num_seqs=8)
    plain._stop_token_ids = frozenset()
    greedy = [sampling(temperature=0.0)] * 3
    for seed in (0, 1):
        adapter, _ = make_adapter(load(folder), seed=seed)
        for generator in (finishing, plain):
            if seed == 0:
                generator.update_weights(base, 60)
            generator.load_adapter(adapter, 61 + seed)
        for ours, theirs in zip(
            finishing.generate(PROMPTS, greedy), plain.generate(PROMPTS, greedy), strict=True
        ):
            assert ours.token_ids == theirs.token_ids
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def test_sleep_mode_is_a_config_error_where_vllm_has_none(folder):
    config = GeneratorConfig(max_model_len=64, kv_cache_gib=0.125, sleep_between_steps=True)
    with pytest.raises(ConfigError, match=r"(?s)vLLM refused .* Sleep mode is not supported"):
        build_generator(config, folder)
