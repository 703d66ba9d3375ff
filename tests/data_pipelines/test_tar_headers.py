"""Walking tar headers against tarfile, on archives of every dialect and on damaged ones."""

import io
import subprocess
import tarfile

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipelines.sources import files, tar_headers
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


def test_maps_of_sparse_files_are_read_once(tmp_path, monkeypatch):
    """A window is a megabyte, or eight of a server: not one for each of the maps in it."""
    header = bytearray(tarfile.TarInfo("holes.bin").tobuf(tarfile.GNU_FORMAT))
    header[156:157], header[482] = b"S", 1
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path, fetched = tmp_path / "a.tar", []
    path.write_bytes((header + bytes(512)) * 2000 + tarfile.TarInfo("1.jpg").tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    fetch = Window.fetch
    monkeypatch.setattr(Window, "fetch", lambda *args: fetched.append(fetch(*args)) or fetched[-1])
    found, walked = members_by_walk(path)
    assert [name for name, _, _ in found] == [b"1.jpg"] and not walked.truncated
    assert sum(map(len, fetched)) < 1.1 * path.stat().st_size


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


def with_header(data: bytes, place: slice, value: bytes) -> bytes:
    """The archive with other bytes in its first header, and a good checksum."""
    header = bytearray(data[:512])
    header[place] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[512:]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("size", [b"-0000001000\0", b"\xff" * 10 + b"\xfc\0", b"-1".rjust(12)])
def test_sizes_below_zero_are_damage(tmp_path, size):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("1.jpg", "2.jpg"):
            member = tarfile.TarInfo(name)
            member.size = 600
            archive.addfile(member, io.BytesIO(b"x" * 600))
    data = path.read_bytes()
    path.write_bytes(with_header(data, slice(124, 136), size))
    with pytest.raises(NotATar):
        members_by_walk(path)
    path.write_bytes(data[:1536] + with_header(data[1536:], slice(124, 136), size))
    found, walked = members_by_walk(path)
    assert found == [(b"1.jpg", 512, 600)] and walked.truncated


@pytest.mark.timeout(20)
@pytest.mark.parametrize("record, name", [(b"2 ", b"1.jpg"), (b"5 a=\n", b"1.jpg"), (b"11 path=ab\n", b"ab")])
def test_pax_records_take_linear_time(tmp_path, record, name):
    path, text = tmp_path / "a.tar", record * 1_000_000 + b"12 path=abc\n"
    with path.open("wb") as file:
        header = tarfile.TarInfo("PaxHeader")
        header.type, header.size = tarfile.XHDTYPE, len(text)
        file.write(header.tobuf(tarfile.USTAR_FORMAT) + text + bytes(-len(text) % 512))
        file.write(tarfile.TarInfo("1.jpg").tobuf(tarfile.USTAR_FORMAT) + bytes(1024))
    found, _ = members_by_walk(path)
    assert [found_name for found_name, _, _ in found] == [name]


def test_a_name_of_gigabytes_is_damage(tmp_path):
    path, size = tmp_path / "a.tar", 1 << 30
    with path.open("wb") as file:
        file.write(tarfile.TarInfo("1.jpg").tobuf(tarfile.USTAR_FORMAT))
        header = tarfile.TarInfo("long")
        header.type, header.size = tarfile.GNUTYPE_LONGNAME, size
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.seek(size, 1)  # a hole in the file
        file.write(tarfile.TarInfo("2.jpg").tobuf(tarfile.USTAR_FORMAT) + bytes(1024))
    found, walked = members_by_walk(path)
    assert [name for name, _, _ in found] == [b"1.jpg"] and walked.truncated


@pytest.mark.parametrize("dialect", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_links_lie_where_their_targets_do(tmp_path, dialect):
    path, long = tmp_path / "a.tar", "n" * 150
    links = [
        ("a/1.jpg", tarfile.LNKTYPE, f"b/{long}.jpg"),
        ("a/2.jpg", tarfile.SYMTYPE, f"../b/{long}.jpg"),
        (f"b/{long}2.jpg", tarfile.SYMTYPE, f"{long}.jpg"),
        ("a/3.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        ("a/4.jpg", tarfile.LNKTYPE, "nothing"),
        ("a/5.jpg", tarfile.SYMTYPE, "later.jpg"),
    ]
    with tarfile.open(path, "w", format=dialect) as archive:
        for name, kind, target in [(f"b/{long}.jpg", None, ""), *links, ("a/later.jpg", None, "")]:
            member = tarfile.TarInfo(name)
            member.size = 0 if kind else 700
            member.type, member.linkname = kind or tarfile.REGTYPE, target
            archive.addfile(member, io.BytesIO(bytes(member.size)))
    found, walked = members_by_walk(path)
    (first, later), places = members_by_tarfile(path), {name: place for name, *place in found}
    assert walked.dangling == [b"a/3.jpg", b"a/4.jpg"] and len(found) == 6
    for name in ("a/1.jpg", "a/2.jpg", f"b/{long}2.jpg"):
        assert places[name.encode()] == list(first[1:])
    assert places[b"a/5.jpg"] == list(later[1:])


@pytest.mark.parametrize("damaged", [0, 1, 3, 4, 8, 9])
def test_checksums_of_many_headers(tmp_path, monkeypatch, damaged):
    monkeypatch.setattr(tar_headers, "_HEADERS_AT_ONCE", 4)
    path = tmp_path / "a.tar"
    blocks = [bytearray(tarfile.TarInfo(f"{n}.jpg").tobuf(tarfile.USTAR_FORMAT)) for n in range(10)]
    blocks[damaged][1] ^= 1
    path.write_bytes(b"".join(blocks) + bytes(1024))
    if not damaged:
        with pytest.raises(NotATar):
            members_by_walk(path)
        return
    found, walked = members_by_walk(path)
    assert [name for name, _, _ in found] == [b"%d.jpg" % n for n in range(damaged)] and walked.truncated
