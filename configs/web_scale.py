"""A billion items and two billion users: a plan for pods; nothing here needs one.

    python -m jaxrec.plan --config=configs/web_scale.py --topology=v5p:4x4x4

A 12-layer, 768-wide encoder over histories of 256, 1 billion item rows x 128 and 2 billion user rows x 64 (1.04 TB with
their optimizer's state), sampled softmax over 8,192 shared negatives, row-wise Adagrad, bfloat16 activations; the
encoder is whole on every chip (1 GB with its optimizer) and its gradients are summed over the chips in bfloat16.

At 256 positions `attention="auto"` holds the whole matrix of scores: compiled for a v5p, that takes less memory than
the kernel, whose turn comes above 512.
"""

from jaxrec.config import TrainConfig
from jaxrec.data.config import DataConfig
from jaxrec.data.synthetic import SyntheticEvents
from jaxrec.embedding.row_optimizer import RowAdagrad
from jaxrec.evaluation.config import EvaluationConfig
from jaxrec.losses.samplers import LogUniformSampler
from jaxrec.models.two_tower import TwoTowerConfig
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.tasks.candidates import SampledSoftmax
from jaxrec.tasks.next_item import NextItem
from jaxrec.training.optimizer import OptimizerConfig

CHIPS, ROWS_A_CHIP = 64, 32


def get_config() -> TrainConfig:
    """For 64 chips; `global_batch_size` grows with them."""
    return TrainConfig(
        name="web_scale",
        data=DataConfig(
            source=SyntheticEvents(num_items=1_000_000_000, num_users=2_000_000_000, events_per_user=50),
            history_length=256,
        ),
        model=TwoTowerConfig(
            encoder=EncoderConfig(
                embed_dim=768,
                num_layers=12,
                num_heads=12,
                mlp_dim=3072,
                max_positions=256,
                norm_position="pre",
                dropout_rate=0.0,
                attention_dropout_rate=0.0,
                embedding_dropout_rate=0.0,
                remat=True,
                scan_layers=True,
                gather_dtype="bfloat16",
                dtype="bfloat16",
            ),
            item_dim=128,
            user_dim=64,
            item_bias=False,
        ),
        tasks={"next_item": NextItem(candidates=SampledSoftmax(sampler=LogUniformSampler(num_samples=8192)))},
        optimizer=OptimizerConfig(
            learning_rate=3e-4, warmup_steps=2000, schedule="cosine", max_gradient_norm=1.0
        ),
        row_optimizer=RowAdagrad(learning_rate=0.02),
        num_train_steps=200_000,
        global_batch_size=CHIPS * ROWS_A_CHIP,
        log_every_steps=100,
        checkpoint_every_steps=2000,
        evaluation=EvaluationConfig(every_steps=0),
    )
