"""The mirror of the C++ engine's structures, what is refused on either side, and a handle's life."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from enum import IntEnum
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_nmsparse.kernels import engine, native
from hf_nmsparse.kernels.engine import (
    NO_LAYER,
    Activation,
    EarlyStopping,
    Engine,
    EngineConfig,
    Packed,
    SearchConfig,
    Side,
    SideConfig,
    Table,
    TableSlot,
    WeightSlot,
)

CSRC = Path(engine.__file__).parent / "csrc"
needs_engine = pytest.mark.skipif(engine.why_not() is not None, reason="the native library is not used")


def declared(kind: str, name: str) -> str:
    """The body of a struct or an enum of the headers, without comments."""
    headers = [(CSRC / header).read_text(encoding="utf-8") for header in ("engine/api.h", "unit.h")]
    text = re.sub(r"//[^\n]*", "", "\n".join(headers))
    found = re.search(rf"{kind} {name}\b[^{{]*{{(.*?)}};", text, re.DOTALL)
    assert found is not None, name
    return found[1]


@pytest.mark.parametrize("structure", [SideConfig, EngineConfig, SearchConfig], ids=lambda kind: kind.__name__)
def test_structures_are_those_of_the_header(structure: type[ctypes.Structure]) -> None:
    types: dict[str, Any] = {"int32_t": ctypes.c_int32, "float": ctypes.c_float, "SideConfig": SideConfig}
    expected = [
        (name.strip(), types[kind])
        for kind, names in re.findall(r"(\w+) ([\w, ]+);", declared("struct", structure.__name__))
        for name in names.split(",")
    ]
    assert [tuple(row) for row in structure._fields_] == expected
    assert ctypes.sizeof(structure) == sum(ctypes.sizeof(kind) for _, kind in expected)


@pytest.mark.parametrize("enum", [Activation, WeightSlot, TableSlot, EarlyStopping], ids=lambda kind: kind.__name__)
def test_numbers_are_those_of_the_header(enum: type[IntEnum]) -> None:
    values = [int(value) for value in re.findall(r"\w+ = (\d+)", declared("enum", enum.__name__))]
    counts = enum is not EarlyStopping  # the last entry of the others is their number
    assert values == [*sorted(entry.value for entry in enum), *([len(enum)] if counts else [])]


def test_structures_say_their_size_and_what_is_off() -> None:
    config = EngineConfig(hidden=8, norm_first=True, encoder=SideConfig(layers=1), decoder=SideConfig(layers=2))
    assert config.size == ctypes.sizeof(EngineConfig) == 4 * (13 + 2 * 9)
    assert (config.norm_first, config.decoder.layers) == (1, 2)
    search = SearchConfig(max_length=20, threads=1, beams=4)
    assert search.size == ctypes.sizeof(SearchConfig)
    assert (search.beams, search.returned, search.forced_bos, search.unknown_token) == (4, 1, -1, -1)
    assert (search.repetition_penalty, search.length_penalty, search.top_p) == (1, 1, 1)
    with pytest.raises(ValueError, match=r"^engine: SearchConfig has no best$"):
        SearchConfig(max_length=20, threads=1, best=4)


@pytest.mark.skipif(engine.why_not() is None, reason="there is an engine")
def test_without_an_engine_it_says_why() -> None:
    with pytest.raises(ValueError, match=r"^engine: the native library .*; translate with transformers$"):
        engine.Engine(EngineConfig(), [], [])


@needs_engine
def test_a_model_that_lacks_something_is_one_line() -> None:
    side = SideConfig(layers=1, heads=2, head_dim=4, feed_forward=8, vocabulary=9, positions=4, attention_scale=0.5)
    config = EngineConfig(hidden=8, target_vocabulary=9, norm_epsilon=1e-5, head_scale=1.0, encoder=side, decoder=side)
    with pytest.raises(ValueError, match=r"^engine: [^\n]+$"):
        engine.Engine(config, [], [])
    table = engine.Table(engine.Side.ENCODER, -1, TableSlot.EMBEDDING, np.zeros((9, 7), np.float32))
    with pytest.raises(ValueError, match=r"^engine: [^\n]+$"):
        engine.Engine(config, [], [table])
    with pytest.raises(ValueError, match="two dimensions of fp32, bf16, int8 or fp16"):
        engine.Engine(config, [], [engine.Table(engine.Side.ENCODER, -1, TableSlot.EMBEDDING, np.zeros((9, 8)))])
    with pytest.raises(ValueError, match="tables of int8, and no others, have a scale a row"):
        engine.Engine(
            config, [], [engine.Table(engine.Side.ENCODER, -1, TableSlot.EMBEDDING, np.zeros((9, 8), np.int8))]
        )


HIDDEN, VOCABULARY, START, EOS = 8, 19, 1, 0
SIDE: dict[str, Any] = {"layers": 1, "heads": 2, "head_dim": 4, "feed_forward": 12, "vocabulary": VOCABULARY}
SIDE |= {"embedding_scale": 1.0, "attention_scale": 0.5}


def config(positions: int = 0, **fields: Any) -> EngineConfig:
    side = SideConfig(**SIDE, positions=positions)
    known = {"hidden": HIDDEN, "target_vocabulary": VOCABULARY, "norm_epsilon": 1e-5, "head_scale": 1.0}
    return EngineConfig(encoder=side, decoder=side, **(known | fields))


def parts(positions: int = 0, head_rows: int = VOCABULARY) -> tuple[list[Packed], list[Table]]:
    """Weights and tables of a random model for `config`."""
    generator = np.random.default_rng(5)

    def weight(side: Side, layer: int, slot: WeightSlot, rows: int, columns: int) -> Packed:
        values = generator.normal(size=(rows, columns)).astype(np.float32)
        packed = native.repack("dense_fp32", columns, torch.from_numpy(values)).numpy()
        return Packed(side, layer, slot, "dense_fp32", rows, columns, packed, np.zeros(rows, np.float32))

    def table(side: Side, layer: int, slot: TableSlot, rows: int) -> Table:
        return Table(side, layer, slot, generator.normal(size=(rows, HIDDEN)).astype(np.float32))

    weights = [weight(Side.DECODER, NO_LAYER, WeightSlot.HEAD, head_rows, HIDDEN)]
    tables = []
    for side in Side:
        tables.append(table(side, NO_LAYER, TableSlot.EMBEDDING, VOCABULARY))
        if positions:
            tables.append(table(side, NO_LAYER, TableSlot.POSITION, positions))
        for slot in WeightSlot:
            cross = WeightSlot.CROSS_Q <= slot <= WeightSlot.CROSS_OUT
            if slot in (WeightSlot.FEED_GATE, WeightSlot.HEAD) or (cross and side == Side.ENCODER):
                continue
            rows = 12 if slot == WeightSlot.FEED_IN else HIDDEN
            weights.append(weight(side, 0, slot, rows, 12 if slot == WeightSlot.FEED_OUT else HIDDEN))
        norms = [TableSlot.SELF_NORM, TableSlot.FEED_NORM] + [TableSlot.CROSS_NORM] * (side == Side.DECODER)
        tables += [table(side, 0, slot, 2) for slot in norms]
    return weights, tables


@lru_cache(maxsize=2)
def tiny(positions: int = 0) -> Engine:
    return Engine(config(positions), *parts(positions))


def tokens_of(
    model: Engine, sources: list[list[int]], prompts: list[list[int]] | None = None, **search: Any
) -> list[Any]:
    """The ids of each sentence's translations."""
    known: dict[str, Any] = {"max_length": 12, "threads": 1}
    prompts = [[START]] * len(sources) if prompts is None else prompts
    found = model.translate(sources, SearchConfig(**(known | search)), prompts, [EOS])
    return [[hypothesis.tokens.tolist() for hypothesis in sentence] for sentence in found]


