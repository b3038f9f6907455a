"""The launchers: the commands they would run, their errors, and real workers."""

import os
import pathlib
import re
import shlex
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]
VENV = ROOT / ".venv"
HORUN, MPIRUN, SLURM = "launch_horovodrun.sh", "launch_mpirun.sh", "launch_slurm.sbatch"
COMMAND = ["python", "-m", "trainers.cifar", "--output_dir=my runs", "it's", "$HOME", "*", ""]
LOGGING = ["TF_CPP_MIN_LOG_LEVEL=2", "HOROVOD_LOG_LEVEL=warning"]
PREFIX = ["cd", str(ROOT), "&&", f"PATH={VENV / 'bin'}:$PATH"]
AS_ROOT = ["--allow-run-as-root"] if os.geteuid() == 0 else []
IN_SLURM = {"SLURM_JOB_ID": "17", "SLURM_NTASKS_PER_NODE": "2", "SLURM_SUBMIT_DIR": str(ROOT)}

# Horovod as the launchers find it: that of .venv, with or without MPI.
libraries = list(VENV.glob("lib/python3*/site-packages/horovod/tensorflow/mpi_lib*.so"))
has_mpi = any(b"libmpi" in library.read_bytes() for library in libraries)
needs_horovod = pytest.mark.skipif(not libraries, reason="Horovod is not installed in .venv")


