"""How far beyond HNeRV's picture this project is: the files `recipe_*.json` of the results."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd

from hnerv_clip.book.markdown import join_words
from hnerv_clip.book.results import read_json
from hnerv_clip.study.recipe_parts import BEST, FOUND, HNERV

GPU, CPU, SEARCH = "recipe_h100.json", "recipe_cpu.json", "recipe_search.json"
FIDELITY = "fidelity.json"
FIX = "git checkout book/results"
BLOCKS = "HNeRV's blocks"  # among the decoders
BASE = "lr 2e-3"  # what a single change is to
LEAST_GAIN_DB = 2.0  # that was aimed at on other videos, on average
HELD_OUT = "held-out frames"  # how the name of their group of small runs begins
EARLY = "early looks"  # how the names of groups begin that repeat them at small scale
HELD_OUT_DB = 34.0  # that was aimed at on every other frame of bunny
ESTIMATED = "yes, with frames estimated by motion"  # not by the preset alone


def read_recipe(folder: str | Path) -> dict[str, Any]:
    """What was measured on the GPU: the tables `rows`, `paper` (HNeRV's settings, all seeds),
    `goals`, `published`, `preset` (`best` and changes of it), `added` (its parts added to HNeRV's
    settings), `sizes` (of values), `held_out`, `between` (trained on estimates of held-out frames
    too), `heads`, `videos`, `decoders`, `longer` (other decoders, trained longer), `muon`,
    `optimizers`, `early` (changes seen after a few epochs) and `control` (HiNeRV), and in `batches`
    where each group of runs comes from.

    Raises:
        ResultsError: the file is missing.
    """
    measured = read_json(folder, GPU, fix=FIX)
    others = {name: measured[name] for name in (
        "preset", "added", "videos", "heads", "between", "decoders", "muon", "optimizers", "early",
        "control")}
    runs = read_json(folder, FIDELITY, fix=FIX)["runs"]
    paper = [{"change": HNERV, "psnr_db": run["psnr_db"], "total_s": math.nan} for run in runs
             if run["engine"] == "fused"]
    batches = [measured["about"], *(other["about"] for other in others.values() if other["rows"])]
    rows = pd.DataFrame(measured["rows"])
    missing_as_nan = {"total_s": float, "lr_after_collapse": float}  # also where all are None
    return {"batches": batches, "settings": {b["runs"]: b["setting"] for b in batches}} | {
        "rows": rows.astype(missing_as_nan)} | {
        name: pd.DataFrame(measured[name]) for name in ("goals", "published")} | {
        name: pd.DataFrame(other["rows"]) for name, other in others.items()} | {
        "longer": pd.DataFrame(measured["decoders"]["longer"]), "paper": pd.DataFrame(paper),
        **{name: pd.DataFrame(measured["preset"][name]) for name in ("sizes", "held_out")}}


def read_ranking(folder: str | Path) -> dict[str, Any]:
    """The ranking at small scale on a CPU: `about`, and the table `rows` with `gain_db`.

    A gain is over the row of the same group that is marked as its base.

    Raises:
        ResultsError: the file is missing.
    """
    measured = read_json(folder, CPU, fix=FIX)
    rows = pd.DataFrame(measured["rows"])
    base = rows[rows.base].set_index("group").psnr_db
    rows["gain_db"] = rows.psnr_db - rows.group.map(base)
    return {"about": measured["about"], "rows": rows}


def read_search(folder: str | Path) -> dict[str, Any]:
    """Optuna's search: `about`, `found` (the number of the best trial) and the tables `trials` (the
    preset first) and `compared` (whole runs of what it found and of the preset).

    Raises:
        ResultsError: the file is missing.
    """
    search, runs = read_json(folder, SEARCH, fix=FIX), read_recipe(folder)
    bunny = runs["preset"].assign(recipe=runs["preset"].change, video="bunny")
    whole = pd.concat([bunny, runs["videos"]])
    return search | {"trials": pd.DataFrame(search["trials"]),
                     "compared": whole[whole.recipe.isin([BEST, FOUND])]}


def changes(rows: pd.DataFrame) -> pd.DataFrame:
    """Every single change at 300 epochs with `gain_db` over `BASE`, the best first."""
    tried = rows[(rows.lr > 1e-3) & (rows.epochs == 300)].copy()
    base, = tried[tried.change == BASE].psnr_db
    tried["gain_db"] = tried.psnr_db - base
    return tried.sort_values("psnr_db", ascending=False)


def one(rows: pd.DataFrame, change: str) -> pd.Series:
    """The only row of a change."""
    row, = rows[rows.change == change].itertuples(index=False)
    return pd.Series(row._asdict())


def reached(rows: pd.DataFrame, *, seconds: float) -> float | None:
    """The best PSNR of a whole run, all of its time counted, within so many seconds."""
    within = rows[rows.total_s <= seconds].psnr_db
    return None if within.empty else float(within.max())


def time_in_words(preset: pd.DataFrame, *, seconds: float = 60) -> str:
    """How long the preset takes, and what it and its changes give within so many seconds; nothing
    where no run was timed."""
    best, quick = preset[preset.total_s.notna() & (preset.change == BEST)], reached(
        preset, seconds=seconds)
    said = [] if best.empty else [
        f"The preset takes {best.total_s.iloc[-1]:.0f} s of one {best.device.iloc[-1]}, set-up, "
        "compilation and the stored file counted."]
    if quick is not None:
        said.append(f"Within {seconds:g} s the best of its changes gives {quick:.2f} dB.")
    return " ".join(said)


def parts(runs: pd.DataFrame, *, base: str = BEST) -> pd.DataFrame:
    """A recipe and each change of it: change, psnr_db (mean over seeds), sd_db, seeds, total_s
    and device (of the run that had a GPU alone, or NaN) and gain_db over the row `base`."""
    grouped = runs.groupby("change", sort=False)
    table = grouped.psnr_db.agg(psnr_db="mean", sd_db="std", seeds="size")
    table = table.join(runs[runs.total_s.notna()].groupby("change")[["total_s", "device"]].last())
    table["gain_db"] = table.psnr_db - table.psnr_db[base]
    return table.reset_index()


def added(measured: dict[str, Any]) -> pd.DataFrame:
    """`parts` of HNeRV's own settings, with each part of the preset added alone."""
    return parts(pd.concat([measured["paper"], measured["added"]]), base=HNERV)


