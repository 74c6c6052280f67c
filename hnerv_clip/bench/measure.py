"""Speed on this machine: warmed up, synchronized, medians with their spread.

Every part gives rows of plain values, which one JSON file collects, also from several calls.
Training is measured on the video of the configuration with random unit vectors in place of the
teacher's embeddings, which no time depends on. Frames are decoded, and the model is evaluated,
outside the clock.
"""

from __future__ import annotations

import gc
import itertools
import math
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from hnerv_clip.bench.context import CLOCKS, Bench, random_embeddings, run_record
from hnerv_clip.bench.decoding import decoders, measure_decoding
from hnerv_clip.bench.flops import count_work
from hnerv_clip.bench.profiling import profile_step
from hnerv_clip.config import Config, ConfigError, TeacherConfig
from hnerv_clip.dataset import Dataset, prepare_dataset
from hnerv_clip.devices import resolve_precision, set_precision, synchronise
from hnerv_clip.engines.select import make_engine
from hnerv_clip.model import build_model, plan_model
from hnerv_clip.patches import make_grid
from hnerv_clip.runs.run_dir import RunDir
from hnerv_clip.teachers import load_teacher, run_teacher
from hnerv_clip.train import epoch_order, train
from hnerv_clip.video import split_frames

# (engine, precision) that training is measured with
GPU_ENGINES = (("auto", "bf16"), ("plain", "tf32"), ("plain", "fp32"))
CPU_ENGINES = (("plain", "fp32"), ("plain", "bf16"))
EMBEDS = ("", "xyt_1.25_80")
# What `scaling` varies, one at a time
RESOLUTIONS = (0.5, 1, 2)  # of the frame's sides
MODEL_SIZES = (0.25, 0.5, 1, 2)  # of modelsize
BATCH_SIZES = (1, 2, 4, 8)
PATCH_GRIDS = ("1_2", "2_4", "4_8", "8_16")
FRAME_COUNTS = (0.25, 1, 4)  # of the video's
CLIP_MODEL = "ViT-B-32-quickgelu"


# The parts: each yields rows
def measure_ceilings(bench: Bench) -> Iterator[dict[str, Any]]:
    """Peak rates of the device: matrix products, and copies within its memory."""
    size = 8192 if bench.on_gpu else 1024
    often = {"warm_up": 3, "repeats": 7, "repeat_s": 0.3}
    for precision in ("bf16", "tf32", "fp32") if bench.on_gpu else ("bf16", "fp32"):
        dtype = set_precision(precision, bench.device)
        a, b = torch.randn(2, size, size, device=bench.device).to(dtype)
        seconds = bench.clock(lambda a=a, b=b: a @ b, **often)
        yield {"what": f"product of {size}×{size} matrices", "precision": precision,
               **_rates("tflop_per_s", 2 * size**3 / 1e12, seconds)}
    source = torch.randn(2**28 if bench.on_gpu else 2**25, device=bench.device)
    target = torch.empty_like(source)
    seconds = bench.clock(lambda: target.copy_(source), **often)
    yield {"what": f"copy of {source.nbytes / 2**30:.3g} GiB, read and written", "precision": "",
           **_rates("gb_per_s", 2 * source.nbytes / 1e9, seconds)}


def _rates(name: str, work: float, seconds: list[float]) -> dict[str, Any]:
    return {name: work / median(seconds), f"{name}_min": work / max(seconds),
            f"{name}_max": work / min(seconds), "n": len(seconds)}


def measure_train(bench: Bench) -> Iterator[dict[str, Any]]:
    """A training step, with and without CLIP head, from frames and from coordinates.

    An `engine` or `precision` other than `auto` in the configuration leaves the others out.
    """
    wanted = bench.config.train
    engines = [(engine, precision) for engine, precision in
               (GPU_ENGINES if bench.on_gpu else CPU_ENGINES)
               if wanted.engine in ("auto", engine) and wanted.precision in ("auto", precision)]
    engines = engines or [(wanted.engine, wanted.precision)]
    dataset = bench.dataset(bench.config.replace(predict_clip=True))
    for embed, (engine, precision), clip_head in itertools.product(EMBEDS, engines, (True, False)):
        if not bench.on_gpu and (embed != "") + (precision == "bf16") + (not clip_head) > 1:
            continue  # a CPU's time is short: one change at a time
        config = bench.config.replace(embed=embed, engine=engine, precision=precision,
                                      predict_clip=clip_head)
        yield {"embed": embed, "clip_head": clip_head,
               "precision": resolve_precision(precision, bench.device),
               **time_training(bench, config, dataset)}


