"""From what `book_runs` left in its folder to the files of `book/results`, in the pages' format.

A file never says less than the published one: videos of `verification_cross_fit.json`, groups of
`study.csv` and runs elsewhere are replaced by new ones that hold as much. What is new of the study
is in `study_new.csv` in any case.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from hnerv_clip.bench.context import run_record
from hnerv_clip.config import BUNDLED, TeacherConfig
from hnerv_clip.files import read_json, write_atomic, write_json
from hnerv_clip.paths import resolve_path
from hnerv_clip.runs.run_dir import RunDir
from hnerv_clip.study.cross_fit import cross_fit_results, merge_cross_fit
from hnerv_clip.study.folders import Folders
from hnerv_clip.study.recipe_parts import part_folder, part_names, part_row
from hnerv_clip.study.table import StudyError, study_table
from hnerv_clip.teachers.base import describe_teacher

PUBLISHED = "book/results"
FIX = "git checkout book/results"
RECIPE = "recipe_h100.json"
TRADE_OFF = "base|pixels_only|lambda_.*|warmup_.*"


def collect_results(folders: Folders, *, kinds: tuple[str, ...] = (),
                    say: Callable[[str], Any] = print) -> None:
    """Write what steps of these kinds gave, of all by default; a file that fails is said."""
    folders.out.mkdir(parents=True, exist_ok=True)
    for kind, makers in COLLECT.items():
        for make in makers if not kinds or kind in kinds else ():
            try:
                make(folders)
            except Exception as error:  # the runs themselves are kept
                say(f"{make.__name__}: not written ({type(error).__name__}: {error})")


def read_published(folders: Folders, name: str) -> dict[str, Any] | None:
    """What a file of results holds: the one that is written, else the published one."""
    for folder in (folders.out, resolve_path(PUBLISHED)):
        if (folder / name).is_file():
            return read_json(folder / name, fix=FIX)
    return None


def collect_study(folders: Folders) -> None:
    """`study_new.csv`; `study.csv` and `study_trade_off.csv` where it holds all of theirs."""
    try:
        new = study_table(folders.study)
    except StudyError:
        return
    _write_csv(new, folders.out / "study_new.csv")
    swept = new[(new.video == "bunny") & (new.kind == "hybrid")
                & new.variant.str.fullmatch(TRADE_OFF)]
    for name, rows in (("study.csv", new), ("study_trade_off.csv", swept)):
        path = folders.out / name
        source = path if path.is_file() else resolve_path(PUBLISHED) / name
        old = pd.read_csv(source) if source.is_file() else rows.head(0)
        _write_csv(merge_study(old, rows), path)


def merge_study(old: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    """Rows of two tables of the study: of a video and kind, the new ones if they hold all runs of
    the old ones, so that none is compared with one of another commit."""
    chosen = []
    for key in dict.fromkeys([*zip(old.video, old.kind), *zip(new.video, new.kind)]):
        parts = [table[(table.video == key[0]) & (table.kind == key[1])] for table in (old, new)]
        chosen.append(parts[set(parts[0].run) <= set(parts[1].run)])
    return pd.concat([part.dropna(axis=1, how="all") for part in chosen],
                     ignore_index=True).reindex(columns=list(dict.fromkeys([*old, *new])))


def collect_cross_fit(folders: Folders) -> None:
    """`verification_cross_fit.json`."""
    name, found = "verification_cross_fit.json", cross_fit_results(folders.study)
    if found["runs"]:
        old = read_published(folders, name) or {"runs": [], "answers": [], "means": []}
        write_json(folders.out / name, merge_cross_fit(old, found))


def collect_fidelity(folders: Folders) -> None:
    """`fidelity.json`: a run takes the place of one of the same seed, engine and precision."""
    runs = [RunDir(path.parent) for path in sorted(folders.outf.glob("fidelity/*/summary.json"))]
    if runs:
        measured = read_published(folders, "fidelity.json") or {"runs": [], "reference": {}}
        write_json(folders.out / "fidelity.json", put_fidelity(measured, runs))


def put_fidelity(measured: dict[str, Any], runs: list[RunDir]) -> dict[str, Any]:
    """Finished runs beside those of `fidelity.json` or in their place; the reference stays.

    Raises:
        RunError: a run is not finished.
    """
    rows = {(run["seed"], run["engine"], run["precision"]): run for run in
            [*measured["runs"], *map(run_record, runs)]}
    return {"runs": list(rows.values()), "reference": measured["reference"]}


def collect_fields(folders: Folders) -> None:
    """`field_h100.json`: designs of fields, what needs no field, pairs, and the original head."""
    folder, name = folders.outf / "fields", "field_h100.json"
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    if not found:
        return
    measured = {"rows": [], "pairs": []} | (read_published(folders, name) or {})
    fields = [one for one in found if "head" in one]
    teacher = [{**row, **{key: one[key] for key in ("commit", "dirty", "device", "date")}}
               for one in found if "rows" in one for row in one["rows"]]
    plain = [row for row in fields if row["network"] == "frozen"]
    pairs = merge_rows(measured["pairs"], [row for row in fields if row["head"] == "default"],
                       key=("video",), parts=("network", "seed"))
    write_json(folders.out / name, {
        "about": {**measured.get("about", {}),
                  "teacher": describe_teacher(TeacherConfig(teacher=BUNDLED)).label,
                  "made by": "hnerv_clip.study.fields: measure_field, measure_teacher"},
        "rows": merge_rows(measured["rows"], [*plain, *teacher],
                           key=("video", "head", "baseline", "what", "where"),
                           parts=("seed", "pixels", "budget")),
        "pairs": pairs, "original": original_heads(pairs)})


def merge_rows(old: list[dict[str, Any]], new: list[dict[str, Any]], *, key: tuple[str, ...],
               parts: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of two tables: of a key, the new ones if they hold all parts of the old ones, so that
    none is lost, or averaged with one of another commit."""
    def pick(row: dict[str, Any], names: tuple[str, ...]) -> tuple[Any, ...]:
        return tuple(map(row.get, names))

    merged = []
    for one in dict.fromkeys(pick(row, key) for row in [*old, *new]):
        before, after = ([row for row in rows if pick(row, key) == one] for rows in (old, new))
        held = {pick(row, parts) for row in before} <= {pick(row, parts) for row in after}
        merged += after if held else before
    return merged


