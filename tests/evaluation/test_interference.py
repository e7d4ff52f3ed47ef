"""Cosines between the gradients of tasks: the summary against NumPy, the parts of a model, the drawing."""

import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec import interference
from jaxrec.evaluation.interference import heat_map, matrix, part_of, summary

TASKS = ("a", "b", "c")


def gradients(seed, num_batches=5):
    """Of three tasks, the last of which is silent on the first batch, and everywhere in its own part."""
    found = np.random.default_rng(seed).standard_normal((num_batches, 3, 4))
    found[0, 2] = 0.0
    return found


def products(found):
    return np.einsum("nip,njp->nij", found, found)


@settings(max_examples=5)
@given(st.integers(0, 2**31 - 1))
def test_the_summary_is_that_of_the_cosines(seed):
    found = gradients(seed)
    values = summary({"all": products(found)}, TASKS)["parts"]["all"]
    np.testing.assert_allclose(
        list(values["norms"].values()), np.linalg.norm(found, axis=-1).mean(0), rtol=1e-6
    )
    for pair, (i, j), first in zip(values["pairs"], [(0, 1), (0, 2), (1, 2)], [0, 1, 1], strict=True):
        cosines = [g[i] @ g[j] / np.linalg.norm(g[i]) / np.linalg.norm(g[j]) for g in found[first:]]
        assert pair["tasks"] == [TASKS[i], TASKS[j]]
        np.testing.assert_allclose(pair["cosine"], np.mean(cosines), rtol=1e-6)
        assert min(cosines) <= pair["interval"][0] <= pair["cosine"] <= pair["interval"][1] <= max(cosines)
        assert pair["num_batches"] == len(cosines)
        assert pair["conflicting_batches"] == sum(cosine < 0 for cosine in cosines)


def test_parts_stand_in_the_order_of_the_model_and_silent_pairs_have_no_cosine():
    own = gradients(0) * np.array([1.0, 0.0, 0.0])[:, None]
    found = dict.fromkeys(["head", "block 10", "block 2", "all", "embedding"], products(own))
    values = summary(found, TASKS)
    assert list(values["parts"]) == ["all", "embedding", "block 2", "block 10", "head"]
    assert values["parts"]["head"]["pairs"] == []
    assert np.isnan(matrix(values, "head")).all()
    assert ET.fromstring(heat_map(values)).tag.endswith("svg")


def test_the_drawing_brings_its_colours_and_says_its_numbers():
    values = summary({"all": products(gradients(1))}, TASKS)
    drawing = heat_map(values)
    assert drawing == heat_map(values)
    assert "--series-1: #" in drawing
    assert f"a and b {matrix(values, 'all')[0, 1]:+.2f}" in ET.fromstring(drawing).get("aria-label")


@pytest.mark.parametrize(
    ("path", "part"),
    [
        (["encoder", "blocks", 3, "mlp_in", "kernel"], "block 3"),
        (["encoder", "position_table"], "embedding"),
        (["event_in", "kernel"], "embedding"),
        (["encoder", "final_norm", "scale"], "final_norm"),
        (["behaviour_head", "out", "bias"], "behaviour_head"),
    ],
)
def test_the_parts_of_a_model(path, part):
    assert part_of(path) == part


def test_one_batch_has_no_interval(capsys):
    with pytest.raises(SystemExit):
        interference.main(["--workdir=w", "--batches=1"])
    assert "an interval takes at least 2 batches" in capsys.readouterr().err
