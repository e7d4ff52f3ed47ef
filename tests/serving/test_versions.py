"""Several versions at once, explored lists, and what waits for its turn."""

import asyncio
import copy
import dataclasses
import shutil
import time

import pytest

from jaxrec.export.manifest import Manifest
from jaxrec.serving.batcher import Expired, Overloaded
from jaxrec.serving.engine import Engine
from jaxrec.serving.exploration import EpsilonGreedy
from jaxrec.serving.live import UnknownError
from jaxrec.serving.measures import Measures
from jaxrec.serving.schema import FeedbackRequest, RecommendRequest, SimilarRequest
from jaxrec.serving.service import Service, ServiceOptions
from jaxrec.serving.sqlite_store import SqliteStore
from jaxrec.serving.versions import Watcher


def make_service(version, tmp_path, engine=Engine()):
    service = Service(SqliteStore(tmp_path / "state.db"), engine, ServiceOptions(), Measures())
    if version is not None:
        service.live.install(version)
    return service


def test_a_version_whose_directory_is_removed_is_rolled_back(bundles, tmp_path):
    async def main():
        directory = tmp_path / "exports"
        shutil.copytree(bundles / "v1", directory / "v1")
        service = make_service(None, tmp_path)
        watcher = Watcher(service, directory, 60)
        await watcher.load_first(set())
        shutil.copytree(bundles / "v1", directory / "v2")
        manifest = Manifest.read(directory / "v2")
        facts = {**manifest.facts, "created": "2999"}
        dataclasses.replace(manifest, version="v2", facts=facts).write(directory / "v2")
        assert await watcher.look_once() == ["v2"]
        shutil.rmtree(directory / "v2")
        await watcher.look_once()
        assert service.live.names == ["v1"]
        assert (await service.recommend(RecommendRequest(history=(1,)))).model_version == "v1"
        shutil.rmtree(directory / "v1")
        assert service.live.names == ["v1"], "the last one answers on"
        await service.close()

    asyncio.run(main())


def test_an_item_of_any_version_may_be_reported(version, tmp_path):
    """Two versions deal users, and only one knows the item."""

    async def main():
        service = make_service(None, tmp_path)
        service.live.install(version)
        smaller = copy.copy(version)
        smaller.name = "smaller"
        service.live.install(smaller)
        view = service.live.named("smaller").view(service.store)
        cut = dataclasses.replace(view)
        object.__setattr__(cut, "id_of", lambda key: 0 if key == 1 else view.id_of(key))
        service.live.named("smaller")._view = cut
        events = [{"user_id": "u", "item_id": item} for item in (1, 2, "no such item")]
        assert await service.feedback(FeedbackRequest.model_validate({"events": events})) == {
            "taken": 2, "known_already": 0, "unknown": 1,
        }  # fmt: skip
        assert [event.item_id for event in service.store.history("u")] == ["1", "2"]
        assert (await service.similar(SimilarRequest(item_id=1))).model_version == version.name
        with pytest.raises(UnknownError, match="'nothing' is not in the catalogue"):
            await service.feedback(
                FeedbackRequest.model_validate({"events": [{"user_id": "u", "item_id": "nothing"}]})
            )
        await service.close()

    asyncio.run(main())


def test_guests_are_not_all_shown_the_same_exploration(version, tmp_path):
    async def main():
        service = make_service(version, tmp_path, engine=Engine(exploration=EpsilonGreedy(epsilon=0.5)))
        ask = lambda **more: service.recommend(RecommendRequest(explore=True, k=10, **more))  # noqa: E731
        answers = [await ask() for _ in range(8)]
        lists = [tuple(item.item_id for item in answer.items) for answer in answers]
        assert len(set(lists)) > 4
        again = await ask(explore_seed=answers[0].explore_seed)
        assert tuple(item.item_id for item in again.items) == lists[0]
        assert (await service.recommend(RecommendRequest())).explore_seed == ""
        await service.close()

    asyncio.run(main())


def test_lists_that_wait_to_be_ordered_have_a_bound_and_a_deadline(version, tmp_path):
    async def main():
        service = make_service(version, tmp_path)
        with pytest.raises(Expired):
            await service._in_thread(time.monotonic() - 1, list)
        service._in_threads = service.options.max_queue
        with pytest.raises(Overloaded):
            await service.recommend(RecommendRequest(history=(1,), diversity=0.5))
        service._in_threads = 0
        await service.close()

    asyncio.run(main())
