"""Search on MovieLens tags: what training may see, and one short run from end to end."""

import json

import pyarrow.parquet as pq
import pytest

from jaxrec import evaluate, train
from jaxrec.config import load_config
from jaxrec.data.dataset import PreparedDataset

pytestmark = pytest.mark.shared_data


@pytest.fixture(scope="module")
def workdir(shared_data, repository, tmp_path_factory):
    """Four steps of a model as small as can be, evaluated."""
    path = tmp_path_factory.mktemp("search")
    sizes = {"embed_dim": 8, "num_layers": 1, "num_heads": 1, "mlp_dim": 8}
    arguments = [
        f"--config.model.{part}.{name}={value}"
        for part in ("encoder", "text.encoder")
        for name, value in sizes.items()
    ]
    status = train.main(
        [
            f"--config={repository}/configs/search.py",
            f"--workdir={path}",
            f"--config.data.path={shared_data}/ml-latest-small",
            "--config.num_train_steps=4",
            "--config.model.item_dim=8",
            "--config.evaluation.baselines=popularity",
            "--config.evaluation.bootstrap_samples=100",
            *arguments,
        ]
    )
    assert status == 0
    assert evaluate.main([f"--workdir={path}"]) == 0
    return path


def test_nothing_held_out_is_trained_on(workdir, shared_data):
    dataset = PreparedDataset.open(workdir / "data")
    table = dataset.queries
    trained, tested = table.pairs("train"), table.pairs("test")
    pairs = [
        set(zip(part.query_ids.tolist(), part.item_ids.tolist(), strict=True)) for part in (trained, tested)
    ]
    assert min(map(len, pairs)) > 400
    assert not pairs[0] & pairs[1]
    # A tag is in the text of an item by its title and genres alone: the same text without tags gives the same words.
    items = pq.read_table(shared_data / "ml-latest-small" / "items.parquet").to_pylist()
    own = {item["item_id"]: f"{item['title'].strip()}. {item['genres'].replace('|', ', ')}" for item in items}
    kept = pq.read_table(workdir / "data" / "items.parquet").to_pylist()
    assert all(item["text"] == own[item["item_id"]] for item in kept)


def test_the_evaluation_speaks_of_every_kind_of_query(workdir):
    search = json.loads((workdir / "evaluation.json").read_text())["search"]
    assert set(search) == {"all", "known", "new", "new_words"}
    assert (
        sum(search[kind]["num_pairs"] for kind in ("known", "new", "new_words")) == search["all"]["num_pairs"]
    )
    systems = search["all"]["systems"]
    assert set(systems) == {
        "model",
        "tf_idf",
        "bm25",
        "tf_idf_with_queries",
        "bm25_with_queries",
        "popularity",
    }
    # Words that were asked before find items that words of titles do not: the baselines are what they should be.
    known = search["known"]["systems"]
    assert known["bm25_with_queries"]["metrics"]["mrr"] > known["popularity"]["metrics"]["mrr"]
    assert "with a word that no training query has" in " ".join((workdir / "report.html").read_text().split())


def test_the_variant_differs_in_the_weight_of_the_next_item(repository):
    path = repository / "configs" / "search.py"
    base, alone = load_config(str(path)), load_config(f"{path}:alone")
    assert alone.tasks["search"] == base.tasks["search"]
    assert alone.tasks["next_item"].weight < 1e-3 < base.tasks["next_item"].weight
