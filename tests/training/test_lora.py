"""Adapters in a step: trained alike in every layout, over kernels that keep their bits."""

import dataclasses

import jax
import numpy as np

from jaxrec.core.mesh import make_mesh
from jaxrec.data.pipeline import train_batches
from jaxrec.models.two_tower import TwoTowerConfig
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.tasks.next_item import NextItem
from jaxrec.training.optimizer import OptimizerConfig
from jaxrec.training.rates import by_path
from jaxrec.training.setup import place_batch
from jaxrec.training.step import make_train_step


def test_every_layout_trains_the_adapters_alone(make, dataset):
    losses = {}
    encoder = EncoderConfig(
        embed_dim=8, num_layers=1, num_heads=2, mlp_dim=8, max_positions=16, lora_rank=2,
        dropout_rate=0.0, attention_dropout_rate=0.0, embedding_dropout_rate=0.0,
    )  # fmt: skip
    meshes = {
        "replicated": make_mesh((1, 1), jax.devices()[:1]), "fsdp": make_mesh((8, 1)), "tensor": make_mesh((4, 2))
    }  # fmt: skip
    for layout, mesh in meshes.items():
        with jax.set_mesh(mesh):
            model = TwoTowerConfig(encoder=dataclasses.replace(encoder, layout=layout), item_dim=8)
            optimizer = OptimizerConfig(learning_rate=0.05, weight_decay=0.1, rates={"projection": 0.0})
            setup = make(mesh, model=model, tasks={"next_item": NextItem()}, optimizer=optimizer)
            state = setup.init_state()
            before = by_path(jax.tree.map(np.array, state.dense))
            step = make_train_step(setup.step, state, mesh)
            losses[layout] = []
            for batch in train_batches(dataset, global_batch_size=16, history_length=16, seed=0, stop_step=3):
                state, metrics = step(state, place_batch(batch, mesh))
                losses[layout].append(float(metrics["loss"]))
            after = by_path(state.dense)
        kept = {path for path, x in before.items() if x.tobytes() == np.asarray(after[path]).tobytes()}
        assert kept - {"mask_vector"} == {
            "projection", *(path for path in before if "blocks" in path and path.endswith("kernel"))
        }  # fmt: skip
    for layout in ("fsdp", "tensor"):
        np.testing.assert_allclose(losses[layout], losses["replicated"], rtol=1e-4, err_msg=layout)
