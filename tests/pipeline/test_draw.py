"""Charts against ones drawn by hand, and against what a reader needs to see in them."""

from __future__ import annotations

from xml.etree import ElementTree as ET

import pytest

from megatron_ds.pipeline.draw import draw, svg
from megatron_ds.pipeline.schedule import build

SVG = "{http://www.w3.org/2000/svg}"


def test_drawing_of_two_stages():
    assert draw(build("1f1b", 2, 1, 2)).splitlines() == [
        "stage 0 |F0 F1 ......B0--- ...B1---",
        "stage 1 |...F0 B0--- F1 B1--- ......",
        "bubble 50% of the busiest stage's work; live micro-batches by stage: 2 1",
    ]
    assert draw(build("zbh1", 2, 1, 2)).splitlines() == [
        "stage 0 |F0 F1 ...I0 W0 I1 W1",
        "stage 1 |...F0 I0 F1 I1 W0 W1",
        "bubble 17% of the busiest stage's work; live micro-batches by stage: 2 2",
    ]


def test_drawing_of_two_chunks():
    assert draw(build("forward", 2, 2, 2), backward=False).splitlines() == [
        "stage 0 |F0-- F1-- F0.1 F1.1 .....",
        "stage 1 |.....F0-- F1-- F0.1 F1.1",
        "bubble 25% of the busiest stage's work",
    ]


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 1), (4, 8), (8, 32), (16, 128), (32, 200)])
@pytest.mark.parametrize("name", ["1f1b", "gpipe"])
def test_drawings_fit_the_page(name, stages, microbatches):
    drawing = draw(build(name, stages, 1, microbatches))
    lines = drawing.splitlines()
    assert drawing.isascii()
    assert max(map(len, lines)) <= 110
    assert [line.split("|")[0].split() for line in lines[:stages]] == [["stage", str(s)] for s in range(stages)]
    assert f"B{microbatches - 1}" in lines[0], "the end of the step is shown"


def boxes(root: ET.Element) -> dict[str, list[ET.Element]]:
    """Boxes by what the pointer says over them, without the time."""
    found: dict[str, list[ET.Element]] = {}
    for rect in root.iter(f"{SVG}rect"):
        hint = rect.findtext(f"{SVG}title")
        if hint:
            found.setdefault(hint.split(":")[0], []).append(rect)
    return found


def test_svg_has_a_box_per_piece_of_work():
    root = ET.fromstring(svg(build("interleaved", 4, 2, 8), title="a < b & c"))
    found = boxes(root)
    names = [f"{kind}{i}{chunk}" for kind in "FB" for i in range(8) for chunk in ("", ".1")]
    assert sorted(found) == sorted(names)
    assert all(len(rects) == 4 for rects in found.values())
    assert {float(rect.get("y")) for rect in found["F0"]} == {float(rect.get("y")) for rect in found["B7.1"]}
    # Stage s starts s chunk times late; a backward takes twice as long as a forward.
    lefts = sorted(float(rect.get("x")) for rect in found["F0"])
    width = float(found["F0"][0].get("width"))
    assert [x - lefts[0] for x in lefts] == pytest.approx([0, width, 2 * width, 3 * width], abs=0.2)
    assert float(found["B0"][0].get("width")) == pytest.approx(2 * width, abs=0.2)
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert "a < b & c" in texts
    assert (
        "bubble 19% of the busiest stage's work; live micro-batches (each on one of 2 chunks) by stage: 11 9 7 5"
        in texts
    )
    assert [f"stage {s}" in texts for s in range(4)] == [True] * 4
    numbers = [text for text in texts if text.isdigit()]
    ticks = list(range(0, 29, 2))  # every 60 pixels or more: a forward of half a unit has 20
    assert sorted(map(int, numbers)) == sorted([i for i in range(8) for _ in range(4 * 2 * 2)] + ticks)


def test_svg_colours_tell_kinds_and_chunks_apart():
    for name, chunks, kinds in (("interleaved", 3, "FB"), ("zbh1", 1, "FIW")):
        root = ET.fromstring(svg(build(name, 2, chunks, 2)))
        fills = {}
        for word, rects in boxes(root).items():
            kind, chunk = word[0], word.partition(".")[2]
            fills.setdefault((kind, chunk), set()).update(rect.get("fill") for rect in rects)
        assert len(fills) == len(kinds) * chunks
        assert all(len(colours) == 1 for colours in fills.values())
        assert len(set.union(*fills.values())) == len(fills)
        legend = {rect.get("fill") for rect in root.iter(f"{SVG}rect") if rect.get("width") == "14.0"}
        assert legend == set.union(*fills.values())


def test_svg_stays_inside_its_page():
    for schedule in (("1f1b", 1, 1, 1), ("1f1b", 16, 1, 128), ("zbh1", 4, 1, 8)):
        root = ET.fromstring(svg(build(*schedule)))
        width, height = float(root.get("width")), float(root.get("height"))
        for rect in root.iter(f"{SVG}rect"):
            assert float(rect.get("x")) + float(rect.get("width")) <= width + 0.5
            assert float(rect.get("y")) + float(rect.get("height")) <= height
