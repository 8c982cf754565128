"""Records and spans to batches: templates, projection onto tokens, data set, collation, loader."""

from mta_ds.data.collate import GRANULARITIES, IGNORED, Batch, Counts, Example, Spans, collate, total
from mta_ds.data.dataset import DatasetSummary, EncodedDataset, build_dataset
from mta_ds.data.encode import DataConfig, Dropped, encode, encode_prompt
from mta_ds.data.loader import StepLoader, sample_order
from mta_ds.data.project import project
from mta_ds.data.template import Template, render
from mta_ds.data.units import Chosen, UnitConfig, choose
from mta_ds.spans.records import Record, Reject, input_files, read_records
from mta_ds.spans.store import Manifest, SpanStore, Units, check_part, read_manifest

__all__ = [
    "GRANULARITIES",
    "IGNORED",
    "Batch",
    "Chosen",
    "Counts",
    "DataConfig",
    "DatasetSummary",
    "Dropped",
    "EncodedDataset",
    "Example",
    "Manifest",
    "Record",
    "Reject",
    "SpanStore",
    "Spans",
    "StepLoader",
    "Template",
    "UnitConfig",
    "Units",
    "build_dataset",
    "check_part",
    "choose",
    "collate",
    "encode",
    "encode_prompt",
    "input_files",
    "project",
    "read_manifest",
    "read_records",
    "render",
    "sample_order",
    "total",
]
