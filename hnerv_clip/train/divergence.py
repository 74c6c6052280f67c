"""Whether training has collapsed, by the losses of its epochs, which are read anyway.

A network that died under too high a learning rate gives one picture for every frame and has no
gradients that could bring it back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hnerv_clip.engines.plain import PlainEngine
from hnerv_clip.losses import pixel_loss

EPOCHS = 5  # in a row that must be bad
FLAT = 1e-4  # losses within this share of each other: nothing is learned
ONE_COLOR = 1e-4  # loss below which a picture of one color is good: of such a video none is dead
RISE = 1.05  # a loss above the lowest so far by this factor has got worse
JUMP = 2.0  # likewise, so much worse that the network has come apart
# Of the learning rate, at the first recovery, the second, ...
LR_FACTORS = (1 / 2, 1 / 8, 1 / 64, 1 / 1024)
FRAMES, UNTRAINED_FRAMES = 16, 2  # to measure baselines on
CLEARLY = 1.25  # as RISE, for one epoch alone, or above an untrained network


class Diverged(RuntimeError):
    """Training has collapsed; `fell_at` is the first epoch (from 1) that shows it."""

    def __init__(self, reason: str, fell_at: int):
        super().__init__(reason)
        self.fell_at = fell_at


class Baselines(NamedTuple):
    """Pixel losses that a network which learns leaves behind."""

    color: float  # of a picture of a single color, the mean of the video
    untrained: float  # of the network with its initial weights


@torch.no_grad()
def measure_baselines(engine: PlainEngine, train: Sequence[int]) -> Baselines:
    """Measure them on some frames, before the first step and before weights are loaded.

    Args:
        train: the frames that train.
    """
    frames, loss = engine.frames, engine.config.train.loss
    known = torch.as_tensor(list(train), device=frames.device)
    chosen = known[::-(-len(known) // FRAMES)]
    mean = sum(frames[i].float().mean((1, 2)) for i in chosen) / (255 * len(chosen))  # [3]

    def color_loss(index: Tensor) -> Tensor:
        frame = frames[index][None].float() / 255
        return pixel_loss(mean.view(1, 3, 1, 1).expand_as(frame), frame, loss=loss,
                          mask=engine.mask, constants=engine.ssim)[0]

    color = torch.stack([color_loss(index) for index in chosen]).mean()
    few, ratios = chosen[::-(-len(chosen) // UNTRAINED_FRAMES)], []
    engine.model.eval()
    for index in few:
        frame, pred, _ = engine.reconstruct(index[None])
        untrained = pixel_loss(pred, frame, loss=loss, mask=engine.mask, constants=engine.ssim)[0]
        ratios.append(untrained / color_loss(index).clamp(min=1e-12))
    engine.model.train()
    return Baselines(float(color), float(color * torch.stack(ratios).mean()))


def check_collapse(history: Sequence[dict[str, Any]], baselines: Baselines, *, warm_up: float,
                   final: bool) -> None:
    """Raise `Diverged` where the last epochs show a network that has come apart.

    Either the pictures are no better than a single color, and worse than they have been, or other
    than those of initial weights without changing any more; or what is minimised, the total loss,
    has more than doubled within a phase of training, and does not come back.

    Args:
        history: a row per epoch, with epoch, pixel_loss, total_loss and clip_weight.
        warm_up: epochs in which the learning rate rises; they may do what they like.
        final: whether training ends here, so that waiting would not help: then one epoch is enough
            that is clearly bad.
    """
    rows, weight = list(history), history[-1]["clip_weight"]
    ready = len(rows) >= EPOCHS and rows[-EPOCHS]["epoch"] > warm_up
    lowest, dead, dead_now = baselines.untrained * CLEARLY / RISE, [], False
    for row in rows:
        loss, lowest = row["pixel_loss"], min(lowest, row["pixel_loss"])
        no_better = loss >= 0.99 * baselines.color
        dead.append(no_better and loss > RISE * lowest)
        dead_now = no_better and loss > CLEARLY * lowest
    lowest, apart = math.inf, []
    for row in rows:
        if row["clip_weight"] == weight:
            lowest = min(lowest, row["total_loss"])
        apart.append(row["total_loss"] > JUMP * lowest)
    last, recent = rows[-1], [row["pixel_loss"] for row in rows[-EPOCHS:]]
    stuck = max(recent) - min(recent) <= FLAT * min(recent) and max(ONE_COLOR, 0.99 * \
        baselines.color) <= min(recent) < baselines.untrained / RISE
    if ready and (stuck or all(dead[-EPOCHS:])) or final and dead_now:
        raise Diverged(f"the pictures are no better than a single color (loss "
                       f"{last['pixel_loss']:.4g}, one color {baselines.color:.4g})",
                       _first_of_streak(rows, dead) if dead[-1] else rows[-EPOCHS]["epoch"])
    stays = ready and all(apart[-EPOCHS:]) and \
        last["total_loss"] > 0.8 * rows[-EPOCHS]["total_loss"]
    if stays or final and apart[-1]:
        raise Diverged(f"the loss rose from {lowest:.4g} to {last['total_loss']:.4g} and does not "
                       "come back", _first_of_streak(rows, apart))


def _first_of_streak(rows: Sequence[dict[str, Any]], bad: list[bool]) -> int:
    start = len(rows)
    while start and bad[start - 1]:
        start -= 1
    return rows[start]["epoch"]
