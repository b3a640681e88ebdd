"""The report's plots: matplotlib's SVG, coloured by the page's own variables so that light and dark both read well."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

#: matplotlib knows no CSS variables: it draws in these colours, which are then replaced.
COLOURS = {
    "ink": "#010101",
    "muted": "#020202",
    "line": "#030303",
    "accent": "#040404",
    "good": "#050505",
    "bad": "#060606",
    "paper": "#070707",
}
POINT_SIZE, FONT_SIZE = 46, 9.5
#: How far below the budget the accuracy axis reaches, in budgets; what lies lower is drawn at the edge and said.
DEPTH = 2.5
#: Where a label may stand, in points from its point: near first.
OFFSETS = [
    (dx, dy, align)
    for distance in (8, 16, 26, 38, 52, 68)
    for dx, dy, align in (
        (distance, -3, "left"),
        (-distance, -3, "right"),
        (0, distance, "center"),
        (0, -distance - 6, "center"),
        (distance, distance * 0.8, "left"),
        (-distance, distance * 0.8, "right"),
        (distance, -distance * 0.8 - 6, "left"),
        (-distance, -distance * 0.8 - 6, "right"),
    )
]


class Point(NamedTuple):
    """One file in a plot; `x` is its cost, `y` its accuracy in percent."""

    name: str
    x: float
    y: float
    status: str  # "baseline", "accepted" or "rejected"
    front: bool
    best: bool


def points(rows: Sequence[Mapping[str, Any]], cost: str, front: str) -> list[Point]:
    """Takes the points of a plot from the rows of the results.

    Args:
        rows: `candidates` of the results.
        cost: the key of the cost.
        front: the key that says whether a row is on the Pareto front.
    """
    return [
        Point(row["name"], row[cost], 100 * row["validation_accuracy"], row["status"], row[front], row["best"])
        for row in rows
        if row["status"] != "failed"
    ]


def scatter(items: Sequence[Point], *, xlabel: str, max_drop: float, unit: str, salt: str) -> str:
    """Draws accuracy against a cost, with the Pareto front and the budget.

    Args:
        items: the points, the baseline first.
        xlabel: what the cost is; its axis is logarithmic.
        max_drop: the accuracy budget, as a fraction.
        unit: of the cost, `"B"` or `"×"`.
        salt: keeps the identifiers of two plots on one page apart.

    Returns:
        An `<svg>` element.
    """
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.size": FONT_SIZE,
        "text.parse_math": False,
        "axes.edgecolor": COLOURS["line"],
        "xtick.color": COLOURS["muted"],
        "ytick.color": COLOURS["muted"],
        "axes.labelcolor": COLOURS["muted"],
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=(6.4, 4.5))
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_axes((0.095, 0.12, 0.885, 0.85))
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        _frame(axes, items, xlabel, max_drop, unit)
        _draw(axes, items)
        _label(canvas, axes, items)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(buffer.getvalue())


def _frame(axes: Axes, items: Sequence[Point], xlabel: str, max_drop: float, unit: str) -> None:
    floor = items[0].y - 100 * max_drop
    shown = [item.y for item in items]
    span = max(100 * max_drop, 0.2)
    low = max(min(min(shown), floor) - 0.35 * span, floor - DEPTH * span)
    high = min(max(shown) + 0.35 * span, 100.0 + 0.05 * span)
    costs = [item.x for item in items]
    ratio = max(max(costs) / max(min(costs), 1e-12), 1.5)
    axes.set_xscale("log")
    axes.set_xlim(min(costs) / ratio**0.16, max(costs) * ratio**0.16)
    axes.set_ylim(low, high)
    axes.set_xlabel(xlabel)
    axes.set_ylabel("validation accuracy, %")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(which="both", length=3, color=COLOURS["line"])
    axes.grid(axis="y", color=COLOURS["line"], linewidth=0.6, alpha=0.6)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    steps = (1.0, 2.0, 3.0, 4.0, 5.0, 7.0) if ratio < 12 else ((1.0, 2.0, 5.0) if ratio < 300 else (1.0,))
    axes.xaxis.set_major_locator(LogLocator(subs=steps, numticks=15))
    axes.xaxis.set_minor_locator(LogLocator(subs=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0), numticks=60))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: quantity(value, unit)))
    axes.axhspan(low - 1, floor, color=COLOURS["bad"], alpha=0.07, linewidth=0)
    axes.axhline(floor, color=COLOURS["bad"], linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        "accuracy budget",
        (1, floor),
        xycoords=("axes fraction", "data"),
        xytext=(-3, -11),
        textcoords="offset points",
        ha="right",
        color=COLOURS["bad"],
        fontsize=FONT_SIZE - 1,
    )


def _front(items: Sequence[Point]) -> list[tuple[float, float]]:
    return sorted((item.x, item.y) for item in items if item.front)


def _draw(axes: Axes, items: Sequence[Point]) -> None:
    axes.plot(
        *zip(*_front(items), strict=True), color=COLOURS["accent"], linewidth=1.6, alpha=0.75, drawstyle="steps-post"
    )
    low = axes.get_ylim()[0]
    for item in items:
        colour = (
            COLOURS["bad"] if item.status == "rejected" else COLOURS["accent" if item.front or item.best else "muted"]
        )
        below = item.y < low
        drawn = axes.scatter(
            [item.x],
            [max(item.y, low)],
            s=POINT_SIZE * (2.6 if item.best else 1),
            marker="v" if below else ("*" if item.best else "o"),
            color=colour if item.front or item.best else COLOURS["paper"],
            edgecolors=colour,
            linewidths=1.4,
            zorder=4 if item.best else 3,
            clip_on=False,
        )
        drawn.set_gid(f"point:{item.name}")


def _label(canvas: FigureCanvasAgg, axes: Axes, items: Sequence[Point]) -> None:
    """Writes the names where they cover neither a point nor each other; one that had to move far gets a thin line."""
    canvas.draw()
    figure, renderer = canvas.figure, canvas.get_renderer()
    low = axes.get_ylim()[0]
    scale = figure.dpi / 72
    places = [axes.transData.transform((item.x, max(item.y, low))) for item in items]
    frame = axes.get_window_extent(renderer)
    taken = [(x - 5 * scale, y - 5 * scale, x + 5 * scale, y + 5 * scale) for x, y in places]
    corners = axes.transData.transform(_front(items))
    for (x0, y0), (x1, y1) in zip(corners, corners[1:], strict=False):
        taken += [(x0, y0 - 1, x1, y0 + 1), (x1 - 1, min(y0, y1), x1 + 1, max(y0, y1))]
    # Crowded points choose last: those with room would otherwise take what the crowded ones need.
    crowd = [sum(abs(x - a) < 90 * scale and abs(y - b) < 25 * scale for a, b in places) for x, y in places]
    for position in sorted(range(len(items)), key=lambda i: (not items[i].best, -crowd[i])):
        item = items[position]
        text = item.name if item.y >= low else f"{item.name} ({item.y:.1f} %)"
        best: tuple[float, Any, tuple[float, ...]] | None = None
        for dx, dy, align in OFFSETS:
            written = axes.annotate(
                text,
                (item.x, max(item.y, low)),
                xytext=(dx, dy),
                textcoords="offset points",
                ha=align,
                va="bottom" if align == "center" else "baseline",
                fontsize=FONT_SIZE - 0.5,
                fontweight="bold" if item.best else "normal",
                color=COLOURS["bad" if item.status == "rejected" else "ink"],
                zorder=5,
                annotation_clip=False,
            )
            box = written.get_window_extent(renderer)
            place = (box.x0 - 2, box.y0 - 1, box.x1 + 2, box.y1 + 1)
            outside = (
                max(frame.x0 - place[0], 0)
                + max(place[2] - figure.bbox.x1, 0)
                + max(frame.y0 - place[1], 0)
                + max(place[3] - figure.bbox.y1, 0)
            )
            cost = sum(_overlap(place, other) for other in taken) + 50 * outside + 0.15 * (abs(dx) + abs(dy))
            if best is None or cost < best[0]:
                if best is not None:
                    best[1].remove()
                best = (cost, written, place)
            else:
                written.remove()
        assert best is not None
        taken.append(best[2])  # type: ignore[arg-type]
        dx, dy = best[1].xyann
        if abs(dx) + abs(dy) > 24:
            axes.annotate(
                "",
                (item.x, max(item.y, low)),
                xytext=(dx, dy + (3 if dx else 0)),
                textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": COLOURS["line"], "linewidth": 0.8, "shrinkB": 4, "shrinkA": 1},
                annotation_clip=False,
            )


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Returns the common area of two boxes (left, bottom, right, top)."""
    return max(min(a[2], b[2]) - max(a[0], b[0]), 0.0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0.0)


def quantity(value: float, unit: str) -> str:
    """Writes a number of bytes, or a ratio, briefly.

    >>> quantity(34_200, "B"), quantity(0.5, "×")
    ('34.2 kB', '0.5×')
    """
    if unit != "B":
        return f"{value:.3g}{unit}"
    for prefix in ("", "k", "M"):
        if value < 999.5:
            return f"{value:.3g} {prefix}B"
        value /= 1000
    return f"{value:.3g} GB"


def _inline(svg: str) -> str:
    """Makes matplotlib's document an element of a page: no prolog, no metadata, the page's colours and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href")
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    svg = re.sub(
        r"font-family: [^;\"]+;?|(?<=\d)px 'DejaVu Sans'[^;\"]*", lambda m: "px inherit" if "px" in m[0] else "", svg
    )
    svg = re.sub(r'<g id="point:(\w+)">', r"<g><title>\1</title>", svg)
    return re.sub(r'<g id="[^"]*">', "<g>", svg)
