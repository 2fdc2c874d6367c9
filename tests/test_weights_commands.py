"""The two commands, and torch.hub: weights in and out for people who write no Python of this project."""

from __future__ import annotations

import dataclasses
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from parity import images, loaded, tiny
from safetensors import safe_open
from training import differing

from dinov2_fsdp.config import ModelConfig, width_depth_heads
from dinov2_fsdp.errors import UserError, run_cli
from dinov2_fsdp.weights import load_backbone
from dinov2_fsdp.weights.__main__ import main
from dinov2_fsdp.weights.writing import export

SIZE = 70
ROOT = str(Path(__file__).parents[1])


@pytest.mark.parametrize(
    ("to", "out", "complaint"),
    [
        ("official", "folder", "end it in .safetensors or .pth"),
        ("hf", "file.safetensors", "name a folder"),
        ("tim", "folder", "did you mean 'timm'"),
    ],
)
def test_a_destination_of_the_wrong_kind_is_refused(to: str, out: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=complaint):
        export(loaded(tiny("mlp", 0), SIZE), to, tmp_path / out)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs a command in this process: (exit code, what it printed)."""

    def command(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["weights", *arguments])
        with pytest.raises(SystemExit) as exit_:
            run_cli(main)
        printed = capsys.readouterr()
        return int(str(exit_.value.code)), printed.out + printed.err

    return command


def test_one_command_each_way(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    ours = loaded(tiny("mlp", 4), SIZE)
    export(ours, "official", tmp_path / "weights.pth")
    code, out = run("export", "--run", f"{tmp_path}/weights.pth", "--to", "hf", "--out", f"{tmp_path}/hf")
    assert (code, out) == (0, f"wrote {tmp_path}/hf\n")
    code, out = run("import", "--from", f"{tmp_path}/hf", "--out", f"{tmp_path}/back.safetensors")
    assert code == 0, out
    assert "hugging face weights, vits14 (width 128, 3 blocks, 2 heads), mlp, 4 registers" in out
    back = load_backbone(tmp_path / "back.safetensors")
    assert differing(dict(back.model.named_parameters()), dict(ours.model.named_parameters())) == []
    with safe_open(tmp_path / "back.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "dinov2_fsdp"


def test_a_command_answers_a_mistake_in_words(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    code, out = run("import", "--from", f"{tmp_path}/nothing", "--out", f"{tmp_path}/back.safetensors")
    assert code == 2
    assert out.startswith(f"error: {tmp_path}/nothing is no run directory")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("export --run x --otu y", "unrecognized arguments: --otu y; did you mean '--out'?"),
        ("import --from x --out y.safetensors --hdeas 3", "unrecognized arguments: --hdeas 3; did you mean '--heads'?"),
        ("export --run x --to hff", "argument --to: invalid choice: 'hff'"),
        ("export", "the following arguments are required: --run"),
        ("exprot --run x", "argument command: invalid choice: 'exprot'"),
        ("", "the following arguments are required: command"),
    ],
)
def test_a_wrong_command_line_is_one_message_without_all_options(
    run: Callable[..., tuple[int, str]], words: str, complaint: str
) -> None:
    code, out = run(*words.split())
    assert code == 2
    assert out.startswith(f"error: {complaint}")
    assert out.splitlines()[1:] == ["--help lists all options"]


@pytest.mark.parametrize("to", ["official", "hf", "timm"])
def test_what_is_written_is_for_whom_the_umask_says(
    to: str, run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    """Weights are shared: a file that only its writer may read is of no use to a group."""
    export(loaded(tiny("mlp", 0), SIZE), "official", tmp_path / "weights.pth")
    out = tmp_path / ("back.safetensors" if to == "official" else "back")
    before = os.umask(0o027)
    try:
        code, printed = run("export", "--run", f"{tmp_path}/weights.pth", "--to", to, "--out", str(out))
    finally:
        os.umask(before)
    assert code == 0, printed
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in ([out] if out.is_file() else out.iterdir())}
    assert set(modes.values()) == {"0o640"}, modes


def test_a_place_that_cannot_be_written_is_named(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    export(loaded(tiny("mlp", 0), SIZE), "official", tmp_path / "weights.pth")
    (tmp_path / "folder.safetensors").mkdir()
    for to, out in (("hf", "weights.pth/hf"), ("timm", "weights.pth/timm"), ("official", "folder.safetensors")):
        code, printed = run("export", "--run", f"{tmp_path}/weights.pth", "--to", to, "--out", f"{tmp_path}/{out}")
        assert code == 2
        assert printed.startswith(f"error: --out {tmp_path}/{out} cannot be written: "), printed
    assert {path.name for path in tmp_path.rglob("*")} == {"weights.pth", "folder.safetensors"}


def test_an_impossible_number_of_heads_is_refused(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    export(loaded(tiny("mlp", 0), SIZE), "official", tmp_path / "weights.pth")
    export(loaded(tiny("mlp", 0), SIZE), "hf", tmp_path / "hf")
    for source, heads, complaint in (
        ("weights.pth", "3", "3 attention heads are impossible; valid: a divisor of its width, 128"),
        ("weights.pth", "0", "0 attention heads are impossible"),
        ("hf", "4", "says that it has 2; leave the heads out"),
    ):
        out = ("--out", f"{tmp_path}/back.safetensors")
        code, printed = run("import", "--from", f"{tmp_path}/{source}", "--heads", heads, *out)
        assert (code, complaint in printed) == (2, True), printed
    assert not (tmp_path / "back.safetensors").exists()


def test_a_step_that_the_weights_are_not_of_is_refused(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    ours = loaded(tiny("mlp", 0), SIZE)
    export(ours, "official", tmp_path / "weights.pth")
    ours.step = 12
    export(ours, "official", tmp_path / "weights.safetensors")
    for file, complaint in (
        ("weights.pth", "do not say of which step"),
        ("weights.safetensors", "are those of step 12"),
    ):
        with pytest.raises(UserError, match=f"step 7 asked for, but the weights in .*{file} {complaint}"):
            load_backbone(tmp_path / file, step=7)
    assert load_backbone(tmp_path / "weights.safetensors", step=12).step == 12


@pytest.mark.parametrize(
    ("to", "registers", "interpolation", "theirs"),
    [
        ("hf", 0, "offset", "exact"), ("hf", 0, "exact", None), ("hf", 0, "antialias", "exact"),
        ("hf", 4, "antialias", None), ("hf", 4, "exact", "antialias"),
        ("timm", 0, "offset", "antialias"), ("timm", 4, "antialias", None), ("timm", 0, "exact", "antialias"),
        ("official", 0, "exact", None),
    ],
)  # fmt: skip
def test_an_export_says_where_the_other_side_stretches_positions_otherwise(
    to: str,
    registers: int,
    interpolation: str,
    theirs: str | None,
    run: Callable[..., tuple[int, str]],
    tmp_path: Path,
) -> None:
    export(loaded(tiny("mlp", registers), SIZE, interpolation=interpolation), "official", tmp_path / "ours.safetensors")
    out = str(tmp_path / ("out.safetensors" if to == "official" else "out"))
    code, printed = run("export", "--run", f"{tmp_path}/ours.safetensors", "--to", to, "--out", out)
    assert code == 0, printed
    assert ("note:" in printed) == (theirs is not None)
    if theirs:
        assert f"by the rule '{theirs}', this backbone by '{interpolation}'" in printed


@pytest.mark.parametrize(
    ("to", "file", "heads", "says"),
    [
        ("official", "a.pth", 4, True), ("official", "a.pth", 2, False), ("official", "a.safetensors", 4, False),
        ("timm", "a.pth", 4, True), ("timm", "a.safetensors", 4, True), ("timm", "a", 4, False),
    ],
)  # fmt: skip
def test_an_export_says_what_a_file_without_a_config_loses(
    to: str, file: str, heads: int, says: bool, run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    model = dataclasses.replace(tiny("mlp", 0), heads=heads)
    export(loaded(model, SIZE), "official", tmp_path / "ours.safetensors")
    code, printed = run("export", "--run", f"{tmp_path}/ours.safetensors", "--to", to, "--out", f"{tmp_path / file}")
    assert code == 0, printed
    assert (f"does not say that there are {heads} attention heads" in printed) == says
    read = load_backbone(tmp_path / file, heads=heads if says else None).architecture
    assert width_depth_heads(read)[2] == heads


@pytest.mark.slow
def test_the_package_is_a_command() -> None:
    command = [sys.executable, "-m", "dinov2_fsdp.weights", "export", "--run", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: nowhere is no run directory")


# -- torch.hub --------------------------------------------------------------------------------------------------------


def test_the_hub_offers_the_published_models(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {f"dinov2_vit{size}14{registers}" for size in "sblg" for registers in ("", "_reg")}
    monkeypatch.syspath_prepend(ROOT)
    public = {name for name, value in vars(importlib.import_module("hubconf")).items() if callable(value)}
    assert {name for name in public if not name.startswith("_")} == entries | {"backbone"}


def test_the_hub_loads_weights_from_this_machine(tmp_path: Path) -> None:
    ours = loaded(ModelConfig(arch="vits", registers=4), SIZE)
    export(ours, "timm", tmp_path)
    for name in ("dinov2_vits14_reg", "backbone"):
        model = torch.hub.load(ROOT, name, source="local", weights=tmp_path)
        assert (model(images(SIZE, SIZE)) - ours.model(images(SIZE, SIZE))).abs().max() < 1e-4


def test_the_hub_refuses_weights_of_another_model(tmp_path: Path) -> None:
    export(loaded(ModelConfig(arch="vits", registers=4), 28), "official", tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"holds vits14, mlp, 4 registers.*not vits14 with 0 registers"):
        torch.hub.load(ROOT, "dinov2_vits14", source="local", weights=tmp_path / "weights.pth")


def test_the_hub_answers_an_unknown_option_with_the_known_ones(tmp_path: Path) -> None:
    for weights in (None, tmp_path / "weights.pth"):
        with pytest.raises(UserError, match="pretrained: unknown here; valid: weights, image_size, seed"):
            torch.hub.load(ROOT, "dinov2_vits14", source="local", pretrained=False, weights=weights)


def test_the_hub_gives_a_new_model_without_weights() -> None:
    model = torch.hub.load(ROOT, "dinov2_vits14", source="local", image_size=28)
    assert not model.training
    assert model.pos_embed.shape == (1, 5, 384)
