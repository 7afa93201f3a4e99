"""Texts by a real vLLM on Ray Data: nothing is generated twice, nothing finished is lost."""

import pytest

from past_ray.config.runtime import GeneratorConfig, RuntimeConfig
from past_ray.config.texts import GenerationConfig
from past_ray.errors import ConfigError, DataError
from past_ray.runtime.text_job import generate_texts
from past_ray.storage import read_jsonl
from past_ray.tasks.synthesis import passage_requests
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.ray

NUM_TEXTS = 4
BATCH_SIZE = 2


def requests(text="anna lives in oslo .", seed=0):
    documents = [{"doc_id": "p0", "title": "oslo", "text": text}]
    return passage_requests(documents, kinds=("rewrite",), texts_per_kind=NUM_TEXTS, seed=seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def write(cluster, folder, tmp_path_factory):
    """Run a job on one generator; further jobs share its cache."""
    common_cache = tmp_path_factory.mktemp("cache")

    def run(
        asked,
        *,
        model_folder=folder,
        cache_dir=common_cache,
        on_progress=None,
        max_model_len=128,
        num_generators=1,
    ):
        generator = GeneratorConfig(max_model_len=max_model_len, kv_cache_gib=0.125)
        runtime = RuntimeConfig(generator=generator, num_generators=num_generators)
        return generate_texts(
            asked,
            model_folder=model_folder,
            generation=GenerationConfig(max_new_tokens=12, batch_size=BATCH_SIZE),
            runtime=runtime,
            cache_dir=cache_dir,
            on_progress=on_progress,
        )

    return run


@pytest.fixture(scope="module")
def first(write):
    return write(requests())


def test_every_request_gets_a_text_of_its_own_seed_and_tokens_are_counted(first):
    assert sorted(first.texts) == [f"p0#rewrite-{n}" for n in range(NUM_TEXTS)]
    assert len(set(first.texts.values())) == NUM_TEXTS
    assert (first.num_cached, first.num_generated) == (0, NUM_TEXTS)
    assert 0 < first.num_new_tokens <= 12 * NUM_TEXTS
    assert first.truncated_ids <= set(first.texts)
    assert first.num_new_tokens >= 12 * len(first.truncated_ids)
    assert first.num_prompt_tokens % NUM_TEXTS == 0


def test_the_same_job_again_generates_nothing(write, first):
    steps = []
    again = write(requests(), on_progress=lambda *step: steps.append(step))
    assert (again.num_cached, again.num_generated) == (NUM_TEXTS, 0)
    assert again.texts == first.texts
    assert again.num_new_tokens == first.num_new_tokens
    assert steps == [(NUM_TEXTS, NUM_TEXTS)]


def test_a_killed_job_keeps_its_first_batch_and_two_generators_end_it_with_the_same_texts(
    write, first, tmp_path
):
    class KilledError(Exception):
        pass

    def kill(num_done, _num_all):
        if num_done:
            raise KilledError

    with pytest.raises(KilledError):
        write(requests(), cache_dir=tmp_path, on_progress=kill)
    finished, *later = sorted(tmp_path.glob("*/*.jsonl"), key=lambda path: path.stat().st_mtime)
    assert len(read_jsonl(finished)) == BATCH_SIZE
    for path in later:  # What the generator finished before the kill reached it.
        path.unlink()
    steps = []
    resumed = write(
        requests(),
        cache_dir=tmp_path,
        num_generators=2,
        on_progress=lambda *step: steps.append(step),
    )
    assert (resumed.num_cached, resumed.num_generated) == (BATCH_SIZE, NUM_TEXTS - BATCH_SIZE)
    assert steps == [(2, 4), (3, 4), (4, 4)]
    assert resumed.texts == first.texts


def test_another_passage_another_seed_and_another_model_are_generated_anew(write, first, tmp_path):
    asked = [*requests("ben likes rice ."), *requests(seed=1)]
    asked = [asked[0], asked[NUM_TEXTS + 1]]
    assert write(asked).num_generated == 2
    other = write(requests(), model_folder=make_tiny_model(tmp_path, seed=1))
    assert other.num_generated == NUM_TEXTS
    assert other.texts != first.texts


def test_prompts_beyond_the_context_are_refused_with_their_documents_before_anything_runs(write):
    steps = []
    with pytest.raises(DataError, match=r"1 documents do not \(first: \['p0'\]\).*max_model_len"):
        write(requests("anna " * 200), on_progress=lambda *step: steps.append(step))
    assert steps == []


def test_generators_that_do_not_fit_the_cluster_are_refused(write):
    with pytest.raises(ConfigError, match="num_generators must fit"):
        write(requests("clara likes soup ."), num_generators=3)


def test_what_an_engine_refuses_reaches_the_caller_as_its_own_error(write, tmp_path):
    with pytest.raises(ConfigError, match="vLLM refused"):
        write(requests(), cache_dir=tmp_path, max_model_len=4096)
