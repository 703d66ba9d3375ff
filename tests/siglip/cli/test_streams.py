"""Output that nobody reads any more, or whose encoding lacks a character, through real processes."""

import os
import subprocess
import sys

import pytest

WRITE = """
import sys
from siglip.cli import streams
streams.make_robust()
for number in range(int(sys.argv[1])):
    print("a line of a table …", number, flush=True)
    print("a message", file=sys.stderr)
open(sys.argv[2], "w").write("done")
"""


def start(*args, **kwargs):
    return subprocess.Popen([sys.executable, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)


def test_a_reader_that_goes_away_ends_nothing(tmp_path):
    process = start("-c", WRITE, "100000", tmp_path / "end")
    assert process.stdout.readline().endswith(b"0\n") and process.stderr.readline() == b"a message\n"
    process.stdout.close()
    process.stderr.close()
    assert process.wait(60) == 0 and (tmp_path / "end").read_text() == "done"


@pytest.mark.parametrize("closed", ["1", "2", "1,2"])
def test_output_that_was_closed_before_is_dropped_and_no_file_gets_its_number(tmp_path, closed):
    command = [sys.executable, "-c", WRITE, "3", str(tmp_path / "end")]
    program = f"import os\nfor number in ({closed},): os.close(number)\nos.execv({sys.executable!r}, {command})"
    process = start("-c", program)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and (tmp_path / "end").read_text() == "done"
    assert bool(out) == ("1" not in closed) and bool(err) == ("2" not in closed)


def test_a_full_disk_under_messages_ends_nothing_and_under_results_is_an_error(tmp_path):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", WRITE, "3", tmp_path / "end"]
        assert subprocess.run(command, stdout=subprocess.DEVNULL, stderr=full).returncode == 0
        assert subprocess.run(command, stdout=full, stderr=subprocess.DEVNULL).returncode != 0


@pytest.mark.parametrize("arg", ["--help", "--version"])
def test_results_that_a_full_disk_has_no_room_for_are_one_line(arg):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "siglip.cli", arg], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "siglip: error: standard output: No space left on device\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_an_encoding_that_lacks_a_character(encoding):
    process = start("-m", "siglip.cli", "--help", env=os.environ | {"PYTHONIOENCODING": encoding})
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and not err
    assert ("COMMAND …" if encoding == "utf-8" else "COMMAND \\u2026") in out.decode(encoding)


def test_a_message_is_out_at_the_end_of_its_line():
    program = "from siglip.cli import streams; import os, sys; streams.make_robust(); print('x', file=sys.stderr); os._exit(0)"
    assert start("-c", program).communicate(timeout=60)[1] == b"x\n"


@pytest.mark.parametrize("args, code", [(["--help"], 0), (["nonsense"], 2)])
def test_a_short_command_whose_reader_is_gone_ends_quietly(args, code):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "siglip.cli", *args], stdout=write, stderr=write if code else subprocess.PIPE, timeout=60
    )
    os.close(write)
    assert done.returncode == code and not done.stderr
