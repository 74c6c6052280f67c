"""Packed parameters, as a command line or a notebook gives them, to typed values and back."""

from __future__ import annotations

from typing import Any

from hnerv_clip.config.settings import AUTO, AUTO_NAMES, ConfigError, Split, defaults

# The shape of each packed parameter: how many values, of which type, and an example.
_PACKED: dict[str, tuple[int | None, type, str]] = {
    "crop_list": (2, int, "640_1280"),
    "resize_list": (2, int, "320_640"),
    "data_split": (3, int, "4_5_5"),
    "pad_list": (2, int, "672_1280"),
    "patch_grid": (2, int, "2_4"),
    "enc_strds": (None, int, "5 4 4 2 2"),
    "dec_strds": (None, int, "5 4 4 2 2"),
    "enc_dim": (2, float, "64_16"),
    "fc_hw": (2, int, "2_4"),
    "ks": (3, int, "0_1_5"),
    "num_blks": (2, int, "1_1"),
    "conv_type": (2, str, "convnext pshuffel"),
}
_NEEDED = {int: "an integer", float: "a number", bool: "True or False"}
_OPTIONAL = {"crop_list", "resize_list", "pad_list", "patch_grid"}


def parse(name: str, value: Any) -> Any:
    """A parameter's value in its type.

    Raises:
        ConfigError: it is not of that type, or does not parse.
    """
    if value == AUTO and name in AUTO_NAMES:
        return AUTO
    if name in _PACKED:
        return _unpack(name, value)
    wanted = int if name in AUTO_NAMES else type(defaults()[name])
    try:
        if wanted is bool:
            return _to_bool(value)
        if wanted is int and isinstance(value, bool):
            raise ValueError
        if wanted is int and float(value) != int(float(value)):
            raise ValueError
        return wanted(float(value)) if wanted is int else wanted(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{name}={value!r}: {_NEEDED[wanted]} is needed; the default is "
                          f"{name}={defaults()[name]!r}") from None


def _to_bool(value: Any) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false", "1", "0"):
        return value.lower() in ("true", "1")
    if value in (True, False):
        return bool(value)
    raise ValueError


def _unpack(name: str, value: Any) -> tuple | None:
    count, kind, example = _PACKED[name]
    if value is None or value in ("", "-1", -1):
        if name in _OPTIONAL:
            return None
        raise ConfigError(f"{name} is empty; write for example {name}={example!r}")
    parts = value.replace("_", " ").replace(",", " ").split() if isinstance(value, str) \
        else list(value) if isinstance(value, (tuple, list)) else [value]
    try:
        if kind is str:
            parsed = tuple(str(part) for part in parts)
        else:
            numbers = [float(part) for part in parts]
            if kind is int and any(n != int(n) for n in numbers):
                raise ValueError
            # enc_dim is the one float pair: its first value, and a second of 1 or more, are counts
            parsed = tuple(int(n) if n == int(n) else n for n in numbers)
    except (TypeError, ValueError, OverflowError):
        needed = "integers" if kind is int else "numbers"
        raise ConfigError(f"{name}={value!r}: {count or 'one or more'} {needed} are needed; write "
                          f"for example {name}={example!r}") from None
    if count is not None and len(parsed) != count or not parsed:
        hint = f" (papermill -p reads {example} as one number; pass it with -r)" \
            if isinstance(value, int) else ""
        raise ConfigError(f"{name}={value!r} has {len(parsed)} values, not {count or 'one or more'}"
                          f"; write for example {name}={example!r}{hint}")
    return Split(*parsed) if name == "data_split" else parsed


def pack(name: str, value: Any) -> Any:
    """The packed form of a typed value: `parse(name, pack(name, value)) == value`."""
    if value is None:
        return ""
    if isinstance(value, tuple):
        return (" " if name in ("enc_strds", "dec_strds", "conv_type") else "_").join(
            map(str, value))
    return value
