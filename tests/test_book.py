"""The book: papermill and Jupyter Book driven on small notebooks of the tests' own."""

import contextlib
import io
import json
import platform
import re
import shutil
import subprocess
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from hnerv_clip import figures
from hnerv_clip.book import BookError, build, clean, compare, pages
from hnerv_clip.config import Config, ConfigError, profile_params
from hnerv_clip.runs.run_dir import RunDir, RunError

ROOT = Path(__file__).resolve().parents[1]
QUICK, FULL = profile_params("quick"), profile_params("full")
FIRST = f"""outf = "output/quick/main"  # run folder
epochs = {QUICK["epochs"]}
lr = {QUICK["lr"]}
predict_clip = True
queries = ["hare", "wood"]"""


EVIL = "<svg onload=alert(1)>"
HOSTILE = f"""import pandas as pd
from IPython.display import Markdown, display
from hnerv_clip import figures
figures.use_style()
evil = {EVIL!r}
display(Markdown(f"**Teacher: local-dir:{{evil}}** [a](javascript:alert(1))"),
        pd.DataFrame([{{evil: evil}}]))
figures.plot_differences(pd.DataFrame([{{"name": evil, "color": "hybrid", "x": [1.0, 2.0],
    "x_low": 0.0, "x_high": 3.0}}]), panels={{"x": evil}}, words=f"Of {{evil}}: $a$",
    teacher_label=evil)"""


def write_notebook(path, *sources, tags=("parameters",)):
    """A notebook whose first cell is a heading and whose second is the parameters cell."""
    cells = [nbformat.v4.new_markdown_cell(f"# {path.stem}")]
    cells += [nbformat.v4.new_code_cell(source) for source in sources]
    cells[1].metadata["tags"] = list(tags)
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={
        "kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}})
    path.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, path)
    return path


@pytest.fixture
def repo(tmp_path, monkeypatch):
    """A checkout with this repository's configuration and two small notebooks."""
    root = tmp_path / "repo"
    shutil.copytree(ROOT / "book" / "_ext", root / "book" / "_ext")
    shutil.copytree(ROOT / "book" / "_static", root / "book" / "_static")
    shutil.copytree(ROOT / "book" / "results", root / "book" / "results")
    shutil.copy(ROOT / "_config.yml", root)
    shutil.copy(ROOT / "book" / "references.bib", root / "book")
    (root / "pyproject.toml").touch()
    (root / "_toc.yml").write_text("format: jb-book\nroot: book/index\nchapters:\n"
                                   "- file: book/01_first\n- file: book/02_second\n")
    (root / "book" / "index.md").write_text("# Small\n\n$$ \\frac{1}{2} $$\n\n"
                                            "```{include} _generated/headline.md\n```\n")
    for name in ("01_first", "02_second"):
        (root / "book" / f"{name}.ipynb").write_text(pages.placeholder(name))
    write_notebook(root / "notebooks" / "01_first.ipynb", FIRST,
                   "import sys, os\nprint('\\r 50%\\r100%')\nprint('noise', file=sys.stderr)\n"
                   "print(os.getcwd(), epochs)")
    write_notebook(root / "notebooks" / "02_second.ipynb", 'outf = "output/quick/main"\ntop_k = 5',
                   "from pathlib import Path\nopen('../ran', 'a').write('x')\nPath.cwd()",
                   HOSTILE)
    monkeypatch.chdir(root)
    return root


def plan(repo, only=(), **overrides):
    notebooks = build.list_notebooks(repo, only)
    others = [n for n in build.list_notebooks(repo) if n not in notebooks]
    return build.plan_parameters(notebooks, profile="quick", overrides=overrides, others=others)


def test_parameters_are_read_from_the_tagged_cell(repo):
    assert build.declared_parameters(repo / "notebooks" / "01_first.ipynb") == {
        "outf": "output/quick/main", "epochs": QUICK["epochs"], "lr": QUICK["lr"],
        "predict_clip": True, "queries": ["hare", "wood"]}


def test_a_default_that_is_computed_is_refused(repo):
    path = write_notebook(repo / "notebooks" / "03_third.ipynb", "epochs = 2 * 3 * len('a')")
    with pytest.raises(BookError, match="03_third.*plain value"):
        build.declared_parameters(path)


def test_only_declared_and_changed_parameters_are_injected(repo):
    assert plan(repo) == [{}, {}]
    assert plan(repo, epochs="3", top_k="7", lr="1e-2", predict_clip="false",
                queries="['fox']") == [
        {"epochs": 3, "lr": 0.01, "predict_clip": False, "queries": ["fox"]}, {"top_k": 7}]
    assert plan(repo, outf="output/x/main") == [{"outf": "output/x/main"}] * 2


