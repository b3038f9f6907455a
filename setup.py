"""Package metadata, and the fused op where it can be built.

`pip install .` gives nlcg_tf alone, the trainers run from the repository. The op is built for the
TensorFlow that is importable during the build (`pip install --no-build-isolation .`); without one,
`python -m nlcg_tf.fused.build` builds it afterwards.
"""

import importlib.util
import pathlib
import re
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "nlcg_tf" / "__init__.py").read_text())[1]


class BuildFusedOp(build_ext):
    """Hands the work to nlcg_tf/fused/build.py, the one place that knows how."""

    def get_ext_filename(self, name):
        return name.replace(".", "/") + ".so"

    def build_extension(self, extension):
        path = HERE / "nlcg_tf" / "fused" / "build.py"
        spec = importlib.util.spec_from_file_location("nlcg_tf_fused_build", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        target = pathlib.Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            module.build(target.parent)
        except RuntimeError as error:
            # NLCG works without it, only slower, and says at run time how to build it.
            print(f"warning: the fused op was not built: {error}", file=sys.stderr)
            target.unlink(missing_ok=True)  # of an earlier build
            self.extensions.remove(extension)


class AnyPython(bdist_wheel):
    """The op's library is loaded by TensorFlow, not by Python: one wheel serves every version."""

    def get_tag(self):
        *_, platform = super().get_tag()
        return "py3", "none", platform


WITH_TENSORFLOW = importlib.util.find_spec("tensorflow") is not None

setup(
    name="nlcg_tf",
    version=VERSION,
    description="Preconditioned nonlinear conjugate gradients for large-batch training in Keras 3",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=["nlcg_tf", "nlcg_tf.fused", "nlcg_tf.horovod"],
    package_data={"nlcg_tf": ["py.typed"], "nlcg_tf.fused": ["*.h", "*.cc", "*.cu"]},
    ext_modules=[Extension("nlcg_tf.fused.libnlcg_update", [])] if WITH_TENSORFLOW else [],
    cmdclass={"build_ext": BuildFusedOp, "bdist_wheel": AnyPython},
    python_requires=">=3.10",
    # Not TensorFlow: with Keras' other backends it is not needed, and it has several packages.
    install_requires=["keras>=3.8"],
    extras_require={
        "tensorflow": ["tensorflow>=2.18,<2.22"],
        "trainers": [
            "tensorflow>=2.21,<2.22",
            "keras>=3.12",
            "absl-py",
            "importlib_resources",  # tensorflow-datasets imports it without declaring it
            "matplotlib",
            "pandas",
            "pyyaml",
            "scikit-learn",
            "tensorboard>=2.20",
            "tensorflow-datasets>=4.9.10",
            "tqdm",
        ],
        # PyPI's source does not compile for TensorFlow 2.21: scripts/build_wheel.sh makes a wheel.
        "horovod": ["horovod==0.28.1"],
        "test": [
            "jax",
            "mypy",
            "pillow",
            "psutil",
            "pytest",
            "pytest-xdist",
            "ruff==0.17.6",
            "scipy",
        ],
        # Of the API pages the sources are read, not run: they need nothing else.
        "docs": [
            "mkdocs-material==9.8.1",
            "mkdocstrings==1.0.8",
            "mkdocstrings-python==2.0.11",
            "ruff==0.17.6",
        ],
    },
)
