"""Where CLIP's weights are: a tag of open_clip, a checkpoint file, or `local-dir:FOLDER`."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
import os
import re
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from hnerv_clip.config import BUNDLED, ConfigError, TeacherConfig
from hnerv_clip.paths import resolve_path

LOCAL_DIR = "local-dir:"
FOLDER_CONFIG = "open_clip_config.json"
PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")


class NoWeights(ConfigError):
    """CLIP's weights are neither on this machine nor to be had from it."""


class ClipSource(NamedTuple):
    """What open_clip is to load."""

    model: str  # architecture, or local-dir:FOLDER
    weights: str | None  # a file
    preprocess: dict | None
    origin: str  # for messages


def find_source(config: TeacherConfig) -> ClipSource:
    """Find the weights as a file, downloading them if a tag asks for it.

    Raises:
        ConfigError: they are not on this machine and cannot be had; the message lists the ways out.
    """
    from open_clip.pretrained import get_pretrained_cfg

    source = config.clip_pretrained
    if source.startswith(LOCAL_DIR):
        weights = weights_file(config)
        return ClipSource(f"{LOCAL_DIR}{weights.parent}", None,
                          read_preprocessing(config, warn=True), str(weights))
    preprocessing = read_preprocessing(config, warn=True)
    if is_file(source):
        path = str(resolve_path(source))
        return ClipSource(config.clip_model, path, preprocessing, path)
    tag = get_pretrained_cfg(config.clip_model, source)
    path = _cached_weights(tag) or _download(config, tag)
    return ClipSource(config.clip_model, path, preprocessing, f"of tag {source!r}")


def is_file(source: str) -> bool:
    """Whether `clip_pretrained` names a file, rather than a tag or a folder."""
    return resolve_path(source).is_file()


def read_architecture(config: TeacherConfig) -> dict:
    """open_clip's model configuration, once it is known to suit the source of the weights.

    Raises:
        ConfigError: an unknown architecture or tag, a folder without a configuration, or weights
            that were trained with another activation.
    """
    import open_clip

    if config.clip_pretrained.startswith(LOCAL_DIR):
        folder = resolve_path(config.clip_pretrained.removeprefix(LOCAL_DIR))
        path = folder / FOLDER_CONFIG
        try:
            return _read_folder(path)["model_cfg"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"clip_pretrained={config.clip_pretrained!r}: {path} does not read as an open_clip "
                f"configuration ({type(error).__name__}: {error}); give a folder that holds "
                "open_clip_config.json and the weights") from error
    architecture = None if ":" in config.clip_model else \
        open_clip.get_model_config(config.clip_model)
    if architecture is None:
        near = difflib.get_close_matches(config.clip_model, open_clip.list_models(), n=3)
        raise ConfigError(f"clip_model={config.clip_model!r} is not an architecture of open_clip; "
                          f"use {' or '.join(near) or 'ViT-B-32-quickgelu'}, or "
                          "clip_pretrained='local-dir:FOLDER' for one of your own")
    tags = _named_tags(config) if is_file(config.clip_pretrained) else [config.clip_pretrained]
    for tag in tags:
        _check_tag(config, architecture, tag)
    return architecture