def launch(script, *arguments, path=None, **environment):
    """Runs a launcher in a small environment; the programs in the folder `path` come first."""
    environment["PATH"] = os.pathsep.join(filter(None, [path and str(path), "/usr/bin:/bin"]))
    environment["HOME"] = os.environ.get("HOME", "/")
    command = ["bash", str(ROOT / "scripts" / script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def dry_run(script, *arguments, **environment):
    """The words of the command that a launcher prints, as a shell would read them."""
    result = launch(script, "--dry_run", *arguments, **environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1
    return shlex.split(result.stdout)


def program(folder, name, text):
    """Writes a shell script that stands for a program of the system."""
    file = folder / name
    file.write_text(f"#!/usr/bin/env bash\n{text}\n")
    file.chmod(0o755)


def horovodrun(*words):
    return [*PREFIX, *LOGGING, "horovodrun", "--gloo", *words]


def mpirun(workers, hosts, *words, exported=()):
    name = VENV / "bin" / "mpirun"
    variables = sorted(["HOROVOD_LOG_LEVEL", "PATH", "TF_CPP_MIN_LOG_LEVEL", *exported])
    return [
        *[*PREFIX, *LOGGING, str(name) if name.exists() else "mpirun", "-np", workers, *hosts],
        *["--bind-to", "none", "--map-by", "slot", "--tag-output", *AS_ROOT],
        *[word for variable in variables for word in ("-x", variable)],
        *words,
    ]


def test_workers_are_the_slots_of_all_hosts():
    hosts = ["-H", "host1:4,host2:16"]
    assert dry_run(HORUN, *hosts, "--", *COMMAND) == horovodrun("-np", "20", *hosts, *COMMAND)
    assert dry_run(MPIRUN, *hosts, "--", *COMMAND) == mpirun("20", hosts, *COMMAND)


@pytest.mark.parametrize("gpus", [0, 3])
def test_workers_of_this_machine(gpus, tmp_path):
    """One for a GPU; two without. A MIG slice of a GPU is none of its own."""
    gpu = r"GPU 0: name (UUID: x)\n  MIG 1g.10gb Device 0: (UUID: y)\n"
    program(tmp_path, "nvidia-smi", f"printf '{gpus * gpu}'" if gpus else "exit 9")
    workers = str(gpus or 2)
    assert dry_run(HORUN, "--", "x", path=tmp_path) == horovodrun("-np", workers, "x")
    hosts = ["-H", f"localhost:{workers}"]
    assert dry_run(MPIRUN, "--", "x", path=tmp_path) == mpirun(workers, hosts, "x")


def test_options_go_to_the_launcher_below_and_flags_to_the_command():
    options = ["--network-interfaces", "eth0", "-p", "2222"]
    words = dry_run(HORUN, "-n", 3, "-H", "a:2,b:2", *options, "--", "x", "--", "-n", "9")
    assert words == horovodrun("-np", "3", "-H", "a:2,b:2", *options, "x", "--", "-n", "9")
    options = ["--mca", "btl_tcp_if_include", "eth0"]
    words = dry_run(MPIRUN, *options, "-n", 3, "-H", "a:2,b:2", "--", "x", "--", "-n", "9")
    assert words == mpirun("3", ["-H", "a:2,b:2"], *options, "x", "--", "-n", "9")


def test_elastic_options():
    options = ["--min-np", "2", "--max-np", "8", "--host-discovery-script", "./my hosts.sh"]
    assert dry_run(HORUN, "-n", 4, *options, "--", "x") == horovodrun("-np", "4", *options, "x")


def test_a_hostfile_takes_the_place_of_hosts():
    options = ["--hostfile", "hosts.txt"]
    assert dry_run(HORUN, "-n", 4, *options, "--", "x") == horovodrun("-np", "4", *options, "x")
    assert dry_run(MPIRUN, "-n", 4, *options, "--", "x") == mpirun("4", [], *options, "x")


def test_mpirun_forwards_variables_by_name():
    forwarded = {"NLCG_CUDA": "0", "NCCL_DEBUG": "INFO", "KERAS_BACKEND": "tensorflow"}
    others = {"MY_SECRET": "1", "HOROVOD_LOG_LEVEL": "info"}
    words = dry_run(MPIRUN, "-n", 2, "--", "x", **forwarded, **others)
    expected = mpirun("2", ["-H", "localhost:2"], "x", exported=forwarded)
    assert words == [w.replace("LEVEL=warning", "LEVEL=info") for w in expected]


def test_slurm():
    words = dry_run(SLURM, *COMMAND, **IN_SLURM, SLURM_CPUS_PER_TASK="8", SLURM_MPI_TYPE="pmix_v4")
    start = [*PREFIX, *LOGGING, "SRUN_CPUS_PER_TASK=8"]
    srun = ["srun", "--label", "--distribution=block", "--kill-on-bad-exit=0", "--wait=30"]
    if has_mpi:
        assert words == [*start, *srun, "--mpi=pmix_v4", *COMMAND]
        return
    address = f"HOROVOD_GLOO_RENDEZVOUS_ADDR={os.uname().nodename}"
    gloo = [address, "HOROVOD_GLOO_RENDEZVOUS_PORT=PORT"]
    gloo += ["HOROVOD_CONTROLLER=gloo", "HOROVOD_CPU_OPERATIONS=gloo"]
    begin = [*start, *gloo, *srun, "--mpi=none", "bash", "-c"]
    assert words[: len(begin)] == begin
    assert words[len(begin) + 1 :] == ["worker", *COMMAND]
    assert "CPUS_PER_TASK" not in " ".join(dry_run(SLURM, "x"))


@pytest.mark.parametrize("script", [HORUN, MPIRUN])
@pytest.mark.parametrize(
    "arguments, message",
    [
        ("", "no command: write it after --"),
        ("-n 2", "no command: write it after --"),
        ("python -m trainers.cifar", "no command: write it after --"),
        ("-n", "-n needs a value"),
        ("-H", "-H needs a value"),
        ("-n -- x", "no command"),
        ("-n two -- x", "-n must be a positive number. Received: two"),
        ("-n 0 -- x", "-n must be a positive number. Received: 0"),
        ("-H host1 -- x", "-H must be HOST:SLOTS,... Received: host1"),
        ("-H host1:4, -- x", "-H must be HOST:SLOTS,... Received: host1:4,"),
        ("-n 9 -H a:4,b:4 -- x", "9 workers, but -H a:4,b:4 has 8 slots"),
        ("--hostfile f -- x", "-n is needed where an option tells the hosts"),
    ],
)
def test_mistakes_are_named(script, arguments, message):
    result = launch(script, *arguments.split())
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.startswith(f"{script.partition('.')[0]}: error: ")
    assert message in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, environment, message",
    [
        ("", IN_SLURM, "no command"),
        ("--dry_run", {}, "no command"),
        ("--nodes=2 x", IN_SLURM, "unknown option --nodes=2"),
        ("x", {}, "this is no SLURM job: start it with sbatch"),
        ("x", {"SLURM_JOB_ID": "17"}, "give sbatch --ntasks-per-node"),
        ("x", {**IN_SLURM, "SLURM_SUBMIT_DIR": "/"}, "submit from the repository"),
    ],
)
def test_mistakes_in_a_slurm_job_are_named(arguments, environment, message):
    result = launch(SLURM, *arguments.split(), **environment)
    assert result.returncode == 2
    assert result.stderr.startswith("launch_slurm: error: ") and message in result.stderr


@pytest.mark.skipif(has_mpi, reason="Horovod is built with MPI")
def test_mpirun_without_mpi_tells_the_way_out(tmp_path):
    program(tmp_path, "mpirun", "echo mpirun '(Open MPI)' 4.1.4")
    result = launch(MPIRUN, "--", "x", path=tmp_path)
    assert result.returncode == 2
    assert "Horovod is not built with MPI" in result.stderr
    assert "scripts/setup.sh" in result.stderr and HORUN in result.stderr


@pytest.mark.parametrize("script", [HORUN, MPIRUN])
def test_help(script):
    result = launch(script, "--help")
    assert result.returncode == 0 and f"scripts/{script} [-n WORKERS]" in result.stdout
    assert "set -euo" not in result.stdout


# A SLURM of one node: starts the tasks one after the other, ends with the largest of their codes.
SRUN = """
while [[ $1 == --* ]]; do shift; done
code=0
for SLURM_PROCID in 0 1; do
  export SLURM_PROCID SLURM_LOCALID=$SLURM_PROCID SLURM_NODEID=0 SLURMD_NODENAME=node
  export SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NUM_NODES=1
  "$@" || code=$?
done
exit $code
"""
# What Horovod does first: a worker leaves its address on the server, another reads it.
WORKER = """
import os, sys, urllib.request
names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", "HOSTNAME")
print([os.environ["HOROVOD_" + name] for name in names], sys.argv[1:])
address, port = (os.environ[f"HOROVOD_GLOO_RENDEZVOUS_{name}"] for name in ("ADDR", "PORT"))
url = f"http://{address}:{port}/global/0"
if os.environ["HOROVOD_RANK"] == "0":
    urllib.request.urlopen(urllib.request.Request(url, data=b"here", method="PUT")).close()
else:
    assert urllib.request.urlopen(url).read() == b"here"
sys.exit(int(os.environ.get("CODE", "0")))
"""


@needs_horovod
@pytest.mark.skipif(has_mpi, reason="Horovod is built with MPI")
@pytest.mark.parametrize("code", [0, 3, 75])
def test_a_slurm_job(code, tmp_path):
    """Workers get their places and meet; a job that was told to stop is put back into the queue."""
    program(tmp_path, "srun", SRUN)
    program(tmp_path, "scontrol", f'echo "$@" > {tmp_path}/requeued')
    environment = {"HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1", "CODE": str(code), **IN_SLURM}
    result = launch(SLURM, "python", "-c", WORKER, "two words", path=tmp_path, **environment)
    assert result.returncode == code, result.stderr
    for rank in "01":
        assert str([rank, "2", rank, "2", "0", "1", "node"]) + " ['two words']" in result.stdout
    requeued = tmp_path / "requeued"
    assert requeued.exists() == (code == 75)
    if code == 75:
        assert requeued.read_text() == "requeue 17\n"


@needs_horovod
def test_real_workers():
    code = "import sys, horovod.tensorflow as hvd; hvd.init()"
    code += "; print('I am', hvd.rank(), hvd.size(), sys.argv)"
    result = launch(HORUN, "-n", 2, "--", "python", "-c", code, "two words", "$HOME")
    assert result.returncode == 0, result.stderr[-4000:]
    told = re.findall(r"\[(\d)\]<stdout>:I am (\d) (\d) (.*)", result.stdout)
    words = str(["-c", "two words", "$HOME"])
    assert sorted(told) == [("0", "0", "2", words), ("1", "1", "2", words)]
