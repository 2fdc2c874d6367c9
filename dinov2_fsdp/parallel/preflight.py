"""Before a run on many nodes: do all ranks answer, do their sums agree, and is one of their nodes slow?"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dinov2_fsdp.errors import RunFailed, UserError
from dinov2_fsdp.parallel.place import Place, check_devices

SLOWER = 2.0
"""A node is slow that takes this many times the median's time. Healthy nodes of one kind differ by some percent."""
_SHORTEST = 2e-3
"""Seconds below which a difference between nodes is noise."""
_REPEATS = 5


class BadNodes(RunFailed):
    """The pre-flight found nodes that the run should not use."""

    def __init__(self, message: str, nodes: Sequence[str]) -> None:
        super().__init__(message)
        self.nodes = tuple(nodes)


@dataclass(frozen=True)
class NodeTimes:
    """Seconds of one node: a matrix product on its slowest rank, an exchange with its better neighbour."""

    node: str
    compute: float
    link: float | None


@dataclass(frozen=True)
class Report:
    """What a pre-flight measured, the same on every rank; seconds and bytes."""

    nodes: tuple[NodeTimes, ...]
    all_reduce: float
    all_reduce_bytes: int
    link_bytes: int
    slow: dict[str, str]
    """Why, by node."""
    met: float
    """Seconds until all ranks had met."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        size = self.all_reduce_bytes / 2**20
        lines = [
            f"pre-flight: {len(self.nodes)} node(s) met within {self.met:.1f} s; all-reduce of {size:g} MiB over all "
            f"ranks in {1e3 * self.all_reduce:.1f} ms"
        ]
        for times in self.nodes:
            link = "" if times.link is None else f", exchange {1e3 * times.link:.1f} ms"
            slow = f"   SLOW: {self.slow[times.node]}" if times.node in self.slow else ""
            lines.append(f"  {times.node}: compute {1e3 * times.compute:.1f} ms{link}{slow}")
        return "\n".join(lines)


def preflight(device: str, place: Place, port: int, node: str, nodes: Sequence[str], seconds: float) -> Report:
    """Return the report, having met all ranks and left them again.

    Args:
        device: ``parallel.device`` of the config.
        port: a port of rank 0 that the run itself does not use.
        node: this rank's node; nodes: of all ranks in order, as many ranks on each.
        seconds: in which all ranks must have met, and in which no later exchange may hang.

    Raises:
        BadNodes: ranks are missing, some nodes cannot compute, or the sum is wrong.
        UserError: no node has the devices that ``device`` asks for.
    """
    started = time.monotonic()
    store = _meet(place, port, node, nodes, seconds)
    met = time.monotonic() - started
    where, compute = _first_computation(device, place, store, nodes, seconds)
    kind = where.type
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        store=dist.PrefixStore("preflight", store),
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(seconds=seconds),
        device_id=where if kind == "cuda" else None,
    )
    try:
        link_bytes, reduce_bytes = (64 << 20, 256 << 20) if kind == "cuda" else (1 << 20, 4 << 20)
        own_links = _links(place, where, link_bytes)
        all_reduce = _all_reduce(place, where, reduce_bytes)
        rows: list[Any] = [None] * place.world_size
        dist.all_gather_object(rows, (node, compute, own_links))
    finally:
        dist.destroy_process_group()
    times = summarise(rows)
    return Report(times, all_reduce, reduce_bytes, link_bytes, slow_nodes(times), met)


def _meet(place: Place, port: int, node: str, nodes: Sequence[str], seconds: float) -> dist.Store:
    """Return the store at which all ranks are present."""
    limit = timedelta(seconds=seconds)
    try:
        store = dist.TCPStore(place.address, port, is_master=place.rank == 0, timeout=limit, wait_for_workers=False)
        store.set(f"here/{place.rank}", node)
        if place.rank == 0:
            store.set("verdict", _wait_for_all(store, place, "here", seconds))
        # Rank 0's patience counts from its own start.
        store.wait(["verdict"], timedelta(seconds=2 * seconds))
        missing = store.get("verdict").decode()
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        reason = str(error).splitlines()[0]
        raise BadNodes(f"node {node} cannot reach rank 0 at {place.address}:{port}: {reason}", [node]) from None
    if missing:
        raise _silent([int(rank) for rank in missing.split(",")], place, nodes, seconds)
    return store


def _silent(ranks: Sequence[int], place: Place, nodes: Sequence[str], seconds: float) -> BadNodes:
    lost = list(dict.fromkeys(nodes[rank // place.local_world_size] for rank in ranks))
    shown = ", ".join(map(str, ranks[:8])) + (", …" if len(ranks) > 8 else "")
    return BadNodes(f"rank(s) {shown} on {', '.join(lost)} did not answer within {seconds:g} s", lost)


def _wait_for_all(store: dist.Store, place: Place, topic: str, seconds: float) -> str:
    """Return the ranks that have said nothing about ``topic`` as text, after all have or the time is over."""
    deadline = time.monotonic() + seconds
    missing = list(range(place.world_size))
    while missing and time.monotonic() < deadline:
        missing = [rank for rank in missing if not store.check([f"{topic}/{rank}"])]
        time.sleep(0.05 if missing else 0)
    return ",".join(map(str, missing))


def _first_computation(
    device: str, place: Place, store: dist.Store, nodes: Sequence[str], seconds: float
) -> tuple[torch.device, float]:
    """Return this rank's device and the seconds of a matrix product on it, once every rank has come so far.

    A GPU that is gone shows only here. Were its rank to end by itself, the others would wait for it, and nobody would
    know whether its node is broken or all of them lack what was asked for.
    """
    where, compute, trouble, mistake = torch.device("cpu"), 0.0, "", False
    try:
        if check_devices(device, place.local_world_size, torch.cuda.device_count()) == "cuda":
            where = torch.device("cuda", place.local_rank)
            torch.cuda.set_device(where)
        compute = _time(_product(where), where)
    except UserError as error:
        trouble, mistake = str(error), True
    except RuntimeError as error:
        trouble = str(error).partition("\n")[0]
    try:
        store.set(f"computes/{place.rank}", json.dumps([where.type, trouble]))
        if place.rank == 0:
            missing = _wait_for_all(store, place, "computes", seconds)
            ranks = [] if missing else range(place.world_size)
            said = [json.loads(store.get(f"computes/{rank}")) for rank in ranks]
            store.set("computed", json.dumps([missing, said]))
        store.wait(["computed"], timedelta(seconds=2 * seconds))
        missing, said = json.loads(store.get("computed"))
    except (dist.DistStoreError, dist.DistNetworkError):
        raise _silent([0], place, nodes, seconds) from None
    if missing:
        raise _silent([int(rank) for rank in missing.split(",")], place, nodes, seconds)
    bad = broken_nodes(said, nodes)
    if mistake and len(bad) == len(nodes):
        raise UserError(trouble)
    if bad:
        # Where all are broken, none of them is to be left out.
        to_leave_out = list(bad) if len(bad) < len(nodes) else []
        raise BadNodes("; ".join(f"{node}: {why}" for node, why in bad.items()), to_leave_out)
    return where, compute


def broken_nodes(said: Sequence[tuple[str, str]], nodes: Sequence[str]) -> dict[str, str]:
    """Return why, by node, for those that cannot compute as the others do.

    Args:
        said: (kind of device, trouble or nothing) of every rank.
        nodes: of all ranks in order, as many ranks on each.
    """
    on_gpus = any(kind == "cuda" for kind, _ in said)
    found: dict[str, str] = {}
    for rank, (kind, trouble) in enumerate(said):
        if trouble or (on_gpus and kind == "cpu"):
            node = nodes[rank * len(nodes) // len(said)]
            found.setdefault(node, trouble or "it shows no GPU, but other nodes do")
    return found


def _product(device: torch.device) -> Callable[[], object]:
    size, kind = (4096, torch.bfloat16) if device.type == "cuda" else (384, torch.float32)
    left = torch.ones(size, size, dtype=kind, device=device)
    return lambda: left @ left


def _time(action: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the fastest of some repetitions: what disturbs now and then is not the node's fault."""
    best = float("inf")
    for _ in range(_REPEATS + 1):
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def _links(place: Place, device: torch.device, size: int) -> dict[int, float]:
    """Return the seconds of an exchange with the next and the previous node, by link, on the first rank of a node."""
    nodes = place.world_size // place.local_world_size
    here = place.rank // place.local_world_size
    found: dict[int, float] = {}
    if nodes < 2:
        return found
    block = torch.zeros(size // 4, dtype=torch.float32, device=device)
    for link in range(nodes if nodes > 2 else 1):
        ends = (link, (link + 1) % nodes)
        if place.local_rank == 0 and here in ends:
            other = ends[1 - ends.index(here)] * place.local_world_size
            found[link] = _time(_exchange(block, other, first=here == link), device)
    dist.barrier()
    return found


def _exchange(block: torch.Tensor, other: int, first: bool) -> Callable[[], object]:
    def there_and_back() -> None:
        for send in (first, not first):
            if send:
                dist.send(block, other)
            else:
                dist.recv(block, other)

    return there_and_back


def _all_reduce(place: Place, device: torch.device, size: int) -> float:
    ones = torch.empty(size // 4, dtype=torch.float32, device=device)
    expected = place.world_size * (place.world_size + 1) / 2

    def reduce() -> None:
        ones.fill_(place.rank + 1.0)
        dist.all_reduce(ones)

    seconds = _time(reduce, device)
    if not bool((ones == expected).all()):
        found = float(ones[(ones != expected).nonzero()[0, 0]])
        raise BadNodes(f"the sum over all ranks is wrong: {found} instead of {expected}", [])
    return seconds


def summarise(rows: Sequence[tuple[str, float, Mapping[int, float]]]) -> tuple[NodeTimes, ...]:
    """Return the times by node from those of the ranks.

    A slow node slows both of its links in the ring, a healthy one beside it only one of its two: the better counts.
    """
    compute: dict[str, float] = {}
    links: dict[str, list[float]] = {}
    for node, seconds, own in rows:
        compute[node] = max(compute.get(node, 0.0), seconds)
        links.setdefault(node, []).extend(own.values())
    return tuple(NodeTimes(node, compute[node], min(links[node], default=None)) for node in compute)


def slow_nodes(times: Sequence[NodeTimes], slower: float = SLOWER) -> dict[str, str]:
    """Return why, by node, for those that take ``slower`` times as long as the median of all."""
    found: dict[str, str] = {}
    for what in ("compute", "link"):
        values = {t.node: getattr(t, what) for t in times if getattr(t, what) is not None}
        if len(values) < 3 and what == "link":
            continue  # both ends of the only link are equally slow
        middle = statistics.median_low(values.values()) if values else 0.0
        for node, value in values.items():
            if len(values) > 1 and value > slower * middle and value - middle > _SHORTEST:
                reason = f"{what} takes {1e3 * value:.1f} ms, {value / middle:.1f} × the median"
                found[node] = f"{found[node]}; {reason}" if node in found else reason
    return found
