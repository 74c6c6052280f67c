"""Held-out frames, estimated from the given frames beside them and trained on as if given.

A network that sees every other frame only decodes the others from interpolated embeddings. Here
frame interpolation puts an estimate in the place of each held-out frame: its two neighbors, warped
by half of the optical flow between them, and averaged. The network trains on given and estimated
frames alike, and both its picture from the interpolated embedding and that from the estimate's own
are compared with the held-out frame, which nothing else has seen:

    python -m hnerv_clip.study.between output/between -p data_path bunny -p preset best
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from hnerv_clip.config import Config, ConfigError
from hnerv_clip.dataset import prepare_dataset
from hnerv_clip.devices import select_device
from hnerv_clip.files import write_json
from hnerv_clip.inference import interpolate_embeddings, load_run
from hnerv_clip.metrics import psnr
from hnerv_clip.model import HNeRV
from hnerv_clip.paths import resolve_path
from hnerv_clip.runs.provenance import code_version, device_name
from hnerv_clip.train import train
from hnerv_clip.video import frames_digest, load_video

LEAST_SIDE = 10  # of the pyramid's coarsest level
LEAST_FRAMES = 5  # so that one given frame has two given neighbors
TOGETHER = 8  # pairs of frames at once
SMOOTH = (0.1, 0.3, 1.0)  # weights of the flow's total variation: the best is taken


def estimate_between(before: Tensor, after: Tensor, *, smooth: float = 0.3, steps: int = 80,
                     lr: float = 0.15) -> Tensor:
    """Frames half way between two: frame interpolation by optical flow, coarse to fine.

    In the manner of Brox et al. 2004 (brightness and gradient constancy, coarse-to-fine warping)
    and of TV-L1 (Zach, Pock and Bischof 2007): at every level of a pyramid, the smoothed absolute
    difference of the two frames and half that of their gradients, plus the flow's total variation,
    weighted down at edges of the picture. Unlike there, one symmetric flow warps both frames to
    the middle, and Adam minimises. Occlusions are not treated.

    Args:
        before, after: [B, 3, H, W] float in [0, 1].
        smooth: weight of the total variation.
        steps: at every level.
        lr: of Adam, in pixels of the level.
    Returns:
        [B, 3, H, W].
    """
    sizes = [before.shape[2:]]
    while min(sizes[-1]) >= 2 * LEAST_SIDE:
        sizes.append(torch.Size(side // 2 for side in sizes[-1]))
    flow = before.new_zeros(len(before), 2, *sizes[-1])  # x and y of its half, in pixels
    for size in reversed(sizes):
        grown = flow.new_tensor([size[1] / flow.shape[3], size[0] / flow.shape[2]])
        flow = F.interpolate(flow, size, mode="bilinear") * grown.view(1, 2, 1, 1)
        first, second = (F.interpolate(x, size, mode="area") for x in (before, after))
        weights = [torch.exp(-10 * d.abs().mean(1, keepdim=True))  # less at edges
                   for d in _gradients(first + second)]
        flow.requires_grad_()
        optimizer = torch.optim.Adam([flow], lr=lr)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps) + lr / 15
            error = _warp(first, -flow) - _warp(second, flow)
            loss = (error.square() + 1e-6).sqrt().mean() + sum(
                gradient.abs().mean() for gradient in _gradients(error)) / 2 + smooth * sum(
                (weight * (gradient.square() + 1e-4).sqrt()).mean()
                for weight, gradient in zip(weights, _gradients(flow), strict=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        flow = flow.detach()
    return (_warp(before, -flow) + _warp(after, flow)) / 2


def _gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbors along the rows and along the columns."""
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def _warp(frames: Tensor, flow: Tensor) -> Tensor:
    """Frames [B, 3, H, W], each pixel read where a flow [B, 2, H, W] in pixels points to; edges are
    repeated."""
    height, width = frames.shape[2:]
    rows = torch.arange(height, device=frames.device)[:, None] + flow[:, 1]
    columns = torch.arange(width, device=frames.device) + flow[:, 0]
    grid = torch.stack([columns / (width - 1), rows / (height - 1)], -1) * 2 - 1
    return F.grid_sample(frames, grid, padding_mode="border", align_corners=True)


def estimate_all(frames: Tensor, first: list[int], second: list[int], *, smooth: float) -> Tensor:
    """`estimate_between` of frames [T, 3, H, W] uint8 by their indices, a few at a time."""
    parts = zip(torch.tensor(first).split(TOGETHER), torch.tensor(second).split(TOGETHER))
    return torch.cat([estimate_between(frames[a].float() / 255, frames[b].float() / 255,
                                       smooth=smooth) for a, b in parts])


def estimate_held_out(frames: Tensor) -> tuple[Tensor, float]:
    """A video whose every other frame is estimated from its two neighbors.

    Of the weights `SMOOTH` the one is taken with the highest PSNR where every 6th given frame is
    estimated in turn from the given ones before and after it, over twice the distance of the
    neighbors of a held-out frame. A last frame without a second neighbor repeats the first.

    Args:
        frames: [T, 3, H, W] uint8; frames 1, 3, … are held out and only replaced.
    Returns:
        [T, 3, H, W] uint8, and the weight.
    Raises:
        ConfigError: fewer than 5 frames.
    """
    count = len(frames)
    if count < LEAST_FRAMES:
        raise ConfigError(f"a video of {count} frames is too short: at least {LEAST_FRAMES} are "
                          "needed to choose how smooth the optical flow is; give a longer one, or "
                          "a higher frame_limit")
    tries = list(range(2, count - 2, 2))[::6]  # given ones with two given neighbors

    def score(smooth: float) -> float:
        found = estimate_all(frames, [i - 2 for i in tries], [i + 2 for i in tries], smooth=smooth)
        return float(psnr(found, frames[tries].float() / 255).mean())

    smooth = max(SMOOTH, key=score)
    made, held = frames.clone(), list(range(1, count, 2))
    inner = [i for i in held if i + 1 < count]
    found = estimate_all(frames, [i - 1 for i in inner], [i + 1 for i in inner], smooth=smooth)
    made[inner] = (found * 255).round().to(torch.uint8)
    if held[-1] not in inner:
        made[held[-1]] = frames[held[-1] - 1]
    return made, smooth


