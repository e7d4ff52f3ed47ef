"""Candidates of several sources in one list: tags, formulas, pages, the index."""

import dataclasses
import types

import numpy as np
import pytest

from jaxrec.export.item_index import ItemIndex
from jaxrec.serving.candidates import COLUMNS, SOURCES, Asker, Sources, of_model
from jaxrec.serving.engine import Engine, ListRequest
from jaxrec.serving.exploration import EpsilonGreedy
from jaxrec.serving.formula import Formula
from jaxrec.serving.rules import CategoryFilter, Rules
from jaxrec.serving.store import AddedItem
from jaxrec.serving.version import History
from jaxrec.serving.view import View


def view_of(version, **changes):
    new = {key: AddedItem(item_id=key, title=f"Toy Story {key}", seconds=5) for key in ("n1", "n2")}
    return dataclasses.replace(View.of(version, new, [], 1), **changes)


def asker_of(version, history=(3, 5, 8, 11), trending=()):
    events = version.bundle.events_of([version.bundle.catalogue.vocabulary.key_of(i) for i in history])
    (query,) = version.encode([History(events)])
    return Asker(query=query, history=events.item_ids, trending=dict(trending))


def request_of(asker, **options):
    own = {field.name: getattr(asker, field.name) for field in dataclasses.fields(asker)}
    return ListRequest(**own, exclude=asker.history, **options)


def test_every_source_gives_its_own(version):
    view, asker = view_of(version), asker_of(version, trending={40: 3, 41: 9})
    sizes = {name: 30 for name in SOURCES[1:] if name != "ease"}
    rules = Rules(exclude=np.array([41]))
    found = Sources(sizes=sizes).gather(view, asker, rules, 50)
    tags = {SOURCES[source] for source in found.sources.tolist()}
    assert tags == {"model", *sizes}
    assert len(set(found.item_ids.tolist())) == len(found)
    assert 41 not in found.item_ids and 40 in found.item_ids
    assert np.all(np.diff(found.scores) <= 0)
    ids = np.sort(found.item_ids)
    wanted = dict(zip(ids, view.scores_of(asker.query, ids), strict=True))
    np.testing.assert_allclose(found.scores, [wanted[i] for i in found.item_ids], rtol=1e-6)
    np.testing.assert_allclose(
        view.scores_of(asker.query, ids), view.scores(asker.query)[ids], rtol=1e-4, atol=1e-5
    )
    new = found.at(found.item_ids > version.num_items)
    assert {SOURCES[s] for s in new.sources.tolist()} <= {"recent", "content", "model"} and len(new) == 2


def test_a_source_that_has_nothing_to_say_gives_nothing(version):
    view = view_of(version)
    nobody = Asker(query=None, history=np.zeros(0, np.int64))
    found = Sources(sizes={"item_knn": 20, "ease": 20, "content": 20}).gather(view, nobody, Rules(), 10)
    assert {SOURCES[source] for source in found.sources.tolist()} == {"popular"}
    assert found.item_ids.tolist() == view.by_popularity[:10].tolist()


@pytest.mark.parametrize(
    "text", ["score + 3 * item_knn", "ials", "content + likeness", "log(1 + popularity) + newness"]
)
def test_a_formula_reads_what_sources_know_and_pages_fit(version, text):
    view, asker = view_of(version), asker_of(version)
    engine = Engine(
        sources=Sources(sizes={"item_knn": 100, "ials": 100}), formula=Formula.parse(text, COLUMNS)
    )
    whole = engine.recommend(view, request_of(asker, size=60))
    pages = [
        item
        for page in range(6)
        for item in engine.recommend(view, request_of(asker, size=10, offset=10 * page))
    ]
    assert pages == whole
    assert len({item.item_id for item in whole}) == 60
    scores = [item.score for item in whole]
    assert scores == sorted(scores, reverse=True)
    plain = Engine().recommend(view, request_of(asker, size=60))
    assert [item.item_id for item in plain] != [item.item_id for item in whole]


def test_an_order_by_diversity_is_kept_where_nothing_is_tried(version):
    view, asker = view_of(version), asker_of(version)
    plain = Engine().recommend(view, request_of(asker, size=30, diversity=0.8))
    engine = Engine(exploration=EpsilonGreedy(epsilon=0.0))
    explored = engine.recommend(view, request_of(asker, size=30, diversity=0.8, explore_key="u"))
    assert [item.item_id for item in explored] == [item.item_id for item in plain]
    assert {item.propensity for item in explored} == {1.0}


def test_pages_go_on_behind_the_pool(version):
    view, asker = view_of(version), asker_of(version)
    engine = Engine(sources=Sources(sizes={"popular": 50}), formula=Formula.parse("ials", COLUMNS))
    found = [
        engine.recommend(view, request_of(asker, size=100, offset=offset)) for offset in (900, 1000, 1100)
    ]
    ids = [item.item_id for page in found for item in page]
    assert len(set(ids)) == len(ids) == 300


