"""`python` for the tests: programs run as forks of one process that has imported TensorFlow.

    python -IS tests/support/forked.py [python] -m MODULE ARGUMENTS      or -c CODE, or FILE

Importing TensorFlow takes longer than most of what the tests' programs do. This command does what
`python` does with the same words: it has the program's output, exit status and environment, and a
signal sent to it comes to the program. Only SIGSTOP stops this command alone. The environment must
be that of `tests.support.launch.environment`, which starts the process that forks.
"""

import marshal
import os
import select
import signal
import socket
import sys

ADDRESS = "NLCG_TESTS_FORKING"
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def start_server(folder):
    """Starts the process that forks, which ends with this one; returns its address."""
    import pathlib
    import subprocess

    address = os.path.join(folder, "socket")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    descriptor = listener.detach()
    command = [sys.executable, "-u", "-m", "tests.support.forked", str(descriptor)]
    streams = {"stdin": subprocess.PIPE, "stderr": open(f"{address}.log", "w")}
    root = pathlib.Path(__file__).parents[2]
    subprocess.Popen(command, pass_fds=[descriptor], cwd=root, **streams)
    os.close(descriptor)
    return address


def main(words):
    """The command: has its program run by the server, and ends as that does."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.environ[ADDRESS])
    for number in FORWARDED:
        signal.signal(number, lambda number, frame: connection.send(bytes([number])))
    content = marshal.dumps((words, os.getcwd(), dict(os.environ), os.sched_getaffinity(0)))
    socket.send_fds(connection, [len(content).to_bytes(4, "little")], [0, 1, 2])
    connection.sendall(content)
    answer = connection.recv(4)
    if not answer:
        with open(f"{os.environ[ADDRESS]}.log") as file:
            sys.exit(f"the process that forks has failed: {file.read()}")
    status = int.from_bytes(answer, "little", signed=True)
    if status < 0:
        if -status in FORWARDED:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def serve(listener):
    """Forks once for each command, until the tests have ended."""
    before = dict(os.environ)
    from trainers.engine.imports import import_tensorflow

    import_tensorflow()
    import gc

    import trainers.engine.run  # noqa: F401

    gc.freeze()  # nothing of this is looked through again when a fork ends
    changed = {name: x for name, x in os.environ.items() if before.get(name) != x}
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    while listener in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            return _watch_over(connection, changed)
        connection.close()


def _watch_over(connection, changed):
    """Runs a command's program in a fork; passes signals on, and the exit status back."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, streams, *_ = socket.recv_fds(connection, 4, 3)
    content = connection.recv(int.from_bytes(head, "little"), socket.MSG_WAITALL)
    words, folder, environment, cores = marshal.loads(content)
    program = os.fork()
    if program == 0:
        connection.close()
        os.sched_setaffinity(0, cores)
        return _run(words, folder, {**changed, **environment}, streams)
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(program)
    while ended not in select.select([connection, ended], [], [])[0]:
        number = connection.recv(1)
        if not number:  # the command was killed
            os.kill(program, signal.SIGKILL)
            os._exit(0)
        os.kill(program, number[0])
    status = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    connection.send(status.to_bytes(4, "little", signed=True))
    os._exit(0)


def _run(words, folder, environment, streams):
    import random
    import runpy
    import types

    import numpy as np

    for target, (stream, name) in enumerate(zip(streams, ("stdin", "stdout", "stderr"))):
        os.dup2(stream, target)
        os.close(stream)
        setattr(sys, name, open(target, "w" if target else "r", buffering=1, closefd=False))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    random.seed(), np.random.seed()  # otherwise all forks draw the same numbers
    option, *words = words if words[0] in ("-m", "-c") else ["", *words]
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
        main(sys.argv[2:] if sys.argv[1] == sys.executable else sys.argv[1:])
    else:
        serve(socket.socket(fileno=int(sys.argv[1])))