def part_rows(parts: pd.DataFrame, *, base: str = "the preset") -> list[dict[str, str]]:
    """`parts` as rows of a table."""
    return [{"change": row.change, "PSNR (dB)": f"{row.psnr_db:.2f}"
             + ("" if math.isnan(row.sd_db) else f" ± {row.sd_db:.2f}"), "seeds": str(row.seeds),
             f"to {base} (dB)": f"{row.gain_db:+.2f}", "whole run": whole_run(row)}
            for row in parts.itertuples()]


def whole_run(row: Any) -> str:
    """Its time and GPU, or nothing where it shared the GPU or was resumed."""
    return "" if math.isnan(row.total_s) else f"{row.total_s:.0f} s, {row.device.split()[1]}"


def setting(row: Any) -> str:
    """The change of a row, and the learning rate that a collapsed training began again with."""
    again = row.lr_after_collapse
    return row.change + ("" if math.isnan(again) else f" (collapsed, begun again at {again:g})")


def changed(params: dict[str, Any], preset: dict[str, Any]) -> str:
    """What a trial's settings change of the preset's, in words."""
    words = {"warm_up": "warm-up", "reduce": "width divisor", "act": "activation",
             "ks": "kernels", "num_blks": "blocks", "cells": "embedding cells"}
    names = [f"{words.get(name, name.replace('_', ' '))} "
             + (f"{value:.3g}" if isinstance(value, float) else f"{value}")
             for name, value in params.items() if value != preset[name]]
    return ", ".join(names) or BEST


def trial_rows(trials: pd.DataFrame, *, count: int = 0) -> list[dict[str, str]]:
    """Trials that were not given up as rows of a table, the best first.

    Args:
        count: only the best so many and the preset; 0 for all.
    """
    preset = trials.iloc[0]
    done = trials[trials.state == "COMPLETE"].sort_values("value", ascending=False)
    videos = list(preset.psnr_db)
    return [{"settings": changed(row.params, preset.params), "mean (dB)": f"{row.value:.2f}",
             "to the preset (dB)": f"{row.value - preset.value:+.2f}",
             **{f"{video} (dB)": f"{row.psnr_db[video]:.2f}" for video in videos}}
            for place, row in enumerate(done.itertuples())
            if not count or place < count or row.number == preset.number]


