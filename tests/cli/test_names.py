"""The names of options stand for what the commands make of them."""

from typing import get_args

import pytest

from jensen.cli import names, pairs
from jensen.inference.training.averaging import Averaging
from jensen.inference.training.schedules import Schedule


@pytest.mark.parametrize("table", ["FAMILIES", "LIKELIHOODS", "MODELS", "OBJECTIVES"])
def test_every_name_stands_for_something(table):
    assert tuple(getattr(pairs, table)) == getattr(names, table)


def test_schedules_and_averages_are_those_of_fit():
    assert get_args(Schedule) == names.SCHEDULES
    assert get_args(Averaging) == names.AVERAGES


def test_every_guide_of_train_serves_a_model():
    served = {guide for kind in pairs.MODELS.values() for guide in kind.guides}
    assert served == {*names.TRAINED}
