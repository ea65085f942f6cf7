"""The mean of several coarse networks, each on frames of its own size."""

import numpy as np
import pytest
import torch
from torch import nn

from ultrarefiner.models.ensemble import Ensemble, first_member
from ultrarefiner.models.weights import write_state_dict


class Remembers(nn.Module):
    """Logits of two classes that are the image, scaled; and the size that it was shown."""

    def __init__(self, scale):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(float(scale)))

    def forward(self, image):
        self.size = image.shape[-1]
        return torch.cat([-image, image], 1) * self.scale


def test_each_network_sees_its_own_size_and_the_logits_are_averaged():
    image = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ensemble = Ensemble([Remembers(1), Remembers(3)], [32, 32]).double()
    np.testing.assert_allclose(ensemble(image).detach(), torch.cat([-image, image], 1) * 2, atol=1e-12)
    other = Ensemble([Remembers(1), Remembers(1), Remembers(1)], [32, 48, 16])
    ramp = torch.linspace(0, 1, 32).view(1, 1, 1, 32).expand(1, 1, 32, 32)
    logits = other(ramp)
    assert logits.shape == (1, 2, 32, 32) and [member.size for member in other.members] == [32, 48, 16]
    # resampling leaves a ramp a ramp, but for the border (a step is 0.03)
    np.testing.assert_allclose(logits[0, 1, 8:-8, 8:-8].detach(), ramp[0, 0, 8:-8, 8:-8], atol=5e-4)


def test_the_gradient_reaches_every_network():
    ensemble = Ensemble([Remembers(1), Remembers(2)], [16, 24])
    ensemble(torch.rand(1, 1, 16, 16)).square().mean().backward()
    assert all(member.scale.grad.abs() > 0 for member in ensemble.members)


@pytest.mark.parametrize(
    ("network", "first"), [(Remembers(5), {}), (Ensemble([Remembers(5), Remembers(2)], [16, 16]), {"scale": 5})]
)
def test_the_first_networks_weights_are_found(network, first, tmp_path):
    write_state_dict(network.state_dict(), tmp_path / "coarse.safetensors")
    assert first_member(tmp_path / "coarse.safetensors") == first
