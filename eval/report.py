"""A run as one HTML page that needs nothing else: evaluations, curves, pictures, config, environment.

python eval/report.py --run runs/NAME        # writes runs/NAME/report.html from what the run directory holds

Pictures are those of ``eval/pictures.py`` as they lie in ``pictures/``; only the curves are drawn anew.
"""

from __future__ import annotations

import base64
import json
import math
import sys
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dinov2_fsdp.errors import Parser, UserError, run_cli
from eval.curves import draw_curves
from eval.results import data_of, measured_on, read_leaderboard

FILE = "report.html"
CAPTIONS = {
    "curves": "Training curves.",
    "pca": "Patch features, their first three principal components as red, green and blue, shared by all images of a "
    "row.",
    "pca_foreground": "The same for the patches on one side of the first component only.",
    "attention": "How much the last block's class token attends to each patch, by head.",
    "neighbours": "Test images (left) and the most similar training images by their class tokens.",
    "crops": "What the student is shown in training: two global crops with hidden patches in grey, and local crops.",
    "examples": "Image, truth and prediction.",
}
_UNITS = {"rmse": " m", "abs_rel": "", "delta_1": "", "delta_2": "", "delta_3": "", "log10": "", "silog": ""}
_STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --faint: #616e7c; --line: #dde3ea; --card: #f6f8fa; --back: #ffffff;
  --accent: #2f6690; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --faint: #9aa5b1; --line: #3a4551; --card: #222b35;
  --back: #171d24; --accent: #7fb3d5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 72rem; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { margin: 0; font-size: 1.8rem; } h2 { margin: 3rem 0 .8rem; font-size: 1.2rem; }
.faint, figcaption, caption { color: var(--faint); font-size: .88rem; }
nav { margin-top: .6rem; } nav a { margin-right: 1.1rem; color: var(--accent); text-decoration: none; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(11.5rem, 1fr)); gap: .8rem;
  margin-top: 1.4rem; }
