"""Who takes part and what they tell each other: processes are threads here."""

import json
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import jax.numpy as jnp
import pytest

from siglip.parallel.hub import Hub, listen
from siglip.parallel.peers import Alone, Peers
from siglip.training.divergence import LossWatch, NonFiniteLoss
from siglip.workdir.files import check_same_run, open_workdir

LIMIT_S = 1.0


class Job:
    """`count` threads that are processes; `ended` gets (exit code, message, seconds) of each."""

    def __init__(self, count, *, timeout_s=10.0):
        self.count, self.timeout_s = count, timeout_s
        self.hub = Hub(0, count=count, timeout_s=timeout_s, heartbeat_timeout_s=LIMIT_S)
        self.ended = [[] for _ in range(count)]
        self.peers = []

    def peer(self, index, count=None):
        def end(code, line):
            self.ended[index].append((code, line, time.monotonic()))

        return Peers(
            "localhost", self.hub.port, index=index, count=count or self.count,
            timeout_s=self.timeout_s, heartbeat_timeout_s=LIMIT_S, end=end,
        )  # fmt: skip

    def join(self):
        self.peers = together(self.peer, range(self.count))
        return self

    def all(self, function):
        """function(peers) in all threads at once."""
        return together(function, self.peers)

    def wait_for_ends(self, *indices, within_s=5.0):
        deadline = time.monotonic() + within_s
        while not all(self.ended[index] for index in indices) and time.monotonic() < deadline:
            time.sleep(0.01)
        return [self.ended[index][0][:2] if self.ended[index] else None for index in indices]


def together(function, arguments):
    with ThreadPoolExecutor(len(arguments)) as pool:
        return list(pool.map(function, arguments))


def hang_up(peers):
    """What the kernel does for a process that is killed."""
    peers._wire.socket.shutdown(socket.SHUT_RDWR)


def test_everyone_gets_everyones_values_in_order():
    job = Job(3).join()
    for _ in range(2):
        values = job.all(lambda peers: peers.gather("where", {"index": peers.index}))
        assert values == [[{"index": 0}, {"index": 1}, {"index": 2}]] * 3
    large = "x" * 1_000_000
    assert job.all(lambda peers: len(peers.gather("large", large)[2])) == [1_000_000] * 3
    with pytest.raises(TimeoutError, match="not every process has come to 'lonely'"):
        job.peers[0].gather("lonely", None, timeout_s=0.05)
    assert Alone().gather("where", 5) == [5]


def test_all_stop_after_the_same_step_though_they_are_at_different_ones():
    job = Job(3).join()

    def loop(peers):
        peers.begin(10)
        for step in range(11, 10_000):
            time.sleep(0.001 * (1 + 3 * peers.index))
            signum = peers.stop_after(step, 15 if peers.index == 2 and step > 15 else None)
            if signum is not None:
                return step, signum
        return None

    stops = job.all(loop)
    assert len(set(stops)) == 1 and stops[0][0] > 16 and stops[0][1] == 15


def test_a_signal_before_the_others_have_begun_waits_for_them():
    job = Job(2).join()

    def loop(peers):
        time.sleep(0.3 * peers.index)
        peers.begin(0)
        return next(step for step in range(1, 10_000) if peers.stop_after(step, 2 if peers.index == 0 else None))

    first, second = job.all(loop)
    assert first == second


def test_who_is_gone_is_told_at_once_with_how_to_go_on():
    job = Job(3).join()
    for peers in job.peers:
        peers.on_loss(lambda: "it goes on from step 7")
    began = time.monotonic()
    hang_up(job.peers[2])
    for code, line in job.wait_for_ends(0, 1):
        assert code == 1 and line.startswith("process 2 of 3 is gone (") and line.endswith("it goes on from step 7")
    assert max(job.ended[i][0][2] for i in (0, 1)) - began < LIMIT_S / 2


