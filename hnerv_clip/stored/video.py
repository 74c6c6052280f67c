"""A stored video as an object: frames, embeddings and searches, from the file alone.

    video = hnerv_clip.open("video.hnerv")
    video[10:20], video.embed((0, 0, 448, 448), time_s=1.5), video.search("hare")
"""

from __future__ import annotations

import base64
import bisect
import html
import io
import operator
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from hnerv_clip.codec.facts import header_facts
from hnerv_clip.codec.video import open_network
from hnerv_clip.config import ConfigError
from hnerv_clip.devices import fetch
from hnerv_clip.metrics import psnr
from hnerv_clip.patches import PatchGrid, make_grid
from hnerv_clip.stored.checks import check_box, check_time
from hnerv_clip.stored.half import HalfDecoder

if TYPE_CHECKING:
    import pandas as pd  # a quarter of a second: imported where a table is made

    from hnerv_clip.field.query import Field
    from hnerv_clip.teachers.base import Teacher

BATCH = {"cpu": 2, "cuda": 16}  # frames decoded at once
CHECKED = 4  # frames in which fp16 is compared with fp32
EMBED_BATCH = 16  # frames of which embeddings are computed at once
PATCH_LIKE = 0.5  # intersection over union with a patch, from which on a head knows a box
SHARED = ("coordinate_encoder.", "decoder.")


