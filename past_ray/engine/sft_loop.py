"""Supervised fine-tuning on one rank: the optimizer step, its checkpoints and what it exports.

Every rank gets its own share of each step's examples. Inside a step the share is cut into
micro-batches of similar length, one document per row, so no document attends to another::

    share      9 examples of lengths 3 3 4 5 9 9 9 30 31
    micro 1    31                 padded tokens <= max_tokens_per_micro_batch
    micro 2    30
    micro 3    9 9 9 5 4 3 3

A rank with fewer micro-batches than another runs padding micro-batches without loss: under FSDP
every forward and backward pass is a collective.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from past_ray.config.sft import LoraConfig, SFTConfig
from past_ray.engine.adapter import add_adapter
from past_ray.engine.optimizer import make_optimizer
from past_ray.engine.sharding import (
    clip_grad_norm,
    full_state_dict,
    get_rank,
    get_world_size,
    load_full_state_dict,
    load_optimizer_state,
    max_over_ranks,
    optimizer_state,
    shard_model,
    sum_over_ranks,
)
from past_ray.errors import ConfigError
from past_ray.sft.examples import SFTExample
from past_ray.sft.loss import next_token_loss, padded_batch
from past_ray.sft.schedule import learning_rate
from past_ray.skill.checkpoint import hash_weights, save_checkpoint
from past_ray.skill.manifest import stamp
from past_ray.storage import atomic_directory

MAX_EAGER_LENGTH = 512
"""Up to here bf16 on a CPU computes attention eagerly.

The fused kernel's bf16 backward pass takes half of a small model's step there; the eager one takes
a tenth, but its memory grows with the square of the length.
"""

STATE_FILE = "state.pt"
"""Trainable weights and optimizer state of a training checkpoint."""

RECORDS_FILE = "records.json"
"""The metrics of all steps before a training checkpoint."""

PADDING_EXAMPLE = SFTExample(token_ids=(0, 0), num_prompt_tokens=2)
"""Has no loss: keeps a rank in step with the others' collectives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """What one optimizer step did, over all ranks."""

    step: int
    """From 0."""

    loss: float
    """Mean cross-entropy per loss token before the update, in nats."""

    lr: float
    """Learning rate of the update."""

    grad_norm: float
    """Global norm before clipping."""

    tokens: int
    """Tokens with loss."""

    seconds: float
    """Wall time of the step."""

    def as_dict(self) -> dict[str, float]:
        """Return the fields by name, as written to metrics.jsonl."""
        return asdict(self)


