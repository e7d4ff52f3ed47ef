"""Bodies that are JSON are read by their model; whatever else a route takes goes the framework's way."""

import pytest
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient

from jaxrec.serving.json_route import JsonRoute
from jaxrec.serving.schema import Answer, RecommendRequest


@pytest.fixture
def client():
    app = FastAPI()
    app.router.route_class = JsonRoute

    @app.post("/list")
    async def listed(request: RecommendRequest) -> Answer:
        return Answer(items=[], model_version=f"{request.user_id} {request.k}")

    @app.post("/facts", status_code=201)
    async def facts(request: RecommendRequest) -> dict[str, int]:
        return {"k": request.k}

    @app.post("/named/{name}")
    async def named(name: str, request: RecommendRequest) -> dict[str, str]:
        return {"name": f"{name} {request.k}"}

    async def invalid(_, error):
        assert isinstance(error, RequestValidationError)
        return JSONResponse([[*found["loc"], found["msg"]] for found in error.errors()], 422)

    app.add_exception_handler(RequestValidationError, invalid)
    return TestClient(app)


def test_a_body_becomes_the_endpoints_model_and_its_answer_json(client):
    answer = client.post("/list", json={"user_id": "x", "k": 3})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["model_version"] == "x 3"
    created = client.post(
        "/facts", json={"k": 3}, headers={"content-type": "application/json; charset=utf-8"}
    )
    assert (created.status_code, created.json()) == (201, {"k": 3})
    assert client.post("/named/y", json={"k": 2}).json() == {"name": "y 2"}


@pytest.mark.parametrize(
    ("body", "where"),
    [
        (b'{"k": "3"}', ["k"]),
        (b'{"k": true}', ["k"]),
        (b'{"filter": {"min_score": NaN}}', ["filter", "min_score"]),
        (b'{"nobody": 1}', ["nobody"]),
        (b'{"k": 3', []),
        (b'"\\ud800"', []),
        (b"", []),
    ],
)
def test_what_is_wrong_is_told_with_its_place(client, body, where):
    answer = client.post("/list", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert answer.json()[0][:-1] == where


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_body_of_another_kind_is_not_read(client, kind):
    answer = client.post("/list", content=b'{"k": 3}', headers={"content-type": kind} if kind else {})
    assert answer.status_code == 422
    assert "application/json" in answer.text


def test_the_description_is_that_of_any_route(client):
    described = client.get("/openapi.json").json()["paths"]["/list"]["post"]
    assert described["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith(
        "RecommendRequest"
    )
    assert described["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].endswith("Answer")
