"""launchers/slurm.py as a user meets it on a login node: what it prints, submits and refuses. No cluster is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from submitting import CPU, Stub, refusal, start

from dinov2_fsdp.config import load, to_yaml
from dinov2_fsdp.errors import UserError
from launchers.cluster import checks, controller, options
from launchers.cluster.allocation import without_job
from launchers.cluster.submission import Submission

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = str(ROOT / "launchers" / "slurm.py")
GOLDEN = Path(__file__).with_name("golden") / "vitg14.sbatch.txt"


pytestmark = pytest.mark.usefixtures("no_site_of_this_user")


def command(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, LAUNCHER, *arguments], capture_output=True, text=True, cwd=cwd, timeout=120, check=False
    )


# ---------------------------------------------------------------------------------------------------------------------
# Without a cluster.


def test_the_mission_s_command_prints_its_script_environment_and_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")  # not even the cluster's commands
    result = command("--nodes", "16", "--config", str(ROOT / "configs" / "vitg14.yaml"), "--dry-run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    printed = result.stdout.replace(str(tmp_path), "$PWD").replace(os.path.abspath(sys.executable), "$PYTHON")
    assert printed == GOLDEN.read_text()
    assert not list(tmp_path.glob("runs"))


def test_a_plan_may_be_for_another_gpu(tmp_path: Path) -> None:
    asked = ["--nodes", "16", "--config", str(ROOT / "configs" / "vitg14.yaml"), "--gpu", "h200"]
    refused = command(*asked, cwd=tmp_path)
    assert (refused.returncode, refused.stderr) == (2, "error: --gpu h200 is what a plan is for; add --dry-run\n")
    result = command(*asked, "--dry-run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "hours on H200" in result.stdout
    assert "A100" not in result.stdout


def test_neither_help_nor_a_dry_run_nor_a_submission_imports_torch(stub: Stub, working_folder: Path) -> None:
    stub()
    code = (
        f"import sys; sys.argv = ['slurm.py', *sys.argv[1:]]; sys.path.insert(0, {str(ROOT)!r})\n"
        "from launchers import slurm\n"
        "slurm.main()\n"
        "assert not {'torch', 'torchvision'} & sys.modules.keys(), 'torch is imported'\n"
    )
    for extra in (["--dry-run"], []):
        arguments = [sys.executable, "-c", code, "--output-dir", "run", *CPU, *extra]
        result = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
        assert result.returncode == 0, result.stderr


def test_help_loads_nothing_that_takes_long() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from launchers import slurm; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "omegaconf", "submitit", "numpy", "rich"} & set(loaded)
    result = command("--help")
    assert result.returncode == 0
    assert "--max-restarts" in result.stdout


def test_without_slurm_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch, working_folder: Path) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    message = refusal("--output-dir", "run", *CPU)
    assert "sinfo is not on PATH" in message
    assert "launchers/local.py" in message
    assert not (working_folder / "run").exists()


def test_a_mistake_is_one_message_and_exit_code_2(tmp_path: Path) -> None:
    result = command("--output-dir", str(tmp_path / "run"), "train.bacth=8")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: unknown key 'train.bacth'; did you mean '")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes", "0"], "--nodes 0 is impossible"),
        (["--time", "soon"], "--time 'soon' is not understood; valid: minutes"),
        (["--time", "0:00"], "--time '0:00' is no time at all"),
        (["--mem", "much"], "--mem 'much' is not understood"),
        (["--max-restarts", "-1"], "--max-restarts -1 is impossible; valid: 0 or more"),
        (["--time", "10", "--signal-seconds", "700"], "leaves nothing of --time 10 (600 s)"),
        (["--slurm", "output=x"], "--slurm output=… would break the job"),
        (["--slurm", "time=3"], "--slurm time=…: use --time, which is checked"),
        (["--slurm", "=3"], "--slurm '=3' is not of the form KEY=VALUE"),
        (["--env", "WORD"], "--env 'WORD' is not of the form KEY=VALUE"),
        (["--env", "1A=2"], "--env 1A=… is no name of a variable"),
        (["--gpus-per-node", "2"], "--gpus-per-node 2: parallel.device=cpu would leave them idle"),
        (["--tasks-per-node", "3"], "valid numbers of processes: 1, 2, 4"),
        (["--site", "nowhere.yaml"], "--site nowhere.yaml does not exist"),
        (["--array", "seed=0,,1"], "--array 'seed=0,,1' has an empty value"),
        (["--output-dir", "a\nb"], "holds a line break, which sbatch cannot have in paths"),
        (["--output-dir", "100%"], "holds '%', which sbatch cannot have in paths"),
        (["data.train=imgnet:/data"], "imgnet"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_an_option_is_said(
    arguments: list[str], words: str, working_folder: Path, stub: Stub
) -> None:
    stub()
    assert words in refusal("--output-dir", "run", *arguments, *CPU[:4], *([] if "data" in arguments[0] else CPU[4:]))
    assert not list(working_folder.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--partiton", "x"], "unrecognized arguments: --partiton; did you mean '--partition'?"),
        (["--nodes", "two"], "argument --nodes: invalid int value: 'two'"),
        (["--preflight", "maybe"], "argument --preflight: invalid choice: 'maybe'"),
    ],
)
def test_an_option_that_is_none_is_said_in_two_lines(arguments: list[str], words: str) -> None:
    result = command(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {words}")
    assert len(result.stderr.splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("90:30", 91), ("2:00:00", 120), ("1-0", 1440), ("1-2:30:00", 1590), ("24h", 1440), ("3d", 4320),
     ("1.5h", 90), ("0:01", 1)],
)  # fmt: skip
def test_time_limits_are_read_as_sbatch_reads_them(text: str, minutes: int) -> None:
    assert options.parse_minutes(text) == minutes


# ---------------------------------------------------------------------------------------------------------------------
# Against a cluster that says what the test wants.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--partition", "lwo"], "partition 'lwo' does not exist; did you mean 'low'?\nvalid: low, short, old"),
        (["--partition", "old"], "partition 'old' is down; up are: low, short"),
        (["--nodes", "8", "train.batch=64"], "--nodes 8: partition 'low' has 4"),
        (["--cpus-per-gpu", "65"], "1 ranks × 65 cores per node: the nodes of partition 'low' have 64; use --cpus"),
        (["--partition", "short", "--time", "2h"], "--time 2h: partition 'short' allows 60 minutes"),
        (["--partition", "short", "parallel.device=cuda", "--gpus-per-node", "1"], "have 0; use another --partition"),
        (["data.train=folder:/nowhere/at/all"], "/nowhere/at/all does not exist here\nwhere only the nodes see it"),
        (["init.backbone=/nowhere.pth"], "init.backbone=/nowhere.pth does not exist here\nwhere only the nodes see it"),
    ],
)  # fmt: skip
def test_what_the_cluster_has_not_is_refused(
    arguments: list[str], words: str, working_folder: Path, stub: Stub
) -> None:
    stub()
    assert words in refusal("--output-dir", "run", *CPU, *arguments)
    assert not list(working_folder.iterdir())


def test_one_partition_of_a_list_is_enough(
    stub: Stub, working_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub()
    command = ("--output-dir", "run", *CPU, "--partition", "short,low", "--time", "2h")
    assert start(*command) == 0
    assert "not in every partition: --time 2h: partition 'short' allows 60 minutes" in capsys.readouterr().out
    refused = refusal("--output-dir", "other", *CPU, "--partition", "short,old", "--time", "2h")
    assert "partition 'short' allows 60 minutes" in refused


def test_a_finished_run_is_not_submitted_again(
    stub: Stub, working_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub()
    run = working_folder / "run"
    (run / "checkpoints" / "step_00000004").mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(load(None, CPU)))
    (run / "metrics.jsonl").write_text('{"step": 4, "images": 16, "eta": 0}\n')
    assert start("--output-dir", "run", *CPU) == 0
    assert "is finished; start anew with --overwrite" in capsys.readouterr().out
    assert not (run / "slurm").exists()
    assert "holds another run" in refusal("--output-dir", "run", *CPU, "seed=7")
    (run / "metrics.jsonl").write_text('{"step": 4, "images": 16, "eta": 3}\n')
    assert start("--output-dir", "run", *CPU) == 0
    assert (run / "slurm").is_dir()


def test_a_run_that_goes_on_needs_no_backbone_to_start_from(stub: Stub, working_folder: Path) -> None:
    stub()
    run, start_from = working_folder / "run", [*CPU, "init.backbone=/gone.pth"]
    (run / "checkpoints" / "step_00000002").mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(load(None, start_from)))
    assert "/gone.pth does not exist here" in refusal("--output-dir", "run", "--overwrite", *start_from)
    assert (run / "checkpoints" / "step_00000002").is_dir()
    assert start("--output-dir", "run", *start_from) == 0


def test_what_sbatch_refuses_is_said_in_its_words(stub: Stub, working_folder: Path) -> None:
    stub(sbatch="echo \"sbatch: unrecognized option '--colour=red'\" >&2; exit 1")
    assert "unrecognized option '--colour=red'" in refusal("--output-dir", "run", "--slurm", "colour=red", *CPU)
    assert not (working_folder / "run" / "slurm").exists()


def test_a_refused_job_leaves_the_run_that_it_was_to_overwrite(stub: Stub, working_folder: Path) -> None:
    stub(sbatch="echo 'sbatch: error: invalid account' >&2; exit 1")
    for name in ("run/logs", "run/checkpoints"):
        (working_folder / name).mkdir(parents=True)
    (working_folder / "run" / "config.yaml").write_text("seed: 3\n")
    assert "invalid account" in refusal("--output-dir", "run", "--overwrite", *CPU)
    assert (working_folder / "run" / "checkpoints").is_dir()


def test_a_controller_that_hangs_is_not_waited_for(
    stub: Stub, working_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(sinfo="exec sleep 60")
    monkeypatch.setattr(controller, "PATIENCE", 0.5)
    assert "SLURM's controller does not answer: `sinfo` took more than" in refusal("--output-dir", "run", *CPU)


def test_a_controller_that_is_down_is_named(stub: Stub, working_folder: Path) -> None:
    stub(sinfo="echo 'slurm_load_partitions: Unable to contact slurm controller (connect failure)' >&2; exit 1")
    message = refusal("--output-dir", "run", *CPU)
    assert "SLURM's controller does not answer: slurm_load_partitions: Unable to contact" in message
    assert "scontrol ping" in message


def test_a_directory_that_cannot_be_written_is_refused(stub: Stub, working_folder: Path) -> None:
    stub()
    (working_folder / "file").write_text("")
    assert "cannot be written: Not a directory" in refusal("--output-dir", "file/run", *CPU)


def test_a_directory_in_memory_is_refused(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        f"disk / ext4 rw 0 0\nmem {tmp_path}/m\\040emory tmpfs rw 0 0\nserver {tmp_path}/shared nfs4 rw 0 0\n"
    )
    (tmp_path / "m emory").mkdir()
    (tmp_path / "shared").mkdir()
    with pytest.raises(UserError, match="lies in this machine's memory"):
        checks.check_shared(tmp_path / "m emory" / "run", mounts)
    assert checks.check_shared(tmp_path / "shared" / "run", mounts) == []
    assert "ext4" in checks.check_shared(tmp_path / "elsewhere", mounts)[0]


def test_a_submission_tells_job_log_and_what_to_do_with_it(
    stub: Stub, working_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub()
    assert start("--output-dir", "run", "--nodes", "2", "--tasks-per-node", "2", *CPU) == 0
    printed = capsys.readouterr().out
    assert "job 77 submitted: 2 nodes × 2 ranks" in printed
    assert f"log      {working_folder}/run/slurm/001/77_batch.log" in printed
    assert "scancel 77" in printed
    assert "--follow" in printed
    folder = working_folder / "run" / "slurm" / "001"
    assert (folder / "77_submitted.pkl").is_file()
    submission = Submission.read(folder)
    assert submission.members[0].run_dir == str(working_folder / "run")
    assert submission.watches_clock


def test_seconds_that_a_user_gives_for_the_signal_are_the_last_word(stub: Stub, working_folder: Path) -> None:
    folder = stub()
    start("--output-dir", "run", "--signal-seconds", "7", *CPU)
    assert "#SBATCH --signal=USR2@7" in (folder / "script").read_text()
    assert not Submission.read(working_folder / "run" / "slurm" / "001").watches_clock


@pytest.mark.parametrize("name", ["with space", "it's", 'say "x"', "a&b;c", "$HOME", "ünï"])
def test_a_run_directory_may_have_any_name(name: str, stub: Stub, working_folder: Path) -> None:
    """The shell finds the script's folders again, whatever they are called."""
    folder = stub()
    assert start("--output-dir", name, *CPU) == 0
    script = (folder / "script").read_text()
    lines = [line for line in script.splitlines() if line.startswith("cd ")]
    result = subprocess.run(["bash", "-c", f"{lines[0]}; pwd; ls"], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[0] == str(working_folder / name / "slurm" / "001" / "code")
    assert "launchers" in result.stdout.split()
    assert subprocess.run(["bash", "-n", str(folder / "script")], check=False).returncode == 0


def test_options_reach_the_script(stub: Stub, working_folder: Path) -> None:
    folder = stub()
    start(
        "--output-dir", "run", "--time", "1h", "--mem", "7G", "--partition", "low", "--account", "lab", "--qos", "fast",
        "--constraint", "big|new", "--exclude", "n1", "--comment", "a 'run'", "--slurm", "reservation=mine",
        "--slurm", "exclusive", "--env", "NCCL_DEBUG=INFO", "--interface", "ib0", "--setup", "module load x",
        "--python", "apptainer exec i.sif python", "--cpu-bind", "none", *CPU,
    )  # fmt: skip
    script = (folder / "script").read_text()
    for line in (
        "#SBATCH --time=60",
        "#SBATCH --mem=7G", "#SBATCH --partition=low", "#SBATCH --account=lab", "#SBATCH --qos=fast",
        "#SBATCH --constraint='big|new'", "#SBATCH --exclude=n1", "#SBATCH --reservation=mine", "#SBATCH --exclusive",
        "export NCCL_DEBUG=INFO", "export GLOO_SOCKET_IFNAME=ib0", "export NCCL_SOCKET_IFNAME=ib0", "module load x",
    ):  # fmt: skip
        assert line in script.splitlines()
    assert "--cpu-bind=none apptainer exec i.sif python -u -m submitit" in script


def test_gpus_and_memory_may_be_asked_for_in_the_site_s_own_way(stub: Stub, working_folder: Path) -> None:
    folder = stub()
    start("--output-dir", "run", "--slurm", "gres=gpu:a100:8", "--slurm", "mem-per-gpu=90G", *CPU[1:], "--nodes", "2",
          "train.batch=32", "train.microbatch=2", "data.train=scenes:n=64,size=32")  # fmt: skip
    script = (folder / "script").read_text()
    assert "#SBATCH --gres=gpu:a100:8" in script
    assert "#SBATCH --ntasks-per-node=8" in script
    assert "--gpus-per-node" not in script
    assert "--mem=" not in script


def test_with_gpus_no_rank_is_content_with_a_cpu(stub: Stub, working_folder: Path) -> None:
    """A node whose GPUs are gone would otherwise train on its cores, and the others wait for it."""
    from dinov2_fsdp.config import load

    stub()
    for name, gpus, device in (("a", "1", "cuda"), ("b", "0", "cpu")):
        start("--output-dir", name, "--gpus-per-node", gpus, *CPU[1:])
        submission = Submission.read(working_folder / name / "slurm" / "001")
        assert load(submission.members[0].config).parallel.device == device


def test_a_job_gets_nothing_from_the_one_that_submits_it(
    stub: Stub, working_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stub()
    inside = {"SLURM_JOB_ID": "5", "SLURM_NODEID": "3", "SBATCH_TIMELIMIT": "1", "RANK": "4", "MASTER_PORT": "9"}
    for name, value in {**inside, "SLURM_CONF": "/etc/slurm.conf", "DINOV2_FSDP_LIFE": "8"}.items():
        monkeypatch.setenv(name, value)
    start("--output-dir", "run", *CPU)
    seen = dict(line.split("=", 1) for line in (folder / "env").read_text().splitlines() if "=" in line)
    assert not inside.keys() & seen.keys()
    assert "DINOV2_FSDP_LIFE" not in seen
    assert seen["SLURM_CONF"] == "/etc/slurm.conf"
    assert os.environ["RANK"] == "4"


def test_outside_of_a_job_the_user_s_own_variables_stay() -> None:
    environment = {"OMP_NUM_THREADS": "4", "HOME": "/h", "SBATCH_ACCOUNT": "x"}
    assert without_job(environment) == {"OMP_NUM_THREADS": "4", "HOME": "/h"}


def test_a_run_has_one_job_at_a_time(stub: Stub, working_folder: Path) -> None:
    stub()
    start("--output-dir", "run", *CPU)
    stub(squeue="echo '77|PENDING|Resources'")
    message = refusal("--output-dir", "run", *CPU)
    assert f"job 77 is at {working_folder / 'run'} already" in message
    assert "scancel 77" in message
    stub(squeue="echo '77|FAILED|None'")
    assert start("--output-dir", "run", *CPU) == 0
    assert (working_folder / "run" / "slurm" / "002").is_dir()


def test_an_array_that_runs_can_be_followed_by_the_same_command(
    stub: Stub, working_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub()
    array = ("--output-dir", "run", "--array", "seed=0,1", *CPU)
    start(*array)
    # As they are looked for, both run; as they are followed, they are over.
    stub(
        squeue="""[ -e over ] && s=FAILED || s=RUNNING; printf '77_0|FAILED|x\\n77_1|%s|None\\n' $s
                   echo x >>asked; [ $(wc -l <asked) = 2 ] && touch over; true"""
    )
    capsys.readouterr()
    assert start(*array, "--follow") == 1
    printed = capsys.readouterr().out
    assert "job 77_1 is at run/seed=1 already: following it" in printed
    assert "77_0" not in printed
    assert not (working_folder / "run" / "slurm" / "002").exists()


def test_a_directory_with_another_run_is_refused(stub: Stub, working_folder: Path) -> None:
    stub()
    (working_folder / "run" / "logs").mkdir(parents=True)
    (working_folder / "run" / "config.yaml").write_text("seed: 3\n")
    assert "holds another run, which differs in seed (3 there)" in refusal("--output-dir", "run", *CPU)


def test_an_array_has_one_run_for_each_combination(
    stub: Stub, working_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stub()
    start("--output-dir", "sweep", "--array", "seed=0,1", "--array", "optim.betas=[0.9,0.99],[0.9,0.999]", *CPU)
    submission = Submission.read(working_folder / "sweep" / "slurm" / "001")
    names = [Path(member.run_dir).name for member in submission.members]
    assert names[0] == "seed=0,optim.betas=[0.9,0.99]".replace("[", "_").replace("]", "_").replace(",", "_")
    assert len(set(names)) == 4
    assert "#SBATCH --array=0-3%4" in (folder / "script").read_text()
    assert "77_3:" in capsys.readouterr().out
    from dinov2_fsdp.config import load

    configs = [load(member.config) for member in submission.members]
    assert [(config.seed, config.optim.betas[1]) for config in configs] == [
        (0, 0.99),
        (0, 0.999),
        (1, 0.99),
        (1, 0.999),
    ]


def test_an_array_may_name_configs(stub: Stub, working_folder: Path) -> None:
    stub()
    for name in ("a", "b"):
        (working_folder / f"{name}.yaml").write_text(f"output_dir: runs/{name}\n")
    start("--array", "a.yaml,b.yaml", *CPU)
    submission = Submission.read(working_folder / "runs" / "slurm" / "001")
    assert [member.run_dir for member in submission.members] == [str(working_folder / "runs" / name) for name in "ab"]
    (working_folder / "b.yaml").write_text("output_dir: runs/a\n")
    assert "two runs of the array would share" in refusal("--array", "a.yaml,b.yaml", *CPU)
    assert "a run has one config" in refusal("--config", "a.yaml", "--array", "b.yaml", *CPU)


def test_a_queued_job_has_its_own_copy_of_code_and_config(stub: Stub, working_folder: Path) -> None:
    stub()
    start("--output-dir", "run", *CPU)
    code = working_folder / "run" / "slurm" / "001" / "code"
    result = subprocess.run(
        [sys.executable, "-c", "import launchers.cluster.rank, dinov2_fsdp; print(dinov2_fsdp.__file__)"],
        cwd=code, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stdout.startswith(str(code))
    assert (code / "COMMIT").read_text().strip()
