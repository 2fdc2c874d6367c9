"""A config file may be anything: it is read or refused by name, at once, and nothing in it is ever executed."""

from __future__ import annotations

import os
import time
from itertools import pairwise
from pathlib import Path

import pytest

from dinov2_fsdp.config import Config, load
from dinov2_fsdp.config.files import MAX_BYTES, MAX_VALUES
from dinov2_fsdp.errors import UserError

AT_ONCE = 2.0
"""Seconds of the processor that the worst of files may take; they take hundredths."""


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(path: Path, *overrides: str) -> str:
    start = time.process_time()
    with pytest.raises(UserError) as caught:
        load(path, overrides)
    assert time.process_time() - start < AT_ONCE
    message = str(caught.value)
    assert len(message.splitlines()) <= 5, message
    assert len(message) < 2000
    return message


# ---------------------------------------------------------------------------------------------------------------------
# Who set it.


def test_an_unknown_key_names_the_file_in_which_it_stands(tmp_path: Path) -> None:
    base = write(tmp_path / "base.yaml", "optim: {momentun: 1}\n")
    child = write(tmp_path / "child.yaml", "extends: base.yaml\nseed: 1\n")
    assert refusal(child).endswith(f"in config file {base}")
    write(base, "seed: 2\n")
    write(child, "extends: base.yaml\noptim: {momentun: 1}\n")
    assert refusal(child).endswith(f"in config file {child}")


@pytest.mark.parametrize("value", ["many", "-1", "???", "${nowhere}", "null", "[1]", "100"])
def test_a_bad_value_names_the_file_that_set_it(tmp_path: Path, value: str) -> None:
    base = write(
        tmp_path / "base.yaml", f"train: {{batch: '{value}'}}\n" if "[" not in value else "train: {batch: [1]}"
    )
    child = write(tmp_path / "child.yaml", "extends: base.yaml\nseed: 1\n")
    assert f"train.batch is set in config file {base}" in refusal(child)


def test_values_that_disagree_name_both_files(tmp_path: Path) -> None:
    base = write(tmp_path / "base.yaml", "train: {microbatch: 48}\n")
    child = write(tmp_path / "child.yaml", "extends: base.yaml\ntrain: {batch: 64}\n")
    message = refusal(child)
    assert f"train.batch is set in config file {child}" in message
    assert f"train.microbatch is set in config file {base}" in message


def test_an_override_is_not_blamed_on_the_file_that_it_overrides(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", "train: {batch: 128}\n")
    assert "run.yaml" not in refusal(path, "train.batch=100")
    assert load(write(path, "train: {batch: 100}\n"), ["train.batch=128"]).train.batch == 128


# ---------------------------------------------------------------------------------------------------------------------
# What is asked for and what is referred to.


def test_three_question_marks_demand_a_value(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", "train:\n  batch: ???\n")
    message = refusal(path)
    assert message.startswith("train.batch needs a value")
    assert "valid: int — Images per step" in message
    assert load(path, ["train.batch=128"]).train.batch == 128
    assert "train.batch needs a value" in refusal(write(path, ""), "train.batch=???")
    assert "optim.betas needs a value" in refusal(path, "optim.betas=[0.9, '???']")
    assert "data.cache needs a value" in refusal(path, "data.cache=???")


def test_a_reference_takes_the_value_of_another_key(tmp_path: Path) -> None:
    text = "output_dir: 'runs/${model.arch}_${train.batch}'\neval: {size: '${crops.global_size}'}\n"
    config = load(write(tmp_path / "run.yaml", text), ["optim.betas=${optim.weight_decay}", "model.arch=vits"])
    assert config.output_dir == "runs/vits_2048"
    assert config.eval.size == 224
    assert config.optim.betas == (0.04, 0.4)


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:HOME}",
        "${oc.env:HOME,/tmp}",
        "${env:HOME}",
        "${oc.decode:'1'}",
        "${oc.create:{}}",
        "${.batch}",
        "${train.${model.arch}}",
        "${}",
        "runs/${",
        "\\${oc.env:HOME}",
    ],
)
def test_what_is_no_plain_reference_is_refused(tmp_path: Path, value: str) -> None:
    path = write(tmp_path / "run.yaml", f'output_dir: "{value}"\n'.replace("\\", "\\\\"))
    message = refusal(path)
    assert message.startswith("output_dir: ")
    assert "a config reads no environment and computes nothing" in message
    assert os.environ["HOME"] not in message.replace(str(tmp_path), "")


def test_a_reference_to_no_key_names_the_nearest(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "run.yaml", "seed: '${trian.batch}'\n"))
    assert "seed: ${trian.batch} refers to a key that does not exist; did you mean 'train.batch'?" in message


