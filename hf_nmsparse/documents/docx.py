"""Word documents (.docx): the texts of paragraphs, in the body, tables, text boxes, headers, footers and notes.

A paragraph that is changed gets new runs. Formatting other than that of most of the paragraph goes with the words it
belongs to, and so do links; whatever is no text (pictures, breaks, fields, bookmarks) stands alone in it. What is not
changed stays byte for byte: paragraphs, parts of the archive, the whole file.
"""

from __future__ import annotations

import re
import shutil
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from lxml import etree

from hf_nmsparse.documents.base import DocumentError, Options, Translate
from hf_nmsparse.documents.texts import one_line, translate_inner
from hf_nmsparse.markup import Marked, Tag, joined

__all__ = ["translate_docx"]

_LARGEST_PART = 100 << 20  # bytes of XML that are read
_LARGEST = 2 << 30  # bytes of all files in the archive

_CONTENT_TYPES = "[Content_Types].xml"
_MAIN = ("document.main+xml", "template.main+xml", "document.macroEnabled.main+xml")
_TEXTS = (*_MAIN, ".header+xml", ".footer+xml", ".footnotes+xml", ".endnotes+xml")

_CONTAINERS = {"hyperlink", "ins", "moveTo", "smartTag", "customXml", "sdt", "fldSimple", "bdo", "dir"}
_CHOICES = {"dropDownList", "comboBox", "date", "checkbox", "picture"}  # kinds of sdt whose text is a value
_WORDS = {"fldSimple", "oMath", "sdt", "sym"}  # what stands in the place of a word, as fields do whose text is computed
_SETTINGS = ("Pr", "EndPr")  # what the names of settings within a container end with
_STALE = {"proofErr", "lastRenderedPageBreak"}  # what Word noted of the text as it was
_OF_LANGUAGE = {"lang", "noProof"}  # formatting that nobody sees
_CHARACTERS = {"noBreakHyphen": "\u2011", "softHyphen": "\u00ad"}
_NOT_IN_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")


def translate_docx(source: Path, target: IO[bytes], translate: Translate, options: Options) -> None:
    """Translates a Word document."""
    with _opened(source) as archive:
        trees = {name: _tree(archive, name) for name in _parts_with_texts(archive)}
        paragraphs = [(name, _Paragraph(element)) for name, root in trees.items() for element in _paragraphs(root)]
        given = [paragraph.text for _, paragraph in paragraphs]
        changed = set()
        found = translate_inner(given, translate)
        for (name, paragraph), before, after in zip(paragraphs, given, found, strict=True):
            if after != before:
                paragraph.replace(one_line(after))
                changed.add(name)
        new = {
            name: etree.tostring(trees[name].getroottree(), xml_declaration=True, encoding="UTF-8", standalone=True)
            for name in changed
        }
        if new:
            _write(archive, target, new)
    if not new:
        with source.open("rb") as file:
            shutil.copyfileobj(file, target)


@contextmanager
def _opened(source: Path) -> Iterator[zipfile.ZipFile]:
    """The archive, once all files in it were found to be whole and not too large.

    Raises:
        DocumentError: They are not.
    """
    with source.open("rb") as file:
        try:
            archive = zipfile.ZipFile(file)
            _check(archive)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError) as error:
            raise DocumentError(f"is no Word document (.docx), or a damaged or encrypted one: {error}") from None
        with archive:
            yield archive


def _check(archive: zipfile.ZipFile) -> None:
    infos = archive.infolist()
    size = sum(info.file_size for info in infos)
    if size > _LARGEST:
        raise DocumentError(f"would unpack to {size:,} bytes; at most {_LARGEST:,} are read")
    if any(info.flag_bits & 1 for info in infos):
        raise DocumentError("is encrypted; save it without a password")
    if len({info.filename for info in infos}) < len(infos):
        raise DocumentError("holds two files of one name; save it anew in a word processor")
    bad = archive.testzip()
    if bad is not None:
        raise DocumentError(f"is damaged: {bad} is not what it was")


def _parts_with_texts(archive: zipfile.ZipFile) -> list[str]:
    names = set(archive.namelist())
    if _CONTENT_TYPES not in names:
        raise DocumentError(f"is no Word document: it holds no {_CONTENT_TYPES}")
    kinds = {
        element.get("PartName", "").lstrip("/"): element.get("ContentType", "")
        for element in _tree(archive, _CONTENT_TYPES)
    }
    if not any(kind.endswith(_MAIN) and name in names for name, kind in kinds.items()):
        raise DocumentError("is no Word document: it holds no text")
    return [name for name, kind in kinds.items() if kind.endswith(_TEXTS) and name in names]


