"""Recordings of CUDA graphs, with a stand-in for the recorder: it needs no GPU, and replays as CUDA does."""

import pytest
import torch

from jensen.graphs import recorded as recording
from jensen.graphs.capture import capture
from jensen.graphs.recorded import Recorded, cuda_graphs, recordable, written_inputs


def step(p, rate, x):
    """A step that writes to p."""
    loss = (p * x).sum().reshape(1)
    p.sub_(rate * x)
    return (loss,)


@pytest.fixture
def replayed(monkeypatch):
    """The number of replays; what is recorded does not run, and every replay writes to the same results."""
    made = []

    def record(fn):
        inputs = fast._inputs
        before = [t.clone() for t in inputs]
        outputs = fn()
        for t, old in zip(inputs, before, strict=True):
            t.copy_(old)

        def replay():
            made.append(None)
            for result, value in zip(outputs, fn(), strict=True):
                result.copy_(value)

        return replay, outputs

    fast = Recorded(step, frozenset({0}))
    monkeypatch.setattr(recording, "_record", record)
    return fast, made


def test_a_recorded_step_gives_the_numbers_of_the_step(replayed):
    fast, made = replayed
    torch.manual_seed(0)
    p, rate, batches = torch.randn(4), torch.tensor([0.1]), torch.randn(20, 4)
    q, losses, expected = p.clone(), [], []
    for i, x in enumerate(batches):
        if i == 12:  # user code assigns p.data
            p = p.clone()
        losses.append(fast(p, rate, x)[0])
        expected.append(step(q, rate, x)[0])
    assert torch.equal(torch.cat(losses), torch.cat(expected))
    assert torch.equal(p, q)
    assert len(made) >= 16
    assert fast.recordings <= 3


def test_a_function_whose_written_inputs_never_stay_runs_unrecorded(replayed):
    fast, made = replayed
    kept = [torch.randn(4) for _ in range(30)]
    for p in kept:
        fast(p, torch.tensor([0.1]), torch.ones(4))
    assert len(made) == fast.recordings == 8


def test_a_function_that_cannot_be_recorded_runs(monkeypatch):
    def record(fn):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(recording, "_record", record)
    fast, p = Recorded(step, frozenset({0})), torch.ones(4)
    for _ in range(4):
        fast(p, torch.tensor([0.5]), torch.ones(4))
    assert torch.equal(p, -torch.ones(4))
    assert not fast._inputs


def test_the_inputs_that_a_graph_writes_to():
    graph = capture(lambda a, b, c: (a.view(-1)[:1].add_(1), b * c)[1:], torch.ones(2), torch.ones(2), torch.ones(2))
    assert written_inputs(graph) == {0}


def test_tensors_of_the_processor_are_not_recorded():
    cuda_graphs(True)
    try:
        assert not recordable([torch.ones(2)])
    finally:
        cuda_graphs(False)
