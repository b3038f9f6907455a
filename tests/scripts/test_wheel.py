"""The wheel that scripts/build_wheel.sh makes works where there is no compiler."""

import os
import site
import subprocess
import sys

import pytest

from tests.support.launch import ROOT, run

SCRIPT = """
import keras, numpy as np, tensorflow as tf
import nlcg_tf
from nlcg_tf import fused

assert fused.is_available(), fused.build_info()
ends = []
for path in (True, False):
    variable = keras.Variable(np.linspace(-1, 1, 100, dtype="float32"))
    optimizer = nlcg_tf.NLCG(0.1, fused=path)
    for _ in range(10):
        optimizer.observe_loss(tf.reduce_sum(variable.value**2) / 2)
        optimizer.apply([tf.convert_to_tensor(variable)], [variable])
    ends.append(variable.numpy())
np.testing.assert_allclose(*ends, rtol=1e-5, atol=1e-6)
print(nlcg_tf.__file__)
"""


@pytest.mark.skipif(
    not (ROOT / ".venv" / "nlcg-horovod").exists(), reason="made in scripts/setup.sh's environment"
)
def test_one_wheel_brings_the_op(tmp_path):
    result = run([ROOT / "scripts" / "build_wheel.sh", tmp_path / "dist"])
    assert result.returncode == 0, result.stdout + result.stderr
    assert "needs glibc 2." in result.stdout
    (wheel,) = (tmp_path / "dist").glob("nlcg_tf-*-py3-none-linux_*.whl")
    assert list((tmp_path / "dist").glob("horovod-*.whl"))
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "-q", "--python", python]
    subprocess.run([*pip, "install", "--no-index", "--no-deps", wheel], check=True)
    # TensorFlow, from this environment; its nlcg_tf, an editable one, is not found by this.
    (folder,) = environment.glob("lib/python*/site-packages")
    (folder / "tensorflow.pth").write_text(site.getsitepackages()[0])
    result = subprocess.run(
        [python, "-c", SCRIPT],
        cwd=tmp_path,
        env={"PATH": "", "HOME": os.environ.get("HOME", "/")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert str(environment) in result.stdout
