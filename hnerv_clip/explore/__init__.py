"""Look into a video by hand: pictures, searches, heat maps and similar regions, in JupyterLab."""

SIDE = 0.42  # of the square that a click asks a field about, in frame heights