def test_the_full_profile_injects_what_differs_from_quick(repo):
    first, second = build.plan_parameters(build.list_notebooks(repo), profile="full", overrides={})
    assert first == {"outf": "output/full/main"} | {
        name: FULL[name] for name in ("epochs", "lr") if FULL[name] != QUICK[name]}
    assert second == {"outf": "output/full/main"}


def test_another_video_is_not_cropped_to_bunnys_size(repo):
    third = write_notebook(repo / "notebooks" / "03_third.ipynb",
                           'data_path = "bunny"\ncrop_list = "640_1280"\nenc_strds = "7 4 3"')
    [injected] = build.plan_parameters([third], profile="full", overrides={"data_path": "my.mp4"})
    assert injected == {"data_path": "my.mp4", "crop_list": "", "enc_strds": "auto"}
    config = build.run_config(profile="full", overrides={"data_path": "my.mp4"})
    assert (config.video.crop_list, config.model.enc_strds) == (None, "auto")


def test_ablations_go_beside_the_run(repo):
    third = repo / "notebooks" / "03_third.ipynb"
    write_notebook(third, 'ablations_outf = "output/quick/ablations"')
    assert plan(repo, only=["03"]) == [{}]
    write_notebook(third, 'outf = ""\nablations_outf = ""')
    assert plan(repo, only=["03"], outf="output/x/main") == [
        {"outf": "output/x/main", "ablations_outf": "output/x/ablations"}]


def test_an_unknown_parameter_is_refused_with_the_known_ones(repo):
    with pytest.raises(BookError, match="'epocs'.*'epochs'.*outf, epochs, lr.*top_k"):
        plan(repo, epocs="3")
    with pytest.raises(BookError, match="belongs to 01_first"):
        plan(repo, only=["02"], epochs="3")
    with pytest.raises(BookError, match="99.*01_first, 02_second"):
        plan(repo, only=["99"])


@pytest.mark.parametrize("name, value", [("epochs", "many"), ("epochs", "1.5"), ("lr", "fast"),
                                         ("predict_clip", "maybe"), ("queries", "hare")])
def test_a_value_of_the_wrong_type_is_refused(repo, name, value):
    with pytest.raises(BookError, match=f"{name}='{value}'.*default"):
        plan(repo, **{name: value})


def test_a_bad_request_is_refused_before_any_work(repo, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="epochs=0"):
        build.make_book(overrides={"epochs": "0"})
    with pytest.raises(ConfigError, match="profile='large'"):
        build.make_book("large")
    with pytest.raises(BookError, match="repository itself"):
        build.make_book(overrides={"outf": "main"})
    begun = RunDir.create(repo / "output" / "quick" / "main", Config.from_params(epochs=2))
    (begun.path / "metrics.csv").touch()
    with pytest.raises(RunError, match="epochs: 2 there"):
        build.make_book()
    assert not (repo / "ran").exists() and not (repo / "output/quick/executed").exists()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BookError, match="_toc.yml.*checkout"):
        build.make_book()


def test_a_book_from_notebooks_to_published_pages(repo, capsys):
    committed = {p: p.read_bytes() for p in (repo / "book").rglob("*") if p.is_file()}
    (repo / "book" / "index.md").write_text("# Small\n\n[broken](nowhere.md)\n")
    with pytest.raises(BookError, match="index.md:3: WARNING.*nowhere.md"):
        build.make_book(overrides={"epochs": "3"})
    (repo / "book" / "index.md").write_bytes(committed[repo / "book" / "index.md"])

    html = build.make_book(overrides={"epochs": "3"}, only=["01"])  # 02 is there from before
    check_nothing_executes(html.parent / "book" / "02_second.html")
    assert html == repo / "output" / "quick" / "html" / "index.html"
    assert "[1/1] 01_first  (epochs=3)" in capsys.readouterr().out
    assert (repo / "ran").read_text() == "x"
    assert {p: p.read_bytes() for p in committed} == committed
    assert sorted(p.name for p in (repo / "book").iterdir()) == sorted(
        {p.relative_to(repo / "book").parts[0] for p in committed})

    page = nbformat.read(repo / "output/quick/site/book/01_first.ipynb", as_version=4)
    assert [c.source for c in page.cells[2:3]] == ["# Parameters\nepochs = 3\n"]
    assert page.cells[3].outputs[0].text == "100%\n./notebooks 3\n"
    assert set(page.metadata) <= {"kernelspec", "language_info"}
    assert re.search(r"executed at \d{4}-.* in [\d.]+ s, on .*\scommit \w", page.cells[-1].source)
    assert not (repo / "output/quick/book.json").exists(), "only a whole book has a cost"
    text = (repo / "output/quick/site/book/02_second.ipynb").read_text()
    assert "PosixPath" in text and str(repo) not in text
    index = (html.parent / "book" / "index.html").read_text()
    assert "Reduced setting" in (html.parent / "book" / "01_first.html").read_text()
    assert "aria-label" in index  # the drawn formula
    for built in (html.parent / "book").glob("*.html"):
        scripts = re.findall(r'<(?:script|link)[^>]*(?:src|href)="(https?:[^"]*)"',
                             built.read_text())
        assert not scripts, f"{built.name} needs the network"

    build.publish(repo, repo / "output/quick/site")
    for name in ("01_first", "02_second"):
        assert (repo / f"book/{name}.ipynb").read_bytes() == \
            (repo / f"output/quick/site/book/{name}.ipynb").read_bytes()


