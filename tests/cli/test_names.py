"""The names of options stand for what the commands make of them."""

import pytest

from jensen.cli import names, pairs


@pytest.mark.parametrize("table", ["FAMILIES", "LIKELIHOODS", "MODELS", "OBJECTIVES"])
def test_every_name_stands_for_something(table):
    assert tuple(getattr(pairs, table)) == getattr(names, table)


def test_every_guide_of_train_serves_a_model():
    served = {guide for kind in pairs.MODELS.values() for guide in kind.guides}
    assert served == {*names.TRAINED}
