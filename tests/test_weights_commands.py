"""The two commands, and torch.hub: weights in and out for people who write no Python of this project."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from parity import images, loaded, tiny
from safetensors import safe_open
from training import differing

from dinov2_fsdp.config import ModelConfig
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


def test_the_hub_gives_a_new_model_without_weights() -> None:
    model = torch.hub.load(ROOT, "dinov2_vits14", source="local", image_size=28)
    assert not model.training
    assert model.pos_embed.shape == (1, 5, 384)
