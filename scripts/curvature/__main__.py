"""Entry point of the study: `python -m scripts.curvature --jobs=2`; see study.py.

A file of its own, for worker processes import study.py by its name.
"""

from scripts.curvature.study import main

main()
