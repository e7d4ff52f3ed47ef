"""The service and its HTTP face on a real exported model: lists, rules, state, versions, limits."""

import asyncio
import dataclasses
import itertools
import json
import time
import urllib.parse

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxrec.export.manifest import LONGEST_NAME, check_name
from jaxrec.serving.app import make_app
from jaxrec.serving.batcher import Closed, Expired
from jaxrec.serving.candidates import COLUMNS, Sources
from jaxrec.serving.engine import Engine
from jaxrec.serving.exploration import EpsilonGreedy
from jaxrec.serving.formula import Formula
from jaxrec.serving.guard import Limits, depth_of
from jaxrec.serving.schema import FeedbackEvent, RecommendRequest


def talk(service, work, limits=Limits(), **client):
    """Runs `work(client)` against the application, without a socket."""

    async def main():
        app = make_app(service, limits, service.measures)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False, **client)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            found = await work(http)
        await service.close()
        return found

    return asyncio.run(main())


async def post(http, path, body, status=200, **options):
    answer = await http.post(path, json=body, **options)
    assert answer.status_code == status, answer.text
    return answer.json()


def keys_of(answer):
    return [item["item_id"] for item in answer["items"]]


def test_a_list_is_that_of_the_bundle_with_titles_and_reasons(version, tmp_path, make_service):
    history = [version.bundle.catalogue.vocabulary.key_of(item) for item in (3, 5, 8, 11)]
    (wanted,) = version.bundle.recommend([history], k=20)

    async def work(http):
        return await post(http, "/v1/recommend", {"history": history, "k": 20})

    found = talk(make_service(version, tmp_path), work)
    assert keys_of(found) == [item.item_id for item in wanted]
    np.testing.assert_allclose(
        [i["score"] for i in found["items"]], [i.score for i in wanted], rtol=1e-4, atol=1e-4
    )
    assert [item["title"] for item in found["items"]] == [item.title for item in wanted]
    assert all("which is in the history." in " ".join(item["reasons"]) for item in found["items"])
    assert (found["model_version"], found["degraded"], found["known_user"]) == ("v1", False, True)


def test_ten_pages_of_ten_are_a_hundred_items_none_of_which_was_seen(version, tmp_path, make_service):
    history = [version.bundle.catalogue.vocabulary.key_of(item) for item in range(1, 20)]

    async def work(http):
        for body in (
            {},
            {"diversity": 0.5},
            {"filter": {"max_per_category": 60}},
            {"explore": True, "explore_seed": "a"},
        ):
            pages = [
                await post(http, "/v1/recommend", {"history": history, "offset": 10 * page, **body})
                for page in range(10)
            ]
            found = [key for page in pages for key in keys_of(page)]
            assert len(set(found)) == len(found) == 100, body
            assert not set(found) & set(history)

    talk(make_service(version, tmp_path, Engine(exploration=EpsilonGreedy(epsilon=0.3))), work)


def test_feedback_is_in_the_next_answer_and_can_be_forgotten(version, tmp_path, make_service):
    async def work(http):
        guest = await post(http, "/v1/recommend", {"user_id": "new one"})
        assert not guest["known_user"]
        assert {item["source"] for item in guest["items"]} == {"popular"}
        taken = keys_of(guest)[0]
        event = {"user_id": "new one", "item_id": taken, "event_id": "e1"}
        assert await post(http, "/v1/feedback", {"events": [event]}) == {
            "taken": 1,
            "known_already": 0,
            "unknown": 0,
        }
        assert (await post(http, "/v1/feedback", {"events": [event]}))["known_already"] == 1
        known = await post(http, "/v1/recommend", {"user_id": "new one"})
        assert known["known_user"]
        assert taken not in keys_of(known)
        state = (await http.get("/v1/users/new one")).json()
        assert [event["title"] for event in state["history"]] == [guest["items"][0]["title"]]
        why = await post(http, "/v1/explain", {"user_id": "new one", "item_id": keys_of(known)[0]})
        assert any("Without" in reason or "number" in reason for reason in why["reasons"])
        assert (await http.delete("/v1/users/new one")).json() == {"erased": 1}
        assert not (await post(http, "/v1/recommend", {"user_id": "new one"}))["known_user"]

    talk(make_service(version, tmp_path), work)


