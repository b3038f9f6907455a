"""Fixtures of the trainers' tests."""

import pytest


@pytest.fixture
def folder(tmp_path, rng):
    """21 training and 7 test photos of two classes, each with a colour of its own."""
    # Not above: it imports TensorFlow, which tests/conftest.py has to configure.
    from tests.support.photos import encoded, photo, write

    for part, count in (("train", 21), ("validation", 7)):
        sizes = rng.integers(20, 90, (count, 2))
        files = {f"{i:02}.JPEG": encoded(photo(rng, *size)) for i, size in enumerate(sizes)}
        write(tmp_path, files, part)
    return tmp_path
