"""Whether training has collapsed, judged by the losses of its epochs, which are read anyway.

A network that died under too high a learning rate gives one picture for every frame and has no
gradients that could bring it back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hnerv_clip.losses import pixel_loss

EPOCHS = 5  # in a row that must be bad; at the end of training one is enough
RISE = 1.05  # a loss above the lowest so far by this factor has got worse
JUMP = 2.0  # likewise, so much worse that the network has come apart
# Of the learning rate, at the first recovery, the second, ...
LR_FACTORS = (1 / 2, 1 / 8, 1 / 64, 1 / 1024)
FRAMES = 16  # to measure single colors on


class Diverged(RuntimeError):
    """Training has collapsed; `fell_at` is the first epoch (from 1) that shows it."""

    def __init__(self, reason: str, fell_at: int):
        super().__init__(reason)
        self.fell_at = fell_at


@torch.no_grad()
def color_losses(frames: Tensor, train: Sequence[int], *, loss: str, mask: Tensor | None = None
                 ) -> tuple[float, float]:
    """Pixel losses of two pictures of a single color: the mean of the video, and middle gray.

    The first is about the best that a network does which has learned nothing of any frame, the
    second what an untrained one begins with.

    Args:
        frames: uint8 [T, 3, H, W].
        train: the frames that train; `FRAMES` of them are looked at.
        loss: a row of `PIXEL_LOSSES`.
        mask: [H, W], 0 where pixels do not count.
    """
    chosen = frames[torch.as_tensor(list(train))[::-(-len(train) // FRAMES)].to(frames.device)]
    mean = sum(frame.float().mean((1, 2)) for frame in chosen) / (255 * len(chosen))  # [3]
    losses = [torch.stack([pixel_loss(color.view(1, 3, 1, 1).expand(1, *frame.shape),
                                      frame[None].float() / 255, loss=loss, mask=mask)
                           for frame in chosen]).mean()
              for color in (mean, torch.full_like(mean, 0.5))]
    return float(losses[0]), float(losses[1])


def check_collapse(history: Sequence[dict[str, Any]], *, color: float, gray: float, warm_up: float,
                   final: bool) -> None:
    """Raise `Diverged` where the last epochs show a network that has come apart.

    Either the pictures are no better than a single color, and worse than they or gray have been;
    or what is minimised, the total loss, has more than doubled within a phase of training, and
    does not come back.

    Args:
        history: a row per epoch, with epoch, pixel_loss, total_loss and clip_weight.
        color, gray: see `color_losses`.
        warm_up: epochs in which the learning rate rises; they may do what they like.
        final: whether training ends here, so that waiting would not help.
    """
    rows, weight = list(history), history[-1]["clip_weight"]
    count = 1 if final else EPOCHS
    last = rows[-count:]
    if len(last) < count or last[0]["epoch"] <= warm_up and not final:
        return
    lowest, dead = gray, []
    for row in rows:
        lowest = min(lowest, row["pixel_loss"])
        dead.append(row["pixel_loss"] >= 0.99 * color and row["pixel_loss"] > RISE * lowest)
    lowest, apart = float("inf"), []
    for row in rows:
        if row["clip_weight"] != weight:
            apart.append(False)
            continue
        lowest = min(lowest, row["total_loss"])
        apart.append(row["total_loss"] > JUMP * lowest)
    if all(dead[-count:]):
        raise Diverged(
            f"the pictures are no better than a single color (loss {last[-1]['pixel_loss']:.4g}, "
            f"one color {color:.4g})", _first_of_streak(rows, dead))
    if all(apart[-count:]) and (final or last[-1]["total_loss"] > 0.8 * last[0]["total_loss"]):
        raise Diverged(f"the loss rose from {lowest:.4g} to {last[-1]['total_loss']:.4g} and does "
                       "not come back", _first_of_streak(rows, apart))


def _first_of_streak(rows: Sequence[dict[str, Any]], bad: list[bool]) -> int:
    start = len(rows)
    while start and bad[start - 1]:
        start -= 1
    return rows[start]["epoch"]
