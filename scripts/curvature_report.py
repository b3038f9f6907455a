"""The table and the figures of study_curvature.py, made from the records of its runs."""

import math

import numpy as np

POINTS = 50  # of a curve, besides the one before the first update
SEARCH_SEEDS = (0, 1)
TOLERANCE = 1.1  # final losses up to this times the best count as good
# Label, colour of Okabe and Ito (for colour-blind readers), line, marker.
STYLES = {
    "nlcg": ("NLCG", "#D55E00", "-", "o"),
    "nlcg-rms": ("NLCG, RMS", "#E69F00", "-", "s"),
    "nlcg-noprec": ("NLCG, no preconditioner", "#E69F00", "--", "^"),
    "nlcg-fr": ("NLCG-FR, as published", "#0072B2", "-", "o"),
    "nlcg-fr-noprec": ("NLCG-FR, h = 1", "#56B4E9", "-", "^"),
    "nlcg-pr": ("NLCG-PR, as published", "#0072B2", "--", "o"),
    "nlcg-pr-noprec": ("NLCG-PR, h = 1", "#56B4E9", "--", "^"),
    "momentum": ("Momentum", "black", "-", "D"),
    "nesterov": ("Nesterov", "#888888", "-.", "P"),
    "adam": ("Adam", "#009E73", "-", "X"),
    "lbfgs": ("L-BFGS", "#CC79A7", "-", "*"),
}
TITLES = {
    "autoencoder": "autoencoder, full batch",
    "autoencoder_256": "autoencoder, batch 256",
    "poisson": "PINN, Poisson, full batch",
    "burgers": "PINN, Burgers, full batch",
    "resnet_plain": "ResNet-8 without batch norm, batch 128",
    "adding": "tanh RNN, adding problem, batch 100",
}


def final_loss(record):
    """Infinite where a run ended without a finite one."""
    return math.inf if record["final_loss"] is None else record["final_loss"]


def worst_runs(search):
    """The run with the highest final loss of each rate, in the order of the rates."""
    rates = sorted({record["rate"] for record in search})
    return [
        max((r for r in search if r["rate"] == rate), key=lambda r: (r["diverged"], final_loss(r)))
        for rate in rates
    ]


def best_rate(search):
    """The rate whose worst run is best: one that works for one seed alone is not chosen."""
    best = min(worst_runs(search), key=lambda record: (record["diverged"], final_loss(record)))
    return best["rate"]


