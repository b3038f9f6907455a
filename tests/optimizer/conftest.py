"""Fixtures of the optimizer's tests."""

import pytest


@pytest.fixture(params=[False, True], ids=["reference", "fused"])
def fused(request):
    """Both paths; the second only where the op is built."""
    if request.param:
        request.getfixturevalue("fused_library")
    return request.param