def test_what_is_remembered_is_explained_as_what_is_given(version, tmp_path, make_service):
    history = [version.bundle.catalogue.vocabulary.key_of(item) for item in (3, 5, 8)]

    async def work(http):
        events = [{"user_id": "u", "item_id": key} for key in history]
        await post(http, "/v1/feedback", {"events": events})
        item = version.bundle.catalogue.vocabulary.key_of(20)
        remembered = await post(http, "/v1/explain", {"user_id": "u", "item_id": item})
        given = await post(http, "/v1/explain", {"history": history, "item_id": item})
        without = [[r for r in why["reasons"] if r.startswith("Without")] for why in (remembered, given)]
        assert without[0] == without[1]

    talk(make_service(version, tmp_path), work)


def test_an_explanation_is_that_of_the_version_that_is_asked(version, tmp_path, make_service, renamed):
    service = make_service(None, tmp_path)
    for name in ("old", "new"):
        service.live.install(renamed(version, name))

    async def work(http):
        body = {"history": [1, 2, 3], "item_id": 6}
        for asked, answers in (({}, "new"), ({"version": "old"}, "old"), ({"version": "new"}, "new")):
            why = await post(http, "/v1/explain", body | asked)
            assert (why["model_version"], why["degraded"], why["notes"]) == (answers, False, [])
        error = await post(http, "/v1/explain", body | {"version": "none"}, status=404)
        assert "version 'none' is not loaded" in error["error"]
        batcher = service.live.named("old").batcher
        submit, asked = batcher.submit, itertools.count()

        async def late(history, *, deadline):
            if next(asked) > 1:
                raise Expired("too late")
            return await submit(history, deadline=deadline)

        batcher.submit = late
        why = await post(http, "/v1/explain", body | {"version": "old"})
        assert why["degraded"] and why["notes"] == ["The model was in time for 1 of the latest 3 events."]
        why = await post(http, "/v1/explain", body | {"version": "old"})
        assert why["degraded"] and why["notes"] == ["The model was not in time; popular items are listed."]
        assert 'jaxrec_degraded_total{why="deadline"} 2.0' in (await http.get("/metrics")).text

        async def dropped(history, *, deadline):
            if "new" in service.live:
                service.live.drop("new")
            return await answers_last(history, deadline=deadline)

        last = service.live.named("new").batcher
        answers_last, last.submit = last.submit, dropped
        why = await post(http, "/v1/explain", body)
        assert why["degraded"] and why["notes"] == ["The model was in time for 0 of the latest 3 events."]
        assert 'jaxrec_degraded_total{why="closed"} 1.0' in (await http.get("/metrics")).text

    talk(service, work)


def test_a_server_says_whether_it_explores(version, tmp_path, make_service):
    async def work(http):
        explores = (await http.get("/v1/about")).json()["explores"]
        body = {"history": [1, 2], "explore": True}
        shown = (await post(http, "/v1/recommend", body))["items"]
        assert all((item["propensity"] is not None) == explores for item in shown)
        return explores

    assert not talk(make_service(version, tmp_path), work)
    assert talk(make_service(version, tmp_path, Engine(exploration=EpsilonGreedy(epsilon=0.1))), work)


def test_users_of_the_training_data_are_known(version, tmp_path, make_service):
    async def work(http):
        about = (await http.get("/v1/about")).json()
        user = about["example_users"][0]
        history = (await http.get(f"/v1/users/{user}")).json()["history"]
        found = await post(http, "/v1/recommend", {"user_id": int(user), "k": 100})
        assert len(history) == 32 and found["known_user"]
        assert not {event["item_id"] for event in history} & set(keys_of(found))
        assert "Comedy" in about["categories"]

    talk(make_service(version, tmp_path), work)


