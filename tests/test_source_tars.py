from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
from source_files import Open, encode, names, pack, pack_images, values

from dinov2_fsdp.data.sources import BadImage, open_source
from dinov2_fsdp.errors import UserError


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def opened(cache: Path) -> Open:
    return lambda spec: open_source(spec, cache)


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_every_tar_dialect_are_read(opened: Open, tmp_path: Path, tar_format: int) -> None:
    long = "/".join(["d" * 60] * 3)
    found = ["b/x.png", f"{long}/y.png", "b/a.png"]
    path = pack(tmp_path / "a.tar", [(name, encode(value)) for value, name in enumerate(found)], tar_format)
    source = opened(f"tar:{path}")
    assert names(source) == [f"{path}#{name}" for name in sorted(found)]
    assert values(source) == [found.index(name) for name in sorted(found)]


def test_names_outside_ascii_are_read_in_gnu_and_pax_tars(opened: Open, tmp_path: Path) -> None:
    for tar_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = pack(tmp_path / f"{tar_format}.tar", [("ä" * 80 + ".png", encode(5))], tar_format)
        source = opened(f"tar:{path}")
        assert names(source) == [f"{path}#{'ä' * 80}.png"]
        assert values(source) == [5]


def test_the_class_of_a_member_is_the_directory_right_above_it(opened: Open, tmp_path: Path) -> None:
    for prefix in ("", "train/", "./"):
        path = pack_images(tmp_path / f"{prefix.strip('/.')}x.tar", f"{prefix}dog/1.png", f"{prefix}cat/1.png")
        source = opened(f"tar:{path}")
        assert source.classes == ["cat", "dog"]
        assert [source.label(0), source.label(1)] == [0, 1]
        assert values(source) == [1, 0]


def test_labels_agree_across_shards_that_hold_different_classes(opened: Open, tmp_path: Path) -> None:
    pack_images(tmp_path / "0.tar", "dog/0.png", "eel/0.png")
    pack_images(tmp_path / "1.tar", "cat/0.png", "dog/1.png")
    source = opened(f"tar:{tmp_path}/{{0,1}}.tar")
    assert source.classes == ["cat", "dog", "eel"]
    assert source.labels is not None
    assert source.labels.tolist() == [source.label(index) for index in range(4)] == [1, 2, 0, 1]


def test_a_size_in_a_pax_header_overrides_the_one_in_the_member_header(opened: Open, tmp_path: Path) -> None:
    path, data = tmp_path / "a.tar", encode(5)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("a.png")
        info.size, info.pax_headers = len(data), {"size": str(len(data))}
        archive.addfile(info, io.BytesIO(data))
    written = bytearray(path.read_bytes())
    header = written[1024:1536]  # after the extended header and its records
    header[124:136], header[148:156] = b"0" * 11 + b"\0", b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    written[1024:1536] = header
    path.write_bytes(written)
    assert values(opened(f"tar:{path}")) == [5]


def test_members_without_a_directory_are_unlabelled(opened: Open, tmp_path: Path) -> None:
    source = opened(f"tar:{pack_images(tmp_path / 'a.tar', 'cat/0.png', 'dog/0.png', 'stray.png')}")
    assert source.classes is None
    assert source.labels is None


def test_a_part_of_a_tar_can_be_selected(opened: Open, tmp_path: Path) -> None:
    path = pack_images(tmp_path / "a.tar", "train/b/0.png", "train/a/0.png", "val/a/0.png", "trainer/a/0.png")
    source = opened(f"tar:{path}#train")
    assert names(source) == [f"{path}#train/a/0.png", f"{path}#train/b/0.png"]
    assert source.classes == ["a", "b"]
    assert opened(f"tar:{path}#train/a/").classes is None


def test_a_part_that_a_tar_does_not_have_is_named(opened: Open, tmp_path: Path) -> None:
    path = pack_images(tmp_path / "a.tar", "train/b/0.png")
    with pytest.raises(UserError, match=f"no images in 'test' of {path}"):
        opened(f"tar:{path}#test")


