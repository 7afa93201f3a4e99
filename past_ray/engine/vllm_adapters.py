"""LoRA adapters of one vLLM engine: on disk, in the engine, and in requests in flight.

::

    load v7 --> folder policy-v7 --> engine.add_lora --> new requests name v7
                                                         requests in flight still name v6
    the last request that names v6 ends --> engine.remove_lora(v6), its folder is deleted

Each version has a name of its own, because vLLM keys its prefix cache by the name: blocks that v6
computed are never reused for v7.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Protocol

from past_ray.errors import ClusterError
from past_ray.rl.adapter_weights import AdapterWeights

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM accepts for ``max_lora_rank``."""


def vllm_lora_rank(rank: int) -> int | None:
    """Return the smallest ``max_lora_rank`` of vLLM that holds ``rank``; None if none does."""
    return min((allowed for allowed in VLLM_RANKS if allowed >= rank), default=None)


class AdapterEngine(Protocol):
    """The part of vLLM's ``LLMEngine`` that knows adapters."""

    def add_lora(self, lora_request: "LoRARequest") -> bool:
        """Load an adapter from its folder."""
        ...

    def remove_lora(self, lora_id: int) -> bool:
        """Forget an adapter."""
        ...

    def list_loras(self) -> set[int]:
        """Return the ids of the adapters that are loaded."""
        ...


class AdapterStore:
    """Owner of all adapters; used by the engine's thread only."""

    def __init__(self, engine: AdapterEngine, *, max_rank: int | None) -> None:
        """Start without an adapter.

        Args:
            engine: Where they are loaded.
            max_rank: Largest rank that fits; None where the engine takes no adapter.
        """
        self.current: LoRARequest | None = None
        """The adapter of new requests."""

        self._engine = engine
        self._max_rank = max_rank
        self._folder = TemporaryDirectory(prefix="past-ray-adapters-", ignore_cleanup_errors=True)
        self._loaded: dict[int, LoRARequest] = {}
        self._num_loaded = 0
        self._users: dict[str, int] = {}

    def load(self, adapter: AdapterWeights, policy_version: int) -> None:
        """Write an adapter, load it and give it to all new requests.

        Raises:
            ClusterError: If it does not fit, or the engine does not list it afterwards; the one
                before stays in use.
        """
        from vllm.lora.request import LoRARequest

        if self._max_rank is None or adapter.rank > self._max_rank:
            raise ClusterError(
                f"an adapter must have at most the rank that the generator was started for, "
                f"{self._max_rank}; it has {adapter.rank}. Set rl.lora before the session opens."
            )
        self._num_loaded += 1
        name = f"policy-v{policy_version}"
        folder = Path(self._folder.name) / f"{self._num_loaded}-{name}"
        write_adapter(adapter, folder)
        request = LoRARequest(name, self._num_loaded, str(folder))
        self._engine.add_lora(request)
        try:
            self._check_listed(request)
        except ClusterError:
            _delete(folder)
            raise
        self._loaded[request.lora_int_id] = request
        self.current = request
        self.evict()

    def check_current(self) -> None:
        """Check that the engine still has the adapter of new requests, if there is one.

        Raises:
            ClusterError: If it does not.
        """
        if self.current is not None:
            self._check_listed(self.current)

    def begin(self, request_id: str) -> "LoRARequest | None":
        """Return the adapter of a new request, which keeps it until ``end``."""
        if self.current is not None:
            self._users[request_id] = self.current.lora_int_id
        return self.current

    def end(self, request_id: str) -> None:
        """A request ended."""
        if self._users.pop(request_id, None) is not None:
            self.evict()

    def drop(self) -> None:
        """New requests get the base weights alone."""
        self.current = None
        self.evict()

    def evict(self) -> None:
        """Forget every older adapter that no request in flight names."""
        needed = set(self._users.values())
        if self.current is not None:
            needed.add(self.current.lora_int_id)
        for lora_id in self._loaded.keys() - needed:
            self._engine.remove_lora(lora_id)
            _delete(Path(self._loaded.pop(lora_id).lora_path))

    def close(self) -> None:
        """Delete all folders."""
        self._folder.cleanup()

    def _check_listed(self, request: "LoRARequest") -> None:
        listed = self._engine.list_loras()
        if request.lora_int_id not in listed:
            names = [r.lora_name for i, r in self._loaded.items() if i in listed]
            raise ClusterError(
                f"adapter {request.lora_name} is not loaded, the engine lists {names}. The "
                "generator would go on sampling with older weights."
            )


def write_adapter(adapter: AdapterWeights, folder: Path) -> None:
    """Write a folder as PEFT would."""
    from safetensors.torch import save_file

    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "target_modules": list(adapter.target_modules),
        "lora_dropout": 0.0,
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {name: tensor.contiguous() for name, tensor in adapter.tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")


def _delete(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
