"""Charts as SVG, without a library: lines, steps, points and grouped bars, in panels side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

COLORS = ("#1b6ca8", "#d1495b", "#2e8b57", "#e08e0b", "#6f4e9b", "#4a4a4a", "#8c564b", "#17becf")
PANEL_WIDTH, PANEL_HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 40, 46
LEGEND_ROW = 16


@dataclass(frozen=True)
class Series:
    """`kind`: line, step (holds a value until the next point) or points."""

    name: str
    points: Sequence[tuple[float, float]]
    kind: str = "line"


@dataclass(frozen=True)
class Chart:
    """`spans` are shaded stretches of x, each with a label."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    log_y: bool = False
    spans: Sequence[tuple[float, float, str]] = ()


@dataclass(frozen=True)
class Bars:
    """`values[series][group]`; None leaves a gap."""

    title: str
    y_label: str
    groups: Sequence[str]
    values: dict[str, Sequence[float | None]]
    log_y: bool = False


def save_svg(path: Path, panels: Sequence[Chart | Bars], columns: int = 2) -> None:
    """All panels of one figure, with one colour per series name."""
    names = list(dict.fromkeys(name for panel in panels for name in _names(panel)))
    color_of = {name: COLORS[index % len(COLORS)] for index, name in enumerate(names)}
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    legend_rows = math.ceil(len(names) / max(1, columns * 3))
    height = rows * PANEL_HEIGHT + legend_rows * LEGEND_ROW + 10
    width = columns * PANEL_WIDTH
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for index, panel in enumerate(panels):
        x, y = index % columns * PANEL_WIDTH, index // columns * PANEL_HEIGHT
        drawn = _draw_chart(panel, color_of) if isinstance(panel, Chart) else _draw_bars(panel, color_of)
        parts += [f'<g transform="translate({x},{y})">', *drawn, "</g>"]
    for index, name in enumerate(names):
        x = LEFT + index % (columns * 3) * (width - LEFT) / (columns * 3)
        y = rows * PANEL_HEIGHT + 8 + index // (columns * 3) * LEGEND_ROW
        parts.append(f'<rect x="{x:.0f}" y="{y}" width="10" height="10" fill="{color_of[name]}"/>')
        parts.append(_text(x + 15, y + 9, name))
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


def _names(panel: Chart | Bars) -> list[str]:
    return [series.name for series in panel.series] if isinstance(panel, Chart) else list(panel.values)


