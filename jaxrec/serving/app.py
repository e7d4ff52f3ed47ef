"""The service over HTTP: JSON in and out, an OpenAPI page, health for those who watch, a page to try it on."""

import contextlib
import functools
import logging
import sqlite3
from collections.abc import AsyncIterator, Mapping
from importlib import resources
from typing import Annotated, Any

import redis
from fastapi import FastAPI, Path, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from jaxrec.serving.batcher import Closed, Expired, Overloaded
from jaxrec.serving.guard import App, Guard, Limits
from jaxrec.serving.inference_protocol import add_inference_protocol
from jaxrec.serving.json_route import JsonRoute
from jaxrec.serving.live import UnknownError
from jaxrec.serving.measures import Measures
from jaxrec.serving.reference import reference_page
from jaxrec.serving.schema import (
    AddItem,
    Answer,
    BundleRequest,
    ErrorAnswer,
    ExplainAnswer,
    ExplainRequest,
    FeedbackRequest,
    HideItem,
    RankRequest,
    RecommendRequest,
    SearchRequest,
    SimilarRequest,
    Text,
)  # fmt: skip
from jaxrec.serving.service import Service

__all__ = ["make_app"]

log = logging.getLogger(__name__)

ERRORS = (400, 401, 404, 408, 413, 421, 422, 429, 503, 504)  # that any request may be answered with
PAGE = {"page.css": "text/css", "page.js": "text/javascript", "reference.css": "text/css"}
UserId = Annotated[Text, Path(description="whose; a / in it is written %2F.", examples=["1"])]


def make_app(service: Service, limits: Limits, measures: Measures) -> App:
    """The server's application."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    app = FastAPI(
        title="jaxrec",
        description="Recommendations with rules, reasons and feedback.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        responses={status: {"model": ErrorAnswer} for status in ERRORS},
    )
    app.router.route_class = JsonRoute
    _add_errors(app)
    _add_lists(app, service)
    _add_state(app, service)
    _add_page(app, service, measures)
    add_inference_protocol(app, service)
    return Guard(app, limits, measures)


def _add_lists(app: FastAPI, service: Service) -> None:
    @app.post("/v1/recommend")
    async def recommend(request: RecommendRequest) -> Answer:
        """A list for a user, a guest or a given history."""
        return await service.recommend(request)

    @app.post("/v1/rank")
    async def rank(request: RankRequest) -> Answer:
        """Scores of given items, in their order."""
        return await service.rank(request)

    @app.post("/v1/similar")
    async def similar(request: SimilarRequest) -> Answer:
        """Items like one."""
        return await service.similar(request)

    @app.post("/v1/search")
    async def search(request: SearchRequest) -> Answer:
        """Items by text."""
        return await service.search(request)

    @app.post("/v1/bundle")
    async def bundle(request: BundleRequest) -> Answer:
        """A set of items that go together."""
        return await service.bundle(request)

    @app.post("/v1/explain")
    async def explain(request: ExplainRequest) -> ExplainAnswer:
        """Why an item is recommended."""
        return await service.explain(request)


def _add_state(app: FastAPI, service: Service) -> None:
    @app.post("/v1/feedback")
    async def feedback(request: FeedbackRequest) -> dict[str, int]:
        """What users did; the next answer knows. Counts the events: `taken`, `known_already`, `unknown`."""
        return await service.feedback(request)

    # A path: an id may have a "/" in it, which the server gets decoded.
    @app.get("/v1/users/{user_id:path}")
    async def user(user_id: UserId) -> dict[str, Any]:
        """What is remembered of a user: the `history`, with `item_id`, `title` and `seconds` of each event."""
        return await service.user(user_id)

    @app.delete("/v1/users/{user_id:path}")
    async def erase(user_id: UserId) -> dict[str, int]:
        """Forgets what a user did, and says how many events are `erased`."""
        return await service.erase(user_id)

    @app.post("/v1/items", status_code=201)
    async def add_item(request: AddItem) -> dict[str, Any]:
        """Adds an item that the model has never seen."""
        return await service.add_item(request)

    @app.post("/v1/items/hide")
    async def hide_item(request: HideItem) -> dict[str, Any]:
        """Hides an item from everybody, or shows it again."""
        return await service.hide_item(request)

    @app.get("/v1/about")
    async def about() -> dict[str, Any]:
        """The versions, the catalogue's size and categories."""
        return await service.about()


def _add_page(app: FastAPI, service: Service, measures: Measures) -> None:
    folder = resources.files("jaxrec.serving") / "page"
    index = (folder / "index.html").read_bytes()
    files = {name: (folder / name).read_bytes() for name in PAGE}

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(index, media_type="text/html; charset=utf-8")

    @functools.cache
    def reference() -> bytes:
        # Made when it is first asked for: the routes are all there then.
        return reference_page(app.openapi())

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return Response(reference(), media_type="text/html; charset=utf-8")

    @app.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        if name not in files:
            raise UnknownError(f"there is no {name!r}.")
        return Response(files[name], media_type=f"{PAGE[name]}; charset=utf-8")

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(measures.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_errors(app: FastAPI) -> None:
    again = {"Retry-After": "1"}

    def answer(
        kind: type[Exception], status: int, headers: dict[str, str] | None = None, text: str = ""
    ) -> None:
        async def handler(_: Request, error: Exception) -> JSONResponse:
            return _error(status, text or str(error), headers)

        app.add_exception_handler(kind, handler)

    answer(UnknownError, 404)
    answer(ValueError, 400)
    answer(Overloaded, 429, again)
    answer(Closed, 503, again)
    answer(Expired, 504)
    for away in (redis.RedisError, sqlite3.OperationalError):
        answer(away, 503, again, "the state cannot be reached; try again.")

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        found = error.errors()[0]
        where = ".".join(str(part) for part in found["loc"] if part != "body")
        return _error(422, f"{where[:200] or 'body'}: {found['msg']}")

    async def refused(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return _error(error.status_code, error.detail, error.headers)

    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        log.exception("a request failed", exc_info=error)
        return _error(500, "the server failed; its log says why.")

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(Exception, unexpected)


def _error(status: int, text: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    # What a client sent may be no text that can be sent back: half a surrogate pair is JSON.
    sayable = text.encode("utf-8", "backslashreplace").decode()
    return JSONResponse({"error": sayable}, status, headers)
