"""The CUDA kernels' logic, where there is no GPU."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def test_the_emulated_kernels_agree_with_the_oracle():
    """In a process of its own: the emulation aborts where threads part at a barrier."""
    command = [sys.executable, "-m", "tests.fused.check_cuda", "--emulate"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "FAILED" not in result.stdout and "10 launches" in result.stdout
