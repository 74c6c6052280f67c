"""Pipelined products have the fence that PTX's memory model asks for; see `async_fence`."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from hnerv_clip import kernels
from hnerv_clip.bench import replay
from hnerv_clip.config import ConfigError
from hnerv_clip.kernels import async_fence

PIPELINED = """
	cp.async.commit_group;
$L__BB0_1:                              // =>This Inner Loop Header: Depth=1
	cp.async.wait_group 	2;
	bar.sync 	0;
	shfl.sync.idx.b32 	%r1, %r2, 0, 31, -1;
	wgmma.fence.sync.aligned;
	wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r3}, %rd1, %rd2, %p1, 1, 1, 0, 0;
	wgmma.commit_group.sync.aligned;
	wgmma.fence.sync.aligned;
	wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r4}, %rd1, %rd3, %p1, 1, 1, 0, 0;
	wgmma.commit_group.sync.aligned;
	bar.sync 	0;
	wgmma.fence.sync.aligned;
	wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r5}, %rd1, %rd3, %p1, 1, 1, 0, 0;
"""


def test_a_fence_comes_between_each_barrier_and_the_first_wgmma_after_it():
    fenced = async_fence.add_fences(PIPELINED)
    assert fenced.replace(async_fence.FENCE, "") == PIPELINED
    parts = fenced.split("bar.sync")
    assert ["fence.proxy.async" in part for part in parts] == [False, True, True]
    for part in parts[1:]:
        assert part.count("fence.proxy.async") == 1
        assert part.index("fence.proxy.async") < part.index("wgmma.fence")
    assert async_fence.add_fences(fenced) == fenced
    jump = PIPELINED.replace("\tbar.sync", "$L__BB0_2:\n\tst.shared", 2)
    assert async_fence.add_fences(jump).count("fence.proxy.async") == 2


@pytest.mark.parametrize("old, new", [("cp.async", "ld.global"), ("wgmma.mma_async", "mma.sync"),
                                      ("\tbar.sync 	0;\n", "\tbar.sync 	0;\n" + async_fence.FENCE)])
def test_what_needs_no_fence_stays_as_it_is(old, new):
    ptx = PIPELINED.replace(old, new)
    assert async_fence.add_fences(ptx) == ptx


def test_kernels_are_compiled_with_it_and_found_by_whether_they_have_it(tmp_path, monkeypatch):
    """For a Hopper GPU, here and by a process; nothing changes for others."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    script = Path(__file__).with_name("compile_fenced.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert all(row["by_process"] and row["cubin"] == b"\x7fELF".hex() for row in found)
    assert len({row["hash"] for row in found}) == len(found)
    ptx = {(row["arch"], row["enabled"]): row["ptx"] for row in found}
    fenced, plain = ptx[90, async_fence.lacking], ptx[90, False]
    assert "wgmma" in plain and "fence.proxy.async" in fenced
    assert fenced == async_fence.add_fences(fenced) == async_fence.add_fences(plain)
    assert (fenced != plain) == async_fence.lacking
    assert "cp.async" in ptx[80, False] and ptx[80, async_fence.lacking] == ptx[80, False]


def test_every_kernel_with_products_asks_for_it():
    products = {}
    for path in Path(kernels.__file__).parent.glob("*.py"):
        for part in ast.parse(path.read_text()).body:
            if isinstance(part, ast.FunctionDef) and "tl.dot(" in ast.unparse(part):
                products[part.name] = [ast.unparse(name) for name in part.decorator_list]
    assert len(products) >= 7
    assert all(names[0] == "with_async_fence" for names in products.values()), products


def test_a_replay_leaves_it_out_only_where_triton_does(monkeypatch):
    monkeypatch.setattr(async_fence, "lacking", False)
    command = ["--no-fence", "--out", "x.json", "-p", "data_path", "no such video"]
    with pytest.raises(ConfigError, match="Triton 3.7 or older"):
        replay.main(command)
    monkeypatch.setattr(async_fence, "lacking", True)
    try:
        for arguments, fenced in ((command[1:], True), (command, False)):
            with pytest.raises(ConfigError, match="no such video"):
                replay.main(arguments)
            assert async_fence.enabled == fenced
    finally:
        monkeypatch.undo()
        async_fence.enable()
