r"""How the server answers under load: sentences a second and the times of single ones, beside CTranslate2's.

    python -m benchmarks.serve outputs/multi30k_2of4/packed ../shared/data/multi30k:test --note "what else ran"

So many clients each send a sentence of the split to a server on the same machine, and the next when they have its
translation. The server is the one of ``nmsparse serve``, in a fresh process each time, with the model packed in int8 on
the engine, or with CTranslate2's int8 files of the same model in place of the engine: queue, threads and interface are
the same. The candidates take turns; shown are medians over these. The clients take CPU time too, the same for both.

At last the engine's server runs for ``--minutes`` with the most clients, and its memory is looked at: ``MiB`` are those
that the process has for itself after the first quarter of that time, and at its end.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# torch and transformers are imported where they are used: the servers run without them.

CANDIDATES = {"engine": "engine, 2:4 int8", "CTranslate2": "CTranslate2 int8"}  # as benchmarks.real_text calls them


class ByCTranslate2:
    """Answers as `Translator` does, as far as the server asks here."""

    def __init__(self, folder: str, at_once: int, *, compute: str, threads: int) -> None:
        from hf_nmsparse.text_tokenizer import load_tokenizer

        self.tokenizer = load_tokenizer(Path(folder), "marian")
        names, self._settings = (json.loads(Path(folder, f).read_text()) for f in ("names.json", "settings.json"))
        self._names, self._places = names, {name: place for place, name in enumerate(names)}
        self._translator = importlib.import_module("ctranslate2").Translator(
            folder, compute_type="int8", intra_threads=1, inter_threads=at_once
        )

    def paragraphs(self, texts: list[str], **_: Any) -> Any:
        """Sentences, as `Translator` cuts them but for those that are too long."""
        from hf_nmsparse.paragraphs import Paragraphs

        return Paragraphs(texts, "en", self.count_tokens)

    def count_tokens(self, texts: list[str]) -> list[int]:
        """As `Translator` counts them."""
        return list(map(len, self.tokenizer(texts)["input_ids"])) if texts else []

    def translate(self, texts: list[str], **settings: Any) -> list[Any]:
        """Without scores."""
        from hf_nmsparse.translations import Translation

        if settings.get("src_lang") or settings.get("tgt_lang"):
            raise ValueError("this model has one pair of languages")
        rows = [[self._names[token] for token in row] for row in self.tokenizer(texts)["input_ids"]] if texts else []
        limit = {"max_decoding_length": settings.get("max_new_tokens", self._settings["max_decoding_length"])}
        found = self._translator.translate_batch(rows, beam_size=settings["num_beams"], **limit) if texts else []
        ids = [[self._places[token] for token in one.hypotheses[0]] for one in found]
        return [Translation(self.tokenizer.decode(row), tuple(row)) for row in ids]


def run_server(candidate: str, folder: str, port: int, threads: int) -> None:
    """The server, until it is told to stop."""
    import uvicorn

    from hf_nmsparse.serve import Limits, create_app, load_models
    from hf_nmsparse.serve.http import Http
    from hf_nmsparse.translator import Translator

    # Of CTranslate2 too as many batches are under way as the server has threads, each on one.
    made_by: Any = Translator if candidate == "engine" else partial(ByCTranslate2, at_once=threads)
    app = create_app(load_models([f"en:de={folder}"], threads, load=made_by), Limits())
    uvicorn.run(app, port=port, http=Http, log_level="warning", access_log=False)


@contextmanager
def server(candidate: str, folder: Path, threads: int) -> Iterator[tuple[int, int]]:
    """The port and the process of a server that answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.serve", "--server", candidate, str(folder), str(port), str(threads)]
    process = subprocess.Popen(command)
    try:
        while True:
            if process.poll() is not None:
                raise SystemExit(f"serve: the server of {candidate} ended with {process.returncode}")
            with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait()


