"""Compiles the CPU's kernels on the machine they run on, with its own C++ compiler.

Room   kernels.cpp -> a shared library in the user's cache -> functions. This takes seconds, once
       per machine; without a compiler torch's operators do the same work.
Beware The compiler may use every instruction that this CPU has, and a home folder may be shared by
       different machines. So a library's name tells CPUs, compilers and sources apart.
       Loading a library that was cut short ends the process. So its name ends with its checksum.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

from hf_switch_sae.files import scratch_beside

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = [
    *("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC"),
    *("-fno-math-errno", "-fno-trapping-math"),  # else square roots are not vectorized
]
_LONGEST_COMPILATION = 120  # seconds
_lock = threading.Lock()  # a process that is forked while a thread compiles gets a new one
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: globals().update(_lock=threading.Lock()))
_found: ctypes.CDLL | str | None = None


def native_library() -> ctypes.CDLL | str:
    """The library, compiled if it is not there yet; or why there is none, as one sentence."""
    global _found
    if _found is None:
        with _lock:
            if _found is None:
                _found = _load()
    return _found


def _load() -> ctypes.CDLL | str:
    try:
        compiler = _compiler()
        if compiler is None:
            asked = os.environ.get("CXX")
            missing = f"CXX names {asked!r}, which is not there" if asked else "there is none"
            return f"the native kernels need a C++ compiler, and {missing}: install g++ or clang++."
        folder, key = _cache(), _key(compiler)
        for path in folder.glob(f"native_{key}_*.so"):
            with suppress(OSError):  # built by another system that shares this home
                if path.stem == f"native_{key}_{_checksum(path)}":
                    return ctypes.CDLL(str(path))
        return ctypes.CDLL(str(_compile(compiler, folder, key)))
    except subprocess.CalledProcessError as err:
        said = [line for line in err.stderr.splitlines() if "error" in line] or [err.stderr.strip()]
        return f"{err.cmd[0]} could not compile the native kernels: {said[0]}"
    except (OSError, ValueError, subprocess.SubprocessError) as err:
        return f"the native kernels could not be compiled and loaded: {err}"


def _compiler() -> list[str] | None:
    """The compiler's command, which may have several words if CXX names it; None without one."""
    asked = shlex.split(os.environ.get("CXX", ""))
    commands = [asked] if asked else [["g++"], ["c++"], ["clang++"]]
    return next((command for command in commands if shutil.which(command[0])), None)


def _key(compiler: list[str]) -> str:
    """A hash of all that the library depends on: sources, compiler, flags and CPU."""
    done = subprocess.run([*compiler, "--version"], capture_output=True, timeout=30)
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        told = ("flags", "Features", "model name", "CPU part")
        lines = info.read_text().splitlines()
        cpu = "".join(sorted({line for line in lines if line.startswith(told)}))
    command = " ".join([*compiler, *FLAGS])
    parts = (SOURCE.read_bytes(), command.encode(), done.stdout, cpu.encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _cache() -> Path:
    """A folder that only this user can write to, because what lies in it is run.

    If the user's cache is no such place, it is a temporary folder for this process alone.
    """
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_switch_sae"
    try:
        kept.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _is_own(kept):
            return kept
    except (OSError, RuntimeError):  # read-only, or no home
        pass
    own = tempfile.mkdtemp(prefix="hf_switch_sae_")
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return Path(own)


def _is_own(folder: Path) -> bool:
    status = folder.stat()
    if hasattr(os, "geteuid") and (status.st_uid != os.geteuid() or status.st_mode & 0o022):
        return False
    return os.access(folder, os.W_OK)


def _compile(compiler: list[str], folder: Path, key: str) -> Path:
    """Compile under a hidden name and rename, as several processes may do so at once."""
    with scratch_beside(folder / SOURCE.name) as part:
        subprocess.run(
            [*compiler, *FLAGS, str(SOURCE), "-o", str(part)],
            capture_output=True,
            check=True,
            text=True,
            timeout=_LONGEST_COMPILATION,
        )
        return part.replace(folder / f"native_{key}_{_checksum(part)}.so")
