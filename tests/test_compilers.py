"""Processes that compile leave nobody waiting, and nothing running; `compile_kernels.py` shows that
what they compile is found."""

import subprocess
import sys
import threading
import time
from contextlib import nullcontext

import psutil
import pytest
import torch

pytest.importorskip("triton")  # made for Linux; without it training is plain

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from hnerv_clip.kernels.compile_workers import Compilers, NamedGPU
from hnerv_clip.kernels.launch import build_all


def test_what_cannot_be_compiled_is_said_and_a_process_that_died_is_not_waited_for():
    compilers = Compilers()
    assert "no_such_module" in compilers.compile(
        '["no_such_module", "x", "{}", ["cuda", 90, 32], true]')
    assert "has no attribute 'x'" in compilers.compile(
        '["hnerv_clip.kernels.tiles", "x", "{}", ["cuda", 90, 32], true]')  # by the same process
    process, = compilers._all
    process.kill()
    assert compilers.compile("[]") == compilers.compile("[]") == "the process is gone"
    compilers.close()
    assert process.poll() is not None


def test_each_thread_has_its_process_and_closing_ends_them():
    compilers = Compilers()
    threads = [threading.Thread(target=compilers.compile, args=["[]"]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({process.pid for process in compilers._all}) == 2
    compilers.close()
    assert all(process.returncode == 0 for process in compilers._all)


def test_they_end_when_who_started_them_is_killed():
    script = """
from hnerv_clip.kernels.compile_workers import Compilers
compilers = Compilers()
compilers.compile("[]")
print(compilers._all[0].pid, flush=True)
input()
"""
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as parent:
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    gone, alive = psutil.wait_procs([child], timeout=20)
    assert not alive


class SlowToLoad:
    """A kernel that takes a while to load, and notes how many are loaded at once."""

    params, arg_names, at_once, most = (), (), 0, 0

    def __init__(self, name):
        self.__name__ = name

    def warmup(self, *, grid):
        return self

    def _init_handles(self):
        cls = type(self)
        cls.at_once += 1
        cls.most = max(cls.most, cls.at_once)
        time.sleep(0.01)
        cls.at_once -= 1


def test_kernels_are_loaded_one_at_a_time(monkeypatch, tmp_path):
    """Triton 3.6 gives a thread another kernel's launch function otherwise, see `launch`."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(driver, "_active", NamedGPU(GPUTarget("cuda", 90, 32)))
    build_all([(SlowToLoad(f"kernel {i}"), (1,), (), {}) for i in range(6)], cores=6)
    assert SlowToLoad.most == 1