def original_heads(pairs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By video the original head's skill at its `eight` positions and at `any` box: means over so
    many `seeds`, those of which both networks are there."""
    found: dict[str, dict[str, float]] = {}
    for video in dict.fromkeys(row["video"] for row in pairs):
        own = pd.DataFrame([row for row in pairs if row["video"] == video]).set_index("seed")
        joint, frozen = (own[own.network == name] for name in ("joint", "frozen"))
        seeds = joint.index.intersection(frozen.index)
        if len(seeds):
            found[video] = {
                "eight": float(joint.original_eight[seeds].mean()),
                "any": float(joint.original_any[seeds].mean()), "seeds": len(seeds)}
    return found


def collect_rates(folders: Folders) -> None:
    """`rate_quality.json`, from runs with a fine-tuned point; needs bjontegaard."""
    from hnerv_clip.bench.rate_quality import collect, run_of

    found = [read_json(path, fix="remove it") for path in
             sorted(folders.outf.glob("rates/*/rate.json"))]
    runs = [run_of(one, commit=one["commit"], fine_tune_lr=one["fine_tune_lr"]) for one in found
            if any(point["kind"] == "tuned" for point in one["points"])]
    if runs:
        path = folders.out / "rate_quality.json"
        if not path.is_file():
            write_json(path, read_published(folders, "rate_quality.json") or {"codecs": []})
        try:
            collect(path, runs)
        except ImportError:  # `bench.rate_quality --run` takes them where it is installed
            for file in folders.outf.glob("rates/*/rate.json"):
                write_json(folders.out / f"rate_{file.parent.name}.json",
                           read_json(file, fix="remove it"))
            raise


def collect_bench(folders: Folders) -> None:
    """`bench_DEVICE.json`: parts that were measured take the place of those there, and whole
    trainings (`fit`) stand beside those of other folders."""
    for path in sorted(folders.outf.glob("bench/*.json")):
        found = read_json(path, keys={"device": str, "made": dict, "parts": dict}, fix="remove it")
        name = f"bench_{device_word(found['device'])}.json"
        old = read_published(folders, name)
        if old is None or old["device"] != found["device"]:
            old = {"device": found["device"], "made": {}, "parts": {}}
        own = {row["run"] for row in found["parts"].get("fit", [])}
        fits = [row for row in old["parts"].get("fit", []) if row["run"] not in own]
        parts = {**old["parts"], **found["parts"]} | (
            {"fit": [*fits, *found["parts"]["fit"]]} if own else {})
        write_json(folders.out / name, {**old, "made": {**old["made"], **found["made"]},
                                       "parts": parts})


def device_word(device: str) -> str:
    """`h100` for "NVIDIA H100 80GB HBM3"; cpu for what is no NVIDIA GPU."""
    words = device.split()
    return words[1].lower() if words[0] == "NVIDIA" and len(words) > 1 else "cpu_here"


def collect_recipe(folders: Folders) -> None:
    """`recipe_h100.json`: a row takes the place of the older one of the same training."""
    found = {part: run for part in part_names(folders.outf)
             if (run := RunDir(part_folder(folders.outf, *part))).finished}
    if not found:
        return
    measured = read_published(folders, RECIPE) or {}
    for (group, change, _), run in found.items():
        put_recipe(measured, group, part_row(run, group, change))
    write_json(folders.out / RECIPE, measured)


def put_recipe(measured: dict[str, Any], group: str, row: dict[str, Any]) -> None:
    """Put a row into its group of the recipe's results, and what made it into the group's `about`.

    Args:
        measured: what `recipe_h100.json` holds; changed in place.
        group: rows, sizes, held_out, or another group of `recipe_parts.GROUPS`.
        row: of `recipe_parts.part_row`; one without times keeps those of the same commit, device
            and settings.
    """
    table = measured if group == "rows" else measured.setdefault(
        "preset" if group in ("sizes", "held_out") else group, {"about": {}})
    rows = table.setdefault(group if group in ("sizes", "held_out") else "rows", [])
    keys = ("video", "recipe", "seed") if group == "videos" else ("modelsize", "seed") \
        if group == "sizes" else ("change", "seed")
    known = ("commit", "device")
    for one in rows:  # what was said of all of them stays true of those that keep their place
        one.update({key: table["about"][key] for key in known
                    if key not in one and key in table["about"]})
    old = next((one for one in rows if all(one[key] == row[key] for key in keys)), None)
    if old is None:
        rows.append(row)
    else:
        timed = {name: old[name] for name in ("train_time_s", "total_s") if row.get(name) is None
                 and all(old.get(key) == row.get(key) for key in (*known, "stored", "epochs", "lr"))
                 and name in old}
        old.update(row | timed)
    every = [one for name in ("rows", "sizes", "held_out") for one in table.get(name, [])]
    table["about"] |= {key: ", ".join(dict.fromkeys(one[key] for one in every if key in one))
                       for key in known}


def _write_csv(table: pd.DataFrame, path: Path) -> None:
    text = table.to_csv(index=False, float_format="%.6g")
    write_atomic(path, lambda file: file.write(text.encode()))


COLLECT: dict[str, tuple[Callable[..., None], ...]] = {
    "train": (collect_study, collect_cross_fit), "fidelity": (collect_fidelity,),
    "recipe": (collect_recipe,),
    "field": (collect_fields,), "teacher": (collect_fields,), "rates": (collect_rates,),
    "bench": (collect_bench,)}
