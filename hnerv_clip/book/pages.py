"""What the book's static pages take from settings and results: nothing there is typed by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd

from hnerv_clip.bench_results import load_benches, part_rows
from hnerv_clip.book import speed, study_pages
from hnerv_clip.config import Config, settings_table
from hnerv_clip.runs import RunDir, RunError, commit_words, write_json

PLACEHOLDER = """# {title}

```{{admonition}} Not published yet
This page is the executed copy of `notebooks/{name}.ipynb` from a full run, and there is none yet.

- In minutes, on a laptop, at reduced size: `hnerv-clip book` writes it to `output/quick/html`.
- In full, on a GPU: `hnerv-clip book --profile full` executes every notebook and puts it here.
```
"""


def placeholder(name: str) -> str:
    """The page that stands in for a notebook that was not executed, itself a notebook.

    So links to the page hold, published or not.
    """
    number, _, words = name.partition("_")
    title = words.replace("_", " ").replace("clip", "CLIP").capitalize().replace("clip", "CLIP")
    text = PLACEHOLDER.format(title=f"{number} · {title}", name=name)
    cell = nbformat.v4.new_markdown_cell(text.strip(), id="placeholder")
    page = nbformat.v4.new_notebook(cells=[cell], metadata={
        "kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}})
    return nbformat.writes(page) + "\n"


def settings_markdown() -> str:
    """The settings as a Markdown table, for README and book."""
    rows = ["| parameter | default | meaning |", "|---|---|---|"]
    for name, default, _, meaning in settings_table():
        rows.append(f"| `{name}` | {f'`{default}`' if default else 'empty'} | {meaning} |")
    return "\n".join(rows) + "\n"


# What the README repeats: name of the block, and what makes it from `book`
README_BLOCKS: dict[str, Callable[[Path], str]] = {
    "headline": lambda book: headline_table(book / "_generated" / "headline.md"),
    "ablations": lambda book: ablations_markdown(pd.read_csv(book / "results" / "ablations.csv")),
    "fidelity": lambda book: fidelity_markdown(_results(book, "fidelity")),
    "speed": lambda book: speed.training_markdown(load_benches(book / "results"),
                                                  _results(book, "reference_speed")),
    "quick": lambda book: quick_markdown(_results(book, "quick")),
    "settings": lambda book: settings_markdown(),
}


def refresh(root: Path) -> None:
    """Make anew what README and book take from `book/results` and the settings.

    In the README that is what stands between `<!-- made: NAME -->` and `<!-- end: NAME -->`.

    Raises:
        ValueError: the README lacks a block.
    """
    book = root / "book"
    write_from_results(book)
    readme = root / "README.md"
    readme.write_text(fill_blocks(readme.read_text(encoding="utf-8"), {
        name: make(book) for name, make in README_BLOCKS.items()}), encoding="utf-8")


def fill_blocks(text: str, blocks: dict[str, str]) -> str:
    """Put each block between its two comments."""
    for name, content in blocks.items():
        begin, end = f"<!-- made: {name} -->", f"<!-- end: {name} -->"
        if begin not in text or end not in text:
            raise ValueError(f"the README lacks {begin} … {end}; put both around the place where "
                             "the figures go")
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{content.strip()}\n{end}{rest.split(end)[1]}"
    return text


def headline_table(page: Path) -> str:
    """The table of the landing page and what stands below it; empty while no run is published."""
    text = page.read_text(encoding="utf-8")
    return text[text.index("\n|") + 1:] if "\n|" in text else ""


def _results(book: Path, name: str) -> dict[str, Any]:
    return json.loads((book / "results" / f"{name}.json").read_text(encoding="utf-8"))


def write_from_results(book: Path) -> None:
    """Write what pages include of the settings and of the measurements in `book/results`."""
    from hnerv_clip.book.scaling_pages import write_scaling

    folder = book / "_generated"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.md").write_text(settings_markdown(), encoding="utf-8")
    _write_fidelity(folder, book / "results")
    _write_speed(folder, book / "results")
    write_scaling(folder, book / "results")
    study_pages.write_study_pages(folder, book / "results")


def collect_fidelity(results: Path, run_dirs: list[str | Path]) -> None:
    """Put finished runs into `fidelity.json`, beside those there or in their place.

    A run takes the place of one of the same seed, engine and precision; the reference stays.

    Raises:
        RunError: a run is not finished.
    """
    from hnerv_clip.bench.context import run_record

    path = results / "fidelity.json"
    measured = json.loads(path.read_text(encoding="utf-8"))
    runs = {(run["seed"], run["engine"], run["precision"]): run for run in
            [*measured["runs"], *(run_record(RunDir(run)) for run in run_dirs)]}
    write_json(path, {"runs": list(runs.values()), "reference": measured["reference"]})


def collect_quick(results: Path, study: Path) -> None:
    """Write `quick.json` from the folder of a quick study that `hnerv-clip book` executed whole.

    Raises:
        RunError: the study's main run is not finished, or it was executed in parts or resumed.
    """
    run = RunDir(study / "main")
    summary, facts = run.summary(), run.provenance()
    made = study / "book.json"
    if not made.exists():
        raise RunError(f"{study} has no book.json: execute the whole book into an empty folder, "
                       "hnerv-clip book --outf NEW/main")
    cost = json.loads(made.read_text(encoding="utf-8"))
    held_out = "_val_interpolated" if "eval_psnr_val_interpolated" in summary else "_val"
    write_json(results / "quick.json", {
        "what": "hnerv-clip book, quick profile, after installation", **cost,
        "psnr_train_db": summary["eval_psnr_train"],
        "psnr_held_out_db": summary[f"eval_psnr{held_out}"],
        "clip_centred_train": summary["eval_clip_centred_train"],
        "clip_centred_held_out": summary[f"eval_clip_centred{held_out}"],
        "train_frames_per_s": summary["train_frames_per_s"], "versions": facts["versions"]})


def write_generated(book: Path, *, config: Config, run_dir: Path, cache_dir: str | Path) -> None:
    """Write what `book/*.md` include: settings, the drawing of the network, the headline result.

    Args:
        book: the folder with the pages; `_generated` and `_static` in it are written to.
        run_dir: the study's main run; where it is not finished, the headline says so.
    """
    write_from_results(book)
    folder = book / "_generated"
    _draw_architecture(folder / "architecture.svg", config)
    video = book / "_static" / "headline.mp4"
    video.unlink(missing_ok=True)
    video.parent.mkdir(exist_ok=True)
    run = RunDir(run_dir)
    (folder / "headline.md").write_text(
        headline(run, video, cache_dir=cache_dir) if run.finished else NO_HEADLINE,
        encoding="utf-8")


def _draw_architecture(path: Path, config: Config) -> None:
    from hnerv_clip.figures.architecture import plot_architecture
    from hnerv_clip.figures.style import use_style
    from hnerv_clip.model import build_model
    from hnerv_clip.patches import make_grid
    from hnerv_clip.video import load_video

    frames = load_video(config.video).frames
    frame_hw = tuple(frames.shape[2:])
    model = build_model(config.model, frame_hw=frame_hw, frame_count=len(frames))
    use_style()
    figure = plot_architecture(config, model.plan, frame_hw=frame_hw, sizes=model.part_sizes(),
                               patch_count=len(make_grid(config.teacher, frame_hw)))
    figure.savefig(path, metadata={"Date": None})


def _write_fidelity(folder: Path, results: Path) -> None:
    """The figure and the tables of `fidelity.md`, from the measurements in `book/results`."""
    from hnerv_clip.figures.style import use_style
    from hnerv_clip.figures.training import plot_fidelity

    use_style()
    measured = json.loads((results / "fidelity.json").read_text(encoding="utf-8"))
    plot_fidelity(measured["runs"], measured["reference"]).savefig(folder / "fidelity.svg",
                                                                   metadata={"Date": None})
    (folder / "fidelity.md").write_text(fidelity_markdown(measured), encoding="utf-8")


def _write_speed(folder: Path, results: Path) -> None:
    """The figures and the tables of `how_fast.md`, from the measurements in `book/results`."""
    from hnerv_clip.figures.speed import plot_growth, plot_profile
    from hnerv_clip.figures.style import use_style

    use_style()
    for name, text in speed.speed_pages(results).items():
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
    figures = {}
    growth = {bench["device"]: rows for bench, rows in
              part_rows(load_benches(results), "scaling")}
    if growth:
        figures["speed_growth"] = plot_growth(growth, {
            name: axis[:2] for name, axis in speed.AXES.items()})
    if profile := speed.step_profile(results):
        figures["speed_profile"] = plot_profile(profile["rows"], device=profile["device"])
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


def fidelity_markdown(measured: dict) -> str:
    """Final figures of this implementation's runs beside the paper's, as a Markdown table."""
    reference = measured["reference"]
    rows = ["| | PSNR (dB) | MS-SSIM | 8-bit weights, 6-bit embeddings (dB) | bits per pixel |",
            "|---|---|---|---|---|",
            "| {source} | {psnr_db:.2f} | {ms_ssim:.4f} | | |".format(**reference["paper"]),
            "| {source} | {psnr_db:.2f} | {ms_ssim:.4f} | {quantised_psnr_db:.2f} | "
            "{rate_bpp:.4f} |".format(**reference)]
    rows += ["| here, seed {seed}: {precision}, {engine} engine, {device}, {seconds:.0f} s, commit "
             "{short} | {psnr_db:.2f} | {quality} | {quantised_psnr_db:.2f} | {rate_bpp:.4f} |"
             .format(seconds=run["train_time_s"], short=commit_words(run), quality=""
                     if run["ms_ssim"] is None else f"{run['ms_ssim']:.4f}", **run)
             for run in measured["runs"]]
    values = [run["psnr_db"] for run in measured["runs"]]
    gap = sum(values) / len(values) - reference["paper"]["psnr_db"]
    within = sum(abs(value - reference["paper"]["psnr_db"]) <= 0.15 for value in values)
    return "\n".join(rows) + (
        f"\n\nOver {len(values)} runs, the mean lies {abs(gap):.2f} dB "
        f"{'above' if gap > 0 else 'below'} the paper's figure, the single runs between "
        f"{min(values):.2f} and {max(values):.2f} dB. The aim, within 0.15 dB "
        f"of it, is met by {within} of them.{_engine_words(measured['runs'])}\n")


def _engine_words(runs: list[dict]) -> str:
    """By how much engines differ that trained from the same seed."""
    by_seed: dict[int, list[float]] = {}
    for run in runs:
        by_seed.setdefault(run["seed"], []).append(run["psnr_db"])
    apart = [max(values) - min(values) for values in by_seed.values() if len(values) > 1]
    return f" Engines and precisions that share a seed differ by {max(apart):.2f} dB at most." \
        if apart else ""


def quick_markdown(measured: dict) -> str:
    """What the quick profile took and reached, in a sentence."""
    return (
        "The quick profile took {wall_s:.0f} s and {memory:.1f} GB (largest process) on {device}: "
        "{psnr_train_db:.2f} dB and a centred cosine of {clip_centred_train:.3f} on training "
        "frames, {psnr_held_out_db:.2f} dB and {clip_centred_held_out:.3f} on held-out ones; "
        "commit {short}.\n"
    ).format(memory=measured["peak_memory_bytes"] / 1e9, short=commit_words(measured), **measured)


def ablations_markdown(table: pd.DataFrame) -> str:
    """`ablation_table` as a Markdown table, shortened."""
    columns = {"psnr_train_db": ("PSNR, training frames (dB)", 2),
               "psnr_held_out_db": ("held out (dB)", 2),
               "clip_centred_train": ("centred cosine, training frames", 3),
               "clip_centred_held_out": ("held out", 3)}
    rows = ["| run | " + " | ".join(name for name, _ in columns.values()) + " |",
            "|---" * (1 + len(columns)) + "|"]
    for _, row in table.iterrows():
        cells = ["" if pd.isna(row[c]) else f"{row[c]:.{digits}f}"
                 for c, (_, digits) in columns.items()]
        rows.append(f"| `{row.run}` | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def headline(run: RunDir, video: Path, *, cache_dir: str | Path) -> str:
    """The landing page's result: a moving picture, a table, and what they were made with.

    Args:
        run: a finished run.
        video: where the moving picture goes: the source above the network's own frames.
    """
    from hnerv_clip.evaluate import summarise
    from hnerv_clip.inference import decode_frames, load_run
    from hnerv_clip.video import write_video

    loaded = load_run(run.path, cache_dir=cache_dir)
    dataset, facts = loaded.dataset, run.provenance()
    source = dataset.video.frames
    shown = decode_frames(loaded.model, dataset, list(range(len(source))))
    write_video(video, _side_by_side(source, shown), dataset.video.fps)
    table = summarise(pd.read_csv(run.path / "evaluation.csv"))
    height, width = dataset.video.frame_hw
    return HEADLINE.format(
        name=dataset.video.name, height=height, width=width, count=len(source),
        credit=f" {dataset.video.credit}." if dataset.video.credit else "",
        stored=loaded.model.part_sizes()["stored"] / 1e6, table=result_table(table),
        teacher=dataset.teacher_label if loaded.config.model.predict_clip else "pixels alone",
        size=run.summary()["size_bytes"], rate=run.summary()["rate_bpp"],
        epochs=loaded.config.train.epochs, seed=facts["seed"], device=facts["device"],
        commit=commit_words(facts))


def _side_by_side(source, shown):
    """[T, 3, H, W] twice to [T, 3, h, 2·w], at most 640 pixels a frame."""
    import torch

    step = max(1, round(source.shape[3] / 640))
    pair = torch.cat([source, shown], dim=3)
    if step > 1:
        pair = torch.nn.functional.avg_pool2d(pair.float(), step).round().byte()
    return pair[..., :pair.shape[2] // 2 * 2, :pair.shape[3] // 2 * 2]


FRAMES = {"train": "training", "held_out": "held out"}


def result_table(table: pd.DataFrame) -> str:
    """The means of `summarise` as a Markdown table: pictures, their file, and the CLIP head."""
    from hnerv_clip.labels import SOURCE_WORDS

    values = table[table.frames != "all"].set_index(["frames", "source", "variant"])
    columns = {"PSNR (dB)": ("psnr_db", "trained", 2), "from the file": ("psnr_db", "quantised", 2),
               "MS-SSIM": ("ms_ssim", "trained", 4),
               "cosine to the teacher": ("clip_similarity", "trained", 3),
               "centred": ("clip_centred", "trained", 3)}
    columns = {name: column for name, column in columns.items() if values[column[0]].notna().any()}
    rows = ["| frames | n | " + " | ".join(columns) + " |", "|---" * (2 + len(columns)) + "|"]
    for frames, source in dict.fromkeys(key[:2] for key in values.index):
        cells = [f"{values[measure].get((frames, source, variant), float('nan')):.{digits}f}"
                 for measure, variant, digits in columns.values()]
        rows.append(f"| {FRAMES[frames]}, {SOURCE_WORDS[source]} | "
                    f"{values.n[frames, source, 'trained']} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


HEADLINE = """**Learnt from: {teacher}.**

<video autoplay loop muted playsinline controls src="../_static/headline.mp4"
 style="width:100%" aria-label="The video and the network's copy of it, side by side"></video>

*Left: {name}, {count} frames of {height}×{width}.{credit} Right: the same frames from a network of
{stored:.2f} million stored values.*

{table}

*Means over n frames. Centred: less the mean embedding, so that a constant scores 0. The file holds
{size:,} bytes, {rate:.4f} bits per pixel. {epochs} epochs, seed {seed}, {device}, commit {commit}.*
"""

NO_HEADLINE = """```{admonition} No run is published yet
A moving picture and a table stand here once a full run is published. On your own machine
`hnerv-clip book` makes both in minutes, at reduced size.
```
"""
