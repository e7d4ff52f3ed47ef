"""Requests whose body is JSON, read by their model straight from the bytes.

The framework reads a body into dictionaries, resolves what an endpoint depends on, and checks what it answers field by
field: half of the time that a request spends outside of the model. What the description at /openapi.json says, stays.
"""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.requests import Request

__all__ = ["JsonRoute"]

_TOO_OTHER = {"type": "content_type", "loc": ("body",), "msg": "send application/json."}


class JsonRoute(APIRoute):
    """A route whose endpoint takes one argument, the model of its body, or a route as any other."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What answers a request."""
        asked = self.dependant
        others = (asked.path_params, asked.query_params, asked.header_params, asked.cookie_params)
        if len(asked.body_params) != 1 or any(others) or asked.dependencies:
            return super().get_route_handler()
        body = asked.body_params[0]
        model, endpoint = body.field_info.annotation, self.endpoint
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return super().get_route_handler()
        status = self.status_code or 200

        async def handle(request: Request) -> Response:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json" and not kind.endswith("+json"):
                raise RequestValidationError([_TOO_OTHER])
            try:
                read = model.model_validate_json(await request.body())
            except ValidationError as error:
                raise RequestValidationError(error.errors(include_url=False, include_input=False)) from error
            answer = await endpoint(**{body.name: read})
            if isinstance(answer, BaseModel):
                return Response(answer.model_dump_json(), status, media_type="application/json")
            return JSONResponse(answer, status)

        return handle
