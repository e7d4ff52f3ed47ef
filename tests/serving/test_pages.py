"""Pages under rules: whatever is asked, they are one list, and nothing that is forbidden is on any of them."""

import asyncio
import threading

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxrec.serving.app import make_app
from jaxrec.serving.engine import COLUMNS, Engine
from jaxrec.serving.exploration import EpsilonGreedy
from jaxrec.serving.formula import Formula
from jaxrec.serving.graph import GraphRules
from jaxrec.serving.guard import Limits
from jaxrec.serving.schema import FeedbackRequest, HideItem, RecommendRequest

NAMES = ("Comedy", "Drama", "Horror", "Children")
SECOND_PARTS = {40: 41, 42: 43, 300: 301}  # an item, and what waits for it
items = st.integers(1, 400)
some_items = st.lists(items, max_size=30, unique=True)
some_names = st.lists(st.sampled_from(NAMES), max_size=2, unique=True)
engines = st.sampled_from(["score", "score + 0.1*log(1 + popularity)", "newness - score"])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_pages_are_one_list_without_what_is_forbidden(version, tmp_path, make_service, data):
    key_of, id_of = version.bundle.catalogue.vocabulary.key_of, version.bundle.catalogue.vocabulary.id_of
    seen, excluded, hidden = data.draw(some_items), data.draw(some_items), data.draw(some_items)
    allowed = data.draw(st.none() | st.lists(items, min_size=1, max_size=60, unique=True))
    any_of, none_of, cap = data.draw(some_names), data.draw(some_names), data.draw(st.integers(0, 9))
    remembered, size = data.draw(st.booleans()), data.draw(st.integers(1, 20))
    asked = {
        "exclude": [key_of(item) for item in excluded],
        "diversity": data.draw(st.sampled_from([0.0, 0.4])),
        "explore": data.draw(st.booleans()),
        "diversity_by": data.draw(st.sampled_from(["mmr", "dpp"])),
        "boosts": data.draw(st.dictionaries(st.sampled_from(NAMES), st.floats(-5, 5), max_size=2)),
        "filter": {
            "any_of": any_of,
            "none_of": none_of,
            "max_per_category": cap,
            "allow": None if allowed is None else [key_of(item) for item in allowed],
            "min_score": data.draw(st.sampled_from([None, 0.0])),
        },
    }
    engine = Engine(
        formula=Formula.parse(data.draw(engines), COLUMNS),
        exploration=EpsilonGreedy(epsilon=0.5),
        prerequisites=GraphRules(
            [(str(key_of(second)), str(key_of(first))) for first, second in SECOND_PARTS.items()]
        ),
    )

    async def main():
        service = make_service(version, tmp_path, engine)
        await service.erase("u")
        for item in await asyncio.to_thread(service.store.hidden):
            await service.hide_item(HideItem(item_id=item, hidden=False))
        for item in hidden:
            await service.hide_item(HideItem(item_id=key_of(item)))
        who = {"user_id": "u"} if remembered else {"history": [key_of(item) for item in seen]}
        if remembered and seen:
            events = [{"user_id": "u", "item_id": key_of(item)} for item in seen]
            await service.feedback(FeedbackRequest.model_validate({"events": events}))
        pages, seed = [], ""
        for page in range(4):
            wanted = {**asked, **who, "k": size, "offset": page * size, "explore_seed": seed}
            answer = await service.recommend(RecommendRequest.model_validate(wanted))
            seed = answer.explore_seed
            pages.append([id_of(item.item_id) for item in answer.items])
        whole = RecommendRequest.model_validate(
            {**asked, **who, "k": min(100, 4 * size), "explore_seed": seed}
        )
        at_once = [id_of(item.item_id) for item in (await service.recommend(whole)).items]
        await service.close()
        return pages, at_once

    pages, at_once = asyncio.run(main())
    found = [item for page in pages for item in page]
    assert found == at_once
    assert len(set(found)) == len(found)
    assert not set(found) & {*seen, *excluded, *hidden}
    assert allowed is None or set(found) <= set(allowed)
    assert not set(found) & {second for first, second in SECOND_PARTS.items() if first not in seen}
    categories = version.bundle.catalogue.table["categories"].to_pylist()
    of_items = [set(categories[item - 1]) for item in found]
    assert all(not any_of or own & set(any_of) for own in of_items)
    assert all(not own & set(none_of) for own in of_items)
    if cap:
        assert all(sum(name in own for own in of_items) <= cap for name in version.facts.categories)
    full = [len(page) == size for page in pages]
    assert full == sorted(full, reverse=True), "a page is short only where nothing is left"


def test_ten_pages_of_ten_for_a_user_who_is_remembered(version, tmp_path, make_service):
    async def main():
        service = make_service(version, tmp_path)
        user = version.known_users[0]
        seen = {event["item_id"] for event in (await service.user(user))["history"]}
        pages = [
            (await service.recommend(RecommendRequest(user_id=user, k=10, offset=10 * page))).items
            for page in range(10)
        ]
        await service.close()
        return seen, [item.item_id for page in pages for item in page]

    seen, found = asyncio.run(main())
    assert len(set(found)) == len(found) == 100
    assert seen
    assert not seen & set(found)


def test_a_full_queue_says_when_to_come_back(version, tmp_path, make_service):
    begun, let = threading.Event(), threading.Event()

    async def main():
        service = make_service(version, tmp_path, max_queue=2, max_batch=1)
        live = service.live.newest
        compute = live.batcher._compute
        live.batcher._compute = lambda histories: (begun.set(), let.wait(20), compute(histories))[-1]
        app = make_app(service, Limits(), service.measures)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as http:
            ask = lambda: http.post("/v1/recommend", json={"history": [1], "k": 1, "deadline_ms": 60_000})  # noqa: E731
            first = [asyncio.create_task(ask())]
            assert await asyncio.to_thread(begun.wait, 20)
            first += [asyncio.create_task(ask()) for _ in range(2)]
            for _ in range(500):
                if live.batcher.waiting == 2:
                    break
                await asyncio.sleep(0.01)
            refused = await ask()
            let.set()
            answered = await asyncio.gather(*first)
        await service.close()
        return refused, answered

    refused, answered = asyncio.run(main())
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert "waiting already" in refused.json()["error"]
    assert [answer.status_code for answer in answered] == [200] * 3
