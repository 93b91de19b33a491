"""The charts of a run: drawn once with matplotlib, as SVG that follows a page's colours or as a PNG.

Drawn on matplotlib's objects rather than through pyplot: no display, no process-wide state, no figure left open.
"""

from __future__ import annotations

import dataclasses
import html
import io
import pathlib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from components.delivery.select import LOWER_IS_BETTER

STYLE = {
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched, and takes the page's font
    "font.size": 10.0,
    # A label such as '$50k$' is a name, not a formula.
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.minor.visible": False,
}
# Where the label of a point may go, in points from it: near places first, then with a leader line.
PLACES = [(10, 0), (0, 9), (0, -9), (-10, 0), (8, 10), (8, -10), (-8, 10), (-8, -10)]
PLACES += [(x, y) for far in (22, 36, 50) for x, y in ((10, far), (10, -far), (-10, far), (-10, -far))]


@dataclasses.dataclass(frozen=True)
class Palette:
    """Colours by meaning, as '#rrggbb'; `themed` gives each the page's variable of its name instead."""

    paper: str = "#ffffff"
    ink: str = "#1d2330"
    muted: str = "#5b6475"
    line: str = "#e3e7ee"
    accent: str = "#0b766f"
    soft: str = "#a9d5d1"
    plain: str = "#8793a6"


PAPER = Palette()
# Colours that nothing else uses, so that they can be found again in the SVG.
_MARKS = Palette("#fe0101", "#fe0102", "#fe0103", "#fe0104", "#fe0105", "#fe0106", "#fe0107")


def svg(draw: Callable[[Figure, Palette], None], size: tuple[float, float], title: str) -> str:
    """A chart as inline SVG that takes its colours from the page: CSS variables `--ink`, `--accent`, ...

    Args:
      draw: Fills the figure.
      size: (width, height), inches.
      title: What the chart shows, for those who cannot see it.
    """
    written = io.StringIO()
    salt = {"svg.hashsalt": title}  # equal charts give equal bytes
    with matplotlib.rc_context(STYLE | salt), warnings.catch_warnings():
        # The page's font draws the text, so a glyph that matplotlib's own font lacks is no loss.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure = _figure(draw, size, _MARKS)
        figure.savefig(
            written, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    return _themed(written.getvalue(), title)


def png(draw: Callable[[Figure, Palette], None], size: tuple[float, float], path: pathlib.Path) -> None:
    """The same chart as a picture on white, 160 dots an inch."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # A box in place of a rare letter is better than no picture.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure = _figure(draw, size, PAPER)
        figure.savefig(path, dpi=160, facecolor=PAPER.paper, metadata={"Software": None})


def _figure(draw: Callable[[Figure, Palette], None], size: tuple[float, float], palette: Palette) -> Figure:
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure, palette)
    return figure


def _themed(text: str, title: str) -> str:
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    label = html.escape(title, quote=True)
    text = re.sub(
        r'<svg ([^>]*?)width="[^"]*" height="[^"]*"|<svg ', rf'<svg role="img" aria-label="{label}" \1', text, count=1
    )
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    for field in dataclasses.fields(Palette):
        text = text.replace(getattr(_MARKS, field.name), f"var(--{field.name})")
    return text


def _plain(axes: Axes, palette: Palette) -> None:
    """Quiet axes: one colour, no ticks, a faint grid is added by who wants it."""
    for spine in axes.spines.values():
        spine.set_color(palette.line)
    axes.tick_params(which="both", colors=palette.muted, length=0)
    axes.xaxis.label.set_color(palette.muted)
    axes.yaxis.label.set_color(palette.muted)


def working(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The variants that were measured, in the user's order."""
    return [each for each in results["variants"] if each["status"] == "ok" and each["metric"] is not None]


def pareto(variants: Sequence[Mapping[str, Any]], metric: str) -> list[Mapping[str, Any]]:
    """The variants that none beats in both gzip bytes and metric, smallest first.

    >>> sizes = [{"gzip_bytes": 9, "metric": 0.8}, {"gzip_bytes": 5, "metric": 0.9}, {"gzip_bytes": 20, "metric": 0.95}]
    >>> [each["gzip_bytes"] for each in pareto(sizes, "accuracy")]
    [5, 20]
    """
    sign = -1 if metric in LOWER_IS_BETTER else 1
    front: list[Mapping[str, Any]] = []
    for variant in sorted(variants, key=lambda each: (each["gzip_bytes"], -sign * each["metric"])):
        if not front or sign * variant["metric"] > sign * front[-1]["metric"]:
            front.append(variant)
    return front


def scatter(axes: Axes, results: Mapping[str, Any], palette: Palette) -> None:
    """Metric on the test split over compressed size; the front is drawn through, the chosen one marked."""
    variants = working(results)
    front = pareto(variants, results["metric"])
    axes.plot(
        [each["gzip_bytes"] for each in front],
        [each["metric"] for each in front],
        color=palette.soft,
        linewidth=2,
        drawstyle="steps-post",
        zorder=1,
    )
    best = {each["recipe"] for each in front}
    for variant in variants:
        chosen = variant["recipe"] == results["selected"]
        colour = palette.accent if variant["recipe"] in best or chosen else palette.plain
        at = (variant["gzip_bytes"], variant["metric"])
        if chosen:
            axes.scatter(*at, s=190, facecolors="none", edgecolors=palette.accent, linewidths=1.8, zorder=2)
        axes.scatter(*at, s=46, color=colour, zorder=3)
    _plain(axes, palette)
    axes.grid(color=palette.line, linewidth=0.8)
    axes.margins(x=0.2, y=0.14)
    _size_axis(axes, [each["gzip_bytes"] for each in variants])
    better = "lower" if results["metric"] in LOWER_IS_BETTER else "higher"
    axes.set_ylabel(f"test {results['metric']} ({better} is better)")
    if better == "lower":
        axes.invert_yaxis()  # better is up in every picture
    _label_points(axes, variants, results["selected"], palette)


def _size_axis(axes: Axes, sizes: Sequence[int]) -> None:
    axes.set_xlabel("gzip bytes")
    if max(sizes) > 4 * min(sizes):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: in_short(value)))


