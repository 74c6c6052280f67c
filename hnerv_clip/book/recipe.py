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
    """Every single change at 300 epochs with `gain_db` over `BASE`, the best first; without those
    that collapsed, which are of another learning rate than they name."""
    tried = rows[(rows.lr > 1e-3) & (rows.epochs == 300) & rows.lr_after_collapse.isna()].copy()
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
        f"The preset's whole run takes {best.total_s.iloc[-1]:.0f} s on one "
        f"{best.device.iloc[-1]}, with set-up, compilation and the stored file."]
    if quick is not None:
        said.append(f"Of its variants whose whole run ends within {seconds:g} s the best gives "
                    f"{quick:.2f} dB.")
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


def collapsed_in_words(rows: pd.DataFrame) -> str:
    """Which trainings collapsed, and what was trained in their place; nothing where none did."""
    return " ".join(
        f"With {row.change} the training collapsed, and the trainer began it again at a learning "
        f"rate of {row.lr_after_collapse:g}: what it then gives is no result of {row.change}, so "
        "it has no row."
        for row in rows[rows.lr_after_collapse.notna()].itertuples())


def changed(params: dict[str, Any], preset: dict[str, Any]) -> str:
    """What a trial's settings change of the preset's, in words."""
    words = {"lr": "learning rate", "warm_up": "warm-up", "reduce": "width divisor",
             "act": "activation", "ks": "kernels", "num_blks": "blocks", "cells": "embedding cells"}
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
        what = f"{goal.modelsize:g} M values within {goal.seconds} s"
        if goal.modelsize == 1.5:
            found, what = reached(timed, seconds=goal.seconds), f"{what}, the best run"
        else:
            found, = measured["sizes"][measured["sizes"].modelsize == goal.modelsize].psnr_db
        rows.append((what, f"{goal.psnr_db:g} dB", found, "dB", found >= goal.psnr_db))
    alone = held = measured["held_out"].groupby("change").psnr_held_interpolated_db.mean()[BEST]
    what, unit = "every other frame held out, embeddings interpolated", "dB"
    between = measured["between"]
    if len(between) and between.interpolated_db.mean() > alone:
        held, unit = between.interpolated_db.mean(), f"dB; {alone:.2f} dB without estimates"
        what += (", trained also on estimates of the held-out frames (their neighbors, moved "
                 f"along the optical flow; {seeds_in_words(len(between))}; the mean of the two "
                 f"neighbors, without a network, has {between.two_mean_db.mean():.2f} dB)")
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
    """How many goals are met, whose they are, and how many of those by training on estimated
    frames.

    Args:
        rows: see `goal_rows`.
    """
    met = [row["met"] for row in rows if row["met"] != "no"]
    estimated = (f", {met.count(ESTIMATED)} of these only by training on frames estimated by motion"
                 if ESTIMATED in met else "")
    return (f"of the {len(rows)} goals that this project set itself, {len(met)} are met"
            f"{estimated}")


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
             f"were given up (behind the median of those before, no network can have these "
             f"settings, or out of memory), "
             f"{count.drop(['COMPLETE', 'PRUNED'], errors='ignore').sum()} were stopped "
             f"before their end. The best ({changed(found.params, preset.params)}) changes "
             f"PSNR by {found.value - preset.value:+.2f} dB against the preset, on average "
             f"over three segments of videos, each trained for a few seconds.")
    runs, videos = search["compared"], compared(search)
    if videos.empty or videos.seen.all():
        return words
    new, seen, epochs = videos[~videos.seen], videos[videos.seen], runs.epochs.unique()
    gains, several = new.gain_db, videos[(videos.best_seeds > 1) | (videos.found_seeds > 1)]
    holds = "This gain holds" if gains.min() > 0 else "This gain holds in part" if \
        gains.mean() > 0 else "This gain does not hold"
    known = "" if seen.empty else " On videos of which it saw the first frames: " + join_words(
        [f"{row.gain_db:+.2f} dB on {row.video}" for row in seen.itertuples()]) + "."
    made = [" on ".join(one) for one in runs.groupby(["commit", "device"]).size().index]
    return (f"{words}\n\n{holds} in whole trainings of {len(gains)} videos that the search did "
            f"not see: {gains.mean():+.2f} dB on average, {gains.min():+.2f} to {gains.max():+.2f} "
            f"dB.{known} The trainings compared have equally many epochs "
            f"({join_words([str(count) for count in sorted(epochs)])}), but not equal time, and "
            f"one seed{f', except on {join_words(several.video.tolist())}' if len(several) else ''}"
            f"; stored values differ by up to {100 * (videos.stored - 1).abs().max():.1f}%. "
            f"Commits and GPUs: {join_words(made)}."
            + (" The preset stays as it is, because some videos lose by the change."
               if videos.gain_db.min() < 0 else ""))


