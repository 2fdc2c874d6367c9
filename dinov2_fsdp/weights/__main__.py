"""Weights in and out, one command each way.

python -m dinov2_fsdp.weights export --run runs/NAME --to official|hf|timm --out FILE_OR_FOLDER
python -m dinov2_fsdp.weights import --from FILE_OR_FOLDER --out FILE.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dinov2_fsdp.config import width_depth_heads
from dinov2_fsdp.errors import Parser, UserError, run_cli
from dinov2_fsdp.models.vision_transformer import INTERPOLATIONS
from dinov2_fsdp.weights.architecture import HEAD_DIM
from dinov2_fsdp.weights.backbone import build, load_backbone
from dinov2_fsdp.weights.reading import read_weights
from dinov2_fsdp.weights.writing import DESTINATIONS, export, stretched_there


def main() -> None:
    parser = Parser(
        prog="python -m dinov2_fsdp.weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    export_ = commands.add_parser(
        "export", allow_abbrev=False, help="write a run's backbone for this project, Hugging Face or timm"
    )
    export_.add_argument(
        "--run", required=True, help="run directory; or a checkpoint, or any weights that import reads"
    )
    export_.add_argument("--step", type=int, help="checkpoint; by default the newest")
    export_.add_argument("--which", choices=("teacher", "student"), default="teacher", help="by default the teacher")
    export_.add_argument("--to", default="official", choices=DESTINATIONS, help="by default official")
    export_.add_argument(
        "--out",
        help="official: a .safetensors or .pth file; hf: a folder; timm: a folder, or a file of tensors alone; "
        "by default in RUN/exports",
    )

    import_ = commands.add_parser(
        "import", allow_abbrev=False, help="turn official, Hugging Face or timm weights into an exported file"
    )
    import_.add_argument("--from", dest="source", required=True, help="official .pth, Hugging Face folder, timm's …")
    import_.add_argument("--out", required=True, help="the .safetensors file to write")
    import_.add_argument("--which", choices=("teacher", "student"), default="teacher", help="where there are both")
    import_.add_argument("--heads", type=int, help="attention heads, where the file does not say; by default width/64")
    import_.add_argument(
        "--interpolation",
        choices=INTERPOLATIONS,
        help="how positions are stretched to other sizes; by default as in the published models; "
        "antialias gives timm's numbers, exact those of Hugging Face's models without registers",
    )
    arguments, unknown = parser.parse_known_args()
    if unknown:  # the command's own parser knows the nearest of its options
        commands.choices[arguments.command].error(f"unrecognized arguments: {' '.join(unknown)}")

    if arguments.command == "import":
        _import(arguments)
    else:
        _export(arguments)


def _import(arguments: argparse.Namespace) -> None:
    if Path(arguments.out).suffix != ".safetensors":
        raise UserError(f"--out {arguments.out}: an import is written as one .safetensors file")
    weights = read_weights(arguments.source, which=arguments.which, heads=arguments.heads)
    print(f"read {weights}")
    loaded = build(weights, interpolation=arguments.interpolation)
    print(f"wrote {export(loaded, 'official', Path(arguments.out))}")


def _export(arguments: argparse.Namespace) -> None:
    loaded = load_backbone(arguments.run, arguments.step, arguments.which)
    if arguments.out is None and loaded.config is None:
        raise UserError(f"{arguments.run} is no run directory to put an export into; give --out")
    name = f"{arguments.which}_step_{loaded.step or 0:08d}"
    suffix = {"official": ".safetensors", "hf": "_hf", "timm": "_timm"}.get(arguments.to, "")
    # A run's or a checkpoint's source is RUN/checkpoints/step_….
    out = Path(arguments.out) if arguments.out else Path(loaded.source).parents[1] / "exports" / (name + suffix)
    print(f"wrote {export(loaded, arguments.to, out)}")
    dim, _, heads = width_depth_heads(loaded.architecture)
    bare = out.suffix == ".pth" or (arguments.to == "timm" and out.suffix == ".safetensors")
    if bare and heads * HEAD_DIM != dim:
        print(
            f"note: this file does not say that there are {heads} attention heads; readers take one for every "
            f"{HEAD_DIM} channels, or refuse it: import --heads {heads}, or export "
            + ("a folder, which says it" if arguments.to == "timm" else "a .safetensors, which says it")
        )
    theirs = stretched_there(arguments.to, loaded.architecture.registers)
    if theirs not in (None, loaded.model.interpolation):
        print(
            f"note: its positions stand for {loaded.image_size} pixels; for other sizes {arguments.to} stretches them "
            f"by the rule '{theirs}', this backbone by '{loaded.model.interpolation}', see docs/fidelity.md"
        )


if __name__ == "__main__":
    run_cli(main)