async def client(port: int, texts: Iterator[str], asked: dict[str, Any], until: float, seconds: list[float]) -> None:
    """One that sends the next text when it has the translation of the last."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while time.perf_counter() < until:
        body = json.dumps(asked | {"text": next(texts)}).encode()
        began = time.perf_counter()
        writer.write(b"POST /v1/translate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
        answer = await reader.readexactly(int(length.partition(b":")[2]))
        if b" 200 " not in head.split(b"\r\n", 1)[0]:
            raise SystemExit(f"serve: {answer.decode()}")
        seconds.append(time.perf_counter() - began)
    writer.close()
    await writer.wait_closed()


def load(port: int, texts: Sequence[str], asked: dict[str, Any], clients: int, lasts: float) -> list[float]:
    """The seconds of each answer to some clients."""
    seconds, endless = list[float](), cycle(texts)

    async def all_of_them() -> None:
        until = time.perf_counter() + lasts
        await asyncio.gather(*(client(port, endless, asked, until, seconds) for _ in range(clients)))

    asyncio.run(all_of_them())
    return seconds


def own_mib(process: int) -> float:
    """What a process has for itself."""
    status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:"))) / 1024


def at_the_limit(folder: Path, texts: Sequence[str], asked: dict[str, Any], options: Any) -> dict[str, Any]:
    """The memory of the engine's server under the most clients: after a quarter of the time, and at the end."""
    clients, quarter = max(options.clients), options.minutes * 15
    with server("engine", folder, options.threads) as (port, process):
        sentences = len(load(port, texts, asked, clients, quarter))
        early = own_mib(process)
        sentences += len(load(port, texts, asked, clients, 3 * quarter))
        return {"early": round(early, 1), "late": round(own_mib(process), 1), "sentences": sentences}


def main() -> None:
    if sys.argv[1:2] == ["--server"]:
        candidate, folder, port, threads = sys.argv[2:]
        run_server(candidate, folder, int(port), int(threads))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a packed model, English to German")
    parser.add_argument("text", help="folder of a corpus and its split: FOLDER:SPLIT")
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--threads", type=int, default=2, help="of a server")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each turn, after a quarter of it to warm up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=3.0, help="at the limit, for the memory")
    parser.add_argument("--max-new-tokens", type=int, help="for models that find no end")
    parser.add_argument("--note", default="", help="what the reader has to know about this run")
    parser.add_argument("--output", type=Path, help="the JSON file; a table goes beside it")
    options = parser.parse_args()

    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    from benchmarks import tables, timing
    from benchmarks.real_text import save
    from hf_nmsparse.corpus import load_corpus

    corpus, split = options.text.rsplit(":", 1)
    texts = list(load_corpus(corpus, "en", "de", None)[split]["source"])
    asked = {"source": "en", "target": "de"}
    asked |= {"max_new_tokens": options.max_new_tokens} if options.max_new_tokens else {}
    machine, found = timing.machine(), dict[tuple[int, int, str], list[list[float]]]()
    try:
        version = importlib.import_module("ctranslate2").__version__
    except ImportError:
        version = None
    with TemporaryDirectory() as temporary:
        saved = save(options.model, Path(temporary), version is not None)
        folders = {short: saved[name] for short, name in CANDIDATES.items() if name in saved}
        for folder in folders.values():
            AutoTokenizer.from_pretrained(options.model).save_pretrained(folder)
        for candidate in timing.turns(folders, options.rounds):
            with server(candidate, folders[candidate], options.threads) as (port, _):
                for beams in options.beams:
                    for clients in options.clients:
                        given = asked | {"beams": beams}
                        load(port, texts, given, clients, options.seconds / 4)
                        seconds = load(port, texts, given, clients, options.seconds)
                        found.setdefault((beams, clients, candidate), []).append(seconds)
        memory = at_the_limit(folders["engine"], texts, asked | {"beams": options.beams[0]}, options)

    rows = []
    for (beams, clients, candidate), turns in sorted(found.items()):
        cuts = [statistics.quantiles(seconds, n=100) for seconds in turns]
        row: dict[str, Any] = {"candidate": CANDIDATES[candidate], "beams": beams, "clients": clients}
        row["sentences_per_s"] = round(statistics.median(map(len, turns)) / options.seconds, 1)
        for percent in (50, 95, 99):
            row[f"p{percent}_ms"] = round(1000 * statistics.median(cut[percent - 1] for cut in cuts), 2)
        rows.append(row)
        print(row, flush=True)
    record = {
        "benchmark": "the server under load",
        **machine,
        "ctranslate2": version,
        "model": timing.describe(AutoModelForSeq2SeqLM.from_pretrained(options.model)),
        "text": f"{Path(corpus).name}, {split}",
        "max_new_tokens": options.max_new_tokens,
        "threads": options.threads,
        "seconds": options.seconds,
        "rounds": options.rounds,
        "minutes": options.minutes,
        "memory_mib": memory,
        "note": options.note,
    }
    output = options.output or timing.RESULTS / "serve.json"
    timing.write(output, record, rows, tables.serve_of(record | {"rows": rows}))
    print(output)


if __name__ == "__main__":
    main()
