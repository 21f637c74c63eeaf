"""The CPU's kernels, compiled on the machine they run on by its own C++ compiler.

kernels.cpp -> a shared library in the user's cache -> functions. It takes seconds, once
per machine; without a compiler everything works by torch's operators.

Beware The compiler may use every instruction this CPU has, so a library is kept under a name that
       tells CPUs, compilers and sources apart: a home may be shared by different machines. And to
       load one that was cut short ends the process, so its name ends with its checksum.
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

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = [
    *("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC"),
    *("-fno-math-errno", "-fno-trapping-math"),  # or square roots would be taken one by one
]
_LONGEST_COMPILATION = 120  # seconds
_lock = threading.Lock()  # a process forked while a thread compiles gets one of its own
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: globals().update(_lock=threading.Lock()))
_found: ctypes.CDLL | str | None = None


def native_library() -> ctypes.CDLL | str:
    """The library, compiled if it has not been; or why there is none, as one sentence."""
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
            with suppress(OSError):  # of another system that shares this home
                if path.stem == f"native_{key}_{_checksum(path)}":
                    return ctypes.CDLL(str(path))
        return ctypes.CDLL(str(_compile(compiler, folder, key)))
    except subprocess.CalledProcessError as err:
        said = [line for line in err.stderr.splitlines() if "error" in line] or [err.stderr.strip()]
        return f"{err.cmd[0]} could not compile the native kernels: {said[0]}"
    except (OSError, ValueError, subprocess.SubprocessError) as err:
        return f"the native kernels could not be compiled and loaded: {err}"


def _compiler() -> list[str] | None:
    """The command; CXX may have more than one word."""
    asked = shlex.split(os.environ.get("CXX", ""))
    commands = [asked] if asked else [["g++"], ["c++"], ["clang++"]]
    return next((command for command in commands if shutil.which(command[0])), None)


def _key(compiler: list[str]) -> str:
    """What the library depends on."""
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
    """A folder that only this user writes to, as what lies there is run; one for this process alone
    where there is no such place."""
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
    """Beside where it is kept and renamed, as several processes may do so at once."""
    handle, part = tempfile.mkstemp(dir=folder, suffix=".part")
    os.close(handle)
    try:
        subprocess.run(
            [*compiler, *FLAGS, str(SOURCE), "-o", part],
            capture_output=True,
            check=True,
            text=True,
            timeout=_LONGEST_COMPILATION,
        )
        return Path(part).replace(folder / f"native_{key}_{_checksum(Path(part))}.so")
    finally:
        Path(part).unlink(missing_ok=True)
