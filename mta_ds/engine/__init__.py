"""The training stage: DeepSpeed set-up, the step, checkpoints, metrics, validation, export."""

from mta_ds.engine.check import check
from mta_ds.engine.config import RunConfig, TrainConfig
from mta_ds.engine.distributed import shutdown
from mta_ds.engine.stages import evaluate_run, export_checkpoint, generate_run, generated_folder
from mta_ds.engine.train import train

__all__ = [
    "RunConfig",
    "TrainConfig",
    "check",
    "evaluate_run",
    "export_checkpoint",
    "generate_run",
    "generated_folder",
    "shutdown",
    "train",
]
