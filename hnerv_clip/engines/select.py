"""The engine that a configuration asks for, on the device at hand."""

from __future__ import annotations

import gc
import warnings
from typing import NamedTuple

import torch
import torch.distributed as dist

from hnerv_clip.config import Config, ConfigError, TrainConfig
from hnerv_clip.dataset import Dataset
from hnerv_clip.devices import no_bfloat16, no_kernels, resolve_precision
from hnerv_clip.distributed import count_ranks
from hnerv_clip.engines.compiled import CompiledEngine
from hnerv_clip.engines.plain import PlainEngine, explain
from hnerv_clip.model import HNeRV

try:
    from hnerv_clip.engines.fused import network as fused
    from hnerv_clip.engines.fused.engine import FusedEngine
except ImportError:  # no Triton: it is made for Linux
    fused = None


class Choice(NamedTuple):
    """What `auto` stands for in a run on a device."""

    precision: str  # fp32, tf32 or bf16
    engine: str  # auto, plain or fast, for `make_engine`
    reason: str


def settle(config: TrainConfig, device: torch.device, before: dict | None = None) -> Choice:
    """Settle `precision=auto` and `engine=auto`: bf16 where the GPU has it, by the fastest engine.

    Args:
        before: what an interrupted run noted of itself (its provenance; {} if that is lost), and
            goes on with on a GPU. Runs that noted nothing are of a time when `auto` was tf32 by
            the plain engine.
    """
    used = resolve_precision(config.precision, device)
    reason = f"precision={config.precision}, engine={config.engine}"
    if device.type != "cuda":
        return Choice(used, config.engine, f"{reason}, no GPU")
    engine, precision, name = config.engine, used, torch.cuda.get_device_name(device)
    if before is not None and config.precision == "auto":
        precision = before.get("precision", "tf32")
        precision = precision if precision in ("tf32", used) else used  # fp32: it began on a CPU
    if before is not None and engine == "auto" and "fallback" not in before and \
            before.get("engine", "plain") == "plain" and before.get("device", name) == name:
        engine = "plain"
    if before is not None and (precision, engine) != (used, config.engine):
        return Choice(precision, engine, f"{reason}, as this run began")
    if config.precision == "auto":
        reason += f"; {no_bfloat16(device)}" if used == "tf32" else \
            f"; {name} computes in bfloat16, several times as fast as in tf32 and within 0.02 dB"
    return Choice(used, engine, reason)


def engine_name(engine: PlainEngine) -> str:
    """plain, compiled or fused."""
    return type(engine).__name__.removesuffix("Engine").lower()


def make_engine(config: Config, model: HNeRV, dataset: Dataset, *, autocast: torch.dtype
                ) -> PlainEngine:
    """The engine that `engine` asks for.

    `auto` takes the fused one for bfloat16 on a GPU, or on one rank the compiled one for a model
    that the kernels do not know; elsewhere the plain one, with a warning where a fast one was to be
    expected and cannot be had. `fast` insists: fused in bfloat16 likewise, else compiled. What
    turns out at the first steps only is for `fall_back`.

    Raises:
        ConfigError: engine=fast where it cannot be had; the message says why.
    """
    wish, half = config.train.engine, autocast == torch.bfloat16
    device = next(model.parameters()).device
    if wish == "plain" or wish == "auto" and (device.type != "cuda" or not half):
        if wish == "auto" and half and config.train.device == "auto":
            warnings.warn("no GPU here: training by the plain engine on the CPU, which is far "
                          "slower", stacklevel=2)
        return PlainEngine(config, model, dataset, autocast=autocast)
    engine, reason = _fast_engine(config, model, dataset, autocast=autocast)
    # One rank in another engine would wait for the others without end
    failed = count_ranks(engine is None, device)
    if failed and engine:
        reason = f"{failed} of {dist.get_world_size()} ranks cannot have it, see their output"
        engine = None
    if engine:
        return engine
    if wish == "fast":
        raise ConfigError(f"engine='fast' cannot be had: {reason}; use engine='auto' or 'plain'")
    warnings.warn(f"training by the plain engine, several times slower: {reason}", stacklevel=2)
    return PlainEngine(config, model, dataset, autocast=autocast)


def _fast_engine(config: Config, model: HNeRV, dataset: Dataset, *, autocast: torch.dtype
                 ) -> tuple[PlainEngine | None, str]:
    """The fastest engine for a model in a precision, or None and why there is none."""
    half, device = autocast == torch.bfloat16, next(model.parameters()).device
    if reason := _no_fast_engine(device, half):
        return None, reason
    missing = fused.unsupported(model) if half else None
    if missing and dist.is_initialized():
        return None, f"several ranks need the fused kernels, which do not know {missing}"
    kind = FusedEngine if half and not missing else CompiledEngine
    try:
        return kind(config, model, dataset, autocast=autocast), ""
    except torch.cuda.OutOfMemoryError:
        reason = "the GPU's memory is too small for its buffers"
    except fused.BUILD_ERRORS as error:
        reason = f"its kernels do not build here ({explain(error)})"
    torch.cuda.empty_cache()  # once the exception no longer holds what was made
    return None, reason


def can_fall_back(engine: PlainEngine) -> bool:
    """Whether the plain engine may take over: with `auto`. Ranks fail together, see `step`."""
    return engine.config.train.engine == "auto" and type(engine) is not PlainEngine


def fall_back(engine: PlainEngine, dataset: Dataset, reason: str) -> PlainEngine:
    """The plain engine in the place of a fast one, after a step that raised SetupError or found no
    memory. Weights and moments are taken over; the fast engine's memory is freed.
    """
    warnings.warn(f"going on by the plain engine, several times slower: {reason}", stacklevel=2)
    engine.sync()
    state = engine.optimizer.state_dict()
    config, model, autocast = engine.config, engine.model, engine.autocast
    compile_s = engine.compile_s
    vars(engine).clear()
    gc.collect()
    torch.cuda.empty_cache()
    plain = PlainEngine(config, model, dataset, autocast=autocast)
    if state["state"]:
        plain.load_optimizer(state)
    plain.compile_s = compile_s
    return plain


def _no_fast_engine(device: torch.device, half: bool) -> str | None:
    """Why this machine cannot run a fast engine, or None where it can."""
    if reason := no_kernels(device) or (no_bfloat16(device) if half else None):
        return reason
    if not half and dist.is_initialized():
        return "several ranks need precision='bf16'"
    return None
