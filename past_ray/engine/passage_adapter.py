"""One LoRA adapter after another on one frozen base: the single-passage regime.

::

    base (loaded once, frozen)  +  A, B fresh  -- num_epochs over a passage's sequences -->  folder
                                +  A, B fresh  -- ... the next passage ...               -->  folder

Every adapter starts from the same factors, with a new optimizer and new seeds, so it does not
depend on what was trained before it.

Reference: SEAL, https://arxiv.org/abs/2506.10943, which trains with the defaults of the HF Trainer:
AdamW without weight decay or warm-up, gradients clipped to 1.
Differs from the paper: padding is neither attended to nor trained. SEAL pads each sequence to 2048
tokens with end-of-sequence and trains on all of them; here a sequence ends with one, as
``sft.examples.document_examples`` makes it.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from past_ray.config.single_passage import SinglePassageConfig
from past_ray.engine.adapter import add_adapter
from past_ray.errors import ConfigError, StorageError
from past_ray.locations import open_folder
from past_ray.sft.examples import SFTExample
from past_ray.sft.loss import next_token_loss, padded_batch
from past_ray.sft.plan import hash_examples
from past_ray.sft.schedule import bucketed_order, learning_rate
from past_ray.skill.adapter_folder import CONFIG_FILE, WEIGHTS_FILE
from past_ray.skill.checkpoint import LINEAGE_FILE
from past_ray.skill.lineage import read_lineage
from past_ray.skill.manifest import hash_files, stamp
from past_ray.storage import atomic_directory, write_json

BETAS = (0.9, 0.999)
"""Of AdamW; those that SEAL's learning rate was chosen with."""

MAX_GRAD_NORM = 1.0

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterTraining:
    """How the training of one adapter went."""

    loss_first: float
    """Mean cross-entropy per token over the first epoch, each step's before its update, in nats."""

    loss_last: float
    """The same over the last epoch."""

    num_tokens: int
    """Tokens with loss over all epochs."""

    seconds: float
    """Wall time of the training, without writing."""


class PassageTrainer:
    """Owner of one base model and of the one adapter around it."""

    def __init__(
        self, model_folder: Path, config: SinglePassageConfig, *, base_hash: str, device: str
    ) -> None:
        """Load the base onto ``device``.

        Args:
            model_folder: Hugging Face folder of the base.
            config: How every adapter is trained.
            base_hash: ``hash_weights(model_folder)``, for the adapters' lineage.
            device: ``cpu`` or ``cuda``.
        """
        transformers_logging.disable_progress_bar()
        self._config = config
        self._base_hash = base_hash
        self._device = torch.device(device)
        model = cast(
            PreTrainedModel,
            AutoModelForCausalLM.from_pretrained(model_folder, dtype=DTYPES[config.precision]),
        )
        self._model = add_adapter(model, config.lora, seed=config.seed).to(self._device).train()
        self._factors = [p for p in self._model.parameters() if p.requires_grad]
        self._fresh = [factor.detach().clone() for factor in self._factors]

    def train(self, examples: Sequence[SFTExample], folder: Path) -> AdapterTraining:
        """Train a fresh adapter and write it to ``folder``, atomically, as PEFT would.

        Raises:
            ConfigError: There is nothing to train on, or the loss does not stay finite.
        """
        num_loss_tokens = sum(example.num_loss_tokens for example in examples)
        if not num_loss_tokens:
            raise ConfigError(
                f"A passage must have a token to train on, {folder.name} has none. Leave it out."
            )
        started = time.perf_counter()
        # Only the CPU's generator is kept from harm; the GPU is the trainer's own.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._config.seed)
            losses = self._run_epochs(examples)
        training = AdapterTraining(
            loss_first=losses[0] / num_loss_tokens,
            loss_last=losses[-1] / num_loss_tokens,
            num_tokens=num_loss_tokens * self._config.num_epochs,
            seconds=time.perf_counter() - started,
        )
        if not math.isfinite(sum(losses)):
            raise ConfigError(
                f"The loss must stay finite, {folder.name} has {training.loss_first} in the first "
                f"and {training.loss_last} in the last epoch. Lower the learning_rate."
            )
        self._write(folder, training, examples)
        return training

    def _run_epochs(self, examples: Sequence[SFTExample]) -> list[float]:
        """Train from the fresh factors; return each epoch's summed loss over its tokens."""
        config = self._config
        order = bucketed_order(
            [len(example.token_ids) for example in examples],
            num_epochs=config.num_epochs,
            batch_size=config.batch_size,
            seed=config.seed,
        )
        with torch.no_grad():
            for factor, fresh in zip(self._factors, self._fresh, strict=True):
                factor.copy_(fresh)
        optimizer = AdamW(
            self._factors, lr=config.learning_rate, betas=BETAS, weight_decay=0.0, fused=True
        )
        losses: list[Tensor] = []
        for step, indices in enumerate(order):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(
                    step,
                    schedule=config.schedule,
                    num_steps=len(order),
                    peak=config.learning_rate,
                    warmup_frac=0.0,
                )
            losses.append(self._train_step([examples[index] for index in indices], optimizer))
        # Read once: a GPU need not wait for each step.
        return torch.stack(losses).double().view(config.num_epochs, -1).sum(1).tolist()

    def _train_step(self, batch: Sequence[SFTExample], optimizer: AdamW) -> Tensor:
        """Do one step on the mean loss per token of the batch; return their sum before it."""
        num_loss_tokens = sum(example.num_loss_tokens for example in batch)
        input_ids, attention_mask, labels = padded_batch(
            [example.token_ids for example in batch],
            num_prompt_tokens=[example.num_prompt_tokens for example in batch],
            pad_id=0,
        )
        logits = self._model(
            input_ids=input_ids.to(self._device),
            attention_mask=attention_mask.to(self._device),
            use_cache=False,
        ).logits
        loss = next_token_loss(
            logits, labels=labels.to(self._device), num_loss_tokens=max(1, num_loss_tokens)
        )
        loss.backward()
        nn.utils.clip_grad_norm_(self._factors, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach() * num_loss_tokens

    def _write(
        self, folder: Path, training: AdapterTraining, examples: Sequence[SFTExample]
    ) -> None:
        with atomic_directory(folder) as writing:
            cast(Any, self._model).save_pretrained(writing, save_embedding_layers=False)
            lineage = {
                **adapter_fingerprint(examples, self._config, base_hash=self._base_hash),
                "adapter_hash": hash_files([writing / CONFIG_FILE, writing / WEIGHTS_FILE]),
                "training": asdict(training),
                **stamp(),
            }
            write_json(writing / LINEAGE_FILE, lineage)


def adapter_fingerprint(
    examples: Sequence[SFTExample], config: SinglePassageConfig, *, base_hash: str
) -> dict[str, Any]:
    """Return everything that decides an adapter, as its ``past_ray.json`` says it."""
    return {
        "operation": "passage_adapter",
        "base_hash": base_hash,
        "examples_hash": hash_examples(examples),
        "config": config.model_dump(mode="json"),
    }


def finished_training(folder: Path, fingerprint: dict[str, Any]) -> AdapterTraining | None:
    """Return how a complete adapter with this fingerprint was trained; None if it is not there.

    An adapter whose files are not those that were written counts as absent.
    """
    try:
        lineage = read_lineage(open_folder(folder))
        if any(lineage.get(key) != value for key, value in fingerprint.items()):
            return None
        found = hash_files([folder / CONFIG_FILE, folder / WEIGHTS_FILE])
    except StorageError:
        return None
    return AdapterTraining(**lineage["training"]) if found == lineage["adapter_hash"] else None