def write_frames(frames: Tensor, folder: Path) -> tuple[Path, str]:
    """Frames as images of a folder of their own, which a run takes as its video.

    It appears when it is complete, and is used again where it is there.

    Args:
        frames: [T, 3, H, W] uint8.
        folder: where it goes.
    Returns:
        `folder`/frames_DIGEST, and these 12 hexadecimal digits of the frames' digest.
    """
    frames = frames.cpu()
    digest = frames_digest(frames)[:12]
    target = folder / f"frames_{digest}"
    if target.is_dir():
        return target, digest
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".frames_") as temporary:
        whole = Path(temporary) / "frames"
        whole.mkdir()

        def write(index: int) -> None:
            Image.fromarray(frames[index].permute(1, 2, 0).numpy()).save(
                whole / f"{index:04d}.png", compress_level=1)
        with ThreadPoolExecutor() as pool:
            list(pool.map(write, range(len(frames))))
        try:
            whole.rename(target)
        except OSError:
            if not target.is_dir():  # else another seed's process was first, with the same frames
                raise
    return target, digest


@torch.no_grad()
def measure(model: HNeRV, frames: Tensor, made: Tensor) -> dict[str, float]:
    """Mean PSNR in dB of a network trained on `made`, against the frames.

    Args:
        frames, made: [T, 3, H, W] uint8 on the model's device: the video, and with estimates.
    Returns:
        train_db: of given frames. interpolated_db, estimated_embedding_db: of held-out ones, from
        the mean of their neighbors' embeddings and from their estimate's own. two_decoded_mean_db:
        of the mean of the two decoded neighbors. two_mean_db, estimate_db: of the mean of the two
        given neighbors, and of the estimate, without a network.
    """
    count = len(frames)
    given, held = list(range(0, count, 2)), list(range(1, count, 2))
    beside = {i: (i - 1, min(i + 1, given[-1])) for i in held}

    def picture(video: Tensor, index: int) -> Tensor:
        return video[index:index + 1].float() / 255

    def decode(embedding: Tensor) -> Tensor:
        with torch.autocast(frames.device.type, torch.bfloat16, enabled=frames.is_cuda):
            return model.rgb(model.features(embedding)).float().clamp(0, 1)

    def mean_db(indices: list[int], pictures: Callable[[int], Tensor]) -> float:
        values = [psnr(pictures(i), picture(frames, i)) for i in indices]
        return round(float(torch.cat(values).mean()), 3)

    embeddings = torch.cat([model.embed(picture(made, i), None) for i in range(count)])
    between = interpolate_embeddings(embeddings, np.array(given))
    decoded = [decode(embedding[None]) for embedding in embeddings]
    return {
        "train_db": mean_db(given, lambda i: decoded[i]),
        "interpolated_db": mean_db(held, lambda i: decode(between[i:i + 1])),
        "estimated_embedding_db": mean_db(held, lambda i: decoded[i]),
        "two_decoded_mean_db": mean_db(
            held, lambda i: sum(decoded[j] for j in beside[i]) / 2),
        "two_mean_db": mean_db(held, lambda i: sum(picture(frames, j) for j in beside[i]) / 2),
        "estimate_db": mean_db(held, lambda i: picture(made, i))}


def run_between(folder: str | Path, params: dict[str, Any]) -> dict[str, Any]:
    """Estimate, train and measure.

    Args:
        folder: of the estimated video frames_DIGEST, the run run_DIGEST_SEED on it, and its row
            between_DIGEST_SEED.json; another video's stand beside them.
        params: flat settings of the run over the video; its `data_split` is not used.
    Returns:
        What `measure` gives, with seed, epochs, smooth (of the estimates), stored (values),
        train_time_s, device, commit and dirty.
    Raises:
        ConfigError: as `Config.from_params`, `load_video` and `estimate_held_out`.
        RunError: the run's folder holds a training of other settings.
    """
    folder = resolve_path(folder)
    config = Config.from_params(**params | {"data_split": "1_1_1", "predict_clip": False})
    seed, cache = config.train.seed, folder / "cache"
    frames = load_video(config.video).frames.to(select_device(config.train.device))
    made, smooth = estimate_held_out(frames)
    images, digest = write_frames(made, folder)
    config = config.replace(data_path=str(images), crop_list="", resize_list="", frame_limit=0,
                            frame_stride=1)
    prepare_dataset(config, cache, progress=False)
    run = folder / f"run_{digest}_{seed}"
    summary = train(config, run, cache_dir=cache, progress=False).summary
    model = load_run(run, cache_dir=cache, device=str(frames.device)).model
    commit, dirty = code_version()
    row = {"seed": seed, "epochs": config.train.epochs, "smooth": smooth,
           **measure(model.eval(), frames, made), "stored": summary["part_sizes"]["stored"],
           "train_time_s": round(summary["train_time_s"], 1),
           "device": device_name(frames.device), "commit": commit, "dirty": dirty}
    write_json(folder / f"between_{digest}_{seed}.json", row)
    return row


def main(argv: Sequence[str] | None = None) -> None:
    """The command in this module's first lines; prints the row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                        help="settings of the run")
    args = parser.parse_args(argv)
    print(json.dumps(run_between(args.folder, dict(args.p)), ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
