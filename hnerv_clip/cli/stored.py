"""Commands on a stored video alone: info, decode, search, embed, export; and encode to make it.

`add_commands` puts them on the command line; nothing heavy is imported before one runs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import glob
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil

from hnerv_clip.cli.given import check_run, check_stored, epochs_done
from hnerv_clip.config import PRESETS, Config, ConfigError, VideoConfig
from hnerv_clip.files import (
    RunError,
    check_free,
    check_writable,
    file_digest,
    read_json,
    write_json,
)
from hnerv_clip.paths import resolve_path

STORED_NOTE = "stored.json"  # in a run's folder: by file, its digest and what it was stored from
MOST_RATE = 0.1  # of --rate
LONG_MINUTES = 20  # of encoding, that a hint follows
FILMS = (".mp4", ".mkv", ".mov")
X264_PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower",
                "veryslow")


class FileCommandError(RuntimeError):
    """A command on a stored video cannot do what was asked; the message says the fix."""


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add the commands; `add(name, function, help)` returns a parser.

    Returns:
        The parser of `encode`, which takes settings like `train`.
    """
    info = add("info", _info, "what is in a stored video")
    decode = add("decode", _decode, "write a stored video as a film or as pictures")
    embed = add("embed", _embed, "the embedding of a box of a stored video, as a JSON list")
    export = add("export", _export, "write decoder and head as ONNX, checked against PyTorch")
    for sub in (info, decode, embed, export):
        sub.add_argument("file", metavar="FILE", help="stored video, NAME.hnerv")
    decode.add_argument("out", metavar="OUT", help="NAME.mp4, NAME.mkv, or a folder for PNG files")
    decode.add_argument("--frames", default="", metavar="A:B", help="frames A to B−1 only")
    decode.add_argument("--crf", type=int, default=16, help="x264's quality, lower is better (16)")
    decode.add_argument("--preset", default=X264_PRESETS[2], choices=X264_PRESETS, help=
                        "x264's, the faster the larger the file (veryfast)")
    embed.add_argument("--box", required=True, metavar="X0,Y0,X1,Y1", help="pixels of the picture")
    embed.add_argument("--time", type=float, required=True, metavar="S", help="seconds")
    export.add_argument("out", metavar="OUT", help="NAME.onnx")
    for sub in (decode, export):
        sub.add_argument("--force", action="store_true", help="replace what is there")
    for sub in (decode, embed):
        sub.add_argument("--device", default="auto")
    encode = add("encode", _encode, "fit any video and store it in one file; takes settings as "
                 "train does. Where they are not given, --modelsize follows the video's pixels and "
                 "frames (1.5 M for 132 frames of 640x1280), and --epochs, --batch_size, --lr and "
                 "--rate_epochs the device: 300, then 60 epochs of fine-tuning on a GPU; on a CPU "
                 "as many as take a few minutes for a short video, 40 and 15 at least. The head is "
                 "a field, which answers for any box, fitted to --field_boxes of each frame in "
                 "--field_steps: 256 and 4000 on a GPU, on a CPU as many as suit the video and the "
                 "teacher's speed; --head original is the head at fixed patches. What is chosen "
                 "is printed first")
    encode.add_argument("video", metavar="VIDEO", help="video file, folder of pictures, or a name "
                                                       "such as bunny")
    encode.add_argument("file", metavar="FILE", help="stored video to write, NAME.hnerv")
    encode.add_argument("--work", help="run folder; the same command goes on from there "
                                       "(output/encode/NAME)")
    encode.add_argument("--force", action="store_true", help="replace what is there")
    store = add("store", _store, "write the file of a trained run, smaller where --rate is given")
    store.add_argument("outf", help="run folder")
    store.add_argument("file", metavar="FILE", help="stored video to write, NAME.hnerv")
    store.add_argument("--cache_dir", default="output/cache")
    store.add_argument("--device", default="auto")
    store.add_argument("--force", action="store_true", help="replace what is there")
    for sub, rate, without, epochs in (
            (encode, 0.001, "(0.001); see --rate_epochs", "for the video and the device"),
            (store, None, "else weights are rounded as they are", "60")):
        sub.add_argument("--rate", type=float, default=rate, help=
                         "fine-tune for a small file: what a bit per pixel costs, from 0.0005 "
                         f"(best quality) to 0.02 (smallest) {without}")
        sub.add_argument("--rate_epochs", type=int, default=None if sub is encode else 60, help=
                         f"of that fine-tuning ({epochs}); 0: weights are rounded as they are")
    return encode


