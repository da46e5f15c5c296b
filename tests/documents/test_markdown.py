from __future__ import annotations

import re
from random import Random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from mdit_py_plugins.container import container_plugin

from hf_nmsparse.documents import DocumentError
from hf_nmsparse.documents.markdown import _add_formulas
from hf_nmsparse.markup import Marked, Tag
from hf_nmsparse.placeholders import placeholders
from tests.documents.reading import Asked, Known, loud, same, swapped, translated

MARKDOWN = r"""---
title: a title
---

# A *heading* with `code` ##

Some **bold text** and a [link to it](http://x.org "a title"), [ref],
[ref][] and [other][ref] and an image ![alt](a.png) that{two}
goes on\
here; 2 * 3 \* 4 <b>html</b> <br> <http://auto.link> ~~gone~~ foot[^1].

> a quoted text
> over lines
lazy one

- item one
  continued here
- [ ] to do
  1. nested **item**

<!-- a comment -->

    indented code

```python
fenced = code
```

| head | another \| one |
|------|:--------------:|
| cell `a\|b` |b|
| x

a heading
below
---------

***

<div>
a block
</div>

[ref]: http://ref.org "its title"
[^1]: a footnote
    goes on
[^2]: http://x.org says
[^n]: Word

the last line""".replace("{two}", "  ")
LOUD = r"""---
title: a title
---

# A *HEADING* WITH `code` ##

SOME **BOLD TEXT** AND A [LINK TO IT](http://x.org "a title"), [REF][ref],
[REF][ref] AND [OTHER][ref] AND AN IMAGE ![alt](a.png) THAT{two}
GOES ON\
HERE; 2 * 3 * 4 <b>HTML</b> <br> <http://auto.link> ~~GONE~~ FOOT[^1].

> A QUOTED TEXT
> OVER LINES
LAZY ONE

- ITEM ONE
  CONTINUED HERE
- [ ] TO DO
  1. NESTED **ITEM**

<!-- a comment -->

    indented code

```python
fenced = code
```

| HEAD | ANOTHER \| ONE |
|------|:--------------:|
| CELL `a\|b` |B|
| X

A HEADING
BELOW
---------

***

<div>
a block
</div>

[ref]: http://ref.org "its title"
[^1]: A FOOTNOTE
    GOES ON
[^2]: HTTP://X.ORG SAYS
[^n]: WORD

THE LAST LINE""".replace("{two}", "  ")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_document(end: str, mark: str) -> None:
    text, expected = (mark + one.replace("\n", end) for one in (MARKDOWN, LOUD))
    assert translated("md", text, same).decode() == text
    assert translated("md", text, loud).decode() == expected


def test_what_is_asked_for() -> None:
    asked = Asked()
    translated("md", MARKDOWN, asked)
    assert asked.texts[0] == ("A ", Tag("*", "open"), "heading", Tag("*", "close"), " with ", Tag("`code`", "word"))
    assert asked.texts[1][:5] == ("Some ", Tag("**", "open"), "bold text", Tag("**", "close"), " and a ")
    assert ("a quoted text over lines lazy one",) in asked.texts
    assert ("head",) in asked.texts
    assert ("another | one",) in asked.texts
    assert Tag("  \n", "void") in asked.texts[1]
    assert asked.texts[-4:-1] == [("a footnote goes on",), ("http://x.org says",), ("Word",)]
    assert Tag("![alt](a.png)", "void") in asked.texts[1]


@pytest.mark.parametrize(
    ("text", "translation", "expected"),
    [
        ("a\n", "1. b", "1\\. b\n"),  # a list
        ("a\n", "# b", "\\# b\n"),
        ("# a\n", "# b", "# # b\n"),  # a heading may begin so
        ("a\n", "b *c* `d` [e] <f> &amp;", "b \\*c\\* \\`d\\` \\[e\\] \\<f> \\&amp;\n"),
        ("a\n", "b * c_d_e & f < g", "b * c_d_e & f < g\n"),  # no markup
        ("|a|\n|-|\n", "b|c", "|b\\|c|\n|-|\n"),
        ("> a b\n> c\n", "d - e\n\nf", "> d - e\n> f\n"),
        ("a b\nc d\n", "eeee\n- f", "eeee - f\n"),  # a list, where the line began
        ("- a\n\n  b\n", "c", "- c\n\n  c\n"),
        ("a\n", "==", "==\n"),
    ],
)
def test_a_text_is_read_as_what_it_is(text: str, translation: str, expected: str) -> None:
    assert translated("md", text, lambda texts: [(translation,) for _ in texts]).decode() == expected


