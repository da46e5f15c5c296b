"""What a script says where something is wrong that its user can mend."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def in_one_line(program: str) -> Iterator[None]:
    """Ends the process with the message of a ValueError of ours, and at Ctrl-C; anything else stays a traceback."""
    try:
        yield
    except ValueError as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).parent.name
        if raised_in not in ("hf_nmsparse", "recipes"):
            raise
        sys.exit(f"{program}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
