"""Every knob refuses what is impossible for it, by its name."""

from __future__ import annotations

import pytest

from dinov2_fsdp.config import Config, describe_keys, from_dict, load
from dinov2_fsdp.errors import UserError

KNOBS = {key: (kind, default) for key, kind, default, _ in describe_keys()}


def keys_of(*kinds: str) -> list[str]:
    return [key for key, (kind, _) in KNOBS.items() if kind.startswith(kinds)]


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(None, overrides)
    message = str(caught.value)
    assert len(message.splitlines()) <= 5
    return message


def with_first(key: str, value: str) -> str:
    """An override that gives ``value`` to a knob, or to the first element of a tuple."""
    default = KNOBS[key][1]
    if not isinstance(default, tuple):
        return f"{key}={value}"
    return f"{key}=[{', '.join([value, *map(str, default[1:])])}]"


NUMBERS = keys_of("int", "float", "tuple[int", "tuple[float")
FLOATS = keys_of("float", "tuple[float")
WHOLE = keys_of("int", "tuple[int")
TEXTS = keys_of("str")
TUPLES = keys_of("tuple")
FIXED_TUPLES = [key for key in TUPLES if "..." not in KNOBS[key][0]]


def test_every_knob_is_of_a_kind_that_is_tested_here() -> None:
    assert set(KNOBS) == {*NUMBERS, *TEXTS, *TUPLES, *keys_of("bool")}


# ---------------------------------------------------------------------------------------------------------------------
# All knobs of a kind.


@pytest.mark.parametrize("key", NUMBERS)
def test_no_number_may_be_negative(key: str) -> None:
    assert refusal(with_first(key, "-1")).startswith(f"{key}=")


@pytest.mark.parametrize("key", FLOATS)
def test_no_number_may_be_without_end_or_no_number(key: str) -> None:
    for value in ("nan", "inf", "-inf", ".nan", ".inf", "1e999"):
        assert refusal(with_first(key, value)).startswith(key)


@pytest.mark.parametrize("key", FLOATS)
def test_a_number_of_python_is_checked_like_one_of_yaml(key: str) -> None:
    default = KNOBS[key][1]
    value = (float("nan"), *default[1:]) if isinstance(default, tuple) else float("nan")
    section, _, name = key.rpartition(".")
    with pytest.raises(UserError, match="impossible; valid: a finite number"):
        from_dict({section: {name: value}})


@pytest.mark.parametrize("key", WHOLE)
def test_no_whole_number_may_be_huge_or_broken(key: str) -> None:
    for value in (str(2**63), "9" * 4000, "1.5", "1e3", "true"):
        assert refusal(with_first(key, value)).startswith(key)


@pytest.mark.parametrize("key", TEXTS)
def test_no_text_may_be_empty_or_hold_a_zero_byte(key: str) -> None:
    for value in ("''", '"a\\0b"'):
        assert refusal(f"{key}={value}").startswith(key)


@pytest.mark.parametrize("key", FIXED_TUPLES)
def test_a_tuple_has_its_length(key: str) -> None:
    kept = [str(value) for value in KNOBS[key][1]]
    for values in ([], kept[:-1], [*kept, kept[-1]]):
        assert refusal(f"{key}=[{', '.join(values)}]").startswith(f"{key} needs {len(kept)} values like ")


@pytest.mark.parametrize("key", TUPLES)
def test_a_tuple_has_elements_of_its_type(key: str) -> None:
    for value in ("[1]", "{a: 1}", "null"):
        message = refusal(with_first(key, value))
        assert message.startswith(f"{key}: ")
        assert f"valid: {KNOBS[key][0]}" in message
    assert refusal(f"{key}=1").startswith(f"{key}: 1 is no list")


@pytest.mark.parametrize("key", [key for key in TUPLES if "str" not in KNOBS[key][0]])
def test_a_tuple_of_numbers_names_the_element_that_is_none(key: str) -> None:
    assert refusal(with_first(key, "much")).startswith(f"{key}: much in ['much'")


# ---------------------------------------------------------------------------------------------------------------------
# Knob by knob.

ZERO_IS_MEANINGLESS = (
    "data.prefetch", "crops.global_size", "crops.local_size", "model.patch", "model.mlp_ratio", "model.dim",
    "model.depth", "model.heads", "dino_head.prototypes", "dino_head.hidden", "dino_head.bottleneck",
    "dino_head.layers", "ibot_head.prototypes", "ibot_head.hidden", "ibot_head.bottleneck", "ibot_head.layers",
    "loss.student_temperature", "loss.teacher_temperature", "loss.teacher_temperature_start",
    "loss.sinkhorn_iterations", "optim.layer_decay", "optim.patch_embed_lr", "train.batch", "train.microbatch",
    "train.max_nonfinite", "parallel.replicate", "parallel.timeout", "checkpoint.keep", "eval.resize", "eval.size",
    "eval.batch", "eval.k", "eval.temperature", "eval.classes", "crops.global_scale", "crops.local_scale",
    "masks.ratio", "parallel.blocks_per_unit", "parallel.prefetch",
)  # fmt: skip
AT_MOST_ONE = (
    "crops.flip", "crops.jitter", "crops.gray", "crops.solarize", "crops.jitter_strength", "masks.probability",
    "teacher.momentum", "crops.global_scale", "crops.local_scale", "masks.ratio",
)  # fmt: skip
BELOW_ONE = ("model.drop_path", "loss.centre_momentum", "optim.momentum", "optim.betas")
RANGES = ("crops.global_scale", "crops.local_scale", "masks.ratio")
CHOICES = (
    "model.arch", "model.ffn", "crops.blur", "loss.centering", "optim.name", "optim.lr_scaling", "optim.clip_scope",
    "train.precision", "parallel.device", "parallel.attention", "parallel.activation_checkpointing",
    "parallel.reduce_precision", "parallel.heads_precision", "crops.implementation", "crops.colours",
)  # fmt: skip
DURATIONS = (
    "train.duration", "loss.teacher_temperature_warmup", "optim.warmup", "optim.freeze_prototypes",
    "checkpoint.every", "checkpoint.keep_every", "log.every", "eval.every", "init.freeze",
)  # fmt: skip
ANY_TEXT = ("output_dir", "data.train", "data.cache", "eval.train", "eval.test", "init.backbone")