def _tree(archive: zipfile.ZipFile, name: str) -> Any:
    """The root of a part, which may neither define entities nor refer to anything outside."""
    size = archive.getinfo(name).file_size
    if size > _LARGEST_PART:
        raise DocumentError(f"{name} in it has {size:,} bytes; at most {_LARGEST_PART:,} are read")
    data = archive.read(name)
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False)
    try:
        if b"<!DOCTYPE" in data:
            raise DocumentError(f"{name} in it has a document type, which no word processor writes")
        root = etree.fromstring(data, parser)
    except etree.XMLSyntaxError as error:
        raise DocumentError(f"{name} in it is damaged: {error.msg}") from None
    if root.getroottree().docinfo.doctype:
        raise DocumentError(f"{name} in it has a document type, which no word processor writes")
    return root


def _write(archive: zipfile.ZipFile, target: IO[bytes], new: dict[str, bytes]) -> None:
    """The archive with other contents of some of its files."""
    with zipfile.ZipFile(target, "w") as written:
        for info in archive.infolist():
            copy = zipfile.ZipInfo(info.filename, info.date_time)
            copy.compress_type, copy.external_attr = info.compress_type, info.external_attr
            if info.filename in new:
                written.writestr(copy, new[info.filename])
                continue
            copy.file_size = info.file_size  # whether it needs the long form is decided by it
            with archive.open(info) as file, written.open(copy, "w") as stream:
                shutil.copyfileobj(file, stream)


def _paragraphs(root: Any) -> list[Any]:
    return list(root.iter(f"{{{etree.QName(root).namespace}}}p"))


def _name(element: Any) -> str:
    """The name of an element without its namespace; empty for a comment."""
    return str(etree.QName(element).localname) if isinstance(element.tag, str) else ""


@dataclass
class _Item:
    """A piece of a paragraph.

    Attributes:
        kind: What it is; begin, code, middle and end are those of a field.
        node: Its element, in a run or beside runs.
        properties: Those of its run.
        in_run: Whether it is in one.
        text: What is read; of code, the code.
        items: The pieces in a container.
    """

    kind: Literal["text", "void", "container", "begin", "code", "middle", "end"]
    node: Any
    properties: Any = None
    in_run: bool = False
    text: str = ""
    items: list[_Item] = field(default_factory=list)

    @property
    def format(self) -> bytes:
        """Tells formats from each other."""
        properties = [] if self.properties is None else list(self.properties)
        return b"".join(etree.tostring(one, method="c14n") for one in properties if _name(one) not in _OF_LANGUAGE)


@dataclass
class _Group:
    """What a tag stands for.

    Attributes:
        before: The pieces that stand where it opens, or of one that stands alone.
        after: The pieces where it closes.
        shell: A container without what is in it.
        properties: The formatting of text within, unless another tag says so.
    """

    before: Sequence[_Item] = ()
    after: Sequence[_Item] = ()
    shell: Any = None
    properties: Any = None