@pytest.mark.parametrize("kind", ["hangs", "fails"])
def test_an_advice_that_does_not_come_does_not_keep_the_process_alive(kind, monkeypatch):
    monkeypatch.setattr("siglip.parallel.peers._ADVICE_S", 0.3)
    job, released = Job(2).join(), threading.Event()

    def advice():
        if kind == "fails":
            raise OSError("the shared folder is gone")
        released.wait(60)
        return "too late"

    job.peers[0].on_loss(advice)
    hang_up(job.peers[1])
    try:
        ((code, line),) = job.wait_for_ends(0, within_s=3)
    finally:
        released.set()
    assert code == 1 and line.startswith("process 1 of 2 is gone (")
    assert line.endswith("); start the same command again on every host")


def test_who_does_not_read_is_dropped_and_gets_no_garbled_lines():
    job, rounds, large = Job(2), 12, "x" * 1_000_000
    with socket.socket() as slow, ThreadPoolExecutor(1) as pool:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", job.hub.port))
        lines = [{"kind": "hello", "index": 1, "count": 2}]
        lines += [{"kind": "gather", "name": f"large {n + 1}", "value": 0} for n in range(rounds)]
        slow.sendall(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        peers = pool.submit(job.peer, 0).result()
        for n in range(rounds):
            peers._wire.send({"kind": "gather", "name": f"large {n + 1}", "value": large})
        ((code, line),) = job.wait_for_ends(0)
        assert code == 1 and "process 1 of 2 is gone (it takes in no messages: timed out)" in line
        slow.settimeout(5)
        *whole, _ = b"".join(iter(lambda: slow.recv(1 << 20), b"")).split(b"\n")
        assert [json.loads(line)["kind"] for line in whole][0] == "welcome"


def test_messages_in_pieces_and_what_is_no_message():
    ended = []
    with listen(0, "127.0.0.1") as server, ThreadPoolExecutor(1) as pool:
        joining = pool.submit(
            Peers, "127.0.0.1", server.getsockname()[1], index=1, count=2, timeout_s=5, heartbeat_timeout_s=LIMIT_S,
            end=lambda code, line: ended.append((code, line)),
        )  # fmt: skip
        connection, _ = server.accept()
        with connection:
            for piece in (b'{"kind": "wel', b'come"}', b"\n"):
                connection.sendall(piece)
                time.sleep(0.1)
            joining.result()
            connection.sendall(b"7\n")
            deadline = time.monotonic() + 5
            while not ended and time.monotonic() < deadline:
                time.sleep(0.01)
    assert len(ended) == 1 and "process 0 of 2 is gone (connection lost: not a message of this program)" in ended[0][1]


def test_a_silent_host_is_missed_after_the_limit():
    job = Job(2)
    with socket.create_connection(("localhost", job.hub.port)) as silent, ThreadPoolExecutor(1) as pool:
        peers = pool.submit(job.peer, 0)
        silent.sendall(b'{"kind": "hello", "index": 1, "count": 2}\n')
        peers.result()
        began = time.monotonic()
        ((code, line),) = job.wait_for_ends(0)
        assert code == 1 and "process 1 of 2 is gone (no heartbeat for 1 s)" in line
        assert LIMIT_S / 2 < time.monotonic() - began < 3 * LIMIT_S


def test_the_end_of_one_is_the_end_of_all_with_its_reason():
    job = Job(3).join()
    job.peers[1].leave(2, "the picture is upside down")
    ends = job.wait_for_ends(0, 1, 2)
    assert ends[1] == (2, "the picture is upside down")
    assert ends[0] == ends[2] == (2, "process 1 stopped: the picture is upside down")


def test_after_the_finish_nobody_is_missed():
    job = Job(2).join()
    job.all(lambda peers: peers.finish())
    job.peers[1].leave(1, "too late to matter")
    hang_up(job.peers[0])
    time.sleep(0.2)
    assert job.ended == [[], []]


def test_somebody_never_comes():
    job = Job(4, timeout_s=0.5)
    refused = pytest.raises(
        ValueError, match=r"2 of 4 processes did not join process 0 .*missing: 1, 3\); start the same"
    )
    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(job.peer, index) for index in (0, 2)]:
            with refused:
                future.result()
            refused = pytest.raises(ValueError, match="did not join")


