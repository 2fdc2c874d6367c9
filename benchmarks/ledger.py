"""What one rank's step holds and sends, written down operation by operation.

:class:`Ledger` sees every tensor's storage from its making to its end, and every collective. :func:`trace_step` runs
one whole step of a config under it: with tensors that have shapes but no memory, as rank 0 of any number of ranks that
do not exist; :func:`record_step` the same step for real, on ranks that do.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dinov2_fsdp.config import Config, microbatches_per_rank
from dinov2_fsdp.counts import masked_patches
from dinov2_fsdp.data.batch import Microbatch
from dinov2_fsdp.models.initialise import initialise
from dinov2_fsdp.optim.build import build_optimizer
from dinov2_fsdp.optim.clip import clip_, gradient_norms, local_shard
from dinov2_fsdp.optim.groups import parameter_groups
from dinov2_fsdp.parallel.sharding import build_networks
from dinov2_fsdp.parallel.world import World
from dinov2_fsdp.ssl.ema import Ema
from dinov2_fsdp.ssl.network import Network
from dinov2_fsdp.ssl.step import SelfDistillation


@dataclass(frozen=True)
class Page:
    """One phase of a step: the bytes alive of each kind where they are most, all ``kinds`` together."""

    phase: str
    kinds: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.kinds.values())


class Ledger(TorchDispatchMode):
    """Writes down storages and collectives while it is active. Needs two ranks or more.

    A storage is of the kind that was current when it was made, until :meth:`file` says otherwise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = self.kind = "before"
        self.received: Counter[str] = Counter()
        self.collectives: list[tuple[str, int]] = []
        """Each one's kind and the bytes of the whole: what all ranks have of it together, or every rank alike."""
        self._events: list[tuple[int, int]] = []
        self._phases: list[tuple[int, str]] = []
        self._kinds: list[str] = []
        self._bytes: list[int] = []
        self._numbers: dict[int, int] = {}
        # FSDP empties the storages of gathered weights without an operation, so they are looked at after each.
        self._emptied: dict[int, weakref.ref[Any]] = {}

    @contextlib.contextmanager
    def during(self, phase: str, kind: str) -> Iterator[None]:
        """Write what happens inside under a phase; what is made inside is of a kind."""
        before = self.phase, self.kind
        self._turn(phase, kind)
        try:
            yield
        finally:
            self._turn(*before)

    def _turn(self, phase: str, kind: str) -> None:
        self.phase, self.kind = phase, kind
        self._phases.append((len(self._events), phase))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes back as what it does to this rank's shard
        result = func(*args, **(kwargs or {}))
        for tensor in (result,) if isinstance(result, Tensor) else tree_iter(result):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        name = func.overloadpacket.__name__
        if func.namespace == "c10d":
            self._count(name, args)
        elif func.namespace == "fsdp":
            outs = {"all_gather_copy_in": args[1:2], "split_with_sizes_copy": (kwargs or {}).get("out")}
            for tensor in tree_iter(outs.get(name) or ()):
                self._look_after(tensor)
        elif name == "cat" and kwargs and "out" in kwargs:
            # What is split along another dimension than the first FSDP puts together in a second step.
            self._look_after(kwargs["out"])
        for number, storage in list(self._emptied.items()):
            alive = storage()
            size = 0 if alive is None else alive.nbytes()
            self._resize(number, size)
            if not size:
                del self._emptied[number]
        return result

    def _note(self, tensor: Tensor) -> int | None:
        if isinstance(tensor, DTensor):
            tensor = tensor.to_local()
        if tensor.is_meta or tensor.is_mkldnn:
            # The latter is a weight laid out for a few products, and hides its memory.
            return None
        storage = tensor.untyped_storage()
        number = self._numbers.get(storage._cdata)
        if number is None:
            number = self._numbers[storage._cdata] = len(self._kinds)
            self._kinds.append(self.kind)
            self._bytes.append(0)
            weakref.finalize(storage, self._end, storage._cdata, number)
        self._resize(number, storage.nbytes())
        return number

    def _look_after(self, tensor: Tensor) -> None:
        self.file([tensor], "gathered")
        self._emptied[self._numbers[tensor.untyped_storage()._cdata]] = weakref.ref(tensor.untyped_storage())

    def _resize(self, number: int, size: int) -> None:
        if change := size - self._bytes[number]:
            self._events.append((number, change))
            self._bytes[number] = size

    def _end(self, key: int, number: int) -> None:
        self._resize(number, 0)
        self._emptied.pop(number, None)
        if self._numbers.get(key) == number:
            del self._numbers[key]

    def _count(self, name: str, args: Any) -> None:
        if name in ("_allgather_base_", "allgather_"):
            kind, tensors, group, times = "all-gather", args[0], args[2], 1
        elif name == "_reduce_scatter_base_":
            kind, tensors, group, times = "reduce-scatter", args[1], args[2], 1
            self.file([args[0]], "gradients")
        elif name == "allreduce_":
            kind, tensors, group, times = "all-reduce", args[0], args[1], 2
        else:
            raise RuntimeError(f"collective {name} is not known here")
        ranks = dist.ProcessGroup.unbox(group).size()
        size = sum(t.numel() * t.element_size() for t in tree_iter(tensors) if isinstance(t, Tensor))
        carried = f"{_carried(self.phase, kind)} ({kind})"
        self.received[carried] += times * size * (ranks - 1) / ranks  # type: ignore[assignment]
        self.collectives.append((kind, size))

    def file(self, tensors: list[Tensor], kind: str) -> None:
        """Say what kind the tensors' storages have been of from the beginning."""
        for tensor in tensors:
            number = self._note(tensor)
            if number is not None:
                self._kinds[number] = kind

    def file_rest(self, old: str, new: str) -> None:
        """Say that all storages of one kind that are still alive have been of another."""
        for number, kind in enumerate(self._kinds):
            if kind == old and self._bytes[number]:
                self._kinds[number] = new

    def pages(self) -> list[Page]:
        """Return each phase's fullest moment, in their order."""
        alive: Counter[str] = Counter()
        total, turns, pages = 0, [*self._phases, (len(self._events), "")], []
        first = 0
        for (start, phase), (end, _) in pairwise(turns):
            for number, change in self._events[first:start]:
                alive[self._kinds[number]] += change
                total += change
            most, best = total, Counter(alive)
            for number, change in self._events[start:end]:
                alive[self._kinds[number]] += change
                total += change
                if total > most:
                    most, best = total, Counter(alive)
            pages.append(Page(phase, {kind: size for kind, size in best.items() if size}))
            first = end
        return pages


