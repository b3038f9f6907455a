"""A worker that fails ends the job with its error; one that hangs is named."""

import re
import sys
import time

import pytest

from tests.support.launch import PYTHON, horovodrun, needs_horovod


@needs_horovod
@pytest.mark.parametrize(
    "how, who, status, message",
    [
        ("raises", 1, 1, "[1]<stderr>:ValueError: this worker's own error"),
        ("is frozen", 1, 1, "warning: communication failed: worker 1 on "),
        ("fits less", 1, 1, "worker 0 waits in a training step, worker 1 waits for the next epoch"),
        ("validates alone", 0, 1, "worker 0 waits after a test: in a sum, worker 1 waits in a "),
        ("stops alone", 1, 1, "a training step, worker 1 waits at the end of an epoch: in a sum"),
        ("is busy", 0, 0, "[1]<stderr>:warning: no progress for 3 s: worker 0 on "),
    ],
)
def test_a_worker_that_fails_or_hangs(how, who, status, message):
    # Workers whose sets have other orders must tell of the same places: not forks of one process.
    python = [sys.executable] if " waits " in message else PYTHON
    command = [*python, "-m", "tests.distributed.failing", how, who]
    # Half a minute in real use.
    result = horovodrun(*command, HOROVOD_GLOO_TIMEOUT_SECONDS="5")
    assert result.returncode == status
    assert message in result.stderr, result.stderr[-4000:]
    began = max(map(float, re.findall(r"began at ([\d.]+)", result.stdout)))
    assert time.time() - began < 60
    if " waits " in message:  # both end, and say why
        begin = "<stderr>:error: the workers wait for each other for ever: "
        assert all(f"[{worker}]{begin}" in result.stderr for worker in (0, 1))
