"""scripts/setup.sh after an interruption, a move, damage: real environments, without PyPI."""

import concurrent.futures
import fcntl
import os
import shutil
import subprocess
import sys
import time
import zipfile

import pytest

from tests.support.launch import ROOT

# Stands in for `python -m venv`: a real environment whose pip only says what it was asked for, so
# that nothing is downloaded; building a wheel gives the file $WHEEL.
PYTHON = """#!/bin/sh
if [ "$1 $2" != "-m venv" ]; then exec {python} "$@"; fi
echo venv >> "$LOG"
for place; do :; done
{python} -m venv --clear --without-pip "$place" || exit 1
packages=$(echo "$place"/lib/python*/site-packages)
mkdir -p "$packages/pip" "$packages/tensorflow-2.21.0.dist-info" "$packages/horovod/tensorflow"
touch "$packages/horovod/tensorflow/__init__.py"
printf 'Name: tensorflow\\nVersion: 2.21.0\\n' > "$packages/tensorflow-2.21.0.dist-info/METADATA"
cat > "$packages/pip/__main__.py" << 'END'
import os, pathlib, shutil, sys
words = " ".join(sys.argv[1:])
if "download" in words:
    pathlib.Path("horovod-0.28.1/horovod/tensorflow").mkdir(parents=True)
    for name in ("setup.py", "horovod/tensorflow/CMakeLists.txt"):
        pathlib.Path("horovod-0.28.1", name).touch()
    os.system("tar czf horovod-0.28.1.tar.gz horovod-0.28.1")
elif " -w " in words:
    folder = pathlib.Path(sys.argv[sys.argv.index("-w") + 1])
    folder.mkdir()
    shutil.copy(os.environ["WHEEL"], folder)
    print("wheel", file=open(os.environ["LOG"], "a"))
END
"""


needs_tools = pytest.mark.skipif(
    not all(map(shutil.which, ("g++", "cmake", "flock"))), reason="no g++, cmake or flock"
)


@pytest.fixture
def setup(tmp_path):
    """A function that runs the script in a small copy of the repository.

    It returns the exit status, the output, and which slow steps were done ("venv", "wheel").
    """
    repository, log = tmp_path / "repository", tmp_path / "log"
    (repository / "nlcg_tf" / "fused").mkdir(parents=True)
    (repository / "scripts").mkdir()
    for name in ("setup.py", "pyproject.toml", "scripts/setup.sh"):
        shutil.copy(ROOT / name, repository / name)
    for name in ("__init__.py", "build.py", "a.h", "a.cc", "a.cu"):
        (repository / "nlcg_tf" / "fused" / name).touch()
    python = tmp_path / "python3"
    python.write_text(PYTHON.format(python=sys._base_executable))
    python.chmod(0o755)
    wheel = tmp_path / "horovod.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("a", "b" * 1000)
    (tmp_path / "df").write_text("#!/bin/sh\necho; echo / 1 1 9999999 1% /\n")  # as on a large disk
    (tmp_path / "df").chmod(0o755)
    tools = [os.path.dirname(shutil.which(name)) for name in ("g++", "cmake")]
    path = os.pathsep.join([str(tmp_path), *tools, "/usr/bin", "/bin"])
    known = {"PATH": path, "LOG": str(log), "WHEEL": str(wheel), "HOME": "/", "NLCG_NCCL": "0"}

    def run(folder=repository, **variables):
        log.write_text("")
        result = subprocess.run(
            [folder / "scripts" / "setup.sh"],
            env={**known, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        return result.returncode, result.stdout, log.read_text().split()

    run.repository = repository
    return run


@needs_tools
def test_setup_is_done_once_and_again_where_it_is_needed(setup, tmp_path):
    status, output, steps = setup()
    assert (status, steps) == (0, ["venv", "wheel"]), output
    environment = setup.repository / ".venv"
    status, output, steps = setup()
    assert (status, steps) == (0, []) and "up to date" in output
    # A Python that is not there.
    status, output, steps = setup(PYTHON="/nonexistent/python3")
    assert (status, steps) == (1, []) and "PYTHON=/nonexistent/python3" in output
    # The environment's own Python is gone, as after an upgrade of the system.
    (environment / "bin" / "python").unlink()
    (environment / "bin" / "python").symlink_to("/nonexistent/python3")
    status, output, steps = setup()
    assert (status, steps) == (0, ["venv"]), output
    # Killed while it was made: no pip yet, no stamp.
    (packages,) = environment.glob("lib/python*/site-packages")
    shutil.rmtree(packages / "pip")
    (environment / "nlcg-setup").unlink()
    status, output, steps = setup()
    assert (status, steps) == (0, ["venv"]), output
    # A wheel that a full disk cut off.
    (wheel,) = (setup.repository / ".cache").glob("horovod-*/*.whl")
    wheel.write_bytes(wheel.read_bytes().replace(b"bbbb", b"cccc"))
    (environment / "nlcg-setup").unlink()
    status, output, steps = setup()
    assert (status, steps) == (0, ["wheel"]) and "damaged" in output, output
    assert zipfile.is_zipfile(wheel)
    # Another spelling of the same place is no move.
    (tmp_path / "link").symlink_to(setup.repository)
    status, output, steps = setup(tmp_path / "link")
    assert (status, steps) == (0, []), output
    # What a link leads to may be another program's environment.
    other = shutil.copytree(setup.repository, tmp_path / "other", symlinks=True)
    shutil.rmtree(other / ".venv")
    (other / ".venv").symlink_to(environment)
    status, output, steps = setup(other)
    assert (status, steps) == (1, []) and ".venv is a link" in output, output
    assert setup()[0::2] == (0, [])  # nothing was lost
    # Programs of a moved environment would name the old place.
    moved = tmp_path / "moved"
    setup.repository.rename(moved)
    status, output, steps = setup(moved)
    assert (status, steps) == (0, ["venv"]), output
    assert str(moved) in (moved / ".venv" / "bin" / "activate").read_text()


@needs_tools
def test_two_setups_take_turns(setup):
    (setup.repository / ".cache").mkdir()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        with (setup.repository / ".cache" / "setup.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            second = pool.submit(setup)
            time.sleep(1)
            assert not second.done() and not (setup.repository / ".venv").exists()
        status, output, steps = second.result()
    assert (status, steps) == (0, ["venv", "wheel"])
    assert output.startswith("setup: waiting for another set-up")