class _Scale:
    """Values to pixels, with ticks at round numbers."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, log: bool, from_zero: bool) -> None:
        usable = [value for value in values if math.isfinite(value) and (value > 0 or not log)] or [0.1, 1.0]
        low, high = min(usable), max(usable)
        if log:
            self.low, self.high = 10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high * 1.0001))
            first, last = round(math.log10(self.low)), round(math.log10(self.high))
            self.ticks = [10.0**power for power in range(first, last + 1)]
        else:
            low = min(0.0, low) if from_zero else low
            step = _round_step((high - low or 1.0) / 5)
            self.low, self.high = math.floor(low / step) * step, max(math.ceil(high / step), 1) * step
            if self.high == self.low:
                self.high += step
            self.ticks = [self.low + step * n for n in range(round((self.high - self.low) / step) + 1)]
        self._start, self._end, self._log = start, end, log

    def __call__(self, value: float) -> float:
        if self._log:
            value = max(value, self.low)
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self._start + share * (self._end - self._start)


def _round_step(step: float) -> float:
    power = 10 ** math.floor(math.log10(step))
    return float(next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= step * 0.999))


def _draw_frame(panel: Chart | Bars, y: _Scale) -> list[str]:
    right, bottom = PANEL_WIDTH - RIGHT, PANEL_HEIGHT - BOTTOM
    parts = [_text(LEFT, 20, panel.title, size=13, weight="bold")]
    for tick in y.ticks:
        parts.append(f'<path d="M{LEFT} {y(tick):.1f}H{right}" stroke="#e4e4e4"/>')
        parts.append(_text(LEFT - 6, y(tick) + 4, _number(tick), anchor="end"))
    parts.append(f'<path d="M{LEFT} {TOP}V{bottom}H{right}" stroke="#888" fill="none"/>')
    middle = (TOP + bottom) / 2
    parts.append(
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">'
        f"{escape(panel.y_label)}</text>"
    )
    return parts


def _draw_chart(chart: Chart, color_of: dict[str, str]) -> list[str]:
    right, bottom = PANEL_WIDTH - RIGHT, PANEL_HEIGHT - BOTTOM
    xs = [x for series in chart.series for x, _ in series.points] + [edge for span in chart.spans for edge in span[:2]]
    ys = [y for series in chart.series for _, y in series.points]
    x = _Scale(xs, LEFT, right, log=False, from_zero=False)
    y = _Scale(ys, bottom, TOP, log=chart.log_y, from_zero=True)
    parts = []
    for start, end, label in chart.spans:
        wide = x(end) - x(start)
        parts.append(f'<rect x="{x(start):.1f}" y="{TOP}" width="{wide:.1f}" height="{bottom - TOP}" fill="#f4ecd8"/>')
        parts.append(_text(x(start) + 3, TOP + 11, label, color="#8a6d1d"))
    parts += _draw_frame(chart, y)
    for tick in x.ticks:
        parts.append(_text(x(tick), bottom + 15, _number(tick), anchor="middle"))
    parts.append(_text((LEFT + right) / 2, bottom + 32, chart.x_label, anchor="middle"))
    for series in chart.series:
        color = color_of[series.name]
        pixels = [(x(px), y(py)) for px, py in series.points]
        if series.kind == "points":
            parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="2.4" fill="{color}"/>' for px, py in pixels]
        elif pixels:
            parts.append(f'<path d="{_path(pixels, series.kind)}" stroke="{color}" stroke-width="1.6" fill="none"/>')
    return parts


def _path(pixels: Sequence[tuple[float, float]], kind: str) -> str:
    parts = [f"M{pixels[0][0]:.1f} {pixels[0][1]:.1f}"]
    for px, py in pixels[1:]:
        parts.append(f"H{px:.1f}V{py:.1f}" if kind == "step" else f"L{px:.1f} {py:.1f}")
    return "".join(parts)


def _draw_bars(bars: Bars, color_of: dict[str, str]) -> list[str]:
    right, bottom = PANEL_WIDTH - RIGHT, PANEL_HEIGHT - BOTTOM
    values = [value for row in bars.values.values() for value in row if value is not None]
    y = _Scale(values, bottom, TOP, log=bars.log_y, from_zero=True)
    parts = _draw_frame(bars, y)
    group_width = (right - LEFT) / max(1, len(bars.groups))
    bar_width = min(44.0, group_width * 0.8 / max(1, len(bars.values)))
    for number, group in enumerate(bars.groups):
        left = LEFT + number * group_width
        parts.append(_text(left + group_width / 2, bottom + 15, group, anchor="middle"))
        for index, (name, row) in enumerate(bars.values.items()):
            value = row[number]
            if value is None:
                continue
            top = min(y(value), bottom)
            px = left + group_width / 2 + (index - len(bars.values) / 2) * bar_width
            parts.append(
                f'<rect x="{px:.1f}" y="{top:.1f}" width="{bar_width * 0.92:.1f}" height="{bottom - top:.1f}" '
                f'fill="{color_of[name]}"/>'
            )
            parts.append(_text(px + bar_width / 2, top - 3, _number(value), anchor="middle", size=9))
    return parts


def _text(
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "start",
    size: int = 11,
    weight: str = "normal",
    color: str = "#222",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" '
        f'fill="{color}">{escape(text)}</text>'
    )


def _number(value: float) -> str:
    if value and abs(value) < 0.01:
        return f"{value:.0e}"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
