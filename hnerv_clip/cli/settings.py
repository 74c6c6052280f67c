"""Settings on a command line: ``--name value``, with the names of the original one."""

from __future__ import annotations

import argparse
from typing import Any

from hnerv_clip.config import Config, ConfigError, param_names, settings_table

SHORT = {"b": "batch_size", "batchSize": "batch_size", "e": "epochs", "d": "distributed"}
# Options of the original scripts that are something else here
INSTEAD = {
    "distributed": "add --gpus_per_node N, and --cluster local or slurm",
    "eval_only": "use `hnerv-clip evaluate OUTF`",
    "resume": "a run in the same --outf resumes by itself",
    "weight": "a run in the same --outf resumes by itself",
    "vid": "--outf names the run, --data_path the video",
}


def read_settings(words: list[str]) -> dict[str, Any]:
    """`--enc_strds 5 4 4 2 2 --predict_clip -b 2` as flat parameters.

    A flag without a value is True; several values are joined by spaces.

    Raises:
        ConfigError: an unknown name, a value without a name, or a name without a value.
    """
    given: dict[str, list[str]] = {}
    name = None
    for word in words:
        if word.startswith("-") and not _is_number(word):
            name, equals, value = word.lstrip("-").partition("=")
            name = SHORT.get(name, name)
            if name in INSTEAD:
                raise ConfigError(f"{word} is not needed here: {INSTEAD[name]}")
            given[name] = [value] if equals else []
        elif name is None:
            raise ConfigError(f"{word!r} stands without a name; write --name value")
        else:
            given[name].append(word)
    defaults = Config().params()
    for name, values in given.items():
        if not values and not isinstance(defaults.get(name, ""), bool) and name in defaults:
            raise ConfigError(f"--{name} needs a value; the default is {defaults[name]!r}")
    return {name: " ".join(values) if values else "True" for name, values in given.items()}


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def show_settings(args: argparse.Namespace) -> None:
    """Print every setting, its default and its meaning."""
    width = max(map(len, param_names())) + 2
    group = None
    for name, default, own_group, meaning in settings_table():
        if own_group != group:
            group = own_group
            print(f"\n{group}")
        print(f"  --{name:<{width}}{default or '(empty)':<20}{meaning}")
