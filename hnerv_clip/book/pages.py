"""What the book's static pages take from settings and results: nothing there is typed by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat

from hnerv_clip.book import compare
from hnerv_clip.book.film import FILM_FILES, make_film
from hnerv_clip.book.markdown import Markup, escape, table
from hnerv_clip.book.results import read_json
from hnerv_clip.book.scaling import evaluation_rows
from hnerv_clip.config import Config, settings_table
from hnerv_clip.runs.provenance import commit_words
from hnerv_clip.runs.run_dir import RunDir, RunError, write_json

RESULTS = "[12][0-9]_*.ipynb"  # notebooks over `book/results`, the same in every study
PLACEHOLDER = """# {title}

**This page is made on your machine**, by executing `notebooks/{name}.ipynb` on a run of your own:

- in minutes, on a laptop, at reduced size: `hnerv-clip book`, into `output/quick/html`;
- in full, on a GPU: `hnerv-clip book --profile full`.
{instead}"""
# Page → where to read of it meanwhile
INSTEAD = {"04_verify_clip": "\nThe same questions over runs whose held-out frames tile their "
                             "video: [Is it real?](17_judge_network.ipynb)\n"}


def placeholder(name: str) -> str:
    """The page that stands in for a notebook that was not executed, itself a notebook.

    So links to the page hold, published or not.
    """
    number, _, words = name.partition("_")
    title = words.replace("_", " ").replace("clip", "CLIP").capitalize().replace("clip", "CLIP")
    text = PLACEHOLDER.format(title=f"{number} · {title}", name=name,
                              instead=INSTEAD.get(name, ""))
    cell = nbformat.v4.new_markdown_cell(text.strip(), id="placeholder")
    page = nbformat.v4.new_notebook(cells=[cell], metadata={
        "kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}})
    return nbformat.writes(page) + "\n"


def settings_markdown() -> str:
    """The settings as a Markdown table, for README and book."""
    return table([{"parameter": Markup(f"`{name}`"),
                   "default": Markup(f"`{default}`") if default else "empty",
                   "meaning": Markup(meaning)}
                  for name, default, _, meaning in settings_table()]) + "\n"


# What the README repeats: name of the block, and what makes it from `book`
README_BLOCKS: dict[str, Callable[[Path], str]] = {
    "claim": lambda book: compare.claim(book / "results"),
    "film": lambda book: film_picture(book),
    "compare": lambda book: compare.comparison(book / "results"),
    "answers": lambda book: answers_markdown(book),
    "quick": lambda book: quick_markdown(_results(book, "quick")),
}


def refresh(root: Path) -> None:
    """Make anew what README and book take from `book/results` and the settings.

    In the README that is what stands between `<!-- made: NAME -->` and `<!-- end: NAME -->`.

    Raises:
        ValueError: the README lacks a block.
    """
    book = root / "book"
    write_results(book)
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


def answers_markdown(book: Path, *, folder: str = "book/") -> str:
    """The question and the answer of every result page, from the executed notebooks.

    Args:
        folder: of the pages, seen from the page that lists them.
    Raises:
        ValueError: a page does not begin with its answer.
    """
    lines = []
    for path in sorted(book.glob(RESULTS)):
        cells = nbformat.read(path, as_version=4).cells
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        texts = [output.data["text/markdown"] for output in outputs
                 if "text/markdown" in output.get("data", {})]
        found = re.match(r"\*\*(.+?)\*\*", texts[0], re.S) if texts else None
        if not found or found[1][-1] not in ".!?":
            raise ValueError(f"{path} does not begin with its answer in bold, a sentence that ends "
                             "with its full stop; execute it again, hnerv-clip pages")
        question = cells[0].source.removeprefix("# ")
        lines.append(f"- **[{question}]({folder}{path.name})** {found[1]}")
    return "\n".join(lines) + "\n"


def film_picture(book: Path) -> str:
    """The landing page's film as a moving picture, with its caption."""
    caption = re.search(r"<figcaption><p>(.*?)</p>", (book / "_generated" / "film.md").read_text(
        encoding="utf-8"), re.S)
    return ("![A film of three panels: the video, the network's reconstruction of it, and where it "
            "finds a text](book/_static/film.webp)\n\n"
            + (f"*{caption[1]}*\n" if caption else ""))


