"""A linear model as written without jensen in mind: other names of sites and plates, images, no ``n``."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from jensen.models import PPCA

ROWS, COLUMNS, D = 2, 3, 2


class Images(nn.Module):
    """PPCA of images [N, 2, 3], observed at site "pixels", with its posterior as guide, shifted and scaled."""

    def __init__(self, scale=1.0, shift=0.0):
        super().__init__()
        self.exact = PPCA(ROWS * COLUMNS, D).double()
        self.scale, self.shift = scale, shift
        with torch.no_grad():
            columns = torch.linalg.qr(torch.randn(ROWS * COLUMNS, D).double()).Q
            self.exact.weight.copy_(columns * torch.tensor([3.0, 1.5]))  # orthogonal: independent posteriors
            self.exact.mean.normal_()

    def model(self, images):
        with pyro.plate("rows", len(images)):
            code = pyro.sample("code", dist.Normal(images.new_zeros(D), 1.0).to_event(1))
            pixels = dist.Normal(self.exact.mean + code @ self.exact.weight.T, self.exact.noise)
            pyro.sample("pixels", pixels.to_event(1), obs=images.view(-1, ROWS * COLUMNS))

    def guide(self, images):
        posterior = self.exact.posterior(images.view(-1, ROWS * COLUMNS))
        sd = posterior.variance.sqrt()
        with pyro.plate("rows", len(images)):
            pyro.sample("code", dist.Normal(posterior.mean + self.shift * sd, self.scale * sd).to_event(1))

    def log_evidence(self, images):
        return self.exact.log_evidence(images.view(-1, ROWS * COLUMNS)).detach()


EXAMPLE = torch.ones(5, ROWS, COLUMNS, dtype=torch.float64)
