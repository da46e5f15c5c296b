"""Tokenizers without transformers where the files alone say all of them; else those of transformers.

Both answer as a tokenizer of transformers does, in what `texts` and `Translator` ask of it. A ``tokenizer.json`` that
transformers would use as it is goes to the package tokenizers, and the two SentencePiece models of OPUS-MT to
sentencepiece, with what transformers' ``MarianTokenizer`` does around them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from hf_nmsparse.packed_files import read_object

__all__ = ["load_tokenizer"]

_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
# Keys of tokenizer_config.json with which these classes do nothing but what is here; where there are others it is
# transformers that reads the files.
_KNOWN = frozenset(
    {
        *_NAMED,
        "added_tokens_decoder",
        "backend",
        "clean_up_tokenization_spaces",
        "extra_special_tokens",
        "is_local",
        "local_files_only",
        "model_input_names",
        "model_max_length",
        "name_or_path",
        "padding_side",
        "processor_class",
        "separate_vocabs",
        "source_lang",
        "sp_model_kwargs",
        "target_lang",
        "target_vocab_file",
        "tokenizer_class",
        "tokenizer_file",
        "truncation_side",
    }
)
_ANY_LENGTH = int(1e30)  # what transformers says where a file says nothing
_LARGEST_PATCHED = 100_000  # above it transformers may change a tokenizer.json as it reads it
_SPACE = "▁"
_MARIAN: dict[str, Any] = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "model_max_length": 512}


def load_tokenizer(folder: Path, model_type: str) -> Any:
    """The tokenizer in a folder.

    Args:
        folder: The folder.
        model_type: That of the model, which says whose tokenizer it is where the files do not.

    Raises:
        ValueError: There is none that loads.
    """
    try:
        return _of_files(folder, model_type) or _of_transformers(folder)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # up to each tokenizer: TypeError among others, and no Exception where Rust panics
        raise ValueError(f"{folder}: no tokenizer could be loaded: {str(error).strip()}") from error


def _of_files(folder: Path, model_type: str) -> Any:
    """The tokenizer that needs no transformers; None where there is no such."""
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return None
    settings = read_object(file)
    if any(value not in (None, False) and key not in _KNOWN for key, value in settings.items()):
        return None
    kind = settings.get("tokenizer_class") or {"marian": "MarianTokenizer"}.get(model_type)
    if kind in ("PreTrainedTokenizerFast", "TokenizersBackend") and (folder / "tokenizer.json").is_file():
        return _FastTokenizer.of(folder, settings)
    if kind == "MarianTokenizer":
        return _MarianTokenizer.of(folder, settings)
    return None


def _of_transformers(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


class _FileTokenizer:
    """What the two have in common: ids by the names of the special tokens, and how long a text may be.

    Attributes:
        model_max_length: The most tokens of a text.
        truncation_side: Where a longer one is cut.
        unk_token_id: The id of what is not in the vocabulary, or None.
        bos_token_id: That of the beginning of a text, or None.
        eos_token_id: That of its end, or None.
        pad_token_id: That of padding, or None.
        source_lang: The language of sources, as OPUS-MT says it, or None.
        is_thread_safe: Whether several threads may use it at once.
    """

    is_thread_safe = True

    def __init__(self, settings: Mapping[str, Any], special: Mapping[str, int]) -> None:
        self.model_max_length = settings.get("model_max_length") or _ANY_LENGTH
        self.truncation_side = settings.get("truncation_side") or "right"
        self.unk_token_id, self.bos_token_id = special.get("unk_token"), special.get("bos_token")
        self.eos_token_id, self.pad_token_id = special.get("eos_token"), special.get("pad_token")
        self.source_lang = settings.get("source_lang")

    def convert_tokens_to_ids(self, token: str) -> int | None:
        """The id of a token; that of what is unknown where there is no such token."""
        raise NotImplementedError

    def __call__(
        self,
        text: str | list[str] | None = None,
        text_target: str | list[str] | None = None,
        add_special_tokens: bool = True,
        verbose: bool = True,
    ) -> dict[str, Any]:
        """The ids of a text, or of several, under ``input_ids``."""
        given = text if text_target is None else text_target
        texts = [given] if isinstance(given, str) else given or []
        rows = self._encode(texts, add_special_tokens, text_target is not None)
        return {"input_ids": rows[0] if isinstance(given, str) else rows}

    def _encode(self, texts: list[str], whole: bool, target: bool) -> list[list[int]]:
        raise NotImplementedError

    def decode(self, ids: Iterable[int], **_: Any) -> str:
        """The text of ids, without special tokens."""
        raise NotImplementedError


def _special_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that a tokenizer_config.json names."""
    return {name: text for name in _NAMED if (text := _text_of(settings.get(name))) is not None}


