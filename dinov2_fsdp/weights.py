"""Backbones in and out: from a run, a checkpoint or an exported file, without sharding and without processes.

    python -m dinov2_fsdp.weights export --run runs/NAME [--step N] [--out FILE]

An export is one safetensors file under the published models' parameter names, its architecture in the metadata.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dinov2_fsdp.checkpoint import STATE_FILE, SavedCheckpoint, find_checkpoint, load_tensors
from dinov2_fsdp.config import Config, ModelConfig, load
from dinov2_fsdp.errors import UserError, run_cli
from dinov2_fsdp.models.factory import build_backbone
from dinov2_fsdp.models.initialise import initialise
from dinov2_fsdp.models.vision_transformer import VisionTransformer


@dataclass
class LoadedBackbone:
    """A backbone in evaluation mode and where it came from.

    ``config`` is the run's, None for an exported file; ``step`` None where the file does not say.
    """

    model: VisionTransformer
    config: Config | None
    step: int | None
    source: str


def load_backbone(
    path: str | Path, step: int | None = None, which: str = "teacher", device: str | torch.device = "cpu"
) -> LoadedBackbone:
    """Return the backbone of a run directory, a checkpoint folder or an exported ``.safetensors`` file.

    Args:
        step: which checkpoint of a run; by default the newest.
        which: ``teacher`` or ``student``, in a run or checkpoint.

    Raises:
        UserError: nothing to load there, or its tensors do not fit the architecture; missing ones are listed.
    """
    path = Path(path)
    if path.is_file():
        return _load_export(path, device)
    if (path / STATE_FILE).is_file():
        state = json.loads((path / STATE_FILE).read_text())
        run, checkpoint = path.resolve().parent.parent, SavedCheckpoint(path, state["step"])
    elif (path / "config.yaml").is_file():
        run, checkpoint = path, find_checkpoint(path, step)
    else:
        raise UserError(
            f"{path} is no run directory, checkpoint folder or exported file\n"
            "expected: runs/NAME, runs/NAME/checkpoints/step_…, or a .safetensors file"
        )
    config = load(run / "config.yaml")
    model = build_backbone(config.model, config.crops.global_size)
    prefix = f"{which}.backbone."
    load_tensors(checkpoint.path, {f"{prefix}{name}": p.detach() for name, p in model.named_parameters()}, prefix)
    return LoadedBackbone(_frozen(model, device), config, checkpoint.step, str(checkpoint.path))


def untrained_backbone(config: Config, device: str | torch.device = "cpu") -> VisionTransformer:
    """Return the backbone that a run of this config starts from, in evaluation mode."""
    from dinov2_fsdp.ssl.network import Network

    with torch.device("meta"):
        network = Network(config)
    network.backbone.to_empty(device="cpu")
    network.dino_head = network.ibot_head = None  # type: ignore[assignment]
    initialise(network, config.seed, config.model.layer_scale)
    return _frozen(network.backbone, device)


def export_backbone(loaded: LoadedBackbone, file: Path) -> None:
    """Write a backbone with what is needed to build it again."""
    assert loaded.config is not None
    metadata = {
        "format": "dinov2_fsdp",
        "model": json.dumps(dataclasses.asdict(loaded.config.model)),
        "image_size": str(loaded.config.crops.global_size),
        "step": str(loaded.step),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().cpu().contiguous() for name, p in loaded.model.named_parameters()}
    save_file(tensors, file, metadata=metadata)


def _load_export(path: Path, device: str | torch.device) -> LoadedBackbone:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from None
    if metadata.get("format") != "dinov2_fsdp":
        raise UserError(f"{path} was not exported by this project: its metadata names no architecture")
    model = build_backbone(ModelConfig(**json.loads(metadata["model"])), int(metadata["image_size"]))
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wrong := [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]:
        raise UserError(f"{path} does not fit its architecture; {len(wrong)} tensors differ: {sorted(wrong)[:8]}")
    model.load_state_dict(tensors)
    return LoadedBackbone(_frozen(model, device), None, int(metadata["step"]), str(path))


def _frozen(model: VisionTransformer, device: str | torch.device) -> VisionTransformer:
    return model.to(device).eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dinov2_fsdp.weights", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write the teacher's backbone of a run as one safetensors file")
    export.add_argument("--run", required=True, help="run directory")
    export.add_argument("--step", type=int, help="checkpoint; by default the newest")
    export.add_argument("--out", help="file to write; by default RUN/exports/teacher_step_….safetensors")
    arguments = parser.parse_args()
    loaded = load_backbone(arguments.run, arguments.step)
    out = Path(arguments.out or Path(arguments.run) / "exports" / f"teacher_step_{loaded.step:08d}.safetensors")
    export_backbone(loaded, out)
    print(f"wrote {out}")


if __name__ == "__main__":
    run_cli(main)
