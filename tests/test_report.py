from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinov2_fsdp.errors import UserError
from eval.report import write_report
from eval.results import record

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with what a finished run holds, and names that HTML would trip over."""
    folder = tmp_path / "run <one>"
    (folder / "checkpoints" / "step_00000200").mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 0\ndata:\n  train: 'folder:<b>&amp;'\n")
    (folder / "environment.json").write_text(json.dumps({"torch": "2.99", "packages": {"numpy": "9.9"}, "devices": []}))
    lines = [{"step": step, "loss": 5.0 - step / 100, "img_per_s": 100.0} for step in range(1, 200)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "pictures").mkdir()
    Image.fromarray(np.full((60, 90, 3), (255, 0, 200), np.uint8)).save(folder / "pictures" / "pca.png")
    for backbone, step, value in (("teacher", 100, 40.0), ("teacher", 200, 51.5), ("untrained", 0, 12.25)):
        results: dict[str, Any] = {
            "task": "knn", "backbone": backbone, "step": step, "metrics": {"knn_20": value, "knn_1": float("nan")},
            "data": {"train": "folder:<b>", "test": "folder:test"},
        }  # fmt: skip
        record(results, "knn" if backbone == "teacher" else "knn_untrained", "knn_20", folder)
    return folder


class Page(HTMLParser):
    """What a page shows: its text, the sources of its pictures, and tags that are never closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.sources, self.links, self.open = "", [], [], []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        values = dict(attrs)
        self.sources += [values[name] for name in ("src", "href") if name in values]
        if tag not in ("meta", "img", "br", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_report_holds_curves_evaluations_pictures_config_and_environment(run: Path) -> None:
    page = Page(write_report(run).read_text())
    assert page.open == []
    for expected in ("run <one>", "step 200", "51.50 %", "untrained 12.25 %", "folder:<b>&amp;", "2.99", "numpy 9.9"):
        assert expected in page.text, expected
    pictures = [source for source in page.sources if source.startswith("data:image/png;base64,")]
    assert len(pictures) == 2
    assert "NaN" not in page.text


def test_a_report_needs_nothing_from_elsewhere(run: Path) -> None:
    text = write_report(run).read_text()
    assert all(source.startswith(("data:", "#")) for source in Page(text).sources)
    assert not re.search(r"@import|url\(|<script|<link|<iframe", text)


def test_the_tile_is_that_of_the_newest_step(run: Path) -> None:
    tiles = re.findall(r'<div class="tile">.*?</div>', write_report(run).read_text())
    assert len(tiles) == 1
    assert "51.50 %" in tiles[0]


def test_results_on_several_data_sets_are_told_apart(run: Path) -> None:
    results: dict[str, Any] = {"task": "knn", "backbone": "teacher", "step": 200, "metrics": {"knn_20": 9.5}}
    for limit in (0, 50):
        data = {"train": "folder:<b>", "test": "folder:other"}
        record({**results, "data": data, "settings": {"max_test": limit}}, "knn", "knn_20", run)
    titles = re.findall(r"<summary>(knn of teacher, step 200.*?)</summary>", write_report(run).read_text())
    assert sorted(titles) == [
        f"knn of teacher, step 200, on {test}" for test in ("folder:other", "folder:other (50 images)", "folder:test")
    ]


def test_part_of_a_set_is_told_apart_in_tiles_titles_and_captions(run: Path) -> None:
    data = {"train": "folder:<b>", "test": "folder:test"}
    for backbone, step in (("teacher", 200), ("untrained", 0)):
        results: dict[str, Any] = {"task": "knn", "backbone": backbone, "step": step, "metrics": {"knn_20": 9.5}}
        for limits in ({"max_test": 50}, {"max_train": 60}):
            file = record({**results, "data": data, "settings": limits}, "knn", "knn_20", run)
            assert file is not None
            Image.new("RGB", (8, 8)).save(file.with_name("examples.png"))
    text = write_report(run).read_text().replace("&lt;b&gt;", "<b>")
    parts = ["on folder:test (50 images)", "on folder:test, from folder:<b> (60 images)"]
    tiles = re.findall(r'<div class="tile">.*?<span class="faint">([^·]*?)</span></div>', text)
    assert sorted(tiles) == [
        "untrained 12.25 %, on folder:test",
        *(f"untrained 9.50 %, {part}" for part in sorted(parts)),
    ]
    for part in parts:
        assert f"<summary>knn of teacher, step 200, {part}</summary>" in text
        assert f"<figcaption>knn of teacher, step 200, {part}: " in text


def test_a_run_that_has_only_begun_has_a_report_too(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    (tmp_path / "metrics.jsonl").write_text("")
    page = Page(write_report(tmp_path).read_text())
    assert "None yet" in page.text
    assert "Curves" not in page.text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run directory"):
        write_report(tmp_path)


@pytest.mark.slow
def test_a_browser_shows_the_report(run: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser on this machine: none of {', '.join(BROWSERS)} is on PATH")
    file, png = write_report(run), run / "screenshot.png"
    command = [
        browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1200,2400",
        f"--user-data-dir={run / 'browser'}", f"--screenshot={png}", file.resolve().as_uri(),
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=180, capture_output=True)
    with Image.open(png) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape == (2400, 1200, 3)
    pink = np.abs(pixels - [255, 0, 200]).sum(axis=2) < 30
    assert pink.sum() == pytest.approx(60 * 90, rel=0.1), "the picture is not shown at its size"
    blue = np.abs(pixels - [0x2F, 0x66, 0x90]).sum(axis=2) < 60
    assert blue.sum() > 300, "no curve is drawn"