class _Paragraph:
    """A paragraph with its text, in which numbers of groups are tags."""

    def __init__(self, element: Any) -> None:
        self._element = element
        self._space = etree.QName(element).namespace
        self._groups: list[_Group] = []
        items = list(self._items(element))
        self._properties = _usual(items)
        self.text = joined(self._parts(items, self._properties))

    def _items(self, parent: Any) -> Iterator[_Item]:
        for node in parent:
            name = _name(node)
            if name == "r":
                yield from self._of_run(node)
            elif name in _CONTAINERS and self._is_open(node):
                inner = node if name != "sdt" else node.find(self._tag("sdtContent"))
                yield _Item("container", node, items=list(self._items(inner)))
            elif name not in _STALE and not name.endswith(_SETTINGS):
                yield _Item("void", node)

    def _of_run(self, run: Any) -> Iterator[_Item]:
        properties = run.find(self._tag("rPr"))
        for node in run:
            name = _name(node)
            if name == "t" or name in _CHARACTERS:
                yield _Item("text", node, properties, True, _CHARACTERS.get(name, node.text or ""))
            elif name == "instrText":
                yield _Item("code", node, properties, True, node.text or "")
            elif name == "fldChar":
                kinds: dict[str, Any] = {"begin": "begin", "separate": "middle", "end": "end"}
                yield _Item(kinds.get(node.get(self._tag("fldCharType")), "void"), node, properties, True)
            elif node is not properties and name not in _STALE:
                yield _Item("void", node, properties, True)

    def _is_open(self, node: Any) -> bool:
        """Whether a container holds text that is read, and not a value that is chosen or computed."""
        name = _name(node)
        if name == "fldSimple":
            return _is_link(node.get(self._tag("instr"), ""))
        if name == "sdt":
            settings = node.find(self._tag("sdtPr"))
            values = set() if settings is None else {_name(one) for one in settings}
            return node.find(self._tag("sdtContent")) is not None and not values & _CHOICES
        return True

    def _parts(self, items: Sequence[_Item], usual: Any) -> Iterator[str | Tag]:
        """The text of some pieces, whose usual formatting needs no tag."""
        formats = {"": _format(usual)}
        style: str | None = None  # the number of the formatting that is open
        place = 0
        while place < len(items):
            item = items[place]
            place += 1
            if item.kind == "text":
                if item.text.strip() and item.format != formats[style or ""]:
                    if style is not None:
                        yield Tag(style, "close")
                        style = None
                    if item.format != formats[""]:
                        style = self._number(_Group(properties=item.properties))
                        formats[style] = item.format
                        yield Tag(style, "open")
                yield item.text
                continue
            inner: Sequence[_Item] | None = None
            group = _Group([item])
            if item.kind == "container":
                inner, group = item.items, _Group(shell=item.node)
            elif item.kind == "begin":
                middle, end = _field(items, place)
                group = _Group(items[place - 1 : end])
                if middle < end and _is_link("".join(one.text for one in items[place:middle])):
                    inner = items[middle : end - 1]
                    group = _Group(items[place - 1 : middle], items[end - 1 : end])
                place = end
            if inner is None:
                word = len(group.before) > 1 or _name(item.node) in _WORDS
                yield Tag(self._number(group), "word" if word else "void")
                continue
            if style is not None:
                yield Tag(style, "close")
                style = None
            group.properties = _usual(inner)
            number = self._number(group)
            yield Tag(number, "open")
            yield from self._parts(inner, group.properties)
            yield Tag(number, "close")
        if style is not None:
            yield Tag(style, "close")

    def _number(self, group: _Group) -> str:
        self._groups.append(group)
        return str(len(self._groups) - 1)

    def replace(self, text: Marked) -> None:
        """Writes another text, which has the same tags."""
        kept = [node for node in self._element if _name(node) == "pPr"]
        groups = {number: self._groups[int(number)] for number in {part.text for part in text if isinstance(part, Tag)}}
        shells = {number: self._shell(group.shell) for number, group in groups.items() if group.shell is not None}
        for node in list(self._element):
            self._element.remove(node)
        self._element.extend(kept)
        opened = [(self._element, self._properties)]
        for part in text:
            into, properties = opened[-1]
            if isinstance(part, str):
                into.append(self._run(part, properties))
                continue
            group = groups[part.text]
            if part.kind == "close":
                opened.pop()
                into = opened[-1][0]
                self._put(group.after, into)
                continue
            self._put(group.before, into)
            if part.kind == "open":
                if part.text in shells:
                    shell, inner = shells[part.text]
                    into.append(shell)
                    into = inner
                opened.append((into, group.properties))

    def _put(self, items: Sequence[_Item], into: Any) -> None:
        for item in items:
            if item.in_run:
                run = etree.SubElement(into, self._tag("r"))
                if item.properties is not None:
                    run.append(deepcopy(item.properties))
                run.append(item.node)
            else:
                into.append(item.node)

    def _run(self, text: str, properties: Any) -> Any:
        run = etree.Element(self._tag("r"))
        if properties is not None:
            run.append(deepcopy(properties))
        node = etree.SubElement(run, self._tag("t"))
        node.text = _NOT_IN_XML.sub("", text)
        if text != text.strip():
            node.set("{http://www.w3.org/XML/1998/namespace}space", "preserve")
        return run

    def _shell(self, container: Any) -> tuple[Any, Any]:
        """A copy of a container without its text, and the element in it where the text goes."""
        shell = etree.Element(container.tag, dict(container.attrib), container.nsmap)
        inner = shell
        for node in container:
            if _name(node) == "sdtContent":
                inner = etree.SubElement(shell, node.tag)
            elif _name(node).endswith(_SETTINGS):
                shell.append(deepcopy(node))
        return shell, inner

    def _tag(self, name: str) -> str:
        return f"{{{self._space}}}{name}"


def _format(properties: Any) -> bytes:
    return _Item("void", None, properties).format


def _usual(items: Sequence[_Item]) -> Any:
    """The run properties of most of the text."""
    counts: Counter[bytes] = Counter()
    known: dict[bytes, Any] = {}
    for item in items:
        if item.kind == "text" and item.text.strip():
            counts[item.format] += len(item.text)
            known.setdefault(item.format, item.properties)
    return known[max(counts, key=lambda one: counts[one])] if counts else None


def _field(items: Sequence[_Item], place: int) -> tuple[int, int]:
    """Of a field that begins before ``place``, where its result begins and where the field ends.

    One that ends in a later paragraph ends here where its result begins.
    """
    depth, middle = 1, None
    for here in range(place, len(items)):
        kind = items[here].kind
        depth += (kind == "begin") - (kind == "end")
        if kind == "middle" and depth == 1:
            middle = here + 1
        if depth == 0:
            return here + 1 if middle is None else middle, here + 1
    return (place, place) if middle is None else (middle, middle)


def _is_link(code: str) -> bool:
    return code.split()[:1] == ["HYPERLINK"]
