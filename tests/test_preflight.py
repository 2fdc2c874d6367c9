"""The pre-flight: who is slow, who does not answer."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import run_on_ranks

from dinov2_fsdp.errors import UserError
from dinov2_fsdp.parallel.place import Place
from dinov2_fsdp.parallel.preflight import BadNodes, NodeTimes, broken_nodes, preflight, slow_nodes, summarise


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def nodes(*times: tuple[float, float | None]) -> list[NodeTimes]:
    return [NodeTimes(f"node{index}", compute, link) for index, (compute, link) in enumerate(times)]


def test_nodes_of_one_speed_are_all_well() -> None:
    assert slow_nodes(nodes((0.10, 0.02), (0.11, 0.03), (0.09, 0.02))) == {}


def test_a_slow_node_is_named_with_its_times() -> None:
    found = slow_nodes(nodes((0.1, 0.02), (0.31, 0.02), (0.1, 0.09)))
    assert found.keys() == {"node1", "node2"}
    assert found["node1"] == "compute takes 310.0 ms, 3.1 × the median"
    assert found["node2"] == "link takes 90.0 ms, 4.5 × the median"


def test_what_is_over_in_no_time_says_nothing() -> None:
    assert slow_nodes(nodes((0.0001, None), (0.0009, None))) == {}


def test_of_two_nodes_neither_is_blamed_for_their_link() -> None:
    assert slow_nodes(nodes((0.1, 0.5), (0.1, 0.5))) == {}


def test_a_slow_node_does_not_make_its_neighbours_slow() -> None:
    """In a ring of four the links 1-2 and 2-3 are slow: that is node 2."""
    links = {0: 0.01, 1: 0.2, 2: 0.2, 3: 0.01}
    rows = [(f"node{n}", 0.1, {link: links[link] for link in (n, (n - 1) % 4)}) for n in range(4)]
    times = summarise(rows)
    assert [t.link for t in times] == [0.01, 0.01, 0.2, 0.01]
    assert slow_nodes(times).keys() == {"node2"}


def test_a_node_is_as_slow_as_its_slowest_rank() -> None:
    times = summarise([("a", 0.1, {}), ("a", 0.4, {}), ("b", 0.2, {}), ("b", 0.1, {})])
    assert [(t.node, t.compute, t.link) for t in times] == [("a", 0.4, None), ("b", 0.2, None)]


def test_a_node_without_its_gpus_is_named_and_one_with_a_cpu_instead_as_well() -> None:
    said = [("cuda", ""), ("cuda", ""), ("cpu", "8 processes need 8 GPUs"), ("cuda", ""), ("cpu", ""), ("cpu", "")]
    assert broken_nodes(said, ["a", "b", "c"]) == {
        "b": "8 processes need 8 GPUs",
        "c": "it shows no GPU, but other nodes do",
    }
    assert broken_nodes([("cpu", ""), ("cpu", "")], ["a", "b"]) == {}


def broken(monkeypatch: pytest.MonkeyPatch, *ranks: int) -> list[Exception]:
    """Return how a pre-flight ends on each of two nodes when these ranks have no device."""

    def devices(*_: object) -> str:
        if int(threading.current_thread().name) in ranks:
            raise UserError("1 processes need 1 GPUs, but this machine shows 0")
        return "cpu"

    def check(rank: int) -> None:
        try:
            preflight("cuda", Place(rank, 2, 0, 1, "127.0.0.1", port), port, "ab"[rank], ["a", "b"], 20)
        except (UserError, BadNodes) as error:
            ends[rank] = error

    monkeypatch.setattr("dinov2_fsdp.parallel.preflight.check_devices", devices)
    port, ends = free_port(), {}
    threads = [threading.Thread(target=check, args=(rank,), name=str(rank)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [ends[rank] for rank in range(2)]


def test_every_rank_names_the_one_node_that_cannot_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    for end in broken(monkeypatch, 1):
        assert isinstance(end, BadNodes)
        assert end.nodes == ("b",)
        assert str(end) == "b: 1 processes need 1 GPUs, but this machine shows 0"


def test_what_all_nodes_lack_is_a_mistake_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [type(end) for end in broken(monkeypatch, 0, 1)] == [UserError, UserError]


def measure(port: int) -> dict[str, object]:
    rank = dist.get_rank()
    # A process meets the others of the pre-flight by itself, before there is any process group.
    dist.barrier()
    dist.destroy_process_group()
    place = Place(rank, 4, rank % 2, 2, "127.0.0.1", port)
    report = preflight("cpu", place, port, f"node{rank // 2}", ["node0", "node1"], 60)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return {**report.to_dict(), "text": str(report)}


@pytest.mark.slow
@pytest.mark.distributed
def test_all_ranks_agree_on_one_report() -> None:
    reports = run_on_ranks(measure, 4, free_port())
    for report in reports[1:]:
        assert report["nodes"] == reports[0]["nodes"]
    assert [times["node"] for times in reports[0]["nodes"]] == ["node0", "node1"]
    assert all(times["compute"] > 0 and times["link"] > 0 for times in reports[0]["nodes"])
    assert "all-reduce of 4 MiB" in reports[0]["text"]


def test_ranks_that_do_not_come_are_named_in_bounded_time(tmp_path: Path) -> None:
    place = Place(0, 6, 0, 2, "127.0.0.1", free_port())
    with pytest.raises(BadNodes, match=r"rank\(s\) 1, 2, 3, 4, 5 on a, b, c did not answer within 1 s") as caught:
        preflight("cpu", place, place.port, "a", ["a", "b", "c"], 1)
    assert caught.value.nodes == ("a", "b", "c")


@pytest.mark.slow
def test_a_rank_that_cannot_reach_the_first_one_names_its_own_node() -> None:
    port = free_port()  # nobody listens there
    with pytest.raises(BadNodes, match=f"node b cannot reach rank 0 at 127.0.0.1:{port}") as caught:
        preflight("cpu", Place(1, 2, 0, 1, "127.0.0.1", port), port, "b", ["a", "b"], 1)
    assert caught.value.nodes == ("b",)