def _info(args: argparse.Namespace) -> None:
    from hnerv_clip.codec.container import MAGIC_1, read_header, unreadable
    from hnerv_clip.codec.facts import header_facts

    path = check_stored(args.file)
    try:
        with open(path, "rb") as file:
            old = file.read(8) == MAGIC_1
    except OSError as error:
        raise unreadable(path, error) from error
    if old:
        from hnerv_clip.codec.version1 import read_header
    facts = header_facts(read_header(path))
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


def _decode(args: argparse.Namespace) -> None:
    out = resolve_path(args.out)
    _check_free(out, args.force)
    is_film = out.suffix.lower() in FILMS
    if out.suffix and not is_film:
        raise FileCommandError(f"{out} is neither a film ({', '.join(FILMS)}) nor a folder: name "
                               "one")
    from hnerv_clip import open as open_video  # seconds, which a refusal need not take
    from hnerv_clip.stored.film import write_film, write_pictures

    video = open_video(check_stored(args.file), device=args.device)
    chosen = parse_frames(args.frames, len(video))
    write = functools.partial(write_film, crf=args.crf, preset=args.preset) if is_film else \
        write_pictures
    replace_when_done(out, lambda path: write(path, video, chosen))
    print(f"{out}: {len(chosen)} frames")


def _embed(args: argparse.Namespace) -> None:
    import json

    from hnerv_clip import open as open_video

    box = parse_box(args.box)
    video = open_video(check_stored(args.file), device=args.device)
    print(json.dumps([round(float(v), 7) for v in video.embed(box, args.time)]))


def parse_box(words: str) -> tuple[float, float, float, float]:
    """`0,0,448,448` as (x0, y0, x1, y1) in pixels.

    Raises:
        ConfigError: not four numbers.
    """
    try:
        x0, y0, x1, y1 = map(float, words.split(","))
    except ValueError:
        raise ConfigError(f"--box {words} is not x0,y0,x1,y1; write for example 0,0,448,448"
                          ) from None
    return x0, y0, x1, y1


def _export(args: argparse.Namespace) -> None:
    out = resolve_path(args.out)
    _check_free(out, args.force)
    from hnerv_clip.stored.export import export_onnx

    difference = {}
    replace_when_done(
        out, lambda path: difference.update(export_onnx(check_stored(args.file), path)))
    words = ", ".join(f"{name} {value:.2g}" for name, value in difference.items())
    print(f"{out}: largest difference to PyTorch {words}")


def _encode(args: argparse.Namespace) -> None:
    if Path(args.video).suffix.lower() == ".hnerv":
        raise FileCommandError(f"{args.video} is a stored video already: encode takes the video "
                               f"that it was made from, or what hnerv-clip decode {args.video} "
                               "NAME.mp4 writes")
    work = resolve_path(args.work or f"output/encode/{Path(args.file).stem}")
    if args.rate_epochs is None and (note := _note(resolve_path(args.file), work)):
        args.rate_epochs = note.get("rate_epochs", 0)  # kept, as the settings of the training are
    out = _check_file(args, work)
    check_writable(work)
    _check_preset(args, work)
    _check_same_video(args, work)
    from hnerv_clip.runs.run_dir import RunDir
    from hnerv_clip.stored.effort import choose_tuning, in_minutes, measure_minutes
    from hnerv_clip.stored.make import prepare_encoding
    from hnerv_clip.train import train

    config, dataset = prepare_encoding({**args.settings, "data_path": args.video}, work,
                                       cache_dir=args.cache_dir)
    if RunDir(work).begun:
        RunDir(work).note_location(config)  # the video may have moved since
    if args.rate_epochs is None:
        args.rate_epochs = choose_tuning(config, dataset.video)
    video, options = dataset.video, config.train
    done = epochs_done(RunDir(work))
    if out.exists() and not args.force:  # complete, by `_check_file`
        args.outf, args.device = str(work), config.train.device
        return _write_run(args, out)
    minutes = measure_minutes(config, dataset, tuning=args.rate_epochs, done=done)
    height, width = video.frame_hw
    print(f"{video.name}: {len(video.frames)} frames of {height}×{width} (height × width) in a "
          f"network of {config.model.modelsize:g} M values: {options.epochs} epochs of training, "
          f"then {args.rate_epochs} of fine-tuning for the file"
          + (f", then {options.field_steps} steps of fitting a field, which answers for any box"
             if config.model.head == "field" else "")
          + " (--modelsize, --epochs, --rate_epochs, --field_steps and --head change that)"
          + (f"; {done} of {options.epochs} epochs of training are done" if done else "")
          + (" and fine-tuning starts anew" if done == options.epochs and args.rate_epochs else "")
          + ("" if minutes is None else
             f"; about {in_minutes(minutes)} by the speed of its first steps")
          + (": --resize_list, --frame_stride and fewer epochs make it shorter"
             if minutes is not None and minutes >= LONG_MINUTES and not done else ""))
    # a field of the network as trained is needed only where it is stored so
    train(config, work, cache_dir=args.cache_dir, dataset=dataset, fit=not args.rate_epochs)
    args.outf, args.device = str(work), config.train.device
    _write_run(args, out)