def _carried(phase: str, collective: str) -> str:
    if collective == "all-gather":
        return "teacher's weights" if phase == "teacher" else "student's weights"
    if collective == "reduce-scatter":
        return "gradients"
    return {"teacher": "centering", "backward": "gradients between copies"}.get(phase, "gradient norms")


def microbatches(config: Config, processes: int) -> list[Microbatch]:
    """Return one rank's microbatches of the first step: black crops, as many hidden patches as there are on average."""
    images, crops = config.train.microbatch, config.crops
    patches = (crops.global_size // config.model.patch) ** 2
    hidden = round(images * masked_patches(config))
    masks = torch.arange(2 * images * patches).view(2 * images, patches) < hidden
    sizes = [(2, crops.global_size), (crops.local_number, crops.local_size)]

    def of_number(index: int) -> Microbatch:
        black = [torch.zeros(number * images, 3, side, side, dtype=torch.uint8) for number, side in sizes]
        return Microbatch(
            step=0,
            index=index,
            global_crops=black[0],
            local_crops=black[1],
            masks=masks,
            masked_patches=torch.arange(hidden),
            mask_weights=torch.full((hidden,), 1 / patches),
            samples=torch.arange(images),
        )

    return [of_number(index) for index in range(microbatches_per_rank(config, processes))]


def trace_step(config: Config, ranks: int) -> Ledger:
    """Return the ledger of rank 0 of ``ranks``, of which the others do not exist. No memory is taken.

    To be called in a process of its own: what the model caches then holds tensors without memory.
    """
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        world = World(0, ranks, 0, torch.device("cpu"))
        networks = build_networks(config, world)
        ledger = Ledger()
        with FakeTensorMode(allow_non_fake_inputs=True), ledger:
            for network in networks:
                network.to_empty(device=world.device)
            # As on a GPU: the optimizer for CPUs reads a number from a tensor, which has none here.
            _step(config, world, *networks, ledger, fused=True)
        return ledger
    finally:
        dist.destroy_process_group()


def record_step(config: Config, world: World) -> Ledger:
    """Return this rank's ledger of a real step."""
    ledger = Ledger()
    with ledger:
        student, teacher = build_networks(config, world)
        initialise(student, config.seed, config.model.layer_scale)
        _step(config, world, student, teacher, ledger, fused=False)
    return ledger


def _step(config: Config, world: World, student: Network, teacher: Network, ledger: Ledger, fused: bool) -> None:
    ema = Ema(student, teacher)
    ema.copy()
    method = SelfDistillation(config, student, teacher, world.device)
    groups = parameter_groups(
        student.named_parameters(), len(student.backbone.blocks), config.optim.layer_decay, config.optim.patch_embed_lr
    )
    optimizer = (
        torch.optim.AdamW(groups, lr=0.0, betas=config.optim.betas, weight_decay=0.0, fused=True)
        if fused and config.optim.name == "adamw"
        else build_optimizer(groups, config.optim.name, config.optim.betas, 1e-8, config.optim.momentum)
    )
    parameters = [p for p in student.parameters() if p.requires_grad]
    # The optimizer's state exists from the second step on, which is the one that counts.
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    _update(optimizer, ema, parameters)
    with ledger.during("before", "crops"):
        batches = [batch.to(world.device) for batch in microbatches(config, world.size)]
    hooks = [
        network.dino_head.register_forward_pre_hook(lambda *_: setattr(ledger, "kind", "logits"), prepend=True)
        for network in (student, teacher)
    ]
    targets = method.targets(batches, config.loss.teacher_temperature)
    for number, batch in enumerate(batches):
        student.set_requires_gradient_sync(number == len(batches) - 1)  # type: ignore[operator]
        with ledger.during("teacher", "working"):
            target = next(targets)
        with ledger.during("student", "activations"):
            loss, _ = method.loss(batch, target)
        with ledger.during("backward", "working"):
            (loss / len(batches)).backward()
        ledger.file_rest("working", "whole gradients")
    for hook in hooks:
        hook.remove()
    with ledger.during("update", "working"):
        _update(optimizer, ema, parameters)
    ledger.file([local_shard(p) for p in student.parameters()], "weights")
    ledger.file([local_shard(p) for p in teacher.parameters()], "teacher")
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    ledger.file([local_shard(t) for t in states], "optimizer")


def _update(optimizer: Optimizer, ema: Ema, parameters: Sequence[Tensor]) -> None:
    grads = {"all": [p.grad for p in parameters if p.grad is not None]}
    norms = gradient_norms(grads)
    clip_(grads, norms, 3.0)
    skip = torch.zeros(())
    optimizer.found_inf, optimizer.grad_scale = skip, None  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad()
    ema.update(0.99, skip)
