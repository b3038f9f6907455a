"""The table of the study, and its whole report, made from the records of its runs."""

import math

import pandas as pd

from scripts.curvature import figures
from scripts.curvature.ablation import KNOWN
from scripts.curvature.statistics import (
    POINTS,
    TITLES,
    TOLERANCE,
    best_rate,
    by_optimizer,
    final_loss,
    first_reach,
    quartiles,
    rate_range,
    target_loss,
    worst_runs,
)
from trainers.engine.files import write


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
        "optimizer": KNOWN[name].title,
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
        f"core{'s' * (made['cores'] != 1)}, one thread a process. Median (and "
        "quartiles) over the seeds with the best rate; ∞: never reached, or not finite.",
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


def write_report(folder, records, made):
    """Writes table.md, runs.csv (a line a run) and the figures."""
    (folder / "table.md").write_text(table(records, made))
    columns = ["problem", "optimizer", "updates", "rate", "seed", "final_loss", "diverged"]
    columns += ["error", "seconds", "revision"]
    write(folder / "runs.csv", pd.DataFrame(records, columns=columns).to_csv(index=False))
    figures.draw_losses(records, "updates", folder)
    figures.draw_losses(records, "seconds", folder)
    figures.draw_sensitivity(records, folder)
    if any(record["optimizer"] == "nlcg" for record in records):
        figures.draw_win_loss(records, folder)
    print(f"{folder / 'table.md'}")
