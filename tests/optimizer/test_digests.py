"""The bits of the reference update, which no rebuilding of the house may change.

Trained in float64 and rounded to float32 before they are digested, so that the last bits of a sum,
which differ between processors, do not matter. `python -m tests.optimizer.test_digests` prints
digests.json anew, for a change of the algorithm that is meant.
"""

import hashlib
import itertools
import json
import pathlib

import keras
import numpy as np
import pytest

from nlcg_tf import NLCG

DIGESTS = pathlib.Path(__file__).with_name("digests.json")
SHAPES = [(3, 4), (5,), (), (7, 2, 2)]
UPDATES = 20
RULES = ("fletcher_reeves", "polak_ribiere", "blended")
PRECONDITIONERS = (None, "bfgs", "normalized_bfgs")
LINE_SEARCHES = (None, "online", "step")
FORMS = {}
for (i, rule), (j, preconditioner), nesterov in itertools.product(
    enumerate(RULES), enumerate(PRECONDITIONERS), (False, True)
):
    lars = 0.1 if j % 2 and nesterov else None
    form = (rule, preconditioner, LINE_SEARCHES[(8 * i + 2 * j + nesterov) % 3], nesterov, lars)
    FORMS["-".join(map(str, form))] = form


def digest(rule, preconditioner, line_search, nesterov, lars):
    """SHA-256 of the weights after 20 updates on a noisy quadratic."""
    keras.config.set_floatx("float64")
    rng = np.random.default_rng(5)
    variables = [keras.Variable(rng.normal(size=shape), dtype="float64") for shape in SHAPES]
    scales = [rng.uniform(0.5, 5, size=shape) for shape in SHAPES]
    optimizer = NLCG(
        0.05,
        rule,
        preconditioner,
        line_search,
        nesterov,
        lars_coefficient=lars,
        weight_decay=0.01,
        fused=False,
    )
    for _ in range(UPDATES):
        weights = [v.numpy() for v in variables]
        loss = sum(np.sum(s * w**2) for s, w in zip(scales, weights)) / 2
        optimizer.observe_loss(loss * (1 + 0.02 * rng.normal()))
        gradients = [s * w + 0.05 * rng.normal(size=w.shape) for s, w in zip(scales, weights)]
        optimizer.apply([keras.ops.convert_to_tensor(g) for g in gradients], variables)
    return hashlib.sha256(b"".join(v.numpy().astype("float32").tobytes() for v in variables))


@pytest.mark.parametrize("form", FORMS)
def test_reference_update_keeps_its_bits(form):
    assert digest(*FORMS[form]).hexdigest() == json.loads(DIGESTS.read_text())[form]


if __name__ == "__main__":
    print(json.dumps({name: digest(*form).hexdigest() for name, form in FORMS.items()}, indent=1))