def between_in_words(between: pd.DataFrame) -> str:
    """What estimates of the held-out frames give, alone and as frames to train on."""
    if between.empty:
        return ""
    mean = between.mean(numeric_only=True)
    return (f"Without any network, the mean of the two frames beside a held-out one has "
            f"{mean.two_mean_db:.2f} dB, and an estimate that moves both along the motion "
            f"between them {mean.estimate_db:.2f} dB. A network trained on the estimates as well "
            f"decodes held-out frames with {mean.interpolated_db:.2f} dB from interpolated "
            f"embeddings, and {mean.estimated_embedding_db:.2f} dB from the embeddings that the "
            f"encoder computes of the estimates ({seeds_in_words(len(between))}).")


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
    return (f"In small trainings on a CPU, training on estimates by motion adds {gains.min():.2f} "
            f"to {gains.max():.2f} dB on held-out frames, and {len(others)} other changes, such as "
            f"noise on embeddings and weight decay, change it by {others.min():+.2f} to "
            f"{others.max():+.2f} dB. The change that fits the training frames best, "
            f"{fitted.change}, gives {fitted.train_db - base:+.2f} dB on them but "
            f"{fitted.gain_db:+.2f} dB on held-out frames.")


def control_in_words(control: pd.DataFrame, preset: pd.DataFrame) -> str:
    """What HiNeRV's own network gives beside the preset, by seconds of steps.

    Args:
        control, preset: see `read_recipe`.
    """
    if control.empty:
        return ""
    last, own = control.iloc[-1], preset[preset.train_time_s.notna() & (preset.change == BEST)]
    beside = "" if own.empty else (f"; the preset reaches "
                                   f"{own.psnr_db.iloc[0]:.2f} dB in "
                                   f"{own.train_time_s.iloc[0]:.0f} s")
    before = join_words([f"{row.psnr_db:.2f} dB at {row.steps_s:.0f} s"
                         for row in control.iloc[:-1].itertuples()])
    return (f"HiNeRV's own network in its authors' setting for this video (`bunny-hinerv-xs`, "
            f"{last['values'] / 1e6:.2f} M values), with their losses and learning rate in a "
            f"training loop of ours, reaches {last.psnr_db:.2f} dB in {last.steps_s:.0f} s of "
            f"training steps, {last.epochs:.1f} of the 300 epochs that its authors train"
            + (f" (on the way {before})" if before else "")
            + f"{beside}. A step of HiNeRV takes {last.step_ms:.0f} ms without compilation, so "
            f"that 300 epochs would take {last.steps_s * 300 / last.epochs / 60:.0f} minutes; they "
            "were not run.")


def reasons_in_words(measured: dict[str, Any]) -> str:
    """Why the goals for 1.5 M values are missed."""
    preset = parts(measured["preset"]).set_index("change")
    epochs = measured["preset"].groupby("change").epochs.first()
    longest = measured["rows"].sort_values("epochs").iloc[[-2, -1]]
    boost = measured["published"]
    boost = boost[boost.method.str.endswith("Boost") & boost.train_time_s.notna()].iloc[0]
    more_db = longest.psnr_db.iloc[1] - longest.psnr_db.iloc[0]
    return (f"The goals for the picture are missed because training this decoder of 1.5 M values "
            f"for longer ends near {preset.psnr_db.max():.1f} dB: {epochs[BEST]} epochs instead of "
            f"{epochs['300 epochs']} add {-preset.gain_db['300 epochs']:.2f} dB to the preset's "
            f"PSNR, and {longest.epochs.iloc[1]} instead of {longest.epochs.iloc[0]} change that "
            f"of a training by Adam by {more_db:+.2f} dB. The best picture published at this size "
            f"for {boost.epochs:.0f} epochs, {boost.psnr_db:.2f} dB by {boost.method}, took "
            f"{boost.train_time_s / 60:.0f} minutes on its authors' GPU. Other decoders that were "
            "tried here need more time than they gain, see below.")


