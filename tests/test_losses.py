"""Losses and schedules against values worked by hand."""

import math

import pytest
import torch
from pytorch_msssim import ms_ssim, ssim
from torch.utils._python_dispatch import TorchDispatchMode

from hnerv_clip.config import LOSSES, ConfigError
from hnerv_clip.dataset import inpainting_mask
from hnerv_clip.losses import (
    PIXEL_LOSSES,
    clip_loss,
    clip_weight,
    learning_rate,
    pixel_loss,
    ssim_constants,
)
from hnerv_clip.metrics import psnr


def frames(size=32):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 2, 3, size, size, generator=generator)
    return a, b


def test_every_loss_has_a_row():
    assert tuple(PIXEL_LOSSES) == LOSSES
    assert all(sum(terms.values()) == pytest.approx(1) for terms in PIXEL_LOSSES.values())


def test_pixel_losses_by_hand():
    target = torch.zeros(1, 3, 16, 16)
    pred = target + 0.5
    assert pixel_loss(pred, target, loss="L2").item() == pytest.approx(0.25)
    assert pixel_loss(pred, target, loss="L1").item() == pytest.approx(0.5)
    assert pixel_loss(pred, target, loss="Fusion7").item() == pytest.approx(0.7 * 0.25 + 0.3 * 0.5)
    a, b = frames()
    expected = 0.7 * (a - b).abs().mean((1, 2, 3)) + 0.3 * (1 - ssim(a, b, data_range=1,
                                                                     size_average=False))
    torch.testing.assert_close(pixel_loss(a, b, loss="Fusion6"), expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_vanish_on_equal_frames_and_have_gradients(loss):
    a, b = frames(176)
    assert pixel_loss(a, a, loss=loss).abs().max() < 1e-5
    a.requires_grad_()
    pixel_loss(a, b, loss=loss).sum().backward()
    assert a.grad.abs().sum() > 0


def test_ms_ssim_is_the_librarys():
    a, b = frames(200)
    b = a + 0.2 * (b - a)
    expected = 0.7 * (a - b).abs().mean((1, 2, 3)) + 0.3 * (1 - ms_ssim(a, b, data_range=1,
                                                                        size_average=False))
    torch.testing.assert_close(pixel_loss(a, b, loss="Fusion10"), expected)


def test_a_flat_picture_has_a_finite_gradient():
    """Where contrasts disagree a scale of MS-SSIM is cut at 0, and 0 to a power has no slope."""
    _, target = frames(176)
    pred = (1 - target).requires_grad_()
    gradient, = torch.autograd.grad(pixel_loss(pred, target, loss="Fusion10").sum(), pred)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_can_be_captured_in_a_graph(loss):
    """Forward and back it makes no tensor on the CPU and asks for no value: on a GPU either would
    stop the step, and a CUDA graph cannot hold it."""
    seen = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    a, b = frames(176)
    constants = ssim_constants(a.device)
    with Record():
        a.requires_grad_()
        torch.autograd.grad(pixel_loss(a, b, loss=loss, constants=constants).sum(), a)
    assert "mean" in seen and not seen & {"_local_scalar_dense", "nonzero", "arange", "lift_fresh",
                                          "lift_fresh_copy", "_to_copy"}


def test_loss_errors():
    a, b = frames()
    with pytest.raises(ValueError, match=r"\(2, 3, 32, 32\).*\(2, 3, 32, 31\)"):
        pixel_loss(a, b[..., :31])
    with pytest.raises(ValueError, match="Fusion6"):
        pixel_loss(a, b, loss="L3")
    with pytest.raises(ConfigError, match="161 pixels"):
        pixel_loss(a, b, loss="Fusion10")


def test_mask_hides_pixels_from_the_loss():
    a, b = frames()
    mask = inpainting_mask((32, 32), 8)
    assert mask.sum() == 32 * 32 - 5 * 64
    changed = torch.where(mask.bool(), a, torch.rand(1))
    torch.testing.assert_close(pixel_loss(a, b, mask=mask), pixel_loss(changed, b, mask=mask))
    assert inpainting_mask((32, 32), 0) is None
    with pytest.raises(ConfigError, match="whole frame"):
        inpainting_mask((32, 32), 200)


def test_clip_loss_by_hand():
    pred = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    target = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    assert clip_loss(pred, target).tolist() == [0.5]
    with pytest.raises(ValueError, match="differ"):
        clip_loss(pred, target[:, :1])


def test_two_phases():
    weights = [clip_weight(e, clip_loss_weight=0.5, pixel_loss_warmup_epochs=2) for e in range(4)]
    assert weights == [0, 0, 0.5, 0.5]


def test_learning_rate_as_in_hnerv():
    rate = [learning_rate(p, lr=1.0) for p in (0, 0.05, 0.1, 0.55, 0.999999)]
    assert rate[:3] == pytest.approx([0.1, 0.55, 1.0])
    assert rate[3] == pytest.approx(0.5 * (math.cos(math.pi * 0.5) + 1))
    assert rate[4] == pytest.approx(0, abs=1e-9)
    assert learning_rate(0.0, lr=2.0, lr_type="cosine_0_1_0.1") == 2.0


def test_psnr_by_hand():
    target = torch.zeros(2, 3, 8, 8)
    pred = target.clone()
    pred[1] += 0.1
    values = psnr(pred, target)
    assert values[0] == 100 and values[1].item() == pytest.approx(20, abs=1e-4)
    mask = torch.zeros(8, 8)
    mask[:4] = 1
    pred[1, :, 4:] = 1  # outside the mask: does not count
    assert psnr(pred, target, mask=mask)[1].item() == pytest.approx(20, abs=1e-4)
