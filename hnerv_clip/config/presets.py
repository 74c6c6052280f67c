"""Named sets of values: presets of the network's settings, and profiles of whole runs."""

from __future__ import annotations

from typing import Any

from hnerv_clip.config.settings import AUTO

# What takes the place of defaults. `paper`: HNeRV's setting for Big Buck Bunny, 640×1280. `best`:
# what is measured to be best so far, page 20. `study.recipe` searches further.
PRESETS: dict[str, dict[str, Any]] = {
    AUTO: {},
    "paper": {"crop_list": "640_1280", "enc_strds": "5 4 4 2 2", "dec_strds": "5 4 4 2 2",
              "fc_hw": "2_4", "pad_list": "", "patch_grid": "2_4"},
    "best": {"optimizer": "adan", "batch_size": 1, "lr": 3.5e-3, "epochs": 600},
}

# Values that differ from the defaults above, which are the paper's. `quick` fits two CPU cores and
# minutes, and names the bundled teacher, which is not CLIP, because a fresh machine has no CLIP
# weights. `full` is for a GPU, by the fused engine.
PROFILES: dict[str, dict[str, Any]] = {
    "quick": {
        "resize_list": "168_336",
        "frame_stride": 3,
        "data_split": "1_2_2",  # 22 of 44 frames held out, enough for the verification to answer
        "teacher": "efficientnet-lite0",
        "enc_strds": "7 4 3",
        "dec_strds": "7 4 3",
        "modelsize": 0.25,
        "epochs": 30,
        "batch_size": 1,
        "lr": 5e-3,
        "clip_loss_weight": 0.1,
        "pixel_loss_warmup_epochs": 5,
        "field_boxes": 24,
        "field_steps": 1000,
        "eval_freq": 10,
    },
    "full": {
        "precision": "bf16",
    },
}
