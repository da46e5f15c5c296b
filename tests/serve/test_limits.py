"""What becomes of a request that nobody waits for."""

from __future__ import annotations

import asyncio
import gc
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from hf_nmsparse.serve.limits import finished


def test_who_hangs_up_leaves_nothing_in_the_log() -> None:
    logged: list[dict[str, Any]] = []

    async def hang_up() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: logged.append(context))

        async def receive() -> dict[str, str]:
            return {"type": "http.disconnect"}

        futures: list[Future[str]] = [Future(), Future()]
        request: Any = SimpleNamespace(receive=receive)
        with pytest.raises(ClientDisconnect):
            await finished(request, futures, 5)
        for _ in range(3):
            await asyncio.sleep(0)
        assert all(future.cancelled() for future in futures)
        del futures
        gc.collect()

    asyncio.run(hang_up())
    gc.collect()
    assert logged == []
