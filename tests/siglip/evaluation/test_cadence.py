"""Which evaluations are due after a step, and those that a time leaves out."""

import dataclasses

from siglip.evaluation.retrieval import Retrieval
from siglip.evaluation.suite import EvalConfig, run_due
from tests.siglip.evaluation.test_tasks import embedder, src  # noqa: F401


def test_evaluations_that_are_not_begun_in_time_come_first_the_next_time(embedder, monkeypatch):  # noqa: F811
    clock, ran = [0.0], []

    class Slow(Retrieval):
        def run(self, embedder):
            ran.append(self.dataset)
            clock[0] += 1
            return []

    monkeypatch.setattr("siglip.evaluation.suite.time.monotonic", lambda: clock[0])
    tasks = tuple(Slow("x.tar", name=name) for name in "abcd")
    config, evaluated = EvalConfig(tasks=tasks, every_steps=1), {}

    def ran_after(step, *, max_s=2.0, last=False, **cadences):
        nonlocal config
        if cadences:
            of = tuple((f"retrieval/{name}", every) for name, every in cadences.items())
            config = dataclasses.replace(config, every_steps_of=of)
        ran.clear()
        run_due(tasks, embedder, config.due(step, evaluated, last=last), max_s=max_s)
        evaluated.update({f"eval/retrieval/{name}": step for name in ran})
        return "".join(ran)

    assert [ran_after(step) for step in (1, 2, 3, 4)] == ["ab", "ac", "ad", "ab"]
    assert ran_after(5, a=0, b=100, d=7) == "c" and ran_after(7) == "cd"
    assert ran_after(8, a=10, b=3, c=9, max_s=1.0) == "b"  # put off at step 6, as d is now; c's turn is at step 9
    assert ran_after(9, max_s=1.0) == "d" and ran_after(10, max_s=1.0) == "a"  # the first never waits
    assert ran_after(10, last=True) == "bcd" and ran_after(10, last=True) == ""
    assert ran_after(11, last=True, max_s=1.0) == ran_after(12, max_s=0.0, last=True) == "abcd"
