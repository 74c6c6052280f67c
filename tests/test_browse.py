"""The clickable search: a click shows the rankings that the given patch has."""

import numpy as np
import pytest
from test_search import unit_vectors

from hnerv_clip.patches import PatchGrid
from hnerv_clip.search.browse import browse_patches


def test_a_click_looks_up_the_patch_of_the_chosen_frame():
    grid = PatchGrid(frame=(16, 32), size=(16, 16), tops=(0,), lefts=(0, 8, 16))
    frames = np.zeros((6, 3, 16, 32), np.uint8)
    shown = []
    box = browse_patches(frames, grid, unit_vectors((6, 3, 8)), unit_vectors((6, 3, 8), 1),
                         "A (not CLIP)", top_k=2, show=shown.append)
    slider, _, buttons, _ = box.children
    assert [button.description for button in buttons.children] == ["0", "1", "2"]
    assert len(shown) == 1  # the first frame's patches
    slider.value = 4
    buttons.children[2].click()
    words = " ".join(text.get_text() for text in shown[-1].texts)
    assert len(shown) == 3 and "like frame 4, patch 2" in words and "A (not CLIP)" in words
    good = unit_vectors((6, 3, 8))
    with pytest.raises(ValueError, match="frame=6 must lie between 0 and 5"):
        browse_patches(frames, grid, good, good, "A", frame=6)
    with pytest.raises(ValueError, match="different teachers"):
        browse_patches(frames, grid, good, unit_vectors((6, 3, 9)), "A")