@pytest.mark.parametrize(
    "text",
    [
        "seed: '${seed}'\n",
        "output_dir: '${data.cache}'\ndata: {cache: '${output_dir}'}\n",
        "output_dir: 'a${data.cache}'\ndata: {cache: 'a${data.train}', train: 'a${output_dir}'}\n",
    ],
)
def test_references_in_a_circle_are_refused(tmp_path: Path, text: str) -> None:
    assert "itself" in refusal(write(tmp_path / "run.yaml", text))


def test_references_cannot_grow_without_end(tmp_path: Path) -> None:
    keys = ["output_dir", "data.train", "data.cache", "eval.train", "eval.test", "crops.blur", "log.every"]
    overrides = [f"{key}='{f'${{{following}}}' * 300}'" for key, following in pairwise(keys)]
    assert "grows beyond" in refusal(write(tmp_path / "run.yaml", ""), *overrides)


def test_a_list_is_no_part_of_a_text_or_list(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", "")
    assert "is a list" in refusal(path, "output_dir=a${eval.k}")
    assert "is a list" in refusal(path, "eval.k=['${optim.betas}']")


# ---------------------------------------------------------------------------------------------------------------------
# Hostile and broken files.

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
CANNOT_BE_READ: dict[str, tuple[str | bytes, str]] = {
    "unclosed": ("train: {batch: 1\n", "line"),
    "bare question marks": ("train: {batch: ???}\n", "??? must stand in quotes"),
    "duplicate": ("seed: 1\ntrain: {batch: 64}\nseed: 2\n", "line 3: key 'seed' stands here a second time"),
    "inner duplicate": ("train:\n  batch: 64\n  batch: 64\n", "line 3: key 'batch' stands here a second time"),
    "tab": ("train:\n\tbatch: 64\n", "line 2: while scanning"),
    "laughs": (LAUGHS, f"more than {MAX_VALUES:,} values"),
    "wide": ("eval: {k: [" + "1," * 20_000 + "1]}", f"more than {MAX_VALUES:,} values"),
    "deep lists": ("seed: " + "[" * 400_000, "nest"),
    "deep mappings": ("seed: " + "{a: " * 200_000, "nest"),
    "deep blocks": ("- " * 400_000, "nest"),
    "deep keys": ("? " * 400_000, "a key must be a plain word"),
    "recursion": ("train: &a {batch: *a}\n", "alias *a has no anchor before it"),
    "list as key": ("? [1, 2]\n: 3\n", "a key must be a plain word"),
    "other tag": ("seed: !mine 3\n", "tags such as !mine are not allowed"),
    "merge": ("train: {<<: 3}\n", "<< merges mappings only"),
    "two documents": ("seed: 1\n---\nseed: 2\n", "line 2: a second document"),
    "binary": (bytes(range(256)) * 40, "zero bytes"),
    "random": (bytes(7 * i * i % 251 + 1 for i in range(9999)), "not UTF-8"),
    "control": ("seed: \x07\n", ""),
    "zero": ("seed: \x00\n", "zero bytes"),
    "utf-16": ("seed: 1\n".encode("utf-16"), "UTF-16"),
    "utf-16 without mark": ("seed: 1\n".encode("utf-16-le"), "UTF-16"),
    "utf-32": ("seed: 1\n".encode("utf-32"), "save it as UTF-8"),
    "latin-1": ("seed: 1\noutput_dir: é\n".encode("latin-1"), "line 2 is not UTF-8 (byte 0xe9)"),
    "long value": ("seed: " + "9" * 100_000, "a value has 100,000 characters"),
    "future": ("%YAML 9.9\n---\nseed: 1\n", "line 1"),
}


@pytest.mark.parametrize("case", CANNOT_BE_READ)
def test_a_file_that_is_no_yaml_is_named_with_the_reason(tmp_path: Path, case: str) -> None:
    content, reason = CANNOT_BE_READ[case]
    message = refusal(write(tmp_path / "a.yaml", content))
    assert message.startswith(f"config file {tmp_path / 'a.yaml'} cannot be read as YAML: ")
    assert reason in message


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "3\n", "just text\n", "[]\n", "'seed: 1'\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    message = refusal(write(tmp_path / "a.yaml", text))
    assert message == f"config file {tmp_path / 'a.yaml'} must hold `key: value` lines at its top level"


@pytest.mark.parametrize("content", [b"", b"# nothing\n", b"---\n", b"null\n", b"{}\n", b"\xef\xbb\xbf# marked\n"])
def test_an_empty_file_is_all_defaults(tmp_path: Path, content: bytes) -> None:
    assert load(write(tmp_path / "a.yaml", content)) == Config()


@pytest.mark.parametrize(
    "text",
    [
        "seed: !!python/object/apply:os.system ['touch {witness}']\n",
        "seed: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{witness}']]\n",
        "seed: !!python/object/new:os.system ['touch {witness}']\n",
        "? !!python/object/apply:os.system ['touch {witness}']\n: 1\n",
        "!!python/object/apply:os.system ['touch {witness}']\n",
        "seed: !!python/name:os.system\n",
    ],
)
def test_a_tag_that_makes_python_objects_is_not_executed(tmp_path: Path, text: str) -> None:
    witness = tmp_path / "witness"
    message = refusal(write(tmp_path / "a.yaml", text.format(witness=witness)))
    assert "cannot be read as YAML" in message
    assert not witness.exists()


def test_a_file_that_is_too_large_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    with path.open("wb") as file:
        file.truncate(10**12)
    assert f"config file {path} is larger than {MAX_BYTES:,} bytes" in refusal(path)


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert f"config file {tmp_path} is a folder" in refusal(tmp_path)
    assert f"config file {tmp_path / 'pipe'} is no regular file" in refusal(tmp_path / "pipe")
    assert "symbolic links" in refusal(tmp_path / "loop")
    assert "cannot be read" in refusal(tmp_path / ("a" * 300))
    assert "cannot be read" in refusal(Path("a\0b"))
    assert "cannot be read" in refusal(write(tmp_path / "a.yaml", "") / "b.yaml")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "").chmod(0)
    assert f"config file {tmp_path / 'a.yaml'} cannot be read: Permission denied" in refusal(tmp_path / "a.yaml")


