"""The routes of the service, their errors, and the page to try it."""

import asyncio
from collections.abc import Sequence
from functools import partial
from importlib import resources
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.params import Depends
from fastapi.responses import HTMLResponse
from fastapi.security import APIKeyHeader
from fastapi_offline import FastAPIOffline
from jax.errors import JaxRuntimeError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route

from tca4rec_jax.errors import UserError, one_line
from tca4rec_jax.explanation.page import explanation_page
from tca4rec_jax.serving import schemas
from tca4rec_jax.serving.batcher import Closed, Full, Late
from tca4rec_jax.serving.guard import GONE, KEY_HEADER, Guard, Json, refusal
from tca4rec_jax.serving.model import Limits
from tca4rec_jax.serving.service import Busy, Gone, Service
from tca4rec_jax.training.fault_tolerance import CheckpointError

# Of the run's files, its numbers, or the device's memory: what is served goes on.
_CANNOT_LOAD = UserError, OSError, CheckpointError, FloatingPointError, JaxRuntimeError
_STATUSES = {
    400: "no JSON",
    401: "the key is missing or wrong",
    404: "there is no such page",
    408: "the request did not arrive in time",
    409: "another reload goes on, or the run can't be loaded",
    413: "the body is too large",
    422: "a field is missing, unknown, or has a value that is not taken, such as an unknown item",
    429: "too many requests wait to be in time; Retry-After says for how many seconds to stay away",
    500: "a fault of the service, which is in its log",
    503: "loading, or about to end",
    504: "no answer before the deadline",
}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {one: {"model": schemas.Error, "description": _STATUSES[one]} for one in statuses}


_OF_A_SEARCH = _errors(400, 401, 408, 413, 422, 429, 500, 503, 504)
_PAGE: dict[int | str, dict[str, Any]] = {200: {"content": {"text/html": {}}}}
_NEEDS_KEY = [Security(APIKeyHeader(name=KEY_HEADER, auto_error=False))]


def make_app(service: Service, *, key: str, admin_key: str) -> FastAPI:
    """The ASGI application of a service.

    Without a `key` everybody may ask; without an `admin_key` nobody may reload over HTTP.
    """
    app = FastAPIOffline(
        title="tca4rec_jax",
        redoc_url=None,
        static_url="/docs-static",
        summary="Recommendations of an LLM, guided by a CF model",
    )
    _add_recommending(app, service, _NEEDS_KEY if key else [])
    _add_watching(app, service)
    _add_admin(app, service)
    _add_errors(app)
    keys = {"/admin": admin_key}
    if key:
        keys |= dict.fromkeys(("/recommend", "/score", "/explain", "/items"), key)
    routes = {route.path for route in app.routes if isinstance(route, Route)}
    limits, metrics = service.limits, service.metrics
    app.add_middleware(Guard, limits=limits, metrics=metrics, keys=keys, routes=routes)
    _add_limits(app, limits)
    return app


def _add_limits(app: FastAPI, limits: Limits) -> None:
    """Puts how long lists may be into the OpenAPI: the types of requests don't know."""
    most = dict.fromkeys(("history", "allow", "deny"), limits.items)
    most |= {"candidates": limits.candidates, "histories": limits.most_histories}
    of_type = app.openapi()["components"]["schemas"]
    for name in ("RecommendRequest", "ScoreRequest", "ExplainRequest"):
        fields = of_type[name]["properties"]
        for field in fields.keys() & most.keys():
            for one in fields[field].get("anyOf", [fields[field]]):  # null is another
                if one["type"] == "array":
                    one["maxItems"] = most[field]
                    if field == "histories":
                        one["items"]["maxItems"] = limits.items


