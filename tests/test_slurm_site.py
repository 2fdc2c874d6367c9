"""A site's file of defaults for jobs."""

from __future__ import annotations

from pathlib import Path

import pytest
from submitting import CPU, Stub, refusal, start

from launchers.cluster.submission import Submission

pytestmark = pytest.mark.usefixtures("no_site_of_this_user")


def test_a_site_file_fills_in_what_the_command_leaves_out(stub: Stub, working_folder: Path) -> None:
    folder = stub()
    site = working_folder / "site.yaml"
    site.write_text(
        "partition: low\naccount: lab\ntime: 2h\nenv: {A: 1}\nslurm: {reservation: big}\nsetup: [module load a]\n"
        "preflight: off\n"
    )
    start("--output-dir", "run", "--site", str(site), "--account", "mine", "--env", "B=2", "--setup", "b", *CPU)
    lines = (folder / "script").read_text().splitlines()
    for line in ("#SBATCH --partition=low", "#SBATCH --account=mine", "#SBATCH --time=120", "export A=1", "export B=2",
                 "#SBATCH --reservation=big", "module load a", "b"):  # fmt: skip
        assert line in lines
    assert Submission.read(working_folder / "run" / "slurm" / "001").preflight == "off"


def test_the_user_s_own_site_file_is_found(stub: Stub, working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stub()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(working_folder))
    (working_folder / "dinov2_fsdp").mkdir()
    (working_folder / "dinov2_fsdp" / "slurm.yaml").write_text("qos: fast\n")
    start("--output-dir", "run", *CPU)
    assert "#SBATCH --qos=fast" in (folder / "script").read_text()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("partitoin: low", "unknown key 'partitoin'; did you mean 'partition'?"),
        ("nodes: 1.5", "'nodes' holds '1.5'; it needs a whole number"),
        ("partition: [a, b]", "'partition' holds ['a', 'b']; it needs one value"),
        ("nodes: many", "'nodes' holds 'many'; it needs a whole number"),
        ("slurm: fast", "'slurm' holds 'fast'; it needs lines like"),
        ("preflight: maybe", "'preflight' holds 'maybe'; valid: warn, exclude, off"),
        ("[1, 2]", "must hold lines like"),
        ("a: b: c", "cannot be read as YAML"),
        ("x: !!python/object/apply:os.system [touch hacked]", "cannot be read as YAML"),
    ],
)
def test_what_is_wrong_with_a_site_file_is_said(content: str, words: str, working_folder: Path) -> None:
    (working_folder / "site.yaml").write_text(content)
    assert words in refusal("--site", "site.yaml", "--output-dir", "run", *CPU)
    assert not (working_folder / "hacked").exists()


def test_what_a_site_file_says_is_taken_as_it_is_written(stub: Stub, working_folder: Path) -> None:
    """YAML would read these as 7200, 83, 960, true and the word None."""
    folder = stub()
    (working_folder / "site.yaml").write_text(
        "time: 2:00:00\naccount: 0123\nqos: on\nexclude: null\nconstraint:\nslurm: {begin: 16:00, exclusive: }\n"
    )
    start("--output-dir", "run", "--site", "site.yaml", *CPU)
    lines = (folder / "script").read_text().splitlines()
    for line in ("time=120", "account=0123", "qos=on", "begin=16:00", "exclusive"):
        assert f"#SBATCH --{line}" in lines
    assert not [line for line in lines if "exclude" in line or "constraint" in line]
