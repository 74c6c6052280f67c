"""All settings of a run in one object, with what is ``auto`` chosen.

What depends on the frame's size stays ``auto`` until that is known, see `Config.resolve`.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hnerv_clip.config.packing import pack, parse
from hnerv_clip.config.presets import PRESETS, PROFILES
from hnerv_clip.config.rules import embed_kind, one_of, validate
from hnerv_clip.config.settings import (
    AUTO,
    AUTO_NAMES,
    BUNDLED,
    BUNDLED_DIM,
    GROUPS,
    RUNTIME_PARAMS,
    Auto,
    ConfigError,
    ModelConfig,
    TeacherConfig,
    TrainConfig,
    VideoConfig,
    param_names,
)
from hnerv_clip.paths import resolve_path
from hnerv_clip.sizes import choose_patch_grid, choose_patch_size, choose_strides, pad_to


@dataclass(frozen=True)
class Config:
    """All settings of one run. Build it with `Config.from_params`."""

    video: VideoConfig = field(default_factory=VideoConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    # Names that were left to `auto`: `replace` chooses them anew
    chosen: frozenset[str] = field(default=frozenset(), compare=False, repr=False)

    @classmethod
    def from_params(cls, *, preset: str = AUTO, **params: Any) -> Config:
        """Parse flat parameters, as typed on a command line or set in a notebook.

        What is `auto` is chosen here where crop_list or resize_list tell the frame's size, and
        clip_dim where an architecture of open_clip's or the bundled teacher does.

        Args:
            preset: a row of `PRESETS`: `paper` for the values of HNeRV's paper, where `params` name
                no others.
            params: any of `param_names()`; packed strings or typed values. A name that is left
                out keeps its default.
        Raises:
            ConfigError: an unknown name, or a value that breaks a rule.
        """
        one_of("preset", preset, tuple(PRESETS))
        params = {**PRESETS[preset], **params}
        unknown = sorted(set(params) - set(param_names()))
        if unknown:
            near = {name: difflib.get_close_matches(name, param_names(), n=1) for name in unknown}
            hints = [f"{name!r}" + (f" (did you mean {close[0]}?)" if close else "")
                     for name, close in near.items()]
            raise ConfigError(f"unknown parameter {', '.join(hints)}: the command `hnerv-clip "
                              "settings` lists all")
        chosen = frozenset(name for name in AUTO_NAMES if params.get(name, AUTO) in (AUTO, (AUTO,)))
        if "crop_list" in chosen:
            bunny = params.get("data_path", VideoConfig.data_path) == "bunny"
            params["crop_list"] = PRESETS["paper"]["crop_list"] if bunny else ""
        if params.get("head") == "field":  # then the network has no head of its own
            params.setdefault("predict_clip", False)
        groups = {}
        for group, group_type in GROUPS.items():
            values = {f.name: parse(f.name, params[f.name]) for f in fields(group_type)
                      if f.name in params}
            if group == "model" and values.get("clip_dim", AUTO) == AUTO:
                values["clip_dim"] = resolve_clip_dim(groups["teacher"])
            groups[group] = group_type(**values)
        config = cls(**groups, chosen=chosen)
        validate(config.video, config.teacher, config.model, config.train)
        frame_hw = config.video.resize_list or config.video.crop_list
        return config.resolve(frame_hw) if frame_hw else config

    @property
    def resolved(self) -> bool:
        """Whether nothing waits for the frame's size."""
        model = self.model
        return AUTO not in (self.teacher.patch_grid, model.enc_strds, model.dec_strds, model.fc_hw,
                            model.pad_list)

    @property
    def embeds(self) -> bool:
        """Whether the run predicts embeddings, by a head or by a field."""
        return self.model.predict_clip or self.model.head == "field"

    def resolve(self, frame_hw: tuple[int, int]) -> Config:
        """What is `auto`, chosen for frames of height and width `frame_hw`; the rest as it is."""
        if self.resolved:
            return self
        config = dataclasses.replace(
            self, teacher=dataclasses.replace(
                self.teacher, patch_grid=resolve_patch_grid(self.teacher, frame_hw)),
            model=resolve_model(self.model, frame_hw))
        validate(config.video, config.teacher, config.model, config.train)
        return config

    def params(self) -> dict[str, Any]:
        """The flat, packed form: `Config.from_params(**config.params()) == config`."""
        return {f.name: pack(f.name, getattr(getattr(self, group), f.name))
                for group, group_type in GROUPS.items() for f in fields(group_type)}

    def replace(self, **params: Any) -> Config:
        """A copy with some flat parameters changed; those left to `auto` are chosen anew."""
        left = dict.fromkeys(self.chosen, AUTO)
        return Config.from_params(**{**self.params(), **left, **params})

    def diff(self, other: Config) -> dict[str, tuple[Any, Any]]:
        """Parameters that differ and that change a result, as {name: (this one's, the other's)}.

        What is still `auto` on one side differs from nothing.
        """
        params, others = self.params(), other.params()
        return {name: (params[name], others[name]) for name in params
                if params[name] != others[name] and name not in RUNTIME_PARAMS
                and not (name in AUTO_NAMES and AUTO in (params[name], others[name]))
                and not (name == "clip_dim" and not self.embeds and not other.embeds)}


