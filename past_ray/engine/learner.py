"""The policy's learner: fp32 masters, one optimizer step per batch of samples.

    samples -> packs -> log-probabilities -> rl_loss -> gradients -> step
                                                     summed over packs and ranks

One object per rank. Every method is collective: all ranks call it, in the same order, with equal
arguments except for their own share of the samples. Ranks with fewer packs run fillers, because
sharded layers wait for all ranks.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from past_ray.config.rl import RLConfig
from past_ray.engine.adapter import adapter_weights, merge_adapter
from past_ray.engine.learner_checkpoint import (
    ADAPTER_FILE,
    OPTIMIZER_FILE,
    RANDOM_FILE,
    STATE_FILE,
    write_extra_files,
    write_manifest,
)
from past_ray.engine.learner_model import load_policy, load_reference
from past_ray.engine.learner_state import (
    random_state,
    read_state,
    set_random_state,
    write_state,
)
from past_ray.engine.optimizer import make_optimizer
from past_ray.engine.packing import Pack, filler_pack, pack_samples
from past_ray.engine.scoring import score_pack
from past_ray.engine.sharding import (
    clip_grad_norm,
    full_state_dict,
    gather_over_ranks,
    get_rank,
    get_world_size,
    load_full_state_dict,
    load_optimizer_state,
    max_over_ranks,
    optimizer_state,
    sum_over_ranks,
)
from past_ray.errors import ConfigError, DataError, PastRayError
from past_ray.locations import open_folder
from past_ray.rl.adapter_weights import AdapterWeights
from past_ray.rl.metrics import merge_metrics
from past_ray.rl.objective import StepTotals, rl_loss
from past_ray.rl.types import TrainSample
from past_ray.skill.checkpoint import write_checkpoint
from past_ray.storage import atomic_directory, write_json


class GRPOLearner:
    """Implements ``rl.protocols.Learner`` for Hugging Face causal language models."""

    def __init__(self, config: RLConfig, *, device: str) -> None:
        """Store the settings; ``load`` brings the weights.

        Args:
            config: Settings of the algorithm.
            device: ``cpu`` or a CUDA device.
        """
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
            ConfigError: If there is a KL penalty and no reference, or the model cannot be packed.
            StorageError: If a folder is no checkpoint.
        """
        config = self._config
        if config.kl.coefficient > 0 and reference is None:
            raise ConfigError(
                f"rl.kl.coefficient is {config.kl.coefficient} and needs a reference checkpoint, "
                "got none. Set rl.kl.coefficient=0 or give the reference."
            )
        self._like = checkpoint
        # Freed first, or an actor that serves several runs holds two models for a moment.
        for name in ("_model", "_optimizer", "_reference"):
            vars(self).pop(name, None)
        # An adapter sits on the weights that the run started from; its own come with _resume.
        weights = checkpoint if resume_from is None or config.lora is not None else resume_from
        self._model = load_policy(config, weights, device=self._device)
        self._optimizer = make_optimizer(
            self._model, learning_rate=config.learning_rate, weight_decay=config.weight_decay
        )
        self._reference: nn.Module | None = None
        if config.kl.coefficient > 0 and reference is not None:
            self._reference = load_reference(reference, device=self._device)
        self._policy_version = 0 if resume_from is None else self._resume(resume_from)
        return self._policy_version

    @property
    def policy_version(self) -> int:
        """Optimizer steps behind the weights held."""
        return self._policy_version

    def train_step(self, samples: Sequence[TrainSample], *, totals: StepTotals) -> dict[str, float]:
        """Take one optimizer step on this rank's samples.

        Minimises ``rl.objective.rl_loss``, a sum over the samples of all ranks: the gradient does
        not depend on how they fall into packs or ranks. If nothing trains the version advances and
        weights and optimizer stay as they are: momentum alone must not move the policy.

        Args:
            samples: This rank's share; may be empty.
            totals: Counts over all ranks.

        Returns:
            Metrics of the whole step, the same on every rank.

        Raises:
            DataError: If ``totals`` does not count the samples of all ranks.
            PastRayError: If loss or gradient is not finite; the weights are untouched.
        """
        self._check_totals(samples, totals)
        num_loss_tokens = float(totals.num_loss_tokens)
        if num_loss_tokens == 0:
            self._policy_version += 1
            return {"num_loss_tokens": 0.0}
        local = _merge_tensors([self._backward(pack, totals) for pack in self._packs(samples)])
        metrics = merge_metrics(gather_over_ranks(local))
        grad_norm = self._apply_gradients(loss=metrics["loss"])
        self._policy_version += 1
        return {**metrics, "grad_norm": grad_norm, "num_loss_tokens": num_loss_tokens}

    @torch.no_grad()
    def token_logprobs(self, samples: Sequence[TrainSample]) -> list[list[float]]:
        """Return each sample's log-probabilities, length T; position 0 is 0."""
        rows: list[list[float]] = [[] for _ in samples]
        for pack in self._packs(samples, every_token=True):
            pack = pack.to(self._device)
            logprobs, _ = self._score(self._model, pack)
            for index, row in zip(pack.indices, logprobs.tolist(), strict=False):
                rows[index] = [0.0, *row[: len(samples[index].token_ids) - 1]]
        return rows

    @torch.no_grad()
    def logprob_gap(self, samples: Sequence[TrainSample]) -> float:
        """Return the largest difference to ``generator_logprobs`` on loss tokens, in nats.

        NaN if any log-probability is.
        """
        gaps = [torch.zeros(())]
        for pack in self._packs(samples):
            pack = pack.to(self._device)
            logprobs, _ = self._score(self._model, pack)
            gaps.append((logprobs - pack.generator_logprobs).abs().max().cpu())
        return float(torch.stack(gaps).max())

    def export_weights(self, *, copy: bool = True) -> dict[str, Tensor]:
        """Return all weights in fp32 on CPU under Hugging Face names; empty on ranks but 0.

        A tied head appears once, as the embeddings. An adapter is merged.

        Args:
            copy: False may return the learner's own tensors, which the next step changes.
        """
        return self._plain_weights(full_state_dict(self._model, copy=copy))

    def export_adapter(self) -> AdapterWeights | None:
        """Return the adapter in fp32 on CPU; None without one, and on ranks but 0."""
        lora = self._config.lora
        if lora is None:
            return None
        state = full_state_dict(self._model, trainable_only=True)
        return adapter_weights(state, lora) if get_rank() == 0 else None

    def save(self, folder: Path, *, extra_files: Mapping[str, bytes] | None = None) -> None:
        """Write a Hugging Face folder that also holds what ``load`` needs to continue exactly.

        Rank 0 writes; an older ``folder`` survives any failure. ``verify_checkpoint`` tells
        whether all of it is there.

        Args:
            folder: Replaced as a whole.
            extra_files: Content by name, part of the same checkpoint.

        Raises:
            StorageError: If the disk is full or a name is taken.
        """
        state = full_state_dict(self._model)
        moments = optimizer_state(self._model, self._optimizer)
        random_states = gather_over_ranks(random_state(self._device))
        if get_rank() != 0:
            return
        with atomic_directory(folder) as writing:
            write_checkpoint(writing, self._plain_weights(state), like=self._like)
            write_state(writing / OPTIMIZER_FILE, moments)
            write_state(writing / RANDOM_FILE, random_states)
            if self._config.lora is not None:
                adapter = {name: value for name, value in state.items() if ".lora_" in name}
                write_state(writing / ADAPTER_FILE, adapter)
            write_json(writing / STATE_FILE, {"policy_version": self._policy_version})
            write_extra_files(writing, extra_files or {})
            write_manifest(writing)

    def _resume(self, folder: Path) -> int:
        """Load adapter, optimizer, random state and version that ``save`` wrote."""
        version = open_folder(folder).read_json(STATE_FILE)["policy_version"]
        if self._config.lora is not None:
            adapter = _read_on_rank_0(folder / ADAPTER_FILE)
            load_full_state_dict(self._model, adapter, trainable_only=True)
        moments = _read_on_rank_0(folder / OPTIMIZER_FILE)
        load_optimizer_state(self._model, self._optimizer, moments)
        states = cast("list[dict[str, Tensor]]", read_state(folder / RANDOM_FILE))
        set_random_state(states[get_rank() % len(states)], device=self._device)
        return int(version)

    def _check_totals(self, samples: Sequence[TrainSample], totals: StepTotals) -> None:
        counts = [sum(sample.loss_mask) for sample in samples]
        tokens = int(sum_over_ranks(sum(counts)))
        rollouts = int(sum_over_ranks(sum(count > 0 for count in counts)))
        if (tokens, rollouts) != (totals.num_loss_tokens, totals.num_rollouts):
            raise DataError(
                "totals must count the samples of all ranks, got "
                f"{totals.num_loss_tokens} for {tokens} loss tokens and {totals.num_rollouts} for "
                f"{rollouts} rollouts. Count with rl.objective.count_totals before splitting."
            )

    def _packs(self, samples: Sequence[TrainSample], *, every_token: bool = False) -> list[Pack]:
        """Pack this rank's samples, filled up to the number that the busiest rank has."""
        max_tokens = self._config.max_tokens_per_micro_batch
        packs = pack_samples(samples, max_tokens=max_tokens, every_token=every_token)
        num_missing = int(max_over_ranks(len(packs))) - len(packs)
        return packs + [filler_pack() for _ in range(num_missing)]

    def _backward(self, pack: Pack, totals: StepTotals) -> dict[str, Tensor]:
        """Add one pack's gradient; return its part of the step's metrics."""
        pack = pack.to(self._device)
        ref_logprobs = None
        if self._reference is not None:
            with torch.no_grad():
                ref_logprobs, _ = self._score(self._reference, pack)
        logprobs, entropy = self._score(self._model, pack)
        has_bonus = self._config.entropy_coefficient > 0
        loss, metrics = rl_loss(
            logprobs,
            generator_logprobs=pack.generator_logprobs,
            advantages=pack.advantages,
            loss_mask=pack.loss_mask,
            ref_logprobs=ref_logprobs,
            entropy=entropy if has_bonus else entropy.detach(),
            totals=totals,
            rl=self._config,
        )
        # FSDP averages gradients over ranks, the loss is a sum over them.
        (loss * get_world_size()).backward()
        return metrics

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

    def _score(self, model: nn.Module, pack: Pack) -> tuple[Tensor, Tensor]:
        config = self._config
        return score_pack(model, pack, temperature=config.temperature, precision=config.precision)

    def _plain_weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        lora = self._config.lora
        return state if lora is None else merge_adapter(state, scaling=lora.alpha / lora.rank)


def _merge_tensors(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Merge the metrics of packs; they leave the device once, at the end of a step."""
    values = torch.stack([value.double() for part in parts for value in part.values()]).tolist()
    names = [name for part in parts for name in part]
    return merge_metrics({name: value} for name, value in zip(names, values, strict=True))


def _read_on_rank_0(file: Path) -> dict[str, Any]:
    return cast("dict[str, Any]", read_state(file)) if get_rank() == 0 else {}
