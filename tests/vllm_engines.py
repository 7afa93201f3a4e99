"""A real vLLM engine on the tiny model, and what its numbers must be."""

import torch
from transformers import AutoModelForCausalLM

from past_ray.rl.adapter_weights import AdapterWeights
from past_ray.rl.types import SamplingParams


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def perturbed(folder, size):
    """The folder's model, every weight moved, so that each of them shows in the output."""
    model = load(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.sin(torch.arange(parameter.numel())).view_as(parameter)
    return model


def weights_of(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def sampling(*, temperature=0.7, max_new_tokens=8, seed=0):
    return SamplingParams(temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)


def full_forward_logprobs(model, prompt, token_ids, temperature):
    """Score ``token_ids`` after ``prompt`` by one forward pass of transformers."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + token_ids])).logits[0]
    logprobs = (logits / temperature).log_softmax(-1)
    return [
        logprobs[len(prompt) - 1 + index, token_id].item()
        for index, token_id in enumerate(token_ids)
    ]


def make_adapter(model, *, rank=4, alpha=8, scale=0.2, seed=0):
    """An adapter on two projections of every layer, and the model with it merged."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in model.named_parameters():
        if name.endswith(("q_proj.weight", "v_proj.weight")):
            layer = f"base_model.model.{name.removesuffix('.weight')}"
            rows, columns = parameter.shape
            down = scale * torch.randn(rank, columns, generator=generator)
            up = scale * torch.randn(rows, rank, generator=generator)
            tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"] = down, up
            with torch.no_grad():
                parameter += alpha / rank * (up @ down)
    adapter = AdapterWeights(
        tensors=tensors, rank=rank, alpha=alpha, target_modules=("q_proj", "v_proj")
    )
    return adapter, model
