"""Charts as inline SVG, which take their colours from the page's style and so follow its theme.

Names come from users: they enter the markup through `Markup.format`, which escapes them.
"""

import math
from collections.abc import Iterable, Sequence

from markupsafe import Markup, escape

from .charts import LayerChart, Series
from .colors import color_at, heat_image, is_light
from .scales import Axis, format_like, format_number, index_axis, value_axis
from .styles import NUM_DOMAIN_STYLES, NUM_STYLES
from .tables import Grid


WIDTH = 420
LINE_HEIGHT = 230  # of a chart of lines or bars

_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 10, 34
_CHARACTER_WIDTH = 6.2  # mean, of the labels
_MAX_LABEL = 14  # characters of a row's label


def line_chart(chart: LayerChart) -> Markup:
    """Return the lines of `chart` with markers, and those of its baseline without."""
    drawn = [*chart.series, *chart.baselines]
    values = value_axis((value for each in drawn for value in each.values), LINE_HEIGHT - _BOTTOM, _TOP)
    layers = index_axis(chart.layers, _LEFT, WIDTH - _RIGHT)
    baselines = [
        Markup('<g class="baseline s{}">{}</g>').format(number % NUM_STYLES, _path(each, layers, values))
        for number, each in enumerate(chart.baselines)
    ]
    lines = [
        Markup('<g class="series s{}">{}{}</g>').format(
            number % NUM_STYLES, _path(each, layers, values), _markers(each, layers, values)
        )
        for number, each in enumerate(chart.series)
    ]
    content = _value_grid(values) + _index_labels(layers, "layer") + Markup().join([*baselines, *lines])
    return _svg(LINE_HEIGHT, chart.figure.title, content)


def grouped_bars(grid: Grid, axis: Axis, title: str) -> Markup:
    """Return the columns of `grid` as groups of bars, one colour a row."""
    step = (WIDTH - _LEFT - _RIGHT) / len(grid.columns)
    width = step * 0.84 / len(grid.rows)
    bars = []
    for number, (label, row) in enumerate(zip(grid.rows, grid.values.tolist(), strict=True)):
        rects = [
            Markup('<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>').format(
                _LEFT + (group + 0.08) * step + number * width,
                axis.place(value),
                width,
                axis.start - axis.place(value),
                f"{label}, {grid.column_title} {grid.columns[group]}: {format_number(value)}",
            )
            for group, value in enumerate(row)
            if not math.isnan(value)
        ]
        bars.append(Markup('<g class="bars d{}">{}</g>').format(number % NUM_DOMAIN_STYLES, Markup().join(rects)))
    labels = _column_labels(grid.columns, step, LINE_HEIGHT - _BOTTOM, grid.column_title)
    return _svg(LINE_HEIGHT, title, _value_grid(axis) + labels + Markup().join(bars))


def bar_axis(values: Iterable[float | None]) -> Axis:
    """Return the axis of bars for `values`, which begin at zero."""
    return value_axis([0.0, *values], LINE_HEIGHT - _BOTTOM, _TOP)


def heat_map(grid: Grid, title: str) -> Markup:
    """Return a heat map: a square where both sides count the same, else rows no higher than they need."""
    label_width = max(len(_shortened(label)) for label in grid.rows) * _CHARACTER_WIDTH
    left = max(26 + label_width, 34)
    width = WIDTH - left - _RIGHT
    is_square = grid.row_title == grid.column_title
    cell_height = width / len(grid.rows) if is_square else min(max(150 / len(grid.rows), 7), 24)
    cell_width = width / len(grid.columns)
    height = cell_height * len(grid.rows)
    if grid.as_image:
        cells = Markup('<image href="{}" width="{:.1f}" height="{:.1f}" preserveAspectRatio="none"/>').format(
            heat_image(grid.shares), width, height
        )
    else:
        cells = _cells(grid, cell_width, cell_height)
    body = Markup('<g class="cells" transform="translate({:.1f} {})"><rect class="gap" {}/>{}</g>').format(
        left, _TOP, Markup('width="{:.1f}" height="{:.1f}"').format(width, height), cells
    )
    row_labels = _row_labels(grid, left, cell_height)
    labels = _column_labels(grid.columns, cell_width, _TOP + height, grid.column_title, left)
    return _svg(_TOP + height + _BOTTOM, title, body + row_labels + labels)


def _svg(height: float, title: str, content: Markup) -> Markup:
    return Markup('<svg viewBox="0 0 {} {:.0f}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, height, title, content
    )


