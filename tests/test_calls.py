"""Calls with unsuitable arguments raise an error of jensen: a seeded sample of them."""

import pytest
from calls import Calls, outcome

from jensen.inference import IWAE
from jensen.models import PPCA


@pytest.mark.parametrize("seed", range(4))
def test_generated_calls_return_or_say_in_a_sentence_what_is_wrong(seed):
    calls = Calls(seed)
    found = [result for result in (calls.one() for _ in range(600)) if result is not None]
    assert not found, "\n".join(map(str, found))


def test_foreign_errors_and_calls_that_do_not_end_are_noticed(monkeypatch):
    monkeypatch.setattr("calls.SECONDS", 0.2)

    def forever(x):
        while True:
            pass

    assert outcome("forever(x=1)", forever, {"x": 1}).what == "hangs"
    assert "not supported between" in outcome("lambda(x='a')", lambda x: x < 1, {"x": "a"}).what
    assert outcome("PPCA(features='a')", PPCA, {"features": "a", "latent": 2}) is None
    assert "named argument" not in str(outcome("IWAE(num_particles=0)", IWAE, {"num_particles": 0}))
