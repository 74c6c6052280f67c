"""The notebooks: the rules of their form, and all of them from top to bottom."""

import ast
import re
from pathlib import Path

import nbformat
import pytest

from hnerv_clip.book import build
from hnerv_clip.config import param_names, profile_params

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = build.list_notebooks(ROOT)
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
TINY = dict(resize_list="84_168", fc_hw="1_2", frame_stride="11", frame_limit="10",
            modelsize="0.05", enc_dim="16_8", epochs="4", pixel_loss_warmup_epochs="1",
            eval_freq="2", device="cpu", ablation_epochs="2", field_boxes="4", field_steps="20")


def code_cells(path):
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]


def test_there_are_seven_in_order_and_the_results():
    assert [path.stem for path in NOTEBOOKS] == [
        "01_prepare_data", "02_train", "03_evaluate", "04_verify_clip", "05_ablations",
        "06_search_by_text", "07_explore", "10_learn_semantics", "11_measure_cost",
        "12_weigh_tradeoff", "13_compare_heads", "14_check_fidelity", "15_measure_speed",
        "16_scale_gpus", "17_judge_network", "18_weigh_bytes", "19_ask_any_region",
        "20_improve_quality"]


@every_notebook
def test_a_notebook_is_a_valid_source(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    assert not any(cell.outputs or cell.execution_count for cell in code_cells(path))
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    tags = [cell.metadata.get("tags", []) for cell in code_cells(path)]
    assert ["parameters" in names for names in tags] == [True] + [False] * (len(tags) - 1)


@every_notebook
def test_code_cells_are_short_and_define_nothing(path):
    for cell in code_cells(path):
        lines = [line for line in cell.source.splitlines() if line.strip()]
        if "parameters" not in cell.metadata.get("tags", []):
            assert len(lines) <= 12, cell.source
        tree = ast.parse(cell.source)
        assert not [node for node in ast.walk(tree)
                    if isinstance(node, (ast.FunctionDef, ast.ClassDef))], cell.source
        assert not re.search(r"""import \*|["']/\w""", cell.source), "star import or absolute path"
        imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert len(imports) <= 8, cell.source


@every_notebook
def test_each_parameter_is_a_scalar_with_a_comment(path):
    cell = code_cells(path)[0]
    for line in cell.source.splitlines():
        if line.strip() and not line.startswith("#"):
            assert re.match(r"\w+ = .+  # \S", line), line
    for name, value in build.declared_parameters(path).items():
        assert isinstance(value, (str, int, float, bool)), name


@every_notebook
def test_defaults_are_the_quick_profile(path):
    quick = profile_params("quick") | {"outf": "output/quick/main", "cache_dir": "output/cache"}
    declared = build.declared_parameters(path)
    assert {name: value for name, value in declared.items() if name in quick} == {
        name: quick[name] for name in declared if name in quick}


def test_a_run_can_be_set_up_entirely_from_its_notebook():
    declared = build.declared_parameters(build.list_notebooks(ROOT, ["02"])[0])
    assert [name for name in param_names() if name not in declared] == []


@pytest.mark.slow
def test_all_notebooks_make_a_book(tmp_path, monkeypatch, cache_dir):
    """Every notebook through papermill with tiny settings, then the book, warnings as errors."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # small tensors gain nothing from more
    committed = {p: p.read_bytes() for p in (ROOT / "book").glob("*") if p.is_file()}
    study = tmp_path / "study"
    overrides = TINY | {"outf": str(study / "main"), "cache_dir": str(cache_dir)}
    html = build.make_book(overrides=overrides)
    assert html.exists()
    for path in [path for path in NOTEBOOKS if path.stem < "10"]:
        text = (study / "site" / "book" / path.name).read_text()
        page = (html.parent / "book" / f"{path.stem}.html").read_text()
        assert str(tmp_path) not in text and str(ROOT) not in text, path.stem
        assert "not CLIP" in page, f"{path.stem} hides that its teacher is not CLIP"
        assert "commit" in page, f"{path.stem} lacks its provenance"
        assert not re.findall(r"<th>\w+_\w+</th>", text), f"{path.stem}: columns without words"
    assert "not CLIP" in (html.parent / "book" / "index.html").read_text()
    assert {p: p.read_bytes() for p in (ROOT / "book").glob("*") if p.is_file()} == committed
