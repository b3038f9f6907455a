"""Builds the fused op for the TensorFlow that is installed: `python -m nlcg_tf.fused.build`.

Needs g++ (or another compiler in CXX). `NLCG_CUDA=auto|0|1` leaves out or demands the GPU kernels;
auto builds them when nvcc is found (in PATH, or in CUDA_HOME) and TensorFlow was built for CUDA.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).parent
LIBRARY = "libnlcg_update.so"
COMPILED = ("nlcg_update_cpu.cc", "nlcg_update_op.cc", "nlcg_update_interface.cc")
SOURCES: tuple[str, ...] = (*COMPILED, "nlcg_update.h")
SOURCES += ("nlcg_update_stages.h", "nlcg_update_sweeps.h")
SOURCES += ("nlcg_update_inputs.h", "nlcg_update_devices.h")
SOURCES += ("nlcg_update_cuda.h", "nlcg_update_cuda.cu", "build.py")
# No -ffast-math, which breaks the checks for NaN; no contraction to FMA: all machines round alike.
# Nobody asks errno about a square root, which is not vectorised otherwise.
FLAGS = ["-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi"]
FLAGS.append("-Wno-deprecated-declarations")
ARCHITECTURES = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=[sm_90,compute_90]",
]


def sources_digest() -> str | None:
    """A digest of what the library is built from; `None` where the sources are not all there."""
    try:
        return hashlib.sha256(b"".join((HERE / name).read_bytes() for name in SOURCES)).hexdigest()
    except FileNotFoundError:
        return None


def build(folder: pathlib.Path = HERE) -> pathlib.Path:
    """Builds the library into `folder`.

    Args:
        folder: path; by default beside this file, where it is looked for.

    Returns:
        The path of the library.

    Raises:
        RuntimeError: if a compiler is missing or fails; its output is in the message.
    """
    import tensorflow as tf

    compiler = os.environ.get("CXX", "g++")
    if shutil.which(shlex.split(compiler)[0]) is None:
        raise RuntimeError(f"compiler {compiler!r} not found: install g++ or set CXX")
    nvcc = _nvcc(tf)
    if nvcc and os.environ.get("NLCG_CUDA", "auto") == "auto":
        try:
            return _build(folder, tf, compiler, nvcc)
        except RuntimeError as error:
            # An nvcc that does not know these GPUs or this g++ is no reason to have no op at all.
            print(f"building without CUDA, since its kernels failed: {error}", file=sys.stderr)
            nvcc = None
    return _build(folder, tf, compiler, nvcc)


def _build(folder, tf, compiler, nvcc):
    compile_flags = [*FLAGS, *tf.sysconfig.get_compile_flags()]
    info = {
        "tensorflow": tf.__version__,
        "compiler": _first_line([*shlex.split(compiler), "--version"]),
        # Without the paths of this machine, which say nothing on another.
        "flags": " ".join(flag for flag in compile_flags if not flag.startswith("-I")),
        "cuda": nvcc is not None,
        "sources": sources_digest(),
    }
    if folder != HERE and _is_built_so(HERE / LIBRARY, info):
        return pathlib.Path(shutil.copy(HERE / LIBRARY, folder))
    with tempfile.TemporaryDirectory(prefix=".", dir=folder) as work:
        commands, objects, links = [], [], tf.sysconfig.get_link_flags()
        defines = [f"-DNLCG_CUDA={int(nvcc is not None)}"]
        if nvcc:
            # The op sees the CUDA headers that TensorFlow was built with, the kernels nvcc's own.
            headers = pathlib.Path(tf.sysconfig.get_include(), "third_party/gpus/cuda/include")
            defines += ["-DEIGEN_USE_GPU", f"-I{headers}"]
            objects.append(_object(work, "nlcg_update_cuda.cu"))
            options = ["-O3", "-std=c++17", "-fmad=false", "-Xcompiler=-fPIC", *ARCHITECTURES]
            source = str(HERE / "nlcg_update_cuda.cu")
            commands.append([nvcc, *options, "-c", source, "-o", objects[-1]])
            # Before TensorFlow's libraries, which have a CUDA runtime of another version in them.
            runtime = [f"-L{_cuda_libraries(nvcc)}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
            links = [*runtime, "-Wl,--exclude-libs,libcudart_static.a", *links]
        record = pathlib.Path(work, "nlcg_build_info.cc")
        text = json.dumps(_record(info))
        record.write_text(f"extern __attribute__((used)) const char nlcg_build_info[] = {text};\n")
        for source in (*(HERE / name for name in COMPILED), record):
            objects.append(_object(work, source.name))
            command = [*shlex.split(compiler), *compile_flags, *defines, f"-I{HERE}"]
            commands.append([*command, "-c", str(source), "-o", objects[-1]])
        with concurrent.futures.ThreadPoolExecutor() as pool:
            list(pool.map(_run, commands))
        finished = pathlib.Path(work, LIBRARY)
        _run([*shlex.split(compiler), "-shared", *objects, "-o", str(finished), *links])
        finished.chmod(0o755)
        # In one step: a process that has the old library loaded keeps it.
        return finished.replace(pathlib.Path(folder, LIBRARY))


def _is_built_so(library, info):
    """Whether a library of this checkout, for a wheel, is what a build would make."""
    try:
        return _record(info).encode() in library.read_bytes()
    except FileNotFoundError:
        return False


def _record(info):
    return f"nlcg_build_info:{json.dumps(info)}"


def _nvcc(tf):
    choice = os.environ.get("NLCG_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise RuntimeError(f"NLCG_CUDA must be auto, 0 or 1. Received: NLCG_CUDA={choice!r}")
    places = (
        [str(pathlib.Path(os.environ["CUDA_HOME"], "bin"))] if "CUDA_HOME" in os.environ else []
    )
    nvcc = shutil.which("nvcc", path=os.pathsep.join([*places, os.environ.get("PATH", "")]))
    if choice == "1" and not (nvcc and tf.test.is_built_with_cuda()):
        missing = "nvcc was not found" if not nvcc else "this TensorFlow is built without CUDA"
        raise RuntimeError(f"NLCG_CUDA=1, but {missing}")
    return nvcc if choice != "0" and tf.test.is_built_with_cuda() else None


def _cuda_libraries(nvcc):
    """The folder of nvcc's libraries; nvcc itself knows it, whatever script starts it."""
    command = [nvcc, "--dryrun", "-c", str(HERE / "nlcg_update_cuda.cu")]
    output = subprocess.run(command, capture_output=True, text=True)
    top = re.search(r"TOP=(.+)", output.stdout + output.stderr)
    if not top:
        raise RuntimeError(f"{nvcc} does not tell where its libraries are")
    return pathlib.Path(top[1].strip()).resolve() / "lib64"


def _object(work, source):
    return str(pathlib.Path(work, source).with_suffix(".o"))


def _first_line(command):
    return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0]


def _run(command):
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{result.stdout}{result.stderr}")


if __name__ == "__main__":
    try:
        print(f"built {build()}")
    except RuntimeError as failure:
        sys.exit(f"error: the fused op could not be built: {failure}")