def in_short(value: float) -> str:
    """Bytes as people say them, in powers of 1,000.

    >>> [in_short(each) for each in (512, 2048, 65536, 1_500_000)]
    ['512 B', '2 kB', '66 kB', '1.5 MB']
    """
    for unit, size in (("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            shown = value / size
            return f"{shown:.0f} {unit}" if shown >= 10 else f"{shown:.1f}".removesuffix(".0") + f" {unit}"
    return f"{value:.0f} B"


def _label_points(axes: Axes, variants: Sequence[Mapping[str, Any]], selected: str | None, palette: Palette) -> None:
    """Names every point where its name hides no other; the chosen one and small files come first."""
    _settle(axes)
    taken = [_box_around(axes.transData.transform((each["gzip_bytes"], each["metric"]))) for each in variants]
    order = sorted(variants, key=lambda each: (each["recipe"] != selected, each["gzip_bytes"]))
    for variant in order:
        for note in _attempts(axes, variant, palette, chosen=variant["recipe"] == selected):
            box = note.get_window_extent()
            box = (box.x0 - 2, box.y0 - 1, box.x1 + 2, box.y1 + 1)
            if _inside(axes, box) and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                break
            note.remove()


Box = tuple[float, float, float, float]


def _attempts(axes: Axes, variant: Mapping[str, Any], palette: Palette, *, chosen: bool) -> Iterator[Any]:
    for x, y in PLACES:
        far = abs(y) > 12
        yield axes.annotate(
            variant["recipe"],
            (variant["gzip_bytes"], variant["metric"]),
            (1.4 * x, 1.4 * y) if chosen else (x, y),  # clear of the ring
            textcoords="offset points",
            ha="left" if x > 0 else "right" if x < 0 else "center",
            va="center" if y == 0 or x != 0 else "bottom" if y > 0 else "top",
            fontsize=9,
            fontweight="bold" if chosen else "normal",
            color=palette.accent if chosen else palette.ink,
            bbox={"facecolor": palette.paper, "edgecolor": "none", "pad": 1},
            arrowprops={"arrowstyle": "-", "color": palette.plain, "linewidth": 0.7, "shrinkB": 4} if far else None,
        )


def _box_around(point: np.ndarray, reach: float = 6) -> Box:
    return (point[0] - reach, point[1] - reach, point[0] + reach, point[1] + reach)


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _settle(axes: Axes) -> None:
    """Lays the figure out, so that extents are known."""
    assert isinstance(axes.figure, Figure), "charts are drawn on whole figures"
    axes.figure.draw_without_rendering()


def _inside(axes: Axes, box: Box) -> bool:
    frame = axes.get_window_extent()
    return box[0] >= frame.x0 - 10 and box[2] <= frame.x1 + 12 and box[1] >= frame.y0 and box[3] <= frame.y1 + 8


def bars(axes: Axes, results: Mapping[str, Any], palette: Palette) -> None:
    """Sizes: the file, and within it what is left after gzip; the share is that of float32's gzip bytes."""
    variants = working(results)[::-1]
    whole = next((each["gzip_bytes"] for each in variants if each["recipe"] == "float32"), None)
    places = range(len(variants))
    chosen = [each["recipe"] == results["selected"] for each in variants]
    colours = [palette.accent if one else palette.plain for one in chosen]
    axes.barh(places, [each["bytes"] for each in variants], color=palette.line, height=0.66)
    axes.barh(places, [each["gzip_bytes"] for each in variants], color=colours, height=0.66)
    words = [_size_words(axes, place, each, whole, palette) for place, each in zip(places, variants, strict=True)]
    axes.set_yticks(places, [each["recipe"] for each in variants])
    _plain(axes, palette)
    for tick, one in zip(axes.get_yticklabels(), chosen, strict=True):
        tick.set_color(palette.accent if one else palette.ink)
        tick.set_fontweight("bold" if one else "normal")
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks([])
    _make_room(axes, [each["bytes"] for each in variants], words)


def _size_words(axes: Axes, place: float, variant: Mapping[str, Any], whole: int | None, palette: Palette) -> Any:
    share = f" · {variant['gzip_bytes'] / whole:.2f}x" if whole else ""
    text = f"{in_short(variant['gzip_bytes'])} of {in_short(variant['bytes'])}{share}"
    at = (variant["bytes"], place)
    return axes.annotate(text, at, (5, 0), textcoords="offset points", va="center", fontsize=9, color=palette.muted)


def _make_room(axes: Axes, lengths: Sequence[int], words: Sequence[Any]) -> None:
    """Shortens the bars until the words behind each fit into the axes."""
    for note in words:
        note.set_in_layout(False)  # else the layout would shrink the axes first
    _settle(axes)
    width = axes.get_window_extent().width
    gap = 12 + 5 * axes.figure.dpi / 72
    needed = [
        length * width / max(width - note.get_window_extent().width - gap, 0.2 * width)
        for length, note in zip(lengths, words, strict=True)
    ]
    axes.set_xlim(0, max(needed))


def curve(axes: Axes, history: Mapping[str, Sequence[float]], name: str, palette: Palette) -> None:
    """One quantity over epochs: training, and validation where it was measured."""
    for key, colour, style in ((name, palette.plain, "--"), (f"val_{name}", palette.accent, "-")):
        if values := history.get(key):
            said = "validation" if key.startswith("val_") else "training"
            axes.plot(range(1, len(values) + 1), values, style, color=colour, linewidth=1.8, label=said)
    _plain(axes, palette)
    axes.grid(axis="y", color=palette.line, linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_title(name, loc="left", fontsize=10, color=palette.ink)
    axes.legend(frameon=False, labelcolor=palette.muted, fontsize=9)
