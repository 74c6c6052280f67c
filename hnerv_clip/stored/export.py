"""A stored video's decoder and head as ONNX, for players without PyTorch."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from hnerv_clip.config import ConfigError
from hnerv_clip.heads.field import FieldHead
from hnerv_clip.model import HNeRV
from hnerv_clip.stored.video import StoredVideo

OPSET = 17
TOLERANCE = 1e-3  # of pictures in [0, 1] and of embeddings, beyond which an export is refused


class ExportError(RuntimeError):
    """The exported network does not compute what the stored one does."""


class _Decoder(nn.Module):
    """Frame numbers to pictures; and boxes, or positions, to embeddings where there is a head."""

    def __init__(self, model: HNeRV, embeddings: Tensor, field: FieldHead | None):
        super().__init__()
        self.model, self.field = model, field
        self.register_buffer("embeddings", embeddings)  # [T, C, h, w]

    def forward(self, frame: Tensor, where: Tensor | None = None
                ) -> Tensor | tuple[Tensor, Tensor]:
        embeddings = self.embeddings.index_select(0, frame)
        stages = self.model.stages(embeddings)
        pictures = self.model.rgb(stages[-1]).clamp(0, 1)
        if where is None:
            return pictures
        if self.field is not None:
            config = self.field.config
            features = None if not config.source_channels else \
                embeddings if config.source_stage < 0 else stages[config.source_stage]
            boxes = where.expand(frame.shape[0], -1, -1)  # of any number of frames, when traced
            return pictures, self.field(features, frame.float(), boxes)
        head = self.model.clip_head
        cells = head.cells(where)
        if head.clip_pool:
            return pictures, head.at_cells(stages, cells)
        picked = [stages[i].flatten(2).index_select(2, rows * stages[i].shape[3] + cols)
                  for i, (rows, cols) in zip(head.stages, cells)]
        return pictures, head.of_cells(picked)


def export_onnx(path: str | Path, out: str | Path) -> dict[str, float]:
    """Write the network of a stored video as ONNX, and compare it with PyTorch.

    Inputs: `frame` int64 [B], and with a field `boxes` [P, 4] (top, left, height, width), with the
    original head `centres` [P, 2] (y, x), in pixels. Outputs: `frames` [B, 3, H, W] in [0, 1], and
    `embeddings` [B, P, D]. The metadata hold the stored video's header: times, size, the teacher.

    Returns:
        The largest absolute difference of each output, over the first two frames and two positions.
    Raises:
        ConfigError: onnx or onnxruntime is not installed.
        ExportError: the two differ.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError:
        raise ConfigError('export needs onnx and onnxruntime: pip install "hnerv-clip[export]"'
                          ) from None
    video = StoredVideo(path, device="cpu")
    model = video.stored.load()
    with torch.no_grad():
        module = _Decoder(model, video.frame_embeddings(range(len(video))).float(),
                          video.stored.load_field() if video.has_field else None).eval()
    given = {"frame": torch.arange(len(video))}
    height, width = video.size
    if video.has_field:
        given["boxes"] = torch.tensor([[0.0, 0.0, height, width],
                                       [height / 3, width / 4, height / 2, width / 2]])
    elif video.has_head:
        given["centres"] = torch.tensor([[height / 2, width / 2], [height / 3, width / 4]])
    outputs = ["frames", "embeddings"][:len(given)]
    example = (given["frame"][:1], *list(given.values())[1:])
    free = {"frame": {0: "B"}, "centres": {0: "P"}, "boxes": {0: "P"}, "frames": {0: "B"},
            "embeddings": {0: "B", 1: "P"}}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        torch.onnx.export(module, example, str(out), input_names=list(given), opset_version=OPSET,
                          output_names=outputs, dynamo=False,
                          dynamic_axes={n: free[n] for n in (*given, *outputs)})
    exported = onnx.load(str(out))
    onnx.helper.set_model_props(exported, {"hnerv_clip": json.dumps(video.header.meta)})
    onnx.checker.check_model(exported)
    onnx.save(exported, str(out))
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    two = {name: value[:2] for name, value in given.items()}
    found = session.run(None, {name: value.numpy() for name, value in two.items()})
    with torch.no_grad():
        wanted = module(*two.values())
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    difference = {name: float((torch.from_numpy(a) - b).abs().max())
                  for name, a, b in zip(outputs, found, wanted)}
    if max(difference.values()) > TOLERANCE:
        raise ExportError(f"the exported network differs from PyTorch's by {difference}, more than "
                          f"{TOLERANCE}: onnxruntime {onnxruntime.__version__} computes it wrongly")
    return difference
