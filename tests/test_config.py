"""A wrong config is told from a right one at once, with the key, its value and the way out."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import tiny_config

from dinov2_fsdp.config import Config, describe_keys, from_dict, load, microbatches_per_rank, to_yaml
from dinov2_fsdp.errors import UserError
from dinov2_fsdp.parallel.place import check_devices

ROOT = Path(__file__).resolve().parent.parent
SLOW_MACHINE = 2.5
"""What one second may become where tests share the machine."""


def complaint(*overrides: str, path: Path | None = None) -> str:
    """The message with which a config is refused; never longer than five lines."""
    with pytest.raises(UserError) as caught:
        load(path, overrides)
    message = str(caught.value)
    assert len(message.splitlines()) <= 5, message
    return message


def test_without_a_file_a_config_is_all_defaults() -> None:
    assert load(None) == Config()


# ---------------------------------------------------------------------------------------------------------------------
# Keys.


def test_an_unknown_key_names_the_nearest_and_lists_the_valid_ones() -> None:
    message = complaint("train.bacth=64")
    assert "unknown key 'train.bacth'" in message
    assert "did you mean 'train.batch'?" in message
    for field in dataclasses.fields(Config().train):
        assert field.name in message.split("valid")[1]


def test_an_unknown_section_names_the_nearest() -> None:
    assert "did you mean 'train'?" in complaint("trian.batch=64")


def test_a_key_in_the_wrong_section_is_pointed_to_its_own() -> None:
    assert "did you mean 'train.precision'?" in complaint("precision=fp32")
    assert "did you mean 'crops.local_number'?" in complaint("data.local_number=2")
    assert "did you mean 'train.batch'?" in complaint("batch=8")


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("optim.momentun", "optim.momentum"),
        ("train.lr", "optim.lr"),
        ("batch_size", "train.batch"),
        ("train_batch", "train.batch"),
        ("epochs", "train.epoch"),
    ],
)
def test_a_mistyped_key_is_pointed_to_the_one_most_like_it_by_its_whole_path(key: str, meant: str) -> None:
    assert f"unknown key '{key}'; did you mean '{meant}'?" in complaint(f"{key}=1")


def test_a_key_like_no_other_gets_no_hint() -> None:
    assert "did you mean" not in complaint("xyzzy=1")
    assert "did you mean" not in complaint(f"{'batch' * 100}=1")


def test_a_dotted_key_in_a_file_is_shown_as_a_file_writes_it(tmp_path: Path) -> None:
    message = complaint(path=write(tmp_path / "run.yaml", "train.batch: 64\n"))
    assert "in a file it is written train: {batch: …}" in message


def test_an_unknown_key_in_a_file_is_refused_too(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("optim: {learning_rate: 1}\n")
    assert "unknown key 'optim.learning_rate'" in complaint(path=tmp_path / "run.yaml")


@pytest.mark.parametrize("text", ["train.batch", "=4", "batch:4"])
def test_an_override_that_is_no_assignment_is_shown_a_right_one(text: str) -> None:
    assert f"'{text}' is not of the form key=value, e.g. train.batch=256" in complaint(text)


def test_every_key_is_documented() -> None:
    keys = describe_keys()
    assert len({key for key, *_ in keys}) == len(keys) > 80
    assert [key for key, _, _, text in keys if len(text) < 10] == []


# ---------------------------------------------------------------------------------------------------------------------
# Values.


@pytest.mark.parametrize(
    ("override", "kind"),
    [
        ("train.batch=many", "int"),
        ("train.batch=1.5", "int"),
        ("train.batch=true", "int"),
        ("train.batch=null", "int"),
        ("train.batch=[1, 2]", "int"),
        ("train.batch={a: 1}", "int"),
        ("loss.koleo=much", "float"),
        ("log.tensorboard=perhaps", "bool"),
        ("optim.betas=0.9", "tuple"),
        ("optim.betas=[a, b]", "tuple"),
        ("train.duration=[1]", "str"),
    ],
)
def test_an_ill_typed_value_names_key_value_and_type(override: str, kind: str) -> None:
    key, value = override.split("=")
    message = complaint(override)
    assert message.startswith(f"{key}: ")
    assert f"valid: {kind}" in message
    assert value.strip("[]{}").split(",")[0].split(":")[0].lower() in message.lower().replace("none", "null")


def test_a_value_where_a_section_belongs_is_refused() -> None:
    assert "'model' holds 3; it needs keys: arch, patch" in complaint("model=3")
    assert "model" in complaint("model=null")


def test_a_tuple_of_another_length_is_refused() -> None:
    assert "optim.betas needs 2 values like [0.9, 0.999], got [0.9]" in complaint("optim.betas=[0.9]")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.arch=vitx"], "model.arch=vitx is unknown; did you mean 'vits'?\nvalid: vits, vitb, vitl, vitg"),
        (["loss.centering=sinkorn"], "did you mean 'sinkhorn'?"),
        (["train.precision=int8"], "valid: bf16, fp16, fp32"),
        (["crops.global_size=225"], "crops.global_size=225 is impossible; valid: a multiple of 14, e.g. 224 or 238"),
        (["crops.local_size=100"], "crops.local_size=100 is impossible; valid: a multiple of 14, e.g. 98 or 112"),
        (["eval.size=230"], "eval.size=230 is impossible; valid: a multiple of 14, e.g. 224 or 238"),
        (["train.batch=100"], "train.batch=100 is impossible; valid: a multiple of 64, e.g. 64 or 128"),
        (["train.batch=0"], "train.batch=0 is impossible; valid: a number above 0"),
        (["train.microbatch=1"], "KoLeo needs at least two images"),
        (["loss.dino=0", "loss.ibot=0"], "leave nothing to learn"),
        (["loss.teacher_temperature=0.2"], "the teacher must be sharper"),
        (["optim.lr=nan"], "optim.lr=nan is impossible"),
        (["optim.lr=inf"], "optim.lr=inf is impossible"),
        (["optim.betas=[0.9, 1.5]"], "optim.betas=[0.9, 1.5] is impossible"),
        (["optim.weight_decay=[-1, 0]"], "optim.weight_decay=[-1.0, 0.0] is impossible"),
        (["optim.layer_decay=0"], "optim.layer_decay=0.0 is impossible"),
        (["model.depth=0"], "model.depth=0 is impossible"),
        (["model.dim=-4"], "model.dim=-4 is impossible"),
        (["model.heads=7"], "model.heads=7 is impossible; valid: a divisor of model.dim (1024)"),
        (["model.drop_path=1"], "model.drop_path=1.0 is impossible"),
        (["teacher.momentum=[0.9, 1.1]"], "teacher.momentum=[0.9, 1.1] is impossible"),
        (["masks.ratio=[0.5, 0.1]"], "masks.ratio=[0.5, 0.1] is impossible"),
        (["crops.flip=2"], "crops.flip=2.0 is impossible; valid: a probability between 0 and 1"),
        (["train.duration=5"], "train.duration: duration '5' has no unit"),
        (["train.duration=5%"], "train.duration=5% is impossible"),
        (["log.every=-1it"], "log.every: duration '-1it' is negative"),
        (["eval.every=1ep"], "eval.test=None is impossible; valid: a labelled data set"),
        (["eval.k=[0]"], "eval.k=[0] is impossible"),
        (["data.train=["], "cannot be read"),
    ],
)
def test_an_impossible_value_is_refused_with_what_would_be_possible(overrides: list[str], expected: str) -> None:
    assert expected in complaint(*overrides)


def test_what_is_impossible_becomes_possible_by_the_way_out() -> None:
    load(None, ["train.microbatch=1", "loss.koleo=0"])
    load(None, ["crops.global_size=238"])
    load(None, ["model.depth=1", "model.heads=8"])


def test_microbatches_that_processes_cannot_share_are_refused() -> None:
    config = tiny_config(train__batch=24, train__microbatch=4)
    with pytest.raises(UserError) as caught:
        microbatches_per_rank(config, 4)
    assert "train.batch=24 is 6 microbatches of 4, which 4 processes cannot share evenly" in str(caught.value)
    assert "valid numbers of processes: 1, 2, 3, 6" in str(caught.value)
    assert [microbatches_per_rank(config, n) for n in (1, 2, 3, 6)] == [6, 3, 2, 1]


def test_the_numbers_of_processes_for_a_huge_batch_are_found_at_once() -> None:
    config = load(None, ["train.batch=2147483640", "train.microbatch=1", "loss.koleo=0"])
    start = time.perf_counter()
    with pytest.raises(UserError, match=r"valid numbers of processes: .*, 2147483640;"):
        microbatches_per_rank(config, 7)
    assert time.perf_counter() - start < SLOW_MACHINE


def test_more_processes_than_gpus_are_refused() -> None:
    with pytest.raises(UserError, match="4 processes need 4 GPUs, but this machine shows 2; use --nproc 2"):
        check_devices("auto", 4, 2)
    with pytest.raises(UserError, match=r"1 processes need 1 GPUs, but this machine shows 0; use parallel.device=cpu"):
        check_devices("cuda", 1, 0)
    assert [check_devices("auto", 2, 2), check_devices("auto", 4, 0), check_devices("cpu", 4, 2)] == [
        "cuda",
        "cpu",
        "cpu",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Files.


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_file_changes_the_one_that_it_extends_and_overrides_change_both(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "train: {batch: 128, microbatch: 16}\nseed: 3\noptim: {betas: [0.8, 0.9]}\n")
    child = write(tmp_path / "deep" / "child.yaml", "extends: ../base.yaml\ntrain: {microbatch: 32}\n")
    config = load(child, ["seed=5"])
    assert (config.train.batch, config.train.microbatch, config.seed) == (128, 32, 5)
    assert config.optim.betas == (0.8, 0.9)
    assert config.loss == Config().loss


def test_files_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", "extends: b.yaml\n")
    write(tmp_path / "b.yaml", "extends: a.yaml\n")
    assert "extends itself" in complaint(path=first)
    assert "extends itself" in complaint(path=write(tmp_path / "self.yaml", "extends: self.yaml\n"))


def test_a_missing_file_names_its_nearest_neighbour(tmp_path: Path) -> None:
    write(tmp_path / "debug.yaml", "")
    message = complaint(path=tmp_path / "debgu.yaml")
    assert f"config file {tmp_path / 'debgu.yaml'} does not exist" in message
    assert "debug.yaml'?" in message


def test_a_missing_base_is_named(tmp_path: Path) -> None:
    assert "nowhere.yaml does not exist" in complaint(path=write(tmp_path / "a.yaml", "extends: nowhere.yaml\n"))


def test_a_config_written_as_yaml_reads_back_equal(tmp_path: Path) -> None:
    config = from_dict(
        {
            "output_dir": "runs/0123: # strange",
            "data": {"cache": None, "train": "folder:/my images/5%"},
            "optim": {"lr": 1e-7, "betas": [0.5, 0.25]},
            "eval": {"tasks": [], "k": [3]},
            "train": {"duration": "1.5ep"},
        }
    )
    assert load(write(tmp_path / "a.yaml", to_yaml(config))) == config
    assert load(write(tmp_path / "b.yaml", to_yaml(Config()))) == Config()


# ---------------------------------------------------------------------------------------------------------------------
# At once.


def timed(*command: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """The faster of two runs of a command, and its seconds."""
    found = []
    for _ in range(2):
        start = time.perf_counter()
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
        found.append((result, time.perf_counter() - start))
    return min(found, key=lambda result_and_seconds: result_and_seconds[1])


def test_reading_a_config_imports_neither_torch_nor_data() -> None:
    code = "import sys, dinov2_fsdp.config; print(sorted({'torch', 'numpy', 'PIL'} & sys.modules.keys()))"
    assert timed(sys.executable, "-c", code)[0].stdout == "[]\n"


def test_help_answers_at_once() -> None:
    result, seconds = timed(sys.executable, "launchers/local.py", "--help")
    assert result.returncode == 0
    assert "launchers/local.py --config configs/debug.yaml" in result.stdout
    assert seconds < SLOW_MACHINE


@pytest.mark.parametrize("override", ["train.bacth=64", "train.batch=100", "model.arch=vitx"])
def test_a_wrong_config_fails_at_once_without_a_traceback(override: str) -> None:
    result, seconds = timed(sys.executable, "launchers/local.py", "--config", "configs/debug.yaml", override)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert override.split("=")[0] in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) <= 5
    assert seconds < SLOW_MACHINE


@pytest.mark.parametrize("value", ["scenes:", "a: b"])
def test_text_on_the_command_line_stays_as_it_was_typed(value: str) -> None:
    assert load(None, [f"output_dir={value}"]).output_dir == value


def test_a_home_directory_is_one_wherever_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    (tmp_path / "run.yaml").write_text("output_dir: ~/run")
    assert load(tmp_path / "run.yaml").output_dir == "/home/somebody/run"
    assert load(None, ["output_dir=~/run", "data.cache=~/cache"]).data.cache == "/home/somebody/cache"