def check_nothing_executes(page):
    """Names of videos and folders are text in a built page, in captions of figures, too."""
    from html.parser import HTMLParser

    found = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attributes):
            found.append((tag, dict(attributes)))

    Parser().feed(page.read_text())
    bad = [(tag, name) for tag, attributes in found for name, value in attributes.items()
           if "alert(1)" in str(value) and (name.startswith("on") or "javascript:" in str(value))]
    assert not bad and ("svg", {"onload": "alert(1)"}) not in found
    image, = [a for tag, a in found if tag == "img" and "second" not in a.get("alt", "")
              and "Of <svg" in a.get("alt", "")]
    assert image["alt"].startswith("Of <svg onload=alert(1)>: $a$ A dot is a pair")
    drawing = (page.parent / image["src"]).resolve().read_text()
    assert "<svg onload" not in drawing and "&lt;svg onload=alert(1)&gt;" in drawing


def test_a_whole_book_notes_what_it_took(repo, monkeypatch):
    monkeypatch.setattr(build, "render", lambda site, html: html.mkdir(parents=True, exist_ok=True))
    monkeypatch.setattr("hnerv_clip.train.check_run", lambda config: None)
    build.make_book(say=lambda text: None)
    cost = json.loads((repo / "output/quick/book.json").read_text())
    assert cost["wall_s"] > 0 and cost["peak_memory_bytes"] > 2**20 and cost["device"]


def test_a_book_is_executed_on_one_machine_and_published_on_another(repo, monkeypatch):
    """The first has no Jupyter Book; what was not executed keeps its committed page."""
    monkeypatch.setattr(build, "render", None)
    monkeypatch.setattr(pages, "write_generated", lambda book, **_: (book / "_generated").mkdir())
    committed = (repo / "book/02_second.ipynb").read_bytes()
    made = build.make_book("full", only=["01"], render_html=False, say=lambda text: None)
    assert [path.name for path in made.iterdir()] == ["01_first.ipynb"]
    assert not (repo / "output/full/site").exists()
    with pytest.raises(BookError, match="not published.*no finished run"):
        build.make_book("full", execute_notebooks=False, render_html=False, publish_pages=True)

    monkeypatch.setattr(RunDir, "finished", True)
    build.make_book("full", execute_notebooks=False, render_html=False, publish_pages=True,
                    say=lambda text: None)
    assert "executed at" in (repo / "book/01_first.ipynb").read_text()
    assert (repo / "book/02_second.ipynb").read_bytes() == committed
    assert not (repo / "ran").exists()


def test_a_page_too_large_to_commit_is_not_published(repo, monkeypatch):
    site = repo / "output" / "quick" / "site"
    (site / "book").mkdir(parents=True)
    write_notebook(site / "book" / "01_first.ipynb", "a = 1")
    monkeypatch.setattr(build, "PAGE_LIMIT_BYTES", 100)
    with pytest.raises(BookError, match="01_first.ipynb.*nothing was published"):
        build.publish(repo, site)
    assert (repo / "book" / "01_first.ipynb").read_text() == pages.placeholder("01_first")


def test_a_failing_cell_is_named_and_the_partial_copy_kept(repo):
    source = write_notebook(repo / "notebooks" / "03_third.ipynb", "a = 1", "print('before')",
                            "b = a / 0  # the culprit")
    target = repo / "out" / source.name
    with pytest.raises(BookError) as caught:
        build.execute(source, target, parameters={"a": 2})
    assert re.search(r"03_third stopped in cell \[4\] \(b = a / 0.*\n.*ZeroDivisionError: "
                     r"division by zero\n.*03_third.failed.ipynb", str(caught.value))
    assert not target.exists()
    assert "before" in (repo / "out" / "03_third.failed.ipynb").read_text()


def test_a_kernel_that_dies_is_an_error(repo):
    source = write_notebook(repo / "notebooks" / "03_third.ipynb", "a = 1",
                            "import os\nos._exit(9)")
    with pytest.raises(BookError, match="03_third.*kernel died.*memory"):
        build.execute(source, repo / "out" / source.name, parameters={})


def test_memory_is_kept_only_by_a_glibc_that_takes_both_settings():
    assert build.keeps_memory("glibc", "2.35") and build.keeps_memory("glibc", "3.0")
    assert not any(build.keeps_memory(*libc) for libc in (
        ("glibc", "2.28"), ("glibc", "2.4"), ("musl", "1.2.5"), ("", "")))


