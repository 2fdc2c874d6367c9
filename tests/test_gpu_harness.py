"""What is to run on a GPU one day, as far as a CPU can tell: it finds what is wrong, and loses nothing on its way."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import attention
import gpu
import recipes
from attention import WAYS, Case, Way
from gpu import Part, Result

from dinov2_fsdp.config import load
from dinov2_fsdp.errors import RunFailed, UserError
from dinov2_fsdp.models.attention import BACKENDS, attend
from dinov2_fsdp.models.layout import Layout
from dinov2_fsdp.models.stochastic_depth import draw_plan
from dinov2_fsdp.rng import generator

CPU = torch.device("cpu")
MATH, SDPA = WAYS[0], WAYS[1]


def case(precision: str = "fp32", trained: bool = True) -> Case:
    return Case("student", Layout(((3, 17), (4, 6))), heads=2, head_dim=16, precision=precision, trained=trained)


# -- attention: what is counted ---------------------------------------------------------------------------------------


def test_the_operations_of_attention_are_those_counted_by_hand() -> None:
    # Two sequences of 3 tokens and one of 5: 9 + 9 + 25 pairs; each of 2 heads multiplies and adds 4 numbers for a
    # score, and as many for what the score weighs.
    assert Case("student", Layout(((2, 3), (1, 5))), 2, 4, "fp32", True).flops == 43 * 2 * (4 * 2 + 4 * 2)


def test_the_operations_of_attention_are_those_that_torch_counts() -> None:
    one = Case("student", Layout(((3, 17),)), 2, 16, "fp32", True)
    query, key, value = (torch.randn(3 * 2, 17, 16, requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False) as forward:
        out = (query @ key.transpose(1, 2)).softmax(-1) @ value
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert forward.get_total_flops() == one.flops
    assert backward.get_total_flops() == attention.BACKWARD * one.flops


def test_the_student_keeps_the_sequences_that_stochastic_depth_keeps() -> None:
    config = load("configs/vitl16_in1k.yaml", [])
    student, teacher = attention.cases(config)
    images = config.train.microbatch
    whole = Layout(((2 * images, 197), (8 * images, 37)))
    plan = draw_plan(whole, 1, config.model.drop_path, generator(0, "depth"))
    assert plan is not None
    assert student.layout == plan.layout
    assert teacher.layout == Layout(((2 * images, 197),))
    assert (student.heads, student.head_dim, student.trained, teacher.trained) == (16, 64, True, False)


def test_every_backend_of_the_model_is_measured() -> None:
    assert {way.backend for way in WAYS} == set(BACKENDS)


# -- attention: what is found -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [True, False], ids=["student", "teacher"])
@pytest.mark.parametrize("way", [MATH, SDPA], ids=lambda way: way.backend)
@pytest.mark.parametrize(("precision", "most"), [("fp32", 1e-5), ("bf16", 0.03)])
def test_a_backend_of_a_cpu_is_right(precision: str, most: float, way: Way, trained: bool) -> None:
    row = attention.measure(way, case(precision, trained), CPU, 0)
    assert (row["right"], row["seen"], row["reason"]) == (True, "nothing", None)
    assert 0 < row["error"] < most
    assert row["gradient_error"] is None if not trained else 0 < row["gradient_error"] < 2 * most


def together(qkv: Tensor, layout: Layout, backend: str) -> Tensor:
    """Attention over all sequences as if they were one."""
    return attend(qkv, Layout(((1, layout.total_tokens),)), backend)


def over_a_boundary(qkv: Tensor, layout: Layout, backend: str) -> Tensor:
    """The first sequence of the second group is mixed with the last one of the first."""
    out = attend(qkv, layout, backend)
    edge = layout.spans()[0][1]
    return torch.cat([out[:edge], (out[edge] + 1e-3 * out[edge - 1])[None], out[edge + 1 :]])


class LeakingGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor) -> Tensor:
        return qkv.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad + 1e-6 * grad.sum()


WRONG: list[tuple[Callable[..., Tensor], str]] = [
    (together, "another sequence"),
    (over_a_boundary, "another sequence"),
    (lambda qkv, *others: attend(LeakingGradient.apply(qkv), *others), "another's gradient"),
    (lambda *given: 1.01 * attend(*given), "nothing"),
    (lambda *given: 0 * attend(*given), "not even itself"),
    (lambda *given: attend(*given) + 1e-6 * torch.rand(1), "another result of the same"),
]


@pytest.mark.parametrize(("wrong", "seen"), WRONG)
def test_a_wrong_backend_is_caught(wrong: Any, seen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "attend", wrong)
    row = attention.measure(MATH, case(), CPU, 0)
    assert (row["right"], row["seen"]) == (False, seen)
    assert "| **math: WRONG** |" in attention.table([row])


def test_what_cannot_run_is_a_row_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [attention.measure(way, case(), CPU, 0) for way in WAYS]
    assert [row["backend"] for row in rows if row["reason"] is None] == ["math", "sdpa, as torch chooses"]
    assert all(row["right"] for row in rows)

    def fails(*_: object) -> Tensor:
        raise RuntimeError("no kernel | for this")

    monkeypatch.setattr(attention, "attend", fails)
    rows.append(attention.measure(MATH, case(), CPU, 0))
    assert (rows[-1]["reason"], rows[-1]["right"]) == ("RuntimeError: no kernel | for this", False)
    monkeypatch.setattr(attention, "unavailable", lambda *_: None)
    flash = next(way for way in WAYS if way.name == "sdpa, flash")
    assert attention.measure(flash, case(), CPU, 0)["right"], "torch may refuse a kernel"
    assert len({line.count("|") for line in attention.table(rows).splitlines()}) == 1


def test_both_passes_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "ROW", 1e-4)
    row = attention.measure(SDPA, case(), CPU, 2)
    for name, flops in (("forward", case().flops), ("backward", 2 * case().flops)):
        assert 0 < row[f"{name}_ms"] < 1000
        assert row[f"{name}_tflops"] == pytest.approx(flops / row[f"{name}_ms"] / 1e9)
    assert "backward_ms" not in attention.measure(SDPA, case(trained=False), CPU, 1)


def test_overrides_may_follow_an_option_with_several_values() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", nargs="+")
    parser.add_argument("overrides", nargs="*")
    found = attention.parse(parser, ["--config", "a.yaml", "b.yaml", "train.batch=2", "seed=1"])
    assert (found.config, found.overrides) == (["a.yaml", "b.yaml"], ["train.batch=2", "seed=1"])


# -- recipes ----------------------------------------------------------------------------------------------------------

OWN = {"microbatch": "12", "compile": "off", "checkpointing": "none", "attention": "auto", "colours": "worker"}
ASKED = {"microbatch": ["12", "24"], "compile": ["off", "on"]}


def changed(variation: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in variation.items() if OWN[name] != value}


def test_one_thing_at_a_time_differs_from_a_recipes_own_values() -> None:
    found = recipes.variations(OWN, ASKED, every=False)
    assert [changed(one) for one in found] == [{}, {"microbatch": "24"}, {"compile": "on"}]


def test_all_combinations_run_if_asked_for() -> None:
    found = [changed(one) for one in recipes.variations(OWN, ASKED, every=True)]
    assert found == [{}, {"compile": "on"}, {"microbatch": "24"}, {"microbatch": "24", "compile": "on"}]
    assert recipes.variations(OWN, {}, every=True) == [OWN]


def test_a_variation_is_what_the_config_becomes() -> None:
    assert recipes.own_values(load("configs/vitg14.yaml", [])) == OWN
    wanted = {"microbatch": "8", "compile": "on", "checkpointing": "full", "attention": "sdpa", "colours": "device"}
    config = load("configs/vitg14.yaml", recipes.overrides_of(wanted))
    assert recipes.own_values(config) == wanted
    assert config.train.batch == 8
    assert list(recipes.in_turn([[("a", OWN), ("a", wanted)], [("b", OWN)]])) == [("a", OWN), ("b", OWN), ("a", wanted)]


def made_up(rate: float, fraction: float | None) -> dict[str, Any]:
    first = {"img_per_s": rate / 4, "memory": 1.0, "data_wait": 0.5}
    second = {"img_per_s": rate, "memory": 60.0, "data_wait": 0.02, "time/student": 0.1}
    environment = {"attention": "varlen", "devices": ["a GPU"], "cpu": "a CPU", "torch": "2.14.1"}
    run = {"lines": [first, second], "environment": environment}
    return {**recipes.figures(run, 10, 2e12, 20), "fraction": fraction}


def test_a_runs_figures_are_those_of_its_second_half() -> None:
    row = made_up(200.0, None)
    # Ten steps of ten images in half a second each half; the first half was four times as slow.
    assert (row["img_per_s"], row["tflops"], row["memory_gib"]) == (200.0, 400.0, 60.0)
    assert row["warm_up_s"] == pytest.approx(4 * 0.5 - 0.5)
    assert (row["data_wait"], row["phases_s"]["student"], row["device"]) == (0.02, 0.1, "a GPU")


def test_the_table_says_what_was_reached_and_what_was_not() -> None:
    def measure(config: str, variation: dict[str, str]) -> dict[str, Any]:
        if variation["microbatch"] == "24":
            raise RunFailed("out of memory | really\nmore")
        return made_up(
            {"vitl16_in1k": 341.0, "vitg14": 74.0}.get(config, 5000.0), 0.51 if config[:4] != "vitg" else 0.4
        )

    (late,) = recipes.measure_all([("vitg14", OWN)], measure, 0)
    assert late["reason"] == "not run: the 0 s were over"
    runs = [("vitl16_in1k", OWN), ("vitg14", OWN), ("vitg14", {**OWN, "microbatch": "24"}), ("vits14", OWN)]
    rows = list(recipes.measure_all(runs, measure, 1000))
    lines = [*recipes.head().splitlines(), *map(recipes.line_of, rows)]
    assert len({line.count("|") for line in lines}) == 1
    assert "340 img/s: yes; 50 % of the limit: yes" in lines[2]
    assert "| auto (varlen) |" in lines[2]
    assert "75 img/s: no; 50 % of the limit: no" in lines[3]
    assert "| out of memory / really |" in lines[4]
    assert "img/s: " not in lines[4] + lines[5], "no goal"
    assert "5,000.0" in lines[5], "the others go on"
    assert "50 % of the limit: unknown" in recipes.goals("vitg14", made_up(80.0, None))


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        (
            "Traceback\nerror: rank 0 failed: no memory; the traceback is in logs/x\nwarning\n",
            "rank 0 failed: no memory",
        ),
        ("one\nValueError: two\n\n", "ValueError: two"),
        ("", "it said nothing"),
    ],
)
def test_the_reason_of_a_failure_is_its_last_error(errors: str, expected: str) -> None:
    assert recipes.cause(errors, 3) == f"{expected} (code 3)"


SMALL = [*gpu.SMALL, "data.train=scenes:n=64", "data.workers=0", "parallel.device=cpu"]


def test_a_run_that_fails_says_why() -> None:
    with pytest.raises(RunFailed, match=r"^parallel.attention=varlen runs on CUDA only.*\(code 2\)$"):
        recipes.trained("configs/debug.yaml", 2, [*SMALL, "parallel.attention=varlen"], 60)


def test_a_run_that_takes_too_long_is_stopped() -> None:
    before = recipes._children(os.getpid())
    with pytest.raises(RunFailed, match=r"^had not done 2 steps in 0 s$"):
        recipes.trained("configs/debug.yaml", 2, SMALL, 0.3)
    assert recipes._children(os.getpid()) == before


# -- everything in one call -------------------------------------------------------------------------------------------


def python(name: str, text: str, **more: Any) -> Part:
    return Part(name, f"what {name} is", ("-c", text), **more)


def test_a_part_that_fails_or_hangs_is_reported_and_the_next_one_runs(tmp_path: Path) -> None:
    shows = f"print(open({str(tmp_path / 'summary.md')!r}).read())"
    chosen = [
        python("failing", "import sys; print('so far'); sys.exit('it broke')", check=True),
        python("hanging", "import time; print('begun', flush=True); time.sleep(60)", limit=0.5),
        python("absent", "", skipped="needs CUDA"),
        python("showing", shows),
        python("passing", "print('fine')", check=True),
    ]
    results = gpu.run_all(chosen, tmp_path, 60)
    verdicts = {name: (result.verdict, result.failed) for name, result in results.items()}
    assert verdicts == {
        "failing": ("FAILED (code 1)", True),
        "hanging": ("stopped after 0 s", True),
        "absent": ("not run: needs CUDA", False),
        "showing": ("done", False),
        "passing": ("passed", False),
    }
    # As the fourth part has read it: after the third, before the fifth.
    before = (tmp_path / "showing.txt").read_text()
    assert all(text in before for text in ("**FAILED (code 1)**", "so far", "it broke", "begun", "needs CUDA"))
    assert before.count("not reached") == 2
    after = (tmp_path / "summary.md").read_text()
    assert "fine" in after
    assert "| not reached |" not in after.partition("## ")[0]


@pytest.mark.slow
def test_nothing_that_a_stopped_part_started_goes_on(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    child = f"import time, pathlib; time.sleep(1.5); pathlib.Path({str(mark)!r}).touch()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert gpu.run_part(python("parent", parent, limit=0.7), tmp_path, 60).failed
    time.sleep(1.5)
    assert not mark.exists()


def test_no_part_starts_without_time_for_it(tmp_path: Path) -> None:
    assert gpu.run_part(python("late", ""), tmp_path, 9).verdict == "not run: 9 s were left; --parts late"
    assert gpu.run_part(python("long", "", least=90), tmp_path, 60).verdict.startswith("not run: 60 s were left")


@pytest.mark.parametrize(("limit", "told"), [(100.0, "50"), (300.0, "210")])
def test_a_part_is_told_when_to_begin_nothing_new(limit: float, told: str, tmp_path: Path) -> None:
    gpu.run_part(Part("told", "", ("-c", "import sys; print(sys.argv[1])", "{left}"), limit), tmp_path, 500)
    assert (tmp_path / "told.txt").read_text().strip() == told


@pytest.mark.parametrize(("check", "code"), [(True, 1), (False, 0)])
def test_the_exit_code_is_that_of_the_checks(check: bool, code: int, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(gpu, "parts", lambda *_: [python("some", "raise SystemExit(3)", check=check)])
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(tmp_path), "--device", "cpu"])
    assert gpu.main() == code
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--parts", "sme"])
    with pytest.raises(UserError, match="sme: there are no such parts; valid: some"):
        gpu.main()


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_part_names_scripts_and_configs_that_there_are(device: str, small: bool, tmp_path: Path) -> None:
    found = gpu.parts(device, small, tmp_path)
    assert len({part.name for part in found}) == len(found)
    assert {part.name for part in found} >= set(gpu.CHECKS)
    assert [part.name for part in found][-4:] == ["profile", "attention", "recipes", "step"], "after what is right"
    assert [part.name for part in found if part.skipped == "needs CUDA"] == (["waits"] if device == "cpu" else [])
    for part in found:
        assert Path(part.command[0]).is_file()
        overrides = [word for word in part.command if re.match(r"[a-z_.]+=", word)]
        assert f"parallel.device={device}" in overrides
        for path in [word for word in part.command if word.endswith(".yaml")] or ["configs/debug.yaml"]:
            load(path, overrides)


# -- its checks -------------------------------------------------------------------------------------------------------


def lines(*losses: float) -> list[dict[str, float]]:
    return [{"step": step, "loss": loss, "grad_norm/all": 2 * loss} for step, loss in enumerate(losses, 1)]


@pytest.mark.parametrize(("loss", "agrees"), [(3.0, True), (3.0001, True), (3.01, False), (float("nan"), False)])
def test_another_loss_than_a_cpus_is_found(loss: float, agrees: bool, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(gpu, "_train", lambda run, *_: lines(2.0, 3.0 if run.name == "cpu" else loss))
    assert gpu.agreement([], tmp_path) == agrees


@pytest.mark.parametrize("name", ["determinism", "resumption"])
@pytest.mark.parametrize("other", [1.0, 1.0000001, float("nan")])
def test_runs_that_differ_in_one_bit_are_found(name: str, other: float, tmp_path: Path, monkeypatch: Any) -> None:
    saved = iter([{"weight": torch.ones(3)}, {"weight": torch.tensor([1.0, other, 1.0])}])
    monkeypatch.setattr(gpu, "_saved", lambda _: next(saved))
    monkeypatch.setattr(gpu, "_train", lambda run, *_: checkpoints(run))
    assert gpu.CHECKS[name]([], tmp_path) == (other == 1.0)


def checkpoints(run: Path) -> None:
    """A run of six steps as far as the check of its resumption looks at it."""
    for step in (3, 6):
        folder = run / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)


def test_colours_of_the_device_are_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = [*gpu.SMALL, "parallel.device=cpu"]
    assert gpu.colours(settings, tmp_path)
    plain = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: plain(tensor) ^ 1)
    assert not gpu.colours(settings, tmp_path)


@pytest.mark.slow
def test_the_alarm_is_on_while_the_loop_runs_and_off_where_it_must_wait(monkeypatch: Any, tmp_path: Path) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    assert gpu.waits([*gpu.SMALL, "parallel.device=cpu"], tmp_path)
    assert modes == ["default", "error", "default", "default"]


@pytest.mark.slow
def test_the_harness_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    chosen = gpu.parts("cpu", True, tmp_path)
    results = gpu.run_all(chosen, tmp_path, 600)
    verdicts = {part.name: "passed" if part.check else "done" for part in chosen if not part.skipped}
    assert {name: result.verdict for name, result in results.items() if name in verdicts} == verdicts
    assert results["waits"] == Result("not run: needs CUDA")
    text = (tmp_path / "summary.md").read_text()
    for printed in (*(f"## {name}" for name in verdicts), "resumed from step 3: True", "(profile.png)", "| sdpa |"):
        assert printed in text
    assert (tmp_path / "recipes.txt").read_text().count("| debug |") == 3
