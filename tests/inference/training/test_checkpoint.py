"""A checkpoint is checked against a schema, and against the resumed model, guide and optimizer, before use."""

import pytest
import torch

from jensen.families import MeanField
from jensen.guides import ExactPosterior, amortize
from jensen.inference import Callback, History, fit, restore
from jensen.models import PPCA
from jensen.networks import mlp
from jensen.results.files import read_checkpoint, write_checkpoint


def _fit(path, epochs, **how):
    torch.manual_seed(0)
    model, x = PPCA(3, latent=2), torch.randn(20, 3)
    fit(model, ExactPosterior(model), x, epochs=epochs, checkpoint=path, progress=False, seed=0, **how)
    return model


def _damaged(path, change):
    """A changed checkpoint with a correct digest."""
    state = read_checkpoint(path)
    change(state)
    write_checkpoint(path, {name: v for name, v in state.items() if name not in ("jensen_checkpoint", "versions")})


def _moments(state, **parts):
    state["optimizer"]["state"][0].update(parts)


CHANGES = {
    "too few numbers": (lambda s: _moments(s, exp_avg=torch.zeros(1, 2)), r"exp_avg of torch.float32 \[1, 2\]"),
    "one number": (lambda s: _moments(s, exp_avg_sq=torch.zeros(())), r"exp_avg_sq of torch.float32 \[\]"),
    "another dtype": (lambda s: _moments(s, exp_avg=torch.zeros(3, 2).half()), "exp_avg of torch.float16"),
    "not finite": (lambda s: s["optimizer"]["state"][0]["exp_avg"].fill_(torch.nan), "not finite"),
    "many steps": (lambda s: _moments(s, step=torch.ones(5)), r"step of torch.float32 \[5\]"),
    "a state that is missing": (lambda s: s["optimizer"]["state"][0].pop("exp_avg"), "has the state"),
    "a state of no parameter": (lambda s: s["optimizer"]["state"].update({99: {}}), r"parameters \[99\]"),
    "a rate that is none": (lambda s: s["optimizer"]["param_groups"][0].update(lr=torch.nan), "lr=nan"),
    "a rate that is text": (lambda s: s["optimizer"]["param_groups"][0].update(lr="1"), "lr=1"),
    "one beta": (lambda s: s["optimizer"]["param_groups"][0].update(betas=[0.9]), "betas"),
    "other parameters": (lambda s: s["optimizer"]["param_groups"][0].update(params=[0]), "other parameter groups"),
    "an unknown setting": (lambda s: s["optimizer"]["param_groups"][0].update(more=1), r"\['more'\]"),
    "a list for an optimizer": (lambda s: s.update(optimizer=[]), "checkpoint.optimizer must be the object"),
    "no names": (lambda s: s.pop("names"), r"misses \['names'\]"),
    "an unknown field": (lambda s: s.update(more=1), r"\['more'\] are unknown"),
    "other precision": (lambda s: s.update(parameters=[p.double() for p in s["parameters"]]), "torch.float64"),
    "a curve that is too long": (lambda s: s["history"].update(learning_rate=[1.0] * 9), "learning_rate"),
    "a curve of text": (lambda s: s["history"].update(elbo=["a", "b"]), r"history.elbo\[0\] must be a number"),
    "steps below zero": (lambda s: s["history"].update(steps=-1), "steps"),
    "a best epoch to come": (lambda s: s["history"].update(best_epoch=7), "best_epoch"),
    "a random state of another kind": (lambda s: s.update(random=torch.zeros(3)), "no state of a generator"),
    "half a random state": (lambda s: s.update(random=s["random"][:100]), "another generator"),
    "an expanded tensor": (
        lambda s: s.update(parameters=[torch.zeros(()).expand(10**12), *s["parameters"][1:]]),
        "too few values",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_does_not_fit_is_refused_before_it_is_used(name, tmp_path):
    change, message = CHANGES[name]
    path = tmp_path / "checkpoint.pt"
    _fit(path, 2)
    _damaged(path, change)
    with pytest.raises(ValueError, match=message) as caught:
        _fit(path, 3, resume=True)
    assert str(path) in str(caught.value)
    assert "start again" in str(caught.value)


def test_a_value_is_not_spread_over_a_parameter(tmp_path):
    path = tmp_path / "checkpoint.pt"
    _fit(path, 1)
    _damaged(path, lambda s: s.update(parameters=[p.flatten()[:1] for p in s["parameters"]]))
    model = PPCA(3, latent=2)
    with pytest.raises(ValueError, match="does not fit this model and guide"):
        restore(model, ExactPosterior(model), path)


def test_swapped_arguments_of_restore_are_named(tmp_path):
    path = tmp_path / "checkpoint.pt"
    model = PPCA(3, latent=2)
    guide = amortize(model, mlp(3, [4]), MeanField, context=4)
    fit(model, guide, torch.randn(10, 3), epochs=1, checkpoint=path, progress=False)
    before = model.weight.clone()
    said = r"got model=Amortized and guide=PPCA, but .*call restore\(model, guide, checkpoint\) in this order"
    with pytest.raises(ValueError, match=said) as caught:
        restore(guide, model, path)
    assert "delete" not in str(caught.value)
    assert torch.equal(model.weight, before)


def test_restore_of_another_guide_names_both(tmp_path):
    path = tmp_path / "checkpoint.pt"
    _fit(path, 1)
    model = PPCA(3, latent=2)
    guide = amortize(model, mlp(3, [4]), MeanField, context=4)
    other = PPCA(3, latent=1)
    with pytest.raises(ValueError, match=r"does not belong to model=PPCA and guide=Amortized: only it has .*\[3, 2\]"):
        restore(other, guide, path)


def test_a_file_of_another_kind_is_not_advised_to_be_deleted(tmp_path):
    path = tmp_path / "history.json"
    path.write_text("{}")
    model = PPCA(3, latent=2)
    with pytest.raises(ValueError, match=r"give the file that fit\(\.\.\., checkpoint=\.\.\.\) wrote") as caught:
        restore(model, ExactPosterior(model), path)
    assert "delete" not in str(caught.value)


def test_an_unchanged_checkpoint_goes_on(tmp_path):
    path = tmp_path / "checkpoint.pt"
    _fit(path, 2)
    _damaged(path, lambda s: None)
    once, again = _fit(tmp_path / "other.pt", 4), _fit(path, 4, resume=True)
    assert torch.equal(once.weight, again.weight)


@pytest.mark.parametrize(
    "optimizer", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.NAdam, torch.optim.Rprop]
)
def test_other_optimizers_go_on_too(optimizer, tmp_path):
    once = _fit(tmp_path / "whole.pt", 4, optimizer=optimizer)
    _fit(tmp_path / "c.pt", 2, optimizer=optimizer)
    again = _fit(tmp_path / "c.pt", 4, optimizer=optimizer, resume=True)
    assert torch.equal(once.weight, again.weight)


def test_a_folder_that_was_removed_while_training_is_missed(tmp_path):
    class Remove(Callback):
        def after_epoch(self, history, model, guide):
            (tmp_path / "run" / "c.pt").unlink()
            (tmp_path / "run").rmdir()

    with pytest.raises(FileNotFoundError, match=r"c\.pt could not be written"):
        _fit(tmp_path / "run" / "c.pt", 2, callbacks=[Remove()])
    assert not (tmp_path / "run").exists()


def test_a_damaged_history_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    _fit(path, 1)
    _damaged(path, lambda s: s["history"].update(elbo=None))
    with pytest.raises(ValueError, match=r"damaged checkpoint: history\.elbo must be a list"):
        History.from_checkpoint(path)
