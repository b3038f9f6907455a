"""The tables of `scripts.plot`: mean and deviation over seeds, and the best learning rates."""

import pandas as pd

from scripts.shared.runs import POINT, STATUSES

PAPER = "factor 1"  # the rate of the paper's schedule


def summarise(runs, keys=(*POINT, "rate")):
    """Mean and sample standard deviation over the finished seeds, and how many runs ended how."""
    keys = list(keys)
    # Runs that never began may not tell their settings.
    runs = runs.dropna(subset=keys).astype({"global_batch_size": int, "epochs": int})
    counts = runs.groupby([*keys, "status"], sort=False).size().unstack(fill_value=0)
    counts = counts.reindex(columns=STATUSES, fill_value=0)
    finished = runs[runs["status"] == "finished"].groupby(keys)
    for column in ("top1", "averaged_top1"):
        counts[column] = finished[column].mean()
        counts[f"{column}_std"] = finished[column].std()
    return counts.reset_index()


def count_once(runs):
    """The runs without those that repeat another, as two sweeps may; those that got furthest stay.

    Of runs that failed for a setting that is no number none is known to repeat another.
    """
    keys = [*POINT, "rate", "seed"]
    order = runs["status"].map(STATUSES.index).sort_values(kind="stable").index
    repeated = runs.loc[order].duplicated(subset=keys) & runs[keys].notna().all(axis=1)
    return runs[~repeated]


def with_common_rate(runs):
    """The runs at one rate, the paper's or else the most frequent, and that rate."""
    rates = runs["rate"]
    rate = PAPER if rates.eq(PAPER).any() or rates.isna().all() else rates.mode()[0]
    return runs[rates == rate], rate


def has_search(runs):
    """Whether runs differ in the learning rate."""
    return runs.dropna(subset=POINT)["rate"].nunique() > 1


def tuned(runs):
    """`summarise` at the best rate of each optimizer, batch size and length.

    Best is the highest mean top-1 over the seeds, of the rates that as many of them finished with
    as with any. Where no run finished there is no rate, and all are counted.
    """
    lines = []
    for _, group in runs.groupby(POINT, sort=False):
        finished = group[group["status"] == "finished"].groupby("rate")["top1"]
        means, counts = finished.mean(), finished.count()
        rate, chosen = None, group
        if len(counts):
            rate = means[counts == counts.max()].idxmax()
            chosen = group[group["rate"] == rate]
        lines.append(summarise(chosen, POINT).assign(rate=rate))
    return pd.concat(lines, ignore_index=True)


def table(runs):
    """The text of table.md."""
    lines = ["# Top-1 accuracy on the test images", ""]
    lines += [
        "Mean ± sample standard deviation over the seeds that finished, in %; n seeds. Diverged: "
        "the loss in training or testing was not finite; however large, a finite one is in the "
        "mean.",
        "",
    ]
    common, rate = with_common_rate(runs)
    common = summarise(common)
    for epochs in sorted(common["epochs"].unique()):
        title = f"{epochs} epochs, {rate_title(rate)}"
        lines += _tables(common[common["epochs"] == epochs], title)
    if has_search(runs):
        best = tuned(runs)
        rates = ", ".join(sorted(runs["rate"].dropna().unique(), key=_in_order))
        lines += [
            "The learning rate, a factor on the schedule's or its peak, is the one with the "
            "highest mean top-1, on the test images, of those that the most seeds finished with. "
            f"Rates: {rates}.",
            "",
        ]
        for epochs in sorted(best["epochs"].unique()):
            lines += _tables(best[best["epochs"] == epochs], f"{epochs} epochs, tuned", True)
    others = runs[runs["status"] != "finished"]
    if len(others):
        lines += ["## Runs without a result", "", "| run | status | exit status |", "|---|---|---|"]
        for _, run in others.iterrows():
            code = "" if pd.isna(run["exit_status"]) else f"{run['exit_status']:.0f}"
            lines.append(f"| {run['run']} | {run['status']} | {code} |")
        lines.append("")
    revisions = sorted(runs["git_revision"].dropna().unique())
    lines += [f"Revisions of the code: {', '.join(revisions) or 'unknown'}.", ""]
    return "\n".join(lines)


def rate_title(rate):
    return "one schedule for all" + (f", {rate}" if rate != PAPER else "")


def _in_order(rate):
    kind, number = rate.split()
    return kind, float(number)


def _tables(summary, title, with_rate_named=False):
    lines = []
    for column, what in (("top1", "weights"), ("averaged_top1", "averaged weights")):
        names = list(summary["optimizer"].unique())
        heads = [name.replace("|", "\\|") for name in names]
        lines += [f"## {title}: {what}", "", f"| global batch | {' | '.join(heads)} |"]
        lines.append("|---" * (1 + len(names)) + "|")
        for batch in sorted(summary["global_batch_size"].unique()):
            row = summary[summary["global_batch_size"] == batch].set_index("optimizer")
            cells = [
                _cell(row.loc[name], column, with_rate_named) if name in row.index else ""
                for name in names
            ]
            lines.append(f"| {batch:,} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def _cell(line, column, with_rate_named):
    parts = ["no result"]
    if line["finished"]:
        spread = line[f"{column}_std"]
        spread = "" if pd.isna(spread) else f" ± {100 * spread:.1f}"
        parts = [f"{100 * line[column]:.1f}{spread} (n = {line['finished']:.0f})"]
        if with_rate_named:
            parts.append(line["rate"])
    return ", ".join(parts + [f"{line[s]:.0f} {s}" for s in STATUSES[1:] if line[s]])
