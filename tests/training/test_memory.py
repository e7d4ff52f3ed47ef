"""A run with a memory of transitions: the same on every mesh, kept in the checkpoint, refused where it cannot be."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxrec.core.mesh import make_mesh
from jaxrec.data.evaluation_batches import EvaluationRows
from jaxrec.data.pipeline import train_batches
from jaxrec.embedding.placement import Columns, Rows
from jaxrec.embedding.table import to_logical
from jaxrec.models.memory import TransitionMemory
from jaxrec.models.two_tower import ITEM, TwoTowerConfig
from jaxrec.tasks.candidates import SampledSoftmax
from jaxrec.tasks.masked_item import MaskedItem
from jaxrec.tasks.next_item import NextItem
from jaxrec.training.inference import Inference
from jaxrec.training.memory import count_memory
from jaxrec.training.placed_tables import place_tables
from jaxrec.training.setup import place_batch
from jaxrec.training.state import abstract_checkpoint, from_checkpoint, to_checkpoint
from jaxrec.training.step import make_train_step

MEMORY = TransitionMemory(num_successors=6, window=3)
LENGTH, ROWS = 16, 16


@pytest.fixture(scope="module")
def with_memory(make, dataset):
    """Setup and fresh state on a mesh."""

    def on(mesh):
        model = TwoTowerConfig(encoder=make(mesh).model.encoder, item_dim=8, memory=MEMORY)
        setup = make(mesh, model=model, tasks={"next_item": NextItem()})
        memory = count_memory(MEMORY, setup.tables[ITEM], dataset, mesh)
        return setup, dataclasses.replace(setup.init_state(), memory=memory)

    return on


def run(setup, state, dataset, num_steps=3):
    step = make_train_step(setup.step, state, setup.mesh)
    losses = []
    for batch in train_batches(
        dataset, global_batch_size=ROWS, history_length=LENGTH, seed=0, stop_step=num_steps
    ):
        state, metrics = step(state, place_batch(batch, setup.mesh))
        losses.append(float(metrics["loss"]))
    return state, losses


def answers(setup, state, dataset):
    """What every user is told: vectors and added logits."""
    rows = EvaluationRows.make(dataset, "test", rows_per_batch=8, history_length=LENGTH)
    queries, extra = Inference(setup, state).queries(rows.build(0))
    return jax.tree.map(np.asarray, (queries, extra.item_ids, extra.values))


def learned(mesh, with_memory, dataset):
    """Losses, answers and the memory, which no step has changed."""
    with jax.set_mesh(mesh):
        setup, state = with_memory(mesh)
        before = jax.tree.map(lambda x: np.asarray(to_logical(x, 81)), state.memory)
        state, losses = run(setup, state, dataset)
        after = jax.tree.map(lambda x: np.asarray(to_logical(x, 81)), state.memory)
        jax.tree.map(np.testing.assert_array_equal, before, after)
        return losses, answers(setup, state, dataset), after


@pytest.fixture(scope="module")
def twin(with_memory, dataset):
    return learned(make_mesh((1, 1), jax.devices()[:1]), with_memory, dataset)


def test_items_lie_by_rows_as_their_memory_does(make):
    """With an output table no softmax reads the input table whole, and the planner could move it."""
    mesh = make_mesh((8, 1))
    with jax.set_mesh(mesh):
        model = TwoTowerConfig(encoder=make(mesh).model.encoder, item_dim=8, memory=MEMORY, output_table=True)
        setup = make(mesh, model=model, tasks={"next_item": NextItem()})
        sizes = {"global_batch_size": ROWS, "history_length": LENGTH}
        assert place_tables(setup, {}, **sizes).tables[ITEM].placement == Rows()
        with pytest.raises(
            ValueError, match="memory of transitions lies as it does, and so it must lie by Rows"
        ):
            place_tables(setup, {ITEM: Columns(parts=2)}, **sizes)


def test_every_mesh_learns_and_answers_the_same(mesh, with_memory, dataset, twin):
    losses, told, memory = twin
    other_losses, other_told, other_memory = learned(mesh, with_memory, dataset)
    np.testing.assert_allclose(losses, other_losses, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), told, other_told)
    jax.tree.map(np.testing.assert_array_equal, memory, other_memory)
    assert (told[1] > 0).any() and (told[2] > 0).any()


def test_an_answer_asks_what_training_asked(one_device, with_memory, dataset):
    """The latest events of a history give the same logits in an evaluation batch as in a training one."""
    setup, state = with_memory(one_device)
    rows = EvaluationRows.make(dataset, "test", rows_per_batch=8, history_length=LENGTH)
    batch = rows.build(0)
    _, extra = Inference(setup, state).queries(batch)
    memory = jax.tree.map(lambda x: np.asarray(to_logical(x, 81)), state.memory)
    items, segments = np.asarray(batch.batch.item_ids), np.asarray(batch.batch.segment_ids)
    for place in np.flatnonzero(np.asarray(batch.user_mask))[:10]:
        row, column = batch.rows[place], batch.columns[place]
        wanted = []
        for age in range(MEMORY.window):
            at = column - age
            same = at >= 0 and segments[row, at] == segments[row, column]
            wanted.append(memory["successors"][items[row, at]] if same else np.zeros(6, np.int32))
        np.testing.assert_array_equal(np.asarray(extra.item_ids[place]).reshape(3, 6), wanted)


def test_a_checkpoint_moves_between_meshes(mesh, with_memory, one_device):
    setup, state = with_memory(one_device)
    saved = jax.tree.map(np.asarray, to_checkpoint(state, setup.tables, one_device))
    with jax.set_mesh(mesh):
        other, fresh = with_memory(mesh)
        empty = other.init_state()
        assert not any(np.asarray(array).any() for array in empty.memory.values())
        shapes = abstract_checkpoint(empty, other.tables, mesh)
        placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), saved, shapes)
        restored = from_checkpoint(placed, other.tables, mesh, empty)
        for name, array in restored.memory.items():
            assert array.sharding.is_equivalent_to(fresh.memory[name].sharding, 2)
            np.testing.assert_array_equal(array, fresh.memory[name])


def test_a_state_without_a_memory_has_the_files_it_always_had(one_device, make):
    setup = make(one_device)
    assert "memory" not in to_checkpoint(setup.init_state(), setup.tables, one_device)


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        ({"masked": MaskedItem()}, r"task 'masked' \(MaskedItem\) takes none"),
        ({"next": NextItem(candidates=SampledSoftmax())}, r"task 'next' \(NextItem\) takes none"),
    ],
)
def test_tasks_that_cannot_use_it_are_told(one_device, make, tasks, said):
    model = TwoTowerConfig(item_dim=8, memory=MEMORY)
    with pytest.raises(ValueError, match=said):
        make(one_device, model=model, tasks=tasks)