def test_a_user_whose_id_has_a_slash_is_read_and_forgotten(version, tmp_path, make_service):
    async def work(http):
        for user in ("a/b", "a", "/", "a/b/", "..%2f?#"):
            await post(http, "/v1/feedback", {"events": [{"user_id": user, "item_id": 1}]})
            path = f"/v1/users/{urllib.parse.quote(user, safe='')}"
            found = (await http.get(path)).json()
            assert (found["user_id"], len(found["history"])) == (user, 1)
            assert (await http.delete(path)).json() == {"erased": 1}
            assert (await http.get(path)).json()["history"] == []
        for nobody in ("", "%00", "a" * 201):
            assert (await http.get(f"/v1/users/{nobody}")).status_code == 422
        described = (await http.get("/openapi.json")).json()["paths"]
        assert [path for path in described if "users" in path] == ["/v1/users/{user_id}"]
        assert set(described["/v1/users/{user_id}"]) == {"get", "delete"}
        metrics = (await http.get("/metrics")).text
        assert 'jaxrec_requests_total{route="/v1/users/{user_id}",status="200"} 15.0' in metrics

    talk(make_service(version, tmp_path), work)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_rules_hold_in_every_list(version, tmp_path, data, make_service):
    names = ("Comedy", "Drama", "Horror", "Children")
    vocabulary = version.bundle.catalogue.vocabulary
    some = lambda most: data.draw(st.lists(st.integers(1, 300), max_size=most, unique=True))  # noqa: E731
    history, excluded, hidden = some(10), some(30), some(5)
    any_of, none_of = (data.draw(st.lists(st.sampled_from(names), max_size=2, unique=True)) for _ in range(2))
    cap = data.draw(st.integers(0, 4))
    body = {
        "history": [vocabulary.key_of(item) for item in history],
        "exclude": [vocabulary.key_of(item) for item in excluded],
        "k": data.draw(st.integers(1, 50)),
        "diversity": data.draw(st.sampled_from([0.0, 0.7])),
        "calibration": data.draw(st.sampled_from([0.0, 0.7])),
        "explore": data.draw(st.booleans()),
        "filter": {"any_of": any_of, "none_of": none_of, "max_per_category": cap},
    }

    async def work(http):
        for item in hidden:
            await post(http, "/v1/items/hide", {"item_id": vocabulary.key_of(item)})
        found = await post(http, "/v1/recommend", body)
        for item in hidden:
            await post(http, "/v1/items/hide", {"item_id": vocabulary.key_of(item), "hidden": False})
        return found

    sources = Sources(
        sizes=data.draw(st.sampled_from([{}, {"item_knn": 50, "ials": 20, "popular": 20, "content": 20}]))
    )
    formula = Formula.parse(data.draw(st.sampled_from(["score", "ials + content"])), COLUMNS)
    service = make_service(
        version, tmp_path, Engine(sources=sources, formula=formula, exploration=EpsilonGreedy(epsilon=0.5))
    )
    ids = [vocabulary.id_of(key) for key in keys_of(talk(service, work))]
    assert len(set(ids)) == len(ids) <= body["k"]
    assert not set(ids) & {*history, *excluded, *hidden}
    categories = version.bundle.catalogue.table["categories"].to_pylist()
    of_items = [set(categories[item - 1]) for item in ids]
    assert all(not any_of or own & set(any_of) for own in of_items)
    assert all(not own & set(none_of) for own in of_items)
    if cap:
        assert all(sum(name in own for own in of_items) <= cap for name in version.facts.categories)


def test_a_new_item_is_found_recommended_and_refused_twice(version, tmp_path, make_service):
    async def work(http):
        before = (await http.get("/v1/about")).json()["num_items"]
        item = {"item_id": "brand new", "title": "Toy Story 9 (2027)", "categories": ["Children", "Comedy"]}
        await post(http, "/v1/items", item, status=201)
        assert (await http.get("/v1/about")).json()["num_items"] == before + 1
        found = await post(http, "/v1/search", {"query": "toy story 9"})
        assert "brand new" in keys_of(found)
        near = await post(http, "/v1/similar", {"item_id": "brand new", "k": 5})
        assert len(near["items"]) == 5 and "brand new" not in keys_of(near)
        only = await post(http, "/v1/recommend", {"filter": {"allow": ["brand new", 1]}, "history": [2]})
        assert set(keys_of(only)) == {"brand new", 1}
        assert "New: judged by its words." in str(only)
        ranked = await post(http, "/v1/rank", {"history": [2], "items": [1, "brand new", "nothing"]})
        assert keys_of(ranked) == [1, "brand new", "nothing"]
        assert [item["score"] is None for item in ranked["items"]] == [False, False, True]
        error = await post(http, "/v1/items", {"item_id": 1, "title": "x"}, status=400)
        assert "item 1 is in the catalogue already" in error["error"]

    talk(make_service(version, tmp_path), work)