def test_a_path_may_contain_the_characters_of_a_pattern(opened: Open, tmp_path: Path) -> None:
    path = pack_images(tmp_path / "a[1]{b,c}.tar#d.tar", "a.png")
    assert names(opened(f"tar:{path}")) == [f"{path}#a.png"]


def test_globs_and_braces_name_shards_in_sorted_order(opened: Open, tmp_path: Path) -> None:
    shards = [pack_images(tmp_path / f"s-{number:02}.tar", f"{number}.png") for number in (8, 9, 10, 11)]
    for pattern, expected in {
        "s-*.tar": shards,
        "s-0?.tar": shards[:2],
        "s-{08..10}.tar": shards[:3],
        "s-{11,08}.tar": [shards[0], shards[3]],
        "s-{0,1}{8..9}.tar": None,
        "{s-{08..09}.tar,s-08.tar}": None,
        "{s-1*,s-08}.tar": [shards[0], *shards[2:]],
        "s-{08,0?}.tar": shards[:2],
    }.items():
        if expected is None:
            with pytest.raises(UserError, match="does not exist"):
                opened(f"tar:{tmp_path}/{pattern}")
        else:
            read = [name.partition("#")[0] for name in names(opened(f"tar:{tmp_path}/{pattern}"))]
            assert read == [str(path) for path in expected], pattern


def test_a_missing_shard_of_a_range_is_named(opened: Open, tmp_path: Path) -> None:
    pack_images(tmp_path / "s-0.tar", "a.png")
    with pytest.raises(UserError, match=f"'{tmp_path}/s-1.tar' does not exist"):
        opened(f"tar:{tmp_path}/s-{{0..1}}.tar")


@pytest.mark.parametrize("braces", ["{3..1}", "{0..99999999}", "{0..9999}{0..9999}"])
def test_braces_that_count_down_or_without_end_are_refused(opened: Open, braces: str) -> None:
    with pytest.raises(UserError, match=r"braces|range"):
        opened(f"tar:/x/{braces}.tar")


def test_a_glob_without_matches_is_named(opened: Open, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file matches '.*/x-\*\.tar'"):
        opened(f"tar:{tmp_path}/x-*.tar")


def test_a_directory_in_place_of_a_tar_is_answered_with_what_to_write(opened: Open, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"(?s)is a directory.*folder:{tmp_path}"):
        opened(f"tar:{tmp_path}")


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz"])
def test_a_compressed_tar_is_refused(opened: Open, tmp_path: Path, compression: str) -> None:
    path = tmp_path / f"a.tar.{compression}"
    with tarfile.open(path, f"w:{compression}") as archive:  # type: ignore[call-overload]
        archive.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(UserError, match=f"(?s){path} is compressed.*decompress"):
        opened(f"tar:{path}")


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "is empty"),
        (b"hello", "is not a tar"),
        (b"hello" * 1000, "is not a tar"),
        (b"\xff" * 2000, "is not a tar"),
    ],
)
def test_a_file_that_is_no_tar_is_named(opened: Open, tmp_path: Path, data: bytes, problem: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{path} {problem}"):
        opened(f"tar:{path}")


def test_a_tar_cut_short_anywhere_is_named(opened: Open, tmp_path: Path) -> None:
    whole = pack_images(tmp_path / "whole.tar", "a/0.png", "b/0.png").read_bytes()
    path = tmp_path / "a.tar"
    for length in (513, 700, 1024, 1300, 1536, 2047):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=f"{path} is cut short"):
            opened(f"tar:{path}")


def test_a_member_that_claims_an_impossible_size_is_refused(opened: Open, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    info = tarfile.TarInfo("a.png")
    info.size = 1 << 80
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 1024)
    with pytest.raises(UserError, match=f"{path} is cut short"):
        opened(f"tar:{path}")