@pytest.mark.parametrize(
    ("text", "result", "expected"),
    [
        ("a **b** c", ("d", "**", " e ", "**", "f"), "d **e** f"),
        ("a **b** c", ("d", "**", "e", "**", "f"), "d**e**f"),
        ("a _b_ c", ("d", "_", "e", "_", "f"), "d<em>e</em>f"),  # which is none within a word
        ("a **b** c", ("d", "**", "(e)", "**", "f"), "d<strong>\\(e\\)</strong>f"),
        ("a **b** c", ("d", "**", "**", " e"), "d<strong></strong> e"),
        ("a [b](c) d", ("[", "e", "](c)", " f"), "[e](c) f"),
        ("a `b` c", ("d ", "`b`", " e"), "d `b` e"),
    ],
)
def test_tags_are_where_they_were_put(text: str, result: tuple[str, ...], expected: str) -> None:
    def put(texts: list[Marked]) -> list[Marked]:
        [given] = texts
        tags = iter([part for part in given if isinstance(part, Tag)])
        known = {part.text for part in given if isinstance(part, Tag)}
        return [tuple(next(tags) if part in known else part for part in result)]

    assert translated("md", text, put).decode().replace("  ", " ") == expected


def test_a_paragraph_is_wrapped_again() -> None:
    text = "> one two three four\n> five six\n"
    known = Known({"one two three four five six": "eins zwei drei vier fünf sechs"})
    assert translated("md", text, known).decode() == "> eins zwei drei vier\n> fünf sechs\n"


@pytest.mark.parametrize(
    "text",
    ["---\n\na\n", "+++\na = 1\n+++\n\n# b\n", "---\r\na: b\r\n...\r\n\r\nc", "---\n---\na\n\n---\n", "a\n\n---\n\nb"],
)
def test_front_matter(text: str) -> None:
    out = translated("md", text, loud).decode()
    assert out.lower() == text
    assert ("a: b" in out) == ("a: b" in text)
    assert ("a = 1" in out) == ("a = 1" in text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The energy $E=mc^2$ is $$x_i$$ here\n", "THE ENERGY $E=mc^2$ IS $$x_i$$ HERE\n"),
        ("It costs $5 or $10 in $home or $path\n", "IT COSTS $5 OR $10 IN $HOME OR $PATH\n"),
        ("no formula: \\$a$\n", "NO FORMULA: \\$A\\$\n"),
        ("a\n\n$$\na * b\n$$\n\nb\n", "A\n\n$$\na * b\n$$\n\nB\n"),
        ("$a_1$ is b in 2020\n", "$a_1$ IS B IN 2020\n"),
        (
            "# $\\alpha$ in 5\n\n| $k$, 3 |\n|---|\n| $n$ = 5 |\n",
            "# $\\alpha$ IN 5\n\n| $k$, 3 |\n|---|\n| $n$ = 5 |\n",
        ),
        ("$x$ a b\\\n", "$x$ A B\\\n"),
        ("a\n$$\nb = c\n$$\nd\n", "A\n$$\nb = c\n$$\nD\n"),
        ("- a\n  $$\n  b\n  $$\n- c\n", "- A\n  $$\n  b\n  $$\n- C\n"),
        ("a\n\\begin{align}\nb\n\\end{align}\nc\n", "A\n\\begin{align}\nb\n\\end{align}\nC\n"),
        ("$$ a\nb\n\nc\n", "$$ A\nB\n\nC\n"),
        ("https://a.example/b\n\n{name}\n\n%s: {name}\n", "https://a.example/b\n\n{name}\n\n%s: {name}\n"),
        (":::note a title\nb\nc\n:::\n\n- d\n\n  ::: e\n  f\n", ":::note a title\nB\nC\n:::\n\n- D\n\n  ::: e\n  F\n"),
        ("> [!NOTE]\n> a *b*\n> c\n\n> [!TIP]\n", "> [!NOTE]\n> A *B*\n> C\n\n> [!TIP]\n"),
        ("> [!note]- a title\n> b\n", "> [!note]- A TITLE\n> B\n"),
    ],
)
def test_formulas_containers_and_alerts(text: str, expected: str) -> None:
    assert translated("md", text, same).decode() == text
    assert translated("md", text, loud).decode() == expected


