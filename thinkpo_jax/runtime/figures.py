"""Matplotlib helpers for the plots of reports and data cards."""

from io import BytesIO

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from thinkpo_jax.runtime.integers import ceil_div

CHOSEN_COLOR, REJECTED_COLOR, MARGIN_COLOR = "#5B3FD6", "#882255", "#333333"  # never the color of a model


def figure_to_png(figure: Figure) -> bytes:
    """Returns a figure as a PNG file."""
    figure.savefig(buffer := BytesIO(), format="png", dpi=130)
    return buffer.getvalue()


def subplots(count: int, title: str) -> tuple[Figure, list[Axes]]:
    """Returns a figure with `count` panels, up to three in a row."""
    columns, rows = min(count, 3), ceil_div(count, 3)
    figure = Figure(figsize=(max(5.6, 4.6 * columns), 3.9 * rows), layout="constrained")
    figure.suptitle(title)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in panels[count:]:
        unused.remove()
    return figure, panels[:count]


def label_axes(ax: Axes, title: str, x: str, y: str) -> None:
    """Sets the title and the labels of a panel, and its grid."""
    ax.set_title(title, fontsize=10)
    ax.set(xlabel=x, ylabel=y, axisbelow=True)
    ax.grid(color="#E4E4E4", linewidth=0.7)
    ax.spines[["top", "right"]].set_visible(False)


def draw_legend(ax: Axes) -> None:
    """Draws the legend below a panel."""
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=3, frameon=False, fontsize=8.5)