.tile { padding: .8rem 1rem; border-radius: .5rem; background: var(--card); overflow-wrap: anywhere; }
.tile b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem .35rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--faint); font-weight: 600; font-size: .82rem; }
.number { text-align: right; white-space: nowrap; } .word { overflow-wrap: anywhere; }
figure { margin: 1.2rem 0; } figure img { max-width: 100%; height: auto; border-radius: .4rem; background: #fff; }
details { margin: .5rem 0; padding: .5rem .9rem; border: 1px solid var(--line); border-radius: .5rem; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; margin: .6rem 0 0; font: 12.5px/1.5 ui-monospace, Menlo, "DejaVu Sans Mono", monospace; }
"""


def write_report(run: Path) -> Path:
    """Write ``run/report.html`` and return the file.

    Raises:
        UserError: ``run`` is no run directory.
    """
    if not (run / "config.yaml").is_file():
        raise UserError(f"--run {run} is no run directory (it holds no config.yaml); give one like runs/demo")
    if (run / "metrics.jsonl").is_file():
        try:
            draw_curves(run)
        except UserError as error:  # a run that has not logged a step yet has no curves
            print(error, file=sys.stderr)
    found = [file for file in sorted((run / "eval").glob("step_*/*/results.json")) if _read(file)]
    lines = read_leaderboard(run)
    sections = [
        ("Evaluations", _evaluations(run, lines, found)),
        ("Curves", _picture(run / "pictures" / "curves.png")),
        ("Pictures", _pictures(run, found)),
        ("Config", _config(run / "config.yaml")),
        ("Environment", _environment(run / "environment.json")),
    ]
    shown = [(title, body) for title, body in sections if body]
    links = "".join(f'<a href="#{title.lower()}">{title}</a>' for title, _ in shown)
    body = "".join(f'<section id="{title.lower()}"><h2>{title}</h2>{body}</section>\n' for title, body in shown)
    written = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(run.resolve().name)}</title><style>{_STYLE}</style></head><body>\n"
        f'<header><h1>{escape(run.resolve().name)}</h1><div class="faint">{escape(_headline(run))} · written {written}'
        f"</div><nav>{links}</nav>{_tiles(lines)}</header>\n{body}</body></html>\n"
    )
    file = run / FILE
    draft = run / f".{FILE}"
    draft.write_text(text, encoding="utf-8")
    draft.replace(file)
    return file


def _headline(run: Path) -> str:
    steps = sorted(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_" + "[0-9]" * 8))
    return f"newest checkpoint: step {steps[-1]:,}" if steps else "no checkpoint"


def _tiles(lines: list[dict[str, str]]) -> str:
    """Return the newest step's headline number of every task, beside that of the baselines on the same data."""
    trained = [line for line in lines if line["backbone"] == "teacher"]
    if not trained:
        return ""
    newest = max(int(line["step"]) for line in trained)
    tiles = []
    for line in trained:
        if int(line["step"]) != newest:
            continue
        same = ("task", "metric", "train", "test")
        others = [
            f"{other['backbone']} {_number(other['value'], other['metric'])}"
            for other in lines
            if other["backbone"] != "teacher" and all(other[key] == line[key] for key in same)
        ]
        tiles.append(
            f'<div class="tile"><span class="faint">{escape(line["task"])} · {escape(line["metric"])}</span>'
            f"<b>{_number(line['value'], line['metric'])}</b>"
            f'<span class="faint">{escape(", ".join([*others, measured_on(line)]))}</span></div>'
        )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _evaluations(run: Path, lines: list[dict[str, str]], found: list[Path]) -> str:
    if not lines and not found:
        return '<p class="faint">None yet: python launchers/eval.py --run DIR --tasks knn</p>'
    rows = "".join(
        f'<tr><td class="number">{escape(line["step"])}</td><td>{escape(line["task"])}</td>'
        f"<td>{escape(line['backbone'])}</td><td>{escape(line['metric'])}</td>"
        f'<td class="number">{_number(line["value"], line["metric"])}</td><td class="word">{escape(line["train"])}</td>'
        f'<td class="word">{escape(line["test"])}</td>'
        f'<td class="number">{escape(line["date"][:16].replace("T", " "))}</td></tr>'
        for line in sorted(lines, key=lambda line: (line["task"], line["test"], int(line["step"] or 0)))
    )
    names = ("step", "task", "backbone", "metric", "value", "train", "test", "date")
    head = "".join(f"<th{' class=number' if name in ('step', 'value', 'date') else ''}>{name}</th>" for name in names)
    table = (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>' if rows else ""
    )
    return table + "".join(_details(run, file) for file in found)


def _details(run: Path, file: Path) -> str:
    results = _read(file)
    metrics = "".join(
        f'<tr><td>{escape(name)}</td><td class="number">{_number(value, name)}</td></tr>'
        for name, value in results.get("metrics", {}).items()
    )
    rest = {key: value for key, value in results.items() if key not in ("metrics", "heads", "path")}
    return (
        f"<details><summary>{escape(_title(results))}</summary><table>{metrics}</table>"
        f"<pre>{escape(json.dumps(rest, indent=2, ensure_ascii=False))}</pre>"
        f'<div class="faint">{escape(str(file.relative_to(run)))}</div></details>'
    )


def _title(results: dict[str, Any]) -> str:
    title = f"{results.get('task')} of {results.get('backbone')}, step {results.get('step')}"
    return f"{title}, {measured_on(data_of(results))}" if "data" in results else title


def _pictures(run: Path, found: list[Path]) -> str:
    files = [run / "pictures" / f"{name}.png" for name in CAPTIONS if name != "curves"]
    more = [(file.with_name("examples.png"), _read(file)) for file in found]
    parts = [_picture(file) for file in files]
    parts += [_picture(file, f"{_title(results)}: ") for file, results in more]
    return "".join(parts)


def _picture(file: Path, before: str = "") -> str:
    if not file.is_file():
        return ""
    caption = before + CAPTIONS.get(file.stem, file.stem)
    data = base64.b64encode(file.read_bytes()).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _config(file: Path) -> str:
    return f"<details><summary>{file.name}</summary><pre>{escape(file.read_text())}</pre></details>"


def _environment(file: Path) -> str:
    values = _read(file)
    rows = "".join(f"<tr><th>{escape(key)}</th><td>{escape(_text(value))}</td></tr>" for key, value in values.items())
    return f"<table>{rows}</table>" if rows else ""


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {entry}" for key, entry in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _number(value: Any, metric: str) -> str:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return "–"
    if not math.isfinite(number):
        return "–"
    return f"{number:.4f}{_UNITS[metric]}" if metric in _UNITS else f"{number:.2f} %"


def _read(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file, an empty one where there is none or it cannot be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _parser() -> Parser:
    parser = Parser(
        prog="eval/report.py", description="Write a run's evaluations, curves, pictures and config as one HTML page."
    )
    parser.add_argument(
        "--run", metavar="DIR", required=True, type=Path, help="a run directory; writes DIR/report.html"
    )
    return parser


def main() -> int:
    """Run the command line."""
    print(f"written to {write_report(_parser().parse_args().run)}")
    return 0


if __name__ == "__main__":
    run_cli(main)