def test_ids_are_numbers_where_the_catalogue_has_numbers(version, tmp_path, make_service):
    async def work(http):
        for sent, said in ((900_001, 900_001), ("900002", 900_002), ("007", "007"), ("n", "n")):
            item = {"item_id": sent, "title": "Toy Story 9"}
            assert (await post(http, "/v1/items", item, status=201)) == {"item_id": said}
        only = {"allow": ["900001", 900_002, "007", "n", 1]}
        found = await post(http, "/v1/recommend", {"history": [2], "filter": only})
        assert set(keys_of(found)) == {900_001, 900_002, "007", "n", 1}
        events = [{"user_id": "u", "item_id": key} for key in ("1", 1, 900_001, "007")]
        await post(http, "/v1/feedback", {"events": events})
        state = (await http.get("/v1/users/u")).json()["history"]
        assert [event["item_id"] for event in state] == [1, 1, 900_001, "007"]
        assert all(event["title"] for event in state)
        await post(http, "/v1/similar", {"item_id": "01"}, status=404)

    talk(make_service(version, tmp_path), work)


def test_nothing_is_like_an_item_of_which_nothing_is_known(version, tmp_path, make_service):
    service = make_service(version, tmp_path)
    live = service.live.newest
    view = live.view(service.store)
    unit = view.unit.copy()
    unit[3] = 0.0
    live._view = dataclasses.replace(view, unit=unit)

    async def work(http):
        for item, count in ((3, 0), (4, 5)):
            body = {"item_id": view.key_of(item), "k": 5}
            assert len((await post(http, "/v1/similar", body))["items"]) == count

    talk(service, work)


def test_a_bundle_is_a_set_under_the_rules(version, tmp_path, make_service):
    async def work(http):
        found = await post(
            http, "/v1/bundle", {"history": [1, 2], "size": 6, "filter": {"none_of": ["Drama"]}}
        )
        assert len(set(keys_of(found))) == 6
        ids = [version.bundle.catalogue.vocabulary.id_of(key) for key in keys_of(found)]
        categories = version.bundle.catalogue.table["categories"].to_pylist()
        assert not any("Drama" in categories[item - 1] for item in ids)

    talk(make_service(version, tmp_path), work)


def test_a_formula_orders_lists(version, tmp_path, make_service):
    engine = Engine(formula=Formula.parse("popularity", COLUMNS))

    async def work(http):
        return await post(http, "/v1/recommend", {"history": [1], "k": 10})

    found = talk(make_service(version, tmp_path, engine), work)
    scores = [item["score"] for item in found["items"]]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > 50


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/recommend", {"k": 0}, 422, "k: Input should be greater than or equal to 1"),
        ("/v1/recommend", {"boosts": {"Comedy": 1e308}}, 422, "less than or equal to 1000000"),
        ("/v1/recommend", {"kk": 1}, 422, "kk: Extra inputs are not permitted"),
        ("/v1/recommend", {"filter": {"any_of": ["Opera"]}}, 400, "category 'Opera': the catalogue has"),
        ("/v1/recommend", {"version": "v9"}, 404, "version 'v9' is not loaded; there are v1"),
        ("/v1/similar", {"item_id": "no such"}, 404, "item 'no such' is not in the catalogue"),
        ("/v1/feedback", {"events": [{"user_id": "u", "item_id": 10**9}]}, 404, "is not in the catalogue"),
        ("/v2/models/other/infer", {"inputs": [{"name": "history", "shape": [1, 1], "datatype": "INT64", "data": [1]}]},
         404, "model 'other' is not here"),
    ],
)  # fmt: skip
def test_errors_name_what_is_wrong(version, tmp_path, path, body, status, message, make_service):
    async def work(http):
        assert message in (await post(http, path, body, status=status))["error"]

    talk(make_service(version, tmp_path), work)


def test_the_inference_protocol(version, tmp_path, make_service):
    service = make_service(version, tmp_path)

    async def work(http):
        assert (await http.get("/v2/health/ready")).status_code == 200
        assert (await http.get("/v2/health/live")).json() == {"live": True}
        assert (await http.get("/v2/models/jaxrec")).json()["versions"] == ["v1"]
        tensor = {"name": "history", "shape": [2, 3], "datatype": "INT64", "data": [1, 2, 0, 3, 6, 7]}
        found = await post(http, "/v2/models/jaxrec/infer", {"inputs": [tensor], "parameters": {"k": 4}})
        alone = await post(http, "/v1/recommend", {"history": [3, 6, 7], "k": 4})
        ids, scores = found["outputs"]
        assert ids["shape"] == scores["shape"] == [2, 4]
        assert ids["data"][4:] == keys_of(alone)
        assert ids["datatype"] == "INT64"
        await post(http, "/v1/items", {"item_id": "text", "title": "x", "categories": ["Comedy"]}, status=201)
        service.engine = Engine(
            sources=Sources(sizes={"recent": 5}), formula=Formula.parse("newness", COLUMNS)
        )
        found = await post(http, "/v2/models/jaxrec/infer", {"inputs": [tensor], "parameters": {"k": 4}})
        (ids, _) = found["outputs"]
        assert ids["datatype"] == "BYTES" and ids["data"][0] == "text"
        assert all(isinstance(key, str) for key in ids["data"]), "a tensor is of one type"
        bad = {"inputs": [tensor | {"shape": [2, 4]}]}
        assert "give rows * events" in (await post(http, "/v2/models/jaxrec/infer", bad, status=400))["error"]

    talk(service, work)