class SFTLearner:
    """Model, optimizer and step counter of one rank. All methods are collective."""

    def __init__(self, init_folder: Path, sft: SFTConfig, *, seed: int, device: str) -> None:
        """Load fp32 weights from ``init_folder`` onto ``device`` and shard them over all ranks."""
        assert sft.num_epochs is None, "the run's length must be resolved to steps"
        self._init_folder = init_folder
        self._sft = sft
        self._seed = seed
        self._device = torch.device(device)
        model = _load_model(init_folder, sft, seed=seed)
        self._fused_attention = str(cast(Any, model).config._attn_implementation)
        self._attention = self._fused_attention
        self._model = shard_model(model.to(self._device))
        self._model.train()
        self._optimizer = make_optimizer(
            self._model, learning_rate=sft.learning_rate, weight_decay=sft.weight_decay
        )
        self.records: list[StepRecord] = []

    @property
    def next_step(self) -> int:
        """Step that ``train_step`` does next."""
        return len(self.records)

    def train_step(self, share: Sequence[SFTExample]) -> StepRecord:
        """Do one optimizer step on this rank's share of the step's examples.

        Raises:
            ConfigError: The loss is not finite; the weights are those before the step.
        """
        started = time.perf_counter()
        step = self.next_step
        # Dropout must not depend on how often the run was interrupted.
        torch.manual_seed(self._seed + step * get_world_size() + get_rank())
        num_loss_tokens = int(sum_over_ranks(sum(e.num_loss_tokens for e in share)))
        loss = sum_over_ranks(self._accumulate(share, max(1, num_loss_tokens)))
        grad_norm = clip_grad_norm(self._model, self._sft.max_grad_norm)
        lr = learning_rate(
            step,
            schedule=self._sft.schedule,
            num_steps=self._sft.num_steps,
            peak=self._sft.learning_rate,
            warmup_frac=self._sft.warmup_frac,
        )
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise ConfigError(
                f"The loss must stay finite, step {step} has loss {loss} and gradient norm "
                f"{grad_norm}. Lower sft.learning_rate or use sft.precision fp32."
            )
        self._update(lr)
        record = StepRecord(
            step=step,
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            tokens=num_loss_tokens,
            seconds=time.perf_counter() - started,
        )
        self.records.append(record)
        return record

    def save(self, folder: Path) -> None:
        """Write what ``load`` needs to continue exactly; rank 0 writes into ``folder``."""
        state = {
            "weights": full_state_dict(self._model, trainable_only=self._is_adapter),
            "optimizer": optimizer_state(self._model, self._optimizer),
        }
        if get_rank() == 0:
            torch.save(state, folder / STATE_FILE)
            records = [record.as_dict() for record in self.records]
            (folder / RECORDS_FILE).write_text(json.dumps(records), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Continue from what ``save`` wrote, on any number of ranks."""
        state: dict[str, Any] = {"weights": {}, "optimizer": {}}
        if get_rank() == 0:
            state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
        load_full_state_dict(self._model, state["weights"], trainable_only=self._is_adapter)
        load_optimizer_state(self._model, self._optimizer, state["optimizer"])
        records = json.loads((folder / RECORDS_FILE).read_text(encoding="utf-8"))
        self.records = [StepRecord(**record) for record in records]

    def export(self, folder: Path) -> None:
        """Write the model as a plain fp32 Hugging Face folder; rank 0 writes.

        A LoRA run writes the merged weights, and the adapter itself into ``NAME-adapter`` beside
        ``folder``.
        """
        weights = full_state_dict(self._model, trainable_only=self._is_adapter)
        if get_rank() != 0:
            return
        if self._sft.lora is not None:
            adapter_folder = folder.parent / f"{folder.name}-adapter"
            weights = _merge_adapter(weights, self._init_folder, self._sft.lora, adapter_folder)
        lineage = {
            "operation": "sft",
            "base_hash": hash_weights(self._init_folder),
            **stamp(),
        }
        save_checkpoint(folder, weights, like=self._init_folder, lineage=lineage)

    @property
    def _is_adapter(self) -> bool:
        return self._sft.lora is not None

    def _accumulate(self, share: Sequence[SFTExample], num_loss_tokens: int) -> float:
        """Run all micro-batches forward and backward; return this rank's part of the loss."""
        micro_batches = split_into_micro_batches(
            share, max_tokens=self._sft.max_tokens_per_micro_batch
        )
        num_rounds = int(max_over_ranks(len(micro_batches)))
        micro_batches += [[PADDING_EXAMPLE]] * (num_rounds - len(micro_batches))
        total = torch.zeros((), device=self._device)
        for micro_batch in micro_batches:
            loss = self._forward(micro_batch, num_loss_tokens)
            # FSDP averages over ranks, and each rank's loss is already a part of the global mean.
            (loss * get_world_size()).backward()
            total += loss.detach()
        return float(total.item())

    def _forward(self, micro_batch: Sequence[SFTExample], num_loss_tokens: int) -> Tensor:
        input_ids, attention_mask, labels = padded_batch(
            [example.token_ids for example in micro_batch],
            num_prompt_tokens=[example.num_prompt_tokens for example in micro_batch],
            pad_id=0,
        )
        is_bf16 = self._sft.precision == "bf16"
        is_eager = is_bf16 and self._device.type == "cpu" and input_ids.shape[1] <= MAX_EAGER_LENGTH
        self._use_attention("eager" if is_eager else self._fused_attention)
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=is_bf16):
            output = self._model(
                input_ids=input_ids.to(self._device),
                attention_mask=attention_mask.to(self._device),
                use_cache=False,
            )
        return next_token_loss(
            output.logits, labels=labels.to(self._device), num_loss_tokens=num_loss_tokens
        )

    def _use_attention(self, implementation: str) -> None:
        if implementation != self._attention:
            cast(Any, self._model).set_attn_implementation(implementation)
            self._attention = implementation

    def _update(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad()


def split_into_micro_batches(
    examples: Sequence[SFTExample], *, max_tokens: int
) -> list[list[SFTExample]]:
    """Group examples of similar length, longest first.

    Args:
        examples: One rank's share of a step.
        max_tokens: Limit of rows times longest row; an example that is longer goes alone.

    Returns:
        Groups that hold every example once.
    """
    groups: list[list[SFTExample]] = []
    for example in sorted(examples, key=lambda example: -len(example.token_ids)):
        if groups and (len(groups[-1]) + 1) * len(groups[-1][0].token_ids) <= max_tokens:
            groups[-1].append(example)
        else:
            groups.append([example])
    return groups


def _load_model(init_folder: Path, sft: SFTConfig, *, seed: int) -> nn.Module:
    """Load fp32 masters on the CPU and put the adapter around them, the same on every rank."""
    transformers_logging.disable_progress_bar()
    model = cast(
        PreTrainedModel,
        AutoModelForCausalLM.from_pretrained(init_folder, dtype=torch.float32),
    )
    if sft.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if sft.lora is None:
        return model
    return add_adapter(model, sft.lora, seed=seed)


def _merge_adapter(
    adapter: dict[str, Tensor], init_folder: Path, lora: LoraConfig, adapter_folder: Path
) -> dict[str, Tensor]:
    """Add a trained adapter to the weights it was trained on; save the adapter by itself.

    The model in training is left alone: merging and unmerging would change its weights by rounding.
    """
    model = AutoModelForCausalLM.from_pretrained(init_folder, dtype=torch.float32)
    wrapped = cast(Any, add_adapter(cast(PreTrainedModel, model), lora, seed=0))
    # Rank 0 is alone here: nothing below may be a collective.
    unknown = wrapped.load_state_dict(adapter, strict=False).unexpected_keys
    assert not unknown, unknown
    with atomic_directory(adapter_folder) as writing:
        wrapped.save_pretrained(writing)
    return wrapped.merge_and_unload().state_dict()