def video_gains(videos: pd.DataFrame) -> pd.DataFrame:
    """The preset beside HNeRV's settings: a row per video with hnerv, best and gain_db."""
    table = videos.pivot(index="video", columns="recipe", values="psnr_db").rename(
        columns={BEST: "best", HNERV: "hnerv"})[["hnerv", "best"]]
    table["gain_db"] = table.best - table.hnerv
    return table.sort_values("gain_db", ascending=False).reset_index()


def goal_rows(measured: dict[str, Any]) -> list[dict[str, str]]:
    """What was aimed at and what was measured, in words, a row each; met is yes, no or
    `ESTIMATED`."""
    timed = pd.concat([measured["rows"], measured["preset"]])
    rows = []
    for goal in measured["goals"].itertuples():
        if goal.modelsize == 1.5:
            found = reached(timed, seconds=goal.seconds)
        else:
            found, = measured["sizes"][measured["sizes"].modelsize == goal.modelsize].psnr_db
        rows.append((f"{goal.modelsize:g} M values within {goal.seconds} s",
                     f"{goal.psnr_db:g} dB", found, "dB", found >= goal.psnr_db))
    alone = held = measured["held_out"].groupby("change").psnr_held_interpolated_db.mean()[BEST]
    what, unit = "every other frame held out, embeddings interpolated", "dB"
    between = measured["between"]
    if len(between) and between.interpolated_db.mean() > alone:
        held, unit = between.interpolated_db.mean(), f"dB; {alone:.2f} dB without estimates"
        what += (", trained on estimates of the held-out frames too (optical-flow interpolation of "
                 f"their neighbors; {seeds_in_words(len(between))}; the mean of the two neighbors, "
                 f"without a network, is at {between.two_mean_db.mean():.2f} dB)")
    gains = video_gains(measured["videos"]).gain_db
    met = held >= HELD_OUT_DB and (ESTIMATED if alone < HELD_OUT_DB else "yes")
    rows += [(what, f"{HELD_OUT_DB:g} dB", held, unit, met),
             (f"above HNeRV's settings on {len(gains)} other videos, mean",
              f"{LEAST_GAIN_DB:g} dB, never below", gains.mean(), f"dB, {gains.min():+.1f} to "
              f"{gains.max():+.1f}", gains.mean() >= LEAST_GAIN_DB and gains.min() >= 0)]
    return [{"what": what, "goal": goal, "measured": f"{value:.2f} {unit}",
             "met": met if isinstance(met, str) else "yes" if met else "no"}
            for what, goal, value, unit, met in rows]


def goals_in_words(rows: list[dict[str, str]]) -> str:
    """How many goals are met, and how many of those by training on estimated frames.

    Args:
        rows: see `goal_rows`.
    """
    met = [row["met"] for row in rows if row["met"] != "no"]
    return f"goals met: {len(met)} of {len(rows)}" + (
        f", {met.count(ESTIMATED)} of them with frames estimated by motion"
        if ESTIMATED in met else "")


def seeds_in_words(count: int) -> str:
    """`one seed`, or `mean of 3 seeds`."""
    return "one seed" if count == 1 else f"mean of {count} seeds"


def compared(search: dict[str, Any]) -> pd.DataFrame:
    """What the search found beside the preset on whole videos: a row per video with best_db and
    found_db (means over seeds), gain_db, best_seeds, found_seeds, stored (the ratio of stored
    values) and seen (the search used frames of it).

    Args:
        search: see `read_search`.
    """
    runs, columns = search["compared"], ["best_db", "found_db", "gain_db", "stored", "seen"]
    if runs.empty:
        return pd.DataFrame(columns=["video", *columns])
    both = runs.groupby(["video", "recipe"], sort=False).agg(
        db=("psnr_db", "mean"), seeds=("psnr_db", "size"), stored=("stored", "mean"))
    both = both.unstack("recipe").dropna()
    return pd.DataFrame({
        "best_db": both.db[BEST], "found_db": both.db[FOUND],
        "gain_db": both.db[FOUND] - both.db[BEST], "best_seeds": both.seeds[BEST].astype(int),
        "found_seeds": both.seeds[FOUND].astype(int),
        "stored": both.stored[FOUND] / both.stored[BEST],
        "seen": both.index.isin(list(search["trials"].psnr_db.iloc[0]))}).reset_index()