def one_line() -> Any:
    return pytest.raises(ValueError, match=r"^engine: [^\n]+$")


@contextmanager
def nothing_or_one_line() -> Iterator[None]:
    """What is inside may raise, but one line."""
    with suppress(NotRaisedError), one_line():
        yield
        raise NotRaisedError


class NotRaisedError(Exception):
    """Nothing was raised."""


SOURCES = [[3, 4, 5], [6], [7, 8, 9, 10, 11, 2], [3] * 17]


@needs_engine
def test_structs_of_other_sizes_are_refused() -> None:
    wrong = config()
    wrong.size += 4
    with pytest.raises(ValueError, match=r"^engine: config: size is (\d+) to \1, got \d+$"):
        Engine(wrong, [], [])
    search = SearchConfig(max_length=9, threads=1)
    search.size = 0
    with pytest.raises(ValueError, match=r"^engine: search: size is \d+ to \d+, got 0$"):
        tiny().translate([[3]], search, [[START]], [EOS])


def test_numbers_that_do_not_fit_are_refused() -> None:
    """Tokenizers without a limit say 10**30."""
    with pytest.raises(ValueError, match=r"^engine: SearchConfig.max_length does not fit 32 bits, got 1000000"):
        SearchConfig(max_length=10**30, threads=1)


