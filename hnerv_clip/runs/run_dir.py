"""The run directory: what was run, its checkpoints, its log and its metrics.

Checkpoints hold tensors and plain values only, are written atomically and are checked when read.
"""

from __future__ import annotations

import time
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hnerv_clip.config import Config, ConfigError
from hnerv_clip.files import (
    RunError,
    check_keys,
    check_writable,
    explain,
    file_digest,
    open_own,
    read_json,
    read_table,
    remove_stale,
    write_atomic,
    write_json,
)
from hnerv_clip.paths import resolve_path
from hnerv_clip.runs.locks import Held, hold

if TYPE_CHECKING:
    import pandas as pd  # a quarter of a second: imported where a table is made
    import torch  # seconds, which what only reads a run's tables need not wait for

LATEST, BEST = "model_latest.pth", "model_best.pth"  # to resume from; of the highest PSNR
FIELD = "field.pth"  # a semantic field, fitted afterwards
VIDEO = "video.hnerv"  # the stored video of a finished run
# Files of which a run that has begun has at least one
STARTED = (LATEST, BEST, "metrics.csv", "summary.json", "job.json")
# What a checkpoint must hold to go on from, beside its weights
RESUMABLE = {"optimizer": dict, "batch": int, "losses": object, "history": list,
             "best_psnr_db": (int, float), "train_time_s": (int, float), "world_size": int}
# What provenance.json must hold
PROVENANCE = {"commit": str, "dirty": (bool, type(None)), "device": str, "world_size": int,
              "versions": dict, "python": str, "seed": int, "data": str, "data_digest": str,
              "teacher": (str, type(None)), "started": str}


