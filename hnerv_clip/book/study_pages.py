"""The pages of the research questions: tables, figures and sentences drawn from `study.csv`.

Every sentence is chosen by the numbers, so that it stays true whatever the next study gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from hnerv_clip.runs import commit_words
from hnerv_clip.study.plan import ENCODINGS, REMEDIES
from hnerv_clip.study.table import read_study
from hnerv_clip.verify.scores import LIMITS
from hnerv_clip.verify.time_series import pool_intervals

KINDS = {"hybrid": "hybrid", "xyt": "place and time", "pe": "time alone"}
PARTS = {"train": "training frames", "held_out": "held-out frames"}
# How a measure's column can end
PLACES = (*(f"{place}_{part}" for place in ("between", "anywhere") for part in PARTS), *PARTS)
MISSING = """```{{admonition}} Not published yet
{why}. `hnerv-clip study --csv book/results/study.csv` trains and gathers them, and
`hnerv-clip pages` puts their figures here.
```
"""


def change_words(kind: str, variant: str) -> str:
    """What a remedy or an encoding changes, from its settings."""
    words = {
        "patch_grid": lambda v: f"{math.prod(map(int, v.split('_')))} patches a frame",
        "clip_pool": lambda v: f"mean over {v:g} of the height",
        "clip_stage": lambda v: "all decoder stages" if v == "all" else f"decoder stage {v}",
        "clip_loss_type": lambda v: f"{v} loss",
        "clip_jitter": lambda v: "positions moved by half their distance",
        "embed": lambda v: f"{v.rpartition('_')[2]} levels of frequencies"}
    changes = REMEDIES.get(variant) or ENCODINGS[kind][variant]
    return ", ".join(words[name](value) for name, value in changes.items())


def write_study_pages(folder: Path, results: Path) -> None:
    """Write `study_QUESTION.md`, and `.svg` where there is something to draw, into `folder`.

    Args:
        results: the folder with `study.csv`; without it the pages say that it is missing. Where it
            has `study_QUESTION.csv`, of other runs, `study_QUESTION_others.md` is drawn from that.
    """
    from hnerv_clip.figures.style import use_style

    use_style()
    for name, make in PAGES.items():
        tables = {f"study_{name}": results / "study.csv"}
        if (results / f"study_{name}.csv").exists():
            tables[f"study_{name}_others"] = results / f"study_{name}.csv"
        for page, path in tables.items():
            (folder / f"{page}.svg").unlink(missing_ok=True)
            text, figure = make(read_study(path)) if path.exists() else (
                MISSING.format(why="The study's runs are not there"), None)
            if figure is not None:
                figure.savefig(folder / f"{page}.svg", metadata={"Date": None})
            (folder / f"{page}.md").write_text(text.replace(f"/study_{name}.svg", f"/{page}.svg"),
                                                 encoding="utf-8")


# Numbers with their intervals


class Estimate:
    """A mean over seeds with its 95 % interval; NaN bounds where there is no interval.

    Args:
        values: of each seed.
        errors, freedoms: standard errors over frames and their degrees of freedom, where known.
        limits: the values that the measure can take, where an interval ends.
    """

    def __init__(self, values, errors=(), freedoms=(), limits=(-np.inf, np.inf)):
        self.values = [float(v) for v in values]
        self.mean = float(np.mean(self.values)) if self.values else float("nan")
        self.n, self.low, self.high = len(self.values), float("nan"), float("nan")
        if self.n and len(errors) == self.n and np.isfinite([*errors, *freedoms]).all():
            found = pool_intervals(self.values, errors, freedoms)
            self.low, self.high = found.low, found.high
        elif self.n > 1:
            reach = stats.t.ppf(0.975, self.n - 1) * np.std(self.values, ddof=1) / self.n ** 0.5
            self.low, self.high = self.mean - reach, self.mean + reach
        self.low, self.high = np.maximum(self.low, limits[0]), np.minimum(self.high, limits[1])

    def text(self, digits: int = 3, *, sign: bool = False) -> str:
        """`0.512 [0.490, 0.534]`, without the interval where there is none."""
        if not self.n or np.isnan(self.mean):
            return ""
        shape = f"{'+' if sign else ''}.{digits}f"
        known = not np.isnan(self.low)
        return f"{self.mean:{shape}}" + (f" [{self.low:{shape}}, {self.high:{shape}}]" if known
                                         else "")

    @property
    def side(self) -> str:
        """`above` or `below` 0 by its interval, `open` where the interval holds 0 or is not."""
        return "above" if self.low > 0 else "below" if self.high < 0 else "open"


def estimate(rows: pd.DataFrame, column: str) -> Estimate:
    """A column over seeds; over frames, too, where the table has standard errors of it."""
    rows = rows[rows[column].notna()] if column in rows else rows[:0]
    if not len(rows):
        return Estimate([])
    measure, part = next(((column[:-len(p) - 1], p) for p in PLACES if column.endswith(f"_{p}")),
                         (column, ""))
    names = [f"{measure}_{kind}_{part}" for kind in ("se", "freedom")]
    known = [rows[name].to_numpy(float) for name in names] if set(names) <= set(rows) else []
    return Estimate(rows[column], *known, limits=LIMITS.get(measure, (-np.inf, np.inf)))


def paired(table: pd.DataFrame, column: str, *, video: str, kind: str, variant: str,
           against: str = "base") -> Estimate:
    """Differences of a column between runs of the same seed: variant less `against`."""
    if column not in table:
        return Estimate([])
    rows = table[(table.video == video) & (table.kind == kind)].set_index("seed")
    own, other = (rows[rows.variant == name][column] for name in (variant, against))
    return Estimate((own - other).dropna())


def _select(table: pd.DataFrame, **wanted) -> pd.DataFrame:
    for name, value in wanted.items():
        table = table[table[name] == value]
    return table


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(["| " + " | ".join(header) + " |", "|---" * len(header) + "|",
                      *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _figure(name: str, alt: str) -> str:
    return f"```{{image}} _generated/study_{name}.svg\n:alt: {alt}\n```\n"


def made_with(table: pd.DataFrame) -> str:
    """What the runs were made with, a line."""
    def listed(column: str, words: Callable = str) -> str:
        return ", ".join(sorted({words(value) for value in table[column].dropna()}))

    def whole(value: float) -> str:
        return f"{value:.0f}"

    dirty = {"True": True, "False": False}
    commits = sorted({commit_words({"commit": row.commit, "dirty": dirty.get(str(row.dirty))})
                      for row in table.itertuples()})
    return (f"*{len(table)} runs of {listed('epochs', whole)} epochs, seeds "
            f"{listed('seed', whole)}; teacher: {_label(table)}; {listed('device')}; "
            f"commit {', '.join(commits)}. In brackets: 95 % intervals, over seeds and, for "
            "measures of embeddings, over frames that resemble each other in time.*\n")


def _label(table: pd.DataFrame) -> str:
    return ", ".join(dict.fromkeys(table.teacher_label.dropna()))


def _seeds_words(n: int) -> str:
    return "one seed" if n == 1 else f"{n} seeds"


# The questions


def learning_page(table: pd.DataFrame) -> tuple[str, Figure | None]:
    """Can it learn semantics from coordinates? Text and figure."""
    from hnerv_clip.figures.study import plot_learning

    main = table[(table.variant == "base") & table.clip_centred_held_out.notna()]
    if not len(main):
        return MISSING.format(why="No run with the CLIP head is in the study's table"), None
    lines, rows, said, places = [], [], [], []
    for (video, kind), part in _groups(main):
        centred, skill = (estimate(part, f"{name}_held_out") for name in ("clip_centred", "skill"))
        over = {name: estimate(part, f"over_{name}_held_out")
                for name in ("neighbour", "interpolated")}
        elsewhere = {place: estimate(part, f"skill_{place}_held_out")
                     for place in ("between", "anywhere")}
        places.append((f"{video}, {KINDS[kind]}", elsewhere["between"]))
        first = part.iloc[0]
        lines.append([
            video, KINDS[kind], str(len(part)), estimate(part, "psnr_train_db").text(2),
            estimate(part, "psnr_held_out_db").text(2), estimate(part, "clip_centred_train").text(),
            centred.text(), skill.text(), *(e.text() for e in elsewhere.values()),
            over["neighbour"].text(sign=True),
            over["interpolated"].text(sign=True),
            f"{part.r1_held_out.mean():.1%} ({first.r1_chance_held_out:.1%})"])
        rows.append({"video": video, "kind": kind, "seeds": centred.values, "mean": centred.mean,
                     "low": centred.low, "high": centred.high,
                     "neighbour": first.neighbour_held_out,
                     "interpolated": first.interpolated_held_out})
        if kind != "hybrid":
            said.append(_learning_words(video, kind, skill, over, len(part)))
    said += [*_place_words(places), *_encoding_words(table)]
    header = ["video", "given", "seeds", "PSNR, training frames (dB)", "held out (dB)",
              "centred cosine, training frames", "held out", "skill, held out",
              "skill between the positions", "skill anywhere", "over the nearest training frame",
              "over interpolation", "R@1 (chance)"]
    text = "\n\n".join([*said, _figure("learn", "Centred cosine on held-out frames"),
                        _markdown(header, lines), made_with(main)])
    return text, plot_learning(pd.DataFrame(rows), teacher_label=_label(main))


def _groups(table: pd.DataFrame):
    """((video, kind), rows), videos as they come, kinds in their order."""
    for video in table.video.unique():
        for kind in KINDS:
            part = _select(table, video=video, kind=kind)
            if len(part):
                yield (video, kind), part


def _learning_words(video: str, kind: str, skill: Estimate, over: dict[str, Estimate], seeds: int
                    ) -> str:
    knows = {"above": "It **knows more than a constant**",
             "below": "It knows **less than a constant**",
             "open": "Whether it knows more than a constant **stays open**"}[skill.side]
    named = {"neighbour": "repeating the teacher's embedding of the nearest training frame",
             "interpolated": "interpolating the teacher's embeddings between training frames"}
    sides: dict[str, list[str]] = {}
    for name, margin in over.items():
        sides.setdefault(margin.side, []).append(named[name])
    parts = [f"{words} {(' or ' if side == 'open' else ' and ').join(sides[side])}"
             for side, words in [
                 ("above", "ahead of"), ("below", "behind"), ("open", "not told apart from")]
             if side in sides]
    return (f"**{video}, from {KINDS[kind]}**: held-out skill {skill.text()} "
            f"({_seeds_words(seeds)}; 0 is the constant mean embedding, 1 the teacher). {knows}; "
            f"by centred cosine it is {', and '.join(parts)}.")


def _place_words(places: list[tuple[str, Estimate]]) -> list[str]:
    """What the skill is half-way between the supervised positions, of each group of runs."""
    known = [(name, skill) for name, skill in places if skill.n]
    if not known:
        return []
    words = {"above": "above a constant", "below": "**below a constant**",
             "open": "not told apart from a constant"}
    return ["**Half-way between the supervised positions**, skill on held-out frames is "
            + "; ".join(f"{skill.text()} for {name}, {words[skill.side]}" for name, skill in known)
            + ". The head was only ever asked at the positions themselves; [what supervises more "
            "of the frame](remedies.md) was tried."]


def _encoding_words(table: pd.DataFrame) -> list[str]:
    """What fewer frequencies of the coordinates change on held-out frames."""
    said = []
    for kind, variants in ENCODINGS.items():
        for variant in variants:
            for video in table.video.unique():
                where = {"video": video, "kind": kind, "variant": variant}
                gain = paired(table, "clip_centred_held_out", **where)
                if gain.n:
                    picture = paired(table, "psnr_held_out_db", **where)
                    said.append(
                        f"With {change_words(kind, variant)} for {KINDS[kind]} on {video}, "
                        f"held-out frames change by {picture.text(2, sign=True)} dB and by "
                        f"{gain.text(sign=True)} in centred cosine ({_seeds_words(gain.n)}).")
    return said


def cost_page(table: pd.DataFrame) -> tuple[str, Figure | None]:
    """Does the second task cost quality? Text and figure."""
    from hnerv_clip.figures.study import plot_differences

    lines, rows, said, used = [], [], [], []
    for (video, kind), part in _groups(table[table.variant.isin(["base", "pixels_only"])]):
        where = {"video": video, "kind": kind, "variant": "base", "against": "pixels_only"}
        change = {p: paired(table, f"psnr_{p}_db", **where) for p in PARTS}
        if not change["train"].n:
            continue
        used.append(part)
        base = part[part.variant == "base"]
        head = base.clip_head_values.iloc[0] / base.stored_values.iloc[0]
        lines.append([video, KINDS[kind], str(change["train"].n),
                      *(estimate(_select(part, variant=v), f"psnr_{p}_db").text(2)
                        for p in PARTS for v in ("pixels_only", "base")),
                      *(change[p].text(2, sign=True) for p in PARTS), f"{head:.1%}"])
        rows.append({"name": f"{video}, {KINDS[kind]}", "color": kind} | {
            key: value for p, found in change.items() for key, value in
            {p: found.values, f"{p}_low": found.low, f"{p}_high": found.high}.items()})
        said.append(_cost_words(video, kind, change))
    if not rows:
        return MISSING.format(why="No pair of runs with and without the CLIP head is in the "
                                  "study's table"), None
    header = ["video", "given", "pairs", "pixels only, training frames (dB)", "both tasks",
              "pixels only, held out (dB)", "both tasks", "change, training frames (dB)",
              "change, held out (dB)", "stored values that are the head"]
    used = pd.concat(used)
    text = "\n\n".join([*said, _figure("cost", "Change of PSNR by the second task"),
                        _markdown(header, lines), made_with(used)])
    figure = plot_differences(pd.DataFrame(rows), teacher_label=_label(used), panels={
        "train": "change, training frames (dB)", "held_out": "change, held-out frames (dB)"},
        words="PSNR with both tasks less PSNR of pixels alone.")
    return text, figure


def _cost_words(video: str, kind: str, change: dict[str, Estimate]) -> str:
    said, before = [], ""
    for part, found in change.items():
        if found.n:
            verb = {"above": "gains", "below": "costs"}.get(found.side, "changes PSNR by")
            size = found if verb != "costs" else Estimate([-v for v in found.values])
            doubt = "" if found.side != "open" else \
                ", of one seed" if found.n == 1 else ", which may be chance"
            said.append(("" if verb == before else f"{verb} ")
                        + f"{size.text(2, sign=found.side == 'open')} dB on {PARTS[part]}{doubt}")
            before = verb
    return (f"**{video}, {KINDS[kind]}**: the second task {' and '.join(said)} "
            f"({_seeds_words(change['train'].n)}).")


def trade_off_page(table: pd.DataFrame) -> tuple[str, Figure | None]:
    """Where is the trade-off? Text and figure, of the first video's hybrid runs."""
    from hnerv_clip.figures.study import plot_pareto

    video = table.video.iloc[0]
    runs = _select(table, video=video, kind="hybrid")
    swept = runs[runs.variant.str.fullmatch("base|lambda_.*|warmup_.*")]
    if swept.variant.nunique() < 2:
        return MISSING.format(why="Runs of several weights λ are not in the study's table"), None
    base = runs[runs.variant == "base"]
    warmup = base.pixel_loss_warmup_epochs.iloc[0] if len(base) else \
        swept.pixel_loss_warmup_epochs.mode()[0]
    columns = [f"{m.format(p)}" for p in PARTS for m in ("psnr_{}_db", "clip_centred_{}")]
    rows = []
    for (weight, epochs), part in swept.groupby(["clip_loss_weight", "pixel_loss_warmup_epochs"]):
        rows.append({"clip_loss_weight": weight, "pixel_loss_warmup_epochs": epochs,
                     "is_base_warmup": epochs == warmup, "n": len(part), "part": part} | {
                         c: part[c].mean() for c in columns} | {
                         f"{c}_seeds": part[c].tolist() for c in columns})
    rows = pd.DataFrame(rows)
    alone = _select(runs, variant="pixels_only")
    lines = [[f"{r.clip_loss_weight:g}", f"{r.pixel_loss_warmup_epochs:g}", str(r.n),
              *(estimate(r.part, c).text(2 if "psnr" in c else 3) for c in columns)]
             for r in rows.itertuples()]
    if len(alone):
        lines.insert(0, ["pixels only", "", str(len(alone)), *(
            estimate(alone, c).text(2) if "psnr" in c else "" for c in columns)])
    header = ["λ", "warm-up (epochs)", "seeds", "PSNR, training frames (dB)", "centred cosine",
              "PSNR, held out (dB)", "centred cosine"]
    used = pd.concat([swept, alone])
    text = "\n\n".join([*_trade_off_words(rows, alone, video),
                        _figure("trade_off", "PSNR against centred cosine"),
                        _markdown(header, lines), made_with(used)])
    pixels = {p: alone[f"psnr_{p}_db"].mean() for p in PARTS} if len(alone) else {}
    return text, plot_pareto(rows, pixels_only=pixels, teacher_label=_label(used))


