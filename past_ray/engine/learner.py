"""The policy's learner: fp32 masters, GRPO gradients, one optimizer step per batch of samples.

One object per rank. Every method is collective: all ranks call it, in the same order, with equal
arguments except for their own share of the samples. Ranks with fewer micro-batches run fillers,
because sharded layers wait for all ranks.

Shapes: B = sequences, T = token positions, V = vocabulary.
"""

import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging

from past_ray.config.rl import RLConfig
from past_ray.engine.adapter import add_adapter, merge_adapter
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
from past_ray.errors import ConfigError, DataError, PastRayError, StorageError
from past_ray.locations import open_folder
from past_ray.rl.batching import MicroBatch, count_loss_tokens, filler_micro_batch, micro_batches
from past_ray.rl.logprobs import token_entropy, token_logprobs
from past_ray.rl.losses import kl_penalty, ppo_clip_loss, token_mean
from past_ray.rl.metrics import merge_metrics
from past_ray.rl.types import TrainSample
from past_ray.skill.checkpoint import read_config, write_checkpoint
from past_ray.storage import atomic_directory, write_json

logger = logging.getLogger(__name__)

T = TypeVar("T")

ADAM_BETAS = (0.9, 0.95)
"""A second moment over 20 steps: RL runs are short and their gradients change quickly."""

ADAM_EPSILON = 1e-8

ADAPTER_SEED = 0
"""Every rank, and a restarted run, must start from the same random adapter."""

STATE_FILE = "learner.json"
OPTIMIZER_FILE = "optimizer.pt"
ADAPTER_FILE = "adapter.pt"