@needs_engine
def test_each_part_is_missed() -> None:
    weights, tables = parts()
    for i, weight in enumerate(weights):
        with pytest.raises(ValueError, match=rf"^engine: .*{weight.slot.name.lower()}: the weight is missing$"):
            Engine(config(), weights[:i] + weights[i + 1 :], tables)
    for i, table in enumerate(tables):
        with pytest.raises(ValueError, match=rf"^engine: .*{table.slot.name.lower()}: the table is missing$"):
            Engine(config(), weights, tables[:i] + tables[i + 1 :])


@needs_engine
def test_a_weight_of_another_unit_format_or_size_is_refused() -> None:
    weights, tables = parts()
    unit = weights[0].data.copy()
    unit[8] ^= 1  # lanes
    wrong = [
        replace(weights[0], data=unit),
        replace(weights[0], format="fp32"),
        replace(weights[0], data=weights[0].data[:-64].copy()),
        replace(weights[0], out_features=VOCABULARY - 1, bias=None),
        replace(weights[0], layer=0),
        replace(weights[0], layer=2**31 - 1),
        replace(weights[0], bias=np.zeros(VOCABULARY - 1, np.float32)),
    ]
    for weight in wrong:
        with one_line():
            Engine(config(), [weight, *weights[1:]], tables)


@needs_engine
def test_a_head_beyond_the_embedding_is_refused() -> None:
    """Its tokens would be looked up behind the end."""
    with pytest.raises(ValueError, match=r"^engine: config: target_vocabulary is 2 to 19, got 25$"):
        Engine(config(target_vocabulary=25), *parts(head_rows=25))


@needs_engine
def test_a_head_below_the_embedding_knows_its_targets() -> None:
    model = Engine(config(target_vocabulary=16), *parts(head_rows=16))
    assert tokens_of(model, [[18]])[0][0][0] == START  # sources have the whole vocabulary
    with pytest.raises(ValueError, match=r"^engine: sentence 1: target tokens are below 16, got 17$"):
        model.score([[3]], [[START, 17]], 1)


@needs_engine
@pytest.mark.parametrize(
    ("sources", "prompts"),
    [
        ([[]], [[START]]),
        ([[3], []], [[START]] * 2),
        ([[3]], [[]]),
        ([[3]], []),
        ([[VOCABULARY]], [[START]]),
        ([[-1]], [[START]]),
        ([[2**31]], [[START]]),
        ([[3]], [[VOCABULARY]]),
        ([[3]], [[-1]]),
        ([[3]], [[START] * 12]),
        ([[3]], [[START] * 13]),
        ([[3] * 25], [[START]]),  # positions are 24
    ],
)
def test_ids_and_lengths_are_checked(sources: list[list[int]], prompts: list[list[int]]) -> None:
    with one_line():
        tokens_of(tiny(positions=24), sources, prompts)


@needs_engine
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("threads", [1, 2])
def test_what_is_watched_grows_into_the_translation(beams: int, threads: int) -> None:
    told: dict[int, list[list[int]]] = {}
    sources = [[5, 6, 7], [8], [9, 5, 5, 5, 8]]
    search = SearchConfig(max_length=12, threads=threads, beams=beams)
    prompts = [[START], [START, 6], [START]]
    watched = tiny().translate(sources, search, prompts, [EOS], watch=lambda s, ids: told.setdefault(s, []).append(ids))
    for sentence, states in told.items():
        best = watched[sentence][0].tokens.tolist()
        assert all(later[: len(earlier)] == earlier for earlier, later in pairwise(states))
        assert states[-1] == best
        assert states[0][: len(prompts[sentence])] == prompts[sentence]
        if beams == 1:  # each step is sure
            assert [len(state) for state in states] == list(range(len(states[0]), len(best) + 1))
    assert sorted(told) == [0, 1, 2]
    assert [[one.tokens.tolist() for one in each] for each in watched] == tokens_of(
        tiny(), sources, prompts, beams=beams
    )


