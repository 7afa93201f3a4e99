"""Models and vectors that do not fit together."""

import re

import pytest
import torch

from past_ray.skill import load_manifest
from past_ray.skill.checkpoint import load_weights
from tests.skill_folders import edit_json, make_checkpoint
from tests.skill_refusals import (
    change,
    folder_fixture,  # noqa: F401
    refused,
    use,
)

FINGERPRINTS = {
    "architecture": (
        lambda role: edit_json(role / "config.json", model_type="llama"),
        "model_type is {} and {}",
    ),
    "size": (
        lambda role: edit_json(role / "config.json", num_hidden_layers=9),
        "num_hidden_layers is {} and {}",
    ),
    "tying": (
        lambda role: edit_json(role / "config.json", tie_word_embeddings=True),
        "tied_embeddings is {} and {}",
    ),
    "vocabulary": (
        lambda role: edit_json(role / "tokenizer.json", model={"vocab": {"anna": 1, "ben": 0}}),
        "tokenizer is {} and {}",
    ),
    "added token": (
        lambda role: edit_json(
            role / "tokenizer.json", added_tokens=[{"content": "<new>", "id": 2}]
        ),
        "tokenizer is {} and {}",
    ),
    "chat template": (
        lambda role: (role / "chat_template.jinja").write_text("{{ other }}"),
        "chat_template is {} and {}",
    ),
}


@pytest.mark.parametrize("role", ["rl", "target", "base"])
@pytest.mark.parametrize("kind", FINGERPRINTS)
def test_models_that_mean_something_else_are_refused_with_both_values(folder, role, kind):
    edit, told = FINGERPRINTS[kind]
    edit(folder / role)
    message = refused(folder, role)
    other = {"rl": folder / "sft", "target": folder / "skill", "base": folder / "sft"}[role]
    assert f"{folder / role} and " in message
    assert str(other) in message
    assert "must come from the same base model and tokenizer, but" in message
    assert re.search(told.format(r"(\S+)", r"(\S+)"), message)
    assert message.endswith("Train both from one base with one recipe.")


@pytest.mark.parametrize("role", ["rl", "target"])
def test_missing_parameters_are_counted_and_the_first_five_named(folder, role):
    weights = load_weights(folder / role)
    dropped = sorted(weights)[:6]
    make_checkpoint(folder / role, {n: w for n, w in weights.items() if n not in dropped})
    message = refused(folder, role)
    assert f"[{', '.join(dropped[:5])}, ...]" in message
    if role == "rl":
        assert "rl and sft must have the same parameters; 0 only in rl (first: [])" in message
        assert "6 only in sft (first: [" in message
    else:
        assert f"target {folder / 'target'} must have every parameter of skill" in message
        assert "which has 8; 6 are absent (first: [" in message


@pytest.mark.parametrize("role", ["rl", "target"])
def test_other_shapes_are_counted_and_the_first_five_given(folder, role):
    weights = load_weights(folder / role)
    changed = sorted(weights)[:6]
    for name in changed:
        weights[name] = weights[name].repeat(2, *[1] * (weights[name].dim() - 1))
    make_checkpoint(folder / role, weights)
    message = refused(folder, role)
    for number, name in enumerate(changed):
        before = tuple(load_manifest(folder / "skill").shapes[name])
        shapes = f"{name} {tuple(weights[name].shape)} and {before}"
        assert (shapes in message) == (number < 5)
    assert re.search(r"6 (with|have) other shapes", message)


def test_parameters_of_the_target_that_the_vector_lacks_are_no_offence(folder):
    change(folder, "target", more=torch.ones(3))
    use(folder, "target")
    assert load_weights(folder / "out")["more"].tolist() == [1.0] * 3
