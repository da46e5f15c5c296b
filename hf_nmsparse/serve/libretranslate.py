"""The interface of LibreTranslate, so that its clients work as they are: https://docs.libretranslate.com."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from hf_nmsparse.serve.errors import RequestError
from hf_nmsparse.serve.fields import read_fields
from hf_nmsparse.serve.keys import Keys
from hf_nmsparse.serve.language_names import language_name
from hf_nmsparse.serve.limits import Limits
from hf_nmsparse.serve.models import Models
from hf_nmsparse.translations import Translation

__all__ = ["libretranslate"]


def libretranslate(models: Models, limits: Limits, keys: Keys) -> APIRouter:
    """Its routes."""
    router = APIRouter(tags=["LibreTranslate"])

    @router.post("/translate", summary="Translate texts")
    async def translate(request: Request) -> dict[str, Any]:
        fields = await read_fields(request, limits)
        keys.check(request, fields.get("api_key"))
        texts = _texts(fields.get("q"))
        source, target = (_code(name, fields.get(name)) for name in ("source", "target"))
        kind = fields.get("format") or "text"
        if kind not in ("text", "html"):
            raise RequestError(400, f"format is text or html, got {str(kind)[:50]!r}")
        count = _alternatives(fields.get("alternatives"), limits)
        settings = {"num_return_sequences": count + 1, "num_beams": max(count + 1, 4)} if count else {}
        several = isinstance(texts, list)
        route, given = models.route(source, target), texts if isinstance(texts, list) else [texts]
        if kind == "html":
            if count:
                raise RequestError(400, "alternatives are of text without markup; leave them out")
            pages = await route.translate_html(request, given, limits)
            return {"translatedText": pages if several else pages[0]}
        found = await route.translate(request, given, limits, **settings)
        answer: dict[str, Any] = {"translatedText": [one.text for one in found] if several else found[0].text}
        if count:
            others = [_others(one) for one in found]
            answer["alternatives"] = others if several else others[0]
        return answer

    @router.head("/languages", include_in_schema=False)
    @router.get("/languages", summary="The languages, and what each is translated into")
    async def languages() -> list[dict[str, Any]]:
        return [
            {"code": source, "name": language_name(source), "targets": targets}
            for source, targets in models.languages.items()
        ]

    @router.post("/detect", summary="Refused: no language is detected here")
    async def detect() -> None:
        raise RequestError(501, "no language is detected here; name the source with each text")

    @router.head("/health", include_in_schema=False)
    @router.get("/health", summary="Whether the server answers")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @router.head("/frontend/settings", include_in_schema=False)
    @router.get("/frontend/settings", summary="What clients adapt themselves to")
    async def settings() -> dict[str, Any]:
        source, targets = next(iter(models.languages.items()))
        return {
            "apiKeys": keys.required,
            "charLimit": limits.characters,
            "filesTranslation": False,
            "frontendTimeout": 500,
            "keyRequired": keys.required,
            "language": {
                "source": {"code": source, "name": language_name(source)},
                "target": {"code": targets[0], "name": language_name(targets[0])},
            },
            "suggestions": False,
            "supportedFilesFormat": [],
        }

    return router


def _texts(given: Any) -> str | list[str]:
    if isinstance(given, str) or (isinstance(given, list) and all(isinstance(text, str) for text in given)):
        return given
    raise RequestError(400, f"q is a text or a list of texts, got {'none' if given is None else type(given).__name__}")


def _code(name: str, given: Any) -> str:
    if isinstance(given, str) and given:
        return given
    raise RequestError(400, f"{name} is the code of a language, got {'none' if given is None else repr(given)[:50]}")


def _alternatives(given: Any, limits: Limits) -> int:
    """How many; a number may come as a text in a form."""
    most = limits.beams - 1
    text = "0" if given is None else str(given)
    if not text.isdecimal() or len(text) > 3 or int(text) > most or isinstance(given, bool):
        raise RequestError(400, f"alternatives are 0 to {most}, got {text[:50]!r}")
    return int(text)


def _others(translation: Translation) -> list[str]:
    """Its alternatives, each text once."""
    texts = dict.fromkeys(one.text for one in translation.alternatives)
    return [text for text in texts if text != translation.text]