def compared_rows(search: dict[str, Any]) -> list[dict[str, str]]:
    """`compared` as rows of a table."""
    return [{"video": row.video + (", seen in part by the search" if row.seen else ""),
             f"{BEST} (dB)": f"{row.best_db:.2f}", f"{FOUND} (dB)": f"{row.found_db:.2f}",
             "gain (dB)": f"{row.gain_db:+.2f}",
             "stored values": f"{100 * row.stored - 100:+.1f}%",
             "seeds": f"{row.best_seeds} and {row.found_seeds}"}
            for row in compared(search).itertuples()]


def search_in_words(search: dict[str, Any]) -> str:
    """What Optuna tried, what it found, and whether that holds in whole trainings.

    Args:
        search: see `read_search`.
    """
    trials = search["trials"]
    count, preset = trials.state.value_counts(), trials.iloc[0]
    found, = trials[trials.number == search["found"]].itertuples()
    words = (f"In {search['about']['minutes']:.0f} minutes on one {search['about']['device']} "
             f"{len(trials)} trials began: {count['COMPLETE']} ended, {count.get('PRUNED', 0)} "
             f"were given up (behind the median of those before, or no network of these settings, "
             f"or out of memory), {count.drop(['COMPLETE', 'PRUNED'], errors='ignore').sum()} were "
             f"stopped before their end. The best, {changed(found.params, preset.params)}, is "
             f"{found.value - preset.value:+.2f} dB from the preset on average over its three "
             f"segments, each trained for a few seconds.")
    runs, videos = search["compared"], compared(search)
    if videos.empty or videos.seen.all():
        return words
    new, seen, epochs = videos[~videos.seen], videos[videos.seen], runs.epochs.unique()
    gains, several = new.gain_db, videos[(videos.best_seeds > 1) | (videos.found_seeds > 1)]
    holds = "That holds" if gains.min() > 0 else "That holds in part" if gains.mean() > 0 else \
        "That does not hold"
    known = "".join(f" On {row.video}, some frames of which it has seen, {row.gain_db:+.2f} dB."
                    for row in seen.itertuples())
    made = [" on ".join(one) for one in runs.groupby(["commit", "device"]).size().index]
    return (f"{words}\n\n{holds} in whole trainings of {len(gains)} videos that the search did not "
            f"see: {gains.mean():+.2f} dB on average, {gains.min():+.2f} to {gains.max():+.2f} "
            f"dB.{known} These are trainings of equal epochs "
            f"({join_words([str(count) for count in sorted(epochs)])}), not of equal time, with "
            "one seed" + (f" but on {join_words(several.video.tolist())}" if len(several) else "")
            + f"; stored values differ by up to {100 * (videos.stored - 1).abs().max():.1f}%. "
            f"Trained at {join_words(made)}."
            + (" The preset stays as it is." if videos.gain_db.min() < 0 else ""))


def between_in_words(between: pd.DataFrame) -> str:
    """What estimates of the held-out frames give, alone and as frames to train on."""
    if between.empty:
        return ""
    mean = between.mean(numeric_only=True)
    return (f"The mean of the two given frames beside a held-out one, without any network, is at "
            f"{mean.two_mean_db:.2f} dB, and an estimate that moves both along the motion "
            f"between them at {mean.estimate_db:.2f} dB. A network trained on these estimates too "
            f"gives {mean.interpolated_db:.2f} dB from interpolated embeddings and "
            f"{mean.estimated_embedding_db:.2f} dB from the estimates' own "
            f"({seeds_in_words(len(between))}).")