@needs_engine
def test_what_a_watcher_raises_ends_the_translation() -> None:
    calls = []

    def watch(sentence: int, tokens: list[int]) -> None:
        calls.append(sentence)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny().translate([[5, 6]], SearchConfig(max_length=12, threads=1), [[START]], [EOS], watch=watch)
    assert calls == [0]
    assert tokens_of(tiny(), [[5, 6]])


@needs_engine
@pytest.mark.skipif(sys.platform == "win32", reason="a signal cannot be sent to a thread")
def test_a_signal_ends_the_translation(monkeypatch: pytest.MonkeyPatch) -> None:
    call, model, ended = engine._call, tiny(), []

    def interrupted(name: str, *given: Any) -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        try:
            call(name, *given)
        except ValueError as error:
            ended.append(str(error))
            raise

    count = 50_000
    monkeypatch.setattr(engine, "_call", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokens_of(model, [[5, 6]] * count, batch_sentences=1)
    assert ended == ["engine: the caller has ended it"]
    monkeypatch.undo()
    assert tokens_of(model, [[5, 6]])


@needs_engine
def test_a_call_that_is_to_stop_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    call, model = engine._call, tiny()
    stop = ctypes.c_int32(1)
    monkeypatch.setattr(engine, "_call", lambda name, *given: call(name, *given[:-1], ctypes.byref(stop)))
    with pytest.raises(ValueError, match=r"^engine: the caller has ended it$"):
        model.score([[5, 6]], [[START, 6]], 1)


@needs_engine
def test_no_sentences_are_no_work() -> None:
    assert tokens_of(tiny(), []) == []
    assert tiny().score([], [], 1) == []
    with one_line():
        tokens_of(tiny(), [], beams=0)


@needs_engine
@pytest.mark.parametrize(
    "search",
    [
        {"beams": 256},
        {"beams": 2**31 - 1},
        {"beams": 0},
        {"returned": 2},
        {"returned": 0},
        {"returned": -1},
        {"returned": 2**31 - 1},
        {"max_length": 0},
        {"max_length": -5},
        {"max_length": (1 << 20) + 1},
        {"max_length": 2**31 - 1},
        {"threads": 0},
        {"length_penalty": float("nan")},
        {"length_penalty": -1e6},
        {"length_penalty": 1e6},
        {"repetition_penalty": 0.0},
        {"forced_bos": VOCABULARY},
        {"sample": 1, "temperature": 0.0},
        {"sample": 1, "top_p": 1.5},
        {"sample": 1, "beams": 2},
    ],
    ids=str,
)
def test_searches_that_make_no_sense_are_refused(search: dict[str, Any]) -> None:
    with one_line():
        tokens_of(tiny(), SOURCES, **search)


@needs_engine
def test_a_long_limit_takes_no_memory_that_is_not_used() -> None:
    """Positions end the translations of this model long before."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        with pytest.raises(ValueError, match=r"^engine: the target is longer than the model's 24 positions$"):
            tokens_of(tiny(positions=24), SOURCES, max_length=1 << 20, beams=4, returned=4, min_length=25)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


numbers = st.one_of(st.integers(-2, 5), st.sampled_from([-(2**31), -1, 12, 41, 255, 256, 2**20, 2**30, 2**31 - 1]))
floats = st.one_of(st.floats(width=32), st.sampled_from([0.0, -1.0, 1.0, 1e-38, float("inf"), float("nan")]))


def fields(structure: type[ctypes.Structure], **known: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Up to three fields at random."""
    kinds = {
        field[0]: numbers if field[1] is ctypes.c_int32 else floats
        for field in structure._fields_
        if field[0] != "size"
    }
    kinds |= known
    names = st.lists(st.sampled_from(sorted(kinds)), max_size=3, unique=True)
    return names.flatmap(lambda chosen: st.fixed_dictionaries({name: kinds[name] for name in chosen}))


@needs_engine
@settings(max_examples=150)
@given(fields(SearchConfig))
def test_any_search_ends_well(search: dict[str, Any]) -> None:
    with nothing_or_one_line():
        found = tokens_of(tiny(positions=24), SOURCES, **search)
        assert all(0 <= token < VOCABULARY for sentence in found for tokens in sentence for token in tokens)


@needs_engine
@settings(max_examples=150)
@given(fields(EngineConfig, encoder=fields(SideConfig), decoder=fields(SideConfig)))
def test_any_config_ends_well(changed: dict[str, Any]) -> None:
    """All that fits the weights translates, and nothing else."""
    sides = {side: SideConfig(**(SIDE | {"positions": 24} | changed.pop(side, {}))) for side in ("encoder", "decoder")}
    with nothing_or_one_line():
        tokens_of(Engine(EngineConfig(**(plain(config()) | sides | changed)), *parts(positions=24)), SOURCES)


def plain(structure: ctypes.Structure) -> dict[str, Any]:
    return {field[0]: getattr(structure, field[0]) for field in structure._fields_ if field[0] != "size"}


# ---- a handle's life ------------------------------------------------------------------------------------------------


def child(connection: Any) -> None:
    connection.send(tokens_of(tiny(), SOURCES, beams=3, threads=2))
    connection.close()


@needs_engine
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_translates_as_its_parent(method: Any) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"there is no {method} here")
    expected = tokens_of(tiny(), SOURCES, beams=3, threads=2)
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(theirs,))
    process.start()
    assert ours.poll(120), "the child does not answer"
    assert ours.recv() == expected
    process.join(60)
    assert process.exitcode == 0
    assert tokens_of(tiny(), SOURCES, beams=3, threads=2) == expected