def test_a_tar_with_a_damaged_header_is_named_and_not_taken_for_its_end(opened: Open, tmp_path: Path) -> None:
    path = pack_images(tmp_path / "a.tar", "a/0.png", "b/0.png")
    data = bytearray(path.read_bytes())
    data[1024 + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{path} is damaged at byte 1,024"):
        opened(f"tar:{path}")


def test_a_tar_without_images_is_named(opened: Open, tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar", [("notes.txt", b"x")])
    with pytest.raises(UserError, match=f"no images in {path}"):
        opened(f"tar:{path}")


def test_members_that_lead_outside_are_left_out(opened: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = pack_images(tmp_path / "a.tar", "../a.png", "x/../../b.png", "/etc/c.png", "d.png", "..e/f.png", "..g.png")
    source = opened(f"tar:{path}")
    assert names(source) == [f"{path}#d.png"]
    assert "3 members" in caplog.text


def test_links_devices_and_directories_are_left_out(opened: Open, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            info = tarfile.TarInfo(f"{kind.decode()}.png")
            info.type, info.linkname = kind, "/etc/passwd"
            info.size = 2560 if kind == tarfile.LNKTYPE else 0  # some tars say how large the link's target is
            archive.addfile(info)
        info = tarfile.TarInfo("z.png")
        info.size = len(encode(3))
        archive.addfile(info, io.BytesIO(encode(3)))
    source = opened(f"tar:{path}")
    assert names(source) == [f"{path}#z.png"]
    assert values(source) == [3]


def test_hidden_members_are_left_out(opened: Open, tmp_path: Path) -> None:
    path = pack_images(tmp_path / "a.tar", "._a.png", "a.png", ".git/b.png")
    assert names(opened(f"tar:{path}")) == [f"{path}#a.png"]


def test_of_members_with_the_same_name_the_last_counts(opened: Open, tmp_path: Path) -> None:
    assert values(opened(f"tar:{pack_images(tmp_path / 'a.tar', 'a.png', 'a.png')}")) == [1]


def test_webdataset_labels_come_from_the_cls_members(opened: Open, tmp_path: Path) -> None:
    members = [("x/000.png", encode(0)), ("x/000.cls", b"7\n"), ("x/001.cls", b"2"), ("x/001.left.png", encode(1))]
    source = opened(f"tar:{pack(tmp_path / 'a.tar', members)}")
    assert [source.label(0), source.label(1)] == [7, 2]
    assert source.classes == [str(number) for number in range(8)]


def test_an_image_without_cls_among_others_with_one_is_named(opened: Open, tmp_path: Path) -> None:
    members = [("000.png", encode(0)), ("000.cls", b"7"), ("001.png", encode(1))]
    with pytest.raises(UserError, match=r"1 of 2 images have no \.cls beside them, the first is 001\.png"):
        opened(f"tar:{pack(tmp_path / 'a.tar', members)}")


@pytest.mark.parametrize("text", [b"cat", b"-1", b"", b"1.5", b"99999999999"])
def test_a_cls_member_that_is_no_class_number_is_named(opened: Open, tmp_path: Path, text: bytes) -> None:
    with pytest.raises(UserError, match=r"a\.tar#000\.cls holds"):
        opened(f"tar:{pack(tmp_path / 'a.tar', [('000.png', encode(0)), ('000.cls', text)])}")


def test_a_tar_that_shrank_since_makes_its_images_bad(opened: Open, tmp_path: Path) -> None:
    path = pack_images(tmp_path / "a.tar", "a.png")
    source = opened(f"tar:{path}")
    path.write_bytes(path.read_bytes()[:520])
    with pytest.raises(BadImage, match=r"a\.tar#a\.png: the tar ends after 8 of"):
        source.image(0)


def test_more_shards_than_may_be_open_are_read_without_leaking_descriptors(opened: Open, tmp_path: Path) -> None:
    for shard in range(80):
        pack_images(tmp_path / f"{shard:02}.tar", "a.png")
    source = opened(f"tar:{tmp_path}/*.tar")
    before = len(os.listdir("/dev/fd"))
    assert values(source) * 2 == [0] * 160
    assert len(os.listdir("/dev/fd")) - before <= 64
    del source
    assert len(os.listdir("/dev/fd")) <= before
