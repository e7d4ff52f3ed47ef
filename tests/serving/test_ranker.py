"""Task heads in the formula: what orders lists, what happens where they are late, and what is refused."""

import asyncio
import dataclasses
import shutil
import threading
import types

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec import serve
from jaxrec.export.bundle import Bundle
from jaxrec.export.catalogue import HISTORIES_FILE
from jaxrec.export.events import EventLabels, UserEvents
from jaxrec.export.layout import BEHAVIOURS, MOST_CANDIDATES
from jaxrec.serving.batcher import Closed, Overloaded
from jaxrec.serving.candidates import Sources
from jaxrec.serving.engine import Engine
from jaxrec.serving.exploration import EpsilonGreedy
from jaxrec.serving.formula import Formula
from jaxrec.serving.measures import Measures
from jaxrec.serving.precompile import precompile
from jaxrec.serving.ranker import Needs, head_columns
from jaxrec.serving.schema import AddItem, FeedbackRequest, RankRequest, RecommendRequest
from jaxrec.serving.service import Service, ServiceOptions
from jaxrec.serving.sqlite_store import SqliteStore
from jaxrec.serving.version import Version
from jaxrec.serving.versions import Watcher

FORMULA = "click * add_to_cart^0.5 + 0.1*value"
HISTORY = ("i3", "i5", "i8", "i11")
NEW = AddItem(item_id="new", title="Item of today")


def engine_of(text=FORMULA, **options):
    return Engine(formula=Formula.parse(text), **options)


def serving(judging, tmp_path, work, engine=None, **options):
    """What `work(service)` gives."""

    async def main():
        engine_ = engine or engine_of()
        service = Service(SqliteStore(tmp_path / "state.db"), engine_, ServiceOptions(**options), Measures())
        service.live.install(judging.version)
        try:
            return await work(service)
        finally:
            await service.close()

    return asyncio.run(main())


def heads_of(version, keys):
    """Probabilities and values of all items after the items `keys`, by the programs of any size."""
    bundle = Bundle.open(version.bundle.directory)
    inputs = bundle.history_inputs([bundle.events_of(keys)], num_rows=1, length=8)
    inputs["candidate_ids"] = np.arange(1, version.num_items + 1, dtype=np.int32)[None]
    found = {}
    for name in ("behaviours", "values"):
        program = bundle.program(name)
        program._sized = {}
        (found[name],) = (np.asarray(array)[0] for array in program(inputs).values())
    return found["behaviours"], found["values"]


def expected_order(version, scores):
    """Places of items, and their worth: the first by the formula, what was not judged behind them by the score."""
    probabilities, values = heads_of(version, HISTORY)
    worth = probabilities[:, 0] * probabilities[:, 1] ** 0.5 + 0.1 * values
    by_score = np.argsort(-scores, kind="stable")
    judged, behind = by_score[:MOST_CANDIDATES], by_score[MOST_CANDIDATES:]
    return [*judged[np.argsort(-worth[judged], kind="stable")], *behind], worth


def test_a_formula_over_heads_orders_what_stands_highest(judging, tmp_path):
    version = judging.version

    async def work(service):
        pages = [
            await service.recommend(RecommendRequest(history=HISTORY, k=100, offset=offset))
            for offset in (0, 100, 200)
        ]
        return pages, await service.about()

    pages, about = serving(judging, tmp_path, work)
    assert about["formula"] == FORMULA
    assert {(page.scored_by, page.degraded) for page in pages} == {("formula", False)}
    (query,) = version.encode([types.SimpleNamespace(events=version.bundle.events_of(HISTORY), user_id=None)])
    order, worth = expected_order(version, query.scores[1:])
    items = [item for page in pages for item in page.items]
    assert len(items) == version.num_items
    np.testing.assert_allclose(
        [item.score for item in items[:MOST_CANDIDATES]], worth[order[:MOST_CANDIDATES]], rtol=1e-4
    )
    assert [item.item_id for item in items[MOST_CANDIDATES:]] == [
        f"i{1 + place}" for place in order[MOST_CANDIDATES:]
    ]


def test_given_items_are_ranked_by_the_formula_and_a_new_one_stands_in_the_middle(judging, tmp_path):
    asked = RankRequest(history=HISTORY, items=("i7", "new", "nothing", "i2", "i9", "i7"))

    async def work(service):
        await service.add_item(NEW)
        found = await service.rank(asked)
        listed = await service.recommend(RecommendRequest(history=HISTORY, k=100))
        only = await service.rank(RankRequest(history=HISTORY, items=("new",)))
        return found, listed, only

    found, listed, only = serving(judging, tmp_path, work)
    probabilities, values = heads_of(judging.version, HISTORY)
    of_three = [column[[6, 1, 8]] for column in (*probabilities.T, values)]
    worth = lambda click, cart, value: click * cart**0.5 + 0.1 * value  # noqa: E731
    three, middle = worth(*of_three), worth(*(np.median(column) for column in of_three))
    assert [item.item_id for item in found.items] == list(asked.items)
    assert found.items[2].score is None
    scores = [item.score for item in found.items if item.score is not None]
    np.testing.assert_allclose(scores, [three[0], middle, three[1], three[2], three[0]], rtol=1e-4)
    assert found.scored_by == listed.scored_by == "formula"
    assert only.scored_by == "model" and not only.degraded, "no head knows it"


