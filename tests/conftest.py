"""Shared by all tests: a small real dataset, prepared once, and small trained runs, trained once.

With pytest-xdist (`-n 2`) all workers share them, too.
"""

import contextlib
import functools
import gc
import os
import shutil

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several processes on few cores run faster so

import matplotlib
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # our kernels then run on the CPU; read at their import
    with contextlib.suppress(ImportError):  # made for Linux
        from triton.runtime import interpreter

        patch_tensor = interpreter._patch_lang_tensor

        def with_index(tensor, *scope):
            """Triton 3.6's arrays of one value are no index for NumPy 2.4."""
            patch_tensor(tensor, *scope)
            tensor.__index__ = lambda self: self.handle.data.item()

        interpreter._patch_lang_tensor = with_index
        launch, patched = interpreter.GridExecutor.__call__, set()

        def launch_anew(self, *args, **kwargs):
            patched.clear()
            return launch(self, *args, **kwargs)

        def call_helper(self, *args, **kwargs):
            """Triton patches its language at each call of a helper, which took half of the time;
            once a launch and module is enough."""
            if self.fn.__module__ not in patched:
                interpreter._patch_lang(self.fn)
                patched.add(self.fn.__module__)
            return self.rewrite()(*args, **kwargs)

        interpreter.GridExecutor.__call__ = launch_anew
        interpreter.InterpretedFunction.__call__ = call_helper

from hnerv_clip import video
from hnerv_clip.config import Config, VideoConfig

load_video = video.load_video
_decoded = functools.lru_cache(maxsize=8)(load_video)


def _load_video(config: VideoConfig, *args, **options):
    """Decodes each view of a built-in video once a session: most tests begin with it."""
    built_in = config.data_path in ("bunny", "bikes", "carphone")
    return (_decoded if built_in else load_video)(config, *args, **options)


video.load_video = _load_video  # before any module takes it from there

from hnerv_clip.dataset import prepare_dataset  # noqa: E402
from hnerv_clip.runs.locks import hold  # noqa: E402
from hnerv_clip.teachers import efficientnet  # noqa: E402
from hnerv_clip.teachers.base import preprocess  # noqa: E402

matplotlib.use("agg")
# A decoded frame that is garbage holds the decoder's threads: a fork that frees it waits for ever
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=gc.collect)
torch.set_num_threads(1)

# 12 frames of Big Buck Bunny at 80×160, every tenth so that they differ, and a network that fits
# them in seconds.
SMALL = dict(
    data_path="bunny", crop_list="640_1280", resize_list="80_160", frame_stride=10, frame_limit=12,
    data_split="4_5_5", teacher="efficientnet-lite0", clip_dim=1280, enc_strds="5 4 2 2",
    dec_strds="5 4 2 2", enc_dim="16_8", modelsize=0.05, epochs=4, pixel_loss_warmup_epochs=2,
    eval_freq=2, checkpoint_s=0, lr=5e-3, device="cpu")


# Files that take longest, so that no worker begins one when the other is done
LONG = ("test_notebooks", "test_book", "test_book_runs", "test_engine", "test_study", "test_train",
        "test_slurm", "test_scaling", "test_launch", "test_field", "test_bench", "test_hopper",
        "test_clip_head")


def pytest_collection_modifyitems(items):
    """Long files first; skip what is marked `gpu` where there is none."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def small_config() -> Config:
    """The configuration of `small_dataset`; vary it with `small_config.replace(...)`."""
    return Config.from_params(**SMALL)


@pytest.fixture(scope="session")
def shared_dir(tmp_path_factory):
    """A folder of this test session; all workers' together under pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def cache_dir(shared_dir):
    """A cache of teacher embeddings that all tests share."""
    return shared_dir / "cache"


@pytest.fixture(scope="session")
def small_dataset(small_config, cache_dir, shared_dir):
    """12 frames of 80×160 with 8 patches each, and the bundled teacher's embeddings."""
    with hold(shared_dir / "small_dataset.lock", wait=True):  # the teacher runs in one worker
        return prepare_dataset(small_config, cache_dir, device="cpu", progress=False)


@pytest.fixture(scope="session")
def trained_run(small_config, small_dataset, cache_dir, shared_dir):
    """The folder of a finished run of `small_config`, with the CLIP head. To read only:
    a test that changes it takes `trained_copy`."""
    return _train_once(small_config, shared_dir / "trained_run", cache_dir)


@pytest.fixture(scope="session")
def pixel_run(small_config, small_dataset, cache_dir, shared_dir):
    """The folder of a finished run without the CLIP head, likewise to read only."""
    return _train_once(small_config.replace(predict_clip=False, epochs=2),
                       shared_dir / "pixel_run", cache_dir)


@pytest.fixture
def trained_copy(trained_run, tmp_path):
    """A copy of `trained_run` that a test may change."""
    return shutil.copytree(trained_run, tmp_path / "main")


@pytest.fixture
def pixel_copy(pixel_run, tmp_path):
    """A copy of `pixel_run` that a test may change."""
    return shutil.copytree(pixel_run, tmp_path / "pixels")


def _train_once(config: Config, folder, cache_dir):
    from hnerv_clip.train import train

    with hold(folder.with_suffix(".lock"), wait=True):  # the next worker finds it finished
        return train(config, folder, cache_dir=cache_dir, progress=False).run_dir


def shrink_teacher_pictures(patch):
    """The bundled teacher sees 64×64: on a CPU a picture of its usual size takes it 12 ms.

    Use a cache of its own for what it then says.
    """
    patch.setattr(efficientnet, "preprocess", lambda patches, size, **scale: preprocess(
        patches, (64, 64), **scale))
