"""Signals while the loop waits for something, compiles, or is told to ignore them."""

import os
import signal
import threading
import time

import pytest

from siglip.training import signals
from siglip.training.loop import Interrupted, train
from siglip.workdir.checkpoint import read_run_params
from siglip.workdir.metrics import read_metrics
from tests.siglip.tiny_run import StopsAt, TinyBatches, scored, tiny_config, toy_program, train_toy, with_task
from tests.siglip.training.test_loop import two_devices  # noqa: F401


def test_an_evaluation_that_never_ends_is_left_after_a_signal_and_made_up_for(tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "WAIT_S", 0.1)
    config = tiny_config(tmp_path, **with_task(every_steps=4))

    def endless(params, due):
        os.kill(os.getpid(), signal.SIGHUP)
        while True:
            time.sleep(0.01)

    with pytest.raises(Interrupted, match="stopped by SIGHUP at step 4, which is saved"):
        train_toy(config, TinyBatches(), evaluate=endless)
    train_toy(config, TinyBatches(), evaluate=scored([0.5, 0.6]))
    scores = [line["eval/retrieval/toy/score"] for line in read_metrics(tmp_path) if "eval/retrieval/toy/score" in line]
    assert scores == [0.5, 0.6]


def test_a_signal_that_wakes_another_thread_is_answered_too(tmp_path, monkeypatch):
    """As the system may choose, or as if it came just before the main thread began to wait: that thread goes on waiting."""
    monkeypatch.setattr(signals, "WAIT_S", 0.1)

    class Hanging(TinyBatches):
        def __next__(self):
            if self.state()["position"] == 4:
                killer = threading.Timer(0.1, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGTERM))
                killer.start()
                time.sleep(300)
            return super().__next__()

    before = signal.getsignal(signal.SIGURG)
    with pytest.raises(Interrupted, match="stopped by SIGTERM at step 4, which is saved"):
        train_toy(tiny_config(tmp_path), Hanging())
    assert signal.getsignal(signal.SIGURG) == before


def test_preparations_that_never_end_are_left_after_a_signal(tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "WAIT_S", 0.1)

    def endless(step, params, stop_now):
        os.kill(os.getpid(), signal.SIGTERM)
        while True:
            time.sleep(0.01)

    with pytest.raises(Interrupted, match="at step 0"):
        train_toy(tiny_config(tmp_path), TinyBatches(), prepare=endless)
    train_toy(tiny_config(tmp_path), TinyBatches())


def test_a_signal_while_a_program_compiles_ends_the_process_as_if_there_were_no_run(tmp_path):
    ended = []
    config, before = tiny_config(tmp_path), signal.signal(signal.SIGTERM, lambda *_: ended.append(1))
    program = toy_program(config)

    def step(state, batch):
        if int(state.step) in (0, 3):
            os.kill(os.getpid(), signal.SIGTERM)
        return program.step(state, batch)

    try:
        with pytest.raises(Interrupted, match="at step 4"):
            train(config, TinyBatches(), program=program._replace(step=step))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended == [1]


def test_a_run_that_ignores_hangups_goes_on(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        train_toy(tiny_config(tmp_path), StopsAt(4, signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert read_run_params(tmp_path)[2] == 8
