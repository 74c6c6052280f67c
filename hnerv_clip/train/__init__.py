"""Training: one loop for CPU, one GPU and many ranks, interrupted and resumed exactly.

`run` starts or resumes a run, `trainer` holds the loop and its checkpoints, `outputs` what it
writes beside them, `divergence` tells whether training has collapsed.
"""

from hnerv_clip.train.run import TrainResult, check_run, prepare_run, train
from hnerv_clip.train.trainer import TrainError, epoch_order

__all__ = ["TrainError", "TrainResult", "check_run", "epoch_order", "prepare_run", "train"]