def _check_preset(args: argparse.Namespace, work: Path) -> None:
    """Refuse a preset of other settings than those of the run in a folder; other settings are
    compared by `prepare_encoding`.

    Raises:
        FileCommandError: some differ.
    """
    from hnerv_clip.runs.run_dir import RunDir

    run = RunDir(work)
    if "preset" not in args.settings or not run.begun:
        return
    from hnerv_clip.stored.make import encode_settings

    asked = {"teacher": run.config().teacher.teacher,  # it may be the one without CLIP's weights
             **PRESETS[args.settings["preset"]], **args.settings, "data_path": args.video}
    others = Config.from_params(**encode_settings(asked, work)).diff(run.config())
    if listed := ", ".join(name for name in others if name != "data_path"):
        raise FileCommandError(
            f"{work} holds a training that has begun, with other settings than preset "
            f"{args.settings['preset']} ({listed}): leave --preset out to go on with it, or name "
            "a new folder, --work FOLDER")


def _check_same_video(args: argparse.Namespace, work: Path) -> None:
    """Refuse another video than the one that the run in a folder was trained on.

    Raises:
        FileCommandError: the frames differ. ConfigError: the video cannot be read.
    """
    from hnerv_clip.dataset import check_same_video
    from hnerv_clip.runs.run_dir import RunDir
    from hnerv_clip.video import load_video

    run = RunDir(work)
    if not run.begun:
        return
    given = dataclasses.replace(run.config().video, data_path=args.video)
    try:
        check_same_video(run, load_video(given), args.video)
    except RunError as error:
        raise FileCommandError(
            f"{args.video} shows other frames than the video that {work} was trained on "
            f"({run.recorded_video()['data']}): name a new folder, --work FOLDER") from error


def _store(args: argparse.Namespace) -> None:
    check_run(args.outf)
    _write_run(args, _check_file(args, resolve_path(args.outf)))


def _check_file(args: argparse.Namespace, work: Path) -> Path:
    out = resolve_path(args.file)
    if out.suffix != ".hnerv":
        raise FileCommandError(f"{out} should end in .hnerv, so that it is known for what it is")
    from hnerv_clip.runs.run_dir import RunDir

    if args.rate is not None and not 0 <= args.rate <= MOST_RATE:
        raise ConfigError(f"--rate {args.rate:g}: from 0.0005 (best quality) to 0.02 (smallest) is "
                          f"useful, and {MOST_RATE:g} the most")
    if args.rate_epochs is not None and args.rate_epochs < 0:
        raise ConfigError(f"--rate_epochs {args.rate_epochs}: 0 or more are needed; 0 rounds the "
                          "weights as they are")
    note = _note(out, work) if RunDir(work).finished else {}  # else the file will be another
    done = note.items() >= _storing_options(args).items()
    if note and not (done or args.force):
        words = " ".join(f"--{name} {note[name]:g}" for name in ("rate", "rate_epochs")
                         if note.get(name) is not None)
        raise FileCommandError(f"{out} is there, of this run, stored with {words or 'no --rate'}: "
                               "give the same, name another file, or add --force to store it anew")
    _check_free(out, args.force or done)
    return out


