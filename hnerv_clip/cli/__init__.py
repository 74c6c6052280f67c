"""`hnerv-clip`: thin calls of the library, with the parameters of the original command line.

`training` holds the commands that train, `runs` those on trained runs, `stored` those on a stored
video; `settings` reads ``--name value``. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator

from hnerv_clip.cli import runs, stored, training
from hnerv_clip.cli.settings import read_settings, show_settings
from hnerv_clip.config import PROFILES, Config, ConfigError
from hnerv_clip.files import explain
from hnerv_clip.paths import resolve_path


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the process's exit code, 0 where it succeeded."""
    parser = _parser()
    args, words = parser.parse_known_args(argv)
    if "queries" in args and not any(word.startswith("-") for word in words):
        args.queries, words = [*args.queries, *words], []  # texts may follow options
    if words and not args.takes_settings:
        parser.error(f"unrecognized arguments: {' '.join(words)}")
    try:
        if args.takes_settings:
            args.settings = read_settings(words)
            args.config = Config.from_params(**args.settings)
        with plain_warnings():
            args.command(args)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is saved", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `hnerv-clip settings | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, RuntimeError, OSError, MemoryError, ImportError) as error:
        message = error_message(error)
        if message is None:  # from PyTorch, where the traceback says more
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Warnings for users are printed as `warning: …`, without the line of code that they are from;
    others, such as a package's on what it will drop, as Python does."""
    python = warnings.formatwarning

    def plain(message, category, *place, **options) -> str:
        return f"warning: {message}\n" if category is UserWarning else \
            python(message, category, *place, **options)

    warnings.formatwarning = plain
    try:
        yield
    finally:
        warnings.formatwarning = python


def error_message(error: Exception) -> str | None:
    """What is printed of an error in place of a traceback; None where that says more."""
    if isinstance(error, OSError):
        return explain(error)
    if isinstance(error, MemoryError) or any(words in str(error) for words in (
            "can't allocate memory", "not enough memory", "out of memory")):
        return (f"memory ran out ({' '.join(str(error).split())[:200]}); lower batch_size, "
                "resize_list, frame_limit or modelsize")
    if isinstance(error, ImportError):  # of a package that is optional here
        return str(error) if "pip install" in str(error) else None
    ours = isinstance(error, ValueError) or type(error).__module__.startswith("hnerv_clip")
    return str(error) if ours else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hnerv-clip", allow_abbrev=False, description=
                                     "Video networks that know what they show.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], None], words: str
            ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=words, description=words, allow_abbrev=False)
        sub.set_defaults(command=command, takes_settings=False)
        return sub

    book = add("book", _book, "execute the notebooks and build the book")
    book.add_argument("--profile", choices=list(PROFILES), default="quick")
    book.add_argument("-p", "--parameter", nargs=2, action="append", default=[],
                      metavar=("NAME", "VALUE"), help="set a parameter of the notebooks")
    book.add_argument("--only", nargs="+", default=[], metavar="NN",
                      help="execute only these notebooks, for example 03 04")
    book.add_argument("--outf", help="run folder; executed notebooks, site and html go beside it "
                                     "(output/PROFILE/main)")
    book.add_argument("--execute", action=argparse.BooleanOptionalAction, default=True,
                      help="execute the notebooks; if not, the executed copies that are there are "
                           "used")
    book.add_argument("--render", action=argparse.BooleanOptionalAction, default=True,
                      help="build the HTML, which needs Jupyter Book")
    book.add_argument("--publish", action=argparse.BooleanOptionalAction, default=None,
                      help="copy the executed pages into book/ (by default for an unchanged full "
                           "profile)")

    for sub in (*training.add_commands(add), stored.add_commands(add)):
        sub.add_argument("--cache_dir", default="output/cache")
        sub.set_defaults(takes_settings=True)
    runs.add_commands(add)

    made = add("pages", _pages, "make anew what README and book take from book/results")
    made.add_argument("--execute", action=argparse.BooleanOptionalAction, default=True,
                      help="also execute the notebooks over book/results (10 to 20)")
    made.add_argument("--fidelity", nargs="+", metavar="RUN", help=
                      "first collect book/results/fidelity.json from these finished runs")
    made.add_argument("--quick", metavar="FOLDER", help=
                      "first collect book/results/quick.json from a quick study's folder")
    made.add_argument("--scaling", metavar="FOLDER", help=
                      "first collect book/results/scaling.json from a folder of hnerv-clip scale")
    made.add_argument("--film", metavar="RUN", help=
                      "first make the landing page's film from this run or NAME.hnerv, and page 07 "
                      "from the run")
    made.add_argument("--film_text", default="", help=
                      "what its heat map is of (bunny: hare, bikes: moped)")
    made.add_argument("--film_original", default="", metavar="VIDEO", help=
                      "of NAME.hnerv, the video that it was made from")
    add("settings", show_settings, "print every setting, its default and its meaning")
    return parser


def _book(args: argparse.Namespace) -> None:
    from hnerv_clip.book import make_book

    overrides = dict(args.parameter) | ({"outf": args.outf} if args.outf else {})
    make_book(args.profile, overrides=overrides, only=args.only, execute_notebooks=args.execute,
              render_html=args.render, publish_pages=args.publish)


def _pages(args: argparse.Namespace) -> None:
    from hnerv_clip.book import build, pages, repository_root

    root = repository_root()
    if args.fidelity:
        pages.collect_fidelity(root / "book" / "results", args.fidelity)
    if args.quick:
        pages.collect_quick(root / "book" / "results", resolve_path(args.quick))
    if args.scaling:
        from hnerv_clip.book.scaling import collect_scaling

        collect_scaling(root / "book" / "results", resolve_path(args.scaling))
    if args.film:
        from hnerv_clip.book.film import make_film

        for path in make_film(root / "book", args.film, text=args.film_text,
                              original=args.film_original):
            print(f"{path.relative_to(root)}  {path.stat().st_size:,} bytes")
        if resolve_path(args.film).is_dir():
            build.execute_explored(root, args.film)
    if args.execute:
        build.execute_results(root)
    build.clean_published(root)
    pages.refresh(root)