def _read_folder(path: Path) -> dict:
    """open_clip_config.json, with a model_cfg that describes two towers.

    Raises:
        OSError, ValueError, KeyError, TypeError: it is not there, or does not.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    model = content["model_cfg"]
    if not (isinstance(model["vision_cfg"], dict) and isinstance(model["text_cfg"], dict)
            and int(model["embed_dim"]) > 0):
        raise ValueError("its model_cfg has no embed_dim above 0, vision_cfg and text_cfg")
    if not isinstance(content.get("preprocess_cfg", {}), dict):
        raise ValueError("its preprocess_cfg is no object")
    return content


def _named_tags(config: TeacherConfig) -> list[str]:
    """Tags of the architecture that the name of a weights file holds, as downloads do."""
    import open_clip

    path = resolve_path(config.clip_pretrained)
    folder = next((part for part in path.parts if part.startswith("models--")), "")
    named = _letters(folder + path.name)
    tags = [tag for tag in open_clip.list_pretrained_tags_by_model(config.clip_model)
            if len(_letters(tag)) >= 5 and _letters(tag) in named]
    return [tag for tag in tags if not any(  # dfn2b_s39b, not dfn2b too
        _letters(tag) in _letters(other) and tag != other for other in tags)]


def _letters(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def openai_preprocessing() -> dict:
    """What open_clip takes where nothing is said."""
    from open_clip.transform import PreprocessCfg

    default = dataclasses.asdict(PreprocessCfg())
    return {name: list(default[name]) if isinstance(default[name], tuple) else default[name]
            for name in PREPROCESSING}


def read_preprocessing(config: TeacherConfig, *, warn: bool = False) -> dict:
    """How pictures must be prepared: mean, std, interpolation, resize_mode.

    A tag and a folder say it. For a file, in this order: an open_clip_config.json of the same
    architecture beside it, a tag in its name, and what all tags of the architecture have in common.

    Args:
        warn: say where nothing tells, and what OpenAI's CLIP wants is taken.

    Raises:
        ConfigError: a file of an architecture whose tags differ, with nothing that tells which; or
            see `read_architecture`.
    """
    import open_clip

    architecture, default = read_architecture(config), openai_preprocessing()
    model, source = config.clip_model, config.clip_pretrained

    def complete(given: dict) -> dict:
        found = {name: default[name] if given.get(name) is None else given[name]
                 for name in PREPROCESSING}
        for name in ("mean", "std"):  # one for each color, or one for all
            found[name] = list(found[name]) if isinstance(found[name], (list, tuple)) else \
                [found[name]] * 3
        return found

    if source.startswith(LOCAL_DIR):
        given = _read_folder(weights_file(config).parent / FOLDER_CONFIG).get("preprocess_cfg")
        if not given and warn:
            warnings.warn(f"{source} has no preprocess_cfg in {FOLDER_CONFIG}: its pictures are "
                          "prepared as OpenAI's CLIP wants them", stacklevel=2)
        return complete(given or {})
    if not is_file(source):
        return complete(open_clip.get_pretrained_cfg(model, source))
    try:
        beside = _read_folder(resolve_path(source).parent / FOLDER_CONFIG)
        if beside["model_cfg"]["vision_cfg"] == architecture["vision_cfg"] and \
                beside.get("preprocess_cfg"):
            return complete(beside["preprocess_cfg"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # nothing there that would help
    tags = _named_tags(config) or open_clip.list_pretrained_tags_by_model(model)
    known = {tag: complete(open_clip.get_pretrained_cfg(model, tag)) for tag in tags}
    if not known:
        if warn:
            warnings.warn(f"no weights of clip_model={model!r} were published: pictures are "
                          f"prepared as OpenAI's CLIP wants them, unless {FOLDER_CONFIG} beside "
                          f"{source} says otherwise", stacklevel=2)
        return complete({})
    first, *others = known.values()
    if any(other != first for other in others):
        raise ConfigError(
            f"clip_pretrained={source!r}: weights of {model} were published for pictures that are "
            "prepared in different ways, and the file's name does not tell which: put its tag into "
            f"it (such as {model}-{next(reversed(known))}{Path(source).suffix}; tags are "
            f"{', '.join(known)}), or its {FOLDER_CONFIG} beside it")
    return first


def check_text_tower(architecture: dict, origin: str) -> None:
    """Refuse a text tower of the package transformers where that is not installed."""
    name = architecture["text_cfg"].get("hf_model_name")
    if name and importlib.util.find_spec("transformers") is None:
        raise ConfigError(f"the weights {origin} have a text tower of the package transformers "
                          f"({name}), which is not installed: pip install transformers")


def load_tokenizer(model: str, architecture: dict) -> Callable[[list[str]], Tensor]:
    """The architecture's own tokenizer.

    Args:
        model: architecture, or local-dir:FOLDER.
    Raises:
        ConfigError: the package transformers is missing, or the tokenizer is neither on this
            machine nor to be had.
    """
    import open_clip
    from huggingface_hub import constants, try_to_load_from_cache

    name = architecture["text_cfg"].get("hf_tokenizer_name")
    needs = f"texts of {model} need the tokenizer {name or 'of CLIP'}"
    if name and importlib.util.find_spec("transformers") is None:
        raise ConfigError(f"{needs}, which the package transformers reads: pip install "
                          "transformers. Pictures need none")
    ways = ("Run once where there is a network and carry the Hugging Face cache over, or give "
            "clip_pretrained='local-dir:FOLDER' with the tokenizer's files in it. Pictures need "
            "none")
    if name and not model.startswith(LOCAL_DIR) and not any(
            isinstance(try_to_load_from_cache(name, file), str)
            for file in ("tokenizer.json", "tokenizer_config.json")):
        if constants.HF_HUB_OFFLINE or not _answers(constants.ENDPOINT):
            raise ConfigError(f"{needs}, which is not on this machine, and {constants.ENDPOINT} "
                              f"cannot be asked. {ways}")
    try:
        return open_clip.get_tokenizer(model)
    except Exception as error:  # it fails in many ways, and the ways out are the same
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ConfigError(f"{needs}, which does not load ({reason}). {ways}") from error


def _check_tag(config: TeacherConfig, architecture: dict, source: str) -> None:
    """Refuse an unknown tag, and one trained with another activation (features would be wrong)."""
    import open_clip

    model = config.clip_model
    tag = open_clip.get_pretrained_cfg(model, source)
    if not tag:
        tags = open_clip.list_pretrained_tags_by_model(model)
        raise ConfigError(f"clip_pretrained={source!r} is neither a file nor a tag of {model}; use "
                          f"a file that exists, local-dir:FOLDER, or one of {', '.join(tags)}")
    needs, has = bool(tag.get("quick_gelu")), bool(architecture.get("quick_gelu"))
    if needs != has:
        fix = f"{model}-quickgelu" if needs else model.removesuffix("-quickgelu")
        raise ConfigError(f"the weights {source!r} were trained {'with' if needs else 'without'} "
                          f"QuickGELU, but clip_model={model!r} runs {'with' if has else 'without'}"
                          f" it: use clip_model={fix!r}")


def weights_file(config: TeacherConfig) -> Path:
    """The weights in a `local-dir:` folder, or the checkpoint file itself.

    Raises:
        ConfigError: the folder holds no weights.
    """
    if not config.clip_pretrained.startswith(LOCAL_DIR):
        return resolve_path(config.clip_pretrained)
    from open_clip.factory import _find_checkpoint_in_dir  # so that we hash the file that it loads

    folder = resolve_path(config.clip_pretrained.removeprefix(LOCAL_DIR))
    found = _find_checkpoint_in_dir(folder)
    if found is None:
        raise ConfigError(f"clip_pretrained={config.clip_pretrained!r}: {folder} holds no weights, "
                          "and a model without them is random; put open_clip_model.safetensors or "
                          "open_clip_pytorch_model.bin beside open_clip_config.json")
    return Path(found)


def _cached_weights(tag: dict) -> str | None:
    """The file of a tag's weights if an earlier download left it on this machine."""
    from huggingface_hub import try_to_load_from_cache
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

    if tag.get("hf_hub"):
        repository, file = os.path.split(tag["hf_hub"])
        file = file or HF_WEIGHTS_NAME
        safe = HF_SAFE_WEIGHTS_NAME if file == HF_WEIGHTS_NAME \
            else f"{os.path.splitext(file)[0]}.safetensors"
        found = (try_to_load_from_cache(repository, name) for name in (safe, file))
        return next((path for path in found if isinstance(path, str)), None)
    path = Path.home() / ".cache" / "clip" / Path(tag.get("url", "none")).name
    return str(path) if path.is_file() else None