def test_a_formula_that_ends_a_paragraph_is_read_once() -> None:
    assert shape("a\n$$\nb\n$$\n") == ["paragraph_open", "inline", "paragraph_close", "math_block"]
    assert shape("> a\n$$\nb\n$$\n").count("math_block") == 1
    assert shape("- a\n$$\nb\n$$\n").count("math_block") == 1


def test_bad() -> None:
    with pytest.raises(DocumentError, match="is UTF-16"):
        translated("md", MARKDOWN.encode("utf-16"), loud)


_PIECES = re.findall(
    r"\S+",
    """word a B * ** _ __ ~~ ` `` [ ] ( ) [a](b) [a] <b> </b> <br/> < &amp; & # - 1. > | |-| --- === ``` [^1]
    ![i](j) ! +++ \\ $ $$ ::: $c$""",
)
_PIECES += [
    "\u00c4",
    "\u00a0",
    "\u3000",
    "\u5b57",
    "\x0b",
    "\x0c",
    "\u2028",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    "    ",
    "[a]: b\n",
    "# ",
    "- ",
    "1. ",
    "> ",
    "[ ] ",
]
_READER = MarkdownIt("commonmark").enable("table")
_add_formulas(_READER)
container_plugin(_READER, "any", validate=lambda *_: True)


def shape(text: str) -> list[str]:
    return [token.type for token in _READER.parse(text)]


def words(text: str) -> list[str]:
    """The texts of all blocks without white space, and with a mark for what is no text."""
    marks = {
        "code_inline": "`",
        "html_inline": "<>",
        "image": "!",
        "math_inline": "$",
        "math_inline_double": "$$",
        "link_open": "[",
        "em_open": "*",
        "strong_open": "**",
    }
    inlines = [token.children or [] for token in _READER.parse(text) if token.type == "inline"]
    texts = [
        "".join(token.content if token.type == "text" else marks.get(token.type, "") for token in one)
        for one in inlines
    ]
    return ["".join(text.split()) for text in texts]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(_PIECES), max_size=14).map("".join))
def test_any_text_keeps_its_structure(text: str) -> None:
    assert translated("md", text, same).decode() == text
    assume(not text.startswith(("---", "+++")))  # no front matter
    assume(not any(map(placeholders, words(text))))  # which stay as they are where nothing else stands
    out = translated("md", text, swapped).decode()
    assert shape(out) == shape(text)
    assert words(out) == [text.swapcase() for text in words(text)]


_HOSTILE = [
    "- x",
    "1. y",
    "# z",
    "| a",
    "```",
    "<div>",
    "    q",
    "===",
    "a*b*_c_",
    "[r]",
    "&lt;",
    "\\",
    "*",
    "> t",
    "~~~",
]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(_PIECES), max_size=14).map("".join), st.randoms(use_true_random=False))
def test_no_translation_changes_the_structure(text: str, random: Random) -> None:
    def moved(texts: list[Marked]) -> list[Marked]:
        found = []
        for one in texts:
            strings = [random.choice(_HOSTILE) + part for part in one if isinstance(part, str)]
            random.shuffle(strings)
            rest = iter(strings)
            found.append(tuple(next(rest) if isinstance(part, str) else part for part in one))
        return found

    assume(not text.startswith(("---", "+++")))
    assert shape(translated("md", text, moved).decode()) == shape(text)
