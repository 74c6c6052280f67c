"""Execute the notebooks with papermill and render them with Jupyter Book.

A study lies in one folder, `output/<profile>`: its runs, `executed/` (notebooks as papermill left
them), `site/` (the book's sources with clean copies of those) and `html/`. The pages committed in
`book/` are touched by `publish` alone.
"""

from __future__ import annotations

import ast
import difflib
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import nbformat

from hnerv_clip.book import pages
from hnerv_clip.book.clean import clean_page
from hnerv_clip.config import Config, param_names, profile_params
from hnerv_clip.devices import select_device
from hnerv_clip.paths import find_checkout, resolve_path
from hnerv_clip.runs.provenance import code_version, device_name, package_versions
from hnerv_clip.runs.run_dir import RunDir, write_json

# Values of notebook parameters that are not settings of a run, where a profile differs from the
# defaults in the notebooks, which are the quick profile's.
STUDY_PARAMS: dict[str, dict[str, Any]] = {
    "quick": {},
    "full": {"lambdas": "0 0.1 0.2 0.5 1", "warmups": "0 50 100",
             "embeds": "pe_1.25_80 xyt_1.25_80", "ablation_epochs": 0},
}
# Parameters that say where a study runs, not what it is: with these alone it may be published.
PLACE_PARAMS = {"outf", "ablations_outf", "cache_dir", "device", "speeds", "cluster", "nodes",
                "gpus_per_node", "timeout_min", "slurm_partition", "slurm_account",
                "slurm_array_parallelism"}
# glibc maps each tensor over 32 MiB anew and gives it back: on a CPU a third of the teacher's time
# went into clearing pages. So the kernels keep up to 256 MiB that they have freed. Not before glibc
# 2.35: it ignores a first value over 32 MiB, and by the second alone maps all from 128 KiB on anew
KERNEL_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(128 * 2**20),
                 "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20)}
PAGE_LIMIT_BYTES = 5 * 2**20  # of a page that is committed


def keeps_memory(libc: str, version: str) -> bool:
    """Whether a C library, as `platform.libc_ver` names it, takes `KERNEL_MEMORY`."""
    return libc == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35)


class BookError(RuntimeError):
    """The book cannot be made; the message says where and what to do."""


def repository_root() -> Path:
    """The checkout around the current folder.

    Raises:
        BookError: there is none.
    """
    root = find_checkout()
    for name in ("_toc.yml", "_config.yml", "notebooks", "book"):
        if not (root / name).exists():
            raise BookError(f"{root} has no {name}: run hnerv-clip book inside a checkout of the "
                            "repository")
    return root


def list_notebooks(root: Path, only: Iterable[str] = ()) -> list[Path]:
    """The source notebooks in their order.

    Args:
        only: numbers (`03`) or names (`03_evaluate`); all of them where it is empty.
    Raises:
        BookError: none found, or `only` names one that is not there.
    """
    found = sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    if not found:
        raise BookError("notebooks/ holds no NN_name.ipynb")
    names = [path.stem for path in found]
    wanted = list(only)
    for name in wanted:
        if not any(_is_named(path, name) for path in found):
            raise BookError(f"--only {name} names no notebook; there are {', '.join(names)}")
    return [path for path in found if not wanted or any(_is_named(path, n) for n in wanted)]


def _is_named(notebook: Path, name: str) -> bool:
    return Path(name).stem in (notebook.stem, notebook.stem[:2])


def declared_parameters(notebook: Path) -> dict[str, Any]:
    """{name: default} of the notebook's cell that is tagged "parameters", in its order.

    Raises:
        BookError: a default is not a plain value.
    """
    cells = [cell for cell in nbformat.read(notebook, as_version=4).cells
             if "parameters" in cell.metadata.get("tags", [])]
    declared = {}
    for node in ast.parse("\n".join(cell.source for cell in cells)).body:
        if not isinstance(node, (ast.Assign, ast.AnnAssign)):
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        try:
            declared[target.id] = ast.literal_eval(node.value)
        except (AttributeError, ValueError, TypeError):
            raise BookError(f"{notebook.name}: the parameters cell holds "
                            f"{ast.unparse(node)!r}, not name = plain value") from None
    return declared


