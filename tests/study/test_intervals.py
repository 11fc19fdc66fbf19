"""Small interval plots: places, region, margin, and their description."""

import math
from xml.etree import ElementTree

import pytest

from hloss.study.intervals import AXIS, ROW, Interval, Scale, axis_plot, difference_plot, mean_plot


def drawn(svg):
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img"
    assert root.get("aria-label")
    return root


def place(element, name):
    return float(element.get(name).removesuffix("%"))


def test_a_difference_stands_where_its_values_are():
    root = drawn(difference_plot([Interval(-3.0, -4.0, -2.0)], (0, math.inf), 2.0, "a minus b"))
    zero, low, high = (Scale([0, -2, 2, -3, -4, -2]).place(value) for value in (0, -4, -2))
    lines = root.findall("line")
    dashed = [line for line in lines if line.get("stroke-dasharray")]
    assert len(dashed) == 2  # the margin at both signs
    assert zero in [place(line, "x1") for line in lines if line.get("x1") == line.get("x2")]
    (bar,) = (line for line in lines if line.get("x1") != line.get("x2"))
    assert (place(bar, "x1"), place(bar, "x2")) == (low, high)
    caps = [place(line, "x1") for line in lines if float(line.get("y2")) - float(line.get("y1")) == 10]
    assert caps == [low, high]
    region = root.find("rect")
    assert place(region, "x") == zero
    assert place(region, "x") + place(region, "width") == pytest.approx(100)
    labels = [text.text for text in root.findall("text")]
    assert sorted(labels) == sorted(["0", "2", "−2", "−4"])
    assert [place(text, "x") for text in root.findall("text")] == [
        Scale([0, -2, 2, -3, -4, -2]).place(float(text.replace("−", "-"))) for text in labels
    ]


def test_an_axis_without_marks_has_round_numbers():
    root = drawn(difference_plot([Interval(-22.0, -31.0, -13.0)], (0, math.inf), math.nan, "a minus b"))
    assert {"0", "−10", "−20", "−30"} <= {text.text for text in root.findall("text")}


@pytest.mark.parametrize(
    ("holds", "dashed"),
    [((-2.0, 2.0), 2), ((-3.0, math.inf), 1), ((-math.inf, 2.0), 1), ((math.nan, 0.0), 0), ((5.0, math.nan), 1)],
)
def test_only_the_margins_of_the_criterion_are_drawn(holds, dashed):
    margin = math.nan if holds[1] == 0 else 2.0
    root = drawn(difference_plot([Interval(1.0)], holds, margin, "x"))
    assert sum(line.get("stroke-dasharray") is not None for line in root.findall("line")) == dashed


def test_each_length_has_a_line_and_an_open_circle_while_improving():
    root = drawn(difference_plot([Interval(1.0, 0.5, 1.5), Interval(2.0, 1.5, 2.5, True)], (0, 9), math.nan, "x"))
    assert root.get("height") == str(2 * ROW + AXIS)
    assert [circle.get("style") is not None for circle in root.findall("circle")] == [False, True]
    assert [float(circle.get("cy")) for circle in root.findall("circle")] == [ROW / 2, 3 * ROW / 2]


def test_a_value_without_an_interval_is_a_point():
    root = drawn(difference_plot([Interval(-6.7)], (-2.0, math.inf), 2.0, "x"))
    assert not [line for line in root.findall("line") if line.get("x1") != line.get("x2")]
    assert len(root.findall("circle")) == 1


def test_means_of_shorter_training_are_small_points():
    scale = Scale([30, 60])
    root = drawn(mean_plot(Interval(50, 45, 55), scale, [35, math.nan, 40], "triplet"))
    assert [place(circle, "cx") for circle in root.findall("circle")] == [scale.place(v) for v in (35, 40, 50)]
    first, second, mean = (float(circle.get("r")) for circle in root.findall("circle"))
    assert first < second < mean


def test_the_axis_has_round_numbers_at_their_places():
    scale = Scale([31.0, 62.0])
    root = drawn(axis_plot(scale))
    ticks = {text.text: place(text, "x") for text in root.findall("text")}
    assert ticks == {text: scale.place(float(text)) for text in ticks}
    assert "40" in ticks
    assert len(ticks) <= 7


def test_the_axis_of_percent_ends_at_0_and_100():
    for values in ([-3.0, 2.0], [98.0, 104.0], [-20.0, 120.0]):
        ticks = [float(text.text) for text in drawn(axis_plot(Scale(values))).findall("text")]
        assert {min(ticks), max(ticks)} & {0, 100}
        assert all(0 <= tick <= 100 for tick in ticks)


def test_equal_values_have_a_scale():
    assert Scale([5.0, 5.0]).place(5.0) == 50
    assert drawn(axis_plot(Scale([0.0]))) is not None


def test_descriptions_are_escaped():
    assert drawn(difference_plot([Interval(1.0)], (0, 1), 2.0, 'a "b" < c')).get("aria-label") == 'a "b" < c'