class StoredVideo(Sequence):
    """A video read from its file; made by `hnerv_clip.open`.

    Only the header is read at first; pictures and embeddings read the parts that they need.
    """

    def __init__(self, path: str | Path, *, device: str = "auto"):
        self.path = Path(path)
        self.stored = open_network(self.path)
        self.header = self.stored.header
        self.device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        self._teachers: dict[str | None, object] = {}
        self._names: dict[str | None, np.ndarray] = {}  # that a text is compared with

    # Facts

    def __len__(self) -> int:
        return self.header.frame_count

    @cached_property
    def times_s(self) -> np.ndarray:
        """float64 [T]: when each frame is shown."""
        return np.array(self.header.times())

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the pictures."""
        return self.header.size

    @property
    def fps(self) -> float:
        """Frames a second, in the mean."""
        return mean_fps(self.header.times())

    @property
    def name(self) -> str:
        """The video's name."""
        return self.header.meta["video"]["name"] or self.path.stem

    @property
    def has_head(self) -> bool:
        """Whether embeddings can be asked for."""
        return self.header.config.model.predict_clip or self.has_field

    @property
    def has_field(self) -> bool:
        """Whether embeddings are of the very box that is asked for, at any time."""
        return self.stored.field is not None

    def facts(self) -> dict[str, str]:
        """What a reader wants to know, by name."""
        return header_facts(self.header)

    # Pictures

    def __getitem__(self, index):
        """Frames as they are shown: uint8 [H, W, 3] for a number, [n, H, W, 3] for a slice."""
        if isinstance(index, slice):
            chosen = range(*index.indices(len(self)))
            frames = np.empty((len(chosen), *self.size, 3), np.uint8)
            for i, frame in enumerate(self.frames(chosen)):
                frames[i] = frame
            return frames
        try:
            index = operator.index(index)
        except TypeError:
            raise TypeError(f"video[{index!r}]: a frame's number is an integer; write video[10] or "
                            "video[10:20], and for a time in seconds video[video.frame_at(1.5)]"
                            ) from None
        if not -len(self) <= index < len(self):
            raise IndexError(f"frame {index} of a video of {len(self)} frames")
        return next(iter(self.frames([index % len(self)])))

    def __iter__(self) -> Iterator[np.ndarray]:
        return self.frames(range(len(self)))

    def frames(self, chosen: Sequence[int]) -> Iterator[np.ndarray]:
        """Yield some frames in turn: uint8 [H, W, 3]."""
        for pictures in fetch(batch.permute(0, 2, 3, 1).contiguous()
                              for batch in self.batches(chosen)):
            yield from pictures

    @torch.inference_mode()
    def batches(self, chosen: Sequence[int]) -> Iterator[torch.Tensor]:
        """Yield some frames in batches on the device: uint8 [B, 3, H, W]."""
        at_once, half = BATCH[self.device.type], self.half
        for start in range(0, len(chosen), at_once):
            yield self._draw(chosen[start:start + at_once], half=half)

    def psnr(self, frames: torch.Tensor | np.ndarray) -> torch.Tensor:
        """How well the video's own frames are kept, in dB: float32 [T].

        Args:
            frames: all frames of what was stored, uint8 [T, H, W, 3] as `video[:]` gives them, or
                [T, 3, H, W]; a tensor or an array.
        Raises:
            TypeError: no uint8 tensor or array.
            ValueError: other frames than this video's.
        """
        kind = getattr(frames, "dtype", None)
        if not isinstance(frames, (torch.Tensor, np.ndarray)) or kind not in (torch.uint8,
                                                                              np.uint8):
            given = type(frames).__name__ + (f" of {kind}" if kind is not None else "")
            raise TypeError(f"frames are a {given}; give a uint8 tensor or array, values 0 to 255")
        last, first = (len(self), *self.size, 3), (len(self), 3, *self.size)
        if tuple(frames.shape) not in (last, first):
            raise ValueError(f"{tuple(frames.shape)} are not the {first} or {last} of {self.path}")
        chosen = range(len(self))
        at_once = BATCH[self.device.type]

        def own(start):
            batch = frames[start:start + at_once]
            if isinstance(batch, np.ndarray):  # a copy: an array may be read-only, or reversed
                batch = torch.from_numpy(np.array(batch, order="C"))
            batch = batch if tuple(frames.shape) == first else batch.permute(0, 3, 1, 2)
            return batch.to(self.device) / 255

        return torch.cat([psnr(drawn / 255, own(start)) for start, drawn in zip(
            chosen[::at_once], self.batches(chosen), strict=True)]).cpu()

    @cached_property
    def half(self) -> bool:
        """Whether pictures are computed in fp16: on a GPU, where they are then the same as in
        fp32 but for one level of 256; looked up in frames from all over this video."""
        if self.device.type != "cuda" or not HalfDecoder.suits(self.stored.model):
            return False
        chosen = sorted({round(i * (len(self) - 1) / (CHECKED - 1)) for i in range(CHECKED)})
        difference = self._draw(chosen, half=True).short() - self._draw(chosen, half=False)
        return int(difference.abs().max()) <= 1

    @torch.inference_mode()
    def _draw(self, chosen: Sequence[int], *, half: bool) -> torch.Tensor:
        """Some frames: uint8 [B, 3, H, W].

        Args:
            half: features in fp16, whose values and those of tf32 have as many digits, so that the
                head takes them as they are; else all in fp32, without tf32.
        """
        model = self._model((*SHARED, "rgb_head."))
        embeddings = self.frame_embeddings(chosen)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=half):
            if half:
                features = self._half_decoder.features(embeddings).float()
            else:
                if self.device.type == "cuda":
                    model.pad_channels(8)  # for its tensor cores; what is added is zero
                features = model.features(embeddings)
            pictures = model.rgb(features)
        return (pictures * 255).round_().clamp_(0, 255).byte()

    @cached_property
    def _half_decoder(self) -> HalfDecoder:
        return HalfDecoder(self._model(SHARED))

    def _model(self, prefixes: tuple[str, ...]):
        model = self.stored.load(prefixes)
        own = [module for name, module in model.named_children()
               if any(prefix.startswith(name) for prefix in prefixes)]
        for module in own:
            module.to(self.device, memory_format=torch.channels_last)
        return model

    def frame_embeddings(self, chosen: Sequence[int]) -> torch.Tensor:
        """[n, C, h, w] per-frame embeddings on the device."""
        chosen = list(chosen)
        if not self.stored.chunk:
            times = torch.tensor(chosen, dtype=torch.float64, device=self.device) / len(self)
            return self._model(SHARED).embed(None, times)
        size = self.stored.chunk
        coded = {n: self.stored.embeddings(n * size, (n + 1) * size)
                 for n in {i // size for i in chosen}}
        found = torch.stack([coded[i // size][i % size] for i in chosen])
        return found.to(self.device)

    # Embeddings

    def frame_at(self, time_s: float) -> int:
        """The frame that is shown at a time.

        Raises:
            ConfigError: a time outside the video.
        """
        check_time(time_s, self.times_s)
        return max(bisect.bisect_right(self.times_s, time_s + 1e-9) - 1, 0)

    def embed(self, box: tuple[float, float, float, float], time_s: float) -> np.ndarray:
        """The embedding of a box of the picture at a time.

        A field answers for the very box, between frames, too. The original head answers for the
        box's center, as a patch of the size that it was trained on; it warns of a box that is
        unlike each of its patches.

        Args:
            box: (x0, y0, x1, y1) in pixels, x to the right and y down.
            time_s: seconds; of the original head, the frame shown then.
        Returns:
            float32 [D], unit length, in the teacher's space.
        Raises:
            ConfigError: a box or a time outside the video, or a file without a head.
        """
        x0, y0, x1, y1 = check_box(box, self.size)
        frame = self.frame_at(time_s)
        if self.has_field:
            after = min(frame + 1, len(self) - 1)
            gap = self.times_s[after] - self.times_s[frame]
            share = min((time_s - self.times_s[frame]) / gap, 1.0) if gap > 0 else 0.0
            return self.field.embed(frame + share, (y0, x0, y1 - y0, x1 - x0)).numpy()
        self._need_head()
        self._warn_unlike_patches((y0, x0, y1 - y0, x1 - x0))
        centre = torch.tensor([[(y0 + y1) / 2, (x0 + x1) / 2]])
        return self._clip_at([frame], centre)[0, 0].numpy()

    @cached_property
    def field(self) -> Field:
        """The fitted field (`field.Field`), for searches by box, heat maps and tracking.

        Raises:
            ConfigError: the file has none.
        """
        from hnerv_clip.field.query import Field

        if not self.has_field:
            raise ConfigError(f"{self.path} holds no field, which answers for any box; encode the "
                              "video with head=field")
        head = self.stored.load_field().to(self.device)
        embeddings = None
        if self.stored.chunk and head.config.source_channels:
            embeddings = self.frame_embeddings(range(len(self)))
        meta = self.header.meta["teacher"]
        return Field(head, self._model(SHARED), embeddings,
                     teacher={"name": meta["name"], "label": meta["label"]})

    @cached_property
    def grid(self) -> PatchGrid:
        """The patches that `search` ranks."""
        return make_grid(self.header.config.teacher, self.size)

    def boxes(self) -> np.ndarray:
        """float64 [P, 4]: x0, y0, x1, y1 of the patches."""
        y0, x0, h, w = self.grid.boxes.double().numpy().T
        return np.stack([x0, y0, x0 + w, y0 + h], axis=1)

    @cached_property
    def patch_embeddings(self) -> np.ndarray:
        """float32 [T, P, D], unit length: what the head says of every patch."""
        if self.has_field:
            return self.field.embed(np.arange(len(self)), self.grid.boxes).numpy()
        return self._clip_at(range(len(self)), self.grid.centres).numpy()

    @torch.inference_mode()
    def _clip_at(self, chosen: Sequence[int], centres: torch.Tensor) -> torch.Tensor:
        from hnerv_clip.stored.windows import clip_at

        self._need_head()
        model = self._model((*SHARED, "clip_head."))
        centres = centres.to(self.device)
        batches = [chosen[i:i + EMBED_BATCH] for i in range(0, len(chosen), EMBED_BATCH)]
        return torch.cat([clip_at(model, self.frame_embeddings(batch), centres).cpu()
                          for batch in batches])

    def _warn_unlike_patches(self, box: tuple[float, float, float, float]) -> None:
        """Warn of a box (top, left, height, width) that the original head was not trained for."""
        from hnerv_clip.search.boxes import overlap

        largest = float(overlap(box, self.grid.boxes).max())
        if largest < PATCH_LIKE:
            height, width = self.grid.size
            warnings.warn(
                f"the head of {self.path.name} was trained at {len(self.grid)} patches of "
                f"{height}×{width}, and box {', '.join(f'{v:g}' for v in box)} (top, left, height, "
                f"width) is like none of them (intersection over union {largest:.2f} at most): its "
                "embedding is a guess; a field answers for any box, encode with --head field",
                stacklevel=3)

    def _need_head(self) -> None:
        if not self.has_head:
            raise ConfigError(f"{self.path} holds no head for embeddings; encode the video with "
                              "predict_clip=True")

    def search(self, text: str, top_k: int = 5, *, apart: int = 4, weights: str | None = None,
               match: bool = False) -> pd.DataFrame:
        """The boxes that answer a text best: of several sizes with a field, else the patches.

        Args:
            text: anything for CLIP; names of ImageNet classes for the bundled teacher.
            top_k: so many at most.
            apart: frames between two hits of one patch; 0 allows neighbours.
            weights: the teacher's weights, a file or `local-dir:FOLDER`; by default those that
                the file names.
            match: also how far each hit answers the text rather than other names, a standard
                score (`search.rank.match_scores`); with CLIP that takes seconds.
        Returns:
            rank, frame, time_s, x0, y0, x1, y1 (pixels), score (cosine), and match if asked for.
        Raises:
            ValueError: no text or an empty one, or weights that are not those of the file.
            ConfigError: no head, or no weights.
        """
        from hnerv_clip.search.rank import match_scores, rank_patches
        from hnerv_clip.teachers import encode_queries, reference_vectors

        if not isinstance(text, str):
            raise ValueError(f"text={text!r} is no str: a search takes one text, such as \"hare\"; "
                             "search for several one after the other")
        self._need_head()
        with ThreadPoolExecutor(1) as pool:  # the file is read while the teacher is loaded
            teacher = pool.submit(self.teacher, weights)
            _ = self.field if self.has_field else self.patch_embeddings
            vector = encode_queries([text], teacher.result())[0]
        if self.has_field:
            hits = self._search_field(vector, top_k, apart=apart)
        else:
            found = rank_patches(vector, self.patch_embeddings, top_k, apart=apart)
            hits = _found(found, self.times_s, self.boxes()[found.patch].T)
        if match:
            embeddings = [self.field.embed(hit.frame, (hit.y0, hit.x0, hit.y1 - hit.y0,
                                                       hit.x1 - hit.x0)).numpy()
                          for hit in hits.itertuples()] if self.has_field else \
                self.patch_embeddings[found.frame, found.patch]
            if weights not in self._names:
                self._names[weights] = reference_vectors(teacher.result())
            hits["match"] = match_scores(vector, self._names[weights], np.asarray(embeddings))
        return hits

    def search_region(self, box: tuple[float, float, float, float], time_s: float, top_k: int = 5,
                      *, apart: int = 4) -> pd.DataFrame:
        """The boxes that are most like a box of the picture at a time; no teacher is loaded.

        Args:
            box: (x0, y0, x1, y1) in pixels; what overlaps it within `apart` frames is left out.
            time_s: seconds.
            top_k, apart: as for `search`.
        Returns:
            As `search`.
        Raises:
            ConfigError: a box or a time outside the video, or a file without a field.
        """
        x0, y0, x1, y1 = check_box(box, self.size)
        _ = self.field  # or says that there is none, before the original head answers
        return self._search_field(self.embed(box, time_s), top_k, apart=apart, not_near=(
            self.frame_at(time_s), (y0, x0, y1 - y0, x1 - x0)))

    def _search_field(self, vector: np.ndarray, top_k: int, **options) -> pd.DataFrame:
        from hnerv_clip.search.boxes import search_boxes

        found = search_boxes(self.field, vector, top_k, **options)
        y0, x0, height, width = found[["top", "left", "height", "width"]].to_numpy().T
        return _found(found, self.times_s, (x0, y0, x0 + width, y0 + height))

    def teacher(self, weights: str | None = None) -> Teacher:
        """The teacher in whose space the embeddings are, loaded once.

        Raises:
            ValueError: its weights are not those that the file was made with.
            ConfigError: they are not on this machine.
        """
        if weights not in self._teachers:
            from hnerv_clip.codec.about import weights_digest
            from hnerv_clip.teachers import load_teacher

            config = self.header.config
            if weights is not None:
                config = config.replace(clip_pretrained=weights)
            with ThreadPoolExecutor(1) as pool:
                digest = pool.submit(weights_digest, config.teacher)
                teacher = load_teacher(config.teacher, self.device)
                wanted, found = self.header.meta["teacher"]["weights"], digest.result()
            if wanted and found and wanted != found:
                raise ValueError(f"{self.path} was made with the teacher "
                                 f"{self.header.meta['teacher']['name']} ({wanted}), but the "
                                 f"weights here are others ({found}): give those weights")
            self._teachers[weights] = teacher
        return self._teachers[weights]

    # Notebooks

    def _repr_html_(self, *, thumbnails: int = 6, width: int = 160) -> str:
        """A strip of frames and the facts."""
        from PIL import Image

        strip = []
        for i in np.linspace(0, len(self) - 1, min(thumbnails, len(self))).astype(int):
            image = Image.fromarray(self[int(i)])
            image = image.resize((width, max(1, round(width * image.height / image.width))))
            file = io.BytesIO()
            image.save(file, "JPEG", quality=80)
            data = base64.b64encode(file.getvalue()).decode()
            words = f"frame {i} at {self.times_s[i]:.2f} s"
            strip.append(f'<img src="data:image/jpeg;base64,{data}" alt="{words}" title="{words}">')
        rows = "".join(f"<tr><th style=\"text-align:left\">{html.escape(name)}</th>"
                       f"<td style=\"text-align:left\">{html.escape(value)}</td></tr>"
                       for name, value in self.facts().items())
        return f"<div>{''.join(strip)}</div><table>{rows}</table>"

    def __repr__(self) -> str:
        height, width = self.size
        return f"<StoredVideo {self.name!r}: {len(self)} frames of {width}×{height}>"


def _found(found: pd.DataFrame, times_s: np.ndarray, corners) -> pd.DataFrame:
    import pandas as pd

    frames = found.frame.astype(int)
    return pd.DataFrame({
        "rank": found["rank"], "frame": frames, "time_s": times_s[frames],
        **dict(zip(("x0", "y0", "x1", "y1"), corners)), "score": found.score})


def mean_fps(times: Sequence[float]) -> float:
    """Frames a second, in the mean; 25 for a single frame."""
    return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 25.0
