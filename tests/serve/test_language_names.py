from __future__ import annotations

import pytest

from hf_nmsparse.serve.language_names import language_name


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("de", "German"),
        ("zh-Hans", "Chinese (Hans)"),
        ("pt_BR", "Portuguese (BR)"),
        ("deu_Latn", "deu_Latn"),
        ("xx", "xx"),
        ("-", "-"),
    ],
)
def test_names(code: str, name: str) -> None:
    assert language_name(code) == name