def _write_run(args: argparse.Namespace, out: Path) -> None:
    """Write a run's file, unless it is there, from this run and stored in this way: of a command
    that was stopped while it measured the file, what is missing is done."""
    from hnerv_clip.runs.run_dir import FIELD, RunDir
    from hnerv_clip.stored.make import store_run

    run = RunDir(args.outf)
    storing = {"checkpoint": run.checkpoint_digest(), **_storing_options(args)}
    if storing["rate"] is None:  # fine-tuned, it has another field than the run's
        storing["field"] = run.checkpoint_digest(FIELD)

    def write(path: Path) -> None:
        store_run(args.outf, path, rate=storing["rate"], epochs=args.rate_epochs,
                  cache_dir=args.cache_dir, device=args.device)
        with contextlib.suppress(RunError):  # a read-only run is stored all the same
            write_json(run.path / STORED_NOTE, stored_notes(run.path) | {
                str(out): {**storing, "sha256": file_digest(path)}})

    if not args.force and _note(out, run.path).items() >= storing.items():
        print(f"{out} is there and complete, from this run: it is left as it is")
    else:
        _check_free(out, args.force)
        replace_when_done(out, write)
    args.file = str(out)
    _info(args)
    print(describe_quality(out, run.config().video, device=args.device))


def stored_notes(work: Path) -> dict[str, dict]:
    """By file, what a run's folder says of the files that were stored from it."""
    with contextlib.suppress(OSError, RunError):  # none yet, or damaged: then nothing is known
        return read_json(work / STORED_NOTE, fix="")
    return {}


def _storing_options(args: argparse.Namespace) -> dict[str, float | None]:
    """How a file is stored, as far as it is known before epochs are chosen for the video."""
    if args.rate is None or args.rate_epochs == 0:
        return {"rate": None}
    return {"rate": args.rate} | ({} if args.rate_epochs is None else
                                  {"rate_epochs": args.rate_epochs})


def _note(out: Path, work: Path) -> dict:
    """What a file was stored from, where it is, to the byte, what was stored there; else empty."""
    note = stored_notes(work).get(str(out))
    known = isinstance(note, dict) and out.is_file() and note.get("sha256") == file_digest(out)
    return note if known else {}


def describe_quality(path: Path, options: VideoConfig, *, device: str) -> str:
    """The PSNR of a stored video's frames, and whether the file is larger than the given one."""
    from hnerv_clip import open as open_video
    from hnerv_clip.video import load_video

    video = open_video(path, device=device)
    found = video.psnr(load_video(options).frames)
    words = f"PSNR {found.mean():.2f} dB over all {len(found)} frames (lowest {found.min():.2f} dB)"
    given, size = resolve_path(options.data_path), path.stat().st_size
    if given.is_file() and size > given.stat().st_size:
        field = sum(part.size for name, part in video.header.parts.items()
                    if name.startswith("field."))
        words += f"; the file is larger than {given.name} ({given.stat().st_size:,} bytes): " + (
            f"its field alone has {field:,} bytes, more than a video so short or small takes"
            if field > given.stat().st_size else
            "a smaller --modelsize of the training or a larger --rate makes it smaller, at a lower "
            "PSNR")
    return words


def parse_frames(words: str, count: int) -> range:
    """`10:20` as a range of frames, as Python slices; all for nothing.

    Raises:
        ConfigError: not two numbers, or no frame among them.
    """
    try:
        first, _, last = words.partition(":") if words else ("", ":", "")
        if words and ":" not in words:
            last = str(int(first) + 1)
        chosen = range(count)[slice(int(first) if first else None, int(last) if last else None)]
    except ValueError:
        raise ConfigError(f"--frames {words} is not A:B; write for example 0:25") from None
    if not chosen:
        raise ConfigError(f"--frames {words} names no frame of {count}; write for example "
                          f"0:{min(25, count)}")
    return chosen


def replace_when_done(out: Path, write: Callable[[Path], object]) -> None:
    """Write a file or folder beside its place, and move it there when it is whole.

    What a killed process of this machine left half written there is removed.

    Raises:
        FileCommandError: the folder cannot be written, or the disk is full.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        start = f".{out.name}-{platform.node()}-"
        for left in out.parent.glob(f"{glob.escape(start)}*"):
            writer = left.name.removeprefix(start).partition("-")[0]
            if writer.isdecimal() and not psutil.pid_exists(int(writer)):
                shutil.rmtree(left, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f"{start}{os.getpid()}-"))
    except OSError as error:
        raise FileCommandError(f"cannot write beside {out}: {error}; choose a writable folder"
                               ) from error
    try:
        made = folder / out.name
        write(made)
        if out.is_dir():
            shutil.rmtree(out)
        os.replace(made, out)
    except OSError as error:
        raise FileCommandError(f"cannot write {out}: {error}; free space, or choose another place"
                               ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_free(out: Path, force: bool) -> None:
    check_free(out, force=force)
    if out.is_dir() and any(file.suffix != ".png" for file in out.iterdir()):
        raise FileCommandError(f"the folder {out} holds other files than PNG: choose another name")
