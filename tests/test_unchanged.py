"""Given sizes compute what they did before `auto` and padding: recorded at commit 1fab3dd."""

import pytest
import torch

from hnerv_clip.train import train

RECORDED = {
    "hybrid": {"psnr_db": 13.25386, "cosine": 0.02013, "sums": {
        "decoder.1.conv.weight": 645.3656,
        "rgb_head.weight": 15.3765,
        "clip_head.2.weight": 3150.5087}},
    "xyt": {"psnr_db": 13.12839, "cosine": 0.04807, "sums": {
        "decoder.1.conv.weight": 646.4991,
        "rgb_head.weight": 16.2058,
        "clip_head.2.weight": 3140.0028}},
}
SETTINGS = {"hybrid": {}, "xyt": {"embed": "xyt_1.25_80", "fc_hw": "2_4"}}  # the second is resized


@pytest.mark.filterwarnings("ignore:the decoder gives")
@pytest.mark.parametrize("kind", RECORDED)
def test_a_tiny_run_gives_what_it_gave(kind, small_config, small_dataset, cache_dir, tmp_path):
    config = small_config.replace(epochs=2, pixel_loss_warmup_epochs=1, **SETTINGS[kind])
    result = train(config, tmp_path / "run", cache_dir=cache_dir, progress=False,
                   dataset=small_dataset)
    assert config.model.pad_list is None
    weights = torch.load(tmp_path / "run" / "model_best.pth", weights_only=True)["model"]
    # Other processors round otherwise; another network or another frame is further away
    recorded = RECORDED[kind]
    assert result.summary["eval_psnr_all"] == pytest.approx(recorded["psnr_db"], abs=2e-3)
    assert result.summary["eval_clip_similarity_all"] == pytest.approx(recorded["cosine"], abs=5e-4)
    for name, total in recorded["sums"].items():
        assert weights[name].double().abs().sum().item() == pytest.approx(total, rel=1e-3)
