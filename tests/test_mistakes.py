"""How a script ends."""

from __future__ import annotations

import pytest

from recipes.mistakes import in_one_line


def test_ctrl_c_is_no_traceback() -> None:
    with pytest.raises(SystemExit) as raised, in_one_line("distill"):
        raise KeyboardInterrupt
    assert raised.value.code == 130
