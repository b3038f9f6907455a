"""Writes configs/imagenet: `python -m scripts.make_configs`. One flagfile for each point."""

import pathlib

FOLDER = pathlib.Path(__file__).parents[1] / "configs" / "imagenet"
# The paper trains 90 epochs at every batch size, and longer at the two largest.
EPOCHS = {batch: [90] for batch in (512, 1024, 2048, 4096, 8192, 16384, 32768)}
EPOCHS.update({65536: [90, 150, 180], 98304: [90, 180, 270]})
OPTIMIZERS = {
    "nlcg_fr": ("NLCG, Fletcher-Reeves", ["--optimizer=nlcg", "--update_rule=fletcher_reeves"]),
    "nlcg_pr": ("NLCG, Polak-Ribiere", ["--optimizer=nlcg", "--update_rule=polak_ribiere"]),
    "momentum": ("Momentum 0.9", ["--optimizer=momentum"]),
    "rmsprop": ("RMSProp, decay 0.9, momentum 0.9, epsilon 1.0", ["--optimizer=rmsprop"]),
}
# What the paper's text and the authors' table say; no other figure is known to us.
EXPECTED = {
    ("nlcg_fr", 1024, 90): "76.9 % top-1 in the paper, the best of all.",
    ("nlcg_fr", 65536, 90): "10.3 points of top-1 more than Momentum in the paper.",
    ("nlcg_fr", 98304, 90): "19.5 points of top-1 more than Momentum in the paper.",
}
GPUS = 64
LARGEST_MICRO_BATCH = 64


def config(optimizer, batch, epochs):
    """The text of one flagfile."""
    title, flags = OPTIMIZERS[optimizer]
    per_worker = min(LARGEST_MICRO_BATCH, batch // GPUS)
    name = f"configs/imagenet/{optimizer}-{batch}-{epochs}.cfg"
    expected = EXPECTED.get((optimizer, batch, epochs), "see the paper's figures.")
    return f"""\
# ResNet-50 on ImageNet: {title}, batch {batch:,}, {epochs} epochs.
# Source: arXiv 1812.02886, Figures 2 to 6; --model=v2 for ResNet-50 v2.
# Launch on {GPUS} GPUs: scripts/launch_horovodrun.sh -H host1:8,...,host8:8 -- \\
#   python -m trainers.imagenet --flagfile={name} --data_dir=DIR
# Launch on 1 GPU: python -m trainers.imagenet --flagfile={name} \\
#   --per_worker_batch_size={LARGEST_MICRO_BATCH} --data_dir=DIR
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


def configs():
    """`{name: text}` of all flagfiles."""
    return {
        f"{optimizer}-{batch}-{epochs}.cfg": config(optimizer, batch, epochs)
        for optimizer in OPTIMIZERS
        for batch, lengths in EPOCHS.items()
        for epochs in lengths
    }


def main():
    FOLDER.mkdir(parents=True, exist_ok=True)
    for old in FOLDER.glob("*.cfg"):
        old.unlink()
    for name, text in configs().items():
        (FOLDER / name).write_text(text)
    print(f"{len(configs())} files in {FOLDER}")


if __name__ == "__main__":
    main()