def plan_parameters(notebooks: list[Path], *, profile: str, overrides: dict[str, Any],
                    others: list[Path] = ()) -> list[dict[str, Any]]:
    """What to inject into each notebook: values that it declares and that differ from its own.

    Args:
        overrides: {name: text or value}, from the command line; they win over the profile.
        others: notebooks that are left out, to say where a parameter belongs.
    Raises:
        BookError: no notebook declares a name, or a value has the wrong type.
    """
    declared = [declared_parameters(notebook) for notebook in notebooks]
    known = list(dict.fromkeys(name for names in declared for name in names))
    for name in overrides:
        if name not in known:
            raise BookError(_unknown_parameter(name, known, others))
    outf = str(overrides.get("outf", f"output/{profile}/main"))
    video = {name: overrides[name] for name in ("data_path",) if name in overrides}
    values = profile_params(profile, **video) | STUDY_PARAMS[profile] | {
        "outf": outf, "ablations_outf": str(Path(outf).with_name("ablations"))}
    injected = []
    for names in declared:
        wanted = {name: values[name] for name in names if name in values}
        wanted |= {name: _typed(name, overrides[name], default)
                   for name, default in names.items() if name in overrides}
        injected.append({n: v for n, v in wanted.items() if v != names[n]})
    return injected


def run_config(*, profile: str, overrides: dict[str, Any]) -> Config:
    """The settings of the study's main run."""
    own = {name: value for name, value in overrides.items() if name in param_names()}
    return Config.from_params(**profile_params(profile, **own))


def _unknown_parameter(name: str, known: list[str], others: list[Path]) -> str:
    for notebook in others:
        if name in declared_parameters(notebook):
            return f"parameter {name!r} belongs to {notebook.stem}, which --only leaves out"
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown parameter {name!r}.{hint} Known ones: {', '.join(known)}"


def _typed(name: str, value: Any, default: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        if isinstance(default, str):
            return value
        if isinstance(default, bool):
            return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
        if isinstance(default, int):
            return int(value)
        if isinstance(default, float):
            return float(value)
        parsed = ast.literal_eval(value)
        if default is None or isinstance(parsed, type(default)):
            return parsed
    except (KeyError, ValueError, SyntaxError):
        pass
    raise BookError(f"{name}={value!r} is of another kind than the default {default!r}; give one "
                    "of its kind")


def execute(notebook: Path, target: Path, *, parameters: dict[str, Any]) -> float:
    """Run a notebook from top to bottom in its own folder and keep the executed copy.

    Args:
        target: where the executed copy goes; a partly executed one goes to `NAME.failed.ipynb`.
    Returns:
        seconds taken.
    Raises:
        BookError: a cell failed or the kernel died; the message says which and why.
    """
    import papermill  # imported here, as papermill takes a second
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")  # this environment's kernel
    if keeps_memory(*platform.libc_ver()):
        for name, value in KERNEL_MEMORY.items():
            os.environ.setdefault(name, value)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    partial = target.with_suffix(".failed.ipynb")
    started, at = time.perf_counter(), time.strftime("%Y-%m-%d %H:%M:%S %z")
    commit, dirty = code_version()
    try:
        papermill.execute_notebook(
            notebook, partial, parameters=parameters or None, kernel_name="python3",
            cwd=notebook.parent, progress_bar=False,
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],  # it warns of its own transport
            shutdown_kernel="immediate",  # all is written; an interpreter's own end takes a second
            # progress bars of the cells, live; a log would only be spammed
            stderr_file=sys.stderr if sys.stderr.isatty() else None)
    except PapermillExecutionError as error:
        lines = (error.source or "").strip().splitlines() or [""]
        raise BookError(
            f"{notebook.stem} stopped in cell [{error.exec_count}] ({lines[0][:70]}):\n"
            f"  {error.ename}: {error.evalue}\n"
            f"The partly executed copy with the traceback is {_shown(partial)}") from error
    except DeadKernelError as error:
        raise BookError(f"{notebook.stem}: its kernel died, as it does when memory runs out; the "
                        f"partly executed copy is {_shown(partial)}") from error
    seconds = time.perf_counter() - started
    executed = nbformat.read(partial, as_version=4)
    executed.metadata["hnerv_clip"] = {
        "commit": commit, "dirty": dirty, "at": at, "seconds": round(seconds, 1),
        "device": device_name(select_device(parameters.get("device", "auto"))),
        "torch": package_versions()["torch"]}
    nbformat.write(executed, partial)
    partial.replace(target)
    return seconds