def test_every_text_is_a_choice_or_a_duration_or_free() -> None:
    assert {*CHOICES, *DURATIONS, *ANY_TEXT} == set(TEXTS)


@pytest.mark.parametrize("key", ZERO_IS_MEANINGLESS)
def test_zero_is_refused_where_it_is_meaningless(key: str) -> None:
    assert refusal(with_first(key, "0")).startswith(f"{key}=")


@pytest.mark.parametrize("key", sorted({*NUMBERS} - {*ZERO_IS_MEANINGLESS}))
def test_zero_is_allowed_where_it_means_something(key: str) -> None:
    load(None, [with_first(key, "0")])


@pytest.mark.parametrize("key", AT_MOST_ONE)
def test_a_probability_or_share_above_one_is_refused(key: str) -> None:
    assert refusal(with_first(key, "1.01")).startswith(f"{key}=")


@pytest.mark.parametrize("key", BELOW_ONE)
def test_what_must_stay_below_one_is_refused_at_one(key: str) -> None:
    assert refusal(with_first(key, "1")).startswith(f"{key}=")
    load(None, [with_first(key, "0.999")])


@pytest.mark.parametrize("key", RANGES)
def test_a_reversed_range_is_refused(key: str) -> None:
    low, high = KNOBS[key][1]
    assert refusal(f"{key}=[{high}, {low}]").startswith(f"{key}=[{high}, {low}] is impossible")
    load(None, [f"{key}=[{low}, {low}]"])


@pytest.mark.parametrize("key", CHOICES)
def test_an_unknown_choice_is_answered_with_the_valid_ones(key: str) -> None:
    message = refusal(f"{key}=xyzzy")
    assert message.startswith(f"{key}=xyzzy is unknown\nvalid: ")
    for valid in message.split("valid: ")[1].split(", "):
        load(None, [f"{key}={valid}"])


@pytest.mark.parametrize("key", DURATIONS)
def test_a_broken_duration_is_refused_by_its_key(key: str) -> None:
    for value in ("10", "-1it", "ten", "1e3it", "10 epochs", "nan", "1" + "0" * 70 + "it"):
        assert refusal(f"{key}={value}").startswith(key)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.registers=-4"], "model.registers=-4 is impossible; valid: a number of at least 0"),
        (["crops.jitter_strength=[0.4, 0.4, 0.4, 0.6]"], "hue ≤ 0.5"),
        (["eval.k=[]"], "eval.k=[] is impossible; valid: at least one number"),
        (["eval.k=[20, 0]"], "eval.k=[20, 0] is impossible"),
        (["eval.size=280"], "eval.resize=256 is impossible; valid: at least eval.size (280)"),
        (["parallel.timeout=1e10"], "parallel.timeout=10000000000.0 is impossible; valid: at most 1e+08"),
        (["train.duration=0it"], "train.duration=0it is impossible"),
        (["loss.teacher_temperature_start=0.1"], "loss.teacher_temperature_start=0.1 is not below"),
        (["crops.colours=device", "crops.implementation=reference"], "use crops.implementation=fast, or crops.col"),
    ],
)
def test_a_value_is_refused_with_what_would_be_possible(overrides: list[str], expected: str) -> None:
    assert expected in refusal(*overrides)


def test_a_start_temperature_without_warm_up_may_be_anything() -> None:
    load(None, ["loss.teacher_temperature_start=0.2", "loss.teacher_temperature_warmup=0it"])


@pytest.mark.parametrize("registers", [0, 1, 4, 16])
def test_any_number_of_registers_is_allowed(registers: int) -> None:
    assert load(None, [f"model.registers={registers}"]).model.registers == registers


def test_checkpoints_are_written_in_the_background_unless_told_otherwise() -> None:
    assert Config().checkpoint.asynchronous is True
    assert load(None, ["checkpoint.asynchronous=false"]).checkpoint.asynchronous is False


@pytest.mark.parametrize("key", keys_of("bool"))
def test_a_switch_is_on_or_off(key: str) -> None:
    assert refusal(f"{key}=perhaps").startswith(f"{key}: perhaps is no bool")
    load(None, [f"{key}=true"])
    load(None, [f"{key}=false"])