@pytest.mark.skipif(not build.keeps_memory(*platform.libc_ver()), reason="settings of glibc 2.35")
def test_a_kernel_keeps_what_it_frees_and_ends_at_once(repo):
    source = write_notebook(
        repo / "notebooks" / "03_third.ipynb", "a = 1",
        "import atexit\nfrom resource import RUSAGE_SELF, getrusage\n"
        "atexit.register(open, 'ended', 'w')\nfor _ in range(3):\n"
        "    before = getrusage(RUSAGE_SELF).ru_minflt\n    text = b'x' * 2**26\n    del text\n"
        "    faults = getrusage(RUSAGE_SELF).ru_minflt - before",
        "assert faults < 1000, faults  # of 16384 pages")
    build.execute(source, repo / "out" / source.name, parameters={})
    assert not (repo / "notebooks" / "ended").exists()


def test_pages_are_cleaned():
    cell = nbformat.v4.new_code_cell("x", metadata={"papermill": {"duration": 1}, "tags": ["a"]})
    new = nbformat.v4.new_output
    cell.outputs = [
        new("stream", name="stderr", text="10%|# | 1/9"),
        new("stream", name="stdout", text="a\r\nb\rc\n/home/me/repo/x /home/me/other\n"),
        new("display_data", data={clean.WIDGET: {"model_id": "1"}, "text/plain": "bar"}),
        new("display_data", data={"text/markdown": " ", "text/plain": "<Markdown object>"}),
        new("execute_result", data={"text/html": "<a>/home/me/repo</a>", "image/png": "aGk="})]
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"papermill": {"x": "/home"}})
    page = clean.clean_page(notebook, {"/home/me/repo": ".", "/home/me": "~"})
    assert [o.output_type for o in page.cells[0].outputs] == ["stream", "execute_result"]
    assert page.cells[0].outputs[0].text == "a\r\nc\n./x ~/other\n"
    assert page.cells[0].outputs[1].data == {"text/html": "<a>.</a>", "image/png": "aGk="}
    assert page.cells[0].metadata == {"tags": ["a"]} and not page.metadata
    assert notebook.cells[0].outputs[1].text.startswith("a\r\nb"), "the original is untouched"


def test_readme_and_book_show_what_was_measured(tmp_path):
    """Nothing in them was typed by hand or is stale: `hnerv-clip pages` would change nothing."""
    for name in ("results", "_generated"):
        shutil.copytree(ROOT / "book" / name, tmp_path / "book" / name)
    for page in (ROOT / "book").glob(pages.RESULTS):
        shutil.copy(page, tmp_path / "book")
    shutil.copy(ROOT / "README.md", tmp_path)
    pages.refresh(tmp_path)
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.md"))
    for path in made:
        assert (tmp_path / path).read_text() == (ROOT / path).read_text(), \
            f"{path} is stale: hnerv-clip pages"
    included = {Path("book") / name for page in (ROOT / "book").glob("*.md")
                for name in re.findall(r"_generated/\w+\.md", page.read_text())}
    assert included == set(made) - {Path("README.md")}
    readme = (ROOT / "README.md").read_text()
    assert readme.count("<!-- made: ") == len(pages.README_BLOCKS) and "not CLIP" in readme
    assert len(readme.splitlines()) <= 150, "details belong in the book"


def test_published_pages_are_there():
    names = re.findall(r"book/(\d\d_\w+)", (ROOT / "_toc.yml").read_text())
    assert names == [p.stem for p in build.list_notebooks(ROOT)]
    for name in names:
        page = (ROOT / "book" / f"{name}.ipynb").read_text()
        published = "code" in [cell["cell_type"] for cell in json.loads(page)["cells"]]
        assert published or page == pages.placeholder(name)
        assert published or not name.startswith("04")
        assert "papermill" not in json.loads(page)["metadata"]


def test_an_answer_is_a_whole_sentence(tmp_path):
    for answer, good in [("**Yes.** More.", True), ("**Yes** (bunny).", False), ("Yes.", False)]:
        output = nbformat.v4.new_output("display_data", {"text/markdown": answer})
        page = nbformat.v4.new_notebook(cells=[
            nbformat.v4.new_markdown_cell("# Is it?"),
            nbformat.v4.new_code_cell("", outputs=[output])])
        nbformat.write(page, tmp_path / "11_ask.ipynb")
        with contextlib.nullcontext() if good else pytest.raises(ValueError, match="full stop"):
            assert pages.answers_markdown(tmp_path) == "- **[Is it?](book/11_ask.ipynb)** Yes.\n"


def test_readme_blocks_are_filled_and_missed():
    text = "a <!-- made: x -->\nold\n<!-- end: x --> b"
    assert pages.fill_blocks(text, {"x": "new\n"}) == "a <!-- made: x -->\nnew\n<!-- end: x --> b"
    with pytest.raises(ValueError, match="lacks <!-- made: y -->"):
        pages.fill_blocks(text, {"y": "new"})


