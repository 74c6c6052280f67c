"""Whether runs that were made twice went the same way, to the last bit.

    python -m hnerv_clip.study.repeats FIRST SECOND --out book/results/repeats.json

compares the runs of one name and the same settings that two folders hold, epoch by epoch, and adds
them to the file.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from hnerv_clip.files import read_json, write_json
from hnerv_clip.paths import resolve_path
from hnerv_clip.runs.run_dir import RunDir

LOSSES = ["pixel_loss", "clip_loss", "total_loss", "psnr_db"]  # of an epoch's steps
KEY = ("run", "epochs", "first", "second")


def compare_runs(first: Path, second: Path) -> list[dict[str, Any]]:
    """A row for each finished run that both folders hold, with the same settings.

    Returns:
        run, epochs, head (whether it has one), compared, same_epochs (those before the losses
        first differ), same, psnr_db (of both, on training frames), and commit and device of the
        `first` and the `second`.
    """
    rows = []
    for path in sorted(second.glob("*/summary.json")):
        pair = [RunDir(first / path.parent.name), RunDir(path.parent)]
        if not all(run.finished for run in pair) or pair[0].config() != pair[1].config():
            continue
        losses = [run.metrics()[LOSSES] for run in pair]
        # NaN of a loss that is not there equals itself
        same = ((losses[0] == losses[1]) | (losses[0].isna() & losses[1].isna())).all(axis=1)
        epochs = len(losses[0])
        rows.append({
            "run": path.parent.name, "epochs": epochs,
            "head": pair[0].config().model.predict_clip, "compared": "the losses of every epoch",
            "same_epochs": epochs if same.all() else int(same.argmin()), "same": bool(same.all()),
            "psnr_db": [run.summary()["eval_psnr_train"] for run in pair],
            **{name: {key: run.provenance()[key] for key in ("commit", "device")}
               for name, run in zip(("first", "second"), pair)}})
    return rows


def add_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Put rows into a file, in place of those of the same two runs."""
    kept = read_json(path, keys={"rows": list}, fix="remove it") if path.is_file() else {"rows": []}
    found = {str([row[name] for name in KEY]): row for row in [*kept["rows"], *rows]}
    write_json(path, {**kept, "rows": list(found.values())})


def main(argv: Sequence[str] | None = None) -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("first", type=Path, help="a folder of runs")
    parser.add_argument("second", type=Path, help="a folder of runs of the same names")
    parser.add_argument("--out", type=Path, required=True, help="a JSON file, made or added to")
    args = parser.parse_args(argv)
    rows = compare_runs(args.first, args.second)
    add_rows(resolve_path(args.out), rows)
    print(pd.DataFrame(rows)[["run", "epochs", "same_epochs"]].to_string(index=False)
          if rows else "no finished run is in both folders with the same settings")


if __name__ == "__main__":
    main()
