"""How long somebody waits for the explorer: `python -m hnerv_clip.explore.timing PATH`.

In seconds, in a fresh process that has imported what a notebook's kernel has:

    first picture   from running the cell that imports and opens the explorer until a picture of
                    frame 0 is there: the original, or without one the decoded frame
    first frame   from then on until the original, the decoded frame and the error are there
    first text    from a text typed as soon as that frame is seen, until its hits, their boxes and
                  pictures and the heat map are there
    click, text, frame   the same of later answers, once everything is loaded

What the browser takes to draw is left out.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path


def measure(path: str | Path, texts: tuple[str, str], *, original: str = "",
            cache_dir: str | Path = "output/cache", device: str = "auto") -> dict[str, float]:
    """Seconds by name, see the module's top; the first ones count only in a fresh process.

    Args:
        texts: the first and a later one.
        path, original, cache_dir, device: as for `explore.widget.explore`.
    Raises:
        as `explore.video.open_video`.
    """
    start, seconds = time.perf_counter(), {}

    def note(name):
        nonlocal start
        seconds[name], start = time.perf_counter() - start, time.perf_counter()

    from hnerv_clip.explore.widget import explore

    explorer = explore(path, original=original, cache_dir=cache_dir, device=device)
    while explorer.progress and not (explorer.original or explorer.decoded):
        time.sleep(0.005)
    note("first picture")
    while explorer.progress and explorer.shown < 0:
        time.sleep(0.005)
    note("first frame")
    explorer.text = texts[0]
    explorer.get_ready()
    note("first text")
    height, width = explorer.video.size
    explorer.region = {"frame": explorer.shown, "x": width / 2, "y": height / 2}
    note("click")
    explorer.text = texts[1]
    note("text")
    explorer.frame = len(explorer.video) - 1
    note("frame")
    return seconds


def main(argv: list[str] | None = None) -> None:
    """Print a line for each time."""
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("path", help="a run's folder, or NAME.hnerv")
    parser.add_argument("--original", default="", help="the video that a stored one was made from")
    parser.add_argument("--texts", nargs=2, default=("hare", "barn"), help="to search for")
    parser.add_argument("--cache_dir", default="output/cache", help="embeddings of the teacher")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    args = parser.parse_args(argv)
    import IPython  # noqa: F401, PLC0415  a kernel has it

    for name, value in measure(args.path, tuple(args.texts), original=args.original,
                               cache_dir=args.cache_dir, device=args.device).items():
        print(f"{name:14} {value:6.2f} s")


if __name__ == "__main__":
    main()