def test_results_are_collected_from_run_folders(trained_run, tmp_path):
    """`fidelity.json` keeps its reference, `quick.json` needs a book that was made whole."""
    run = RunDir(shutil.copytree(trained_run, tmp_path / "main"))
    shutil.copy(ROOT / "book" / "results" / "fidelity.json", tmp_path)
    before = json.loads((tmp_path / "fidelity.json").read_text())
    for _ in range(2):  # the second time in its own place
        pages.collect_fidelity(tmp_path, [run.path])
    measured = json.loads((tmp_path / "fidelity.json").read_text())
    summary = run.summary()
    assert measured["reference"] == before["reference"]
    assert measured["runs"][:-1] == before["runs"]
    own = measured["runs"][-1]
    assert own["psnr_db"] == summary["eval_psnr_all"]
    assert own["curve"][-1] == [4, pytest.approx(summary["eval_psnr_all"], abs=1)]
    assert own["precision"] == "fp32" and own["engine"] == "plain"
    assert own["device"] == run.provenance()["device"]

    with pytest.raises(RunError, match="execute the whole book"):
        pages.collect_quick(tmp_path, tmp_path)
    (tmp_path / "book.json").write_text(json.dumps(
        {"wall_s": 100.0, "peak_memory_bytes": 2e9, "device": "abacus", "commit": "c" * 40,
         "dirty": False}))
    pages.collect_quick(tmp_path, tmp_path)
    text = pages.quick_markdown(json.loads((tmp_path / "quick.json").read_text()))
    assert "took 100 s and 2.0 GB" in text and "abacus" in text and "tests" not in text
    timed = json.loads((tmp_path / "quick.json").read_text()) | {
        "tests": {"seconds": 200, "commit": "d" * 40, "dirty": False}}
    assert "the tests 200 s (commit dddddddddddd) on abacus" in pages.quick_markdown(timed)
    (tmp_path / "quick.json").write_text(json.dumps(timed))
    pages.collect_quick(tmp_path, tmp_path)  # keeps what another command measured
    assert json.loads((tmp_path / "quick.json").read_text())["tests"] == timed["tests"]
    assert f"{summary['eval_psnr_val_interpolated']:.2f} dB" in text


def test_the_comparison_says_what_was_measured():
    """Its figures are those of the files, and a question that turned out otherwise is said so."""
    facts = compare.read_facts(ROOT / "book" / "results")
    rows = {row[""]: row for row in compare.comparison_rows(facts)}
    assert rows["PSNR, pixels only, all frames trained on (dB)"]["HNeRV"] == "35.57"
    assert rows["300 epochs, whole run (s)"]["HNeRV"] == "658, no head"
    assert rows["playing a stored file (frames/s)"]["this project"] == \
        "**1494, no embeddings (a file of 0.8 MB)**"
    assert "played in fp16, in which 4 frames differ by at most 1 of 255 levels" in \
        compare.comparison(ROOT / "book" / "results")
    assert "playing a stored file (frames/s)" not in {
        row[""] for row in compare.comparison_rows(facts._replace(files=[]))}
    assert compare.setting_words(facts).endswith(
        "values (1.58 with the head), 300 epochs (preset best: 600)")
    assert compare.setting_words(facts._replace(best_epochs=300)).endswith("head), 300 epochs")
    assert "better: 0.951 against 0.728" in rows[
        "embeddings against the teacher on the decoded frame"]["this project"]
    for high, word in ((0.1, "no better"), (-0.1, "worse")):  # of the interval of net wins
        answers = facts.judged.answers.assign(answer="no", high=high)
        none = facts._replace(judged=facts.judged._replace(answers=answers))
        _, said = compare.claim_words(none)
        assert f"{word} than that model run on the decoded frame" in said
        assert "but" not in said
        row, = (row for row in compare.comparison_rows(none) if "nearest" in row[""])
        assert f"{word}: 0.951 against 0.963" in row["this project"]


def test_the_comparison_shows_a_measurement_once_and_none_of_another_video_beside_its_own():
    """The original script's head is this project's, and its PSNR is of a video of its own."""
    facts = compare.read_facts(ROOT / "book" / "results")
    rows = {row[""]: row for row in compare.comparison_rows(facts)}
    shared = rows["skill at the supervised positions"]
    number = f"{facts.original['eight']:.2f}"
    assert number in shared[compare.PROPOSAL] and number not in shared["this project"]
    assert rows["PSNR with the head, held-out frames (dB)"][compare.PROPOSAL] is None
    assert "another video" in rows["peak GPU memory of a whole run, with head"][compare.PROPOSAL]


def test_the_comparison_defines_its_terms_before_it_uses_them():
    text = compare.comparison(ROOT / "book" / "results")
    terms = text.partition("\n|")[0]
    assert all(f"**{term}**" in terms for term in ("head", "field")) and "**Skill**" in terms


