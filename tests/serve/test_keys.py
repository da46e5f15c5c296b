from __future__ import annotations

import pytest

from hf_nmsparse.serve.keys import Keys


@pytest.mark.parametrize("key", ["", " ", "a\n", "ü", "a\x1b", " a"])
def test_keys_that_no_header_takes(key: str) -> None:
    with pytest.raises(ValueError, match="an API key is of ASCII letters"):
        Keys(["good", key])


def test_none_is_needed_where_there_is_none() -> None:
    assert not Keys().required
    assert Keys(["a"]).required
