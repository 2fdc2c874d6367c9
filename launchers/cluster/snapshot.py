"""A copy of the code beside the run, so that a queued job is not what the checkout becomes meanwhile. No torch."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_PARTS = ("dinov2_fsdp", "eval", "launchers")
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")


def copy_code(target: Path, root: Path = ROOT) -> None:
    """Copy the packages that a job runs to ``target``, and say in ``target/COMMIT`` which commit they are.

    Files that are not committed are copied as well.
    """
    target.mkdir(parents=True)
    for part in _PARTS:
        shutil.copytree(root / part, target / part, ignore=_LEFT_OUT)
    (target / "COMMIT").write_text(_commit(root) + "\n")


def _commit(root: Path) -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (" + changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
