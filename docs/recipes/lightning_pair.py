"""A model and a guide trained by Lightning."""

import lightning
import torch
from pyro.infer import Trace_ELBO


class LightningPair(lightning.LightningModule):
    """A model and a guide; the loss is minus the ELBO, in nats per data point."""

    def __init__(self, model, guide, lr=1e-3):
        super().__init__()
        self.model, self.guide, self.lr = model, guide, lr
        self.loss = Trace_ELBO().differentiable_loss

    def training_step(self, batch, _):
        """The loss of a batch."""
        (x,) = batch
        loss = self.loss(self.model, self.guide, x) / len(x)
        self.log("elbo", -loss.detach())
        return loss

    def configure_optimizers(self):
        """The optimizer of both modules."""
        return torch.optim.Adam(self.parameters(), self.lr)
