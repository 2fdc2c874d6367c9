"""Mutated recipes: each is read, or refused in a few lines; nothing else may happen."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dinov2_fsdp.config import Config, describe_keys, load, to_yaml
from dinov2_fsdp.errors import UserError
from dinov2_fsdp.rng import generator

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml"))
MUTANTS = 70
"""Of each kind."""
AT_ONCE = 2.0
"""Seconds of the processor for one file; it takes hundredths."""

Mutation = Callable[[bytes, np.random.Generator], bytes]

TOKENS = [
    *(b"{", b"}", b"[", b"]", b": ", b", ", b"- ", b"? ", b"& ", b"*a", b"&a ", b"<<: *a", b"|\n", b">-\n", b"#"),
    *(b"!!python/object/apply:os.system [x]", b"!tag ", b"---\n", b"...\n", b"%YAML 3.0\n", b"'", b'"', b"\\x00"),
    *(b"???", b"${train.batch}", b"${oc.env:HOME}", b"${", b"null", b"~", b".nan", b"-.inf", b"1e999", b"9" * 5000),
    *(b"\t", b"@`", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\xc3\x28", b"\xed\xa0\x80", b"\r", b"\xc2\x85"),
    *(b"\xe2\x80\xa8", b"\x1b[2J", b"[" * 3000, b"{a: " * 3000, b"- " * 3000, b" " * 5000, b"\n" * 5000),
    b"extends: .\n",
]  # fmt: skip
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**40, 0.5, -0.0, 1e-300, 1e300),
    *(float("nan"), float("inf"), -float("inf"), "", " ", "???", "\\???", "${seed}", "${output_dir}", "${oc.env:PATH}"),
    *("${", "a" * 5000, "a\nb\nc\nd\ne\nf\ng", "\0", "\x1b[2J", "é", "😀", "10ep", "0it", "5%", "nan", "1_000", "0x10"),
    *([], [[]], [1], [0.1, 0.2], [0.2, 0.1], [None, None], ["a"], [{}], {}, {"a": 1}, {"batch": {}}, [[[[[1]]]]]),
]  # fmt: skip
KEYS = [key for key, *_ in describe_keys()]


def mutate_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    """A few bytes changed, cut out, doubled, moved, or replaced by what YAML finds hard."""
    for _ in range(rng.integers(1, 5)):
        first, last = sorted(rng.integers(0, len(content) + 1, 2))
        last = min(last, first + 40)
        middle = content[first:last]
        content = content[:first] + [
            b"",
            middle * 2,
            middle[::-1],
            rng.bytes(len(middle)),
            middle + TOKENS[rng.integers(len(TOKENS))],
            TOKENS[rng.integers(len(TOKENS))],
        ][rng.integers(6)] + content[last:]  # fmt: skip
    return content if rng.random() < 0.95 else content[: rng.integers(0, len(content) + 1)]


def mutate_structure(content: bytes, rng: np.random.Generator) -> bytes:
    """A few keys given other values, renamed, moved or removed; still YAML."""
    values = yaml.safe_load(content)
    for _ in range(rng.integers(1, 3)):
        sections = [values, *(value for value in values.values() if isinstance(value, dict))]
        section = sections[rng.integers(len(sections))]
        value = VALUES[rng.integers(len(VALUES))]
        known = KEYS[rng.integers(len(KEYS))].split(".")
        action = rng.integers(8)
        if action >= 5 and section:
            section.pop(list(section)[rng.integers(len(section))])
        elif action == 0 and section:
            section[list(section)[rng.integers(len(section))]] = value
        elif action == 1 and section:
            old = list(section)[rng.integers(len(section))]
            section[str(old)[::-1]] = section.pop(old)
        elif action == 2:
            section[known[-1]] = value
        elif action == 3:
            section[VALUES[rng.integers(14)]] = value
        elif action == 4:
            part = values
            if len(known) > 1:
                part = values.setdefault(known[0], {})
            if isinstance(part, dict):
                part[known[-1]] = value
    return yaml.safe_dump(values, allow_unicode=bool(rng.integers(2)), sort_keys=False).encode()


def mutate_value(content: bytes, rng: np.random.Generator) -> bytes:
    """One knob given a value that is hard for it, in a file that is otherwise right."""
    values = yaml.safe_load(content)
    section, _, name = KEYS[rng.integers(len(KEYS))].rpartition(".")
    target = values.setdefault(section, {}) if section else values
    target[name] = VALUES[rng.integers(len(VALUES))]
    return yaml.safe_dump(values, sort_keys=False).encode()


@pytest.mark.slow
@pytest.mark.parametrize("mutation", [mutate_bytes, mutate_structure, mutate_value], ids=lambda m: m.__name__)
def test_a_mutated_recipe_is_read_or_refused_in_a_few_lines(mutation: Mutation, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    outcomes: Counter[str] = Counter()
    for number in range(MUTANTS):
        rng = generator(0, f"test: {mutation.__name__}", number)
        recipe = RECIPES[number % len(RECIPES)]
        path = (tmp_path / recipe).with_name("mutant.yaml")
        content = mutation((ROOT / recipe).read_bytes(), rng)
        path.write_bytes(content)
        start = time.process_time()
        try:
            config = load(path)
        except UserError as error:
            message = str(error)
            assert 1 <= len(message.splitlines()) <= 5, (number, message)
            assert len(message) < 2000, (number, message)
            assert all(line.isprintable() for line in message.split("\n")), (number, message)
            assert "mutant.yaml" in message, (number, message)
            outcomes["refused"] += 1
        except Exception as error:
            pytest.fail(f"mutant {number} of {recipe}: {error!r}\n{content[:2000]!r}")
        else:
            assert isinstance(config, Config)
            path.write_text(to_yaml(config), encoding="utf-8")
            assert load(path) == config, number
            outcomes["read"] += 1
        assert time.process_time() - start < AT_ONCE, (number, content[:2000])
    # Mutations that all go the same way would test one of the two.
    assert min(outcomes["refused"], outcomes["read"]) >= 3, outcomes