def head_in_words(heads: pd.DataFrame) -> str:
    """What the recipe does to a field fitted on its network."""
    own = heads.set_index("change")
    best, hnerv = own.loc[BEST], own.drop(BEST).iloc[0]
    return (f"A [field](19_ask_any_region.ipynb), which predicts the teacher's embedding of any "
            f"box, is fitted to a trained network. Its skill at any box of held-out frames (0: the "
            f"best constant, 1: the teacher itself) is {best.any_held:.3f} on the preset's network "
            f"and on one of HNeRV's settings {hnerv.any_held:.3f} (one seed).")


def decoders_in_words(decoders: pd.DataFrame, longer: pd.DataFrame) -> str:
    """The best of the other decoders beside HNeRV's blocks, in equal time; and trained longer."""
    others = decoders[decoders.decoder != BLOCKS]
    first, (own,) = others.loc[others.psnr_db.idxmax()], decoders[
        decoders.decoder == BLOCKS].itertuples()
    by_adam = others[others.optimizer == "Adam"].psnr_db.max()
    return (f"In {own.seconds:.0f} s of training steps HNeRV's blocks give {own.psnr_db:.2f} dB, "
            f"the best of {len(others)} trainings of other decoders {first.psnr_db:.2f} dB "
            f"({first.decoder}; {first.optimizer}). A step of that one takes {first.step_ms:.1f} "
            f"ms instead of {own.step_ms:.1f}, so that it has {first.epochs:.0f} epochs instead of "
            f"{own.epochs:.0f}. Trained by Adam, such a decoder reaches at most {by_adam:.2f} dB. "
            + " ".join(f"In {row.seconds:.0f} s of steps, {row.epochs:.0f} epochs, one of them "
                       f"reaches {row.psnr_db:.2f} dB." for row in longer.itertuples()))


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
    said = join_words([f"a {row.change} changes that by {row.psnr_db - base.psnr_db:+.2f} dB (the "
                       f"worst frame by {row.worst_frame_db - base.worst_frame_db:+.2f} dB)"
                       for row in others.itertuples()])
    again = join_words([
        join_words([f"{row.psnr_db - rows[rows.base].psnr_db.iloc[0]:+.2f} dB"
                    for row in rows[~rows.base].itertuples()]) + f" ({group.partition(': ')[2]})"
        for group, rows in small[small.group.str.startswith(EARLY)].groupby("group", sort=False)])
    return (f"Changes of HNeRV's blocks and of the loss were tried at full size for only "
            f"{base.epochs} epochs, by Adan, one seed: without them PSNR is {base.psnr_db:.2f} dB; "
            f"{said}." + (f" In small trainings the same changes give {again}." if again else ""))


def muon_in_words(muon: pd.DataFrame) -> str:
    """The longest training by Muon beside the longest by Adam, and Muon's sizes of steps."""
    longest = {optimizer: own.loc[own.epochs.idxmax()] for optimizer, own in
               muon.groupby("optimizer")}
    shortest = muon[muon.optimizer == "Muon"].groupby("epochs")
    epochs, compared = max(((n, own) for n, own in shortest), key=lambda item: len(item[1]))
    sizes = join_words([f"{row.psnr_db:.2f} dB with steps of {row.share:g} times Adam's size"
                        for row in compared.sort_values("share").itertuples()])
    return (f"Muon gives {longest['Muon'].psnr_db:.2f} dB after {longest['Muon'].epochs} epochs, "
            f"Adam {longest['Adam'].psnr_db:.2f} dB after {longest['Adam'].epochs}. The size of "
            f"its steps matters little: after {epochs} epochs Muon has {sizes}.")


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
    return ("In small trainings on a CPU with equal epochs, Muon differs from Adam, each with the "
            f"best size of step that was tried, by {join_words(said)}. Of {len(others)} other "
            f"networks and settings trained by Muon there, {behind} stay below HNeRV's blocks "
            "trained by Muon.")
