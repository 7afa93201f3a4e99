"""LoRA on vLLM's CPU back end: one product per run of tokens with the same adapter.

::

    adapter of each token   2 2 2 2 | -1 -1 | 0 0 0 | 2      -1 is none
    runs                    (0:4, 2)          (6:9, 0) (9:10, 2)

vLLM 0.32 copies the factors once per token, and an index of -1 makes it take the last slot's: a
request without an adapter is then sampled with another one's
(https://github.com/vllm-project/vllm/pull/48421). Here tokens of -1 are in no run and their rows
are left as they are.

Shapes: N = tokens, L = slots for adapters, R = rank, I and O = inputs and outputs of a layer.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

Run = tuple[slice, int]
"""Rows that follow each other, and the slot of the adapter that they share."""


def adapter_runs(slots: Tensor) -> list[Run]:
    """Return the runs of equal slots, without those of -1.

    Args:
        slots: ``[N]`` slot of each row, -1 for none.
    """
    values, counts = torch.unique_consecutive(slots, return_counts=True)
    runs: list[Run] = []
    begin = 0
    for slot, count in zip(values.tolist(), counts.tolist(), strict=True):
        if slot >= 0:
            runs.append((slice(begin, begin + count), slot))
        begin += count
    return runs


def shrink(y: Tensor, *, x: Tensor, factors: Tensor, runs: list[Run], scale: float) -> None:
    """Set ``y[n, :R] = scale * A[slot(n)] @ x[n]`` for every row of a run.

    Args:
        y: ``[N, >=R]``, changed in place.
        x: ``[N, I]``.
        factors: ``[L, 1, R, I]`` or ``[L, R, I]``, the ``A`` of each slot.
        runs: From ``adapter_runs``.
        scale: As above.
    """
    for rows, slot in runs:
        factor = factors[slot].view(factors.shape[-2:]).to(y.dtype)
        y[rows, : factor.shape[0]] = scale * (x[rows].to(y.dtype) @ factor.T)


def expand(
    y: Tensor, *, x: Tensor, factors: Tensor, runs: list[Run], begin: int, adds: bool
) -> None:
    """Add ``B[slot(n)] @ x[n]`` to ``y[n, begin : begin + O]`` for every row of a run.

    A layer and its adapter may be padded differently: outputs that ``y`` lacks are left out.

    Args:
        y: ``[N, >=begin]``, changed in place.
        x: ``[N, R]``.
        factors: ``[L, 1, O, R]`` or ``[L, O, R]``, the ``B`` of each slot.
        runs: From ``adapter_runs``.
        begin: First column.
        adds: False to replace instead of adding.
    """
    end = min(begin + factors.shape[-2], y.shape[1])
    for rows, slot in runs:
        factor = factors[slot].view(factors.shape[-2:])[: end - begin].to(y.dtype)
        product = x[rows].to(y.dtype) @ factor.T
        if adds:
            y[rows, begin:end] += product
        else:
            y[rows, begin:end] = product


class RunsWrapper(PunicaWrapperCPU):
    """What vLLM's layers call to add their adapters.

    Only the products are ours; ``apply_lora_full_linear`` of vLLM already leaves -1 alone.
    """

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - vLLM's own
        """Take the adapters of the next step."""
        super().update_metadata(*args, **kwargs)
        self._token_runs = adapter_runs(self.token_lora_indices)
        self._sampler_runs = adapter_runs(self.sampler_indices)

    def add_lora_embedding(
        self,
        y: Tensor,
        x: Tensor,
        lora_b_stacked: Tensor,
        add_inputs: bool = True,
        **_: Any,  # noqa: ANN401 - vLLM's own
    ) -> None:
        """Add the second factor's product to embeddings."""
        expand(y, x=x, factors=lora_b_stacked, runs=self._token_runs, begin=0, adds=add_inputs)

    def add_lora_logits(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Tensor,
        lora_b_stacked: Tensor,
        scale: float,
        *,
        buffer: Tensor | None = None,
        **_: Any,  # noqa: ANN401 - vLLM's own
    ) -> None:
        """Add both factors' product to the logits of the rows that are sampled from."""
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        if buffer is None:
            buffer = torch.zeros(x.shape[0], lora_b_stacked.shape[-1], dtype=torch.float32)
        runs = self._sampler_runs
        shrink(buffer, x=x, factors=lora_a_stacked, runs=runs, scale=scale)
        expand(y, x=buffer, factors=lora_b_stacked, runs=runs, begin=0, adds=True)

    def _apply_shrink(self, y: Tensor, x: Tensor, w_t_all: Tensor, scale: float) -> None:
        rows = y.view(-1, y.shape[-1])
        shrink(rows, x=x, factors=w_t_all, runs=self._token_runs, scale=scale)

    def _apply_expand(
        self,
        y: Tensor,
        x: Tensor,
        w_t_all: Tensor,
        y_offset: int,
        y_slice_size: int,
        add_inputs: bool = True,
    ) -> None:
        expand(y, x=x, factors=w_t_all, runs=self._token_runs, begin=y_offset, adds=add_inputs)


def use_runs(worker: Any) -> None:  # noqa: ANN401 - vLLM's CPUWorker
    """Make a started worker add its adapters by runs.

    Its layers share one wrapper by reference, so its class is what changes.
    """
    manager: Any = worker.model_runner.lora_manager._adapter_manager
    for wrapper in manager.punica_wrapper_mapping.values():
        wrapper.__class__ = RunsWrapper
    # Otherwise a first step like the last one of vLLM's warm-up would not update the metadata.
    manager._last_mapping = None
