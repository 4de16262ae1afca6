"""Charts of a step, in text and as SVG: a row per stage, time to the right."""

from __future__ import annotations

import colorsys
import textwrap
from collections.abc import Iterator, Sequence
from xml.sax.saxutils import escape

from megatron_ds.pipeline.schedule import Action, Kind, Span
from megatron_ds.pipeline.simulate import Report, check


def draw(
    all_stages: Sequence[Sequence[Action]],
    forward_time: float = 1.0,
    backward_time: float = 2.0,
    weight_time: float | None = None,
    backward: bool = True,
    width: int = 110,
) -> str:
    """The step in text; a long one loses its middle."""
    report = check(all_stages, forward_time, backward_time, weight_time, backward)
    spans = [span for stage_spans in report.spans for span in stage_spans]
    cell = 1 + max(len(str(span.action)) for span in spans)
    scale = cell / min(span.end - span.start for span in spans)
    label = len(f"stage {len(all_stages) - 1}")
    rows = []
    for stage, stage_spans in enumerate(report.spans):
        cells = ["."] * round(report.makespan * scale)
        for action, start, end in stage_spans:
            left, right = round(start * scale), round(end * scale)
            cells[left:right] = f"{action!s:-<{right - left - 1}} "
        rows.append(f"{f'stage {stage}':<{label}} |" + _elide("".join(cells), width - label - 2, cell).rstrip())
    return "\n".join([*rows, *textwrap.wrap(_summary(report), width)])


def _elide(cells: str, room: int, cell: int) -> str:
    """Both ends of a row that is too long, cut where a label may begin."""
    if len(cells) <= room:
        return cells
    side = (room - 4) // 2 // cell * cell
    return cells[:side] + " // " + cells[len(cells) - side :]


def _summary(report: Report) -> str:
    words = f"bubble {report.bubble:.0%} of the busiest stage's work"
    if any(report.peak_live):
        chunks = 1 + max(span.action.chunk for spans in report.spans for span in spans)
        what = "micro-batches" if chunks == 1 else f"micro-batches (each on one of {chunks} chunks)"
        words += f"; live {what} by stage: {' '.join(map(str, report.peak_live))}"
    return words


_HUE = {Kind.F: 213, Kind.B: 152, Kind.I: 152, Kind.W: 36}
_MEANING = {Kind.F: "forward", Kind.B: "backward", Kind.I: "backward, inputs", Kind.W: "backward, weights"}
_INK, _PALE = "#16202b", "#5c6773"
# All in pixels: the rows, a box in one, the space above them, around everything and for the names of the stages.
_ROW, _BOX, _TOP, _MARGIN, _LABEL = 34, 26, 62, 16, 62


def svg(
    all_stages: Sequence[Sequence[Action]],
    forward_time: float = 1.0,
    backward_time: float = 2.0,
    weight_time: float | None = None,
    backward: bool = True,
    title: str = "",
) -> str:
    """The step as a self-contained SVG: colours tell kinds of work, shades tell chunks."""
    report = check(all_stages, forward_time, backward_time, weight_time, backward)
    spans = [span for stage_spans in report.spans for span in stage_spans]
    chunks = 1 + max(span.action.chunk for span in spans)
    digits = len(str(max(span.action.microbatch for span in spans)))
    scale = (7 * digits + 13) / min(span.end - span.start for span in spans)
    bottom = _TOP + _ROW * len(report.spans)
    body = [_text(_MARGIN, 26, title, 15, "font-weight='600'"), _text(_MARGIN, 46, _summary(report), 12)]
    for stage, stage_spans in enumerate(report.spans):
        y = _TOP + _ROW * stage
        body.append(_text(_MARGIN, y + _ROW / 2 + 4, f"stage {stage}", 12))
        body.append(_rect(_LABEL + _MARGIN, y + (_ROW - _BOX) / 2, report.makespan * scale, _BOX, "#f1f3f5"))
        body += [part for span in stage_spans for part in _box(span, y, scale, chunks)]
    body += _axis(report.makespan, scale, bottom)
    kinds = [kind for kind in _MEANING if any(span.action.kind is kind for span in spans)]
    body += _legend(kinds, chunks, bottom + 44)
    width = max(_LABEL + 2 * _MARGIN + report.makespan * scale, 640)
    height = bottom + 60 + _MARGIN
    return "\n".join(
        [
            f"<svg xmlns='http://www.w3.org/2000/svg' width='{width:.0f}' height='{height}' "
            f"viewBox='0 0 {width:.0f} {height}' font-family='system-ui, Helvetica, Arial, sans-serif'>",
            _rect(0, 0, width, height, "#ffffff"),
            *body,
            "</svg>\n",
        ]
    )


def _box(span: Span, y: float, scale: float, chunks: int) -> Iterator[str]:
    action, start, end = span
    left, width = _LABEL + _MARGIN + start * scale, (end - start) * scale
    fill, ink = _colours(action.kind, action.chunk, chunks)
    yield _rect(left, y + (_ROW - _BOX) / 2, width, _BOX, fill, "stroke='#ffffff'", f"{action}: {start:g} to {end:g}")
    middle = "text-anchor='middle'"
    yield _text(left + width / 2, y + _ROW / 2 + 4, str(action.microbatch), 11, middle, ink)


def _colours(kind: Kind, chunk: int, chunks: int) -> tuple[str, str]:
    """Fill and ink, as hexadecimal numbers, which every viewer knows; the first chunk is the lightest."""
    lightness = 0.78 - (0.42 * chunk / (chunks - 1) if chunks > 1 else 0.1)
    red, green, blue = (round(255 * part) for part in colorsys.hls_to_rgb(_HUE[kind] / 360, lightness, 0.55))
    return f"#{red:02x}{green:02x}{blue:02x}", _INK if lightness > 0.55 else "#ffffff"


def _axis(makespan: float, scale: float, y: float) -> Iterator[str]:
    """Time, with a tick at least every 60 pixels."""
    step = next(unit * 10**power for power in range(-6, 12) for unit in (1, 2, 5) if unit * 10**power * scale >= 60)
    left = _LABEL + _MARGIN
    yield _line(left, y + 4, left + makespan * scale, y + 4)
    for number in range(int(makespan / step * (1 + 1e-9)) + 1):
        x = left + number * step * scale
        yield _line(x, y + 4, x, y + 9)
        yield _text(x, y + 22, f"{number * step:g}", 11, "text-anchor='middle'", _PALE)
    yield _text(_MARGIN, y + 22, "time", 11, ink=_PALE)


def _legend(kinds: Sequence[Kind], chunks: int, y: float) -> Iterator[str]:
    x: float = _LABEL + _MARGIN
    for kind in kinds:
        for chunk in range(chunks):
            yield _rect(x, y - 3, 14, 14, _colours(kind, chunk, chunks)[0])
            x += 16
        words = _MEANING[kind] + (f" (chunks 0 to {chunks - 1})" if chunks > 1 else "")
        yield _text(x + 4, y + 8, words, 12)
        x += 24 + 6.5 * len(words)


def _rect(x: float, y: float, width: float, height: float, fill: str, extra: str = "", hint: str = "") -> str:
    inside = f"<title>{escape(hint)}</title>" if hint else ""
    return (
        f"<rect x='{x:.1f}' y='{y:.1f}' width='{width:.1f}' height='{height:.1f}' fill='{fill}' {extra}>{inside}</rect>"
    )


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' stroke='#98a2ad'/>"


def _text(x: float, y: float, words: str, size: int, extra: str = "", ink: str = _INK) -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' font-size='{size}' fill='{ink}' {extra}>{escape(words)}</text>"