def undominated(rows: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """The rows that no other row beats in one column without losing in another."""
    values = rows[list(columns)].to_numpy(float)
    beaten = [((values >= own).all(1) & (values > own).any(1)).any() for own in values]
    return rows[~np.array(beaten)]


def _trade_off_words(rows: pd.DataFrame, alone: pd.DataFrame, video: str) -> list[str]:
    said = []
    for part, words in PARTS.items():
        psnr, centred = f"psnr_{part}_db", f"clip_centred_{part}"
        known = rows.dropna(subset=[psnr, centred])
        if not len(known):
            continue
        front = undominated(known, psnr, centred).sort_values(psnr)
        best = known[centred].max()
        near = known[known[centred] >= best - 0.01].sort_values(psnr).iloc[-1]
        cost = alone[psnr].mean() - near[psnr] if len(alone) else float("nan")
        settings = ", ".join(_setting(row) for row in front.to_dict("records"))
        said.append(
            f"**{words.capitalize()} of {video}**: not beaten in both by another setting, by means "
            f"over seeds, from picture's worst to best: {settings}. Of those settings that reach "
            f"the best centred cosine ({best:.3f}) to within 0.01, the best picture has "
            f"{_setting(near)}: {near[psnr]:.2f} dB"
            + (f", {abs(cost):.2f} dB {'below' if cost > 0 else 'above'} pixels alone." if
               cost == cost else "."))
    return said


def _setting(row) -> str:
    warmup = "" if row["is_base_warmup"] else f" with warm-up {row['pixel_loss_warmup_epochs']:g}"
    return f"λ = {row['clip_loss_weight']:g}{warmup}"


def remedies_page(table: pd.DataFrame) -> tuple[str, Figure | None]:
    """What helped on held-out frames and away from the supervised positions? Text and figure."""
    from hnerv_clip.figures.study import plot_differences

    columns = {"skill_held_out": "skill, supervised positions",
               "skill_between_held_out": "half-way between", "skill_anywhere_held_out": "anywhere",
               "psnr_held_out_db": "PSNR, held out (dB)", "psnr_train_db": "training frames (dB)"}
    lines, rows, used, winners, said = [], [], [], [], []
    for (video, kind), part in _groups(table):
        base = part[part.variant == "base"]
        shown = [v for v in [*REMEDIES, *ENCODINGS.get(kind, {})]
                 if paired(table, "skill_held_out", video=video, kind=kind, variant=v).n]
        if not shown:
            continue
        said += [*_interpolation_words(kind, part, shown),
                 *_anywhere_cost_words(table, video, kind, shown)]
        used.append(base)
        lines.append([video, KINDS[kind], "the base", str(len(base)),
                      *(estimate(base, c).text(_digits(c)) for c in columns),
                      *[""] * len(columns), f"{base.clip_head_values.iloc[0] / 1e6:.3f}"])
        for variant in shown:
            gains = {c: paired(table, c, video=video, kind=kind, variant=variant) for c in columns}
            own, name = part[part.variant == variant], change_words(kind, variant)
            used.append(own)
            lines.append([video, KINDS[kind], name, str(gains["skill_held_out"].n),
                          *(estimate(own, c).text(_digits(c)) for c in columns),
                          *(gains[c].text(_digits(c), sign=True) for c in columns),
                          f"{own.clip_head_values.iloc[0] / 1e6:.3f}"])
            where = f"{video}, {KINDS[kind]}" if table.video.nunique() > 1 else KINDS[kind]
            rows.append({"name": f"{where}: {name}", "color": kind} | {
                key: value for c, g in gains.items() for key, value in
                {c: g.values, f"{c}_low": g.low, f"{c}_high": g.high}.items()})
            winners.append((f"“{name}” ({where})", gains))
    if not rows:
        return MISSING.format(why="No remedy is in the study's table beside its base run"), None
    used = pd.concat(used)
    header = ["video", "given", "change", "seeds", *columns.values(),
              *(f"change: {name}" for name in columns.values()), "head (millions of values)"]
    text = "\n\n".join([*_remedy_words(winners, used), *said,
                        _figure("remedies", "Change by each remedy"),
                        _markdown(header, lines), made_with(used)])
    figure = plot_differences(pd.DataFrame(rows), teacher_label=_label(used), panels={
        "skill_held_out": "skill, supervised", "skill_anywhere_held_out": "skill, anywhere",
        "psnr_held_out_db": "PSNR (dB)"},
        words="Held-out frames: each remedy's runs less the base's.")
    return text, figure


def _digits(column: str) -> int:
    return 2 if column.startswith("psnr") else 3


def _interpolation_words(kind: str, part: pd.DataFrame, variants: list[str]) -> list[str]:
    """Which remedies do better anywhere than the base's own answers, interpolated."""
    base = part[part.variant == "base"]
    own, teacher, head = (estimate(base, f"skill{answer}_anywhere_held_out")
                          for answer in ("_own_places", "_teacher_places", ""))
    if not own.n:
        return []
    without = base.set_index("seed").skill_own_places_anywhere_held_out
    over = {variant: Estimate((part[part.variant == variant].set_index(
        "seed").skill_anywhere_held_out - without).dropna()) for variant in variants}
    known = sorted((pair for pair in over.items() if pair[1].n), key=lambda pair: -pair[1].mean)
    ahead = ", ".join(f"“{change_words(kind, variant)}” ({gain.text(sign=True)})"
                      for variant, gain in known if gain.mean > 0)
    remedies = f" Of {len(known)} remedies' heads asked there, ahead of the first: " \
        f"{ahead or 'none'}." if known else ""
    return [f"**Without asking the head** ({base.video.iloc[0]}, {KINDS[kind]}): the base's own "
            f"answers at the supervised positions, interpolated, have a skill of {own.text()} "
            f"anywhere, where its head asked there has {head.text()}; the teacher's embeddings at "
            f"those positions, interpolated, have {teacher.mean:.3f}.{remedies}"]


def _anywhere_cost_words(table: pd.DataFrame, video: str, kind: str, variants: list[str]
                         ) -> list[str]:
    """What the remedy that proves best anywhere costs at the supervised positions and in PSNR."""
    where = {"video": video, "kind": kind}
    gains = {v: paired(table, "skill_anywhere_held_out", variant=v, **where) for v in variants}
    proven = [v for v, gain in gains.items() if gain.side == "above"]
    if not proven:
        return []
    best = max(proven, key=lambda v: gains[v].mean)
    skill = paired(table, "skill_held_out", variant=best, **where)
    rows = _select(table, **where)
    own, base, pixels = (estimate(_select(rows, variant=v), "psnr_held_out_db")
                         for v in (best, "base", "pixels_only"))
    alone = paired(table, "psnr_held_out_db", variant=best, against="pixels_only", **where)
    return [f"**What answers anywhere cost** ({video}, {KINDS[kind]}): with "
            f"“{change_words(kind, best)}” ({_seeds_words(gains[best].n)}), skill at the "
            f"supervised positions changes by {skill.text(sign=True)}, and held-out frames have "
            f"{own.text(2)} dB; with the base {base.text(2)}" + (
                f", with pixels alone {pixels.text(2)}, from which it differs by "
                f"{alone.text(2, sign=True)} dB." if alone.n else ".")]


DEFAULT_BEATEN = (
    "So the default head **is beaten** where it is taught, by {names}. They were compared on "
    "{videos}, at {epochs} epochs, with this teacher alone; until more is known the default stays "
    "the head of the project's description, and the others are a setting away.")


def _remedy_words(found: list[tuple[str, dict[str, Estimate]]], used: pd.DataFrame) -> list[str]:
    said = []
    for column, place in [("skill_held_out", "at the supervised positions"),
                          ("skill_anywhere_held_out", "anywhere in the frame")]:
        gains = sorted(((name, g[column], g["psnr_held_out_db"]) for name, g in found
                        if g[column].n), key=lambda row: -row[1].mean)
        proven = {"It helped": [p for p in gains if p[1].side == "above"],
                  "It harmed": [p for p in gains if p[1].side == "below"]}
        unsure = [g.mean > 0 for _, g, _ in gains if g.side == "open"]
        said.append(f"**Held-out skill {place}**, less the base's, and what happened to the PSNR "
                    "of held-out frames:")
        said.append("\n".join(
            [f"- {words}, by an interval over seeds: " + ("; ".join(
                f"{name} {g.text(sign=True)}, {psnr.text(2, sign=True)} dB"
                for name, g, psnr in some) or "none") + "." for words, some in proven.items()]
            + [f"- Without proof (one seed, or an interval around 0): {sum(unsure)} ahead, "
               f"{len(unsure) - sum(unsure)} behind; the table has them."] * bool(unsure)))
        if column == "skill_held_out":
            better = [name for name, *_ in proven["It helped"]]
            said.append(DEFAULT_BEATEN.format(
                names=" and ".join(better), videos=" and ".join(used.video.unique()),
                epochs=" and ".join(f"{n:.0f}" for n in sorted(used.epochs.unique())))
                if better else
                "None is shown to beat the default head on held-out frames at the positions where "
                "it is taught, so that head stays the default.")
    return said


PAGES: dict[str, Callable[[pd.DataFrame], tuple[str, Figure | None]]] = {
    "learn": learning_page, "cost": cost_page, "trade_off": trade_off_page,
    "remedies": remedies_page}