def _text_of(token: Any) -> str | None:
    """A special token as a file has it: a text, or an object with one."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


class _FastTokenizer(_FileTokenizer):
    """A ``tokenizer.json``."""

    def __init__(self, backend: Tokenizer, settings: Mapping[str, Any], special: Mapping[str, int]) -> None:
        super().__init__(settings, special)
        self._backend = backend

    @classmethod
    def of(cls, folder: Path, settings: Mapping[str, Any]) -> _FastTokenizer | None:
        """The one in a folder; None where transformers would add to what the file says."""
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        content = read_object(folder / "tokenizer.json")
        added = {token["content"]: token for token in content.get("added_tokens", ())}
        special = _special_of(settings)
        if (
            content.get("post_processor") is None
            or backend.get_vocab_size() > _LARGEST_PATCHED
            or not all(text in added and added[text]["special"] for text in special.values())
            or not all(_text_of(text) in added for text in _extra(settings))
            or not _agree(settings.get("added_tokens_decoder") or {}, added)
        ):
            return None
        backend.no_truncation()
        backend.no_padding()
        return cls(backend, settings, {name: added[text]["id"] for name, text in special.items()})

    def convert_tokens_to_ids(self, token: str) -> int | None:
        index = self._backend.token_to_id(token)
        return self.unk_token_id if index is None else index

    def _encode(self, texts: list[str], whole: bool, target: bool) -> list[list[int]]:
        return [encoded.ids for encoded in self._backend.encode_batch_fast(texts, add_special_tokens=whole)]

    def decode(self, ids: Iterable[int], **_: Any) -> str:
        text: str = self._backend.decode(list(ids), skip_special_tokens=True)
        return text


def _extra(settings: Mapping[str, Any]) -> Iterable[Any]:
    extra = settings.get("extra_special_tokens") or ()
    return extra.values() if isinstance(extra, Mapping) else extra


def _agree(decoder: Mapping[str, Any], added: Mapping[str, Any]) -> bool:
    """Whether what tokenizer_config.json says of added tokens is what tokenizer.json says."""
    flags = ("special", "lstrip", "rstrip", "single_word", "normalized")
    return all(
        (other := added.get(token["content"])) is not None
        and other["id"] == int(index)
        and all(other[flag] == token.get(flag, other[flag]) for flag in flags)
        for index, token in decoder.items()
    )


class _MarianTokenizer(_FileTokenizer):
    """OPUS-MT's: a SentencePiece model for each language and one vocabulary, whose order is not that of the models."""

    def __init__(
        self, models: tuple[Any, Any], ids: dict[str, int], settings: Mapping[str, Any], special: Mapping[str, str]
    ) -> None:
        super().__init__(settings, {name: ids[text] for name, text in special.items()})
        self._models, self._ids = models, ids
        self._tokens = {index: token for token, index in ids.items()}
        self._special = frozenset(special.values())
        # The longest first, as one may begin another.
        self._split = re.compile(f"({'|'.join(map(re.escape, sorted(self._special, key=len, reverse=True)))})")
        self.supported_language_codes = [token for token in ids if token.startswith(">>") and token.endswith("<<")]

    @classmethod
    def of(cls, folder: Path, settings: Mapping[str, Any]) -> _MarianTokenizer | None:
        """The one in a folder; None where transformers would do more than is here."""
        from sentencepiece import SentencePieceProcessor

        names = ("source.spm", "target.spm", "vocab.json")
        settings = _MARIAN | {name: value for name, value in settings.items() if value is not None}
        special = _special_of(settings)
        if (
            not all((folder / name).is_file() for name in names)
            or not _same_special(folder, special)
            or settings.get("separate_vocabs")
            or settings.get("sp_model_kwargs")
            or any(_text_of(text) not in special.values() for text in _extra(settings))
        ):
            return None
        ids = read_object(folder / "vocab.json")
        decoder = settings.get("added_tokens_decoder") or {}
        if not all(text in ids for text in special.values()) or not all(
            ids.get(token["content"]) == int(index)
            and token["content"] in special.values()
            and not any(token.get(flag) for flag in ("lstrip", "rstrip", "single_word"))
            for index, token in decoder.items()
        ):
            return None
        source, target = (SentencePieceProcessor(model_file=str(folder / name)) for name in names[:2])
        return cls((source, target), ids, settings, special)

    def convert_tokens_to_ids(self, token: str) -> int | None:
        return self._ids.get(token, self.unk_token_id)

    def _encode(self, texts: list[str], whole: bool, target: bool) -> list[list[int]]:
        end = [self.eos_token_id] if whole else []
        unknown = self.unk_token_id
        return [
            [*(self._ids.get(piece, unknown) for piece in self._pieces(text, self._models[target])), *end]  # type: ignore[list-item]
            for text in texts
        ]

    def _pieces(self, text: str, model: Any) -> Iterable[str]:
        for part in self._split.split(text):
            if part in self._special:
                yield part
                continue
            if part.startswith(">>") and (end := part.find("<<")) != -1:  # the code of the target's language
                yield part[: end + 2]
                part = part[end + 2 :]
            elif not part:
                continue
            yield from model.encode(part, out_type=str)

    def decode(self, ids: Iterable[int], **_: Any) -> str:
        model = self._models[0]  # as in transformers
        pieces = [
            token
            for index in ids
            if (token := self._tokens.get(index) or model.id_to_piece(index)) not in self._special
        ]
        text: str = model.decode_pieces(pieces)
        return text.replace(_SPACE, " ").strip()


def _same_special(folder: Path, special: Mapping[str, str]) -> bool:
    """Whether files of older versions, where there are some, say no more than tokenizer_config.json."""
    if (folder / "added_tokens.json").exists():
        return False
    file = folder / "special_tokens_map.json"
    said = read_object(file) if file.exists() else {}
    return all(special.get(name) == _text_of(text) for name, text in said.items())
