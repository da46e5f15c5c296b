"""The fields of a request, whether it comes as JSON or as a form."""

from __future__ import annotations

import json
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message

from hf_nmsparse.serve.errors import RequestError
from hf_nmsparse.serve.limits import Limits, read_body

__all__ = ["read_fields"]

_FORMS = ("application/x-www-form-urlencoded", "multipart/form-data")
_MOST_FIELDS = 300


async def read_fields(request: Request, limits: Limits) -> dict[str, Any]:
    """The fields of a JSON object, or of a form and of the query, where a field that comes again makes a list.

    Raises:
        RequestError: The body is too long or malformed, or of another type.
        ClientDisconnect: The client went away.
    """
    body = await read_body(request, limits)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in _FORMS or not body:
        return await _form(request, body)
    if kind not in ("application/json", ""):
        raise RequestError(415, f"content-type: takes application/json, {' or '.join(_FORMS)}, got {kind!r}")
    return _object(body)


def _object(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise RequestError(400, f"the body is a JSON object, got {type(fields).__name__}")
    return fields


async def _form(request: Request, body: bytes) -> dict[str, Any]:
    async def replay() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    try:
        form = await Request(request.scope, replay).form(max_files=0, max_fields=_MOST_FIELDS)
    except HTTPException as error:
        raise RequestError(400, f"the body is no form: {error.detail}") from None
    fields: dict[str, Any] = {}
    for name, value in (*request.query_params.multi_items(), *form.multi_items()):
        fields[name] = [*_listed(fields[name]), value] if name in fields else value
    return fields


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
