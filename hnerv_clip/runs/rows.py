"""A finished run as one flat row of plain values: the one place that reads its files for tables."""

from __future__ import annotations

from typing import Any

from hnerv_clip.config import embed_kind
from hnerv_clip.runs.run_dir import RunDir

MEASURES = {"psnr_{}_db": "psnr", "ms_ssim_{}": "ms_ssim", "clip_similarity_{}": "clip_similarity",
            "clip_centred_{}": "clip_centred"}
TIMES = ("train_time_s", "train_frames_per_s", "setup_time_s", "compile_s", "eval_time_s",
         "stored_time_s", "checkpoint_time_s", "peak_memory_bytes")


def run_row(run: RunDir, *, parts: tuple[str, ...] = ("train", "held_out", "held_out_encoder")
            ) -> dict[str, Any]:
    """Settings, figures and origin of a finished run.

    Args:
        parts: of the frames: `train`, `held_out` (predicted, for a hybrid model from interpolated
            embeddings), `held_out_encoder` (a hybrid model encodes the held-out frame; left out for
            others), `all`.
    Returns:
        kind, seed, epochs, batch_size, lr, clip_head, engine, precision; of each part
        psnr_PART_db, ms_ssim_PART, clip_similarity_PART and clip_centred_PART (NaN where there is
        none); rate_bpp, size_bytes, stored_values, clip_head_values; `TIMES` (None where an older
        run lacks one); device, commit, dirty.
    Raises:
        RunError: the run is not finished, or a file of it is damaged.
    """
    config, summary, facts = run.config(), run.summary(), run.provenance()
    kind, train = embed_kind(config.model.embed), config.train
    names = {"train": "train", "held_out": "val", "all": "all"}
    if kind == "hybrid":
        names |= {"held_out": "val_interpolated", "held_out_encoder": "val"}
    return {
        "kind": kind, "seed": train.seed, "epochs": train.epochs, "batch_size": train.batch_size,
        "lr": train.lr, "clip_head": config.model.predict_clip,
        "engine": facts.get("engine", train.engine),
        "precision": facts.get("precision", train.precision),
        **{column.format(part): summary.get(f"eval_{measure}_{names[part]}", float("nan"))
           for part in parts if part in names for column, measure in MEASURES.items()},
        "rate_bpp": summary["rate_bpp"], "size_bytes": summary["size_bytes"],
        "stored_values": summary["part_sizes"]["stored"],
        "clip_head_values": summary["part_sizes"]["clip_head"],
        **{name: summary.get(name) for name in TIMES},
        "device": facts["device"], "commit": facts["commit"], "dirty": facts["dirty"]}
