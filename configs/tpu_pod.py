"""ML-1M next item on a TPU pod slice: the config of `ml1m_sasrec` with another mesh, nothing else.

launch/tpu_vm.sh train --config=configs/tpu_pod.py --workdir=gs://BUCKET/runs/tpu_pod
"""

import dataclasses

from configs import ml1m_sasrec
from jaxrec.config import TrainConfig


def get_config() -> TrainConfig:
    """Four chips of a host along `model`, the hosts along `data`."""
    return dataclasses.replace(ml1m_sasrec.get_config(), mesh_shape=(-1, 4))