def resolve_clip_dim(teacher: TeacherConfig) -> int | Auto:
    """The number of values in a teacher's embedding; `auto` for an architecture that is not known.

    Configuration files of open_clip's are read, without importing it.
    """
    if teacher.teacher == BUNDLED:
        return BUNDLED_DIM
    try:
        if teacher.clip_pretrained.startswith("local-dir:"):
            folder = resolve_path(teacher.clip_pretrained.removeprefix("local-dir:"))
            return int(_read_json(folder / "open_clip_config.json")["model_cfg"]["embed_dim"])
        package = Path(importlib.util.find_spec("open_clip").origin).parent
        name = teacher.clip_model.replace("/", "-")
        return int(_read_json(package / "model_configs" / f"{name}.json")["embed_dim"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return AUTO  # what loads the teacher says what is wrong


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def resolve_patch_grid(teacher: TeacherConfig, frame_hw: tuple[int, int]
                       ) -> tuple[int, int] | None:
    """(rows, columns) of patches of frames of height and width `frame_hw`; None for a sweep."""
    if teacher.patch_grid != AUTO:
        return teacher.patch_grid
    return choose_patch_grid(frame_hw, teacher.patch_size or choose_patch_size(frame_hw))


def resolve_model(model: ModelConfig, frame_hw: tuple[int, int]) -> ModelConfig:
    """What of strides, base resolution and padding is `auto`, for frames of `frame_hw` (H, W).

    A coordinate model whose `fc_hw` is given is not padded, but resized to the frame.
    """
    given = [strides for strides in (model.enc_strds, model.dec_strds) if strides != AUTO]
    strides = given[0] if given else choose_strides(frame_hw)
    enc_strds = strides if model.enc_strds == AUTO else model.enc_strds
    dec_strds = strides if model.dec_strds == AUTO else model.dec_strds
    hybrid = embed_kind(model.embed) == "hybrid"
    product = math.prod(enc_strds if hybrid else dec_strds)
    padded, pad_list = pad_to(frame_hw, product), model.pad_list
    if pad_list == AUTO:
        pads = (hybrid or model.fc_hw == AUTO) and padded != tuple(frame_hw)
        pad_list = padded if pads else None
    up = math.prod(dec_strds)
    fc_hw = tuple(-(-side // up) for side in frame_hw) if model.fc_hw == AUTO else model.fc_hw
    return dataclasses.replace(model, enc_strds=enc_strds, dec_strds=dec_strds, fc_hw=fc_hw,
                               pad_list=pad_list)


def profile_params(profile: str, **overrides: Any) -> dict[str, Any]:
    """Every parameter of a profile, flat and packed.

    Args:
        overrides: values that win over the profile's; what is `auto` is chosen for them.
    Raises:
        ConfigError: unknown profile.
    """
    one_of("profile", profile, tuple(PROFILES))
    config = Config.from_params(**PROFILES[profile] | overrides)
    follows = {"clip_dim": AUTO} if "clip_dim" in config.chosen else {}  # whichever teacher is set
    return config.params() | follows


def settings_table() -> list[tuple[str, str, str, str]]:
    """(name, packed default, group, meaning) of every parameter, for README, book and help.

    The meaning is that of the field above.
    """
    return [(f.name, AUTO if f.name in AUTO_NAMES else str(pack(f.name, f.default)), group,
             f.metadata["meaning"])
            for group, group_type in GROUPS.items() for f in dataclasses.fields(group_type)]
