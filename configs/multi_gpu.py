"""ML-1M next item on all GPUs of one machine: the config of `ml1m_sasrec` with another mesh, nothing else.

launch/gpu_box.sh train --config=configs/multi_gpu.py --workdir=runs/multi_gpu
"""

import dataclasses

from configs import ml1m_sasrec
from jaxrec.config import TrainConfig


def get_config() -> TrainConfig:
    """All GPUs along `data`."""
    return dataclasses.replace(ml1m_sasrec.get_config(), mesh_shape=(-1, 1))
