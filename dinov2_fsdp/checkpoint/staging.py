"""Copies of a run's tensors in host memory, taken at one moment, while the next step goes on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class Staging:
    """Host buffers, allocated once and filled anew for every save.

    On a GPU the copies run on a stream of their own beside the next step's forward and backward passes; the step
    waits for them (on the device, not on the host) just before it changes weights and optimizer state. On a CPU a
    copy is a copy, and made at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._on_gpu else None
        self._copied = torch.cuda.Event() if self._on_gpu else None
        self._pending = False
        self._host: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self, late: dict[str, Tensor], early: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return host copies of the tensors as they are now, sharded as they are; filled once :meth:`wait` returns.

        Args:
            late: what only the optimizer and the EMA change, after :meth:`before_update`.
            early: what a forward pass may change already (centres, running statistics); these are small.
        """
        source = {**late, **early}
        for name, tensor in source.items():
            held = self._host.get(name)
            if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
                self._host[name] = torch.empty_like(tensor, device="cpu", pin_memory=self._on_gpu, requires_grad=False)
        if self._stream is None:
            _copy(self._host, source)
            return {name: self._host[name] for name in source}
        moment = {**late, **{name: tensor.clone() for name, tensor in early.items()}}
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            _copy(self._host, moment)
            for tensor in moment.values():
                _local(tensor).record_stream(self._stream)
            assert self._copied is not None
            self._copied.record()
        self._pending = True
        return {name: self._host[name] for name in source}

    def before_update(self) -> None:
        """Let the device wait for copies that still read what is about to change."""
        if self._pending and self._copied is not None:
            torch.cuda.current_stream(self.device).wait_event(self._copied)
            self._pending = False

    def wait(self) -> None:
        """Wait until the copies are there."""
        if self._copied is not None:
            self._copied.synchronize()


def _copy(host: dict[str, Tensor], source: dict[str, Tensor]) -> None:
    names = list(source)
    torch._foreach_copy_([_local(host[n]) for n in names], [_local(source[n]) for n in names], non_blocking=True)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
