"""Look into a video by hand: pictures, searches, heat maps and similar regions, in JupyterLab."""
