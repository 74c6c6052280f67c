"""Ask a fitted field: embeddings of boxes at any time, and their scores against queries.

Times are in frames, from 0 to T − 1, whole or not: half-way between two frames the network's
embeddings are interpolated. Boxes are (top, left, height, width) in frame pixels.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hnerv_clip.config import BUNDLED, ConfigError
from hnerv_clip.files import RunError, write_atomic
from hnerv_clip.heads.field import FieldConfig, FieldHead, check_boxes
from hnerv_clip.inference import frame_embeddings, sources_of
from hnerv_clip.model import HNeRV
from hnerv_clip.runs.run_dir import FIELD, RunDir

if TYPE_CHECKING:
    from hnerv_clip.inference import Run

FORMAT = 1
STORED = "stored"  # a run's folder of the field that was fitted to the network of its file
# Values of embeddings computed together: 2 MiB, which a CPU's cache holds, and 128 MiB on a GPU
AT_ONCE = {"cpu": 2**19, "cuda": 2**25}


@dataclass
class Field:
    """A video's network with a fitted field.

    embeddings: [T, C, h, w] of a hybrid network, None for one of coordinates. steps: the
    quantisation steps that the weights are multiples of. teacher: name, label and weights of the
    teacher that it answers for. about: how it was fitted.
    """

    head: FieldHead
    model: HNeRV
    embeddings: Tensor | None
    steps: dict[str, float] = field(default_factory=dict)
    teacher: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """The device of its weights."""
        return next(self.head.parameters()).device

    @property
    def frame_count(self) -> int:
        """Number of frames, T."""
        return self.head.config.frame_count

    def features(self, times: Tensor) -> Tensor | None:
        """The head's inputs from the frames at times [B]: [B, C, …], or None."""
        config = self.head.config
        if not config.source_channels:
            return None
        if self.embeddings is None:
            z = self.model.embed(None, times.double() / self.frame_count)
        else:
            left = times.floor().long()
            right = (left + 1).clamp(max=self.frame_count - 1)
            share = (times - left).view(-1, 1, 1, 1).to(self.embeddings.dtype)
            z = torch.lerp(self.embeddings[left], self.embeddings[right], share)
        if config.source_stage < 0:
            return z.float()
        features = self.model.stages(z, last=config.source_stage)[config.source_stage]
        return features[:, :config.source_channels].float()  # without padding

    @torch.inference_mode()
    def embed(self, times: npt.ArrayLike, boxes: npt.ArrayLike) -> Tensor:
        """Unit embeddings of boxes at times.

        Args:
            times: one time or B of them, in frames.
            boxes: [4], [P, 4] for the same boxes at every time, or [B, P, 4].
        Returns:
            float32 on the CPU: [B, P, D], without B for one time, without P for one box.
        Raises:
            ConfigError: a time outside the video, or a box that is not in the frame.
        """
        times, boxes, squeeze = self._check(times, boxes)
        found = torch.cat([self.head(self.features(t), t, b).float().cpu()
                           for t, b in self._batches(times, boxes, self.head.config.dim)])
        return found[squeeze]

    @torch.inference_mode()
    def scores(self, queries: npt.ArrayLike, times: npt.ArrayLike, boxes: npt.ArrayLike) -> Tensor:
        """Cosine of queries [K, D] with boxes at times: [K, B, P] float32 on the CPU.

        Where the output is linear no embedding is made: a query meets the basis once.

        Raises:
            ConfigError: as `embed`, or queries of another size.
        """
        queries = torch.as_tensor(np.asarray(queries), dtype=torch.float32, device=self.device)
        if queries.ndim != 2 or queries.shape[1] != self.head.config.dim:
            raise ConfigError(f"queries have shape {tuple(queries.shape)}, the field's embeddings "
                              f"{self.head.config.dim} values: encode texts with its teacher, "
                              f"{self.teacher.get('label', 'unknown')}")
        times, boxes, _ = self._check(times, boxes)
        score = self.head.scorer(torch.nn.functional.normalize(queries, dim=1))
        width = self.head.config.rank + len(queries)
        found = [score(self.head.codes(self.head.maps(self.features(t), t), b)).cpu()
                 for t, b in self._batches(times, boxes, width)]
        return torch.cat(found).permute(2, 0, 1)

    def _check(self, times, boxes) -> tuple[Tensor, Tensor, tuple]:
        times = torch.as_tensor(times, dtype=torch.float32, device=self.device)
        boxes = torch.as_tensor(np.asarray(boxes), dtype=torch.float32, device=self.device)
        squeeze = (0 if times.ndim == 0 else slice(None), 0 if boxes.ndim == 1 else slice(None))
        times = times.reshape(-1)
        last = self.frame_count - 1
        outside = times[~((times >= 0) & (times <= last))]  # NaN is outside, too
        if len(outside) or not len(times):
            given = f"time {float(outside[0]):g}" if len(outside) else "an empty list of times"
            raise ConfigError(f"{given} is outside the video: give frames from 0 to {last}, "
                              "fractions included")
        config = self.head.config
        check_boxes(boxes, config.frame_hw, size_range=config.size_range)
        boxes = boxes.reshape(-1, 4) if boxes.ndim == 1 else boxes
        if boxes.ndim == 3 and len(boxes) != len(times):
            raise ConfigError(f"boxes {tuple(boxes.shape)} for {len(times)} times: give [P, 4], or "
                              f"[{len(times)}, P, 4]")
        return times, boxes, squeeze

    def _batches(self, times: Tensor, boxes: Tensor, width: int):
        a_frame = boxes.shape[-2] * max(width, self.head.first.in_features)
        at_once = max(1, AT_ONCE[self.device.type] // a_frame)
        for start in range(0, len(times), at_once):
            part = slice(start, start + at_once)
            yield times[part], boxes if boxes.ndim == 2 else boxes[part]

    def save(self, path: str | Path) -> None:
        """Write the head, not the network: tensors and plain values, atomically."""
        content = {"format": FORMAT, "config": self.head.config.to_dict(), "steps": self.steps,
                   "state": {name: tensor.cpu() for name, tensor in self.head.state_dict().items()},
                   "teacher": self.teacher, "about": self.about,
                   "network": network_digest(self.model)}
        write_atomic(Path(path), lambda file: torch.save(content, file))

    def to(self, device: str | torch.device) -> Field:
        """The same field, moved to a device."""
        self.head.to(device)
        self.model.to(device)
        self.embeddings = None if self.embeddings is None else self.embeddings.to(device)
        return self


def network_digest(model: HNeRV) -> str:
    """A digest of the weights that a field was fitted on: those that make embeddings and stages."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith("clip_head."):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def has_field(run_dir: str | Path | RunDir) -> bool:
    """Whether a run folder holds a fitted field."""
    path = run_dir.path if isinstance(run_dir, RunDir) else Path(run_dir)
    return (path / FIELD).is_file()


def missing_field_fix(run_dir: RunDir) -> str:
    """What to do about a run's folder without a field, for messages."""
    fit = f"fit one, hnerv-clip fit-head {run_dir.path}"
    if (run_dir.path / STORED / FIELD).is_file():
        return f"{STORED} has that of the file which `encode` wrote: use that file, or {fit}"
    return fit


def load_field(run: Run, *, source: str | None = None) -> Field:
    """The field in a run's folder.

    Args:
        source: how frames' embeddings are obtained, the run's first by default.
    Raises:
        RunError: none there, damaged, or fitted to another network or teacher.
    """
    path = run.run_dir.path / FIELD
    again = f"fit it: hnerv-clip fit-head {run.run_dir.path}"
    if not path.is_file():
        raise RunError(f"{run.run_dir.path} has no field: {missing_field_fix(run.run_dir)}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["format"] != FORMAT:
            raise RunError(f"{path} has format {content['format']}, this version reads {FORMAT}: "
                           "update hnerv-clip")
        head = FieldHead.from_config(content["config"])
        head.load_state_dict(content["state"])
    except RunError:
        raise
    except Exception as error:  # a damaged archive fails in many ways
        raise RunError(f"{path} is damaged ({type(error).__name__}: {error}); {again}") from error
    if content["network"] != network_digest(run.model):
        raise RunError(f"{path} was fitted to another network than this run's; {again}")
    if content["teacher"].get("name") != run.dataset.teacher_name:
        raise RunError(f"{path} answers for {content['teacher'].get('label')}, the run's teacher "
                       f"is {run.dataset.teacher_label}; {again}")
    return make_field(run, head, source=source, steps=content["steps"],
                      teacher=content["teacher"], about=content["about"])


def make_field(run: Run, head: FieldHead, *, source: str | None = None, **parts: Any) -> Field:
    """A field of a run's network, with embeddings of all frames by `source`."""
    device = next(run.model.parameters()).device
    embeddings = None
    if run.model.kind == "hybrid" and head.config.source_channels:
        embeddings = frame_embeddings(run.model, run.dataset, source or sources_of(run.model)[0])
    return Field(head.to(device).eval(), run.model, embeddings, **parts)


def field_config(run: Run, *, map_rows: int = 8, **changes: Any) -> FieldConfig:
    """The configuration of a field that suits a run's network and frames.

    Args:
        map_rows: of its map; as many columns as keep it in the frame's proportions.
    """
    height, width = run.model.frame_hw
    with torch.inference_mode():
        shape = frame_embeddings(run.model, run.dataset, sources_of(run.model)[0],
                                 np.array([0])).shape
    values: dict[str, Any] = {
        "dim": run.config.model.clip_dim, "frame_hw": (height, width),
        "frame_count": run.model.frame_count, "source_channels": shape[1],
        "map_hw": (map_rows, max(1, round(map_rows * width / height))),
        "up": max(1, -(-map_rows // shape[2])),
        # its embeddings are means of ReLU6 and never negative: 0.02 to 0.03 of skill at equal bytes
        "output": "relu" if run.config.teacher.teacher == BUNDLED else "linear"}
    return FieldConfig(**{**values, **changes})