def test_the_page_to_explore_is_made_of_the_run_that_is_named(repo):
    write_notebook(repo / "notebooks" / "07_explore.ipynb", FIRST, "print(outf)")
    page = nbformat.read(build.execute_explored(repo, "output/film/main", say=str), as_version=4)
    shown = [output.text for cell in page.cells for output in cell.get("outputs", [])]
    assert shown == ["output/film/main\n"]


def test_the_headline_comes_from_the_run(trained_run):
    import pandas as pd

    run = RunDir(trained_run)
    text = pages.headline(run)
    table = pd.read_csv(run.path / "evaluation.csv")
    seen = table[(table.variant == "trained") & (table.split == "train")]
    assert f"| {seen.psnr_db.mean():.2f} |" in text and "not CLIP" in text
    assert "nan" not in text


def run_page(*sources):
    """An executed page as the notebooks of runs make it, with an answer at its end."""
    code, output = nbformat.v4.new_code_cell, nbformat.v4.new_output
    cells = [nbformat.v4.new_markdown_cell("# Title?\n\nThe introduction."), *map(code, sources),
             nbformat.v4.new_markdown_cell("## Answer"), code("display(Markdown(x))")]
    cells[-1].outputs = [output("display_data", data={"text/markdown": "**Yes**, 3 dB."}),
                         output("display_data", data={"text/markdown": "And more."})]
    return nbformat.v4.new_notebook(cells=cells)


def test_a_page_of_a_run_answers_first():
    page = clean.clean_page(run_page("import os", "a = 1"), {})
    assert [cell.source for cell in page.cells[:3]] == [
        "# Title?", "**Yes**, 3 dB. And more.", "The introduction."]
    folded = [cell.metadata.get("tags") for cell in page.cells if cell.cell_type == "code"]
    assert folded == [["hide-input"], None, ["hide-input"]]
    assert clean.clean_page(page, {}) == page, "a clean page stays as it is"

    without = run_page()
    without.cells[-1].outputs = []
    said = [nbformat.v4.new_output("display_data", data={"text/markdown": text})
            for text in ("12 bytes.", "**Teacher: T.**")]
    without.cells[0:1] += [nbformat.v4.new_code_cell("x", outputs=[output]) for output in said]
    assert clean.clean_page(without, {}).cells[1].source == "12 bytes. **Teacher: T.**"


def test_large_pictures_and_long_tables_become_small():
    import base64
    import io

    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0).integers(100, 130, (300, 400, 3), np.uint8)
    packed = io.BytesIO()
    Image.fromarray(noise).save(packed, "PNG")
    rows = "<table class=\"dataframe\">" + "<tr></tr>" * 12
    outputs = [{"image/png": base64.b64encode(packed.getvalue()).decode()}, {"text/html": rows},
               {"text/html": rows.replace("<tr></tr>", "", 5)}]
    cell = nbformat.v4.new_code_cell("x", outputs=[
        nbformat.v4.new_output("display_data", data=data) for data in outputs])
    page = clean.clean_page(nbformat.v4.new_notebook(cells=[cell]), {})
    picture, long, short = (output.data for output in page.cells[0].outputs)
    assert set(picture) == {"image/jpeg"}
    assert len(picture["image/jpeg"]) < 0.5 * len(outputs[0]["image/png"])
    assert Image.open(io.BytesIO(base64.b64decode(picture["image/jpeg"]))).size == (400, 300)
    assert long["text/html"].startswith("<details><summary>Table of 11 rows")
    assert short["text/html"].startswith("<table")


def test_tables_have_no_numbers_of_rows_and_zero_has_no_sign():
    values = ["-0.00", "-0.01", "[-0.004, -0.000]"]
    frames = [pd.DataFrame({"gain": values}), pd.DataFrame({"gain": values}, index=[""] * 3),
              pd.DataFrame({"value": ["1", None, "2"]}, index=["seed", "dirty", "size"]),
              pd.DataFrame({"gain": values}, index=[3, 4, 5]),
              pd.DataFrame({"row": range(12), "b": "x"})]
    outputs = [nbformat.v4.new_output("display_data", data={"text/html": frame.to_html()})
               for frame in frames] + [nbformat.v4.new_output("stream", text="-0.0000, x-0.0\n")]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", outputs=outputs)])
    page = clean.clean_page(notebook, {})
    counted, unnamed, named, numbered, folded, printed = page.cells[0].outputs
    heads = [re.findall(r"<th>([^<]*)</th>", one.data["text/html"])
             for one in (counted, unnamed, named, numbered, folded)]
    assert heads == [["gain"], ["gain"], ["", "value", "seed", "size"], ["", "gain", "3", "4", "5"],
                     ["row", "b"]]
    assert re.findall(r"<td>(\d+)</td>", folded.data["text/html"]) == [str(i) for i in range(12)]
    assert "0.00</td>" in counted.data["text/html"] and "-0.00<" not in counted.data["text/html"]
    assert "[-0.004, 0.000]" in unnamed.data["text/html"]
    assert printed.text == " 0.0000, x-0.0\n"  # columns stay
    assert clean.clean_page(page, {}) == page