@pytest.mark.parametrize("base", ["", "[a.yaml]", "{a: 1}", "null"])
def test_a_base_that_is_no_file_name_is_refused(tmp_path: Path, base: str) -> None:
    assert "is no file name" in refusal(write(tmp_path / "a.yaml", f"extends: {base}\n"))


@pytest.mark.parametrize("base", [".", '"\\0"', "/dev/zero", "nowhere.yaml", "broken.yaml"])
def test_a_base_that_cannot_be_read_names_the_file_that_extends_it(tmp_path: Path, base: str) -> None:
    write(tmp_path / "broken.yaml", "[")
    path = write(tmp_path / "a.yaml", f"extends: {base}\n")
    assert refusal(path).endswith(f"named by extends in {path}")


def test_a_long_chain_of_files_is_refused(tmp_path: Path) -> None:
    for number in range(30):
        write(tmp_path / f"{number}.yaml", f"extends: {number + 1}.yaml\n")
    assert "16th that extends another" in refusal(tmp_path / "0.yaml")


def test_a_name_of_several_lines_stays_on_one(tmp_path: Path) -> None:
    refusal(write(tmp_path / "a\nb\nc\nd\ne\nf.yaml", "["))
    refusal(write(tmp_path / "a.yaml", '"a\\nb\\nc\\nd\\ne\\nf": 1\n'))
    refusal(write(tmp_path / "a.yaml", 'train: "a\\nb\\nc\\nd\\ne\\nf"\n'))
    refusal(write(tmp_path / "a.yaml", 'loss: {centering: "a\\nb\\nc\\nd\\ne\\nf"}\n'))
    refusal(write(tmp_path / "a.yaml", 'seed: "a\\nb\\nc\\nd\\ne\\nf"\n'))


# ---------------------------------------------------------------------------------------------------------------------
# What YAML can do and a config may use.


def test_an_alias_and_a_merge_are_read(tmp_path: Path) -> None:
    heads = "dino_head: &head {prototypes: &n 128, hidden: 64}\nibot_head: {<<: *head, hidden: 32, separate: true}\n"
    config = load(write(tmp_path / "a.yaml", f"{heads}seed: *n\n"))
    assert (config.ibot_head.prototypes, config.ibot_head.hidden, config.ibot_head.separate) == (128, 32, True)
    assert config.seed == 128


def test_text_is_kept_as_it_is_written(tmp_path: Path) -> None:
    for name in ("0123", "1:30", "2026-01-02", "1.50", "no", "1e3", "'null'", "'a: b'", "0x1F"):
        assert load(write(tmp_path / "a.yaml", f"output_dir: {name}\n")).output_dir == name.strip("'")


def test_numbers_and_switches_are_read_as_their_knob_has_them(tmp_path: Path) -> None:
    text = "optim: {lr: 1e-5, clip: 3}\ntrain: {batch: '128', deterministic: true}\nlog: {tensorboard: no}\n"
    config = load(write(tmp_path / "a.yaml", text))
    assert (config.optim.lr, config.optim.clip, config.train.batch) == (1e-5, 3.0, 128)
    assert (config.train.deterministic, config.log.tensorboard) == (True, False)


def test_a_null_is_nothing_but_only_where_nothing_is_allowed(tmp_path: Path) -> None:
    assert load(write(tmp_path / "a.yaml", "data: {cache: ~}\nmodel: {dim:\n}\n")).data.cache is None
    assert refusal(write(tmp_path / "a.yaml", "seed:\n")).startswith("seed: None is no int")
