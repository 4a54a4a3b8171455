"""The recipe of the page "Beyond one machine": Lightning trains a pair as fit does. Needs lightning."""

import pytest
import torch
from torch import nn

from jensen.families import FullCovariance
from jensen.guides import amortize
from jensen.inference import evaluate, fit
from jensen.models import PPCA

pytestmark = pytest.mark.lightning


def elbo(model, guide, x):
    return evaluate(model, guide, x, 20, seed=0, refine=False, progress=False)


@pytest.mark.filterwarnings("ignore")  # of Lightning: of workers, loggers and devices that are not used
def test_lightning_trains_a_pair_as_fit_does(tmp_path, monkeypatch):
    import lightning
    from lightning_pair import LightningPair
    from torch.utils.data import DataLoader, TensorDataset

    monkeypatch.chdir(tmp_path)
    with torch.no_grad():
        x = PPCA(6, 2)(n=256)
    best = float(PPCA(6, 2).fit_closed_form(x).log_evidence(x).mean())

    def pair():
        torch.manual_seed(1)
        model = PPCA(6, 2)
        return model, amortize(model, nn.Identity(), FullCovariance, context=6)

    model, guide = pair()
    before = {name: p.detach().clone() for half in (model, guide) for name, p in half.named_parameters()}
    module = LightningPair(model, guide, lr=0.01)
    assert set(module.parameters()) == {*model.parameters(), *guide.parameters()}
    how = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_epochs=300, enable_model_summary=False, **how)
    trainer.fit(module, DataLoader(TensorDataset(x), batch_size=64, shuffle=True))
    found = elbo(model, guide, x)
    assert all(not torch.equal(p, before[name]) for half in (model, guide) for name, p in half.named_parameters())

    own, own_guide = pair()
    fit(own, own_guide, x, lr=0.01, epochs=300, batch_size=64, seed=0, progress=False)
    other = elbo(own, own_guide, x)
    for result in (found, other):
        assert abs(float(result.elbo.mean()) - best) < 0.1
    assert abs(float(found.elbo.mean() - other.elbo.mean())) < 0.05
    assert float((found.log_evidence - found.exact).abs().max()) < 0.5
