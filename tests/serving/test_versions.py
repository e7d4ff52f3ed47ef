"""Several versions at once, explored lists, and what waits for its turn."""

import asyncio
import dataclasses
import itertools
import shutil
import time

import numpy as np
import pytest

from jaxrec.export.compiled import Compiled
from jaxrec.export.layout import BATCH_SIZES, USER_TOWER, sized_program
from jaxrec.export.manifest import Manifest
from jaxrec.serving.batcher import Expired, Overloaded
from jaxrec.serving.engine import Engine
from jaxrec.serving.exploration import EpsilonGreedy
from jaxrec.serving.live import UnknownError
from jaxrec.serving.schema import FeedbackRequest, RecommendRequest, SimilarRequest
from jaxrec.serving.version import History, Version
from jaxrec.serving.versions import Watcher, versions_in


def put(bundles, directory, name, created):
    """A version of that name and age in a directory of versions."""
    shutil.copytree(bundles / "v1", directory / name)
    manifest = Manifest.read(directory / name)
    facts = {**manifest.facts, "created": created}
    dataclasses.replace(manifest, version=name, facts=facts).write(directory / name)


async def watching(service, bundles, directory):
    """The watcher of a directory with one version, which is in use."""
    shutil.copytree(bundles / "v1", directory / "v1")
    watcher = Watcher(service, directory, 60)
    await watcher.load_first(set())
    return watcher


def test_versions_are_dealt_by_share_and_the_same_to_a_user(version, tmp_path, make_service, renamed):
    async def main():
        service = make_service(None, tmp_path, shares={"a": 3.0, "b": 1.0})
        for name in ("a", "b"):
            service.live.install(renamed(version, name))
        dealt = {}
        for user in range(400):
            first = (await service.recommend(RecommendRequest(user_id=user, k=1))).model_version
            assert (await service.recommend(RecommendRequest(user_id=user, k=1))).model_version == first
            dealt[first] = dealt.get(first, 0) + 1
        assert 60 < dealt["b"] < 140
        named = await service.recommend(RecommendRequest(user_id=1, k=1, version="b"))
        assert named.model_version == "b"
        service.live.drop("b")
        assert (await service.recommend(RecommendRequest(user_id=1, k=1))).model_version == "a"
        await service.close()

    asyncio.run(main())


def test_a_damaged_version_is_refused_and_the_old_one_answers_on(bundles, tmp_path, make_service):
    async def main():
        directory = tmp_path / "exports"
        service = make_service(None, tmp_path)
        watcher = await watching(service, bundles, directory)
        assert service.live.names == ["v1"]
        shutil.copytree(bundles / "v1", directory / "v2")
        weights = directory / "v2" / "weights.safetensors"
        damaged = bytearray(weights.read_bytes())
        damaged[-1] ^= 1
        weights.write_bytes(damaged)
        assert await watcher.look_once() == []
        assert service.live.names == ["v1"]
        assert await watcher.look_once() == [], "it is not tried again as it is"
        assert b"jaxrec_reload_failures_total 1.0" in service.measures.text()
        assert (await service.recommend(RecommendRequest(history=(1,)))).model_version == "v1"
        shutil.copyfile(bundles / "v1" / "weights.safetensors", weights)
        assert await watcher.look_once() == ["v1"], "its manifest says so"
        shutil.copytree(bundles / "v1", directory / "older")
        assert await watcher.look_once() == [], "an older one that comes late is not the newest"
        await service.close()

    asyncio.run(main())


def test_versions_of_one_model_share_what_is_compiled(bundles, version):
    programs = bundles / "v1" / "stablehlo"
    towers = [
        Compiled.of((programs / sized_program(USER_TOWER, *size)).read_bytes())
        for size in itertools.product(BATCH_SIZES, version.lengths)
    ]
    assert [tower.call._cache_size() for tower in towers] == [1] * len(towers)
    again = Version.open(bundles / "v1")
    assert [tower.call._cache_size() for tower in towers] == [1] * len(towers)
    symbolic = Compiled.of((programs / USER_TOWER).read_bytes())
    assert symbolic.call._cache_size() == 0, "a server asks for known sizes alone"
    history = [History(version.bundle.events_of([1, 2]))]
    np.testing.assert_array_equal(again.encode(history)[0].vector, version.encode(history)[0].vector)