def _path(series: Series, layers: Axis, values: Axis) -> Markup:
    """Return the line; it is broken where there is no value."""
    commands, command = [], "M"
    for index, value in zip(series.indices, series.values, strict=True):
        if value is not None:
            commands.append(f"{command}{layers.place(index):.1f} {values.place(value):.1f}")
        command = "M" if value is None else "L"
    return Markup('<path d="{}"/>').format("".join(commands))


def _markers(series: Series, layers: Axis, values: Axis) -> Markup:
    return Markup().join(
        Markup('<circle cx="{:.1f}" cy="{:.1f}" r="2.5"><title>{}</title></circle>').format(
            layers.place(index), values.place(value), f"{series.name}, layer {index}: {format_number(value)}"
        )
        for index, value in zip(series.indices, series.values, strict=True)
        if value is not None
    )


def _value_grid(axis: Axis) -> Markup:
    lines = [
        Markup(
            '<line x1="{}" x2="{}" y1="{y:.1f}" y2="{y:.1f}"/><text class="end" x="{}" y="{:.1f}">{}</text>'
        ).format(_LEFT, WIDTH - _RIGHT, _LEFT - 6, place + 3.5, text, y=place)
        for place, text in axis.labels()
    ]
    return Markup('<g class="axis">{}</g>').format(Markup().join(lines))


def _index_labels(axis: Axis, title: str) -> Markup:
    labels = [
        Markup('<text class="middle" x="{:.1f}" y="{}">{}</text>').format(place, LINE_HEIGHT - _BOTTOM + 14, text)
        for place, text in axis.labels()
    ]
    return _labels(labels, title, (axis.start + axis.end) / 2, LINE_HEIGHT)


def _column_labels(columns: Sequence[str], step: float, top: float, title: str, left: float = _LEFT) -> Markup:
    longest = max(len(column) for column in columns)
    every = _spacing(step, longest * _CHARACTER_WIDTH + 8)
    labels = [
        Markup('<text class="middle" x="{:.1f}" y="{:.1f}">{}</text>').format(
            left + (number + 0.5) * step, top + 14, column
        )
        for number, column in enumerate(columns)
        if number % every == 0
    ]
    return _labels(labels, title, left + step * len(columns) / 2, top + _BOTTOM)


def _labels(labels: Sequence[Markup], title: str, middle: float, bottom: float) -> Markup:
    return Markup('<g class="axis">{}<text class="middle title" x="{:.1f}" y="{:.1f}">{}</text></g>').format(
        Markup().join(labels), middle, bottom - 5, title
    )


def _row_labels(grid: Grid, left: float, step: float) -> Markup:
    every = _spacing(step, 12)
    labels = [
        Markup('<text class="end" x="{:.1f}" y="{:.1f}">{}<title>{}</title></text>').format(
            left - 5, _TOP + (number + 0.5) * step + 3.5, _shortened(label), label
        )
        for number, label in enumerate(grid.rows)
        if number % every == 0
    ]
    middle = _TOP + step * len(grid.rows) / 2
    title = Markup('<text class="middle title" transform="translate(10 {:.1f}) rotate(-90)">{}</text>').format(
        middle, grid.row_title
    )
    return Markup('<g class="axis">{}</g>').format(Markup().join(labels) + title)


def _cells(grid: Grid, width: float, height: float) -> Markup:
    has_text = width >= 30 and height >= 14
    columns = [escape(f"{grid.column_title} {label}") for label in grid.columns]
    cells = []
    for row, label in enumerate(grid.rows):
        y, row_label = row * height, escape(f"{grid.row_title} {label}")
        for column, (value, share) in enumerate(
            zip(grid.values[row].tolist(), grid.shares[row].tolist(), strict=True)
        ):
            if math.isnan(value):
                continue
            x, where = column * width, f"{row_label}, {columns[column]}"
            # Not by `Markup.format`, which is too slow for thousands. A little wider than the cell, or the page
            # shines through between two.
            cells.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{width + 0.3:.1f}" height="{height + 0.3:.1f}" '
                f'fill="{color_at(share)}"><title>{where}: {format_number(value)}</title></rect>'
            )
            if has_text:
                style = "on-light" if is_light(share) else "on-dark"
                cells.append(
                    f'<text class="{style}" x="{x + width / 2:.1f}" y="{y + height / 2 + 3.5:.1f}">'
                    f"{format_like(value, grid.high)}</text>"
                )
    return Markup("".join(cells))


def _spacing(step: float, needed: float) -> int:
    """Return every how many labels one has room, as a round number."""
    return next(every for every in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 10**9) if every * step >= needed)


def _shortened(label: str) -> str:
    return label if len(label) <= _MAX_LABEL else f"{label[: _MAX_LABEL - 1]}…"
