"""The figures of `scripts.plot`."""

from matplotlib import ticker

from scripts.shared.style import COLOURS, COLUMNS, LINES, NOTES, panels, save

DIAGNOSTICS = {
    "beta": "beta",
    "learning_rate_scale": "learning-rate scale",
    "cosine": "cosine to −gradient",
}
OVER_SEEDS = "mean ± standard deviation over seeds"


def draw_accuracy_batch(summary, look, out, name, title):
    """Top-1 against batch size, a panel for each length of training."""
    sizes = summary.groupby("epochs")["global_batch_size"].nunique()
    # What draw_accuracy_epochs shows and has one batch size needs no panel here.
    others = summary.groupby("global_batch_size")["epochs"].transform("nunique")
    alone = set(summary["epochs"][others == 1])
    lengths = [e for e in sizes.index if sizes[e] > 1 or e in alone]
    if not lengths:
        return
    figure, columns = panels(len(lengths), width=4.6, height=3.6, sharey=True)
    for (axis,), epochs in zip(columns, lengths):
        part = summary[summary["epochs"] == epochs]
        _draw_accuracy(axis, part, "global_batch_size", look, spread=1.04)
        axis.set_xscale("log", base=2)
        _mark_ticks(axis, sorted(part["global_batch_size"].unique()))
        axis.set(xlabel="global batch size (images)", title=f"{epochs} epochs, {title}")
        _draw_best(axis, part)
    columns[0][0].set_ylabel("top-1 accuracy (%)")
    save(figure, [axis for (axis,) in columns], out, name, OVER_SEEDS)


def draw_accuracy_epochs(summary, look, out):
    """Top-1 against the length of training, a panel for each batch size with several."""
    lengths = summary.groupby("global_batch_size")["epochs"].nunique()
    batches = [batch for batch in lengths.index if lengths[batch] > 1]
    if not batches:
        return
    figure, columns = panels(len(batches), width=3.6, height=3.6, sharey=True)
    for (axis,), batch in zip(columns, batches):
        part = summary[summary["global_batch_size"] == batch]
        _draw_accuracy(axis, part, "epochs", look)
        _mark_ticks(axis, sorted(part["epochs"].unique()))
        axis.set(xlabel="length of training (epochs)", title=f"batch {batch:,}")
    columns[0][0].set_ylabel("top-1 accuracy (%)")
    save(figure, [axis for (axis,) in columns], out, "accuracy_epochs", OVER_SEEDS)


def _draw_accuracy(axis, summary, x, look, spread=1.0):
    names = [name for name in look if name in set(summary["optimizer"])]
    for i, name in enumerate(names):
        part = summary[summary["optimizer"] == name].sort_values(x)
        # A little beside each other, so that error bars do not hide one another.
        places = part[x] * spread ** (i - (len(names) - 1) / 2)
        axis.errorbar(
            places,
            100 * part["top1"],
            100 * part["top1_std"],  # none for a single seed
            label=name,
            capsize=2,
            markersize=5,
            linewidth=1.3,
            **look[name],
        )
        lost = part["diverged"] + part["failed"]
        some, every = lost.gt(0) & part["top1"].notna(), lost.gt(0) & part["top1"].isna()
        dots = {**look[name], "linestyle": "none", "markersize": 5, "zorder": 3}
        axis.plot(places[some], 100 * part["top1"][some], **dots, markerfacecolor="white")
        dots.update(marker="x", transform=axis.get_xaxis_transform())
        axis.plot(places[every], [0.03] * every.sum(), **dots)
    lost = summary["diverged"] + summary["failed"]
    if (lost.gt(0) & summary["top1"].notna()).any():
        axis.plot([], [], "ko", markerfacecolor="white", label=NOTES[0])
    if (lost.gt(0) & summary["top1"].isna()).any():
        axis.plot([], [], "kx", label=NOTES[1])
    axis.margins(y=0.1)  # room for these


def _draw_best(axis, summary):
    if summary["top1"].notna().any():
        best = summary.loc[summary["top1"].idxmax()]
        axis.axhline(100 * best["top1"], color="0.4", linestyle=":", linewidth=1, label=NOTES[2])


def draw_curves(curves, look, out):
    """Loss and learning rate over a run, and what NLCG did; a panel for each batch size.

    Args:
        curves: dict from optimizer and batch size to the steps of one run; their `attrs` hold the
            `optimizer` flag, `epochs` and `seed`.
    """
    lengths, seeds = (
        ", ".join(map(str, sorted({steps.attrs[key] for steps in curves.values()})))
        for key in ("epochs", "seed")
    )
    title = f"{lengths} epochs, seed {seeds}"
    if max(map(len, curves.values())) >= 100:
        title += "; running mean over a fiftieth of the run"
    _draw_losses(curves, look, out, title)
    _draw_rates(curves, look, out, title)
    of_nlcg = {key: steps for key, steps in curves.items() if "beta" in steps}
    if of_nlcg:
        _draw_diagnostics(of_nlcg, look, out, title)


