"""What a process does with itself when it joins the others."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dinov2_fsdp.memory import machine_memory

CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")

FAULTS = """
import json, resource, torch
from dinov2_fsdp.memory import keep_freed_memory
keep_freed_memory()
found = []
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    several = [torch.ones(6 << 20) for _ in range(4)]
    del several
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps freed memory its own way")
def test_a_cpu_uses_freed_memory_again() -> None:
    """After some rounds 96 MiB need no new pages any more; left alone, most processes take 24,000 in every round."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    last = json.loads(done.stdout)[-4:]
    assert max(last) < 100, last


MACHINE = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
USUAL_MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"""


def write_limits(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n", errors="surrogateescape")


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/job/step", {"sys/fs/cgroup/job/memory.max": "1000", "sys/fs/cgroup/job/step/memory.max": "max"}, 1000.0),
        ("0::/job/step", {"sys/fs/cgroup/memory.max": "3000", "sys/fs/cgroup/job/step/memory.max": "2000"}, 2000.0),
        ("0::/job", {"sys/fs/cgroup/job/memory.max": "9000", "sys/fs/cgroup/job/memory.high": "7000"}, 7000.0),
        ("0::/as/outside", {"sys/fs/cgroup/memory.max": "4000"}, 4000.0),
        ("3:cpuset:/\n4:cpu,memory:/job", {"sys/fs/cgroup/memory/job/memory.limit_in_bytes": "5000"}, 5000.0),
        ("0::/\udcff\n\n", {"sys/fs/cgroup/memory.max": "6000"}, 6000.0),
        ("4:memory:/", {"sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096)}, MACHINE),
        ("0::/", {}, MACHINE),
        (None, {}, MACHINE),
    ],
    ids=["above", "least", "high", "a container", "version 1", "not UTF-8", "version 1, none", "none", "not Linux"],
)
def test_memory_is_what_a_control_group_allows(
    groups: str | None, limits: dict[str, str], expected: float, tmp_path: Path
) -> None:
    known = {} if groups is None else {"proc/self/cgroup": groups, "proc/self/mountinfo": USUAL_MOUNTS}
    write_limits(tmp_path, {**limits, **known})
    assert machine_memory(tmp_path) == expected


@pytest.mark.parametrize(
    ("mount", "groups", "limits", "expected"),
    [
        (
            "35 31 0:32 / /sys/fs/cgroup/cpu,memory rw,relatime shared:9 - cgroup cgroup rw,cpu,memory",
            "4:cpu,memory:/job",
            {"sys/fs/cgroup/cpu,memory/job/memory.limit_in_bytes": "1000"},
            1000.0,
        ),
        (
            "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw",
            "4:cpu:/\n0::/job",
            {"sys/fs/cgroup/unified/job/memory.max": "2000"},
            2000.0,
        ),
        (
            r"41 31 0:38 / /mnt/my\040groups rw - cgroup2  rw",
            "0::/job",
            {"mnt/my groups/job/memory.max": "3000"},
            3000.0,
        ),
        (
            "41 31 0:38 /docker/abc /sys/fs/cgroup ro - cgroup2 cgroup rw",
            "0::/docker/abc/step",
            {"sys/fs/cgroup/step/memory.max": "4000", "sys/fs/cgroup/docker/abc/step/memory.max": "1"},
            4000.0,
        ),
        (
            "41 31 0:38 /../.. /sys/fs/cgroup ro - cgroup2 cgroup rw",
            "0::/",
            {"sys/fs/cgroup/memory.max": "5000"},
            5000.0,
        ),
        (
            "41 31 0:38 /another/container /mnt/another rw - cgroup2 cgroup rw",
            "0::/job",
            {"mnt/another/memory.max": "1", "mnt/another/job/memory.max": "1"},
            MACHINE,
        ),
        ("a line\n\n1 2 3 - cgroup2", "words\n\n0::/", {"sys/fs/cgroup/memory.max": "1"}, MACHINE),
    ],
    ids=[
        "mounted together",
        "hybrid",
        "a name with spaces",
        "part of the tree",
        "from outside",
        "another's",
        "no mounts",
    ],
)
def test_control_groups_are_where_they_are_mounted(
    mount: str, groups: str, limits: dict[str, str], expected: float, tmp_path: Path
) -> None:
    write_limits(tmp_path, {**limits, "proc/self/cgroup": groups, "proc/self/mountinfo": mount})
    assert machine_memory(tmp_path) == expected


GROWTH = """
import json, torch
from torch import nn
from dinov2_fsdp.parallel import world
bounded and world.keep_few_primitives()
torch.set_num_threads(1)

def mebibytes():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * 4096 / 2**20

weight = torch.randn(1536, 384).bfloat16()
def multiply(counts):
    with torch.no_grad():
        for count in counts:
            nn.functional.gelu(nn.functional.linear(torch.randn(count, 384).bfloat16(), weight))

multiply(range(1200, 1100, -1))
before = mebibytes()
multiply(range(1100, 900, -1))
print(mebibytes() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="bf16 is not multiplied by oneDNN here")
@pytest.mark.parametrize("bounded", [True, False])
def test_products_of_ever_new_shapes_take_no_more_memory(bounded: bool) -> None:
    """Left alone they do, which is what the bound is for."""
    environment = {name: value for name, value in os.environ.items() if name not in CAPACITIES}
    command = [sys.executable, "-c", f"bounded = {bounded}\n{GROWTH}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    grown = float(done.stdout)
    assert (grown < 60) if bounded else (grown > 120), grown
