"""HNeRV, the original proposal's code and this project beside each other, from `book/results`.

The head that the proposal describes is this project's `original` one; its skill was measured here,
as the proposal reports raw cosines alone. Skill is (s − s_const) / (1 − s_const) of the mean cosine
s to the teacher, on held-out frames: 0 is what the best constant reaches, 1 the teacher itself.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from hnerv_clip.bench.rate_quality import NETWORK, films_of
from hnerv_clip.bench.results import is_gpu, load_benches, part_rows
from hnerv_clip.book import recipe
from hnerv_clip.book.field import best_field, read_fields, read_original
from hnerv_clip.book.judged import Judged, read_judged
from hnerv_clip.book.markdown import Markup, escape, folded, join_words, table, three_digits
from hnerv_clip.book.results import mean_over_seeds, read_json, read_runs

VIDEO = "bunny"
FIX = "git checkout book/results"
# Condition of a verification → how the table's rows and the landing page's sentence call it
AGAINST = {"decoded": "the teacher on the decoded frame", "neighbour": "the nearest training frame",
           "side_file": "a side file of the head's size"}
CLAIMED = AGAINST | {"decoded": "that model run on the decoded frame",
                     "neighbour": "a copy of its embeddings of the nearest training frame"}
# Word of the landing page's sentence → answers that every video has to give for it
COMPARED = {"better": ["better"], "worse": ["worse"], "no better": ["worse", "no better"]}
PROPOSAL = "original script"
TERMS = """The **head** is the part of the network that predicts embeddings. It is trained \
together with the picture, at the centers of a few patches of each frame: the *supervised \
positions*. A **field** is a head that is fitted to the trained network afterwards: the picture \
stays as it is, and any box of the frame can be asked about. **Skill** says how close predicted \
embeddings are to the teacher's, on frames that were not trained on: 0 is as close as the best \
constant, 1 is equal to the teacher, below 0 is worse than a constant."""


class Facts(NamedTuple):
    """What is compared. Speeds are frames per second, `fits` whole trainings, `files` rows of
    `rate_quality.films_of` of the same device."""

    fidelity: dict[str, Any]
    speed: dict[str, dict[str, Any]]
    runs: dict[str, dict[str, Any]]
    device: str
    train: list[dict[str, Any]]
    decode: list[dict[str, Any]]
    fits: list[dict[str, Any]]
    files: list[dict[str, Any]]
    judged: Judged
    field: Any
    original: dict[str, float]
    stored_values: int
    best: Any
    best_epochs: int


def read_facts(results: Path) -> Facts:
    """All that `comparison` and `claim` say.

    Raises:
        ResultsError: a file is missing or damaged.
        ValueError: no benchmark of a GPU.
    """
    benches = load_benches(results)
    parts = {part: [(bench["device"], rows) for bench, rows in part_rows(benches, part)
                    if is_gpu(bench)] for part in ("train", "decode", "fit")}
    if not parts["train"] or not parts["decode"]:
        raise ValueError(f"{results} has no training and decoding of a GPU; measure them with "
                         "hnerv-clip bench --out book/results/bench_NAME.json")
    runs = read_runs(results, needs=["stored_values"])
    runs = runs[(runs.video == VIDEO) & (runs.kind == "hybrid") & (runs.variant == "base")]
    preset = recipe.read_recipe(results)["preset"]
    best = recipe.parts(preset).iloc[0]
    speed = read_json(results, "reference_speed.json", fix=FIX)["rows"]
    device = parts["train"][0][0]
    return Facts(
        fidelity=read_json(results, "fidelity.json", fix=FIX),
        speed={"proposal": next(row for row in speed if row["clip_head"]),
               "hnerv": next(row for row in speed if not row["clip_head"])},
        runs=read_json(results, "reference_runs.json", fix=FIX), device=device,
        train=parts["train"][0][1], decode=parts["decode"][0][1],
        fits=parts["fit"][0][1] if parts["fit"] else [],
        files=[film for film in films_of(read_json(results, "rate_quality.json", fix=FIX))
               if film["device"] == device],
        judged=read_judged(results),
        field=best_field(read_fields(results)["fields"], VIDEO),
        original=read_original(results)[VIDEO], stored_values=int(runs.stored_values.iloc[0]),
        best=best, best_epochs=int(preset.epochs[preset.change == best.change].iloc[0]))


