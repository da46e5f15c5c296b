"""The page: what it may do, and what it does in a browser."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from hf_nmsparse import Translator
from hf_nmsparse.serve import create_app, load_models
from tests.serve.conftest import KEY, LIMITS, running

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


def test_it_takes_nothing_from_elsewhere(client: TestClient) -> None:
    response = client.get("/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = response.headers["content-security-policy"].split("; ")
    assert policy[:2] == ["default-src 'none'", "connect-src 'self'"]
    assert "unsafe" not in response.headers["content-security-policy"]
    assert not re.search(r"https?://|\bsrc=|\bhref=|@import|url\(|\bon\w+=|\bstyle=|innerHTML", response.text)


@pytest.fixture(scope="module")
def address(folder: Any) -> Iterator[str]:
    """That of a server that asks for a key."""
    app = create_app(load_models([f"en:de={folder}"], threads=1), LIMITS, [KEY])
    with running(app) as port:
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if BROWSER is None:
        pytest.skip("there is no Chromium")
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(address: str, browser: Any, translator: Translator, scheme: str) -> None:
    page = browser.new_page(color_scheme=scheme)
    asked, said = list[str](), list[str]()
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.goto(address)
    text = "A man <b>sleeps</b> in the garden."
    page.get_by_label("Text", exact=True).fill(text)
    page.get_by_label("Alternatives", exact=True).select_option("1")
    page.get_by_role("button", name="Translate").click()
    status = page.get_by_role("status")
    status.filter(has_text="an API key is needed").wait_for()
    said.clear()  # the browser names what is refused
    page.get_by_label("API key").fill(KEY)
    page.get_by_label("Text", exact=True).press("Control+Enter")
    status.filter(has_text="ms on the server").wait_for()
    [best] = translator.translate([text], num_beams=4, num_return_sequences=2)
    assert page.get_by_label("Translation", exact=True).text_content() == best.text
    other = page.get_by_role("listitem").text_content()
    assert other == f"{best.alternatives[0].text} {best.alternatives[0].score:.2f}"
    assert page.get_by_text(f"{len(text)} of 400 characters").is_visible()
    assert page.get_by_label("Into").input_value() == "de"
    assert {url for url in asked if not url.startswith(address)} == set()
    assert said == []
    page.close()