class GRPOLearner:
    """Implements ``rl.protocols.Learner`` for Hugging Face causal language models."""

    def __init__(self, config: RLConfig, *, device: str) -> None:
        """Store the settings; ``load`` brings the weights.

        Args:
            config: Settings of the algorithm.
            device: ``cpu`` or a CUDA device.
        """
        if config.kl_coefficient > 0 and config.kl_estimator == "k1":
            logger.warning(
                "rl.kl_estimator=k1 has no effect on average: its gradient is 0 in expectation. "
                "Use k2 (reverse KL) or k3 (forward KL)."
            )
        self._config = config
        self._device = device
        self._policy_version = 0

    def load(self, checkpoint: Path, *, reference: Path | None, resume_from: Path | None) -> int:
        """Start from a checkpoint, or continue exactly where ``save`` stopped.

        Args:
            checkpoint: Hugging Face folder that the run starts from.
            reference: Frozen weights of the KL penalty; not loaded if its coefficient is 0.
            resume_from: A folder of ``save`` made by a run from the same ``checkpoint``.

        Returns:
            The policy version: 0, or that of ``resume_from``.

        Raises:
            ConfigError: If there is a KL penalty and no reference.
            StorageError: If a folder is no checkpoint.
        """
        config = self._config
        if config.kl_coefficient > 0 and reference is None:
            raise ConfigError(
                f"rl.kl_coefficient is {config.kl_coefficient} and needs a reference checkpoint, "
                "got none. Set rl.kl_coefficient=0 or give the reference."
            )
        self._like = checkpoint
        # Freed first, or an actor that serves several runs holds two models for a moment.
        for name in ("_model", "_optimizer", "_reference"):
            vars(self).pop(name, None)
        self._model = self._build_policy(checkpoint, resume_from)
        self._optimizer = torch.optim.AdamW(
            [p for p in self._model.parameters() if p.requires_grad],
            lr=config.learning_rate,
            betas=ADAM_BETAS,
            eps=ADAM_EPSILON,
            weight_decay=config.weight_decay,
        )
        self._reference: nn.Module | None = None
        if config.kl_coefficient > 0 and reference is not None:
            frozen = _load_model(reference).requires_grad_(False)
            self._reference = shard_model(frozen.to(self._device))
        self._policy_version = 0 if resume_from is None else self._resume(resume_from)
        return self._policy_version

    @property
    def policy_version(self) -> int:
        """Optimizer steps behind the weights held."""
        return self._policy_version

    def train_step(
        self, samples: Sequence[TrainSample], *, num_loss_tokens: int
    ) -> dict[str, float]:
        """Take one optimizer step on this rank's samples.

        Minimises ``ppo_clip_loss + kl_coefficient * kl_penalty``, both token means over the samples
        of all ranks. The gradient does not depend on how samples fall into micro-batches or ranks.
        If nothing trains (``num_loss_tokens`` is 0) the version advances and weights and optimizer
        stay as they are: momentum alone must not move the policy.

        Args:
            samples: This rank's share; may be empty.
            num_loss_tokens: Loss tokens of all ranks together.

        Returns:
            Metrics of the whole step, the same on every rank.

        Raises:
            DataError: If ``num_loss_tokens`` is not the count over all ranks.
            PastRayError: If loss or gradient is not finite; the weights are untouched.
        """
        found = int(sum_over_ranks(count_loss_tokens(samples)))
        if found != num_loss_tokens:
            raise DataError(
                f"num_loss_tokens must count the samples of all ranks, got {num_loss_tokens} for "
                f"{found} tokens. Count with rl.batching.count_loss_tokens before splitting."
            )
        if num_loss_tokens == 0:
            self._policy_version += 1
            return {"num_loss_tokens": 0.0}
        batches = self._micro_batches(samples)
        local = merge_metrics([self._backward(batch, num_loss_tokens) for batch in batches])
        metrics = merge_metrics(_gather(local))
        grad_norm = self._apply_gradients(loss=metrics["loss"])
        self._policy_version += 1
        return {**metrics, "grad_norm": grad_norm, "num_loss_tokens": float(num_loss_tokens)}

    @torch.no_grad()
    def token_logprobs(self, samples: Sequence[TrainSample]) -> list[list[float]]:
        """Return each sample's log-probabilities, length T; position 0 is 0."""
        rows: list[list[float]] = [[] for _ in samples]
        for batch in self._micro_batches(samples):
            logprobs, _ = self._score(self._model, batch, first_position=0)
            for index, row in zip(batch.indices, logprobs.tolist(), strict=False):
                rows[index] = row[: len(samples[index].token_ids)]
        return rows

    def logprob_gap(self, samples: Sequence[TrainSample]) -> float:
        """Return the largest difference to ``generator_logprobs`` on loss tokens, in nats."""
        gaps = [
            abs(ours - theirs)
            for row, sample in zip(self.token_logprobs(samples), samples, strict=True)
            for ours, theirs, trains in zip(
                row, sample.generator_logprobs, sample.loss_mask, strict=True
            )
            if trains
        ]
        return max(gaps, default=0.0)

    def export_weights(self) -> dict[str, Tensor]:
        """Return all weights in fp32 on CPU under Hugging Face names; empty on ranks but 0.

        A tied head appears once, as the embeddings. An adapter is merged.
        """
        return self._plain_weights(full_state_dict(self._model))

    def save(self, folder: Path) -> None:
        """Write a Hugging Face folder that also holds what ``load`` needs to continue exactly.

        Rank 0 writes; an older ``folder`` survives any failure.

        Raises:
            StorageError: If the disk is full.
        """
        state = full_state_dict(self._model)
        moments = optimizer_state(self._model, self._optimizer)
        if get_rank() != 0:
            return
        with atomic_directory(folder) as writing:
            write_checkpoint(writing, self._plain_weights(state), like=self._like)
            torch.save(moments, writing / OPTIMIZER_FILE)
            if self._config.lora is not None:
                adapter = {name: value for name, value in state.items() if ".lora_" in name}
                torch.save(adapter, writing / ADAPTER_FILE)
            write_json(writing / STATE_FILE, {"policy_version": self._policy_version})

    def _build_policy(self, checkpoint: Path, resume_from: Path | None) -> nn.Module:
        """Load, wrap and shard the policy. An adapter's own weights come with ``_resume``."""
        config = self._config
        if config.lora is None:
            model = _load_model(checkpoint if resume_from is None else resume_from)
        else:
            base = cast("PreTrainedModel", _load_model(checkpoint))
            model = add_adapter(base, config.lora, seed=ADAPTER_SEED).eval()
        if config.gradient_checkpointing:
            _checkpoint_gradients(model)
        return shard_model(model.to(self._device))

    def _resume(self, folder: Path) -> int:
        """Load adapter, optimizer state and version that ``save`` wrote."""
        version = open_folder(folder).read_json(STATE_FILE)["policy_version"]
        if self._config.lora is not None:
            adapter = _read_on_rank_0(folder / ADAPTER_FILE)
            load_full_state_dict(self._model, adapter, trainable_only=True)
        moments = _read_on_rank_0(folder / OPTIMIZER_FILE)
        load_optimizer_state(self._model, self._optimizer, moments)
        return int(version)

    def _micro_batches(self, samples: Sequence[TrainSample]) -> list[MicroBatch]:
        """Batch this rank's samples, filled up to the number that the busiest rank has."""
        max_tokens = self._config.max_tokens_per_micro_batch
        batches = micro_batches(samples, max_tokens=max_tokens)
        num_missing = int(max_over_ranks(len(batches))) - len(batches)
        return batches + [filler_micro_batch() for _ in range(num_missing)]

    def _backward(self, batch: MicroBatch, num_loss_tokens: int) -> dict[str, float]:
        """Add one micro-batch's gradient; return its part of the step's metrics."""
        config = self._config
        first = batch.first_loss_position
        counting: dict[str, Any] = {
            "loss_mask": batch.loss_mask.to(self._device),
            "num_loss_tokens": num_loss_tokens,
        }
        ref_logprobs = None
        if self._reference is not None:
            with torch.no_grad():
                ref_logprobs, _ = self._score(self._reference, batch, first_position=first)
        logprobs, entropy = self._score(self._model, batch, first_position=first)
        loss, metrics = ppo_clip_loss(
            logprobs,
            generator_logprobs=batch.generator_logprobs.to(self._device),
            advantages=batch.advantages.to(self._device),
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            **counting,
        )
        if ref_logprobs is not None:
            penalty, kl_metrics = kl_penalty(
                logprobs, ref_logprobs=ref_logprobs, estimator=config.kl_estimator, **counting
            )
            loss = loss + config.kl_coefficient * penalty
            metrics |= kl_metrics
        metrics |= {"loss": loss.detach(), "entropy": token_mean(entropy, **counting)}
        # FSDP averages gradients over ranks, the loss is a sum over them.
        (loss * get_world_size()).backward()
        return {name: value.item() for name, value in metrics.items()}

    def _apply_gradients(self, *, loss: float) -> float:
        """Clip, step and free the gradients; return the norm before clipping."""
        norm = clip_grad_norm(self._model, self._config.max_grad_norm)
        # The loss counts as well: clamp() gives a NaN log-ratio a gradient of 0.
        is_finite = math.isfinite(loss) and math.isfinite(norm)
        if is_finite:
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if not is_finite:
            raise PastRayError(
                f"loss and gradient must be finite, got loss {loss} and gradient norm {norm} after "
                f"step {self._policy_version}. Lower rl.learning_rate, or continue from an earlier "
                "checkpoint in fp32."
            )
        return norm

    def _score(
        self, model: nn.Module, batch: MicroBatch, *, first_position: int
    ) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and entropies, both ``[B, T]``, from ``first_position`` on.

        Earlier positions are 0, and their vocabulary projection, the largest tensor of a step, is
        never computed.
        """
        length = batch.token_ids.shape[1]
        # One position more, which predicts the first token; at least two, to have a token at all.
        start = max(0, min(first_position, length - 1) - 1)
        token_ids = batch.token_ids.to(self._device)
        with self._autocast():
            logits = model(
                input_ids=token_ids,
                attention_mask=batch.attention_mask.to(self._device),
                use_cache=False,
                logits_to_keep=length - start,
            ).logits
        temperature = self._config.temperature
        logprobs = token_logprobs(logits, token_ids[:, start:], temperature=temperature)
        entropy = token_entropy(logits.detach(), temperature=temperature)
        return pad(logprobs, (start, 0)), pad(entropy, (start, 0))

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._config.precision == "fp32":
            return nullcontext()
        return torch.autocast(torch.device(self._device).type, dtype=torch.bfloat16)

    def _plain_weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        lora = self._config.lora
        return state if lora is None else merge_adapter(state, scaling=lora.alpha / lora.rank)


def _load_model(folder: Path) -> nn.Module:
    """Read a checkpoint in fp32, with dropout off for good.

    Adam steps at usual learning rates vanish in 16-bit weights, so masters are fp32.
    """
    read_config(folder)
    transformers_logging.disable_progress_bar()
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    )
    return model.eval()


def _read_on_rank_0(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise StorageError(
            f"{file.parent} must be a checkpoint of the same kind of run, found no {file.name}. "
            "Use the rl.lora settings of the run that saved it, or start the run anew."
        )
    if get_rank() != 0:
        return {}
    return torch.load(file, map_location="cpu", weights_only=True)


def _checkpoint_gradients(model: nn.Module) -> None:
    """Recompute layers in the backward pass.

    transformers does so only for layers in training mode. Their children stay in evaluation mode,
    so dropout stays off.
    """
    cast("PreTrainedModel", model).gradient_checkpointing_enable()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


def _gather(value: T) -> list[T]:
    """Return the value of every rank, in rank order."""
    if get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * get_world_size()
    dist.all_gather_object(values, value)
    return values
