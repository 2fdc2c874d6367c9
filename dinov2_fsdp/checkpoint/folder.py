"""What lies in a run's ``checkpoints/``: names, manifests, what is whole and what is damaged, and whose it is."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import socket
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from dinov2_fsdp.errors import RunFailed, UserError

logger = logging.getLogger(__name__)

FORMAT = 2
MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.json"
LIFE_FILE = "life.json"
DAMAGED = ".damaged"
_NAME = re.compile(r"step_(\d{8,})")
_CHUNK = 1 << 22


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint on disk that was once complete. What has become of its files since, :func:`damage` says."""

    path: Path
    step: int

    def state(self) -> dict[str, Any]:
        """Return the numbers and text saved beside the tensors."""
        return json.loads((self.path / STATE_FILE).read_text())


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies once it is complete."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def list_checkpoints(run_dir: Path) -> list[SavedCheckpoint]:
    """Return the checkpoints of a run that were written to their end, oldest first."""
    folder = run_dir / "checkpoints"
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append(SavedCheckpoint(path, int(match[1])))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def find_checkpoint(run_dir: Path, step: int | None = None) -> SavedCheckpoint:
    """Return a run's newest whole checkpoint, or the one of ``step``; every file is read and compared with its hash.

    Raises:
        UserError: there is none, or the one of ``step`` is damaged.
    """
    found = list_checkpoints(run_dir)
    damaged = []
    for checkpoint in reversed(found):
        if step is not None and checkpoint.step != step:
            continue
        problems = damage(checkpoint)
        if not problems:
            return checkpoint
        damaged.append(f"{checkpoint.path} is damaged: {problems[0]}")
        if step is None:
            logger.warning(damaged[-1])
    if damaged:
        raise UserError("\n".join(damaged[:5]))
    have = ", ".join(str(checkpoint.step) for checkpoint in found) or "none"
    wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
    raise UserError(f"{wanted} in {run_dir / 'checkpoints'}; steps there: {have}")


# ---------------------------------------------------------------------------------------------------------------------
# Manifests


def digest(path: Path) -> tuple[int, str]:
    """Return a file's size in bytes and its SHA-256."""
    sha, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            sha.update(chunk)
            size += len(chunk)
    return size, sha.hexdigest()


def write_manifest(folder: Path, step: int, life: int, files: dict[str, tuple[int, str]]) -> None:
    """Write the list of a checkpoint's files, which makes it complete."""
    listed = {name: {"bytes": size, "sha256": sha} for name, (size, sha) in sorted(files.items())}
    write_durably(
        folder / MANIFEST_FILE,
        json.dumps({"format": FORMAT, "step": step, "life": life, "files": listed}, indent=1).encode(),
    )


def read_manifest(checkpoint: SavedCheckpoint) -> dict[str, tuple[int, str]]:
    """Return size in bytes and SHA-256 of every file that a checkpoint was saved with.

    Raises:
        ValueError: there is no manifest, or it is not that of this step.
        UserError: another version of this package wrote it.
    """
    try:
        manifest = json.loads((checkpoint.path / MANIFEST_FILE).read_bytes())
        found = manifest["format"], manifest["step"]
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except OSError as error:
        raise ValueError(f"{MANIFEST_FILE} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{MANIFEST_FILE} is not readable") from None
    if found[0] != FORMAT:
        raise UserError(f"{checkpoint.path} has checkpoint format {found[0]}; this version reads {FORMAT}")
    if found[1] != checkpoint.step:
        raise ValueError(f"{MANIFEST_FILE} is that of step {found[1]}")
    if STATE_FILE not in files:
        raise ValueError(f"{MANIFEST_FILE} lists no {STATE_FILE}")
    return files


def damage(checkpoint: SavedCheckpoint, part: int = 0, parts: int = 1) -> list[str]:
    """Return what is wrong with a checkpoint's files, each problem with the file's name; empty if it is whole.

    With ``parts`` > 1 only every so manieth file is read, beginning with number ``part``: ranks share the work.
    """
    try:
        files = read_manifest(checkpoint)
    except ValueError as error:
        return [str(error)]
    # Tensors of a file that nobody listed would take the place of those that were saved.
    foreign = sorted(path.name for path in checkpoint.path.glob("*.safetensors") if path.name not in files)
    problems = [f"{name} is no part of it" for name in foreign]
    for name, (size, sha) in sorted(files.items())[part::parts]:
        try:
            # The size alone tells most damage, without reading a terabyte.
            found = (checkpoint.path / name).stat().st_size
            if found != size:
                problems.append(f"{name} has {found:,} bytes instead of {size:,}")
            elif digest(checkpoint.path / name)[1] != sha:
                problems.append(f"{name} does not hold what was written to it (SHA-256 differs)")
        except OSError as error:
            problems.append(f"{name} cannot be read ({error.strerror})")
    return problems


def write_durably(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all, and wait until it is on the disk."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk, where the file system knows how to."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems cannot; a rename is all they offer
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------------------
# Lives: on a cluster, processes of a job's first life may still step, and save, while its second life runs.


class Superseded(RunFailed):
    """A later life of the same run has begun; this one may not touch it any more."""


def begin_life(run_dir: Path, given: int | None) -> int:
    """Record that a new life of the run begins, on rank 0 alone, and return its number.

    Args:
        given: the life's number if whoever started the processes counts; otherwise one more than the last.

    Raises:
        Superseded: a later life than ``given`` has begun already.
    """
    last = _recorded_life(run_dir)
    life = last + 1 if given is None else given
    if life < last:
        raise Superseded(_superseded(run_dir, life))
    record = {
        "life": life,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    write_durably(run_dir / LIFE_FILE, json.dumps(record).encode())
    return life


def check_life(run_dir: Path, life: int) -> None:
    """Make sure that no later life of the run has begun.

    Raises:
        Superseded: one has.
    """
    if _recorded_life(run_dir) > life:
        raise Superseded(_superseded(run_dir, life))


def _recorded_life(run_dir: Path) -> int:
    try:
        return int(json.loads((run_dir / LIFE_FILE).read_bytes())["life"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _superseded(run_dir: Path, life: int) -> str:
    record = json.loads((run_dir / LIFE_FILE).read_bytes())
    return (
        f"this is life {life} of the run in {run_dir}, and life {record['life']} has begun on {record.get('host')} "
        f"(process {record.get('pid')}, {record.get('time')}); this one ends and writes nothing more"
    )