def comparison_rows(facts: Facts) -> list[dict[str, Any]]:
    """A row per measure: HNeRV, the original proposal's code, this project; None where unknown."""
    hnerv, proposal = facts.runs["hnerv"], facts.runs["proposal"]
    means = facts.judged.means.set_index(["video", "condition"]).clip_centred[VIDEO]
    judged = facts.judged.runs[facts.judged.runs.video == VIDEO]
    held_out = mean_over_seeds(judged.psnr_held_out_db)
    everywhere = "".join(f"; all frames trained on: {run['psnr_db']:.2f} (seed {run['seed']})"
                         for run in facts.fits if run["clip_head"])
    own = mean_over_seeds(run["psnr_db"] for run in facts.fidelity["runs"]
                          if run["precision"] == "bf16")
    step, shown = fastest(facts.train), fastest(facts.decode)
    field = f"field of {facts.field.kb:.0f} kB:"
    rows = [
        ("PSNR, pixels only, all frames trained on (dB)",
         f"{facts.fidelity['reference']['paper']['psnr_db']:.2f}", None, own.text(2)),
        ("PSNR, our preset `best` (dB)", None, None,
         f"{facts.best.psnr_db:.2f} ± {facts.best.sd_db:.2f} in {facts.best.total_s:.0f} s"),
        ("PSNR with the head, held-out frames (dB)", None, None,
         f"{held_out.mean:.2f} (seed {join_words(sorted(set(judged.seed.astype(str))))}, "
         f"{len(judged)} splits){everywhere}"),
        ("training steps alone (frames/s)",
         f"{_range(facts.speed['hnerv']['frames_per_s'])}, no head",
         f"{_range(facts.speed['proposal']['frames_per_s'])} with head",
         f"{three_digits(step['frames_per_s'])} with head"),
        (f"{hnerv['epochs']} epochs, whole run (s)", f"{hnerv['train_s']}, no head", None,
         _fit_words(facts.fits)),
        ("peak GPU memory of a whole run, with head", None,
         f"{_range(proposal['memory_gb'])} GB (its page, another video)",
         f"{_peak_bytes(facts, step) / 2**30:.1f} GiB"),
        ("decoding speed (frames/s)", _range(facts.speed["hnerv"]["decode_frames_per_s"]),
         f"{_range(facts.speed['proposal']['decode_frames_per_s'])}, no embeddings",
         f"{three_digits(shown['frames_per_s'])} with embeddings, {shown['batch_size']} frames at "
         "once"),
        *(("playing a stored file (frames/s)", None, None,
           f"{film['decode_frames_per_s'][NETWORK]:.0f}, no embeddings (a file of "
           f"{film['file_bytes'] / 1e6:.1f} MB)")
          for film in facts.files[-1:]),
        ("skill at the supervised positions", "no embeddings",
         f"{facts.original['eight']:.2f} (its head, trained here)",
         f"same head; {field} {facts.field.eight_held:.2f}"),
        ("skill anywhere in the frame", "no embeddings",
         f"{facts.original['any']:.2f} (its head, trained here)",
         f"same head; {field} {facts.field.any_held:.2f}"),
        *((f"embeddings against {words}", None, None, _against(facts.judged, means, condition))
          for condition, words in AGAINST.items())]
    return [{"": Markup(name), "HNeRV": first, PROPOSAL: second, "this project": Markup(
        f"**{third}**") if third else None} for name, first, second, third in rows]


def comparison(results: Path) -> str:
    """`comparison_rows` as Markdown: the terms, the table, a caption, and where each figure comes
    from."""
    facts = read_facts(results)
    hnerv, proposal = facts.runs["hnerv"]["source"], facts.runs["proposal"]["source"]
    caption = escape(
        f"{setting_words(facts)}; teacher: {facts.judged.teacher_label}. Brackets: 95% confidence "
        "interval over seeds; ±: standard deviation over seeds. Original script: the code of the "
        "proposal that this project began with; its head is this project's default "
        "head in training, so one measurement stands for both. Preset best: the settings that gave "
        "the best picture here. Whole run: this project's includes "
        "loading, compilation, evaluations, the stored file and, with head, the teacher's "
        f"embeddings. {_playing_words(facts.files)}Embeddings against: mean-centered cosine to the "
        "teacher's embeddings on held-out frames, of the head here and of the alternative. The "
        "fields are of networks trained on the picture alone.")
    sources = " ".join(escape(words) for words in (
        "Held-out frames are decoded from interpolated embeddings.",
        f"This project: one {facts.device}; preset best: {facts.best.seeds} seeds, timed "
        f"on one {facts.best.device}; skill of the field: mean of {facts.field.seeds} seeds, of "
        f"the original head: of {facts.original['seeds']}.",
        f"HNeRV: {hnerv}; PSNR, {facts.fidelity['reference']['paper']['source']}.",
        f"Original script: {proposal}; its code's speed on the same H100."))
    return (f"{TERMS}\n\n{table(comparison_rows(facts))}\n\n*{caption}*\n\n"
            f"{folded('Where the figures come from', sources)}\n")


