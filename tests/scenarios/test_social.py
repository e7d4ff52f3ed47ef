"""Friends on lastfm-2k: what training may see, and one short run from end to end."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from jaxrec import evaluate, recommend, train
from jaxrec.config import load_config
from jaxrec.data.dataset import PreparedDataset
from jaxrec.evaluation.kinds import people_of

pytestmark = pytest.mark.shared_data

SIZES = {"embed_dim": 8, "num_heads": 1, "mlp_dim": 8}
AGGREGATIONS = ("average", "multiplicative", "least_misery", "most_pleasure", "fair")


@pytest.fixture(scope="module")
def workdir(shared_data, repository, tmp_path_factory):
    """Two steps of a model as small as can be, evaluated."""
    path = tmp_path_factory.mktemp("social")
    status = train.main(
        [
            f"--config={repository}/configs/social.py",
            f"--workdir={path}",
            f"--config.data.source.path={shared_data}/lastfm-2k",
            "--config.num_train_steps=2",
            "--config.model.item_dim=8",
            "--config.data.history_length=48",
            "--config.evaluation.every_steps=0",
            "--config.evaluation.baselines=popularity,item_knn",
            "--config.evaluation.bootstrap_samples=100",
            *(f"--config.evaluation.groups.{name}.pool=50" for name in AGGREGATIONS),
            *(f"--config.model.encoder.{name}={value}" for name, value in SIZES.items()),
        ]
    )
    assert status == 0
    assert evaluate.main([f"--workdir={path}"]) == 0
    return path


def edges_of(dataset, part):
    """Directed pairs of user indices, of a part of the histories: 0 = training."""
    people = people_of(dataset)
    user_of = dict(zip(people.tolist(), range(len(people)), strict=True))
    cuts = (np.zeros_like(dataset.lengths), dataset.train_end, dataset.validation_end, dataset.lengths)
    histories = dataset.histories(np.arange(len(people)))
    return {
        (user, user_of[item])
        for user in range(len(people))
        for item in histories.item_ids[histories.offsets[user] :][
            cuts[part][user] : cuts[part + 1][user]
        ].tolist()
        if user_of.get(item, user) != user
    }


def test_no_held_out_edge_is_trained_on_in_either_direction(workdir, shared_data):
    dataset = PreparedDataset.open(workdir / "data")
    assert dataset.metadata.num_users == 1892
    assert np.bincount(dataset.item_kinds).tolist() == [1, 17632, 1892]
    parts = [edges_of(dataset, part) for part in range(3)]
    for part in parts:
        assert part == {(friend, user) for user, friend in part}
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    index = {key: user for user, key in enumerate(dataset.user_keys)}
    table = pq.read_table(shared_data / "lastfm-2k" / "friends.parquet").to_pylist()
    assert set.union(*parts) == {(index[str(r["user_id"])], index[str(r["friend_id"])]) for r in table}
    assert [len(part) / len(table) for part in parts] == pytest.approx([0.8, 0.1, 0.1], abs=0.01)


def test_the_evaluation_speaks_of_friends_artists_and_groups(workdir):
    values = json.loads((workdir / "evaluation.json").read_text())
    people, artists = values["kinds"]["people"], values["kinds"]["items"]
    assert people["num_candidates"] == 1892
    assert artists["num_candidates"] == 17632
    found = {name: system["metrics"]["ndcg@10"] for name, system in people["systems"].items()}
    # What graphs of friends are known for: triangles close, and tastes alone say less.
    assert (
        found["adamic_adar"]
        > found["common_neighbours"] * 0.95
        > found["profile_cosine"]
        > found["popularity"]
    )
    found = {name: system["metrics"]["ndcg@10"] for name, system in artists["systems"].items()}
    assert found["item_knn"] > found["friends_items"] > found["popularity"]
    groups = values["groups"]
    assert groups["formed_by"] == "friends"
    assert groups["num_groups"] > 200
    assert {name for name in groups["systems"] if name.startswith("model, ")} == {
        f"model, {name}" for name in AGGREGATIONS
    }
    page = (workdir / "report.html").read_text()
    assert "Kinds of items" in page
    assert "formed by friends" in page


def test_friends_and_lists_of_groups_are_written(workdir):
    dataset = PreparedDataset.open(workdir / "data")
    asked, out = workdir / "asked.txt", workdir / "friends.parquet"
    asked.write_text("\n".join(dataset.user_keys[:40]))
    assert recommend.main([f"--workdir={workdir}", "--kind=people", f"--users={asked}", f"--out={out}"]) == 0
    index = {key: user for user, key in enumerate(dataset.user_keys)}
    rows = pq.read_table(out).to_pylist()
    pairs = {(index[row["user_id"]], index[row["item_id"].removeprefix("people:")]) for row in rows}
    assert len(pairs) == len(rows) == 400
    assert not pairs & set.union(*(edges_of(dataset, part) for part in range(3)))
    assert all(user != friend for user, friend in pairs)
    out = workdir / "group.csv"
    arguments = [f"--workdir={workdir}", "--group=2,275,428", "--aggregation=fair", f"--out={out}"]
    assert recommend.main(arguments) == 0
    lines = out.read_text().splitlines()
    assert len(lines) == 11
    assert all('"2,275,428","items:' in line for line in lines[1:])
    assert recommend.main([*arguments, "--slate=any"]) == 2


def test_the_variant_hides_friends_and_nothing_else(repository):
    path = repository / "configs" / "social.py"
    base, without = load_config(str(path)), load_config(f"{path}:without_friends")
    assert (base.data.source.friends_as_input, without.data.source.friends_as_input) == (True, False)
    assert (without.model, without.tasks, without.data.split) == (base.model, base.tasks, base.data.split)
