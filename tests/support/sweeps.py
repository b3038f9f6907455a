"""Definitions of sweeps that several test files share."""

import yaml

from tests.support.launch import PYTHON

SWEEP = [*PYTHON, "-m", "scripts.sweep"]
DEFINITION = {
    "flags": {"dataset": "digits", "epochs": 10},
    "optimizers": {
        "NLCG-FR": {
            "optimizer": "nlcg",
            "update_rule": "fletcher_reeves",
            "preconditioner": "bfgs",
            "nesterov": False,
        },
        "Momentum": {"optimizer": "momentum"},
    },
    "grid": [
        {"global_batch_size": [128, 512], "seed": [0, 1]},
        {"global_batch_size": 128, "learning_rate_factor": [0.25, 4], "seed": 0},
    ],
}


def write(folder, definition):
    path = folder / "definition.yaml"
    path.write_text(yaml.safe_dump(definition, sort_keys=False))
    return f"--config={path}"
