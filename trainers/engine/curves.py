"""The picture of one run: loss, accuracy, step size."""

import math


def plot_curves(records, path):
    """Draws loss, accuracy and step size of one run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [r for r in records if r["type"] == "step"]
    epochs = [r for r in records if r["type"] == "epoch"]
    figure, (loss, accuracy, rate) = pyplot.subplots(1, 3, figsize=(13, 3.6))
    number = lambda x: math.nan if x is None else x  # noqa: E731
    loss.plot(
        [r["update"] for r in steps], [number(r["loss"]) for r in steps], lw=0.8, label="update"
    )
    loss.plot(
        [r["update"] for r in epochs], [number(r["loss"]) for r in epochs], "k-", label="epoch mean"
    )
    loss.set(xlabel="update", ylabel="training loss", yscale="log")
    loss.legend()
    for name, label, style in (
        ("train_top1", "training", "-"),
        ("top1", "test", "-"),
        ("averaged_top1", "test, averaged weights", "--"),
    ):
        tested = [r for r in epochs if name in r]
        values = [100 * r[name] for r in tested]
        accuracy.plot([r["epoch"] for r in tested], values, style, label=label)
    accuracy.set(xlabel="epoch", ylabel="top-1 accuracy (%)")
    accuracy.legend(loc="lower right")
    updates = [r["update"] for r in steps]
    rate.plot(updates, [r["learning_rate"] for r in steps], label="learning rate")
    if steps and "step_size" in steps[0]:
        rate.plot(updates, [r["step_size"] for r in steps], "--", label="step size")
    rate.set(xlabel="update", ylabel="rate")
    rate.legend()
    for axes in (loss, accuracy, rate):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