@settings(max_examples=10)
@given(data=st.data())
def test_pages_are_one_list(judging, tmp_path, data):
    size, cap = data.draw(st.integers(1, 25)), data.draw(st.integers(0, 3))
    asked = {
        "diversity": data.draw(st.sampled_from([0.0, 0.4])),
        "explore": data.draw(st.booleans()),
        "history": data.draw(st.lists(st.integers(1, 300).map("i{}".format), min_size=1, max_size=12)),
        "exclude": data.draw(st.lists(st.integers(1, 300).map("i{}".format), max_size=200, unique=True)),
        "filter": {"max_per_category": cap},
        "explore_seed": "seed",
    }
    engine = engine_of(exploration=EpsilonGreedy(epsilon=0.5), sources=Sources(sizes={"popular": 20}))

    async def work(service):
        await service.add_item(NEW)
        pages = []
        for page in range(4):
            request = RecommendRequest.model_validate({**asked, "k": size, "offset": page * size})
            pages += (await service.recommend(request)).items
        whole = RecommendRequest.model_validate({**asked, "k": 4 * size})
        return pages, (await service.recommend(whole)).items

    pages, whole = serving(judging, tmp_path, work, engine)
    assert pages == whole
    found = [item.item_id for item in pages]
    assert len(set(found)) == len(found) == min(4 * size, 301 - len(asked["exclude"]))
    assert not set(found) & set(asked["exclude"])


def test_late_heads_leave_the_order_of_the_score(judging, tmp_path):
    begun, let = threading.Event(), threading.Event()

    async def work(service):
        batcher = service.live.newest.ranker
        compute = batcher._compute
        batcher._compute = lambda asked: (begun.set(), let.wait(20), compute(asked))[-1]
        late = await service.recommend(RecommendRequest(history=HISTORY, k=50, deadline_ms=500))
        assert begun.is_set(), "the tower was in time, and the heads were asked"
        let.set()
        refusals = []
        for error in (Overloaded("full"), Closed("gone")):
            batcher.submit = lambda *_, error=error, **__: refused(error)
            refusals.append(await service.rank(RankRequest(history=HISTORY, items=("i1",))))
        return late, refusals, service.measures.text().decode()

    async def refused(error):
        raise error

    late, refusals, text = serving(judging, tmp_path, work)
    plain = serving(
        judging,
        tmp_path,
        lambda service: service.recommend(RecommendRequest(history=HISTORY, k=50)),
        Engine(),
    )
    assert [item.item_id for item in late.items] == [item.item_id for item in plain.items]
    assert plain.scored_by == "model"
    for answer in (late, *refusals):
        assert (answer.degraded, answer.known_user, answer.scored_by) == (True, True, "model")
        assert answer.notes == ["The task heads were not in time; the order is that of the model's score."]
    for why in ("ranker_expired", "ranker_overloaded", "ranker_closed"):
        assert f'jaxrec_degraded_total{{why="{why}"}} 1.0' in text


def test_who_is_unknown_gets_what_is_popular(judging, tmp_path):
    async def work(service):
        return await service.recommend(RecommendRequest(k=5)), await service.rank(RankRequest(items=("i1",)))

    for answer in serving(judging, tmp_path, work):
        assert (answer.degraded, answer.known_user, answer.scored_by) == (False, False, "popularity")


def test_heads_are_compiled_for_every_size_and_only_where_they_are_named(judging):
    assert Needs(columns=frozenset({"score", "likeness"})).ranker(judging.version) is None
    ranker = Needs(columns=frozenset({"click", "score"})).ranker(judging.version)
    (program,) = ranker._programs.values()
    assert list(ranker._programs) == [BEHAVIOURS]
    assert set(program._sized) == {(num_rows, 8, MOST_CANDIDATES) for num_rows in (1, 4, 16)}
    assert all(len(compiled.shapes) == 1 for compiled in program._sized.values())
    assert not program._any_size.cache_info().currsize, "a server asks for known sizes alone"