def test_what_a_formula_refuses_is_not_shown(version):
    view, asker = view_of(version), asker_of(version)
    engine = Engine(formula=Formula.parse("1 / newness", COLUMNS))
    found = engine.recommend(view, request_of(asker, size=3))
    assert {item.item_id for item in found} == {"n1", "n2"}, "behind the best thousand, too"
    assert all(np.isfinite(item.score) for item in found)
    assert not engine.recommend(view, request_of(asker, size=3, offset=1_000))
    engine = Engine(formula=Formula.parse("1 / (popularity - 1)", COLUMNS))
    whole = engine.recommend(view, request_of(asker, size=1_200))
    assert len(whole) == 1_200
    ids = view.ids_of(item.item_id for item in whole)
    assert not np.any(view.popularity[ids] == 1)
    page = engine.recommend(view, request_of(asker, size=100, offset=950))
    assert [item.item_id for item in page] == [item.item_id for item in whole[950:1_050]]


def test_an_index_finds_what_the_whole_catalogue_has(version):
    asker = asker_of(version)
    index, recall = ItemIndex.build(version.vectors, version.bias, asker.query.vector[None], recall=1.0)
    assert recall == 1.0
    indexed = object.__new__(type(version))
    indexed.__dict__.update(version.__dict__ | {"index": index})
    exact, approximate = view_of(version), view_of(indexed)
    for options in ({}, {"offset": 30}, {"boosts": {"Comedy": 1.0}}):
        request = request_of(asker, size=20, **options)
        wanted, found = (Engine().recommend(view, request) for view in (exact, approximate))
        assert [item.item_id for item in found] == [item.item_id for item in wanted]
        np.testing.assert_allclose([i.score for i in found], [i.score for i in wanted], rtol=1e-4, atol=1e-5)


def test_pages_of_an_index_go_on_where_its_cells_end(version):
    asker = asker_of(version)
    in_cells = np.sort(np.random.default_rng(0).permutation(version.num_items)[:300] + 1)
    near = version.vectors[in_cells] @ asker.query.vector + version.bias[in_cells]
    index = types.SimpleNamespace(search=lambda _, most: in_cells[np.argsort(-near)[:most]])
    indexed = object.__new__(type(version))
    indexed.__dict__.update(version.__dict__ | {"index": index})
    for name in ("Comedy", "Drama"):
        rules = Rules(exclude=asker.history, categories=CategoryFilter(none_of=(name,)))
        view = view_of(indexed)
        whole = of_model(view, asker.query, rules, view.num_items).item_ids
        assert sorted(whole) == sorted(
            of_model(view_of(version), asker.query, rules, view.num_items).item_ids
        )
        for most in (5, 150, 300, 350, 1_500):
            assert of_model(view, asker.query, rules, most).item_ids.tolist() == whole[:most].tolist()
    for rules in (Rules(categories=CategoryFilter(any_of=("Horror",))), Rules(boosts={"Horror": 1.0})):
        found, wanted = (of_model(view_of(v), asker.query, rules, 50).item_ids for v in (indexed, version))
        assert found.tolist() == wanted.tolist(), "an index does not know where these lie"


def test_a_new_item_is_encoded_by_what_is_written_about_it(version):
    item = AddedItem(item_id="n", title="Toy Story 9", text="Toys again.", categories=("Children", "Comedy"))
    wanted = version.bundle.vectors_of_texts(["Toy Story 9. Children, Comedy. Toys again.", "Heat", ""])
    assert len({tuple(row) for row in wanted.round(5).tolist()}) == 3
    assert not wanted[2].any()
    found = View.of(version, {"n": item}, [], 1)
    np.testing.assert_allclose(found.vectors[-1], wanted[0], rtol=1e-5, atol=1e-6)

    changed = dataclasses.replace(item, text="Other toys.")
    View.of(version, {"n": changed}, [], 2)
    assert list(version._of_texts) == ["Toy Story 9. Children, Comedy. Other toys."], (
        "what is live alone is kept"
    )

    blind = object.__new__(type("Blind", (type(version),), {"reads_text": False}))
    blind.__dict__.update(version.__dict__)
    likeness = version.word_index.cosines("Toy Story 9 Toys again. Children Comedy")
    nearest = np.argsort(-likeness, kind="stable")[:20]
    mean = likeness[nearest] @ version.vectors[nearest] / likeness[nearest].sum()
    np.testing.assert_allclose(View.of(blind, {"n": item}, [], 1).vectors[-1], mean, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("text", ["item_knn", "item_knn=0", "model=5", "item_knn=x", "lda=3", "popular=1001"])
def test_sources_that_cannot_be_read_are_named(text):
    with pytest.raises(ValueError, match=f"candidates '{text}': say SOURCE=NUMBER"):
        Sources.parse([text])


def test_hiding_makes_no_new_arrays(version):
    item = AddedItem(item_id="n", title="space opera")
    first = View.of(version, {}, [], 1)
    hidden = View.of(version, {}, ["1"], 2, first)
    assert hidden.vectors is first.vectors is version.vectors
    assert (hidden.revision, hidden.hidden.tolist()) == (2, [version.bundle.catalogue.vocabulary.id_of(1)])
    grown = View.of(version, {"n": item}, ["1"], 3, hidden)
    assert grown.num_items == version.num_items + 1 and grown.by_popularity[-1] == grown.num_items
    again = View.of(version, {"n": item}, ["n"], 4, grown)
    assert again.unit is grown.unit and again.hidden.tolist() == [grown.num_items]
    other = View.of(version, {"n": dataclasses.replace(item, title="western")}, [], 5, again)
    assert other.titles[-1] == "western" and other.unit is not grown.unit
    assert View.of(version, {}, [], 6, other).unit is version.unit
