"""Options of the towers, trained: the same on every mesh as on one device, and refusals by name."""

import pytest

from jaxrec.models.two_tower import TwoTowerConfig
from jaxrec.nn.encoder import EncoderConfig


def test_a_time_bias_needs_times(make, one_device):
    model = TwoTowerConfig(encoder=EncoderConfig(time_bias=True))
    with pytest.raises(ValueError, match=r"time_bias=True needs the times .* data.columns.timestamp"):
        make(one_device, model=model)