def _download(config: TeacherConfig, tag: dict) -> str:
    from huggingface_hub import constants
    from open_clip.pretrained import download_pretrained

    host = constants.ENDPOINT if tag.get("hf_hub") else tag["url"]
    if tag.get("hf_hub") and constants.HF_HUB_OFFLINE:
        raise _no_weights(config, "HF_HUB_OFFLINE is set")
    if not _answers(host):
        raise _no_weights(config, f"{host} does not answer")
    try:
        return download_pretrained(tag)
    except Exception as error:  # a download fails in many ways, and the ways out are the same
        raise _no_weights(config, f"the download failed: {error}") from error


def _no_weights(config: TeacherConfig, reason: str) -> NoWeights:
    return NoWeights(
        f"the weights {config.clip_pretrained!r} of {config.clip_model} are not on this machine, "
        f"and {reason}. Ways out: (1) run once where there is a network, and carry the Hugging "
        "Face cache (~/.cache/huggingface) over; (2) clip_pretrained=FILE, a checkpoint that you "
        "copied here; (3) clip_pretrained='local-dir:FOLDER', with open_clip_config.json and the "
        f"weights. Without CLIP: teacher={BUNDLED!r} comes with the "
        "installation; it is not CLIP, and every page says so")


def _answers(url: str, timeout_s: float = 4.0) -> bool:
    """Whether a host answers at all. In a thread, because a name lookup obeys no time limit."""
    answered = threading.Event()

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=timeout_s).close()
        except urllib.error.HTTPError:
            pass  # an answer, if not a kind one
        except (OSError, ValueError):
            return
        answered.set()

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(timeout_s)
    return answered.is_set()