def test_nothing_is_ready_without_a_model(tmp_path, make_service):
    async def work(http):
        assert (await http.get("/v2/health/ready")).status_code == 503
        assert (await http.get("/v2/health/live")).status_code == 200
        await post(http, "/v1/recommend", {}, status=404)

    talk(make_service(None, tmp_path), work)


def test_limits_come_before_parsing(version, tmp_path, make_service):
    limits = Limits(body_bytes=2_000, depth=5, token="secret")

    async def work(http):
        assert (await http.get("/v2/health/live")).status_code == 200
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
            answer = await http.get("/v1/about", headers=headers)
            assert answer.status_code == 401
            assert "secret" not in answer.text
        for path in ("/", "/docs", "/page/page.js", "/page/page.css"):
            assert (await http.get(path)).status_code == 200, "it is the page that asks for the token"
        for path in ("/page", "/docs/", "/metrics", "/openapi.json", "/v1/users/page/"):
            assert (await http.get(path)).status_code == 401
        for path in ("/page/../v1/about", "/page/%2e%2e/v1/about", "/page//v1/about"):
            assert (await http.get(path)).status_code in (401, 404)
        http.headers["authorization"] = "Bearer secret"
        page = await http.get("/")
        assert page.status_code == 200
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert (await http.get("/page/page.js")).status_code == 200
        for name in ("other", "..%2fapp.py", "%2e%2e/guard.py"):
            assert (await http.get(f"/page/{name}")).status_code == 404
        long = await http.post("/v1/recommend", content=b'{"history": [' + b"1," * 2_000)
        assert long.status_code == 413
        deep = await http.post("/v1/recommend", content=b"[" * 6 + b"]" * 6)
        assert deep.status_code == 400
        broken = await http.post("/v1/recommend", content=b'{"user_id": "\xff"}')
        assert broken.status_code in (400, 422)
        metrics = (await http.get("/metrics")).text
        assert 'jaxrec_requests_total{route="/v1/about"' not in metrics, "refused before a route was found"
        assert "jaxrec_request_seconds_bucket" in metrics

    talk(make_service(version, tmp_path), work, limits)


def test_a_client_that_asks_too_often_is_told_when_to_come_back(version, tmp_path, make_service):
    limits = Limits(requests_per_second=0.5, burst=3)

    async def work(http):
        codes = [(await http.get("/v1/about")).status_code for _ in range(5)]
        assert codes == [200, 200, 200, 429, 429]
        assert int((await http.get("/v1/about")).headers["retry-after"]) >= 1

    talk(make_service(version, tmp_path), work, limits)


def test_tokens_cannot_be_tried_without_limit(version, tmp_path, make_service):
    async def work(http):
        wrong = {"authorization": "Bearer wrong"}
        return [(await http.get("/v1/about", headers=wrong)).status_code for _ in range(4)]

    limits = Limits(requests_per_second=0.5, burst=2, token="secret")
    assert talk(make_service(version, tmp_path), work, limits) == [401, 401, 429, 429]


def test_a_page_of_somebody_else_cannot_reach_the_server_by_a_name_of_its_own(
    version, tmp_path, make_service
):
    async def work(http):
        hosts = ("localhost:8000", "LOCALHOST", "[::1]:8000", "evil.example:8000", "[::2]", "")
        return [(await http.get("/v1/about", headers={"host": host})).status_code for host in hosts]

    limits = Limits(hosts=("localhost", "[::1]"))
    assert talk(make_service(version, tmp_path), work, limits) == [200, 200, 200, 421, 421, 421]


