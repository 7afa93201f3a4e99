import pytest
import torch
from transformers import AutoModelForCausalLM

from past_ray.engine.transformers_generator import TransformersGenerator
from past_ray.errors import ClusterError, GenerationError
from past_ray.rl.types import SamplingParams
from tests.tiny_model import make_tiny_model

EOS = 1
PROMPTS = [[3, 6, 7, 8, 9, EOS, 4], [3, 10, 11, 4], [5, 6, 7, 8, 12, 13, 14, 15, 16, 17, 4]]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request, tmp_path_factory):
    return make_tiny_model(
        tmp_path_factory.mktemp("tiny"), tie_word_embeddings=request.param, seed=0
    )


@pytest.fixture
def generator(folder):
    generator = TransformersGenerator(folder, dtype="float32", max_model_len=64, max_num_seqs=2)
    yield generator
    generator.close()


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def sampling(*, temperature=0.7, max_new_tokens=8, seed=0):
    return SamplingParams(temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)


def full_forward_logprobs(model, prompt, completion, temperature):
    """Log-probabilities of the completion by one unpadded forward pass without a cache."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion.token_ids])).logits[0]
    logprobs = (logits / temperature).log_softmax(-1)
    return [
        logprobs[len(prompt) - 1 + index, token_id].item()
        for index, token_id in enumerate(completion.token_ids)
    ]


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_logprobs_are_those_of_the_sampling_distribution(generator, folder, temperature):
    model = load(folder)
    completions = generator.generate(
        PROMPTS, [sampling(temperature=temperature, seed=seed) for seed in range(3)]
    )
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        expected = full_forward_logprobs(model, prompt, completion, temperature)
        assert completion.logprobs == pytest.approx(expected, abs=1e-4)


def test_greedy_completions_equal_transformers_own(generator, folder):
    model = load(folder)
    completions = generator.generate(PROMPTS, [sampling(temperature=0.0)] * 3)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        expected = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=8, pad_token_id=0
        )[0, len(prompt) :]
        assert completion.token_ids == expected.tolist()


def test_a_completion_depends_on_its_seed_and_not_on_its_neighbours(generator):
    alone = generator.generate(PROMPTS[:1], [sampling(seed=5)])[0]
    beside = generator.generate(PROMPTS[::-1], [sampling(seed=seed) for seed in (8, 9, 5)])[2]
    other = generator.generate(PROMPTS[:1], [sampling(seed=6)])[0]
    assert alone.token_ids == beside.token_ids != other.token_ids


def test_sampling_follows_the_distribution_it_reports(generator, folder):
    prompt = PROMPTS[1]
    completions = generator.generate(
        [prompt] * 400, [sampling(temperature=2.0, max_new_tokens=1, seed=s) for s in range(400)]
    )
    with torch.no_grad():
        logits = load(folder)(torch.tensor([prompt])).logits[0, -1]
    probabilities = (logits / 2.0).softmax(-1)
    token_id = int(probabilities.argmax())
    share = sum(completion.token_ids == [token_id] for completion in completions) / 400
    # Four standard deviations of a share of 400 draws are at most 0.1.
    assert share == pytest.approx(probabilities[token_id].item(), abs=0.1)


def test_end_of_sequence_is_kept_and_ends_the_completion(generator):
    found = generator.generate(
        PROMPTS[:1] * 100, [sampling(temperature=3.0, seed=seed) for seed in range(100)]
    )
    stopped = [completion for completion in found if completion.finish_reason == "stop"]
    assert stopped
    for completion in found:
        ends = completion.token_ids[-1] == EOS
        assert completion.finish_reason == ("stop" if ends else "length")
        assert ends or len(completion.token_ids) == 8
        assert EOS not in completion.token_ids[:-1]
        assert len(completion.logprobs) == len(completion.token_ids)


def test_after_an_update_it_samples_from_the_new_weights(generator, folder):
    model = load(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.sin(torch.arange(parameter.numel())).view_as(parameter)
    assert generator.policy_version == -1
    generator.update_weights(dict(model.named_parameters()), 4)
    completion = generator.generate(PROMPTS[:1], [sampling()])[0]
    expected = full_forward_logprobs(model, PROMPTS[0], completion, 0.7)
    assert completion.logprobs == pytest.approx(expected, abs=1e-4)
    assert completion.policy_version == generator.policy_version == 4


def test_an_update_that_misses_a_parameter_names_it_and_changes_nothing(generator, folder):
    weights = {name: tensor + 1 for name, tensor in load(folder).named_parameters()}
    del weights["model.layers.1.self_attn.k_proj.weight"]
    before = generator.generate(PROMPTS, [sampling()] * 3)
    with pytest.raises(ClusterError, match=r"model\.layers\.1\.self_attn\.k_proj\.weight"):
        generator.update_weights(weights, 4)
    assert generator.generate(PROMPTS, [sampling()] * 3) == before


def test_an_update_of_another_shape_is_refused(generator, folder):
    weights = dict(load(folder).named_parameters())
    weights["model.norm.weight"] = torch.ones(63)
    with pytest.raises(ClusterError, match=r"model\.norm\.weight must have shape \(64,\)"):
        generator.update_weights(weights, 4)


def test_a_prompt_that_does_not_fit_is_refused_and_the_next_call_works(generator):
    with pytest.raises(GenerationError, match="max_model_len=64"):
        generator.generate([[6] * 57], [sampling()])
    assert generator.generate([[6] * 56], [sampling()])[0].token_ids


def test_a_closed_generator_says_so(generator):
    generator.close()
    with pytest.raises(ClusterError, match="close"):
        generator.generate(PROMPTS[:1], [sampling()])
