"""A report as one HTML page, which takes nothing from elsewhere, runs no script, and shows texts as what they are."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from html import escape
from pathlib import Path

from hf_nmsparse.evaluation import Evaluation
from hf_nmsparse.pattern import NMPattern
from hf_nmsparse.plots import LoggedRun, has_matplotlib, inline_plots
from hf_nmsparse.run_report import Bucket, Difference, Report, ReportedRun

__all__ = ["page"]

_STEPS = 24
"""Most columns in the course of a layer."""

_DIRECTIONS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
_MARKS = "\u200e\u200f\u061c"

_TITLES = {
    "loss": "Loss",
    "flips": "Flip rate",
    "sparsity": "BLEU against the fraction of weights pruned",
    "decay": "BLEU against λ",
}


def page(report: Report) -> str:
    """The report as a page.

    No text from a file is markup in it, none steers the order of what stands beside it, and characters that cannot be
    seen are written out. The page forbids itself scripts and anything from elsewhere.

    Args:
        report: What `read_report` gave.
    """
    names = [run.run.name for run in report.runs]
    sections = [
        _section("Scores", _scores(report)),
        _section("Curves", _curves([run.run for run in report.runs])),
        *(_section(f"Layers of {run.run.name}", _layers(run.run)) for run in report.runs if run.run.layers),
        _section("BLEU by test set", _sets(report)) if report.sets else "",
        _section("BLEU by length of the source", _buckets(report.buckets, names[0])) if report.buckets else "",
        *(
            _section(f"{names[0]} and {other}, where chrF differs most", _differences(names[0], other, *found))
            for other, found in report.differences.items()
        ),
        _section("Left out", f"<ul>{''.join(f'<li>{text(line)}</li>' for line in report.left_out)}</ul>")
        if report.left_out
        else "",
    ]
    style = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(', '.join(names))}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<h1>{text(', '.join(names))}</h1>\n{''.join(sections)}</body>\n</html>\n"
    )


def text(value: object) -> str:
    """A text of a file as HTML: escaped, and a name in place of each character that is not seen or turns others."""
    return "".join(
        f'<span class="code">U+{ord(char):04X}</span>' if _is_hidden(char) else escape(char) for char in str(value)
    )


def _is_hidden(char: str) -> bool:
    if char in _MARKS or unicodedata.bidirectional(char) in _DIRECTIONS:
        return True
    return unicodedata.category(char) in ("Cc", "Cs", "Co", "Cn", "Zl", "Zp")


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{text(title)}</h2>\n{content}\n</section>\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table of cells that are HTML; one too wide for the page moves by itself."""
    first, *others = head
    top = f"<th scope=col>{first}</th>" + "".join(f"<th scope=col>{cell}</th>" for cell in others)
    lines = []
    for first, *cells in rows:
        columns = "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in cells)
        lines.append(f"<tr><th scope=row>{first}</th>{columns}</tr>\n")
    body = "".join(lines)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table></div>'


def _with_interval(score: float, interval: tuple[float, float] | None) -> str:
    if interval is None:
        return f"{score:.2f}"
    return f'{score:.2f} <span class="interval">{interval[0]:.2f} to {interval[1]:.2f}</span>'


def _scores(report: Report) -> str:
    """Scores, intervals and the test against the first run; below, how they were computed."""
    first = report.runs[0].run.name
    head = ["run", "setting", "BLEU", f"to {text(first)}", "chrF", "steps", "minutes", "bytes"]
    if report.metric is not None:
        head.insert(5, text(report.metric))
    rows = []
    for run in report.runs:
        found = run.run.evaluation
        cells = [
            text(run.run.name),
            f'<td class="words">{text(run.run.settings)}</td>',
            _with_interval(found.bleu, run.bleu_interval),
            _comparison(run),
            _with_interval(found.chrf, run.chrf_interval),
            f"{found.steps:,}",
            "" if found.train_seconds is None else f"{found.train_seconds / 60:.0f}",
            f"{found.dense_bytes if found.packed_bytes is None else found.packed_bytes:,}",
        ]
        if report.metric is not None:
            cells.insert(5, "" if run.judgement is None else f"{run.judgement:.4f}")
        rows.append(cells)
    notes = []
    for label, values in (
        ("Test set", [f"{run.corpus}, {run.split}, {run.sentences:,} sentences" for run in _evaluations(report)]),
        ("Model", [run.model for run in _evaluations(report)]),
        ("BLEU", [run.signature for run in _evaluations(report)]),
        ("chrF", [run.chrf_signature for run in _evaluations(report)]),
        (
            "Versions",
            [", ".join(f"{name} {number}" for name, number in run.versions.items()) for run in _evaluations(report)],
        ),
    ):
        notes.append(f"<dt>{label}</dt><dd>{'<br>'.join(map(text, dict.fromkeys(values)))}</dd>")
    notes.append("<dt>Intervals</dt><dd>95%, bootstrap over sentences, 1,000 samples; p is two-sided</dd>")
    if report.metric is None:
        notes.append(
            "<dt>COMET</dt><dd>not asked for: <code>pip install unbabel-comet</code>, then "
            "<code>nmsparse report RUN... --comet MODEL.ckpt</code> with a model that is on the disk</dd>"
        )
    return _table(head, rows, "scores") + f"<dl>{''.join(notes)}</dl>"


def _evaluations(report: Report) -> list[Evaluation]:
    return [run.run.evaluation for run in report.runs]


def _comparison(run: ReportedRun) -> str:
    test = run.comparison
    if test is None:
        return ""
    return (
        f'{test.difference:+.2f} <span class="interval">{test.interval[0]:+.2f} to {test.interval[1]:+.2f}, '
        f"p {test.p:.3f}, {test.verdict.replace('the baseline', 'it')}</span>"
    )