def setting_words(facts: Facts) -> str:
    """Video, size, budget and epochs of the runs that are compared, the preset's where other."""
    config, answers = facts.fidelity["runs"][0]["config"], facts.judged.answers
    frames = answers.frames[answers.video == VIDEO].iloc[0]
    longer = "" if facts.best_epochs == config["epochs"] else \
        f" (preset best: {facts.best_epochs})"
    return (f"{VIDEO}, {frames} frames of {config['crop_list'].replace('_', '×')}, "
            f"{config['modelsize']:g} million stored values ({facts.stored_values / 1e6:.2f} with "
            f"the head), {config['epochs']} epochs{longer}")


def claim(results: Path) -> str:
    """The landing page's first two sentences: what it is, in bold, and what was found."""
    what, finding = claim_words(read_facts(results))
    return f"**{what}** {finding}\n"


def claim_words(facts: Facts) -> tuple[str, str]:
    """What a network holds, how fast it is decoded, and what its embeddings are better or worse
    than."""
    given = facts.judged.answers.assign(word=_compared(facts.judged.answers)).pivot(
        index="question", columns="video", values="word")
    found = {name: next((word for word, fits in COMPARED.items()
                         if given.loc[name].isin(fits).all()), "") for name in CLAIMED}
    decoded = fastest(facts.decode)["frames_per_s"]
    playing = "".join(f" (a stored file of {film['file_bytes'] / 1e6:.1f} MB plays at "
                      f"{film['decode_frames_per_s'][NETWORK]:,.0f})"
                      for film in facts.files[-1:])
    said = [f"{word} than {join_words(own, 'and' if word == 'better' else 'or')}"
            for word in COMPARED if (own := [words for name, words in CLAIMED.items()
                                             if found[name] == word])]
    return ("HNeRV-CLIP stores a video as one small neural network that can be played and "
            f"searched: {facts.stored_values / 1e6:.2f} million values, decoded in "
            f"batches at {round(decoded, -2):,.0f} frames per second on one "
            f"{facts.device.split()[1]}{playing}.",
            "For frames that it was not trained on, at the positions that its head is trained "
            "for, it predicts the embeddings of an image model "
            f"(the teacher) {', but '.join(said)}.")


def fastest(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The fastest row with the head (training from frames) or with embeddings (decoding)."""
    own = [row for row in rows if row.get("mode") == "RGB and embeddings"
           or row.get("clip_head") and not row["embed"]]
    return max(own, key=lambda row: row["frames_per_s"])


def _peak_bytes(facts: Facts, step: dict[str, Any]) -> int:
    """Of a whole training with the head, evaluations included, else of its step alone."""
    return max((row["peak_memory_bytes"] for row in facts.fits if row["clip_head"]),
               default=step["peak_memory_bytes"])


def _fit_words(fits: list[dict[str, Any]]) -> str | None:
    """`46, no head; 52 with head`: medians of whole trainings."""
    said = []
    for head, words in ((False, "no head"), (True, "with head")):
        times = [row["wall_s"] for row in fits if bool(row["clip_head"]) is head]
        said += [f"{statistics.median(times):.0f}, {words}"] if times else []
    return "; ".join(said) or None


def _playing_words(files: list[dict[str, Any]]) -> str:
    """In what playing a stored file differs from decoding, or nothing."""
    if not files:
        return ""
    last = files[-1]
    return ("Decoding speed: of a trained run, in the precision of its training; a stored file is "
            f"played in {last['picture_precision']}, in which {last['gpu_cpu_frames']} frames "
            f"differ by at most {last['gpu_cpu_largest_level']} of 255 levels from those of a CPU. "
            "Both without the copy of the pictures to the CPU. ")


def _compared(answers: pd.DataFrame) -> pd.Series:
    """Each answer to "Is it better?" as a word; worse where the 95% interval is below 0."""
    words = answers.answer.map({"yes": "better", "no": "no better"}).fillna("cannot tell")
    return words.mask((answers.answer == "no") & (answers.high < 0), "worse")


def _against(judged: Judged, means, condition: str) -> str:
    own = judged.answers[(judged.answers.video == VIDEO) & (judged.answers.question == condition)]
    return f"{_compared(own).iloc[0]}: {means['learned']:.3f} against {means[condition]:.3f}"


def _range(values: Sequence[float]) -> str:
    return "–".join(dict.fromkeys(f"{value:g}" for value in values))
