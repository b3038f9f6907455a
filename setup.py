"""Package metadata; `pip install .` gives nlcg_tf alone, the trainers run from the repository."""

import pathlib
import re

from setuptools import setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "nlcg_tf" / "__init__.py").read_text())[1]

setup(
    name="nlcg_tf",
    version=VERSION,
    description="Preconditioned nonlinear conjugate gradients for large-batch training in Keras 3",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=["nlcg_tf"],
    python_requires=">=3.10",
    install_requires=["tensorflow>=2.21,<2.22", "keras>=3.12"],
    extras_require={
        "trainers": [
            "absl-py",
            "importlib_resources",  # tensorflow-datasets imports it without declaring it
            "matplotlib",
            "scikit-learn",
            "tensorboard>=2.20",
            "tensorflow-datasets>=4.9.10",
        ],
        "test": ["jax", "pytest", "ruff", "scipy"],
    },
)
