"""`make demo` in small: the same script, with a model and a data set of seconds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dinov2_fsdp.errors import UserError
from launchers.demo import clear

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "data.train=scenes:n=64", "data.workers=0", "model.dim=24", "model.depth=1", "model.heads=3", "train.batch=8",
    "train.microbatch=8", "train.duration=3it", "optim.warmup=1it", "checkpoint.every=0it", "eval.every=0it",
    "log.every=1it", "eval.max_train=60", "eval.max_test=30", "eval.k=[1,20]", "parallel.device=cpu",
    "parallel.threads=1",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.e2e
def test_the_demo_trains_evaluates_and_says_where_its_pictures_are(tmp_path: Path) -> None:
    command = [sys.executable, "launchers/demo.py", "--output-dir", str(tmp_path / "demo"), *SMALL]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    for name in ("knn_pixels", "knn_untrained", "knn_trained"):
        assert 0 <= summary[name] <= 100
    assert "k-NN accuracy (k = 20) on scenes never seen" in result.stdout
    for picture in ("curves.png", "pca.png"):
        path = tmp_path / "demo" / "pictures" / picture
        assert picture in result.stdout
        assert Image.open(path).size > (200, 100)


def test_a_folder_that_holds_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is no run directory, so it is left alone"):
        clear(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_an_unfinished_demo_is_kept_and_a_finished_one_makes_room(tmp_path: Path) -> None:
    run = tmp_path / "demo"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").touch()
    clear(run)
    assert run.exists()
    (run / "summary.json").touch()
    clear(run)
    assert not run.exists()


_TRAINER = """
import signal, sys, time
caught = []
signal.signal(signal.SIGINT, lambda *_: caught.append(1))
print("started", flush=True)
while not caught:
    time.sleep(0.02)
time.sleep(1)  # it saves
print("saved after", len(caught), flush=True)
sys.exit(75)
"""


def test_ctrl_c_lets_the_demos_trainer_save_and_reaches_it_once() -> None:
    code = f"import sys; from launchers.demo import train; sys.exit(train([sys.executable, '-c', {_TRAINER!r}]))"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as demo:  # fmt: skip
        assert demo.stdout is not None
        assert demo.stdout.readline() == "started\n"
        os.killpg(demo.pid, signal.SIGINT)  # as a terminal does, to all that are in its foreground
        rest, errors = demo.communicate(timeout=60)
    assert (demo.returncode, rest, errors) == (75, "saved after 1\n", "")
