"""Adapters that PEFT itself makes, saves and merges, on a tiny model and with random factors."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from past_ray.config.skill import ScaleConfig
from past_ray.locations import open_folder
from past_ray.skill import extract
from past_ray.skill.adapter import LoraModule
from past_ray.skill.adapter_folder import read_adapter
from past_ray.skill.checkpoint import load_weights, save_checkpoint
from tests.skill_folders import nudged
from tests.tiny_model import make_tiny_model

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FORMS = {
    "plain": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8},
    "rslora": {"target_modules": ["q_proj", "o_proj"], "r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {
        "target_modules": ALL_LINEAR,
        "r": 8,
        "lora_alpha": 4,
        "rank_pattern": {"q_proj": 5, r"layers\.1\..*down_proj": 2},
        "alpha_pattern": {"mlp.up_proj": 16, r"layers\.0\.mlp\.down_proj": 1},
    },
}
"""Settings of the adapters that skill vectors are made of."""

PER_LAYER = ScaleConfig.model_validate({"scale": 0.5, "layers": {"1": 3}, "modules": {"mlp": -2}})


@pytest.fixture(name="base", scope="module")
def base_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the model that the adapters change."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(name="target", scope="module")
def target_fixture(base: Path) -> Path:
    """A dense relative of the base."""
    save_checkpoint(base.parent / "target", nudged(load_weights(base), seed=5), like=base)
    return base.parent / "target"


@pytest.fixture(name="adapters", scope="module")
def adapters_fixture(base: Path) -> dict[str, tuple[Path, dict[str, Tensor]]]:
    """For each form, the folder of an adapter and what PEFT's own merge adds to each weight."""
    return {
        form: (base.parent / form, make_peft_adapter(base, base.parent / form, seed=n, **settings))
        for n, (form, settings) in enumerate(FORMS.items())
    }


@pytest.fixture(name="skill")
def skill_fixture(
    base: Path, adapters: dict[str, tuple[Path, dict[str, Tensor]]], tmp_path: Path
) -> Path:
    """The skill vector of the adapter with patterns."""
    extract(adapters["patterns"][0], base, tmp_path / "skill")
    return tmp_path / "skill"


def load(folder: Path) -> PreTrainedModel:
    """Load a model as transformers does."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def make_peft_adapter(
    base: Path, folder: Path, *, seed: int, **settings: object
) -> dict[str, Tensor]:
    """Save an adapter of random factors; return float64 changes of the weights it changes."""
    with warnings.catch_warnings():
        # PEFT warns of patterns that match nothing, and that an adapted head was not saved.
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(load(base), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder, save_embedding_layers=False)
    # In float64, so that PEFT's merge is exact for our purposes.
    merged, before = model.double().merge_and_unload().state_dict(), load_weights(base)
    changes = {name: merged[name] - before[name].double() for name in before}
    return {name: change for name, change in changes.items() if change.any()}


def factors_of(folder: Path) -> dict[str, LoraModule]:
    """Read an adapter's factors."""
    return dict(read_adapter(open_folder(folder)).modules)


def factor_of(name: str) -> float:
    """The product that the documentation promises, written out for ``PER_LAYER``."""
    return 0.5 * (3 if ".layers.1." in name else 1) * (-2 if ".mlp." in name else 1)


def logits(model: torch.nn.Module) -> Tensor:
    """Return a model's logits after a fixed text."""
    ids = torch.tensor([[3, 6, 7, 8, 9, 20, 21, 1, 4]])
    with torch.no_grad():
        return model(ids).logits


def logits_with(base: Path, _: Path, changes: Mapping[str, Tensor]) -> Tensor:
    """Return logits of the base after float64 changes of its weights."""
    weights = {name: tensor.double() for name, tensor in load_weights(base).items()}
    for name, change in changes.items():
        weights[name] += change
    model = load(base).double()
    model.load_state_dict(weights)
    return logits(model)


def summed(*parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the sum of changes, each of which may lack weights."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, change in part.items():
            total[name] = total.get(name, 0) + change
    return total
