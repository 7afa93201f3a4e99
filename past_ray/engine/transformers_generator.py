"""Plain transformers as a ``Generator``, for machines on which vLLM cannot run.

Shapes: B = sequences decoded together, T = token positions, V = vocabulary.

Prompts are padded on the left, so that all rows sample their next token at the same index; the
attention mask hides the padding and positions count from each row's own first token. A row that
has ended is fed padding until the last one ends; what it computes is thrown away.
"""

import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from past_ray.engine.busy_clock import BusyClock
from past_ray.engine.generator_checks import (
    PromptLimits,
    check_prompts,
    check_version,
    check_weight_names,
    check_weight_shapes,
    eos_token_ids,
    vocab_size,
)
from past_ray.errors import ClusterError, ConfigError
from past_ray.rl.adapter_weights import AdapterWeights
from past_ray.rl.generator_stats import GeneratorStats
from past_ray.rl.types import Completion, SamplingParams

logger = logging.getLogger(__name__)

PADDING_ID = 0
"""Any id will do: padding is masked on the left and its outputs are dropped on the right."""


class TransformersGenerator:
    """Samples with transformers; see ``past_ray.rl.protocols.Generator``.

    Calls from several threads take turns. A completion's tokens depend on its prompt and seed
    alone, up to rounding, not on what is decoded beside it.
    """

    def __init__(
        self, model_folder: Path, *, dtype: str, max_model_len: int, max_num_seqs: int
    ) -> None:
        """Load the weights of ``model_folder``, onto a GPU when there is one.

        Raises:
            ConfigError: If the checkpoint states no end-of-sequence token.
        """
        self._stop_token_ids = frozenset(eos_token_ids(model_folder))
        self._limits = PromptLimits(
            max_model_len=max_model_len, vocab_size=vocab_size(model_folder)
        )
        self._max_num_seqs = max_num_seqs
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=getattr(torch, dtype))
        self._model: Any = model.to(self._device).eval()
        self._policy_version = -1
        self._base: dict[str, Tensor] = {}
        self._lock = threading.Lock()
        self._clock = BusyClock()
        self._num_requests = 0
        self._is_closed = False

    @property
    def policy_version(self) -> int:
        """Version of the weights in use; -1 before the first update."""
        return self._policy_version

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams]
    ) -> list[Completion]:
        """Complete every prompt, ``max_num_seqs`` at a time; blocks.

        At temperature 0 the log-probabilities are those of the unscaled distribution.

        Raises:
            GenerationError: If a prompt does not fit; nothing of the call is sampled then.
            ClusterError: If the generator is closed.
        """
        check_prompts(prompts, sampling, self._limits)
        completions: list[Completion] = []
        with self._lock:
            self._check_open()
            for start in range(0, len(prompts), self._max_num_seqs):
                stop = start + self._max_num_seqs
                num_rows = len(prompts[start:stop])
                self._clock.open(num_rows)
                try:
                    completions += self._complete(prompts[start:stop], sampling[start:stop])
                finally:
                    self._clock.close(num_rows)
                self._num_requests += num_rows
        return completions

    def update_weights(self, weights: Mapping[str, Tensor], policy_version: int) -> None:
        """Replace all weights once no call is being answered; nothing is cached between calls.

        Raises:
            ClusterError: If a parameter is missing, unknown or has another shape; the old weights
                stay in use.
        """
        with self._lock:
            self._check_open()
            parameters: dict[str, Tensor] = dict(self._model.named_parameters())
            check_weight_names(weights, parameters)
            check_weight_shapes(
                {name: weight.shape for name, weight in weights.items()},
                {name: parameter.shape for name, parameter in parameters.items()},
            )
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(weights[name])
            self._policy_version = policy_version
            self._base = {}

    def load_adapter(self, adapter: AdapterWeights, policy_version: int) -> None:
        """Merge an adapter into the weights that were last given in full.

        Raises:
            ClusterError: If the model has no such layer; the weights before stay in use.
        """
        with self._lock:
            self._check_open()
            parameters: dict[str, Tensor] = dict(self._model.named_parameters())
            updates = adapter_updates(adapter)
            if unknown := sorted(updates.keys() - parameters.keys()):
                raise ClusterError(
                    f"an adapter must be on layers of the model, which has no {unknown[0]}. Both "
                    "sides must load the same checkpoint."
                )
            with torch.no_grad():
                for name, update in updates.items():
                    base = self._base.setdefault(name, parameters[name].clone())
                    parameters[name].copy_(base + update.to(base.device))
            self._policy_version = policy_version

    def probe(
        self, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams], policy_version: int
    ) -> list[Completion]:
        """Complete fixed prompts right after a sync.

        Raises:
            ParityError: If the version is not the one of the sync.
        """
        check_version(self._policy_version, policy_version)
        return self.generate(prompts, sampling)

    def stats(self) -> GeneratorStats:
        """Return counters, without waiting for the model."""
        return GeneratorStats(
            policy_version=self._policy_version,
            busy_s=self._clock.seconds,
            num_requests=self._num_requests,
            num_in_flight=self._clock.num_open,
        )

    def sleep(self) -> None:
        """Refuse: only vLLM can give its memory away."""
        raise ConfigError("sleep_between_steps needs backend: vllm, got transformers")

    def wake_up(self) -> None:
        """Refuse, see ``sleep``."""
        self.sleep()

    def close(self) -> None:
        """Free the model. Safe to call again."""
        with self._lock:
            self._is_closed = True
            self._model = None

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClusterError("the generator must be open; close() was called")

    @torch.inference_mode()
    def _complete(
        self, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams]
    ) -> list[Completion]:
        """Decode one batch to its end with a key-value cache."""
        rows = [_Row(params, self._device, self._stop_token_ids) for params in sampling]
        input_ids, attention_mask = _left_padded(prompts, self._device)  # [B, T]
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)  # [B, T]
        cache = None
        while True:
            output = self._model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            logits = output.logits[:, -1].float()  # [B, V]
            next_ids = [row.advance(logits[index]) for index, row in enumerate(rows)]
            if all(row.finish_reason is not None for row in rows):
                break
            input_ids = torch.tensor(next_ids, device=self._device).unsqueeze(1)  # [B, 1]
            attention_mask = torch.cat([attention_mask, torch.ones_like(input_ids)], dim=1)
            positions = positions[:, -1:] + 1
        return [row.completion(self._policy_version) for row in rows]