def test_a_directory_without_versions_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="holds no exported version; make one with python -m jaxrec.export"):
        versions_in(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, "no JSON", "[]"])
def test_a_version_whose_manifest_cannot_be_read_is_the_oldest(text, tmp_path):
    for name, manifest in (("bad", text), ("good", '{"facts": {"created": "2026"}}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(manifest)
    assert versions_in(tmp_path) == [tmp_path / "bad", tmp_path / "good"]


def test_a_version_whose_directory_is_removed_is_rolled_back(bundles, tmp_path, make_service):
    async def main():
        directory = tmp_path / "exports"
        service = make_service(None, tmp_path)
        watcher = await watching(service, bundles, directory)
        put(bundles, directory, "v2", "2999")
        assert await watcher.look_once() == ["v2"]
        shutil.rmtree(directory / "v2")
        await watcher.look_once()
        assert service.live.names == ["v1"]
        assert (await service.recommend(RecommendRequest(history=(1,)))).model_version == "v1"
        shutil.rmtree(directory / "v1")
        with pytest.raises(ValueError, match="holds no exported version"):
            await watcher.look_once()
        assert service.live.names == ["v1"], "the last one answers on"
        await service.close()

    asyncio.run(main())


def test_a_rollback_reaches_versions_that_were_never_loaded(bundles, tmp_path, make_service):
    """After a restart the newest alone is loaded; each look goes back to the newest that is whole."""

    async def main():
        for number in (1, 2, 3, 4):
            put(bundles, tmp_path / "exports", f"v{number}", f"200{number}")
        (tmp_path / "exports" / "v2" / "weights.safetensors").write_bytes(b"damaged")
        service = make_service(None, tmp_path)
        watcher = Watcher(service, tmp_path / "exports", 60)
        await watcher.load_first(set())
        for gone, loaded in (("v4", ["v3"]), ("v3", ["v1"])):
            shutil.rmtree(tmp_path / "exports" / gone)
            assert await watcher.look_once() == loaded
            assert service.live.names == loaded
            assert f'version="{loaded[0]}"' in service.measures.text().decode()
        assert await watcher.look_once() == [], "the damaged one is newer, and refused as it lies there"
        shutil.rmtree(tmp_path / "exports" / "v1")
        assert await watcher.look_once() == []
        assert service.live.names == ["v1"], "the last one answers on"
        await service.close()

    asyncio.run(main())


def test_the_newest_version_may_be_the_shadow(bundles, tmp_path, make_service):
    async def main():
        for number in (1, 2, 3):
            put(bundles, tmp_path / "exports", f"v{number}", f"200{number}")
        service = make_service(None, tmp_path, shadow="v3", shares={"v3": 1.0})
        watcher = Watcher(service, tmp_path / "exports", 60)
        await watcher.load_first({"v3"})
        assert service.live.names == ["v3", "v2"]
        assert [service.live.share_of(name) for name in service.live.names] == [0, 1]
        for user in (None, "u"):
            answer = await service.recommend(RecommendRequest(history=(1,), user_id=user))
            assert answer.model_version == "v2"
        assert 'version="v2"' in service.measures.text().decode()
        shutil.rmtree(tmp_path / "exports" / "v2")
        assert await watcher.look_once() == ["v1"]
        assert service.live.names == ["v3", "v1"]
        await service.close()

    asyncio.run(main())


def test_a_shadow_alone_answers(version, tmp_path, make_service, renamed):
    async def main():
        service = make_service(renamed(version, "only"), tmp_path, shadow="only")
        assert (await service.recommend(RecommendRequest(history=(1,)))).model_version == "only"
        await service.close()

    asyncio.run(main())


def test_an_item_of_any_version_may_be_reported(version, tmp_path, make_service, renamed):
    """Two versions deal users, and only one knows the item."""

    async def main():
        service = make_service(None, tmp_path)
        service.live.install(version)
        service.live.install(renamed(version, "smaller"))
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


def test_guests_are_not_all_shown_the_same_exploration(version, tmp_path, make_service):
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


def test_lists_that_wait_to_be_ordered_have_a_bound_and_a_deadline(version, tmp_path, make_service):
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
