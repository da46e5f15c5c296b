"""The page on which to try it: one file, which takes nothing from elsewhere and says so."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import HTMLResponse

__all__ = ["page"]


def page() -> APIRouter:
    """Its route."""
    router = APIRouter()
    content = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": "; ".join(
            (
                "default-src 'none'",
                "connect-src 'self'",
                f"script-src {_hash(content, 'script')}",
                f"style-src {_hash(content, 'style')}",
                "base-uri 'none'",
                "form-action 'none'",
                "frame-ancestors 'none'",
            )
        ),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }

    @router.head("/", include_in_schema=False)
    @router.get("/", include_in_schema=False)
    async def shown() -> HTMLResponse:
        return HTMLResponse(content, headers=headers)

    return router


def _hash(content: str, tag: str) -> str:
    """What a browser compares the one element of a kind with."""
    [text] = re.findall(f"<{tag}>(.*?)</{tag}>", content, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