class _Row:
    """One completion while it grows."""

    def __init__(
        self, params: SamplingParams, device: torch.device, stop_token_ids: frozenset[int]
    ) -> None:
        self.finish_reason: str | None = None
        self._params = params
        self._stop_token_ids = stop_token_ids
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._random: torch.Generator | None = None
        if params.seed is not None:
            self._random = torch.Generator(device=device).manual_seed(params.seed)

    def advance(self, logits: Tensor) -> int:
        """Sample the next token from ``logits`` ``[V]``; padding once the row has ended."""
        if self.finish_reason is not None:
            return PADDING_ID
        temperature = self._params.temperature
        logprobs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
        if temperature == 0:
            token_id = int(logprobs.argmax())
        else:
            token_id = int(torch.multinomial(logprobs.exp(), 1, generator=self._random))
        self._token_ids.append(token_id)
        self._logprobs.append(float(logprobs[token_id]))
        if token_id in self._stop_token_ids:
            self.finish_reason = "stop"
        elif len(self._token_ids) == self._params.max_new_tokens:
            self.finish_reason = "length"
        return token_id

    def completion(self, policy_version: int) -> Completion:
        return Completion(
            token_ids=self._token_ids,
            logprobs=self._logprobs,
            finish_reason="stop" if self.finish_reason == "stop" else "length",
            policy_version=policy_version,
        )


def adapter_updates(adapter: AdapterWeights) -> dict[str, Tensor]:
    """Return ``alpha / rank * B A`` by the name of the weight that it is added to."""
    updates: dict[str, Tensor] = {}
    for name, down in adapter.tensors.items():
        layer, is_down, _ = name.partition(".lora_A.")
        if is_down:
            up = adapter.tensors[name.replace(".lora_A.", ".lora_B.")]
            plain = layer.removeprefix("base_model.model.")
            updates[f"{plain}.weight"] = adapter.alpha / adapter.rank * (up.float() @ down.float())
    return updates


def _left_padded(prompts: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask, both ``[B, T]``, with padding before each prompt."""
    width = max(len(prompt) for prompt in prompts)
    ids = [[PADDING_ID] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
