"""Open Inference Protocol, version 2: what orchestrators and gateways ask a model server.

https://github.com/kserve/open-inference-protocol. The model takes histories in own ids and gives the best items.
"""

from typing import Annotated, Any, Literal

from fastapi import FastAPI, Path
from fastapi.responses import JSONResponse
from pydantic import ConfigDict, Field, StrictInt

from jaxrec import __version__
from jaxrec.serving.live import UnknownError
from jaxrec.serving.schema import Key, RecommendRequest, Told
from jaxrec.serving.service import Service

__all__ = ["add_inference_protocol"]

NAME = "jaxrec"
MOST_ROWS, MOST_EVENTS = 64, 1_000
ModelName = Annotated[str, Path(description="of the model.", examples=[NAME])]


class Tensor(Told):
    """An input: histories.

    Attributes:
      name: of the input.
      shape: histories, and events of each.
      datatype: of the ids.
      data: items, oldest first, a history after the other; "" or 0 where a shorter history has no event.
    """

    model_config = ConfigDict(extra="ignore")
    name: Literal["history"]
    shape: Annotated[list[StrictInt], Field(min_length=2, max_length=2, examples=[[1, 2]])]
    datatype: Annotated[Literal["BYTES", "INT64", "INT32"], Field(examples=["INT64"])]
    data: Annotated[list[Key | Literal[""]], Field(max_length=MOST_ROWS * MOST_EVENTS, examples=[[1, 2]])]


class Parameters(Told):
    """Of a request.

    Attributes:
      k: items of a list.
    """

    model_config = ConfigDict(extra="ignore")
    k: Annotated[StrictInt, Field(ge=1, le=100)] = 10


class InferRequest(Told):
    """Histories, as the protocol has them.

    Attributes:
      id: comes back in the answer.
      parameters: of the lists.
      inputs: the histories.
    """

    model_config = ConfigDict(extra="ignore")
    id: Annotated[str, Field(max_length=200)] = ""
    parameters: Parameters = Parameters()
    inputs: Annotated[list[Tensor], Field(min_length=1, max_length=1)]


def add_inference_protocol(app: FastAPI, service: Service) -> None:
    """Adds the protocol's routes."""

    @app.get("/v2/health/live")
    async def live() -> dict[str, bool]:
        """The process answers."""
        return {"live": True}

    @app.get("/v2/health/ready")
    async def ready() -> JSONResponse:
        """A model is loaded and compiled."""
        return JSONResponse({"ready": service.ready}, 200 if service.ready else 503)

    @app.get("/v2")
    async def server() -> dict[str, Any]:
        """The server."""
        return {"name": NAME, "version": __version__, "extensions": []}

    @app.get("/v2/models/{name}")
    @app.get("/v2/models/{name}/versions/{version}")
    async def model(name: ModelName, version: str = "") -> dict[str, Any]:
        """The model's inputs and outputs."""
        _check(service, name, version)
        kind = "BYTES" if _has_text(service) else "INT64"
        return {
            "name": NAME,
            "versions": service.live.names,
            "platform": "jax",
            "inputs": [{"name": "history", "datatype": kind, "shape": [-1, -1]}],
            "outputs": [
                {"name": "item_ids", "datatype": kind, "shape": [-1, -1]},
                {"name": "scores", "datatype": "FP32", "shape": [-1, -1]},
            ],
        }

    @app.get("/v2/models/{name}/ready")
    @app.get("/v2/models/{name}/versions/{version}/ready")
    async def model_ready(name: ModelName, version: str = "") -> dict[str, Any]:
        """Whether the model answers."""
        _check(service, name, version)
        return {"name": NAME, "ready": service.ready}

    @app.post("/v2/models/{name}/infer")
    @app.post("/v2/models/{name}/versions/{version}/infer")
    async def infer(request: InferRequest, name: ModelName, version: str = "") -> dict[str, Any]:
        """The best items of each history."""
        _check(service, name, version)
        return await _inferred(service, request, version)


async def _inferred(service: Service, request: InferRequest, version: str) -> dict[str, Any]:
    """One list a row of the history, cut to the shortest."""
    tensor = request.inputs[0]
    rows, length = tensor.shape
    if not (1 <= rows <= MOST_ROWS and 1 <= length <= MOST_EVENTS and rows * length == len(tensor.data)):
        raise ValueError(
            f"history of shape {tensor.shape} with {len(tensor.data)} entries: give rows * events of them, at most "
            f"{MOST_ROWS} rows of {MOST_EVENTS}."
        )
    answers = [
        await service.recommend(
            RecommendRequest(
                k=request.parameters.k,
                history=tuple(key for key in tensor.data[at : at + length] if key not in ("", 0)),
                version=version,
            )
        )
        for at in range(0, len(tensor.data), length)
    ]
    width = min(len(answer.items) for answer in answers)
    kept = [answer.items[:width] for answer in answers]
    ids = [item.item_id for items in kept for item in items]
    # What the versions that answered have: a tensor is of one type, and an item that came in may have text for an id.
    text = any(isinstance(key, str) for key in ids) or (not ids and _has_text(service))
    return {
        "model_name": NAME,
        "model_version": answers[0].model_version,
        "id": request.id,
        "outputs": [
            {
                "name": "item_ids",
                "datatype": "BYTES" if text else "INT64",
                "shape": [rows, width],
                "data": [str(key) for key in ids] if text else ids,
            },
            {
                "name": "scores",
                "datatype": "FP32",
                "shape": [rows, width],
                "data": [item.score for items in kept for item in items],
            },
        ],
    }


def _has_text(service: Service) -> bool:
    """Whether ids of the newest version's own items are text."""
    return service.live.newest.version.bundle.catalogue.vocabulary.is_text


def _check(service: Service, name: str, version: str) -> None:
    if name != NAME:
        raise UnknownError(f"model {name!r} is not here; there is {NAME!r}.")
    if version:
        service.live.named(version)