def time_training(bench: Bench, config: Config, dataset: Dataset) -> dict[str, Any]:
    """A fresh model's training step: time, memory, and the work counted.

    Returns:
        engine (that ran), batch_size, step_ms (median, min, max over n repeats), frames_per_s,
        compile_s, peak_memory_bytes (GPU), gflop_per_frame and gb_per_frame (counted, see
        `count_work`); or `failed`, why not.
    """
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats(bench.device)
    try:
        return _time_training(bench, config, dataset)
    except Exception as error:  # memory and compilers fail in many ways; other rows still count
        return {"engine": config.train.engine, "batch_size": config.train.batch_size,
                "failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
    finally:
        gc.collect()
        if bench.on_gpu:
            torch.cuda.empty_cache()


def _time_training(bench: Bench, config: Config, dataset: Dataset) -> dict[str, Any]:
    autocast = set_precision(config.train.precision, bench.device)
    model = build_model(config.model, frame_hw=dataset.video.frame_hw,
                        frame_count=len(dataset.video.frames), seed=config.train.seed)
    model.to(bench.device, memory_format=torch.channels_last)
    engine = make_engine(config, model, dataset, autocast=autocast)
    size = config.train.batch_size
    order = epoch_order(dataset.split.train, seed=config.train.seed, epoch=0)
    order = order.repeat(-(-size // len(order))).to(bench.device)
    batches = itertools.cycle([batch for batch in order.split(size) if len(batch) == size])
    weight = config.train.clip_loss_weight if config.model.predict_clip else 0.0

    def step() -> Tensor:
        return engine.step(next(batches), count=size, lr=config.train.lr / 10, weight=weight)

    start = time.perf_counter()
    sums = step()
    synchronise(bench.device)
    first_s = time.perf_counter() - start
    seconds = bench.clock(step, warm_up=10 if bench.on_gpu else 0)
    if bench.on_gpu:
        sums = step()
    if not sums.isfinite().all():
        raise RuntimeError("the loss is not finite")
    ran = type(engine).__name__.removesuffix("Engine").lower()
    row = {"engine": ran, "batch_size": size,
           "step_ms": 1e3 * median(seconds), "step_ms_min": 1e3 * min(seconds),
           "step_ms_max": 1e3 * max(seconds), "n": len(seconds),
           "frames_per_s": size / median(seconds),
           "compile_s": engine.compile_s or (None if ran == "plain" else first_s),
           "peak_memory_bytes": torch.cuda.max_memory_allocated(bench.device)
           if bench.on_gpu else None}
    return row | _counted(config, dataset)


def _counted(config: Config, dataset: Dataset) -> dict[str, float]:
    """Arithmetic and bytes of training on a frame; see `count_work`."""
    frame_hw = dataset.video.frame_hw
    plan = plan_model(config.model, frame_hw=frame_hw, frame_count=len(dataset.video.frames))
    layers = count_work(config.model, plan, frame_hw=frame_hw, patch_count=len(dataset.grid))
    size_bytes = 2 if config.train.precision == "bf16" else 4
    return {"gflop_per_frame": 3 * 2 * sum(layer.macs for layer in layers) / 1e9,
            "gb_per_frame": 3 * size_bytes * sum(layer.values for layer in layers) / 1e9}


def measure_profile(bench: Bench) -> Iterator[dict[str, Any]]:
    """The parts of a training step, by the plain engine, and on a GPU also by the fused one."""
    config = bench.config.replace(embed="", predict_clip=True)
    if bench.on_gpu:
        config = config.replace(precision="bf16")
    dataset = bench.dataset(config)
    for name in ("plain", "fast") if bench.on_gpu else ("plain",):
        config = config.replace(engine=name)
        autocast = set_precision(config.train.precision, bench.device)
        model = build_model(config.model, frame_hw=dataset.video.frame_hw,
                            frame_count=len(dataset.video.frames), seed=config.train.seed)
        model.to(bench.device, memory_format=torch.channels_last)
        engine = make_engine(config, model, dataset, autocast=autocast)
        indices = torch.as_tensor(dataset.split.train[:config.train.batch_size],
                                  device=bench.device)
        times = profile_step(engine, indices, weight=config.train.clip_loss_weight,
                             repeats=5 if bench.on_gpu else 1)
        yield from ({"engine": type(engine).__name__.removesuffix("Engine").lower(),
                     "precision": resolve_precision(config.train.precision, bench.device),
                     "part": part, "ms": ms} for part, ms in times.items())


def fill_shares(results: dict[str, Any]) -> None:
    """What shares of the best measured ceilings training fills: compute_share, bandwidth_share."""
    best = {(row["precision"], measure): row[f"{measure}_max"]
            for row in results["parts"].get("ceilings", [])
            for measure in ("tflop_per_s", "gb_per_s") if measure in row}
    for row in results["parts"].get("train", []):
        if "failed" not in row:
            compute, copy = best.get((row["precision"], "tflop_per_s")), best.get(("", "gb_per_s"))
            gflop_per_s = row["frames_per_s"] * row["gflop_per_frame"]
            row["compute_share"] = compute and gflop_per_s / 1e3 / compute
            row["bandwidth_share"] = copy and row["frames_per_s"] * row["gb_per_frame"] / copy


def measure_scaling(bench: Bench) -> Iterator[dict[str, Any]]:
    """How a step's time grows with one thing at a time, by the engine and precision in use.

    On a CPU from half the frame's sides, where the strides divide them, and fewer values.
    """
    config = bench.config.replace(embed="", predict_clip=True)
    if bench.on_gpu and config.train.precision == "auto":
        config = config.replace(precision="bf16")
    dataset = bench.dataset(config)
    (height, width), count = dataset.video.frame_hw, len(dataset.video.frames)
    unit = math.prod(config.model.enc_strds)
    sides = {f: (round(height * f), round(width * f)) for f in RESOLUTIONS
             if height * f % unit == 0 and width * f % unit == 0}
    base_hw = sides.get(1 if bench.on_gpu else 0.5, (height, width))
    own_grid = config.params()["patch_grid"]
    base = {"hw": base_hw, "modelsize": config.model.modelsize, "patch_grid": own_grid,
            "batch_size": config.train.batch_size, "frames": count}
    if not bench.on_gpu:
        sides.pop(2, None)
    last = None if bench.on_gpu else -1  # the largest values are left to a GPU
    axes = {"resolution": [{"hw": hw} for hw in sides.values()],
            "modelsize": [{"modelsize": round(f * base["modelsize"], 4)}
                          for f in MODEL_SIZES[:last]],
            "batch_size": [{"batch_size": size} for size in BATCH_SIZES[:last]],
            "patches": [{"patch_grid": grid} for grid in PATCH_GRIDS[:last]],
            "frames": [{"frames": max(2, round(f * count))} for f in FRAME_COUNTS[:last]]}
    measured: dict[tuple, dict[str, Any]] = {}
    for axis, changes in axes.items():
        for change in changes:
            setting = base | change
            key = tuple(setting.values())
            if key not in measured:
                varied = config.replace(**{name: setting[name] for name in
                                           ("modelsize", "patch_grid", "batch_size")})
                measured[key] = _time_varied(bench, varied, dataset, frame_hw=setting["hw"],
                                             frame_count=setting["frames"])
            yield {"axis": axis, **measured[key]}


def _time_varied(bench: Bench, config: Config, dataset: Dataset, *, frame_hw: tuple[int, int],
                 frame_count: int) -> dict[str, Any]:
    """`time_training` on the video's frames tiled or cut to another size and number."""
    index = [torch.arange(n) % have for n, have in
             zip((frame_count, *frame_hw), (dataset.video.frames[:, 0].shape))]
    frames = dataset.video.frames[index[0]][:, :, index[1]][..., index[2]]
    varied = replace(dataset, video=replace(dataset.video, frames=frames.contiguous()),
                     grid=make_grid(config.teacher, frame_hw), mask=None,
                     split=split_frames(frame_count, config.video.data_split,
                                        config.video.split_phase))
    varied.embeddings = random_embeddings(varied, config)
    return {"frame": f"{frame_hw[0]}×{frame_hw[1]}", "pixels": math.prod(frame_hw),
            "modelsize": config.model.modelsize, "patches": len(varied.grid),
            "frames": frame_count,
            "precision": resolve_precision(config.train.precision, bench.device),
            **time_training(bench, config, varied)}


def measure_decode(bench: Bench) -> Iterator[dict[str, Any]]:
    """Frames, and embeddings at the patch centers, from stored per-frame embeddings."""
    config = bench.config.replace(predict_clip=True)
    if bench.on_gpu and config.train.precision == "auto":
        config = config.replace(precision="bf16")
    precision = config.train.precision
    set_precision(precision, bench.device)
    dataset = bench.dataset(config)
    model = build_model(config.model, frame_hw=dataset.video.frame_hw,
                        frame_count=len(dataset.video.frames))
    model.to(bench.device, memory_format=torch.channels_last).eval()
    for batch_size in (1, 4, 16) if bench.on_gpu else (1,):
        for decoder in decoders(model):
            yield from measure_decoding(model, dataset, batch_size=batch_size, decoder=decoder,
                                        repeats=bench.repeats).to_dict("records")


def measure_teacher(bench: Bench) -> Iterator[dict[str, Any]]:
    """Patches a second through the teachers' own path, from frames in memory to embeddings there.

    ViT-B-32 has random weights, which are as fast as trained ones.
    """
    dataset = bench.dataset(bench.config.replace(predict_clip=True))
    frames = dataset.video.frames if bench.on_gpu else dataset.video.frames[:4]
    set_precision("fp32", bench.device)
    with tempfile.TemporaryDirectory() as folder:
        weights = _random_clip(Path(folder) / "random.pt")
        for config in (TeacherConfig(clip_model=CLIP_MODEL, clip_pretrained=str(weights)),
                       TeacherConfig(teacher="efficientnet-lite0")):
            exact = None
            for precision in ("fp32", "bf16") if bench.on_gpu and config.teacher == "clip" \
                    else ("fp32",):
                teacher = load_teacher(replace(config, teacher_precision=precision), bench.device)

                def run(teacher=teacher) -> Tensor:
                    return run_teacher(teacher, frames, dataset.grid, progress=False)

                embeddings = run()
                exact = embeddings if exact is None else exact
                seconds = bench.clock(run)
                yield {"teacher": f"{CLIP_MODEL}, random weights" if teacher.is_clip
                       else teacher.label, "precision": precision,
                       **_rates("patches_per_s", len(frames) * len(dataset.grid), seconds),
                       "patches": len(frames) * len(dataset.grid),
                       "cosine_to_fp32_min": (embeddings * exact).sum(-1).min().item()}


def _random_clip(path: Path) -> Path:
    import open_clip

    with warnings.catch_warnings():  # it warns of what is wanted here: no pretrained weights
        warnings.simplefilter("ignore")
        torch.save(open_clip.create_model(CLIP_MODEL).state_dict(), path)
    return path


def measure_fit(bench: Bench) -> Iterator[dict[str, Any]]:
    """A whole training: where its wall clock goes, and what it reaches.

    The wall clock starts before the video is loaded; `import_s`, the time before, is not in it.
    """
    run = RunDir(bench.outf)
    if run.finished or (run.path / "metrics.csv").exists():
        raise ConfigError(f"outf={str(bench.outf)!r} holds a run already, whose wall clock is gone;"
                          " give a new folder")
    start = time.perf_counter()
    dataset = prepare_dataset(bench.config, bench.cache_dir, device=bench.device)
    data_s = time.perf_counter() - start
    train(bench.config, bench.outf, cache_dir=bench.cache_dir, dataset=dataset)
    wall_s = time.perf_counter() - start
    row = {"run": run.path.name, **run_record(run), "import_s": bench.import_s,
           "data_s": data_s, "wall_s": wall_s}
    yield row | {"rest_s": wall_s - sum(row[name] or 0 for name in CLOCKS)}
