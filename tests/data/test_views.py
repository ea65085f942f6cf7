"""Ways to show an image, and back."""

import numpy as np
import pytest

from ultrarefiner.data.views import VIEWS, View, mean, views
from ultrarefiner.errors import UserError


@pytest.mark.parametrize("view", [View(), *(view for several in VIEWS.values() for view in several), View(True, 1.3)])
@pytest.mark.parametrize("shape", [(40, 61), (7, 5), (1, 1), (300, 3)])
def test_there_and_back(view, shape):
    image = np.random.default_rng(0).random(shape).astype(np.float32)
    back = view.back(view.show(image), shape)
    assert back.shape == shape and (back == image)[np.isfinite(back)].all()
    shown = view.show(image)
    if view.zoom < 1 and min(shape) > 5:
        assert np.isfinite(back).all() and np.allclose(np.divide(shown.shape, shape), 1 / view.zoom, atol=0.1)
    if view.zoom > 1 and min(shape) > 30:
        assert np.isfinite(back).mean() == pytest.approx(view.zoom**-2, abs=0.03) and np.isfinite(back[20, 30])


def test_the_mean_is_of_what_was_seen():
    seen, partly = np.full((2, 2), 0.2, np.float32), np.array([[0.6, np.nan], [0.2, 0.4]], np.float32)
    np.testing.assert_allclose(mean([seen, partly]), [[0.4, 0.2], [0.2, 0.3]], rtol=1e-6)


def test_names():
    assert views(None) == views([]) == views("none") == [View()]
    assert views("flips") == [View(), View(mirror=True)] and len(views(["flips", "scales", "flips"])) == 4
    with pytest.raises(UserError, match="tta=flop is not there; choose one or several of flips, scales, or none"):
        views(["flop"])
