"""The oldest TensorFlow and Keras that setup.py admits; scripts/setup.sh brings the newest."""

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata

import pytest

from tests.support.launch import ROOT

# The first TensorFlow for Python 3.13 is 2.20.
OLDEST = ["tensorflow-cpu==" + ("2.18.1" if sys.version_info < (3, 13) else "2.20.0")]
OLDEST.append("keras==3.8.0")
TESTS = ["test_fit.py::test_fit", "test_fit.py::test_mirrored_strategy_equals_one_replica"]
TESTS.append("test_saving.py")
SOURCES = ("nlcg_tf", "tests", "trainers", "setup.py", "pyproject.toml", "README.md")


@pytest.mark.installs
def test_the_oldest_versions(tmp_path):
    source, python = tmp_path / "source", tmp_path / "environment" / "bin" / "python"
    for name in SOURCES:
        place = source / name
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        place.parent.mkdir(exist_ok=True)
        copy(ROOT / name, place)
    (source / "nlcg_tf" / "fused" / "libnlcg_update.so").unlink(missing_ok=True)
    known = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    known["CXX"] = "g++ -DNLCG_NO_CLONES"  # one set of instructions is enough

    def run(*command):
        result = subprocess.run(command, cwd=source, env=known, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "environment")
    pip = [sys.executable, "-m", "pip", "-q", "--python", python, "install", "--no-compile"]
    run(*pip, *OLDEST, "pytest", "--editable", ".")
    run(python, "-m", "nlcg_tf.fused.build")
    tests = [f"tests/optimizer/{name}" for name in TESTS]
    output = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
    assert re.search(r"^\d+ passed", output, re.MULTILINE), output


def test_tensorflow_is_an_extra():
    needed = [name for name in metadata.requires("nlcg_tf") if "extra ==" not in name]
    assert [re.split(r"[<>=]", name)[0] for name in needed] == ["keras"]
