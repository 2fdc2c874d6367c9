"""A SLURM that says what a test wants, a user without settings, processors of one maker or another, compiled code
or none, random numbers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dinov2_fsdp import native
from dinov2_fsdp.models import fused, products


@pytest.fixture
def no_site_of_this_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no settings"))


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


PARTITIONS = "'low*|up|infinite|4|64|gpu:8' 'short|up|1:00:00|2|32|(null)' 'old|down|1:00|1|8|'"


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Commands of SLURM that say what a test wants: `stub(sinfo="echo …")` returns their folder."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def write(**commands: str) -> Path:
        defaults = {
            "sinfo": f"printf '%s\\n' {PARTITIONS}",
            "squeue": "exit 1",
            "scontrol": "exit 1",
            "srun": "exit 1",
            "sbatch": f'cp "${{@: -1}}" "{folder}/script"; env >"{folder}/env"; echo "Submitted batch job 77"',
        }
        for name, body in {**defaults, **commands}.items():
            (folder / name).write_text(f"#!/bin/bash\n{body}\n")
            (folder / name).chmod(0o755)
        return folder

    return write


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor says that it is not of MKL's maker, and fast in bf16."""
    monkeypatch.setattr(products, "processor_maker", lambda: "AuthenticAMD")
    monkeypatch.setattr(products, "bf16_is_fast", lambda: True)


@pytest.fixture(params=[("AuthenticAMD", True), ("GenuineIntel", True), ("GenuineIntel", False)])
def maker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runs as on processors of MKL's maker, fast in bf16 and slow, and of another."""
    monkeypatch.setattr(products, "processor_maker", lambda: request.param[0])
    monkeypatch.setattr(products, "bf16_is_fast", lambda: request.param[1])


@pytest.fixture(params=["compiled", "torch"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test by compiled code, then without."""
    if request.param == "torch":
        with native.switched_off():
            yield request.param
    elif native.parallel_library() is None:
        pytest.skip("nothing was compiled for this processor")
    else:
        yield request.param


@pytest.fixture
def use_variant(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Use a compiled variant by its name, which need not be the best of those here: skip without it, fail if stale."""

    def use(name: str) -> None:
        there = {library.variant: library for library in native.all_that_run_here()}
        built = [path.read_bytes() for path in Path(native.__file__).parent.glob(f"_{name}.*.so")]
        assert all(native.source() in code for code in built), f"{name} was built from other code: install again"
        if native.parallel_library() is None or name not in there:
            pytest.skip(f"{name} was not compiled, or not for this processor")
        monkeypatch.setattr(native, "_load", lambda: there[name])

    return use


HOWS = {
    "fp32": fused.BY_FP32,
    "bf16 as fp32": fused.WIDENED,
    "bf16 by avx512_bf16": fused.BY_BF16,
    "bf16 by amx": fused.BY_BF16,
}


@pytest.fixture(params=HOWS)
def how(request: pytest.FixtureRequest, use_variant: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> int:
    """How branches are multiplied, whatever this processor would rather do."""
    _, by, variant = request.param.partition(" by ")
    if by:
        use_variant(variant)
    how = HOWS[request.param]
    monkeypatch.setattr(products, "bf16_is_fast", lambda: how != fused.WIDENED)
    monkeypatch.setattr(products, "processor_maker", lambda: "AuthenticAMD")
    return how


@pytest.fixture
def random() -> Callable[..., Tensor]:
    """Numbers of a normal distribution, the same ones in every run: takes a shape."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)