def _add_recommending(app: FastAPI, service: Service, needs: Sequence[Depends]) -> None:
    @app.post(
        "/recommend", response_model=schemas.Lists, responses=_OF_A_SEARCH, dependencies=needs
    )
    async def recommend(asked: schemas.RecommendRequest, request: Request) -> Response:
        """Lists of the best k items after one history, or after each of several."""
        model = service.model
        k = min(10, model.most_items) if asked.k is None else asked.k
        wanted = asked.rows, k, asked.guidance, asked.filters
        admitted = await asyncio.to_thread(model.lists_after, *wanted)
        request.scope["log"] = {"run": model.name, "rows": len(asked.rows), "k": k}
        lists = await service.answer(admitted, request.receive)
        named = [[one._asdict() for one in found[:k]] for found in lists]
        return Json({"run": model.name, "lists": named})

    @app.post("/score", response_model=schemas.Scores, responses=_OF_A_SEARCH, dependencies=needs)
    async def score(asked: schemas.ScoreRequest, request: Request) -> Response:
        """Exact scores of given items, without filters: to rank another system's list anew."""
        model = service.model
        wanted = asked.history, asked.candidates, asked.guidance
        admitted = await asyncio.to_thread(model.scores_of, *wanted)
        request.scope["log"] = {"run": model.name, "candidates": len(asked.candidates)}
        (scores,) = await service.answer(admitted, request.receive)
        return Json({"run": model.name, "scores": scores.tolist()})

    @app.post(
        "/explain", response_model=schemas.Explained, responses=_OF_A_SEARCH | _PAGE,
        dependencies=needs,
    )  # fmt: skip
    async def explain(asked: schemas.ExplainRequest, request: Request) -> Response:
        """A list and the choices that made it, as JSON or as a page."""
        model = service.model
        k = min(10, model.most_items) if asked.k is None else asked.k
        more = asked.model_dump(include={"compare", "children", "leave_one_out"})
        wanted = asked.history, k, asked.guidance, asked.filters
        admitted = await asyncio.to_thread(partial(model.explanation_of, *wanted, **more))
        request.scope["log"] = {"run": model.name, "k": k}
        (explanation,) = await service.answer(admitted, request.receive)
        if asked.page:
            return HTMLResponse(await asyncio.to_thread(explanation_page, explanation))
        return Json({"run": model.name, "explanation": explanation.to_json()})

    @app.get(
        "/items", response_model=schemas.Found, responses=_errors(401, 422, 500, 503),
        dependencies=needs,
    )  # fmt: skip
    async def items(
        title: Annotated[str, Query(min_length=1, max_length=200)],
        most: Annotated[int, Query(ge=1, le=100)] = 20,
    ) -> Response:
        """Items whose title has a text."""
        found = await asyncio.to_thread(service.model.titles_like, title, most)
        return Json({"items": [{"item_id": one, "title": text} for one, text in found]})


def _add_watching(app: FastAPI, service: Service) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(resources.files(__package__).joinpath("page.html").read_text("utf-8"))

    @app.get("/health", response_model=schemas.About)
    async def health() -> Response:
        """The process lives."""
        return Json(service.about())

    @app.get("/ready", response_model=schemas.About, responses={503: {"model": schemas.About}})
    async def ready() -> Response:
        """Whether requests are taken: every program is compiled, and the service does not end."""
        return Json(service.about(), 200 if service.state == "ready" else 503)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _add_admin(app: FastAPI, service: Service) -> None:
    refused = _errors(400, 401, 408, 409, 413, 422, 500, 503)

    @app.post(
        "/admin/reload", response_model=schemas.About, responses=refused, dependencies=_NEEDS_KEY
    )
    async def reload(asked: schemas.ReloadRequest) -> Response:
        """Loads a run beside the one in use, compiles it, then serves it; no request is lost."""
        try:
            await asyncio.wrap_future(service.begin_reload(asked.run))
        except _CANNOT_LOAD as error:
            return refusal(409, one_line(error))
        return Json(service.about())

    @app.post(
        "/admin/rollback", response_model=schemas.About, responses=_errors(401, 409, 500, 503),
        dependencies=_NEEDS_KEY,
    )  # fmt: skip
    async def rollback() -> Response:
        """Serves what was served before the last reload."""
        await asyncio.to_thread(service.rollback)
        return Json(service.about())


def _add_errors(app: FastAPI) -> None:
    def of_fields(_: Request, error: Exception) -> Json:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return refusal(400, f"the body is no JSON: {first.get('ctx', {}).get('error', '')}")
        where = ".".join(str(part) for part in first["loc"][1:]) or "the request"
        return refusal(422, f"{where}: {first['msg']}")

    def of_http(_: Request, error: Exception) -> Json:
        assert isinstance(error, HTTPException)
        return refusal(error.status_code, str(error.detail), **(error.headers or {}))

    def full(_: Request, error: Exception) -> Json:
        assert isinstance(error, Full)
        return refusal(429, str(error), **{"Retry-After": str(error.seconds)})

    def closed(_: Request, error: Exception) -> Json:
        return refusal(503, str(error), Connection="close", **{"Retry-After": "1"})

    app.add_exception_handler(RequestValidationError, of_fields)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(Full, full)
    app.add_exception_handler(Closed, closed)
    app.add_exception_handler(UserError, lambda _, error: refusal(422, str(error)))
    app.add_exception_handler(Busy, lambda _, error: refusal(409, str(error)))
    app.add_exception_handler(Gone, lambda *_: refusal(GONE, "the client has gone"))
    app.add_exception_handler(
        Late, lambda *_: refusal(504, "no answer before the deadline: try again when it is calmer")
    )