class RunDir:
    """The folder of one run. `RunDir.create` for a run to make, `RunDir(path)` for one to read."""

    def __init__(self, path: str | Path):
        self.path = resolve_path(path)

    @classmethod
    def create(cls, path: str | Path, config: Config) -> RunDir:
        """Open a run's folder, new or the same run's; another configuration's is never touched.

        A folder whose run never finished a step, as after a wrong setting, is taken over.

        Raises:
            RunError: the folder holds another configuration, or other files.
        """
        run = cls.check(path, config)
        known = run.config() if (run.path / "config.json").exists() else None
        if known is None or not run.begun and (config.diff(known) or not known.resolved):
            run.path.mkdir(parents=True, exist_ok=True)
            write_json(run.path / "config.json", config.params())
        return run

    @classmethod
    def check(cls, path: str | Path, config: Config) -> RunDir:
        """Raise what would stop `create`, and leave nothing behind; ask before long work.

        Raises:
            RunError: the folder holds another configuration or other files, or can't be written.
        """
        run = cls(path)
        check_writable(run.path)
        if (run.path / "config.json").exists():
            differences = config.diff(run.config())
            paths = {resolve_path(name) for name in differences.get("data_path", ())}
            if run.recorded_video() or len(paths) == 1:  # then its frames are compared
                differences.pop("data_path", None)
            if differences and run.begun:
                listed = "; ".join(f"{name}: {old!r} there, {new!r} asked"
                                   for name, (new, old) in differences.items())
                raise RunError(f"{run.path} holds a run of another configuration ({listed}). "
                               "Choose another outf (of encode: --work), or remove that folder")
        elif run.path.exists() and any(not p.name.startswith(".") for p in run.path.iterdir()):
            raise RunError(f"{run.path} is not empty and holds no config.json, so it is no run of "
                           "this project. Choose another outf")
        return run

    def config(self) -> Config:
        """The configuration that the run was made with.

        Raises:
            RunError: there is no run here, or its config.json is damaged.
        """
        file = self.path / "config.json"
        fix = ("put the run's own file back, update hnerv-clip if a newer version made it, or "
               "train in another outf")
        try:
            return Config.from_params(**read_json(file, fix=fix))
        except (FileNotFoundError, NotADirectoryError):
            raise RunError(f"{self.path} holds no run (no config.json); train one first with "
                           "02_train or `hnerv-clip train`, or correct outf") from None
        except ConfigError as error:
            raise RunError(f"{file} is damaged: {error}; {fix}") from error

    def config_with_head(self) -> Config:
        """The configuration of a run that predicts embeddings, by the original head.

        Raises:
            RunError: as `config`.
            ConfigError: the run has no such head; said before anything else is looked for.
        """
        config = self.config()
        if not config.model.predict_clip:
            raise ConfigError(f"the run {self.path} has no CLIP head (predict_clip=False), so it "
                              "predicts no embeddings: train one with predict_clip=True")
        return config

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run's folder for one process; released by the system when the process dies.

        Raises:
            RunError: another process trains this run.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(hold(self.path / ".lock"))
            except Held as held:
                raise RunError(f"{self.path} is being trained by another process ({held}); wait "
                               "for it, or stop it first") from None
            for checkpoint in self.path.glob(".model_*.tmp"):  # only the holder writes those
                checkpoint.unlink(missing_ok=True)
            remove_stale(self.path)
            yield

    @property
    def begun(self) -> bool:
        """Whether there is something here that training made."""
        return any((self.path / name).exists() for name in STARTED)

    def recorded_video(self) -> dict[str, str]:
        """`data` (a path or name) and `data_digest` of the frames that it learns; {} if unknown."""
        try:
            facts = self.provenance()
        except RunError:
            return {}
        return {name: facts[name] for name in ("data", "data_digest")} if self.begun else {}

    def note_location(self, config: Config) -> None:
        """Keep where the run's video lies now."""
        if config.video.data_path != self.config().video.data_path:
            write_json(self.path / "config.json", config.params())

    @property
    def finished(self) -> bool:
        """Whether the run was trained and evaluated to its end."""
        return (self.path / "summary.json").exists()

    def summary(self) -> dict[str, Any]:
        """The final figures of a finished run."""
        return self._read_json("summary.json")

    def provenance(self) -> dict[str, Any]:
        """What was run, on what; see `make_provenance`."""
        return self._read_json("provenance.json", PROVENANCE)

    def _read_json(self, name: str, keys: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            return read_json(self.path / name, keys=keys, fix=self._remake(name))
        except FileNotFoundError:
            raise RunError(f"{self.path} has no {name}: the run is not finished; train it to its "
                           "end with the same parameters and outf") from None

    def save_checkpoint(self, name: str, state: dict[str, Any]) -> None:
        """Write tensors and plain values to `name`, atomically."""
        import torch

        write_atomic(self.path / name, lambda file: torch.save(state, file))

    def load_checkpoint(self, name: str = BEST) -> dict[str, Any]:
        """Read and check a checkpoint of this run, onto the CPU.

        Raises:
            RunError: missing, truncated, altered, or of another configuration.
        """
        path, fix = self.path / name, self.checkpoint_fix(name)
        state = load_checkpoint(path, fix=fix)
        if name == LATEST:
            check_keys(state, RESUMABLE, path, fix=fix)
        try:
            differences = self.config().diff(Config.from_params(**state["config"]))
            differences.pop("data_path", None)  # before the video moved
        except ConfigError as error:
            raise RunError(f"{path} is damaged: {error}; {fix}") from error
        if differences:
            raise RunError(f"{path} belongs to another configuration (differs in "
                           f"{', '.join(differences)}); put the run's own file back, or {fix}")
        return state

    def checkpoint_fix(self, name: str) -> str:
        """What to do about a checkpoint of this run that is lost or damaged."""
        lost = [name] * (self.path / name).exists() + ["summary.json"] * self.finished
        remove = f"remove {' and '.join(lost)} from {self.path} and " if lost else ""
        goes_on = (f"goes on from {LATEST} and chooses its best model anew"
                   if name != LATEST and (self.path / LATEST).exists() else
                   "starts at its first epoch")
        return f"{remove}train again with the same parameters and outf: the run {goes_on}"

    def checkpoint_digest(self, name: str = BEST) -> str:
        """SHA-256 of a checkpoint, to which other files can be bound; empty without one."""
        path = self.path / name
        return file_digest(path) if path.is_file() else ""

    def bind_video(self, checkpoint: str = BEST) -> None:
        """Note in video.json which checkpoint the stored video was made from."""
        write_json(self.path / "video.json", self._video_digests(checkpoint))

    def holds_video(self, checkpoint: str = BEST) -> bool:
        """Whether the stored video is there and was made from this checkpoint, as it is now."""
        try:
            about = read_json(self.path / "video.json", fix="")
        except (FileNotFoundError, RunError):  # made before there was such a note, or damaged
            return False
        return (self.path / VIDEO).is_file() and about == self._video_digests(checkpoint)

    def _video_digests(self, checkpoint: str) -> dict[str, str]:
        return {"checkpoint": self.checkpoint_digest(checkpoint),
                "video": file_digest(self.path / VIDEO)}

    def metrics(self) -> pd.DataFrame:
        """A row per epoch; evaluation columns are empty between evaluations."""
        try:
            return read_table(self.path / "metrics.csv", ["epoch"],
                              fix=self._remake("metrics.csv"))
        except FileNotFoundError:
            raise RunError(f"{self.path} has no metrics.csv yet: no epoch is complete") from None

    def evaluation(self) -> pd.DataFrame:
        """The final evaluation, a row per frame, variant and source; see `evaluate`."""
        fix = self._remake("evaluation.csv")
        try:
            return read_table(self.path / "evaluation.csv", (
                "variant", "source", "frame", "split", "psnr_db"), fix=fix)
        except FileNotFoundError:
            raise RunError(f"{self.path} has no evaluation.csv; {fix}") from None

    def _remake(self, name: str) -> str:
        """What to do about a file that training writes and that is lost or damaged."""
        lost = [name] * (self.path / name).exists() + ["summary.json"] * (
            self.finished and name != "summary.json")
        remove = f"remove {' and '.join(lost)} from {self.path} and " if lost else ""
        return (f"{remove}train again with the same parameters and outf: the run's checkpoints "
                "are kept")

    def write_table(self, name: str, table: pd.DataFrame) -> None:
        """Write a CSV, atomically."""
        write_atomic(self.path / name, lambda file: file.write(table.to_csv(index=False).encode()))

    def log(self, message: str) -> None:
        """Append a line with the time to rank0.txt."""
        with open_own(self.path / "rank0.txt", "a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")


def load_checkpoint(path: str | Path, *, fix: str = "correct the path, or train the run again"
                    ) -> dict[str, Any]:
    """Read a checkpoint file; nothing in it is executed.

    Args:
        fix: what to do about a bad one, which the error says.
    Raises:
        RunError: missing, truncated, altered, not a checkpoint of this project, or with weights
            that are NaN or infinite.
    """
    import torch

    path = Path(path)
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        raise RunError(f"{path} does not exist: {fix}") from None
    except OSError as error:
        raise RunError(f"cannot read {explain(error)}") from error
    with file:
        try:
            with zipfile.ZipFile(file) as archive:  # torch itself does not compare the checksums
                damaged = archive.testzip()
            if damaged:
                raise RunError(f"it is damaged at {damaged}")
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged zip or pickle raises nearly anything
            raise RunError(f"{path} is not a readable checkpoint ({error}): truncated, altered or "
                           f"foreign; {fix}") from error
    if not isinstance(state, dict) or not {"config", "model", "epoch"} <= state.keys():
        raise RunError(f"{path} is no checkpoint of HNeRV-CLIP: it lacks config, model or epoch; "
                       f"{fix}")
    check_keys(state, {"config": dict, "model": dict, "epoch": int}, path, fix=fix)
    for name, tensor in state["model"].items():
        if not isinstance(tensor, torch.Tensor):
            raise RunError(f"{path} is damaged: its {name} is no tensor; {fix}")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise RunError(f"{path} is damaged: its {name} holds NaN or infinity; {fix}")
    return state


def load_weights(model: torch.nn.Module, state: dict[str, Any], path: Path, *, fix: str) -> None:
    """Put a checkpoint's weights into a model, or say that the file `path` holds others.

    Raises:
        RunError: weights are missing, too many or of other shapes; the model may be half loaded.
    """
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        found = " ".join(str(error).split())
        raise RunError(f"{path} holds the weights of another network ({found[:300]}); {fix}"
                       ) from error
