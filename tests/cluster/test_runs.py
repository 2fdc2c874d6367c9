"""Undisturbed jobs: they learn what a run on this machine learns."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from jobs import ROOT, Job, config_of, lab, launch, paced, slurm, submit, wait_until
from training import differing, saved_steps, saved_tensors, train_alone, train_on_ranks

from dinov2_fsdp.config import load
from launchers.cluster.lives import FINISHED


@pytest.fixture(scope="module")
def two_by_two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    folder = tmp_path_factory.mktemp("two by two")
    config = config_of(folder, train__microbatch=2)
    job = submit(config, folder / "it's a run", "--nodes", "2", "--tasks-per-node", "2")
    job.wait()
    yield job
    job.cancel()


def test_two_nodes_of_two_ranks_learn_what_four_local_processes_learn(two_by_two: Job, tmp_path: Path) -> None:
    assert [life.outcome for life in two_by_two.lives] == [FINISHED], two_by_two.log
    assert two_by_two.state == "COMPLETED"
    train_on_ranks(load(config_of(tmp_path, train__microbatch=2)), 4)
    found, expected = saved_tensors(two_by_two.run_dir), saved_tensors(tmp_path / "run")
    assert expected
    assert differing(found, expected) == []


def test_every_rank_has_its_logs(two_by_two: Job) -> None:
    assert sorted(path.name for path in (two_by_two.run_dir / "logs").iterdir()) == [f"rank_{n}.log" for n in range(4)]
    outputs = sorted(path.name for path in (two_by_two.run_dir / "slurm" / "001").glob("*_log.out"))
    assert outputs == [f"{two_by_two.number}_{n}_log.out" for n in range(4)]


def test_the_pre_flight_times_each_node(two_by_two: Job) -> None:
    output = (two_by_two.run_dir / "slurm" / "001" / f"{two_by_two.number}_0_log.out").read_text()
    nodes = two_by_two.lives[0].nodes
    assert len(set(nodes)) == 2
    assert "pre-flight: 2 node(s) met within" in output
    for node in nodes:
        assert re.search(rf"  {node}: compute [\d.]+ ms, exchange [\d.]+ ms", output)


def test_the_same_command_finds_nothing_left_to_do(two_by_two: Job) -> None:
    config = two_by_two.run_dir.parent / "run.yaml"
    again = launch("--config", str(config), "--output-dir", str(two_by_two.run_dir), "--nodes", "1")
    assert again.returncode == 0, again.stderr
    assert "is finished" in again.stdout
    assert "submitted" not in again.stdout
    assert [life.outcome for life in two_by_two.lives] == [FINISHED]
    assert saved_steps(two_by_two.run_dir) == [4]


def test_as_many_nodes_as_there_are_start_train_and_finish(tmp_path: Path) -> None:
    nodes = min(16, int(slurm("sinfo", "--noheader", "-p", "low", "-t", "idle", "-o", "%D").strip() or 0))
    if nodes < 16:
        pytest.skip(f"this cluster has {nodes} idle nodes, not 16 (N=16 when the lab starts)")
    config = config_of(tmp_path, data__train="scenes:n=64,size=32", train__batch=32, train__microbatch=2)
    job = submit(config, tmp_path / "run", "--nodes", "16", "--meet-seconds", "400")
    try:
        assert job.wait() == "COMPLETED", job.log
    finally:
        job.cancel()
    assert len(set(job.lives[0].nodes)) == 16
    assert saved_steps(tmp_path / "run") == [4]


def test_an_array_runs_two_configs_with_two_seeds_each(tmp_path: Path) -> None:
    settings = {"train__microbatch": 4, "train__duration": "2it"}
    configs = {}
    for name, rate in (("slow", 1e-4), ("fast", 1e-2)):
        configs[name] = tmp_path / f"{name}.yaml"
        config_of(tmp_path / name, optim__lr=rate, **settings).rename(configs[name])
    array = ["--array", ",".join(map(str, configs.values())), "--array", "seed=0,1"]
    job = submit(None, tmp_path / "sweep", *array)
    try:
        job.wait()
    finally:
        job.cancel()
    for name, file in configs.items():
        for seed in (0, 1):
            run_dir = tmp_path / name / f"alone {seed}"
            train_alone(load(file, [f"seed={seed}", f"output_dir='{run_dir}'"]))
            found = saved_tensors(tmp_path / "sweep" / name / f"seed={seed}")
            assert differing(found, saved_tensors(run_dir)) == []


def test_a_site_that_exports_nothing_to_jobs_is_no_obstacle(tmp_path: Path) -> None:
    config = config_of(tmp_path, train__microbatch=4, train__duration="1it")
    job = submit(config, tmp_path / "run", "--slurm", "export=NONE")
    try:
        assert job.wait() == "COMPLETED", job.log
    finally:
        job.cancel()


def test_an_edit_of_the_checkout_does_not_change_a_queued_job(tmp_path: Path) -> None:
    """The job waits while its checkout becomes one that cannot even be imported."""
    checkout = tmp_path / "checkout"
    slurm("cp", "-r", *(str(ROOT / part) for part in ("dinov2_fsdp", "eval", "launchers")), "-t", str(_made(checkout)))
    config = config_of(tmp_path, train__microbatch=4, train__duration="2it")
    launcher = checkout / "launchers" / "slurm.py"
    result = subprocess.run(
        [sys.executable, str(launcher), "--config", str(config), "--output-dir", str(tmp_path / "run"),
         "--cpus-per-gpu", "1", "--time", "60", "--slurm", "hold"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    match = re.search(r"job (\d+) submitted", result.stdout)
    assert match
    job = Job(match[1], tmp_path / "run")
    try:
        for source in checkout.rglob("*.py"):
            source.write_text("raise SystemExit('edited')\n")
        slurm("scontrol", "release", job.number)
        assert job.wait() == "COMPLETED", job.log
    finally:
        job.cancel()
    assert saved_steps(tmp_path / "run") == [2]


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_follow_shows_states_and_progress_to_the_end(tmp_path: Path) -> None:
    config = config_of(tmp_path, train__microbatch=4, train__duration="2it")
    # Steps that last longer than the time between two looks.
    slow = paced(6.0, tmp_path / "run")
    result = launch(
        "--config", str(config), "--output-dir", str(tmp_path / "run"), "--cpus-per-gpu", "1", "--time", "60", *slow,
        "--follow",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "running on 1 node(s), life 1" in result.stdout
    assert "step 2/2  100.0%" in result.stdout
    assert result.stdout.splitlines()[-1] == "life 1: finished at step 2"


def test_a_rank_that_meets_nobody_names_the_node_that_is_missing(tmp_path: Path) -> None:
    """One node's rank is stopped before it has said that it is there."""
    lab("init-pid", "1")
    config = config_of(tmp_path, train__microbatch=4)
    job = submit(config, tmp_path / "run", "--nodes", "2", "--meet-seconds", "20", "--max-restarts", "0")
    try:
        (process,) = wait_until(lambda: job.processes(rank=1, life=1), "a process of rank 1", every=0.02)
        os.kill(process, signal.SIGSTOP)
        life = job.wait_for_end_of(1)
    finally:
        job.cancel()
    assert life.cause is not None
    assert life.cause.kind == "preflight"
    assert f"rank(s) 1 on {life.nodes[1]} did not answer within 20 s" in life.cause.what
    assert life.cause.nodes == (life.nodes[1],)