def test_code_that_a_reader_skips_is_folded_and_repeated_lines_are_counted():
    said = [nbformat.v4.new_output("stream", text=text) for text in (
        "trained\n", "trained\n", "trained\n", "done\n")]
    cells = [nbformat.v4.new_code_cell(source) for source in (
        "import torch\n\nfigures.use_style('webp')", "labels.in_words(table, 'n')", "run = train()",
        "figures.use_style()\nfigures.plot(run)")]
    cells[2].outputs = said
    cells.append(nbformat.v4.new_code_cell("outf = 1  # folder", metadata={"tags": ["parameters"]}))
    page = clean.clean_page(nbformat.v4.new_notebook(cells=cells), {})
    assert ["hide-input" in cell.metadata.get("tags", []) for cell in page.cells] == [
        True, True, False, False, True]
    assert [output.text for output in page.cells[2].outputs] == ["trained (3 times)\n", "done\n"]


def test_committed_pages_are_clean():
    """By today's rules; `hnerv-clip pages` would change nothing. Each answers below its title."""
    for path in sorted((ROOT / "book").glob("[0-9][0-9]_*.ipynb")):
        page = nbformat.read(path, as_version=4)
        published = [c for c in page.cells if c.cell_type == "code"]
        if path.name.startswith("0") and published:
            assert clean.clean_page(page, {}) == page, f"{path.name}: hnerv-clip pages"
            assert page.cells[1].get("id") == "answer" or page.cells[1].outputs
        elif published:
            assert clean.clean_page(page, {}).cells == page.cells, path.name
        assert path.stat().st_size < build.PAGE_LIMIT_BYTES


def test_a_page_knows_its_age(tmp_path):
    """A notice where the notebook's code differs from the page's, and none where it does not."""
    page_facts = load_extension("page_facts")
    notebook = tmp_path / "01_x.ipynb"
    nbformat.write(run_page("a = 1"), notebook)
    facts = {"commit": "0" * 40, "dirty": False, "at": "now", "seconds": 1, "device": "d",
             "torch": "2"}
    for source, words in (("a = 1", ""), ("a = 2", "the notebook's code changed")):
        page = run_page(source)
        page.metadata["hnerv_clip"] = facts
        page.cells.insert(1, nbformat.v4.new_code_cell("a = 3", metadata={
            "tags": ["injected-parameters"]}))
        nbformat.write(clean.clean_page(page, {}), tmp_path / "page.ipynb")
        said = page_facts.changed_since(tmp_path / "page.ipynb", notebook, str(tmp_path))
        assert words in said and bool(said) == bool(words)


def test_a_page_is_aged_only_by_what_its_notebook_uses(tmp_path):
    """Commits to `hnerv_clip/book` or `/cli` alone count where the notebook imports that module, or
    one that it imports."""
    page_facts = load_extension("page_facts")

    def commit(name, code=""):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n{code}")
        for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b",
                                                     "commit", "-qm", name]):
            subprocess.run(["git", "-C", tmp_path, *words], check=True)

    commit("hnerv_clip/train.py")
    facts = {"commit": page_facts.git(str(tmp_path), "rev-parse", "HEAD"), "dirty": False,
             "at": "now", "seconds": 1, "device": "d", "torch": "2"}
    page_facts.git.cache_clear()
    for name, code in (("book/judged.py", "from hnerv_clip.book.results import read\n"),
                       ("book/results.py", ""), ("book/film.py", ""), ("cli/run.py", ""),
                       ("train2.py", "")):
        commit(f"hnerv_clip/{name}", code)
    for source, count in (("import torch", "1 commit."),
                          ("from hnerv_clip.book.results import a", "2 commits."),
                          ("from hnerv_clip.book import judged", "3 commits.")):
        page, notebook = run_page(source), tmp_path / "04_x.ipynb"
        nbformat.write(page, notebook)
        page.metadata["hnerv_clip"] = facts
        nbformat.write(clean.clean_page(page, {}), tmp_path / "page.ipynb")
        said = page_facts.changed_since(tmp_path / "page.ipynb", notebook, str(tmp_path))
        assert said.endswith(f"the library changed in {count}"), said
    (tmp_path / "hnerv_clip/train2.py").unlink()
    commit("restored")
    page_facts.git.cache_clear()
    nbformat.write(page := run_page("import torch"), tmp_path / "04_x.ipynb")
    page.metadata["hnerv_clip"] = facts
    nbformat.write(clean.clean_page(page, {}), tmp_path / "page.ipynb")
    assert page_facts.changed_since(tmp_path / "page.ipynb", notebook, str(tmp_path)) == ""