def quartiles(values):
    """Lower quartile, median (of two in the middle the upper one) and upper quartile.

    They are values that occurred, so infinity may be one.
    """
    values = np.sort(np.asarray(values, float))
    low, high = np.quantile(values, [0.25, 0.75], method="inverted_cdf")
    return [float(low), float(values[len(values) // 2]), float(high)]


def first_reach(record, target):
    """(updates, seconds) at the first point of the curve with that loss or less, or infinities."""
    curve = record["curve"]
    for updates, seconds, loss in zip(curve["updates"], curve["seconds"], curve["loss"]):
        if loss is not None and loss <= target:
            return updates, seconds
    return math.inf, math.inf


def rate_range(search):
    """How freely the rate may be chosen, from the runs of the search.

    Returns:
        Lowest and highest of the neighbouring rates around the best one whose final loss is at
        most `TOLERANCE` times the best, and whether the range ends with the grid, so that it may
        be wider.
    """
    worst = worst_runs(search)
    rates = [r["rate"] for r in worst]
    losses = [math.nan if r["diverged"] else final_loss(r) for r in worst]
    low = high = rates.index(best_rate(search))
    limit = TOLERANCE * losses[low]
    while low > 0 and losses[low - 1] <= limit:
        low -= 1
    while high < len(rates) - 1 and losses[high + 1] <= limit:
        high += 1
    return rates[low], rates[high], low == 0 or high == len(rates) - 1


def resample(record, axis, grid):
    """The curve's loss at some values of "updates" or "seconds": that of the last point before."""
    losses = [math.inf if loss is None else loss for loss in record["curve"]["loss"]]
    places = np.searchsorted(record["curve"][axis], grid, side="right") - 1
    return np.array(losses)[places]


def by_optimizer(records, problem):
    """name -> (runs of the search, runs with the best rate), in the order of `STYLES`."""
    groups = {}
    for name in STYLES:
        runs = [r for r in records if r["problem"] == problem and r["optimizer"] == name]
        if runs:
            search = [r for r in runs if name != "lbfgs" and r["seed"] in SEARCH_SEEDS]
            groups[name] = search, [r for r in runs if r not in search]
    return groups


def target_loss(groups):
    """The median final loss of Adam, or `None` without Adam or where its median run diverged."""
    if "adam" not in groups:
        return None
    target = quartiles([final_loss(record) for record in groups["adam"][1]])[1]
    return target if math.isfinite(target) else None


def _show(values, digits=3):
    low, median, high = (f"{x:.{digits}g}" if math.isfinite(x) else "∞" for x in quartiles(values))
    return median if low == median == high else f"{median} ({low} to {high})"


def _row(name, search, runs, target):
    rates, allowed = "", ""
    if search:
        grid = sorted(record["rate"] for record in search)
        rate = best_rate(search)
        rates = f"{rate:g}" + ("*" if len(grid) > 1 and rate in (grid[0], grid[-1]) else "")
        low, high, is_cut = rate_range(search)
        # Rates are rounded halves of decades: 3.2 = 10^(1/2).
        width = 10 ** (round(2 * math.log10(high / low)) / 2)
        allowed = f"{'≥ ' if is_cut else ''}{width:.2g}"
        if all(record["diverged"] for record in worst_runs(search)):
            allowed = "none"
    reached = ["", "", ""]
    if target is not None:
        updates, seconds = zip(*(first_reach(record, target) for record in runs))
        count = sum(map(math.isfinite, updates))
        reached = [_show(updates, 5), _show(seconds), f"{count}/{len(runs)}"]
    errors = [math.inf if r["error"] is None else r["error"] for r in runs]
    shown = {}
    for column, key in (("h", "median_h"), ("cosine", "cosine")):
        values = [r["diagnostics"].get(key) for r in runs]
        shown[column] = "" if None in values else f"{quartiles(values)[1]:.2g}"
    diverged = [f"{sum(r['diverged'] for r in part)}/{len(part)}" for part in (search, runs)]
    return {
        "optimizer": STYLES[name][0],
        "rate": rates,
        "final loss": _show([final_loss(record) for record in runs]),
        "relative error": _show(errors) if any(map(math.isfinite, errors)) else "",
        "updates to target": reached[0],
        "seconds to target": reached[1],
        "reached": reached[2],
        "updates done": f"{quartiles([r['curve']['updates'][-1] for r in runs])[1]:,.0f}",
        "seconds of a run": _show([record["seconds"] for record in runs]),
        "range of rates": allowed,
        "diverged, search": diverged[0] if search else "",
        "diverged": diverged[1],
        **shown,
    }


def table(records, made):
    """The text of table.md; `made` says how and where the records were."""
    lines = [
        "# Where curvature matters",
        "",
        f"`{made['command']}`, revision {made['revision']}, {made['processor']}, {made['cores']} "
        "cores, one thread a process. Median (and quartiles) over the seeds with the best rate; ∞: "
        "never reached, or not finite.",
        "",
        "- rate: the one of the search whose worse run ends lowest; *: at an end of its grid.",
        "- final loss: after the last update, over all data; for the autoencoders above the "
        "entropy of the pixels, the least there can be.",
        "- target: the median final loss of Adam. Reached: by how many runs. Curves have "
        f"{POINTS} points.",
        "- updates done: fewer than allowed where L-BFGS finds no lower loss any more.",
        f"- range of rates: highest over lowest of the neighbouring rates with a final loss within "
        f"{TOLERANCE - 1:.0%} of the best (the worse of two seeds); ≥: cut by the end of the grid.",
        "- h, cosine: median of the preconditioner over the parameters, and of the angle between "
        "direction and negative gradient, after the last update.",
        "- diverged: final loss above the initial one, or not finite.",
    ]
    for problem in TITLES:
        groups = by_optimizer(records, problem)
        if not groups:
            continue
        target = target_loss(groups)
        rows = [_row(name, *group, target) for name, group in groups.items()]
        # No column that is empty for this problem.
        columns = [column for column in rows[0] if any(row[column] for row in rows)]
        goal = "no target" if target is None else f"target loss {target:.4g}"
        updates = next(iter(groups.values()))[1][0]["updates"]
        lines += ["", f"## {TITLES[problem]}", "", f"{updates:,} updates a run, {goal}.", ""]
        lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(row[name] for name in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _panels(records, ylabel, xlabel):
    from matplotlib import pyplot

    problems = [name for name in TITLES if by_optimizer(records, name)]
    rows = math.ceil(len(problems) / 2)
    figure, axes = pyplot.subplots(
        rows, min(2, len(problems)), figsize=(11, 3.6 * rows + 1.2), squeeze=False
    )
    for axis in axes.flat[len(problems) :]:
        axis.set_axis_off()
    for axis, problem in zip(axes.flat, problems):
        axis.set_title(TITLES[problem], fontsize=11)
        axis.set_yscale("log")
        axis.set(xlabel=xlabel, ylabel=ylabel)
        axis.grid(alpha=0.3)
    return figure, dict(zip(problems, axes.flat))


def _save(figure, panels, paths):
    from matplotlib import pyplot

    handles = {}
    for axis in panels.values():
        handles |= {label: line for line, label in zip(*axis.get_legend_handles_labels())}
    labels = [style[0] for style in STYLES.values() if style[0] in handles]
    figure.tight_layout(rect=(0, 1.1 / figure.get_figheight(), 1, 1))
    figure.legend(
        [handles[label] for label in labels],
        labels,
        loc="lower center",
        ncols=3,
        fontsize=10,
        handlelength=3.5,
        frameon=False,
    )
    for path in paths:
        figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _line_style(name):
    label, colour, line, marker = STYLES[name]
    return {"color": colour, "linestyle": line, "marker": marker, "label": label, "markersize": 5}


def plot_losses(records, axis, paths):
    """Loss against "updates" or "seconds": a panel a problem, median and quartiles over seeds."""
    xlabel = {"updates": "updates (gradient evaluations)", "seconds": "seconds"}[axis]
    figure, panels = _panels(records, "loss", xlabel)
    for problem, panel in panels.items():
        initial = 0.0
        for i, (name, (_, runs)) in enumerate(by_optimizer(records, problem).items()):
            end = quartiles([record["curve"][axis][-1] for record in runs])[1]
            grid = np.linspace(0, runs[0]["updates"] if axis == "updates" else end, POINTS + 1)
            losses = np.array([resample(record, axis, grid) for record in runs])
            initial = max(initial, np.median(losses[:, 0]))
            low, median, high = np.quantile(losses, [0.25, 0.5, 0.75], 0, method="inverted_cdf")
            style = _line_style(name)
            panel.plot(grid, median, markevery=(i % 9, 9), linewidth=1.4, **style)
            panel.fill_between(grid, low, high, color=style["color"], alpha=0.13, linewidth=0)
        panel.set_ylim(top=1.5 * initial)
        panel.set_xlim(left=0)
    _save(figure, panels, paths)


def plot_sensitivity(records, paths):
    """Final loss of the search's worse run against the rate; x: diverged; dotted: initial loss."""
    figure, panels = _panels(records, "final loss, worse of two seeds", "learning rate")
    for problem, panel in panels.items():
        groups = by_optimizer(records, problem)
        starts = [r["curve"]["loss"][0] for search, _ in groups.values() for r in search]
        initial = max(starts, default=1.0)
        for name, (search, _) in groups.items():
            if not search:
                continue
            worst = worst_runs(search)
            rates = np.array([record["rate"] for record in worst])
            losses = np.array([min(final_loss(record), 1.5 * initial) for record in worst])
            lost = np.array([record["diverged"] for record in worst], bool)
            style = _line_style(name)
            panel.plot(rates, losses, linewidth=1.4, markevery=np.flatnonzero(~lost), **style)
            panel.plot(rates[lost], losses[lost], "x", color=style["color"], markersize=6)
        panel.set_xscale("log")
        panel.set_ylim(top=2 * initial)
        panel.axhline(initial, color="black", linewidth=0.8, linestyle=":")
    _save(figure, panels, paths)


def plot_win_loss(records, paths):
    """Each optimizer's final loss over NLCG's: a row a problem, median and quartiles over seeds."""
    from matplotlib import pyplot

    problems = [name for name in TITLES if "nlcg" in by_optimizer(records, name)]
    figure, axis = pyplot.subplots(figsize=(7, 0.75 * len(problems) + 1.5))
    handles = {}
    for row, problem in enumerate(problems):
        groups = by_optimizer(records, problem)
        unit = quartiles([final_loss(record) for record in groups["nlcg"][1]])[1]
        for i, (name, (_, runs)) in enumerate(groups.items()):
            ratios = np.array(quartiles([final_loss(record) for record in runs])) / unit
            ratios = np.minimum(ratios, 1000)  # and those of diverged runs
            place = row + 0.6 * ((i + 0.5) / len(groups) - 0.5)
            label, colour, _, marker = STYLES[name]
            axis.plot(ratios[[0, 2]], [place, place], color=colour, linewidth=1.5)
            (handles[name],) = axis.plot(
                ratios[1], place, marker, color=colour, label=label, markersize=6, linestyle=""
            )
    axis.axvline(1, color="#D55E00", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_yticks(range(len(problems)), [TITLES[name] for name in problems], fontsize=10)
    axis.invert_yaxis()
    axis.set_xlabel("final loss over NLCG's; right of the line NLCG ends lower", fontsize=9)
    axis.grid(axis="x", alpha=0.3)
    figure.tight_layout(rect=(0, 0.6 / figure.get_figheight(), 1, 1))
    shown = [handles[name] for name in STYLES if name in handles]
    figure.legend(handles=shown, loc="lower center", ncols=3, fontsize=10, frameon=False)
    for path in paths:
        figure.savefig(path, dpi=150)
    pyplot.close(figure)


def write_report(folder, records, made):
    """Writes table.md and the figures: loss_updates, loss_seconds, sensitivity, win_loss."""
    import matplotlib

    matplotlib.use("Agg")
    (folder / "table.md").write_text(table(records, made))
    updates_paths = [folder / "loss_updates.png", folder / "loss_updates.svg"]
    plot_losses(records, "updates", updates_paths)
    plot_losses(records, "seconds", [folder / "loss_seconds.png"])
    plot_sensitivity(records, [folder / "sensitivity.png"])
    if any(record["optimizer"] == "nlcg" for record in records):
        plot_win_loss(records, [folder / "win_loss.png"])
    print(f"written to {folder}: table.md, {', '.join(p.name for p in folder.glob('*.png'))}")
