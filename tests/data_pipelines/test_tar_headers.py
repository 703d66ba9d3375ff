"""Walking tar headers against tarfile, on archives of every dialect and on damaged ones."""

import io
import subprocess
import tarfile

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipelines.sources import files
from data_pipelines.sources.files import Window
from data_pipelines.sources.tar_headers import NotATar, walk_members

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=150)
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join).filter(lambda path: path not in (".", ".."))


def members_by_tarfile(path):
    with tarfile.open(path) as archive:
        found = [member for member in archive.getmembers() if member.isreg()]
    return [(member.name.encode("utf-8", "surrogateescape"), member.offset_data, member.size) for member in found]


def members_by_walk(path):
    walked = walk_members(Window(str(path), path.stat().st_size))
    return list(zip(walked.names, walked.offsets, walked.sizes, strict=True)), walked


@settings(max_examples=60, deadline=None)
@given(
    members=st.lists(st.tuples(PATHS, st.integers(0, 3000), st.booleans()), max_size=12),
    dialect=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
    window_bytes=st.sampled_from([512, 700, 1 << 20]),
)
def test_finds_what_tarfile_finds(tmp_path_factory, members, dialect, window_bytes):
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    with tarfile.open(path, "w", format=dialect) as archive:
        for name, size, with_time in members:
            member = tarfile.TarInfo(name)
            member.size, member.mtime = size, 1.5 if with_time else 1  # A fraction needs a PAX header.
            archive.addfile(member, io.BytesIO(b"x" * size))
            folder = tarfile.TarInfo(f"{name}.d")
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
            link = tarfile.TarInfo(f"{name}.l")
            link.type, link.linkname = tarfile.SYMTYPE, "k" * size
            archive.addfile(link)
    before, files._LOCAL_WINDOW_BYTES = files._LOCAL_WINDOW_BYTES, window_bytes
    try:
        found, walked = members_by_walk(path)
    finally:
        files._LOCAL_WINDOW_BYTES = before
    # tarfile takes trailing slashes off names; a member's name ends with none here.
    assert found == members_by_tarfile(path) and not walked.truncated


@settings(max_examples=60, deadline=None)
@given(place=st.integers(0, 10 * 1024 - 1), bit=st.integers(0, 7), cut=st.booleans())
def test_damage_never_yields_a_member_that_was_not_there(tmp_path_factory, place, bit, cut):
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    with tarfile.open(path, "w") as archive:
        for number in range(5):
            member = tarfile.TarInfo(f"{number}.jpg")
            member.size = 1000
            archive.addfile(member, io.BytesIO(bytes([number + 1]) * 1000))
    whole, _ = members_by_walk(path)
    data = bytearray(path.read_bytes())
    if cut:
        del data[place:]
    else:
        data[place] ^= 1 << bit
    path.write_bytes(data)
    try:
        found, walked = members_by_walk(path)
    except NotATar:
        assert place < 512
        return
    assert found == whole[: len(found)]
    assert walked.truncated or len(found) == len(whole)


@pytest.mark.parametrize("dialect", ["gnu", "oldgnu", "ustar", "posix", "v7"])
def test_archives_by_gnu_tar(tmp_path, dialect):
    for name in ("1.jpg", "1.txt", "n" * 60 + ".jpg"):
        (tmp_path / name).write_bytes(name.encode() * 50)
    with open(tmp_path / "holes.bin", "wb") as file:
        for place in range(0, 40):  # so many holes that their map goes on after the header
            file.seek(place * 65536)
            file.write(b"x" * 4096)
    options = ["--sparse"] if dialect in ("gnu", "oldgnu") else []
    names = ["1.jpg", "holes.bin", "1.txt", "n" * 60 + ".jpg"]
    subprocess.run(["tar", f"--format={dialect}", *options, "-cf", "a.tar", *names], cwd=tmp_path, check=True)
    found, walked = members_by_walk(tmp_path / "a.tar")
    assert found == [
        member for member in members_by_tarfile(tmp_path / "a.tar") if options == [] or member[0] != b"holes.bin"
    ]
    assert not walked.truncated


def test_sizes_beyond_octal(tmp_path):
    """Nine GiB in base 256, most of it a hole in the file."""
    path, size = tmp_path / "a.tar", 9 << 30
    member = tarfile.TarInfo("big.jpg")
    member.size = size
    last = tarfile.TarInfo("last.jpg")
    for dialect in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with path.open("wb") as file:
            file.write(member.tobuf(dialect))
            file.seek(size, 1)
            file.write(last.tobuf(dialect) + bytes(1024))
        found, _ = members_by_walk(path)
        assert [(name, count) for name, _, count in found] == [(b"big.jpg", size), (b"last.jpg", 0)]
        assert found == members_by_tarfile(path)


@settings(max_examples=200, deadline=None)
@given(
    content=st.binary(max_size=4096), size=st.binary(min_size=12, max_size=12), kind=st.sampled_from(b"0LxXgSKAZ57\0")
)
@example(content=b"", size=b"\xff" * 12, kind=ord("Z"))
@example(content=b"9" * 5000 + b" size=1\n", size=b"00000011610\0", kind=ord("x"))
@example(content=b"5020 size=" + b"9" * 5009 + b"\n", size=b"00000011634\0", kind=ord("x"))
def test_garbage_with_a_good_checksum_is_no_error(tmp_path_factory, content, size, kind):
    """What a header says of sizes is believed by nobody."""
    header = bytearray(b"a.txt".ljust(512, b"\0"))
    header[124:136], header[156] = size, kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    path.write_bytes(bytes(header) + content)
    try:
        found, _ = members_by_walk(path)
    except NotATar:
        return
    assert all(offset + length <= path.stat().st_size for _, offset, length in found)
