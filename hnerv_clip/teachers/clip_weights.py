"""Where CLIP's weights are: a tag of open_clip, a checkpoint file, or `local-dir:FOLDER`."""

from __future__ import annotations

import difflib
import json
import os
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

from hnerv_clip.config import BUNDLED, BUNDLED_DIM, ConfigError, TeacherConfig
from hnerv_clip.paths import resolve_path

LOCAL_DIR = "local-dir:"


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
        return ClipSource(f"{LOCAL_DIR}{weights.parent}", None, None, str(weights))
    if is_file(source):
        path = str(resolve_path(source))
        return ClipSource(config.clip_model, path, None, path)
    tag = get_pretrained_cfg(config.clip_model, source)
    path = _cached_weights(tag) or _download(config, tag)
    return ClipSource(config.clip_model, path, tag, f"of tag {source!r}")


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
        path = folder / "open_clip_config.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))["model_cfg"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"clip_pretrained={config.clip_pretrained!r}: {path} does not read as an open_clip "
                f"configuration ({type(error).__name__}: {error}); give a folder that holds "
                "open_clip_config.json and the weights") from error
    architecture = open_clip.get_model_config(config.clip_model)
    if architecture is None:
        near = difflib.get_close_matches(config.clip_model, open_clip.list_models(), n=3)
        raise ConfigError(f"clip_model={config.clip_model!r} is not an architecture of open_clip; "
                          f"use {' or '.join(near) or 'ViT-B-32-quickgelu'}")
    if not is_file(config.clip_pretrained):
        _check_tag(config, architecture)
    return architecture


def _check_tag(config: TeacherConfig, architecture: dict) -> None:
    """Refuse an unknown tag, and one trained with another activation (features would be wrong)."""
    import open_clip

    model, source = config.clip_model, config.clip_pretrained
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


def _no_weights(config: TeacherConfig, reason: str) -> ConfigError:
    return ConfigError(
        f"the weights {config.clip_pretrained!r} of {config.clip_model} are not on this machine, "
        f"and {reason}. Ways out: (1) run once where there is a network, and carry the Hugging "
        "Face cache (~/.cache/huggingface) over; (2) clip_pretrained=FILE, a checkpoint that you "
        "copied here; (3) clip_pretrained='local-dir:FOLDER', with open_clip_config.json and the "
        f"weights. Without CLIP: teacher={BUNDLED!r}, clip_dim={BUNDLED_DIM} comes with the "
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
