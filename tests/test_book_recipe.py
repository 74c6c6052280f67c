"""Results of the recipe's search: gains are over their own base, and time is of whole runs."""

import json

import pytest

from hnerv_clip.book import recipe as book
from hnerv_clip.book.results import ResultsError


def row(change, psnr_db, *, lr=2e-3, epochs=300, total_s=50):
    return {"change": change, "psnr_db": psnr_db, "lr": lr, "epochs": epochs, "total_s": total_s}


@pytest.fixture
def folder(tmp_path):
    rows = [row("paper", 35.0, lr=1e-3), row(book.BASE, 36.0), row("L1 loss", 35.5),
            row("batch 1", 36.5, total_s=70), row(book.BEST, 37.0, epochs=600, total_s=100)]
    (tmp_path / book.GPU).write_text(json.dumps({"about": {}, "rows": rows, "goals": [],
                                                 "published": []}))
    rows = [{"group": group, "change": change, "psnr_db": psnr, "base": change == "none"}
            for group, change, psnr in (("a", "none", 20.0), ("a", "x", 21.0), ("b", "none", 25.0),
                                        ("b", "x", 24.0))]
    (tmp_path / book.CPU).write_text(json.dumps({"about": {}, "rows": rows}))
    return tmp_path


def test_gains_are_over_the_base_at_equal_epochs(folder):
    changes = book.changes(book.read_recipe(folder)["rows"])
    assert dict(zip(changes.change, changes.gain_db)) == {
        "batch 1": 0.5, book.BASE: 0.0, "L1 loss": -0.5}
    assert book.read_ranking(folder)["rows"].gain_db.tolist() == [0, 1, 0, -1]


def test_what_is_reached_counts_the_whole_run(folder):
    rows = book.read_recipe(folder)["rows"]
    assert book.reached(rows, seconds=10) is None
    assert [book.reached(rows, seconds=limit) for limit in (60, 80, 180)] == [36.0, 36.5, 37.0]
    assert book.one(rows, book.BEST).epochs == 600


def test_missing_results_are_named(tmp_path):
    with pytest.raises(ResultsError, match="recipe_h100.json does not exist"):
        book.read_recipe(tmp_path)
