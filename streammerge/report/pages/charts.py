"""Charts as SVG, drawn by Vega-Lite (the package vl-convert) from plain values, without a browser and without a network.

Colours are variables of the page's style sheet, so that one drawing serves light and dark. Each mark has a title, which
browsers show under the pointer and screen readers read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NewType

from streammerge.errors import printable
from streammerge.lazy import late_pattern
from streammerge.records import dataclass

Svg = NewType("Svg", str)
"""Markup of a drawing whose texts are escaped."""
Point = Mapping[str, Any]
"""A mark: ``series``, ``x``, ``y`` and ``tip``, the text of its title."""

COLOURS = tuple(f"var(--c{i})" for i in range(1, 9))
_DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3])
_WIDTH, _HEIGHT = 360, 200
_PADDING = {"left": 14, "right": 8, "top": 4, "bottom": 4}
"""Room for texts in browsers whose font is wider than the one that the library measures."""
_MOST_MATRIX_TEXTS = 10
"""The most rows of a matrix whose cells hold their numbers."""
_LABEL = 24
"""The most characters of a label."""
_CONFIG = {
    "font": "Arial, Helvetica, Liberation Sans, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--soft)",
        "titleColor": "var(--ink)",
        "gridColor": "var(--line)",
        "domainColor": "var(--line)",
        "tickColor": "var(--line)",
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
        "gridOpacity": 0.6,
    },
    "legend": {
        "labelColor": "var(--ink)",
        "labelFontSize": 11,
        "labelLimit": 100,
        "columnPadding": 24,
        "orient": "bottom",
        "columns": 3,
        "title": None,
        "symbolStrokeWidth": 2,
    },
}
_LABELLED = late_pattern(
    r'(<(\w+) aria-label="([^"]*)" role="graphics-symbol" aria-roledescription="(?!axis|legend)[^>]*)/>'
)
_IDS = late_pattern(r'(\bid="|url\(#|href="#)([^")]+)')


@dataclass(frozen=True)
class Axis:
    """An axis of a chart."""

    title: str
    format: str = ""
    """Format of its numbers as d3 spells it; empty: as they are."""
    ordered: bool = False
    """Whether its values are names in the order in which they come."""
    zero: bool = True
    """Whether a scale of numbers begins at 0."""
    ticks: Sequence[int] = ()
    """The numbers that are marked; empty: as the library chooses."""

    def encoding(self, field: str) -> dict[str, Any]:
        """Return how Vega-Lite places the field of a mark."""
        axis: dict[str, Any] = {"title": self.title, "labelFlush": False}
        if self.format:
            axis["format"] = self.format
        if self.ticks:
            axis["values"] = list(self.ticks)
        if self.ordered:
            axis |= {"labelAngle": 0, "labelLimit": 90, "labelOverlap": True}
            return {"field": field, "type": "ordinal", "sort": None, "axis": axis}
        scale = {"zero": self.zero, "nice": field == "y"}
        return {"field": field, "type": "quantitative", "scale": scale, "axis": axis}


def whole_numbers(title: str, numbers: Iterable[int]) -> Axis:
    """Return an axis of whole numbers, such as layers, that marks at most a dozen of them."""
    known = sorted(set(numbers)) or [0]
    step = -(-(known[-1] - known[0] + 1) // 12)
    return Axis(title, "d", zero=False, ticks=range(known[0], known[-1] + 1, step))


def lines(points: Sequence[Point], x: Axis, y: Axis, series: Sequence[str], mark: str = "line") -> Svg:
    """Draw a line with its points for each series, in the order of `series`; labels must differ.

    Parameters
    ----------
    mark
        ``line``, or ``point`` for points that no line connects.
    """
    names, colours, dashes = _shown(points, series)
    encoding: dict[str, Any] = {"x": x.encoding("x"), "y": y.encoding("y"), "description": {"field": "tip"}}
    if names:
        legend = {} if len(names) > 1 else {"legend": None}
        encoding["color"] = {
            "field": "series",
            "type": "nominal",
            "scale": {"domain": names, "range": colours},
            **legend,
        }
        if len(names) > len(COLOURS) and mark == "line":
            encoding["strokeDash"] = {"field": "series", "scale": {"domain": names, "range": dashes}}
    size = 14 if len(points) > 40 * max(1, len(names)) else 30
    dots = {"mark": {"type": "circle", "opacity": 1, "size": size}}
    layers = (
        [dots] if mark == "point" else [{"mark": {"type": "line", "strokeWidth": 1.75, "aria": False}}, dots]
    )
    values = [{**point, "series": label(point["series"])} for point in points]
    return draw({"encoding": encoding, "layer": layers, "data": {"values": values}})


def _shown(points: Sequence[Point], series: Sequence[str]) -> tuple[list[str], list[str], list[list[int]]]:
    """Return the labels of the series that have points, their colours and dashes: the same in every figure of a page."""
    present = {label(point["series"]) for point in points}
    shown = [(i, label(name)) for i, name in enumerate(series) if label(name) in present]
    colours = [COLOURS[i % len(COLOURS)] for i, _ in shown]
    dashes = [_DASHES[i // len(COLOURS) % len(_DASHES)] for i, _ in shown]
    return [name for _, name in shown], colours, dashes


def bars(points: Sequence[Point], x: Axis, y: Axis, series: Sequence[str], *, stacked: bool = False) -> Svg:
    """Draw a bar for each point: those of one `x` next to each other, or stacked, in the order of `series`."""
    names, colours, _ = _shown(points, series)
    encoding: dict[str, Any] = {
        "x": x.encoding("x"),
        "y": y.encoding("y"),
        "description": {"field": "tip"},
        "color": {
            "field": "series",
            "type": "nominal",
            "scale": {"domain": names, "range": colours},
            **({} if len(names) > 1 else {"legend": None}),
        },
        "order": {"field": "order"},
    }
    if not stacked and len(names) > 1:
        encoding["xOffset"] = {"field": "series", "sort": names}
    values = [
        {**point, "series": label(point["series"]), "order": names.index(label(point["series"]))}
        for point in points
    ]
    return draw({"encoding": encoding, "mark": {"type": "bar"}, "data": {"values": values}})


def across(points: Sequence[Point], x: Axis) -> Svg:
    """Draw a horizontal bar for each point: `x` long, with its `series` as its name, in the order given."""
    values = [{**point, "series": label(point["series"])} for point in points]
    encoding = {
        "x": x.encoding("x"),
        "y": {"field": "series", "type": "nominal", "sort": None, "axis": {"title": None, "labelLimit": 150}},
        "description": {"field": "tip"},
    }
    mark = {"type": "bar", "color": COLOURS[0]}
    return draw(
        {"encoding": encoding, "mark": mark, "data": {"values": values}, "height": {"step": 20}, "width": 260}
    )


def matrix(
    cells: Sequence[Point],
    x: Axis,
    y: Axis,
    *,
    domain: tuple[float, float],
    scheme: str,
    texts: bool,
    format: str,
) -> Svg:
    """Draw a coloured cell for each point: `x` and `y` are names, `value` is its number or None.

    Parameters
    ----------
    domain
        The numbers at the ends of the scale of colours.
    scheme
        The name of the scale of colours in Vega.
    """
    values = [{**cell, "x": label(cell["x"]), "y": label(cell["y"])} for cell in cells]
    low, high = domain
    middle, half = (low + high) / 2, (high - low) / 2
    dark = (
        f"abs(datum.value - {middle}) > {0.62 * half}"
        if scheme == "blueorange"
        else f"datum.value > {middle}"
    )
    colour = {
        "condition": {
            "test": "isValid(datum.value)",
            "field": "value",
            "type": "quantitative",
            "scale": {"scheme": scheme, "domain": [low, high]},
            "legend": None
            if texts
            else {"orient": "right", "title": None, "gradientLength": 160, "columns": 1},
        },
        "value": "var(--none)",
    }
    layers: list[dict[str, Any]] = [
        {"mark": {"type": "rect"}, "encoding": {"color": colour, "description": {"field": "tip"}}}
    ]
    if texts:
        ink = {"condition": {"test": dark, "value": "#ffffff"}, "value": "#1c2128"}
        shown = {"field": "value", "type": "quantitative", "format": format}
        layers.append({"mark": {"type": "text", "aria": False}, "encoding": {"text": shown, "color": ink}})
    encoding = {"x": x.encoding("x"), "y": y.encoding("y")}
    encoding["x"]["axis"] |= {"labelAngle": -40, "labelAlign": "right"}
    height = max(120, min(_WIDTH, 30 * len({cell["y"] for cell in values})))
    return draw(
        {
            "encoding": encoding,
            "layer": layers,
            "data": {"values": values},
            "height": height,
            "width": _WIDTH - 30,
        }
    )


def square(names: Sequence[str], numbers: Sequence[Sequence[float | None]]) -> Svg:
    """Draw a matrix of cosines, which has the same names on both sides."""
    cells = [
        {
            "x": column,
            "y": row,
            "value": numbers[i][j],
            "tip": f"{row}, {column}: "
            + ("no direction" if numbers[i][j] is None else f"{numbers[i][j]:.4f}"),
        }
        for i, row in enumerate(names)
        for j, column in enumerate(names)
    ]
    few = len(names) <= _MOST_MATRIX_TEXTS
    axis = Axis("", ordered=True)
    return matrix(cells, axis, axis, domain=(-1, 1), scheme="blueorange", texts=few, format=".2f")


def draw(spec: Mapping[str, Any]) -> Svg:
    """Return the drawing of a Vega-Lite specification with values of its own."""
    import vl_convert  # 100 MB of resident memory, so only when something is drawn

    whole = {
        "width": _WIDTH,
        "height": _HEIGHT,
        "background": None,
        "config": _CONFIG,
        "padding": _PADDING,
        **spec,
    }
    drawn = vl_convert.vegalite_to_svg(_printable(whole), allowed_base_urls=[])
    own = hashlib.blake2b(drawn.encode(), digest_size=4).hexdigest()  # identifiers must differ within a page
    return Svg(_LABELLED.sub(r"\1><title>\3</title></\2>", _IDS.sub(rf"\1d{own}-\2", drawn)))


def _printable(value: Any) -> Any:
    """Return a specification whose texts are safe to show; the library refuses lone surrogates."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {key: _printable(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_printable(item) for item in value]
    return value


def label(name: object) -> str:
    """Return a name as a label of a chart."""
    return printable(name, _LABEL)


def distinct(names: Sequence[str]) -> list[str]:
    """Return labels of names, numbered where shortened names would be equal."""
    labels = [label(name) for name in names]
    if len(set(labels)) == len(labels):
        return labels
    return [label(f"{i}. {name}") for i, name in enumerate(names, 1)]
