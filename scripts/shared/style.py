"""How all figures look: readable in print, and by colour-blind readers."""

from matplotlib import pyplot

from trainers.optimizers.choice import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    OPTIMIZERS,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
)

# For what is no optimizer of the table, such as one with a flag changed.
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK, GREY)
MARKERS = "os^Dv<>XP*dhp"
LINES = ((0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (3, 1)))
COLUMNS = 4
NOTES = ("some without result", "all without result", "best of all")  # last in a legend
pyplot.rcParams.update(
    {"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False}
)


def look(choice):
    """Colour, marker and line of a `Choice`, as Matplotlib names them."""
    return {"color": choice.colour, "marker": choice.marker, "linestyle": choice.line}


def styles(names):
    """Colour, marker and line of each optimizer by its title: the same in all figures."""
    known = {choice.title: choice for choice in OPTIMIZERS.values()}
    others = [name for name in names if name not in known]
    looks = {name: look(known[name]) for name in names if name in known}
    for i, name in enumerate(others):
        looks[name] = {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": LINES[i % len(LINES)],
        }
    return {name: looks[name] for name in names}


def panels(count, rows=1, width=3.0, height=2.6, across=COLUMNS, **arguments):
    """A figure with `count` columns of `rows` panels, at most `across` beside each other.

    Returns:
        `(figure, panels)`, the panels as a list of columns.
    """
    across = min(count, across)
    down = -(-count // across)
    size = (max(5.2, 0.6 + width * across), 0.8 + height * rows * down)
    figure, axes = pyplot.subplots(
        rows * down, across, figsize=size, squeeze=False, layout="constrained", **arguments
    )
    columns = [
        [axes[rows * d + r, a] for r in range(rows)] for d in range(down) for a in range(across)
    ]
    for column in columns[count:]:
        for axis in column:
            axis.remove()
    return figure, columns[:count]


def save(figure, axes, out, name, title=None):
    """Writes a figure with one legend for all its panels."""
    figure.suptitle(title, fontsize="medium")
    handles = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    handles = dict(sorted(handles.items(), key=lambda item: item[0] in NOTES))
    width = 0.5 + 0.062 * max(map(len, handles), default=0)  # inches of a label
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=max(1, min(len(handles), int(figure.get_figwidth() / width))),
    )
    for suffix in ("png", "svg"):
        figure.savefig(out / f"{name}.{suffix}", dpi=150)
    pyplot.close(figure)
    print(f"{out / name}.png, .svg")
