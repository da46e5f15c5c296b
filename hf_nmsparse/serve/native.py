"""The interface of this package: scores, alternatives and streams."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from hf_nmsparse.serve.errors import RequestError
from hf_nmsparse.serve.keys import Keys
from hf_nmsparse.serve.limits import Limits, read_body
from hf_nmsparse.serve.models import Mended, Models, Route
from hf_nmsparse.terminal import one_line
from hf_nmsparse.translations import Translation

__all__ = ["Answer", "Asked", "native"]


class Asked(BaseModel):
    """A request of ``/v1/translate``."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    text: str | list[str] = Field(description="one text, or several")
    source: str = Field(description="code of the source language")
    target: str = Field(description="code of the target language")
    beams: Annotated[int, Field(ge=1)] | None = Field(None, description="beam size; the model's if left out")
    alternatives: Annotated[int, Field(ge=0)] = Field(0, description="further translations of each text")
    max_new_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="longest translation in tokens")
    length_penalty: float | None = Field(None, description="power of the length by which scores are divided")
    no_repeat_ngram_size: Annotated[int, Field(ge=1)] | None = Field(
        None, description="sequences of so many tokens come once"
    )
    scores: bool = Field(False, description="whether the log-probability of each token is wanted")
    stream: bool = Field(
        False,
        description="whether the text comes piece by piece, as server-sent events; where one came as a loop the last "
        "one, done, holds the whole text as it is without stream",
    )

    def settings(self, limits: Limits) -> dict[str, Any]:
        """As `Translator.translate` takes them.

        Raises:
            RequestError: There are more beams or alternatives than allowed.
        """
        returned = self.alternatives + 1
        beams = self.beams if self.beams is not None or returned == 1 else max(returned, 4)
        if max(returned, beams or 1) > limits.beams:
            raise RequestError(400, f"beams are at most {limits.beams}, and alternatives one fewer; ask for fewer")
        if returned > (beams or 1):
            raise RequestError(400, f"{returned} translations need as many beams, got {beams}; ask for fewer")
        given = {
            "num_beams": beams,
            "num_return_sequences": returned if returned > 1 else None,
            "max_new_tokens": self.max_new_tokens,
            "length_penalty": self.length_penalty,
            "no_repeat_ngram_size": self.no_repeat_ngram_size,
            "return_scores": self.scores or None,
        }
        return {name: value for name, value in given.items() if value is not None}


class Translated(BaseModel):
    """A translation.

    Attributes:
        text: Its text.
        score: What beams are ranked by: the mean log-probability of its tokens, where ``length_penalty`` is 1.
        token_scores: The log-probability of each token.
        alternatives: Further translations, the next best first.
    """

    text: str
    score: float | None = None
    token_scores: list[float] | None = None
    alternatives: list[Translated] = []

    @classmethod
    def of(cls, translation: Translation) -> Translated:
        """A translation as it is answered."""
        scores = translation.token_scores
        return cls(
            text=translation.text,
            score=translation.score,
            token_scores=None if scores is None else list(scores),
            alternatives=list(map(cls.of, translation.alternatives)),
        )


class Answer(BaseModel):
    """What ``/v1/translate`` answers: a translation of each text, and the seconds that the server took."""

    translations: list[Translated]
    seconds: float


def native(models: Models, limits: Limits, keys: Keys) -> APIRouter:
    """Its routes."""
    router = APIRouter(prefix="/v1", tags=["nmsparse"])
    body = {"required": True, "content": {"application/json": {"schema": Asked.model_json_schema()}}}

    @router.post(
        "/translate",
        summary="Translate texts, with scores, alternatives, or piece by piece",
        response_model=Answer,
        openapi_extra={"requestBody": body},
    )
    async def translate(request: Request) -> Response:
        began = time.perf_counter()
        content = await read_body(request, limits)
        keys.check(request)
        asked = _asked(content)
        route, settings = models.route(asked.source, asked.target), asked.settings(limits)
        if asked.stream:
            return await _streamed(route, asked, limits, settings, began)
        texts = asked.text if isinstance(asked.text, list) else [asked.text]
        found = await route.translate(request, texts, limits, **settings)
        answer = Answer(translations=list(map(Translated.of, found)), seconds=_since(began))
        return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")

    return router


def _asked(content: bytes) -> Asked:
    try:
        return Asked.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the body"
        raise RequestError(400, f"{place}: {first['msg']}") from None


async def _streamed(
    route: Route, asked: Asked, limits: Limits, settings: dict[str, Any], began: float
) -> StreamingResponse:
    if not isinstance(asked.text, str) or asked.alternatives or asked.scores:
        raise RequestError(400, "stream: one text comes piece by piece, without alternatives and scores")
    pieces = await route.stream(asked.text, limits, **settings)

    async def events() -> AsyncIterator[str]:
        last: dict[str, Any] = {}
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    if isinstance(piece, Mended):
                        last["text"] = piece.text
                    else:
                        yield _event({"text": piece})
            yield _event({**last, "seconds": _since(began)}, "done")
        except ValueError as error:
            yield _event({"error": one_line(error)}, "error")

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


def _event(data: dict[str, Any], name: str = "message") -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def _since(began: float) -> float:
    return round(time.perf_counter() - began, 6)
