"""A worker that fails ends the job with its error; one that hangs is named."""

import pathlib
import sys

import pytest

from tests.support.launch import horovodrun, needs_horovod

SCRIPT = pathlib.Path(__file__).with_name("failing.py")


@needs_horovod
@pytest.mark.parametrize(
    "how, who, status, message",
    [
        ("raises", 1, 1, "[1]<stderr>:ValueError: this worker's own error"),
        ("is frozen", 1, 1, "warning: communication failed: worker 1 on "),
        ("fits less", 1, 1, "[0]<stderr>:warning: no progress for 3 s: worker 1 on "),
        ("is busy", 0, 0, "[1]<stderr>:warning: no progress for 3 s: worker 0 on "),
    ],
)
def test_a_worker_that_fails_or_hangs(how, who, status, message):
    # Half a minute in real use.
    result = horovodrun(sys.executable, SCRIPT, how, who, HOROVOD_GLOO_TIMEOUT_SECONDS="5")
    assert result.returncode == status
    assert message in result.stderr, result.stderr[-4000:]