def test_another_process_compiles_heads_ahead(judging, tmp_path):
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        assert asyncio.run(precompile(judging.out / "v1", Needs(columns=frozenset({"click", "value"}))))
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert len(list(tmp_path.glob("*-cache"))) >= 9, "the tower and two heads, of three sizes each"


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (
            engine_of("click * buy"),
            "--formula names 'buy', and version v1 has score, item_knn, likeness, content, popularity, trending, "
            "newness, click, add_to_cart, value; name one of these, or export a run with a task that learns it",
        ),
        (
            engine_of("score + ease"),
            "version v1 was exported without candidates of ease, .* it has item_knn. Export it with --candidates=ease",
        ),
        (Engine(sources=Sources(sizes={"ials": 5})), "without candidates of ials"),
    ],
)
def test_what_a_version_lacks_is_refused_in_words(judging, tmp_path, engine, message):
    async def work(service):
        raise AssertionError("it was taken into use")

    with pytest.raises(ValueError, match=message):
        serving(judging, tmp_path, work, engine)


def test_a_version_without_the_column_is_refused_at_the_start_and_passed_over_later(
    judging, bundles, tmp_path, capsys, monkeypatch
):
    """The version of `bundles` has no heads."""
    monkeypatch.chdir(tmp_path)
    assert serve.main([f"--model={judging.out}", "--formula=clik"]) == 2
    assert "--formula names 'clik', and version v1 has score" in capsys.readouterr().err
    directory = tmp_path / "exports"
    shutil.copytree(judging.out / "v1", directory / "v1")

    async def main():
        service = Service(SqliteStore(tmp_path / "s.db"), engine_of(), ServiceOptions(), Measures())
        watcher = Watcher(service, directory, 60)
        await watcher.load_first(set())
        monkeypatch.setattr(Version, "warm_up", None)  # it is refused before anything is compiled
        shutil.copytree(bundles / "v1", directory / "v2")
        manifest = Bundle.open(directory / "v2").manifest
        later = {**manifest.facts, "created": "9"}
        dataclasses.replace(manifest, facts=later).write(directory / "v2")
        assert await watcher.look_once() == []
        assert b"jaxrec_reload_failures_total 1.0" in service.measures.text()
        answer = await service.recommend(RecommendRequest(history=HISTORY))
        await service.close()
        return answer

    assert asyncio.run(main()).scored_by == "formula"


def test_names_are_those_of_what_was_learnt(judging):
    facts = {"behaviours": ["click", "add to cart", "return", "2nd", "score"], "learned_behaviours": []}
    programs = {BEHAVIOURS: {}}
    bundle = types.SimpleNamespace(facts=facts, manifest=types.SimpleNamespace(programs=programs))
    assert head_columns(bundle) == {}
    del facts["learned_behaviours"]  # of an older export
    assert list(head_columns(bundle)) == ["click", "add_to_cart", "return_", "_2nd"]
    assert head_columns(judging.version.bundle) == {
        "click": ("behaviours", 0),
        "add_to_cart": ("behaviours", 1),
        "value": ("values", 0),
    }


def test_what_events_were_reaches_the_tower(judging, tmp_path):
    histories = judging.dataset.histories(np.arange(len(judging.dataset.lengths)))
    whole = histories.labels[histories.offsets[2] : histories.offsets[3]][-8:]
    read = []

    async def work(service):
        batcher = service.live.newest.batcher
        compute = batcher._compute
        batcher._compute = lambda asked: read.extend(asked) or compute(asked)
        events = [
            {"user_id": "u2", "item_id": "i1", "behaviour": "add to cart"},
            {"user_id": "u2", "item_id": "i2", "behaviour": "click", "value": 3.0},
            {"user_id": "u2", "item_id": "i3"},
        ]
        await service.feedback(FeedbackRequest.model_validate({"events": events}))
        first = await service.recommend(RecommendRequest(user_id="u2"))
        await service.recommend(RecommendRequest(history=("i1", "i2", "i3")))
        return first

    assert serving(judging, tmp_path, work).scored_by == "formula"
    np.testing.assert_array_equal(read[0].events.labels, [*whole, [-1, 1], [1, -1], [-1, -1]])
    assert read[1].events.labels is None
    inputs = judging.version.inputs("user_tower", [read[0]], 1, 8)["labels"][0]
    assert inputs[-3:].tolist() == [[-1, 1], [1, -1], [-1, -1]]


def test_a_version_of_before_there_were_labels_is_read(judging, tmp_path):
    directory = tmp_path / "old"
    shutil.copytree(judging.out / "v1", directory)
    table = pq.read_table(directory / HISTORIES_FILE)
    assert "labels" in table.column_names
    pq.write_table(table.drop_columns(["labels"]), directory / HISTORIES_FILE)
    facts = {key: fact for key, fact in judging.version.bundle.facts.items() if key != "event_labels"}
    old = Version(Bundle(directory, dataclasses.replace(judging.version.bundle.manifest, facts=facts)))
    assert old.event_labels == EventLabels(behaviours=("click", "add to cart"))
    before = old.history("u2")
    assert before.labels is None and len(before) == len(judging.version.history("u2"))
    new = UserEvents(np.array([1]), np.array([5]), np.array([[1, -1]]))
    assert before.then(new).labels.tolist() == [*[[-1, -1]] * len(before), [1, -1]]
    assert before.then(before).labels is None
