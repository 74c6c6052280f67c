"""Heat maps: clear for noise, one scale, and pictures that a page shows."""

import base64
import io
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from hnerv_clip.figures import heat, overlay, style
from hnerv_clip.figures.search import plot_box_hits, plot_similar

FRAME = np.full((8, 16, 3), 100, np.uint8)


def test_noise_is_clear_and_a_match_is_bright_in_one_scale():
    clear = overlay.heat_image(np.full((2, 4), overlay.TEXT_RANGE[0]), (8, 16))
    full, more = (overlay.heat_image(np.full((2, 4), value), (8, 16)) for value in (4.0, 9.0))
    assert clear.shape == (8, 16, 4) and (clear[..., 3] == 0).all()
    assert (full[..., 3] == round(255 * overlay.STRENGTH)).all()
    np.testing.assert_array_equal(full, more)
    half = overlay.heat_image(np.full((2, 4), 3.0), (8, 16))
    assert 0 < half[0, 0, 3] < full[0, 0, 3]


def test_color_over_a_frame_means_heat_alone():
    colored = np.zeros((8, 16, 3), np.uint8)
    colored[..., 1] = 255  # a meadow
    laid = overlay.lay_heat(colored, np.array([[0.0, 9.0]]))
    assert np.ptp(laid[0, 0].astype(int)) == 0  # gray where there is none
    assert np.ptp(laid[0, -1].astype(int)) > 50


def test_a_film_has_a_map_for_each_frame():
    frames, heats = np.full((2, 3, 8, 8), 100, np.uint8), np.zeros((2, 2, 2))
    heats[1, 0, 0] = 9
    found = overlay.blend_heat(frames, heats)
    assert found.shape == frames.shape and found.dtype == np.uint8
    assert len(np.unique(found[0])) == 1 and (found[1] != found[0]).any()
    with pytest.raises(ValueError, match="1 heat maps for 2 frames"):
        overlay.blend_heat(frames, heats[:1])


def test_a_picture_figure_is_transparent_webp_with_its_caption_as_text():
    evil = "<b>A</b> (not CLIP)"
    heats = {name: np.eye(2) * 3 for name in ("predicted", "teacher", "the head")}
    rows = {"hare": (FRAME, heats)}
    try:
        style.use_style("webp")
        figures = [heat.plot_heat_maps(rows, evil, boxes={"hare": (1, 1, 5, 5)}),
                   plot_similar(FRAME, (0, 0, 4, 4), [(FRAME, "frame 1")], evil)]
        pages = [figure._repr_html_() for figure in figures]
    finally:
        style.use_style()
    for page in pages:
        data = re.search(r'base64,([^"]+)"', page)[1]
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        assert image.format == "WEBP" and image.convert("RGBA").getpixel((1, 1))[3] == 0
        assert image.width > 1400  # twice the width of a page's text
        assert "&lt;b&gt;A" in page and "<b>" not in page
        assert page.count("Teacher: &lt;b&gt;A") == 2  # alternative text and caption
    drawn = heat.plot_heat_maps(rows, "A (not CLIP)")
    assert drawn._repr_html_() is None and any("not CLIP" in t.get_text() for t in drawn.texts)


def test_hits_of_a_field_are_frames_with_boxes_drawn():
    hits = pd.DataFrame({"frame": [1, 0], "x0": [2, 0], "y0": [1, 0], "x1": [6, 4], "y1": [5, 4],
                         "score": [0.75, 0.5]})
    frames = np.stack([np.moveaxis(FRAME, -1, 0)] * 2)
    figure = plot_box_hits(frames, {"hare": hits, "barn": hits[:1]}, "A (not CLIP)")
    drawn = [[(*patch.get_xy(), patch.get_width(), patch.get_height()) for patch in panel.patches]
             for panel in figure.axes]
    assert drawn == [[(2, 1, 4, 4)] * 2, [(0, 0, 4, 4)] * 2, [(2, 1, 4, 4)] * 2, []]
    assert figure.axes[0].get_title("center") == "frame 1, 0.750" and "not CLIP" in figure.caption


def test_figures_load_no_library_that_only_one_of_them_needs():
    code = ("import sys, hnerv_clip.search.maps; from hnerv_clip.figures import *; "
            "sys.exit(', '.join("
            "{'seaborn', 'scipy.stats', 'sklearn', 'matplotlib.pyplot'} & set(sys.modules)) or 0)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_map_without_a_match_goes_up_to_zero_not_to_minus_zero():
    figure = heat.plot_heat_maps({"tea": (FRAME, {"teacher": np.full((2, 4), -0.01, np.float32)})},
                                 "A (not CLIP)")
    assert [panel.get_title("left") for panel in figure.axes[:2]] == ["“tea”", "teacher\nup to 0.0"]