def held_out_in_words(rows: pd.DataFrame) -> str:
    """What was tried for held-out frames at small scale, of seed 0.

    Args:
        rows: see `read_ranking`.
    """
    tried = rows[rows.group.str.startswith(HELD_OUT) & ~rows.base
                 & ~rows.change.str.contains("seed")]
    if tried.empty:
        return ""
    estimated = tried.change.str.contains("estimate")
    gains, others = tried.gain_db[estimated], tried.gain_db[~estimated]
    base, = rows[rows.group.isin(tried.group) & rows.base].train_db
    fitted = tried.loc[tried.train_db.idxmax()]
    return (f"At small scale, on a CPU, training on estimates by motion adds {gains.min():.2f} to "
            f"{gains.max():.2f} dB on held-out frames. {len(others)} other changes, such as noise "
            f"on embeddings and weight decay, give {others.min():+.2f} to {others.max():+.2f} dB. "
            f"Given frames gain most, {fitted.train_db - base:+.2f} dB, by {fitted.change}, which "
            f"gives {fitted.gain_db:+.2f} dB on held-out ones.")


def control_in_words(control: pd.DataFrame, preset: pd.DataFrame) -> str:
    """What HiNeRV's own network gives beside the preset, by seconds of steps.

    Args:
        control, preset: see `read_recipe`.
    """
    if control.empty:
        return ""
    last, own = control.iloc[-1], preset[preset.train_time_s.notna() & (preset.change == BEST)]
    beside = "" if own.empty else (f"; the preset {own.psnr_db.iloc[0]:.2f} dB in "
                                   f"{own.train_time_s.iloc[0]:.0f} s")
    before = join_words([f"{row.psnr_db:.2f} dB at {row.steps_s:.0f} s"
                         for row in control.iloc[:-1].itertuples()])
    return (f"HiNeRV's own network in its setting for Bunny (`bunny-hinerv-xs`, "
            f"{last['values'] / 1e6:.2f} M values), its authors' network, losses and learning rate "
            f"in a loop of ours, reaches {last.psnr_db:.2f} dB in {last.steps_s:.0f} s of steps, "
            f"{last.epochs:.1f} epochs of the 300 that its authors train"
            + (f" (on the way {before})" if before else "")
            + f"{beside}. A step of it takes {last.step_ms:.0f} ms without compilation, so that "
            f"300 epochs would take {last.steps_s * 300 / last.epochs / 60:.0f} minutes; they were "
            "not run.")


def reasons_in_words(measured: dict[str, Any]) -> str:
    """Why the goals for 1.5 M values are missed."""
    preset = parts(measured["preset"]).set_index("change")
    epochs = measured["preset"].groupby("change").epochs.first()
    longest = measured["rows"].sort_values("epochs").iloc[[-2, -1]]
    boost = measured["published"]
    boost = boost[boost.method.str.endswith("Boost") & boost.train_time_s.notna()].iloc[0]
    return (f"The goals for the picture are missed because this decoder ends near "
            f"{preset.psnr_db.max():.1f} dB: {epochs[BEST]} epochs in place of "
            f"{epochs['300 epochs']} give {-preset.gain_db['300 epochs']:.2f} dB, and "
            f"{longest.epochs.iloc[1]} in place of {longest.epochs.iloc[0]}, by Adam, "
            f"{longest.psnr_db.iloc[1] - longest.psnr_db.iloc[0]:+.2f} dB. The best picture "
            f"published at this size for {boost.epochs:.0f} epochs, {boost.psnr_db:.2f} dB by "
            f"{boost.method}, took {boost.train_time_s / 60:.0f} minutes on its authors' GPU. "
            "Other decoders that were tried here need more time than they gain, see below.")


def head_in_words(heads: pd.DataFrame) -> str:
    """What the recipe does to a field fitted on its network."""
    own = heads.set_index("change")
    best, hnerv = own.loc[BEST], own.drop(BEST).iloc[0]
    return (f"A field fitted on the preset's network has a skill of {best.any_held:.3f} for any "
            f"box of held-out frames, one fitted on a network of HNeRV's settings "
            f"{hnerv.any_held:.3f} (one seed).")