def _curves(runs: list[LoggedRun]) -> str:
    if not has_matplotlib():
        return "<p>Drawn where matplotlib is installed: <code>pip install 'hf-nmsparse[plot]'</code></p>"
    return "".join(
        f'<figure class="wide"><figcaption>{_TITLES[name]}</figcaption>{svg}</figure>'
        for name, svg in inline_plots(runs).items()
    )


def _layers(run: LoggedRun) -> str:
    """A row for each layer: how dense it is, how much its mask changed, when, and how large its weights are."""
    assert run.evaluation.pattern is not None
    density = NMPattern.parse(run.evaluation.pattern).density
    layers: dict[str, list[dict[str, float | None]]] = {}
    for row in sorted(run.layers, key=lambda row: row["step"]):
        layers.setdefault(row["layer"], []).append(row)
    highest = max((row["flip_rate"] or 0.0 for row in run.layers), default=0.0)
    last = {name: [rows[-1][key] for rows in layers.values()] for key, name in _LAST.items()}
    rows = []
    for place, (name, course) in enumerate(layers.items()):
        rates = [row["flip_rate"] or 0.0 for row in course]
        strip = "".join(
            f'<i style="--s:{_shade(max(part), highest):.2f}" title="{max(part):.2g}"></i>' for part in _parts(rates)
        )
        rows.append(
            [
                text(name.removeprefix("model.")),
                f"{density:.0%}",
                f'<td class="strip"><div>{strip}</div></td>',
                _shaded(max(rates), highest),
                *(
                    _shaded(values[place], max((value or 0.0 for value in values), default=0.0))
                    for values in last.values()
                ),
            ]
        )
    steps = sorted({row["step"] for row in run.layers})
    head = ["layer", "density", f"flip rate, step {steps[0]:,} to {steps[-1]:,}", "highest", *last]
    return f"<details open><summary>{len(rows)} layers</summary>{_table(head, rows, 'layers')}</details>"


_LAST = {"flip_rate": "last", "sad": "SAD, last", "kept": "kept |w|", "pruned": "pruned |w|"}


def _parts(rates: list[float]) -> list[list[float]]:
    """The rates in so many parts as have room."""
    count = min(_STEPS, len(rates))
    return [rates[part * len(rates) // count : (part + 1) * len(rates) // count] for part in range(count)]


def _shade(value: float, highest: float) -> float:
    """0 to 1; the root shows small values too."""
    return float((value / highest) ** 0.5) if highest > 0 and value > 0 else 0.0


def _shaded(value: float | None, highest: float) -> str:
    if value is None:
        return "<td></td>"
    return f'<td class="shade" style="--s:{_shade(value, highest):.2f}">{value:.3g}</td>'


def _sets(report: Report) -> str:
    names = [run.run.name for run in report.runs]
    rows = [
        [text(name), *(f"{found[run][0]:.2f} / {found[run][1]:.2f}" if run in found else "" for run in names)]
        for name, found in report.sets.items()
    ]
    return _table(["test set, BLEU / chrF", *map(text, names)], rows)


def _buckets(buckets: list[Bucket], first: str) -> str:
    rows = []
    for bucket in buckets:
        words = f"{bucket.shortest} to {bucket.longest}" if bucket.shortest < bucket.longest else f"{bucket.shortest}"
        cells = [f"{words} words", f"{bucket.sentences:,}"]
        for name, (score, interval) in bucket.scores.items():
            gap = "" if name == first else f" ({score - bucket.scores[first][0]:+.2f})"
            cells.append(_with_interval(score, interval).replace(" <", f"{gap} <", 1))
        rows.append(cells)
    return _table(["source", "sentences", *map(text, buckets[0].scores)], rows)


def _differences(first: str, other: str, worse: list[Difference], better: list[Difference]) -> str:
    return "".join(
        f"<details{' open' if found is worse else ''}><summary>{text(other)} is {word} ({len(found)})</summary>\n"
        f"{''.join(_card(first, other, difference) for difference in found)}</details>\n"
        for word, found in (("worse", worse), ("better", better))
    )


def _card(first: str, other: str, found: Difference) -> str:
    ours, theirs = _marked(found.first, found.other)
    return (
        f'<article><dl><dt>source <span class="interval">line {found.number}</span></dt>{_said(text(found.source))}'
        f"<dt>reference</dt>{_said(text(found.reference))}</dl>"
        f'<div class="sides"><dl><dt>{text(first)} <span class="interval">chrF {found.chrf[0]:.1f}</span></dt>'
        f'{_said(ours)}</dl><dl><dt>{text(other)} <span class="interval">chrF {found.chrf[1]:.1f}</span></dt>'
        f"{_said(theirs)}</dl></div></article>\n"
    )


def _said(html: str) -> str:
    """A sentence, whose direction is its own."""
    return f'<dd dir="auto">{html}</dd>'


def _marked(one: str, other: str) -> tuple[str, str]:
    """Two texts as HTML, in each the words marked that the other has not."""
    words = one.split(" "), other.split(" ")
    sides: tuple[list[str], list[str]] = [], []
    for kind, *bounds in SequenceMatcher(None, *words, autojunk=False).get_opcodes():
        for side, given, start, end in zip(sides, words, bounds[::2], bounds[1::2], strict=True):
            if start < end:
                part = text(" ".join(given[start:end]))
                side.append(part if kind == "equal" else f"<mark>{part}</mark>")
    return " ".join(sides[0]), " ".join(sides[1])