def test_processes_that_disagree_about_the_job():
    job = Job(3)
    with pytest.raises(
        ValueError, match="process 1 was told that there are 4 processes, process 0 that there are 3; give"
    ):
        job.peer(1, count=4)
    job = Job(3)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(job.peer, 1)
        while not job.hub._guests:
            time.sleep(0.01)
        with pytest.raises(ValueError, match="two processes say that they are process 1 of 3"):
            job.peer(1)
        with pytest.raises(ValueError, match="two processes"):
            first.result()


def pester(port):
    """What a port scanner, another program or another job may send."""
    for junk in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"7\n",
        b"[" * 50_000 + b"\n",
        b"x" * 200_000,  # and no end of the line
        b'{"kind": "gather"}\n',
        b'{"kind": "x"}\n{"kind": "y"}\n',
        b'{"kind": "hello", "index": 1, "count": 2}\n{"kind": "gather"}\n',
    ):
        # Whom the hub hangs up on before it has read everything sees a reset.
        with suppress(ConnectionError), socket.create_connection(("localhost", port)) as stranger:
            stranger.sendall(junk)
            stranger.settimeout(5)
            answer = b"".join(iter(lambda: stranger.recv(1000), b""))  # noqa: B023
            assert not answer or (b"hello" in junk and b"refused" in answer)
    for _ in range(20):  # whether the answer meets the reset is chance
        with socket.create_connection(("localhost", port)) as stranger:
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            stranger.sendall(b'{"kind": "hello", "index": [], "count": 2}\n')


def test_strangers_do_no_harm():
    job = Job(2)
    pester(job.hub.port)
    job.join()
    pester(job.hub.port)
    with socket.create_connection(("localhost", job.hub.port)) as stranger:
        stranger.sendall(b'{"kind": "hello", "index": 1, "count": 2}\n')
        assert b"refused" in stranger.recv(1000)
    assert job.all(lambda peers: peers.gather("still", 1)) == [[1, 1]] * 2 and job.ended == [[], []]


def test_processes_must_agree_and_see_one_folder(tmp_path):
    job = Job(2).join()
    (tmp_path / "elsewhere").mkdir()

    def failure(function):
        def call(peers):
            with pytest.raises(ValueError) as error:
                function(peers)
            return str(error.value)

        return call

    def agree(peers):
        config = {
            "optim": {"lr": peers.index},
            "data": {"workers": peers.index},
            "distributed": {"process_id": peers.index},
        }
        check_same_run(peers, config=config, data_state={"fingerprint": "a"}, tokenizer=b"t")

    lines = job.all(failure(agree))
    assert lines[0] == lines[1] and "optim.lr is 0 in process 0 and 1 in process 1; start the same command" in lines[0]

    def agree_on_data(peers):
        check_same_run(peers, config={}, data_state={"fingerprint": "ab"[peers.index]}, tokenizer=b"t")

    assert "data.fingerprint is 'a' in process 0 and 'b' in process 1" in job.all(failure(agree_on_data))[0]

    def look_elsewhere(peers):
        open_workdir(tmp_path / ("elsewhere" if peers.index else "run"), {}, peers=peers)

    for line in job.all(failure(look_elsewhere)):
        assert "process 1 does not see" in line and "give --workdir a folder that all hosts share" in line
    job.all(lambda peers: open_workdir(tmp_path / "run", {}, peers=peers))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_a_bad_batch_is_told_with_everyones_keys(tmp_path):
    job = Job(2).join()

    def diverge(peers):
        losses = LossWatch(tmp_path, peers, saved_step=lambda: 4)
        good = {"train/loss": jnp.float32(1), "train/update_norm": jnp.float32(1)}
        losses.add(5, good, ["fine"])
        losses.add(6, good | {"train/loss": jnp.float32(jnp.inf)}, [f"a{peers.index}", f"b{peers.index}"])
        with pytest.raises(NonFiniteLoss, match="at step 6; .* checkpoint is step 4"):
            losses.look()

    job.all(diverge)
    told = json.loads((tmp_path / "non_finite_batch.json").read_text())
    assert told == {"step": 6, "loss": "inf", "keys": ["a0", "b0", "a1", "b1"]}


def test_no_thread_is_left_behind_by_a_finished_job():
    before = threading.active_count()
    job = Job(2).join()
    job.all(lambda peers: peers.finish())
    for peers in job.peers:
        hang_up(peers)
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before