json_values = st.recursive(
    st.none() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=20,
)


@given(json_values)
def test_depth_is_counted_as_json_has_it(value):
    def depth(part):
        children = part.values() if isinstance(part, dict) else part
        return 1 + max(map(depth, children), default=0) if isinstance(part, (list, dict)) else 0

    assert depth_of(json.dumps(value).encode()) == depth(value)


def test_a_version_of_the_longest_name_is_named_in_requests():
    name = check_name("v" * LONGEST_NAME)
    assert RecommendRequest(version=name).version == FeedbackEvent(user_id=1, item_id=1, version=name).version
    with pytest.raises(ValueError, match="at most 128 in all"):
        check_name(name + "v")
    for kind, fields in ((RecommendRequest, {}), (FeedbackEvent, {"user_id": 1, "item_id": 1})):
        with pytest.raises(ValueError, match="at most 128 characters"):
            kind(**fields, version=name + "v")


@pytest.mark.parametrize("wish", [{"diversity": 0.5}, {"calibration": 0.5}, {"explore": True}])
@pytest.mark.parametrize("late", [True, False])
def test_a_list_that_is_late_is_a_plain_one(version, tmp_path, make_service, wish, late):
    """The model is late, or nothing but the order is."""
    service = make_service(version, tmp_path, Engine(exploration=EpsilonGreedy(epsilon=0.5)))

    async def work(http):
        if late:

            async def submit(history, *, deadline):
                await asyncio.sleep(max(0.0, deadline - time.monotonic()) + 0.01)
                raise Expired("the deadline passed.")

            service.live.newest.batcher.submit = submit
        else:

            async def expired(*_):
                raise Expired("its turn came after the deadline")

            service._in_thread = expired
        body = {"history": [1, 2], "k": 5, "deadline_ms": 20 if late else 20_000}
        plain, found = [await post(http, "/v1/recommend", body | options) for options in ({}, wish)]
        assert keys_of(found) == keys_of(plain) and len(keys_of(found)) == 5
        assert found["scored_by"] == ("popularity" if late else "model")
        assert found["degraded"] and found["explore_seed"] == ""
        note = "The list was not ordered in time; it is that of the scores alone."
        assert found["notes"] == [*plain["notes"], note]
        assert not any(item["explored"] or item["propensity"] for item in found["items"])
        assert 'jaxrec_degraded_total{why="order_expired"} 1.0' in (await http.get("/metrics")).text

    talk(service, work)


def test_a_shadow_is_asked_and_never_heard(version, tmp_path, make_service, renamed):
    service = make_service(None, tmp_path, shadow="next")
    for name in ("next", "now"):
        service.live.install(renamed(version, name))

    async def work(http):
        found = [await post(http, "/v1/recommend", {"history": [item], "k": 5}) for item in (1, 2, 3)]
        assert {answer["model_version"] for answer in found} == {"now"}
        for _ in range(100):
            text = (await http.get("/metrics")).text
            if "jaxrec_shadow_overlap_count 3.0" in text:
                break
            await asyncio.sleep(0.05)
        assert "jaxrec_shadow_overlap_count 3.0" in text
        assert "jaxrec_shadow_overlap_sum 3.0" in text, "the same model has the same lists"

        async def fails(histories):
            raise RuntimeError("broken")

        service.live.named("next").batcher.submit = fails
        assert len((await post(http, "/v1/recommend", {"history": [4]}))["items"]) == 10
        await asyncio.sleep(0.05)
        assert "jaxrec_shadow_failures_total 1.0" in (await http.get("/metrics")).text

    talk(service, work)


def test_a_version_that_goes_while_a_request_waits_is_replaced_whole(
    version, tmp_path, make_service, renamed
):
    service = make_service(None, tmp_path, shares={"old": 1.0})
    for name in ("old", "new"):
        service.live.install(renamed(version, name))

    async def work(http):
        async def gone(*_, **__):
            raise Closed("the version went out of use")

        service.live.named("old").batcher.submit = gone
        found = await post(http, "/v1/recommend", {"history": [1, 2], "k": 5, "version": "old"})
        assert (found["model_version"], found["known_user"], len(found["items"])) == ("new", True, 5)
        error = await post(http, "/v1/recommend", {"history": [1, 2], "user_id": 1}, status=503)
        assert "went out of use" in error["error"], (
            "who is dealt it still, is asked at a server that shuts down"
        )

    talk(service, work)
