"""On a GPU every engine trains by every picture loss, with every kind of CLIP head, as the plain
engine does."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")  # made for Linux; without it training is plain

from test_engine import build

from hnerv_clip.engines.compiled import CompiledEngine
from hnerv_clip.engines.fused.engine import FusedEngine
from hnerv_clip.engines.plain import PlainEngine
from hnerv_clip.losses import PIXEL_LOSSES
from hnerv_clip.patches import make_grid

# Large enough for MS-SSIM
SIZE = dict(resize_list="192_384", patch_grid="2_4", enc_strds="3 4 4 4", dec_strds="3 4 4 4",
            fc_hw="1_2", modelsize=0.1)
VARIANTS = {
    "mask": dict(inpaint_size=3),
    "pooling": dict(clip_pool=0.3),
    "jitter": dict(clip_jitter=3, clip_loss_type="centred"),
    "all stages": dict(clip_stage="all"),
    "no head": dict(predict_clip=False),
}


def cases():
    """All for the fused engine; compilation takes its time, so each loss once, the rest slow."""
    for i, loss in enumerate(PIXEL_LOSSES):
        for j, variant in enumerate(VARIANTS):
            yield pytest.param(loss, variant, FusedEngine, id=f"{loss}-{variant}-fused")
            yield pytest.param(loss, variant, CompiledEngine, id=f"{loss}-{variant}-compiled",
                               marks=[] if i % len(VARIANTS) == j else pytest.mark.slow)


@pytest.mark.gpu
@pytest.mark.parametrize("loss, variant, kind", list(cases()))
def test_every_loss_trains_by_every_engine(small_config, small_dataset, loss, variant, kind):
    """Losses of 6 steps in both phases, with a short batch, within 2% of the plain engine's."""
    config = small_config.replace(**SIZE, **VARIANTS[variant], loss=loss)
    frames = torch.nn.functional.interpolate(small_dataset.video.frames.float(), size=(192, 384),
                                             mode="bilinear").round().byte()
    dataset = replace(small_dataset, video=replace(small_dataset.video, frames=frames),
                      grid=make_grid(config.teacher, (192, 384)))
    indices, losses = torch.arange(12, device="cuda"), []
    for engine in (PlainEngine, kind):
        own = build(engine, config, dataset, device="cuda", autocast=torch.bfloat16)
        losses.append(torch.stack([
            own.step(indices[step:step + count], count=count, lr=1e-3, weight=0.5 * (step > 1)
                     ).clone()
            for step, count in enumerate((2, 2, 2, 1, 2, 1))])[:, :3])
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=1e-3)