def _draw_losses(curves, look, out, title):
    batches = sorted({batch for _, batch in curves})
    for x, label, file in (
        ("update", "update", "loss_step"),
        ("seconds", "time in training (s)", "loss_seconds"),
    ):
        figure, columns = panels(len(batches))
        for (axis,), batch in zip(columns, batches):
            for name, steps in _of(curves, batch):
                note = " (loss without weight decay)" * (steps.attrs["optimizer"] == "lars")
                _draw_line(axis, steps[x], steps["loss"], name + note, look[name], raw=False)
            first = max(steps["loss"].iloc[0] for _, steps in _of(curves, batch))
            _log_axis(axis, 10 * first)
            axis.set(xlabel=label, title=f"batch {batch:,}")
        columns[0][0].set_ylabel("training loss")
        save(figure, [axis for (axis,) in columns], out, file, title)


def _draw_rates(curves, look, out, title):
    batches = sorted({batch for _, batch in curves})
    figure, columns = panels(len(batches))
    for (axis,), batch in zip(columns, batches):
        drawn = []
        for name, steps in _of(curves, batch):
            rate = steps.set_index("update")["learning_rate"]
            # All optimizers share the schedule, unless one was given another.
            if not any(rate.equals(other) for other in drawn):
                label = "learning rate" if not drawn else f"learning rate, {name}"
                axis.plot(rate.index, rate, color="0.5", linewidth=2.5 + len(drawn), label=label)
                drawn.append(rate)
            if "step_size" in steps:
                _draw_line(
                    axis, steps["update"], steps["step_size"], f"step size, {name}", look[name]
                )
        axis.set(xlabel="update", title=f"batch {batch:,}")
    columns[0][0].set_ylabel("rate")
    save(figure, [axis for (axis,) in columns], out, "learning_rate", title)


def _draw_diagnostics(curves, look, out, title):
    batches = sorted({batch for _, batch in curves})
    figure, columns = panels(len(batches), rows=len(DIAGNOSTICS), height=1.7)
    for number, (column, batch) in enumerate(zip(columns, batches)):
        for axis, (key, label) in zip(column, DIAGNOSTICS.items()):
            for name, steps in _of(curves, batch):
                _draw_line(axis, steps["update"], steps[key], name, look[name])
            if number % COLUMNS == 0:
                axis.set_ylabel(label)
        column[0].set_title(f"batch {batch:,}")
        column[-1].set_xlabel("update")
    save(figure, [axis for column in columns for axis in column], out, "diagnostics", title)


def _of(curves, batch):
    return [(name, steps) for (name, other), steps in curves.items() if other == batch]


def _draw_line(axis, x, y, label, look, raw=True):
    """A running mean, before the values themselves in a lighter tone unless not `raw`."""
    smooth = _smooth(y)
    if raw and not smooth.equals(y):
        axis.plot(x, y, color=look["color"], linewidth=0.5, alpha=0.25)
    # Some markers tell lines apart in black and white.
    every = max(1, len(x) // 8)
    axis.plot(x, smooth, label=label, linewidth=1.1, markersize=3.5, markevery=every, **look)
    axis.xaxis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 5, 10]))


def _smooth(values):
    """A running mean over a fiftieth of the run; what is not a number stays so."""
    window = max(1, len(values) // 50)
    return values.rolling(window, min_periods=1).mean().where(values.notna())


def _mark_ticks(axis, values):
    axis.set_xticks(values, [f"{value:,}" for value in values], rotation=45 * (len(values) > 4))
    axis.xaxis.set_minor_locator(ticker.NullLocator())


def _log_axis(axis, highest):
    """A logarithmic axis that ends at `highest`: a divergence must not flatten the others."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    if high > highest:
        axis.set_ylim(low, highest)
    subs = (1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 5, 7)
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=subs))
    axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(ticker.NullLocator())


def draw_schedule(rates, per_epoch, batch, out):
    """The learning rate at each update, `{epochs: rates}`, for several lengths of training."""
    figure, (column,) = panels(1, width=5.6, height=3.2)
    for i, (epochs, values) in enumerate(rates.items()):
        column[0].plot(
            values,
            color=COLOURS[i % len(COLOURS)],
            linestyle=LINES[i % len(LINES)],
            label=f"{epochs} epochs",
        )
    column[0].set(
        xlabel=f"update ({per_epoch:,} in an epoch)",
        ylabel="learning rate",
        title=f"ImageNet, batch {batch:,}",
    )
    above = column[0].secondary_xaxis("top", (lambda x: x / per_epoch, lambda x: x * per_epoch))
    above.set_xlabel("epoch")
    save(figure, column, out, f"schedule_{batch}")