def test_a_slow_node_is_named_and_left_out(tmp_path: Path) -> None:
    """The network of one node of the lab is throttled; three nodes tell which of them it is."""
    lab("init-pid", "2")
    limit = "rate 50mbit burst 32kbit latency 1s"
    if subprocess.run(["sh", "-c", f"tc qdisc replace dev slv2 root tbf {limit}"], capture_output=True).returncode:
        pytest.skip("this machine cannot throttle a network interface")
    config = config_of(tmp_path, data__train="scenes:n=24,size=32", train__batch=12, train__microbatch=4)
    names = slurm("sinfo", "--noheader", "--Node", "-p", "low", "-o", "%N").split()
    others = ",".join(name for name in names if name not in ("node1", "node2", "node3"))
    job = Job("0", tmp_path / "run")
    try:
        job = submit(config, tmp_path / "run", "--nodes", "3", "--preflight", "exclude", "--exclude", others)
        life = job.wait_for_end_of(1)
        wait_until(lambda: "node2" in _excluded(job).split(","), "node2 is excluded")
        slurm("scontrol", "update", f"JobId={job.number}", "ExcNodeList=node2")
        assert job.wait() == "COMPLETED", job.log
    finally:
        job.cancel()
        subprocess.run(["tc", "qdisc", "del", "dev", "slv2", "root"], check=False)
    assert life.cause is not None
    assert life.cause.nodes == ("node2",)
    assert re.search(r"node2 is slow: link takes [\d.]+ ms, [\d.]+ × the median", life.cause.what)
    assert "node2" not in job.lives[-1].nodes


def _excluded(job: Job) -> str:
    found = re.search(r"ExcNodeList=(\S+)", slurm("scontrol", "show", "job", job.number))
    names = slurm("scontrol", "show", "hostnames", found[1]) if found and found[1] != "(null)" else ""
    return ",".join(names.split())
