"""An optimizer, a data set, a preconditioner and a flag: each an entry in one table.

The promise of docs/architecture.md: from there on they are known everywhere.
"""

from tests.support.launch import PYTHON, run

PROGRAM = """
import dataclasses, pathlib, sys
import numpy as np
import keras
from absl import flags

import nlcg_tf

from nlcg_tf.preconditioner import NAMES, Preconditioner
from scripts.plot import tables
from scripts.shared import runs, style
from scripts.sweep import definition
from trainers import cifar
from trainers.data import memory
from trainers.engine.folder import read_json
from trainers.engine.run import run
from trainers.flags import decides
from trainers.optimizers import choice

folder = pathlib.Path(sys.argv[1])

@keras.saving.register_keras_serializable()
@dataclasses.dataclass(frozen=True)
class Doubled(Preconditioner):
    def apply(self, state, g, w, epsilon, sums):
        return [2 * g_i for g_i in g], 0.5

def load(data_dir, download):
    digits = memory.DATA_SETS["digits"].load(None, False)
    return memory.ImageData(digits.train, digits.test, padding=0, flip=False)

def make(schedule, *unused, **settings):
    return nlcg_tf.NLCG(schedule, preconditioner=settings["preconditioner"])

choice.OPTIMIZERS["mine"] = choice.Choice("Mine", choice.GREEN, ":", "o", make=make)
memory.DATA_SETS["still"] = memory.DataSet(1437, 10, (8, 8, 1), load, comes_with="scikit-learn")
NAMES["doubled"] = Doubled
loaded = nlcg_tf.NLCG.from_config(nlcg_tf.NLCG(preconditioner="doubled").get_config())
assert type(loaded.preconditioner) is Doubled
flags.DEFINE_float(decides("sharpness"), 1.0, "A flag of one's own.")

extra = {"dataset": "still", "depth": 8, "preconditioner": "doubled", "sharpness": 2.0}
(name, sweep_run), = definition.expand(
    definition.from_line(["mine"], [512], [1], [0], []), extra
).items()
for words in ([], ["--dry_run"]):
    flags.FLAGS.unparse_flags()
    given = [f"--{key}={value}" for key, value in sweep_run["flags"].items()]
    flags.FLAGS(["x", *given, f"--output_dir={folder / name}", *words])
    run(cifar.Cifar())
read = runs.read_runs([folder])
assert list(read["optimizer"]) == ["Mine"] and list(read["status"]) == ["finished"], read
assert "Mine" in tables.table(read)
assert style.styles(["Mine"])["Mine"]["color"] == choice.GREEN
assert "sharpness" not in read_json(folder / name / "flags.json")["free"]
print("added")
"""


def test_what_is_added_in_one_place_is_known_everywhere(tmp_path):
    result = run([*PYTHON, "-c", PROGRAM, tmp_path])
    assert result.stdout.endswith("added\n"), result.stdout + result.stderr[-4000:]
    assert "mine: batch 512 = 1 worker(s) x 1 micro-step(s) x 512; 2 updates" in result.stdout
