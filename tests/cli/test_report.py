"""Figures of a report that compare several models."""

import torch

from jensen.cli.report import aligned


def _rotation(seed, features=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(features, features, generator=generator).double()).Q


def test_latent_spaces_that_differ_by_a_rotation_have_one_map():
    z = torch.randn(100, 4).double() * torch.tensor([3.0, 2.0, 1.0, 0.5])
    maps, shares = aligned([z, z @ _rotation(1) + 7.0, 0.5 * z @ _rotation(2)])
    torch.testing.assert_close(maps[1], maps[0])
    torch.testing.assert_close(maps[2], 0.5 * maps[0])
    torch.testing.assert_close(torch.tensor(shares), torch.ones(3))
    principal = torch.linalg.svd(z - z.mean(0)).S[:2]
    torch.testing.assert_close(maps[0].square().sum(0).sqrt(), principal)


def test_spaces_that_share_nothing_are_said_to():
    z, other = torch.randn(2, 20_000, 2).double()
    maps, shares = aligned([z, other])
    assert shares[1] < 0.01
    assert maps[1].shape == (20_000, 2)