def _cost(wall_s: float) -> dict[str, Any]:
    """Time and memory of a whole book, from the first notebook to the last page."""
    commit, dirty = code_version()
    unit = 1 if sys.platform == "darwin" else 1024
    largest = max(resource.getrusage(who).ru_maxrss
                  for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {"wall_s": round(wall_s, 1), "peak_memory_bytes": largest * unit,
            "device": device_name(select_device("auto")), "commit": commit, "dirty": dirty}


def _shown(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def find_pages(root: Path, study: Path, *, committed: str = pages.RESULTS
               ) -> dict[str, Path | None]:
    """The notebook behind each page of the book: executed, else committed, else None.

    Args:
        committed: pattern of the notebooks whose committed pages may be used.
    """
    found: dict[str, Path | None] = {}
    for name in re.findall(r"book/(\d\d_\w+)", (root / "_toc.yml").read_text(encoding="utf-8")):
        executed, page = study / "executed" / f"{name}.ipynb", root / "book" / f"{name}.ipynb"
        found[name] = (executed if executed.exists() else
                       page if page.match(committed) and page.exists() else None)
    return found


def stage(root: Path, study: Path, sources: dict[str, Path | None], *, config: Config,
          run_dir: Path, cache_dir: str | Path = "output/cache", reduced: bool = False) -> Path:
    """Lay out the book's sources in `study/site`: static pages, executed pages, figures.

    Args:
        sources: of `find_pages`; a page without one says how it is made.
        reduced: pages of the study say that their setting is a reduced one.
    Returns:
        the site's folder.
    """
    site = study / "site"
    shutil.rmtree(site, ignore_errors=True)
    shutil.copytree(root / "book", site / "book", ignore=shutil.ignore_patterns(
        "[0-9][0-9]_*", "__pycache__", ".ipynb_checkpoints", "_build"))
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy(root / name, site / name)
    folders = _folder_names(root, study)
    for name, source in sources.items():
        target = site / "book" / f"{name}.ipynb"
        if source is None:
            target.write_text(pages.placeholder(name), encoding="utf-8")
        elif source.parent == root / "book":
            shutil.copy(source, target)
        else:
            nbformat.write(clean_page(nbformat.read(source, as_version=4), folders), target)
    pages.write_generated(site / "book", config=config, run_dir=run_dir, cache_dir=cache_dir,
                          moving=not reduced)
    if reduced:
        (site / "book" / "_generated" / "reduced.md").write_text(reduced_note(config),
                                                                 encoding="utf-8")
    return site


def reduced_note(config: Config) -> str:
    """The notice on the pages of a book of the quick profile."""
    size = "×".join(map(str, config.video.resize_list or config.video.crop_list or ()))
    stride = config.video.frame_stride
    return (f"Reduced setting: pages 1 to 7 and the film were made with the quick profile: "
            f"{size or 'whole'} frames" + (f", one in {stride}" if stride > 1 else "")
            + f", {config.model.modelsize:g} million values and {config.train.epochs} epochs. "
            "Their quality is lower than in the full setting, and comparisons between settings can "
            "come out differently, since the network is small and trained for a short time. All "
            "other pages are of full runs.\n")


def _folder_names(root: Path, study: Path) -> dict[str, str]:
    """Replacements for this machine's folders on pages, the longest first."""
    folders = {str(root): ".", str(study): study.name, sys.prefix: "(environment)",
               str(Path.home()): "~"}
    return {k: v for k, v in sorted(folders.items(), key=lambda kv: -len(kv[0])) if k != "/"}


def execute_results(root: Path, only: Iterable[str] = (), *,
                    say: Callable[[str], Any] = print) -> list[Path]:
    """Execute the notebooks over `book/results` and put their pages into `book/`.

    These pages contain no time or machine, so that they change only with the results, whose
    origin is in their last table.

    Args:
        only: numbers or names of some of them.
    Raises:
        BookError: a notebook failed, as with results that are missing.
    """
    pages_made = []
    for notebook in list_notebooks(root, only):
        if not notebook.match(pages.RESULTS):
            continue
        target = root / "book" / notebook.name
        executed = root / "output" / "results" / notebook.name
        seconds = execute(notebook, executed, parameters={})
        page = nbformat.read(executed, as_version=4)
        page.metadata.pop("hnerv_clip")
        page = clean_page(page, _folder_names(root, root / "output"))
        page.metadata.pop("language_info", None)
        nbformat.write(page, target)
        say(f"{target.relative_to(root)}  {seconds:.0f} s")
        pages_made.append(target)
    return pages_made


def execute_explored(root: Path, run_dir: str, *, say: Callable[[str], Any] = print) -> Path:
    """Execute notebook 07 over a run of any setting, which the page names, and put it into `book/`.

    Args:
        run_dir: relative to the repository root, as the page shows it.
    Raises:
        BookError: the notebook failed.
    """
    notebook, = list_notebooks(root, ["07"])
    executed = root / "output" / "explored" / notebook.name
    seconds = execute(notebook, executed, parameters={"outf": run_dir})
    page = clean_page(nbformat.read(executed, as_version=4), _folder_names(root, root / "output"))
    nbformat.write(page, root / "book" / notebook.name)
    say(f"book/{notebook.name}  {seconds:.0f} s")
    return root / "book" / notebook.name


def clean_published(root: Path) -> None:
    """Clean the committed pages of runs (01 to 09) by today's rules; their content stays."""
    for path in sorted((root / "book").glob("0[0-9]_*.ipynb")):
        page = clean_page(nbformat.read(path, as_version=4), {})
        text = nbformat.writes(page) + "\n"
        if json.loads(text) != json.loads(path.read_text(encoding="utf-8")):
            path.write_text(text, encoding="utf-8")


def render(site: Path, html: Path) -> None:
    """Build `site` with Jupyter Book, warnings as errors, and put the pages into `html`.

    Raises:
        BookError: Sphinx warned or failed; the message holds what it said.
    """
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build",
               str(site), "--path-output", str(site), "-W", "-n", "--keep-going"]
    done = subprocess.run(command, capture_output=True, text=True)
    log = site.parent / "book.log"
    log.write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode:
        lines = re.sub("\033\\[[0-9;]*m", "", done.stdout + done.stderr).splitlines()
        said = [line for line in lines if re.search("WARNING|ERROR|rror:", line)] or lines[-5:]
        raise BookError("Jupyter Book warned or failed:\n  " + "\n  ".join(said[:20])
                        + f"\nThe whole log is {_shown(log)}")
    shutil.rmtree(html, ignore_errors=True)
    shutil.move(site / "_build" / "html", html)


def publish(root: Path, site: Path) -> list[Path]:
    """Copy a site's pages and generated parts into `book/`, in place of what is there.

    Raises:
        BookError: a page is too large to commit.
    """
    executed = sorted((site / "book").glob("[0-9][0-9]_*.ipynb"))
    for page in executed:
        if page.stat().st_size > PAGE_LIMIT_BYTES:
            raise BookError(f"{page.name} has {page.stat().st_size / 2**20:.1f} MiB, more than the "
                            f"{PAGE_LIMIT_BYTES / 2**20:.0f} MiB that a committed page may have: "
                            "show smaller pictures; nothing was published")
    for page in executed:
        shutil.copy(page, root / "book" / page.name)
    for name in ("_generated", "_static"):
        shutil.copytree(site / "book" / name, root / "book" / name, dirs_exist_ok=True)
    return [root / "book" / page.name for page in executed]


def make_book(profile: str = "quick", *, overrides: dict[str, Any] | None = None,
              only: Iterable[str] = (), execute_notebooks: bool = True, render_html: bool = True,
              publish_pages: bool | None = None, say: Callable[[str], Any] = print) -> Path:
    """Execute the notebooks, build the book, and for `full` publish its pages.

    Finished runs are reused, so a second call costs little. Pages of results are those in `book/`,
    which `execute_results` makes, unless `only` names their notebooks.

    Args:
        overrides: notebook parameters, by name; `outf` moves the study to the folder around it.
        only: numbers or names of the notebooks to execute; the other pages stay as they are.
        execute_notebooks: False takes the executed copies that are there, such as those of another
            machine.
        render_html: False builds no HTML, for a machine without Jupyter Book.
        publish_pages: True publishes the executed pages, and the committed ones stay in place of
            the others; None publishes a whole `full` study that is the profile's own, overridden
            in `PLACE_PARAMS` at most.
    Returns:
        the book's first page; without HTML, the folder of what was made.
    Raises:
        BookError, ConfigError, RunError: before any work where the request is wrong; BookError
            where it stopped later.
    """
    from hnerv_clip.train import check_run  # imported here, as torch takes seconds

    root = repository_root()
    overrides, only = dict(overrides or {}), list(only)
    notebooks = [path for path in list_notebooks(root, only)
                 if only or not path.match(pages.RESULTS)]  # those are the same in every study
    others = [path for path in list_notebooks(root) if path not in notebooks]
    injected = plan_parameters(notebooks, profile=profile, overrides=overrides, others=others)
    config = run_config(profile=profile, overrides=overrides)
    run_dir = resolve_path(overrides.get("outf", f"output/{profile}/main"))
    study = run_dir.parent
    if study == root or root.is_relative_to(study):
        raise BookError(f"outf={overrides['outf']!r} would put the book's pages into the "
                        "repository itself; use a folder of its own, such as output/mine/main")
    if publish_pages and profile != "full":
        raise BookError(f"only --profile full is published; a {profile} book stays in "
                        f"output/{profile}/html")
    whole = execute_notebooks and not only
    if whole:
        check_run(config)
        if (run_dir / "config.json").exists():
            RunDir.create(run_dir, config)  # refuses a run of other settings before any work
        shutil.rmtree(study / "executed", ignore_errors=True)
    fresh = whole and not RunDir(run_dir).finished
    started = time.perf_counter()
    for i, (notebook, parameters) in enumerate(zip(notebooks, injected)):
        if not execute_notebooks:
            break
        changed = ", ".join(f"{name}={value!r}" for name, value in parameters.items())
        say(f"[{i + 1}/{len(notebooks)}] {notebook.stem}" + (f"  ({changed})" if changed else ""))
        seconds = execute(notebook, study / "executed" / notebook.name, parameters=parameters)
        say(f"      {seconds:.0f} s")
    if (run_dir / "config.json").exists():
        config = RunDir(run_dir).config()
    if publish_pages and not RunDir(run_dir).finished:
        raise BookError(f"not published: {_shown(run_dir)} holds no finished run, from which the "
                        "landing page's film and table are made")
    sources = find_pages(root, study,
                         committed="[0-9][0-9]_*" if publish_pages else pages.RESULTS)
    missing = [name for name, source in sources.items() if source is None]
    if publish_pages is None:
        publish_pages = profile == "full" and set(overrides) <= PLACE_PARAMS and not missing
    if publish_pages and missing:
        raise BookError(f"not published: {', '.join(missing)} were not executed")
    made = study / "executed"
    if render_html or publish_pages:
        made = stage(root, study, sources, config=config, run_dir=run_dir,
                     cache_dir=overrides.get("cache_dir", "output/cache"),
                     reduced=profile == "quick")
    if render_html:
        say("rendering the book")
        render(made, study / "html")
        made = study / "html" / "index.html"
        if fresh:
            write_json(study / "book.json", _cost(time.perf_counter() - started))
    if publish_pages:
        publish(root, study / "site")
        say("published the executed pages in book/")
    say(f"{_shown(made)}  ({time.perf_counter() - started:.0f} s in all)")
    return made
