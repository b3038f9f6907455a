"""What a sweep runs: definitions in a line or a file."""

import sys

import pytest
import yaml

from scripts.sweep import __main__ as sweep_program
from scripts.sweep import definition as definitions
from tests.support.launch import run
from tests.support.sweeps import DEFINITION, write
from trainers.optimizers.choice import flags_of, trained


def names(definition, extra=None):
    return list(definitions.expand(definition, extra))


def test_a_definition_gives_every_combination_a_readable_name():
    runs = definitions.expand(DEFINITION, {"data_dir": "/data"})
    assert list(runs) == [
        "NLCG-FR-128-e10-s0",
        "Momentum-128-e10-s0",
        "NLCG-FR-128-e10-s1",
        "Momentum-128-e10-s1",
        "NLCG-FR-512-e10-s0",
        "Momentum-512-e10-s0",
        "NLCG-FR-512-e10-s1",
        "Momentum-512-e10-s1",
        "NLCG-FR-128-e10-f0.25-s0",
        "Momentum-128-e10-f0.25-s0",
        "NLCG-FR-128-e10-f4-s0",
        "Momentum-128-e10-f4-s0",
    ]
    assert runs["NLCG-FR-128-e10-f0.25-s0"] == {
        "optimizer": "NLCG-FR",
        "trainer": "trainers.cifar",
        "launcher": [],
        "flags": {
            "dataset": "digits",
            "epochs": 10,
            "data_dir": "/data",
            "optimizer": "nlcg",
            "update_rule": "fletcher_reeves",
            "preconditioner": "bfgs",
            "nesterov": False,
            "global_batch_size": 128,
            "learning_rate_factor": 0.25,
            "seed": 0,
        },
    }
    merged = yaml.load(
        "a: &a {seed: 1, epochs: 2}\nx: {y: &b {<<: *a, seed: 3}}\nc: {<<: *b}",
        definitions._StrictLoader,
    )
    assert merged["c"] == {"seed": 3, "epochs": 2}
    other = {**DEFINITION, "grid": [{"weight_decay": [1e-3, 5e-4]}]}
    assert names(other)[2] == "NLCG-FR-e10-weight_decay=0.0005"
    other = {**DEFINITION, "grid": [{"seed": [1, 2], "optimizers": ["Momentum"]}]}
    assert names(other) == ["Momentum-e10-s1", "Momentum-e10-s2"]


def test_one_line_gives_what_the_file_gives():
    line = definitions.from_line(["nlcg_fr", "momentum"], [128, 512], [10], [0, 1], [])
    extra = definitions.parse_flags(["--dataset=digits"])
    file = {**DEFINITION, "grid": DEFINITION["grid"][:1]}
    assert definitions.expand(line, extra) == definitions.expand(file)
    line = definitions.from_line(["lars"], None, None, None, ["weight_decay=0.1,0.2"])
    assert names(line) == ["LARS-weight_decay=0.1", "LARS-weight_decay=0.2"]


def test_every_optimizer_of_the_trainers_has_a_name():
    assert {flags_of(name)["optimizer"] for name in sweep_program.comparable()} == set(trained())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"optimisers": {}}, "unknown key 'optimisers'"),
        ({"optimizers": {}}, "optimizers must not be empty. Received: {}"),
        ({"optimizers": ["nlcg"]}, r"optimizers must be a mapping. Received: \['nlcg'\]"),
        ({"optimizers": {"A": {"optimizer": ["nlcg"]}}}, "optimizers: A: optimizer must have one"),
        ({"grid": []}, r"grid must not be empty. Received: \[\]"),
        ({"grid": [{"seed": []}]}, r"grid\[0\]: seed must be .* Received: \[\]"),
        ({"grid": [{"seed": [None]}]}, r"grid\[0\]: seed must be .* Received: \[None\]"),
        ({"grid": [{"output_dir": "x"}]}, r"grid\[0\]: 'output_dir' is not a flag"),
        ({"grid": [{"seed": [0, 0]}]}, "two runs are named NLCG-FR-e10-s0"),
        ({"grid": [{"seed": 0}, {"seed": 0, "learning_rate_factor": 1}]}, "two runs are named"),
        ({"grid": [{"optimizers": "A"}]}, r"grid\[0\]: optimizers does not define A"),
        ({"optimizers": {"..": {}}, "flags": {}, "grid": [{}]}, "cannot have this name"),
        ({"grid": [{"optimizer": "sgd"}]}, "--optimizer stands in optimizers: NLCG-FR and in grid"),
        ({"flags": {"depth": {}}}, "flags: depth must have one value. Received: {}"),
        ({"launcher": "horovodrun"}, "launcher must be a list of words. Received: 'horovodrun'"),
        ({"trainer": "a b"}, "trainer must be a module"),
    ],
)
def test_a_bad_definition_is_an_error_that_names_key_and_value(change, message):
    with pytest.raises(ValueError, match=message):
        definitions.expand({**DEFINITION, **change})


def test_bad_words_and_files_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"--seed stands in grid.0. and in after --"):
        names(DEFINITION, {"seed": 3})
    with pytest.raises(ValueError, match="Received: digits"):
        definitions.parse_flags(["digits"])
    with pytest.raises(ValueError, match="Received: seed=1"):
        definitions.from_line(["nlcg"], None, None, [0], ["seed=1"])
    with pytest.raises(ValueError, match=r"Received: depth=.$"):
        definitions.from_line(["nlcg"], None, None, [0], ["depth=["])
    file = tmp_path / "twice.yaml"
    file.write_text("optimizers:\n  A: {optimizer: nlcg}\n  A: {optimizer: sgd}\n")
    with pytest.raises(ValueError, match="'A' stands twice"):
        definitions.from_file(file)
    file.write_bytes(b"optimizers: {\xe9: nlcg}")
    with pytest.raises(ValueError, match=f"--config={file}: 'utf-8' codec"):
        definitions.from_file(file)
    with pytest.raises(ValueError, match=r"two runs are named NLCG-p0\.0001"):
        names(definitions.from_line(["nlcg"], None, None, None, ["peak_learning_rate=1e-4,1.0e-4"]))
    for text in ("", "[1]", '{"a": 1}', '{"a": {"flags": {}}}'):
        (tmp_path / "sweep.json").write_text(text)
        with pytest.raises(ValueError, match=f"{tmp_path}/sweep.json is damaged"):
            definitions.load(tmp_path)
    command = [sys.executable, "-m", "scripts.sweep", f"--folder={tmp_path / 'a'}"]
    done = run([*command, write(tmp_path, {**DEFINITION, "grid": []})])
    assert (done.returncode, done.stderr) == (2, "error: grid must not be empty. Received: []\n")
    assert not (tmp_path / "a").exists()


def test_a_run_that_has_begun_takes_what_the_trainer_takes(tmp_path):
    definition = {"optimizers": {"M": {"optimizer": "momentum"}}, "grid": [{"seed": 0}]}

    def save(**flags):
        definitions.save(tmp_path, definitions.expand({**definition, "flags": flags}))

    save(depth=8, evaluation_epochs=5)
    (tmp_path / "runs" / "M-s0").mkdir(parents=True)
    (tmp_path / "runs" / "M-s0" / "flags.json").write_text("{}")
    # Run folders of before `free` was among what they hold.
    save(depth=8, evaluation_epochs=1, commit_steps=3, jit_compile=True, download=True)
    with pytest.raises(ValueError, match="--depth was 8, is 20"):
        save(depth=20, evaluation_epochs=1)