@needs_engine
def test_threads_keep_the_engine_that_they_use() -> None:
    """The last name of it goes while they translate."""
    expected = tokens_of(tiny(), SOURCES, beams=3)
    model = Engine(config(), *parts())
    results: list[Any] = []
    begun = threading.Barrier(3)

    def translate(own: list[Engine]) -> None:
        begun.wait()
        results.append(tokens_of(own.pop(), SOURCES * 50, beams=3))

    threads = [threading.Thread(target=translate, args=([model],)) for _ in range(2)]
    for thread in threads:
        thread.start()
    begun.wait()
    del model
    gc.collect()
    for thread in threads:
        thread.join()
    assert results == [expected * 50] * 2


def in_a_process(code: str) -> str:
    """What it prints; its modules are those of this test."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    result = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=300, env=environment
    )
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


@needs_engine
def test_a_process_ends_while_a_daemon_translates() -> None:
    code = """
import threading
import test_engine as t
model, begun = t.tiny(), threading.Event()
def translate():
    begun.set()
    while True:
        t.tokens_of(model, t.SOURCES * 500, beams=3)
threading.Thread(target=translate, daemon=True).start()
begun.wait()
"""
    assert in_a_process(code) == ""


@needs_engine
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="only Linux says how much memory a process has")
def test_memory_does_not_grow_with_time() -> None:
    code = """
import random
import test_engine as t
draw, model = random.Random(3), t.tiny()
def pages():
    return int(open("/proc/self/statm").read().split()[1])
for hundred in range(1, 101):
    sources = [[draw.randrange(t.VOCABULARY) for _ in range(draw.randrange(1, 60))] for _ in range(100)]
    t.tokens_of(model, sources, beams=draw.choice([1, 4]), max_length=draw.randrange(8, 40), threads=2)
    if hundred in (20, 100):
        print(pages())
"""
    early, late = map(int, in_a_process(code).split())
    assert late < 1.03 * early


@needs_engine
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux holds a process to its limit")
def test_a_process_without_memory_says_so_and_goes_on() -> None:
    code = """
import resource
import test_engine as t
model = t.tiny()
before = t.tokens_of(model, t.SOURCES)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20),) * 2)
for search in ({"max_length": 1 << 20}, {"beams": 255, "min_length": 40, "max_length": 40}):
    try:
        t.tokens_of(model, t.SOURCES * 64, **({"batch_sentences": 256} | search))
    except ValueError as error:
        print(error)
print(t.tokens_of(model, t.SOURCES) == before)
"""
    first, second, last = in_a_process(code).splitlines()
    assert first == "engine: there is no memory for 256 translations of 1048576 tokens"
    assert second == "engine: out of memory; take smaller batches, fewer beams or a smaller max_length"
    assert last == "True"
