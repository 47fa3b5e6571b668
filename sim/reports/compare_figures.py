"""Pictures of a comparison: held-out loss against tokens, bytes and time, and against bytes a token.

matplotlib draws them as SVG, which goes into a page as it is: no script, no file beside the page, sharp at any size.
Text stays text, and what is neither line nor point of a recipe takes the page's own text colour (`currentColor`), so
the same picture is readable on a light and on a dark page. What an SVG file needs and a page does not (prolog,
metadata, addresses of name spaces) is taken out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any

from .compare_console import loss_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#010203"  # stands for the page's text colour until the picture is in the page
# Of a lightness between that of a white and of a black page, told apart by most who do not see all colours; and marks.
COLOURS = ("#3f86c6", "#d9782d", "#2f9e74", "#c6548c", "#8b78d0", "#a08a2c", "#3aa6b9", "#858b94")
MARKS = "osD^vPX*"
Curves = Sequence[tuple[str, Sequence[tuple[float, float]], Sequence[Sequence[tuple[float, float]]]]]
_TIMES = (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))


def style(index: int) -> dict[str, Any]:
    """Of the recipe with that number."""
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKS[index % len(MARKS)]}


def figures(found: dict[str, Any]) -> list[tuple[str, str]]:
    """All pictures of `compare.json`: title and SVG element."""
    target, recipes = found["target_loss"], found["recipes"]

    def drawn(title: str, key: Callable[[dict[str, Any], dict[str, Any]], float], label: str, *, log: bool) -> Any:
        curves = [
            (each["name"], _xy(each["curve"], each, key), [_xy(run["curve"], each, key) for run in _single(each)])
            for each in recipes
        ]
        return title, svg(title, lambda axes: loss_curves(axes, curves, label, target, log=log))

    pictures = [
        ("held-out loss against bytes a token", svg("pareto", lambda axes: pareto(axes, _points(found)))),
        drawn("held-out loss against tokens", lambda point, _: point["tokens"] / 1e6, "million tokens", log=False),
        drawn(
            "held-out loss against bytes sent",
            lambda point, _: point["bytes"] / 1e6,
            "MB sent, all boundaries, both ways",
            log=True,
        ),
    ]
    for link in found["links"]:
        slowest = max(recipe["steps"] * recipe["links"][link]["step_s"] for recipe in recipes)
        unit, seconds = next((each for each in _TIMES if slowest >= each[1]), _TIMES[-1])

        def at(point: dict[str, Any], recipe: dict[str, Any], link: str = link, seconds: float = seconds) -> float:
            return point["step"] * recipe["links"][link]["step_s"] / seconds

        pictures.append(drawn(f"held-out loss against time over {link}", at, f"{unit}, simulated", log=True))
    return pictures


def _single(recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs of a recipe, if there is more than their mean to see."""
    return recipe["runs"] if len(recipe["runs"]) > 1 else []


def _xy(
    curve: Sequence[dict[str, Any]], recipe: dict[str, Any], key: Callable[[dict[str, Any], dict[str, Any]], float]
) -> list[tuple[float, float]]:
    return [(key(point, recipe), point["loss"]) for point in curve if point["loss"] is not None]


def _points(found: dict[str, Any]) -> list[tuple[str, float, float, tuple[float, float]]]:
    return [
        (each["name"], each["bytes_per_token"], each["loss"], (min(each["losses"]), max(each["losses"])))
        for each in found["recipes"]
        if each["loss"] is not None and each["bytes_per_token"] is not None
    ]


def loss_curves(axes: Axes, curves: Curves, label: str, target: float | None, *, log: bool) -> None:
    """A line a recipe, the mean of its seeds; a thin one for each seed."""
    for index, (name, mean, each) in enumerate(curves):
        look = style(index)
        if not mean:  # its runs failed
            continue
        for points in each:
            axes.plot([x for x, _ in points], [y for _, y in points], color=look["color"], linewidth=0.7, alpha=0.45)
        axes.plot([x for x, _ in mean], [y for _, y in mean], label=name, linewidth=1.8, markersize=4.5, **look)
    if target is not None:
        axes.axhline(target, color=INK, linestyle=(0, (4, 3)), linewidth=1, label=f"target {loss_text(target)}")
    if log:
        _log(axes)
    else:
        axes.set_xlim(left=0)
    axes.set_xlabel(label)
    axes.set_ylabel("held-out loss")
    axes.grid(True, alpha=0.18)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)


def pareto(axes: Axes, points: Sequence[tuple[str, float, float, tuple[float, float]]]) -> None:
    """A point a recipe: name, bytes a token, loss, and from where to where its bar goes. A line joins those that no
    other one beats in both."""
    best: list[tuple[float, float]] = []
    for _, size, loss, _ in sorted(points, key=lambda point: (point[1], point[2])):
        if not best or loss < best[-1][1]:
            best.append((size, loss))
    axes.plot([x for x, _ in best], [y for _, y in best], color=INK, linewidth=1, alpha=0.35, zorder=1)
    for index, (name, size, loss, (low, high)) in enumerate(points):
        look = style(index)
        axes.errorbar(
            size, loss, yerr=[[loss - low], [high - loss]], capsize=3, markersize=7, linestyle="", zorder=2, **look
        )
        axes.annotate(name, (size, loss), textcoords="offset points", xytext=(8, 5), fontsize=9)
    axes.margins(x=0.18, y=0.15)
    _log(axes)
    axes.set_xlabel("bytes a token, all boundaries, both ways, everything counted")
    axes.set_ylabel("held-out loss")
    axes.grid(True, alpha=0.18)


def _log(axes: Axes) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    at = (1, 2, 3, 5, 7) if high < 20 * low else (1, 2, 5) if high < 500 * low else (1,)
    axes.xaxis.set_major_locator(LogLocator(subs=at))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1000 else f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def svg(name: str, draw: Callable[[Axes], None]) -> str:
    """An element for a page. name: what keeps its inner names apart from those of other pictures there."""
    import matplotlib
    from matplotlib.figure import Figure

    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    settings: dict[Any, Any] = {
        **dict.fromkeys(inked, INK),
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.parse_math": False,  # a dollar in a name is a dollar
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(6.6, 4.1), layout="constrained")
        draw(figure.subplots())
        file = StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_a_page(file.getvalue())


def _for_a_page(text: str) -> str:
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    return text.replace(INK, "currentColor")
