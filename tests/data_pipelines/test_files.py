"""Which files a pattern names, and what lies there."""

import pytest

from data_pipelines.errors import UserError
from data_pipelines.sources import files
from data_pipelines.sources.files import expand_shards
from data_pipelines.tokenizers import SentencePieceTokenizer


def test_ranges_may_have_steps(tmp_path):
    assert expand_shards(str(tmp_path / "{008..016..4}.tar")) == [
        str(tmp_path / f"{n}.tar") for n in ("008", "012", "016")
    ]
    for pattern, words in (
        ("{0..4..0}", r"range {0\.\.4\.\.0} in .* in steps of 1 or more"),
        ("{4..0}", "must run upwards"),
        ("{0..99999999999}", "at most 10000000 numbers"),
        ("{a..e}", r"{a\.\.e} in .* is not a range of numbers"),
    ):
        with pytest.raises(ValueError, match=words):
            expand_shards(f"x-{pattern}.tar")


@pytest.mark.parametrize("name", ["{a}", "{a,b}", "dir [1]", "what?", "*", "{0..3}"])
def test_folders_and_files_that_look_like_patterns_are_taken_by_their_names(tmp_path, name, monkeypatch):
    for folder in (name, "a", "1"):
        (tmp_path / folder).mkdir(exist_ok=True)
        for file in ("x0.tar", "x1.tar", "{y}.tar"):
            (tmp_path / folder / file).touch()
    for path in (f"{tmp_path}/{name}", name):
        monkeypatch.chdir(tmp_path)
        assert (
            expand_shards(f"{path}/x*.tar")
            == expand_shards(f"{path}/x{{0,1}}.tar")
            == [f"{path}/x0.tar", f"{path}/x1.tar"]
        )
        assert expand_shards(f"{path}/{{y}}.tar") == [f"{path}/{{y}}.tar"]
    assert expand_shards(str(tmp_path / name)) == [str(tmp_path / name)]


def test_what_webdataset_takes(tmp_path):
    assert expand_shards("a.tar::b/{0..1}.tar") == ["a.tar", "b/0.tar", "b/1.tar"]
    assert expand_shards("https://x.y/a.tar::https://x.y/b.tar") == ["https://x.y/a.tar", "https://x.y/b.tar"]
    for url in ("zip://in/a.tar::https://x.y/b.zip", "simplecache::s3://b/a.tar"):
        assert expand_shards(url) == [url]
    with pytest.raises(ValueError, match="output of a command.*; name the files, or their URLs"):
        expand_shards("pipe:curl -s https://x.y/{0..3}.tar")


def test_a_rare_space_does_not_end_a_line():
    assert files.lines("\ufeffa\u2028b\r\nc\x0cd\n\ne".encode()) == ["a\u2028b", "c\x0cd", "", "e"]
    with pytest.raises(UnicodeDecodeError):
        files.lines(b"\xff")
    assert files.lines(b"\xff\n", "replace") == ["\ufffd"]


@pytest.mark.parametrize("read", [files.stat, SentencePieceTokenizer])
def test_a_note_of_git_lfs_is_named(tmp_path, read):
    (tmp_path / "a").write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d7a' * 16}\nsize 12345\n")
    with pytest.raises(UserError, match="a' is not the file, but Git LFS' note .*; get it with 'git lfs pull'"):
        read(str(tmp_path / "a"))
