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

    def values(records, name):
        found = [record.get(name) for record in records]
        return [x if type(x) in (int, float) else math.nan for x in found]

    updates = values(steps, "update")
    loss.plot(updates, values(steps, "loss"), lw=0.8, label="update")
    loss.plot(values(epochs, "update"), values(epochs, "loss"), "k-", label="epoch mean")
    loss.set(xlabel="update", ylabel="training loss", yscale="log")
    loss.legend()
    for name, label, style in (
        ("train_top1", "training", "-"),
        ("top1", "test", "-"),
        ("averaged_top1", "test, averaged weights", "--"),
    ):
        tested = [r for r in epochs if name in r]
        percent = [100 * x for x in values(tested, name)]
        accuracy.plot(values(tested, "epoch"), percent, style, label=label)
    accuracy.set(xlabel="epoch", ylabel="top-1 accuracy (%)")
    accuracy.legend(loc="lower right")
    rate.plot(updates, values(steps, "learning_rate"), label="learning rate")
    if steps and "step_size" in steps[0]:
        rate.plot(updates, values(steps, "step_size"), "--", label="step size")
    rate.set(xlabel="update", ylabel="rate")
    rate.legend()
    for axes in (loss, accuracy, rate):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
