"""Writes configs/imagenet and configs/cifar100: `python -m configs.generate`.

One flagfile for each point of the paper's figures.
"""

import pathlib

from trainers.optimizers.choice import flags_of

MARK = "# Written by configs/generate.py."
FOLDER = pathlib.Path(__file__).parent
OPTIMIZERS = {
    "nlcg_fr": "NLCG, Fletcher-Reeves",
    "nlcg_pr": "NLCG, Polak-Ribiere",
    "momentum": "Momentum 0.9",
    "rmsprop": "RMSProp, decay 0.9, momentum 0.9, epsilon 1.0",
    "sgd": "SGD",
}

# The paper trains 90 epochs at every batch size, and longer at the two largest.
IMAGENET_EPOCHS = {batch: [90] for batch in (512, 1024, 2048, 4096, 8192, 16384, 32768)}
IMAGENET_EPOCHS.update({65536: [90, 150, 180], 98304: [90, 180, 270]})
# What the paper's text and the authors' table say; no other figure is known to us.
IMAGENET_EXPECTED = {
    ("nlcg_fr", 1024, 90): "76.9 % top-1 in the paper, the best of all.",
    ("nlcg_fr", 65536, 90): "10.3 points of top-1 more than Momentum in the paper.",
    ("nlcg_fr", 98304, 90): "19.5 points of top-1 more than Momentum in the paper.",
}
IMAGENET_GPUS = 64
IMAGENET_MICRO_BATCH = 64

CIFAR_EPOCHS = {batch: [200] for batch in (128, 256, 512, 1024, 2048, 4096, 8192, 16384)}
CIFAR_EPOCHS[16384] = [200, 300, 400, 500]
# Top-1 in %, in the table of the authors' released code, at 200 epochs; "NLCG" there.
CIFAR_EXPECTED = {
    "nlcg_fr": dict(zip(CIFAR_EPOCHS, (66.2, 68.4, 67.4, 65.4, 63.9, 64.5, 67.0, 56.0))),
    "rmsprop": dict(zip(CIFAR_EPOCHS, (64.9, 65.1, 64.8, 64.7, 64.5, 65.3, 66.0, 37.0))),
    "momentum": dict(zip(CIFAR_EPOCHS, (64.6, 64.9, 65.0, 65.0, 64.9, 65.2, 66.0, 37.0))),
    "sgd": dict(zip(CIFAR_EPOCHS, (63.7, 63.8, 63.5, 63.5, 63.1, 61.8, 55.0, 35.0))),
}
CIFAR_MICRO_BATCH = 1024


def flag_lines(optimizer):
    """The flags of an optimizer, each as a line of a flagfile."""
    return [
        f"--no{name}" if value is False else f"--{name}={value}"
        for name, value in flags_of(optimizer).items()
    ]


def imagenet(name, optimizer, batch, epochs):
    """The text of one flagfile for ImageNet."""
    title, flags = OPTIMIZERS[optimizer], flag_lines(optimizer)
    per_worker = min(IMAGENET_MICRO_BATCH, batch // IMAGENET_GPUS)
    expected = IMAGENET_EXPECTED.get((optimizer, batch, epochs), "see the paper's figures.")
    return f"""\
{MARK}
# ResNet-50 on ImageNet: {title}, batch {batch:,}, {epochs} epochs.
# Source: arXiv 1812.02886, Figures 2 to 6; --model=v2 for ResNet-50 v2.
# Launch on {IMAGENET_GPUS} GPUs: scripts/launch_horovodrun.sh -H host1:8,...,host8:8 -- \\
#   python -m trainers.imagenet --flagfile={name} --data_dir=DIR
# Launch on 1 GPU: python -m trainers.imagenet --flagfile={name} \\
#   --per_worker_batch_size={IMAGENET_MICRO_BATCH} --data_dir=DIR
# Expected: {expected}
--dataset=imagenet2012
--model=v1
--image_size=299
{chr(10).join(flags)}
--line_search=online
--global_batch_size={batch}
--per_worker_batch_size={per_worker}
--epochs={epochs}
--weight_decay=0.0001
"""


def cifar100(name, optimizer, batch, epochs):
    """The text of one flagfile for CIFAR-100."""
    title, flags = OPTIMIZERS[optimizer], flag_lines(optimizer)
    expected = "see the paper's figures."
    if epochs == 200 and optimizer in CIFAR_EXPECTED:
        expected = f"{CIFAR_EXPECTED[optimizer][batch]} % top-1, says the authors' table."
    return f"""\
{MARK}
# ResNet-32 on CIFAR-100: {title}, batch {batch:,}, {epochs} epochs.
# Source: arXiv 1812.02886, Figures 7 and 8: seeds 0 to 4 (--seed), mean and standard deviation.
# Launch on 1 GPU: python -m trainers.cifar --flagfile={name} --data_dir=DIR
# Launch on 4 GPUs: scripts/launch_horovodrun.sh -n 4 -- python -m trainers.cifar \\
#   --flagfile={name} --per_worker_batch_size={min(CIFAR_MICRO_BATCH, batch // 4)} --data_dir=DIR
# Expected: {expected}
--dataset=cifar100
--depth=32
{chr(10).join(flags)}
--line_search=auto
--global_batch_size={batch}
--per_worker_batch_size={min(CIFAR_MICRO_BATCH, batch)}
--epochs={epochs}
--weight_decay=0.0001
"""


def configs():
    """`{path under configs/: text}` of all flagfiles."""
    sets = (
        ("imagenet", imagenet, [name for name in OPTIMIZERS if name != "sgd"], IMAGENET_EPOCHS),
        ("cifar100", cifar100, list(OPTIMIZERS), CIFAR_EPOCHS),
    )
    found = {}
    for folder, text, optimizers, points in sets:
        for optimizer in optimizers:
            for batch, lengths in points.items():
                for epochs in lengths:
                    path = f"{folder}/{optimizer}-{batch}-{epochs}.cfg"
                    found[path] = text(f"configs/{path}", optimizer, batch, epochs)
    return found


def write(folder):
    """Writes them below a folder; of the others there, those that this once wrote go."""
    for old in folder.glob("*/*.cfg"):
        if old.read_text().startswith(MARK):
            old.unlink()
    for path, text in configs().items():
        if (folder / path).exists():
            raise SystemExit(f"error: {folder / path} is not of this program: rename it")
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)


def main():
    write(FOLDER)
    print(f"{len(configs())} files in {FOLDER}")


if __name__ == "__main__":
    main()
