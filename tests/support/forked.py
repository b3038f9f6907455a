"""`python` for the tests: programs run as forks of one process that has imported TensorFlow.

    python -IS tests/support/forked.py [python] -m MODULE ARGUMENTS      or -c CODE, or FILE

Importing TensorFlow, and what the programs import later, takes longer than most of what they do.
This command does what `python` does with the same words: it has the program's output, exit status
and environment, and SIGTERM, SIGINT, SIGHUP and SIGUSR1 come to the program. If the command is
killed, so is the program a moment later.

A fork differs from a process of its own: it has the order of sets of the process that forks, and
whatever variables Python, Keras and TensorFlow read when they are imported. So tests of imports, of
such variables, and of what workers must do in the same order start a Python of their own.
"""

import contextlib
import marshal
import os
import select
import signal
import socket
import sys

ADDRESS = "NLCG_TESTS_FORKING"
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def start_server():
    """Starts the process that forks, which ends when `server.stdin` is closed.

    Returns:
        `(server, address)`, of which the caller keeps the first.
    """
    import pathlib
    import subprocess
    import tempfile

    # Another folder's name may be too long for a socket.
    address = os.path.join(tempfile.mkdtemp(dir="/tmp"), "socket")
    root = pathlib.Path(__file__).parents[2]
    with socket.socket(socket.AF_UNIX) as listener, open(f"{address}.log", "w") as log:
        listener.bind(address)
        listener.listen(64)
        number = listener.fileno()
        server = subprocess.Popen(
            [sys.executable, "-u", "-m", "tests.support.forked", str(number)],
            cwd=root,
            pass_fds=[number],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,  # a terminal's Ctrl-C comes to the commands
        )
    return server, address


def main(words):
    """The command: has its program run by the server, and ends as that does."""
    answer = b""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[ADDRESS])
        content = marshal.dumps((words, os.getcwd(), dict(os.environ), os.sched_getaffinity(0)))
        socket.send_fds(connection, [len(content).to_bytes(4, "little")], [0, 1, 2])
        connection.sendall(content)
        # From now on Python sends the numbers of signals by itself.
        connection.setblocking(False)
        signal.set_wakeup_fd(connection.fileno(), warn_on_full_buffer=False)
        for number in FORWARDED:
            signal.signal(number, lambda *_: None)
        select.select([connection], [], [])
        answer = connection.recv(4)
    if not answer:
        with open(f"{os.environ[ADDRESS]}.log") as file:
            sys.exit(f"the process that forks has failed: {file.read()}")
    status = int.from_bytes(answer, "little", signed=True)
    if status < 0:
        signal.set_wakeup_fd(-1)
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def serve(listener):
    """Forks once for each command, until the tests have ended."""
    import gc
    import importlib
    import shutil

    address, before = listener.getsockname(), dict(os.environ)
    from trainers.engine.imports import import_tensorflow

    import_tensorflow()
    os.environ["MPLBACKEND"] = "Agg"
    importlib.import_module("trainers.engine.run")
    # What programs import when they need it, where it is installed.
    for name in ("matplotlib.pyplot", "pandas", "sklearn.datasets", "sklearn.model_selection"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)

    gc.freeze()  # nothing of this is looked through again when a fork ends
    changed = {name: x for name, x in os.environ.items() if before.get(name) != x}
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    while listener in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            return _watch_over(connection, changed)
        connection.close()
    shutil.rmtree(os.path.dirname(address))


def _watch_over(connection, changed):
    """Runs a command's program in a fork; passes signals on, and the exit status back."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, streams, *_ = socket.recv_fds(connection, 4, 3)
    content = connection.recv(int.from_bytes(head, "little"), socket.MSG_WAITALL)
    program = os.fork()
    if program == 0:
        connection.close()
        return _run(*marshal.loads(content), changed, streams)
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(program)
    while ended not in select.select([connection, ended], [], [])[0]:
        number = connection.recv(1) or bytes([signal.SIGKILL])  # nothing: the command was killed
        os.kill(program, number[0])
    status = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    with contextlib.suppress(OSError):
        connection.send(status.to_bytes(4, "little", signed=True))
    os._exit(0)


def _run(words, folder, environment, cores, changed, streams):
    import runpy
    import types

    import numpy as np

    for target, stream in enumerate(streams):
        os.dup2(stream, target)
        os.close(stream)
    environment = {**changed, **environment}
    lines = 1 if "PYTHONUNBUFFERED" in environment else -1
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", lines, closefd=False)
    sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    os.sched_setaffinity(0, cores)
    np.random.seed()  # Python's own generator seeds itself anew
    option = words.pop(0) if words[0] in ("-m", "-c") else ""
    sys.argv = [option or words[0], *words[1:]]
    paths = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[0:1] = [folder if option else os.path.dirname(words[0]), *filter(None, paths)]
    if option == "-c":
        sys.modules["__main__"] = module = types.ModuleType("__main__")
        exec(compile(words[0], "<string>", "exec"), vars(module))
    elif option == "-m":
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    if sys.flags.isolated:
        # A sweep's launcher is followed by the sweep's own Python.
        main(sys.argv[2:] if sys.argv[1] == sys.executable else sys.argv[1:])
    else:
        serve(socket.socket(fileno=int(sys.argv[1])))
