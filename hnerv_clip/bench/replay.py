"""Whether a training step gives the same bits each time, beside whatever else the GPU does.

    python -m hnerv_clip.bench.replay --minutes 4 --out output/replay.json -p data_path bunny

sets the fused engine up for a run with these settings, repeats steps with a learning rate of 0, so
that weights stay as they are, and compares every buffer with what it held after the first ones.
Start several at once to see what sharing a GPU does, and some with `--no-fence` to see what
`kernels.async_fence` does.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from hnerv_clip.config import Config, ConfigError
from hnerv_clip.dataset import prepare_dataset, resolve_config
from hnerv_clip.engines.fused.engine import FusedEngine
from hnerv_clip.files import check_free, write_json
from hnerv_clip.kernels import async_fence
from hnerv_clip.paths import resolve_path
from hnerv_clip.runs.provenance import code_version, device_name
from hnerv_clip.runs.run_dir import RunDir
from hnerv_clip.train.trainer import Trainer

WARM_UP_STEPS = 300  # of training, at the run's learning rate: weights as they are in use
BATCHES = 3  # that are replayed in turn
CHECK_STEPS = 100  # between two looks at the counts, which wait for the GPU


def step_buffers(engine: FusedEngine, size: int) -> dict[str, Tensor]:
    """What a step of `size` frames writes, by name, but for the optimizer's state."""
    network, parameters = engine.networks[size], engine.parameters
    head, decoder, work = network.rgb_head, network.decoder, network.work
    lists = {name: getattr(decoder, name) for name in ("pre", "dpre", "features", "dfeatures",
                                                       "dbias")}
    found = {"grad": parameters.grad, "param": parameters.param,
             "param_bf16": parameters.param_bf16, "dout": head.dout, "rgb_dbias": head.dbias,
             "squared_error": head.squared_error,
             **{f"{name} {i}": buffer for name, buffers in lists.items()
                for i, buffer in enumerate(buffers)},
             **work.buffers, **{f"partial sums {at}": sums for at, sums in work.partials.items()}}
    return {name: buffer for name, buffer in found.items() if buffer.is_contiguous()}


def replay(engine: FusedEngine, batches: Sequence[Tensor], *, weight: float, seconds: float,
           check_steps: int = CHECK_STEPS) -> dict[str, Any]:
    """Repeat the steps of some batches with fixed weights, and count what differs.

    Args:
        batches: int64 [B] frames each, of one size, on the device.
        weight: λ of the cosine term.
        seconds: that it goes on for, at least `check_steps` steps.
    Returns:
        steps, buffers (how many are compared), differing (checks of `check_steps` steps in which
        one differed) and events, of each such check the steps so far and {buffer: steps in which
        it differed}.
    """
    settings = dict(count=len(batches[0]), lr=0.0, weight=weight)
    expected = []
    for batch in batches:
        for _ in range(3):  # made, captured, replayed
            engine.step(batch, **settings)
        buffers = step_buffers(engine, len(batch))
        expected.append({name: _bits(buffer).clone() for name, buffer in buffers.items()})
    counts = torch.zeros(len(buffers), dtype=torch.int64, device=engine.device)
    steps, events, end = 0, [], time.monotonic() + seconds
    while not steps or time.monotonic() < end:
        for _ in range(check_steps):
            turn = steps % len(batches)
            engine.step(batches[turn], **settings)
            counts += torch.stack([(_bits(buffer) != expected[turn][name]).any()
                                   for name, buffer in buffers.items()])
            steps += 1
        wrong = {name: count for name, count in zip(buffers, counts.tolist()) if count}
        if wrong:
            events.append({"steps": steps, "wrong": wrong})
            counts.zero_()
    return {"steps": steps, "buffers": len(buffers), "differing": len(events), "events": events}


def _bits(buffer: Tensor) -> Tensor:
    """A buffer's bits as integers: NaN equals itself, and 0 is not −0."""
    kinds = {2: torch.int16, 4: torch.int32}
    return buffer.view(kinds.get(buffer.element_size(), buffer.dtype))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line above.

    Raises:
        ConfigError: the settings are refused, or this machine has no fused engine for them.
        RunError: OUT is there.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                        help="a setting, as of hnerv-clip train")
    parser.add_argument("--minutes", type=float, default=4)
    parser.add_argument("--out", type=Path, required=True, help="a new JSON file")
    parser.add_argument("--force", action="store_true", help="replace OUT")
    parser.add_argument("--cache_dir", default="output/cache")
    parser.add_argument("--no-fence", action="store_true", help="leave out of the products of "
                        "Triton's kernels the fence that Triton before 3.8 leaves out")
    args = parser.parse_args(argv)
    check_free(resolve_path(args.out), force=args.force)
    if args.no_fence and not async_fence.lacking:
        raise ConfigError(f"--no-fence: Triton {triton.__version__} emits the fence itself; use "
                          "Triton 3.7 or older, or leave the option out")
    async_fence.enable(not args.no_fence)
    config = resolve_config(Config.from_params(**{
        "precision": "bf16", "engine": "fast", **dict(args.p)}))
    if config.model.predict_clip and config.train.clip_jitter:
        raise ConfigError(f"clip_jitter={config.train.clip_jitter} moves the patches from step to "
                          "step; use 0")
    dataset = prepare_dataset(config, args.cache_dir)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, RunDir.create(Path(folder) / "run", config), dataset)
    size, engine = config.train.batch_size, trainer.engine
    batches = torch.as_tensor(dataset.split.train[:BATCHES * size],
                              device=trainer.device).split(size)
    weight = config.train.clip_loss_weight if config.model.predict_clip else 0.0
    for i in range(WARM_UP_STEPS):
        engine.step(batches[i % len(batches)], count=size, lr=config.train.lr, weight=weight)
    found = replay(engine, batches, weight=weight, seconds=60 * args.minutes)
    commit, dirty = code_version()
    write_json(resolve_path(args.out), {
        "commit": commit, "dirty": dirty, "device": device_name(trainer.device),
        "fence": not args.no_fence, "settings": config.params(), **found})
    print(f"{found['steps']:,} steps, {found['buffers']} buffers: {found['differing'] or 'none'} "
          "differing")


if __name__ == "__main__":
    main()
