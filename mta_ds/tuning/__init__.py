"""``mta-ds tune``: which ZeRO stages, offloads, buckets and micro-batch a student *and* a teacher want on a machine."""

from mta_ds.tuning.machine import Machine, choose_machine
from mta_ds.tuning.tune import TuneOptions, tune

__all__ = ["Machine", "TuneOptions", "choose_machine", "tune"]