def decoders_in_words(decoders: pd.DataFrame, longer: pd.DataFrame) -> str:
    """The best of the other decoders beside HNeRV's blocks, in equal time; and trained longer."""
    others = decoders[decoders.decoder != BLOCKS]
    first, (own,) = others.loc[others.psnr_db.idxmax()], decoders[
        decoders.decoder == BLOCKS].itertuples()
    by_adam = others[others.optimizer == "Adam"].psnr_db.max()
    return (f"In {own.seconds:.0f} s of steps HNeRV's blocks give {own.psnr_db:.2f} dB, the best "
            f"of {len(others)} other trainings {first.psnr_db:.2f} dB ({first.decoder}; "
            f"{first.optimizer}). A step of that takes {first.step_ms:.1f} ms in place of "
            f"{own.step_ms:.1f}, so it sees {first.epochs:.0f} epochs in place of "
            f"{own.epochs:.0f}. By Adam such a decoder reaches {by_adam:.2f} dB. " + " ".join(
                f"More time does not help it: {row.seconds:.0f} s of steps, {row.epochs:.0f} "
                f"epochs, give {row.psnr_db:.2f} dB." for row in longer.itertuples()))


def early_in_words(early: pd.DataFrame, small: pd.DataFrame) -> str:
    """What changes of HNeRV's decoder and loss give after a few epochs at full size, and at small
    scale.

    Args:
        early: see `read_recipe`.
        small: see `read_ranking`; groups that begin with `EARLY`.
    """
    if early.empty:
        return ""
    base, others = early[early.change == BLOCKS].iloc[0], early[early.change != BLOCKS]
    said = join_words([f"{row.psnr_db - base.psnr_db:+.2f} dB by a {row.change} (the worst frame "
                       f"{row.worst_frame_db - base.worst_frame_db:+.2f} dB)"
                       for row in others.itertuples()])
    again = join_words([
        join_words([f"{row.psnr_db - rows[rows.base].psnr_db.iloc[0]:+.2f} dB"
                    for row in rows[~rows.base].itertuples()]) + f" ({group.partition(': ')[2]})"
        for group, rows in small[small.group.str.startswith(EARLY)].groupby("group", sort=False)])
    return (f"At full size after {base.epochs} epochs, one seed, Adan gives {base.psnr_db:.2f} dB; "
            f"{said}." + (f" At small scale the same give {again}." if again else "")
            + " They were not trained to their end at full size.")


def muon_in_words(muon: pd.DataFrame) -> str:
    """The longest training by Muon beside the longest by Adam, and Muon's sizes of steps."""
    longest = {optimizer: own.loc[own.epochs.idxmax()] for optimizer, own in
               muon.groupby("optimizer")}
    shortest = muon[muon.optimizer == "Muon"].groupby("epochs")
    epochs, compared = max(((n, own) for n, own in shortest), key=lambda item: len(item[1]))
    sizes = join_words([f"{row.psnr_db:.2f} dB with steps {row.share:g} times Adam's"
                        for row in compared.sort_values("share").itertuples()])
    return (f"Muon gives {longest['Muon'].psnr_db:.2f} dB after {longest['Muon'].epochs} epochs, "
            f"Adam {longest['Adam'].psnr_db:.2f} dB after {longest['Adam'].epochs}. The size of "
            f"its steps matters little: after {epochs} epochs it has {sizes}.")


def small_in_words(rows: pd.DataFrame) -> str:
    """Muon beside Adam with HNeRV's blocks at small scale, each with the best step that was tried.

    Args:
        rows: see `read_ranking`.
    """
    best = {optimizer: rows[rows.change.str.startswith(f"{BLOCKS}, {optimizer}")]
            .groupby("group", sort=False).psnr_db.agg(["max", "size"])
            for optimizer in ("Muon", "Adam")}
    both = best["Muon"].join(best["Adam"].add_suffix("_adam"))
    said = [f"{row['max'] - row['max_adam']:+.2f} dB ({group}; sizes of steps tried: "
            f"{row['size']:.0f} by Muon, {row['size_adam']:.0f} by Adam)"
            for group, row in both.iterrows()]
    muon = rows[rows.change.str.contains("Muon")]
    others = muon[~muon.change.str.startswith(BLOCKS)]
    behind = (others.psnr_db < others.group.map(best["Muon"]["max"])).sum()
    return ("At small scale, on a CPU and at equal epochs, Muon differs from Adam, each with "
            f"its best step, by {join_words(said)}. {behind} of {len(others)} other changes with "
            "Muon stay behind HNeRV's blocks with it.")