def test_figures_with_pictures_have_dark_paper_and_the_same_pictures(tmp_path):
    import numpy as np
    from matplotlib import pyplot as plt

    dark = load_extension("dark_pictures")
    picture = np.random.default_rng(0).integers(0, 200, (40, 60, 3), np.uint8)
    figure = np.full((100, 120, 3), 255, np.uint8)
    figure[20:60, 30:90] = picture
    figure[70:74, 30:60] = 0  # a line of text
    figure[60, 30:90] = 250  # JPEG's ripples at its edge
    figure[60, 40] = 230
    shown = dark.darken_raster(figure)
    assert (shown[20:60, 30:90] == picture).all()
    assert shown[0, 0].max() < 30 and shown[72, 40].min() > 220 and shown[60, 30:90].max() < 60

    drawn, axes = plt.subplots(figsize=(2, 2))
    axes.imshow(picture)
    axes.set_title("Title", color="#404040")
    axes.plot([0, 50], [0, 30], color="#E69F00")
    drawn.savefig(tmp_path / "a.svg")
    plt.close(drawn)
    text = (tmp_path / "a.svg").read_text()
    made = dark.darken_svg(text)
    images = [re.findall(r"<image[^>]*>", svg) for svg in (text, made)]
    assert images[0] and images[0] == images[1]
    assert "#404040" not in made and "fill: #ffffff" not in made and "fill: #121212" in made
    assert "stroke: #e69f00" in made, "colors mean the same on dark paper"


def test_launch_buttons_wait_for_the_repository():
    from types import SimpleNamespace

    facts = load_extension("page_facts")
    for url, offered in (("", False), ("https://github.com/a/b", True)):
        config = SimpleNamespace(html_theme_options={"repository_url": url, "launch_buttons": {
            "binderhub_url": "", "thebe": True}})
        facts.offer_launch(None, config)
        buttons = config.html_theme_options["launch_buttons"]
        assert bool(buttons["binderhub_url"]) == offered == ("colab_url" in buttons)


def test_films_of_a_page_become_files(tmp_path):
    from types import SimpleNamespace

    body = ('<video controls width="9"> <source src="data:video/mp4;base64,aGk=" type="video/mp4">'
            '</video><video src="data:video/mp4;base64,aGk="></video>')
    app = SimpleNamespace(outdir=tmp_path)
    made = load_extension("page_facts").films_as_files(app, "book/06_search", body)
    name, = {path.name for path in (tmp_path / "_static" / "films").iterdir()}
    assert made.count(f'src="../_static/films/{name}"') == 2 == made.count('preload="metadata"')
    assert (tmp_path / "_static" / "films" / name).read_bytes() == b"hi"


def load_extension(name):
    """A module of `book/_ext`, which only Sphinx imports."""
    import importlib.util

    spec = importlib.util.spec_from_file_location(name, ROOT / "book" / "_ext" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_reads_lists_line_by_line_and_leaves_out_nameless_fields():
    from hnerv_clip.config import Split

    facts = load_extension("page_facts")
    lines = ["Each run folder holds", "", "    job.json     which", "    out_.json    how it ended"]
    facts.plain_docstring(None, "module", "m", None, None, lines)
    assert lines[2:] == ["    | job.json     which", "    | out\\_.json    how it ended"]
    assert facts.short_signature(None, "class", "C", None, None, "(a: ~x.A = <factory>)", None) == (
        "(a: ~x.A = ...)", None)
    assert facts.skip_nameless(None, "class", "train", Split.train, False, None)
    assert not facts.skip_nameless(None, "class", "params", Config.params, False, None)


def test_a_drawings_caption_becomes_text():
    """It leaves with its room; a drawing without one, or with other gray text, stays as it is."""
    captions = load_extension("captions")
    figures.use_style()
    figure, axes = figures.style.new_figure(height=2.0)
    axes.annotate("gray", (0.5, 0.5), color="#404040")
    figure.legend(handles=axes.plot([0, 1], label="line"), loc="outside upper left")
    plain = io.StringIO()
    figure.savefig(plain, format="svg")
    assert captions.split_caption(plain.getvalue()) == (plain.getvalue(), "")
    words = "What to see, and whose numbers these are. " * 8
    figures.style.caption(figure, words)
    with_caption = io.StringIO()
    figure.savefig(with_caption, format="svg")
    drawing, said = captions.split_caption(with_caption.getvalue())
    assert said.split() == words.split() and "whose numbers" not in drawing and ">gray<" in drawing
    before, after = (float(re.search(r'height="([\d.]+)pt"', text)[1])
                     for text in (with_caption.getvalue(), drawing))
    assert 30 < before - after < 60, "three lines and the gap above them"
    assert captions.split_caption(drawing) == (drawing, "")
