"""Pruning: a part that does nothing is found and taken out, and what is left gives the same."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxrec.compression.methods import MethodRefusedError
from jaxrec.compression.pruning import PrunedHeads, PrunedLayers, head_axes, without_layer
from jaxrec.compression.served import compressed_run
from jaxrec.data.dataset import PreparedDataset
from jaxrec.nn.encoder import EncoderConfig


def same_queries(source, model):
    """The largest difference of the users' queries between a source and a model made of it."""
    mesh = source.setup.mesh
    with jax.set_mesh(mesh):
        batches = PrunedHeads().batches(source)
        runs = [compressed_run(one, source.dataset, mesh) for one in (source.original(), model)]
        a, b = ([np.asarray(run.query_fn(batch)[0]) for batch in batches] for run in runs)
    return max(np.abs(x - y).max() for x, y in zip(a, b, strict=True))


def test_the_head_that_does_nothing_goes(make_source):
    """Another one in each layer."""

    def silence(name, x):
        return x.at[int(name.split(".")[2])].set(0.0) if name.endswith("attention.out_kernel") else x

    source = make_source(change=silence)
    with jax.set_mesh(source.setup.mesh):
        model = PrunedHeads().compress(source)
    encoder = model.config.model.encoder
    assert (encoder.num_heads, encoder.head_dim, encoder.embed_dim) == (1, 8, 16)
    assert model.codes["dense.encoder.blocks.0.attention.qkv_kernel"].shape == (16, 3, 1, 8)
    assert model.num_bytes < source.original().num_bytes
    assert same_queries(source, model) < 1e-5


def test_the_layer_that_does_nothing_goes(make_source):
    def silence(name, x):
        of_output = any(part in name for part in ("attention.out", "mlp_out"))
        return 0.0 * x if name.startswith("encoder.blocks.0.") and of_output else x

    source = make_source(change=silence)
    with jax.set_mesh(source.setup.mesh):
        model = PrunedLayers().compress(source)
    assert model.config.model.encoder.num_layers == 1
    kept = model.codes["dense.encoder.blocks.0.mlp_in.kernel"].values
    np.testing.assert_array_equal(kept, source.arrays["dense.encoder.blocks.1.mlp_in.kernel"])
    assert same_queries(source, model) < 1e-5


def test_every_parameter_of_a_head_is_cut(make_source, config_of_small_runs):
    encoder = EncoderConfig(
        embed_dim=16,
        num_layers=1,
        num_heads=4,
        mlp_dim=8,
        max_positions=12,
        positions="relative",
        lora_rank=2,
    )
    source = make_source(dataclasses.replace(config_of_small_runs(encoder), init_from="elsewhere"))
    axes = {name.rpartition("blocks.0.attention.")[2]: axis for name, axis in head_axes(source.setup).items()}
    assert axes == {
        "qkv_kernel": 2,
        "qkv_bias": 1,
        "out_kernel": 0,
        "relative_bias.distance": 0,
        "qkv_lora.b": 2,
        "out_lora.a": 0,
    }


def test_histories_of_the_training_part_need_no_target(make_source, small_dataset):
    """With validation=false nobody has a validation event."""
    source, whole = make_source(), small_dataset.histories(np.arange(60))
    end = small_dataset.lengths - 1
    unvalidated = PreparedDataset.from_histories(whole, num_items=300, train_end=end, validation_end=end)
    batches = PrunedHeads(num_users=20).batches(dataclasses.replace(source, dataset=unvalidated))
    asked = np.concatenate([batch.user_indices[batch.user_mask] for batch in batches])
    assert len(set(asked)) == 20
    for batch in batches:
        for place, user in enumerate(batch.user_indices):
            if user >= 0:
                last = batch.batch.item_ids[batch.rows[place], batch.columns[place]]
                assert last == whole.item_ids[whole.offsets[user] + end[user] - 1]


def test_layers_above_move_down():
    arrays = {f"dense.encoder.blocks.{i}.x": i for i in range(11)} | {"table.item": "rows"}
    left = without_layer(arrays, 9)
    assert left == {f"dense.encoder.blocks.{i}.x": i for i in range(9)} | {
        "dense.encoder.blocks.9.x": 10,
        "table.item": "rows",
    }


def test_a_pruned_model_is_a_run_to_start_from(make_source, tmp_path):
    source = make_source()
    with jax.set_mesh(source.setup.mesh):
        method = PrunedLayers()
        model = method.compress(source)
        method.finish(tmp_path, source, model)
    config = (tmp_path / "run" / "config.json").read_text()
    assert '"num_layers": 1' in config
    assert (tmp_path / "run" / "checkpoints" / "0").is_dir()


def test_what_cannot_be_pruned_says_why(make_source, config_of_small_runs):
    one = EncoderConfig(embed_dim=16, num_layers=1, num_heads=1, mlp_dim=8, max_positions=12)
    source = make_source(config_of_small_runs(one))
    with jax.set_mesh(source.setup.mesh):
        with pytest.raises(MethodRefusedError, match="1 heads, and keep=0.5 leaves all"):
            PrunedHeads().compress(source)
        with pytest.raises(MethodRefusedError, match="1 layers, and keep=0.5 leaves all"):
            PrunedLayers().compress(source)
    with pytest.raises(ValueError, match="0 < keep < 1"):
        PrunedLayers(keep=1.0)