def _results(book: Path, name: str) -> dict[str, Any]:
    return read_json(book / "results", f"{name}.json", fix=f"hnerv-clip pages --{name} FOLDER")


def write_results(book: Path) -> None:
    """Write what static pages include of `book/results` and of the settings."""
    folder = book / "_generated"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {"settings": settings_markdown(), "claim": compare.claim(book / "results"),
                       "compare": compare.comparison(book / "results"),
                       "answers": answers_markdown(book, folder="")}.items():
        (folder / f"{name}.md").write_text(text, encoding="utf-8")


def collect_fidelity(results: Path, run_dirs: list[str | Path]) -> None:
    """Put finished runs into `fidelity.json`, beside those there or in their place.

    A run takes the place of one of the same seed, engine and precision; the reference stays.

    Raises:
        RunError: a run is not finished.
    """
    from hnerv_clip.study.collect import put_fidelity

    path = results / "fidelity.json"
    measured = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, put_fidelity(measured, [RunDir(run) for run in run_dirs]))


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
    path = results / "quick.json"
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_json(path, {
        "what": "hnerv-clip book, quick profile, after installation", **cost,
        "psnr_train_db": summary["eval_psnr_train"],
        "psnr_held_out_db": summary[f"eval_psnr{held_out}"],
        "clip_centred_train": summary["eval_clip_centred_train"],
        "clip_centred_held_out": summary[f"eval_clip_centred{held_out}"],
        "train_frames_per_s": summary["train_frames_per_s"], "versions": facts["versions"],
        **({"tests": old["tests"]} if "tests" in old else {})})


def write_generated(book: Path, *, config: Config, run_dir: Path, cache_dir: str | Path,
                    moving: bool = False) -> None:
    """Write what `book/*.md` include: results, the drawing of the network, the film of a run.

    Args:
        book: the folder with the pages; `_generated` and `_static` in it are written to.
        run_dir: the study's main run; where it is not finished, film and table are left out.
        moving: also the README's animated picture.
    """
    write_results(book)
    folder = book / "_generated"
    _draw_architecture(folder / "architecture.svg", config)
    for name in FILM_FILES:
        (book / "_static" / name).unlink(missing_ok=True)
    run = RunDir(run_dir)
    (folder / "headline.md").write_text(headline(run) if run.finished else "", encoding="utf-8")
    if run.finished:
        make_film(book, run.path, cache_dir=cache_dir, moving=moving)
    else:
        (folder / "film.md").write_text("", encoding="utf-8")


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


def quick_markdown(measured: dict[str, Any]) -> str:
    """What the two commands took, after installation, and what the quick book's run reached.

    Args:
        measured: `quick.json`; where `tests` is there, `seconds` and `commit` of the tests.
    """
    tests = ", the tests {:.0f} s (commit {})".format(
        measured["tests"]["seconds"], commit_words(measured["tests"])) \
        if "tests" in measured else ""
    return (
        "After installation the quick book took {wall_s:.0f} s and {memory:.1f} GB (largest "
        "process){of_tests} on {device}; its network reached {psnr_train_db:.2f} dB and a "
        "mean-centered cosine of {clip_centred_train:.3f} on training frames, "
        "{psnr_held_out_db:.2f} dB and {clip_centred_held_out:.3f} on held-out ones (commit "
        "{short}).\n"
    ).format(memory=measured["peak_memory_bytes"] / 1e9, of_tests=tests,
             short=commit_words(measured), **measured)


def headline(run: RunDir) -> str:
    """The means of a finished run as a table, and what they were made with."""
    from hnerv_clip.teachers import describe_teacher

    config, facts, summary = run.config(), run.provenance(), run.summary()
    teacher = describe_teacher(config.teacher).label if config.model.predict_clip else "none"
    return HEADLINE.format(
        table=table(evaluation_rows(run)), teacher=escape(teacher), size=summary["size_bytes"],
        rate=summary["rate_bpp"], epochs=config.train.epochs, seed=facts["seed"],
        device=facts["device"], commit=commit_words(facts))


HEADLINE = """{table}

*Teacher: {teacher}. Means over n frames. Mean-centered cosine: with the mean embedding subtracted,
so that a constant scores 0. The file holds {size:,} bytes, {rate:.4f} bits per pixel. {epochs}
epochs, seed {seed}, {device}, commit {commit}.*
"""
