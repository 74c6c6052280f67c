"""What several ranks give, for the book: the part of «How fast», and the page of a whole run.

`book/results` holds files of `hnerv-clip scale`: `scaling.json` of GPUs, `scaling_cpu.json` of a
CPU's ranks, and in `scaling_run` what the page of the GPUs' whole run is drawn from.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd

from hnerv_clip.bench.multi_gpu import PARTS, RUN, run_figures
from hnerv_clip.book.pages import result_table
from hnerv_clip.config import Config
from hnerv_clip.evaluate import summarise
from hnerv_clip.figures.scaling import plot_scaling
from hnerv_clip.figures.training import plot_frame_quality, plot_training
from hnerv_clip.runs import RunDir, RunError, commit_words, write_json
from hnerv_clip.study.plan import study_base
from hnerv_clip.teachers import describe_teacher

RUN_FILES = ("config.json", "provenance.json", "summary.json", "metrics.csv", "evaluation.csv")
# Settings that change neither weights nor what is measured of them
WITHOUT_EFFECT = {"eval_freq", "checkpoint_s", "device"}
NOT_MEASURED = "*Not measured yet: several GPUs. On your own machine: `hnerv-clip scale`.*\n"


def collect_scaling(results: Path, outf: Path) -> None:
    """Take a measurement of `hnerv-clip scale` into `results`, in the place of the one there.

    One on GPUs without the part `run` leaves no whole run in `results`: it would be of another.

    Raises:
        RunError: `outf` holds none, or its whole run is not finished.
    """
    if not (outf / "scaling.json").exists():
        raise RunError(f"{outf} has no scaling.json; measure first, hnerv-clip scale --outf {outf}")
    measured = json.loads((outf / "scaling.json").read_text(encoding="utf-8"))
    on_gpu = measured["backend"] == "nccl"
    folder = results / "scaling_run"
    if on_gpu and not (outf / RUN).exists():
        shutil.rmtree(folder, ignore_errors=True)
    elif on_gpu:
        figures = run_figures(outf / RUN)
        if RUN in measured["parts"]:  # read there and then; a copy's files may have other times
            figures["wall_s"] = measured["parts"][RUN]["wall_s"]
        folder.mkdir(exist_ok=True)
        for name in RUN_FILES:
            shutil.copyfile(outf / RUN / name, folder / name)
        write_json(folder / "figures.json", figures)
    write_json(results / f"scaling{'' if on_gpu else '_cpu'}.json", measured)


def write_scaling(folder: Path, results: Path) -> None:
    """Write the generated parts of the pages into `folder`."""
    for path in folder.glob("scaling*.svg"):
        path.unlink()
    measured = {path.stem: json.loads(path.read_text(encoding="utf-8"))
                for path in sorted(results.glob("scaling*.json"))}
    (folder / "speed_ranks.md").write_text(ranks_markdown(measured), encoding="utf-8")
    for name, found in measured.items():
        if _complete(found, "speed"):
            _save(plot_scaling(found), folder / f"{name}.svg")
    run = RunDir(results / "scaling_run")
    (folder / "scaling_run.md").write_text(
        run_markdown(run, results) if run.finished else NOT_MEASURED, encoding="utf-8")
    if run.finished:
        config, label = run.config(), _teacher_label(run.config())
        _save(plot_training(run.metrics(), teacher_label=label or "",
                            warmup_epochs=config.train.pixel_loss_warmup_epochs),
              folder / "scaling_run_training.svg")
        table = pd.read_csv(run.path / "evaluation.csv")
        _save(plot_frame_quality(table[table.variant == "trained"], teacher_label=label or ""),
              folder / "scaling_run_frames.svg")


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})


def _complete(measured: dict[str, Any], part: str) -> bool:
    return measured["parts"].get(part, {}).get("complete", False)


def _teacher_label(config: Config) -> str | None:
    return describe_teacher(config.teacher).label if config.model.predict_clip else None


# The part of «How fast»

def ranks_markdown(measured: dict[str, dict[str, Any]]) -> str:
    """What several ranks give: a heading, a figure and tables for each file."""
    if not measured:
        return NOT_MEASURED
    blocks = []
    for name, found in measured.items():
        device = next(iter(found["parts"].values()))["device"]
        blocks.append(f"### {found['gpus']} × {device}" if found["backend"] == "nccl" else
                      f"### {found['gpus']} ranks on a processor")
        if _complete(found, "speed"):
            blocks.append(f"```{{figure}} _generated/{name}.svg\n"
                          ":alt: Speed and quality over ranks\n```")
        blocks.append(scaling_markdown(found).strip())
    return "\n\n".join(blocks) + "\n"


def scaling_markdown(measured: dict[str, Any]) -> str:
    """What scaling.json holds, as tables with sentences, for the parts that are complete."""
    parts = {name: part for name, part in measured["parts"].items() if part["complete"]}
    texts = [_TEXTS[name](parts[name]) for name in PARTS if name in parts and name in _TEXTS]
    missing = [name for name in _TEXTS if name not in parts]
    if missing:
        texts.append(f"Not measured here: {', '.join(missing)}.")
    settings = measured["settings"]
    teacher = f"teacher {measured['teacher']}" if measured["teacher"] else "pixels only"
    size = (settings["resize_list"] or settings["crop_list"]).replace("_", "×") or "whole frames"
    first = f", its first {settings['frame_limit']} frames" if settings["frame_limit"] else ""
    texts.append(
        f"{settings['data_path']} at {size}{first}, {settings['modelsize']:g} million stored "
        f"values, {settings['epochs']} epochs, batch {settings['batch_size']} a rank, precision "
        f"{settings['precision']}, {teacher}; over {measured['backend']}; "
        + "; ".join(dict.fromkeys(_machine(part, measured) for part in parts.values())) + ".")
    return "\n\n".join(texts) + "\n"


def _machine(part: dict[str, Any], measured: dict[str, Any]) -> str:
    count = f"{measured['gpus']} × " if measured["backend"] == "nccl" else ""
    return (f"{count}{part['device']}, PyTorch {part['versions']['torch']}, commit "
            f"{commit_words(part)}")


def _speed_text(part: dict[str, Any]) -> str:
    rows = ["| ranks | learning rate | frames/s | efficiency | PSNR (dB) | "
            f"{part['quality_db']:.2f} dB after (s) | training (s) | whole run (s) |",
            "|---" * 8 + "|"]
    for run in part["runs"]:
        reached = run["time_to_quality_s"]
        rows.append(
            f"| {run['ranks']} | {run['learning_rate']} | "
            f"{run['frames_per_s']:.0f} | {run['efficiency']:.0%} | {run['psnr_db']:.2f} | "
            f"{'never' if reached is None else f'{reached:.1f}'} | {run['train_time_s']:.1f} | "
            f"{'resumed' if run['wall_s'] is None else format(run['wall_s'], '.0f')} |")
    engines = ", ".join(dict.fromkeys(run["engine"] for run in part["runs"]))
    spread = max(abs(run[f"frames_per_s_{end}"] / run["frames_per_s"] - 1)
                 for run in part["runs"] for end in ("p10", "p90"))
    return "\n".join(rows) + (
        f"\n\nBy the {engines} engine, one run each. Frames/s: median over epochs, of which the "
        f"10th and the 90th percentile lie within {spread:.1%}. They, training and the time to "
        "what one rank reaches on training frames leave out evaluation, checkpoints and "
        "compilation. Whole run: from submission to the last file, so with the start of the "
        "processes, the loading of the video, compilation, evaluation and the stored file, of "
        "which more ranks share the evaluation alone."
        + _bound_text(part["runs"]) + _quality_text(part["runs"]) + "".join(
            f" On {run['ranks']} ranks with the learning rate {run['learning_rate']}, training "
            f"failed: {run['why']}." for run in part["failed"]))


def _step_ms(run: dict[str, Any]) -> float:
    return 1000 * run["ranks"] * run["batch_size"] / run["frames_per_s"]


def _bound_text(runs: list[dict[str, Any]]) -> str:
    """By how much the sum of gradients makes a step longer."""
    kept = [run for run in runs if run["learning_rate"] == "kept"]  # one rank first
    alone, most = _step_ms(kept[0]), _step_ms(kept[-1])
    return (f"\n\nOn {kept[-1]['ranks']} ranks a step takes {most / alone:.3f} times as long as on "
            f"one ({most - alone:+.2f} ms): before the update the ranks add up their gradients, "
            "and each waits for the slowest.")


def _quality_text(runs: list[dict[str, Any]]) -> str:
    """What the larger global batch does to quality."""
    alone, most = runs[0]["psnr_db"], max(run["ranks"] for run in runs)
    words = [f"{_apart(run['psnr_db'] - alone)} with the learning rate {run['learning_rate']}"
             for run in runs if run["ranks"] == most]
    return (f" Each step is over {most} times as many frames: as many epochs have 1/{most} of the "
            f"steps, {most} times the epochs as many. Against one rank, quality ends "
            f"{'; '.join(words)}.")


def _apart(gap_db: float) -> str:
    return f"{abs(gap_db):.2f} dB {'higher' if gap_db > 0 else 'lower'}"


def _correctness_text(part: dict[str, Any]) -> str:
    rows = ["| precision, engine | global batch | epochs | weights: largest difference (relative) "
            "| loss of the first, last epoch | PSNR: one, all (dB) | one rank twice: weights |",
            "|---" * 7 + "|"]
    for case in part["cases"]:
        weights, again = ("equal bits" if case[key]["identical"] else
                          f"{case[key]['largest']:.1e} ({case[key]['relative']:.1e})"
                          for key in ("ranks_differ", "repeat_differs"))
        losses = ", ".join("equal" if a == b else f"{abs(b / a - 1):.1e}" for a, b in [
            (case["loss_one"][i], case["loss_ranks"][i]) for i in (0, -1)])
        rows.append(f"| {case['precision']}, {case['engine']} | {case['global_batch']} | "
                    f"{case['epochs']} | {weights} | {losses} | {case['psnr_one_db']:.2f}, "
                    f"{case['psnr_ranks_db']:.2f} | {again} |")
    text = (f"The same global batches on one rank and on {part['cases'][0]['ranks']}: by how much "
            "weights and losses (relative) differ.\n\n" + "\n".join(rows))
    if any(case["precision"] == "bf16" for case in part["cases"]):
        text += ("\n\nIn fp32 the ranks compute what one rank does, up to the order of sums. The "
                 "rounding of bf16 is 65 536 times as coarse: sums in another order differ more, "
                 "and training magnifies that from step to step, so that weights drift apart. What "
                 "compares then is the loss of the first epoch, and the quality at the end.")
    return text


def _sweep_text(part: dict[str, Any]) -> str:
    return (f"A sweep of {part['runs']} runs over {part['epochs']} epochs, one rank each, took "
            f"{part['at_once_s']:.0f} s at once and {part['in_sequence_s']:.0f} s in sequence: "
            f"{part['speed_up']:.2f} times faster, for {part['at_once_rank_s']:.0f} seconds "
            f"times ranks held against {part['in_sequence_rank_s']:.0f}.")


def _kill_text(part: dict[str, Any]) -> str:
    differs = part["differs"]
    same = "bit for bit the same weights as" if differs["identical"] else (
        f"weights that differ by at most {differs['largest']:.1e} (relative "
        f"{differs['relative']:.1e}) from those of")
    return (f"A rank of {part['ranks']} killed in epoch {part['killed_epoch'] + 1}: the job was "
            f"down after {part['down_s']:.1f} s («{part['message']}»), its processes gone after "
            f"{part['all_processes_gone_s']:.1f} s. Launched again, it went on from epoch "
            f"{part['resumed_epoch'] + 1} and reached {part['psnr_resumed_db']:.2f} dB, with "
            f"{same} an uninterrupted run ({part['psnr_uninterrupted_db']:.2f} dB).")


def _checkpoint_text(part: dict[str, Any]) -> str:
    costs = " and ".join(f"{run['mean_s'] * 1000:.0f} ms on {run['ranks']} rank"
                         f"{'s' if run['ranks'] > 1 else ''} ({run['share']:.2%} of training)"
                         for run in part["runs"])
    return (f"A checkpoint ({part['runs'][0]['size_bytes'] / 1e6:.0f} MB), one every "
            f"{part['checkpoint_s']:.0f} s by default, takes {costs}.")


_TEXTS = {"speed": _speed_text, "correctness": _correctness_text, "checkpoint": _checkpoint_text,
          "kill": _kill_text, "sweep": _sweep_text}


# The page of the whole run

def run_markdown(run: RunDir, results: Path) -> str:
    """What a whole run on several GPUs reached and took, beside one GPU's.

    Args:
        run: its small files, and figures.json as from `run_figures`.
        results: where the tables of runs on one GPU are.
    """
    config, facts, summary = run.config(), run.provenance(), run.summary()
    figures = json.loads((run.path / "figures.json").read_text(encoding="utf-8"))
    ranks, train = facts["world_size"], config.train
    label = _teacher_label(config)
    clocks = {name: summary[f"{name}_s"] for name in ("train_time", "compile", "eval_time",
                                                      "checkpoint_time")}
    blocks = [
        f"**Learnt from: {label or 'pixels alone'}.** This ran on {ranks} GPUs; more were not "
        "measured.",
        result_table(summarise(pd.read_csv(run.path / "evaluation.csv"))),
        f"*Means over n frames. Centred: less the mean embedding, so that a constant scores 0. The "
        f"file holds {summary['size_bytes']:,} bytes, {summary['rate_bpp']:.4f} bits per pixel, "
        f"{train.quant_model_bit} bits a weight and {train.quant_embed_bit} a value of the "
        f"embeddings before entropy coding.*",
        _one_gpu_text(config, summary, results, ranks=ranks),
        _figure("scaling_run_training", "Losses, PSNR and similarity over epochs"),
        _figure("scaling_run_frames", "PSNR and similarity of every frame"),
        f"{config.video.data_path}, `data_split={config.params()['data_split']}`, {train.epochs} "
        f"epochs of {figures['steps'] // train.epochs} steps, batch {train.batch_size} on each of "
        f"{ranks} ranks, learning rate {train.lr:g}, λ = {train.clip_loss_weight:g} from epoch "
        f"{train.pixel_loss_warmup_epochs + 1} on, seed {facts['seed']}, {figures['engine']} "
        f"engine, {facts['precision']}.",
        f"{_wall_words(figures)} {clocks['train_time']:.1f} s of it are training steps "
        f"({figures['frames_per_s']:.0f} frames/s, median over epochs), "
        f"{clocks['compile']:.1f} s compilation, {clocks['eval_time']:.1f} s evaluation and "
        f"{clocks['checkpoint_time']:.1f} s for {summary['checkpoints']} checkpoints; the rest "
        "goes into the start of the processes, the loading of the video, and the stored file, "
        "which is written, decoded and measured. Peak memory of a rank, evaluation included: "
        f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB. {ranks} × {facts['device']}, PyTorch "
        f"{facts['versions']['torch']}, CUDA {facts['cuda']}, {facts['started'][:10]}, commit "
        f"{commit_words(facts)}."]
    return "\n\n".join(blocks) + "\n"


def _wall_words(figures: dict[str, Any]) -> str:
    if figures["wall_s"] is None:
        return "The run was interrupted and went on, so that its wall clock says nothing."
    return f"From submission to the last file it took {figures['wall_s']:.0f} s."


def _figure(name: str, alt: str) -> str:
    return f"```{{figure}} _generated/{name}.svg\n:alt: {alt}\n```"


def _one_gpu_text(config: Config, summary: dict[str, Any], results: Path, *, ranks: int) -> str:
    """The same settings on one GPU, from the study of trade-offs, where it has that run."""
    path = results / "study_trade_off.csv"
    same = _same_settings(pd.read_csv(path), config) if path.exists() else pd.DataFrame()
    if same.empty:
        return "On one GPU these settings were not trained."
    alone = same.iloc[0]
    words = {"eval_psnr_train": ("psnr_train_db", "training frames"), "eval_psnr_val_interpolated":
             ("psnr_held_out_db", "held-out ones from interpolated embeddings")}
    known = {name: pair for name, pair in words.items() if name in summary}
    return (f"One GPU with these settings takes {ranks} times as many steps, each over 1/{ranks} "
            "of the frames. It reached " + " and ".join(
                f"{alone[column]:.2f} dB on {frames}" for column, frames in known.values())
            + f" ({alone.device}, commit {commit_words(alone)}). Here it is " + " and ".join(
                f"{_apart(summary[name] - alone[column])} on {frames.split(' from')[0]}"
                for name, (column, frames) in known.items()) + ": the learning rate was kept, as "
            "the command has it; [one that grows with the ranks](how_fast.md) was not tried over "
            "so many epochs.")


def _same_settings(table: pd.DataFrame, config: Config) -> pd.DataFrame:
    """The base runs of a study's table that were trained with all of a run's settings.

    Its columns are the settings in which the study's runs differ. In those without a column they
    are the full profile's, with the teacher that is asked for: `hnerv-clip study` as it stands.
    """
    params = {name: value for name, value in config.params().items() if name not in WITHOUT_EFFECT}
    base = study_base("full", {name: params[name] for name in ("teacher", "clip_dim", "data_path")})
    table = table[(table.video == params["data_path"]) & (table.variant == "base")
                  & (table.teacher_label == _teacher_label(config))]
    for name, value in params.items():
        if name in table:
            text = isinstance(value, str)
            own = table[name].astype(object).fillna("") if text else table[name].astype(float)
            table = table[own == value]
        elif name != "data_path" and value != base.params()[name]:
            return table[:0]
    return table
