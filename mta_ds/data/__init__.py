"""Records and spans to batches: templates, projection onto tokens, data set, collation, loader."""

from mta_ds.data.collate import GRANULARITIES, IGNORED, Batch, Counts, Example, Spans, collate, total
from mta_ds.data.dataset import DatasetSummary, EncodedDataset, build_dataset
from mta_ds.data.encode import DataConfig, Dropped, encode, encode_prompt, whole_prompt
from mta_ds.data.loader import StepLoader, grouped_order, pad_share, sample_order
from mta_ds.data.project import project
from mta_ds.data.responses import PairCounts, answered, paired, to_line, write_pairs
from mta_ds.data.rollout import ParsedResponse, decode_with_offsets, rollout_example
from mta_ds.data.template import Half, Template, render
from mta_ds.data.units import Chosen, UnitConfig, choose
from mta_ds.spans.log import Pace, read_inputs, read_paces
from mta_ds.spans.merge import reject_log
from mta_ds.spans.records import (
    GENERATION,
    Record,
    Reject,
    input_files,
    local_files,
    parse_row,
    read_records,
    read_rows,
)
from mta_ds.spans.store import Manifest, SpanStore, Units, check_part, part_name, read_batches, read_manifest

__all__ = [
    "GENERATION",
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
    "Half",
    "Manifest",
    "Pace",
    "PairCounts",
    "ParsedResponse",
    "Record",
    "Reject",
    "SpanStore",
    "Spans",
    "StepLoader",
    "Template",
    "UnitConfig",
    "Units",
    "answered",
    "build_dataset",
    "check_part",
    "choose",
    "collate",
    "decode_with_offsets",
    "encode",
    "encode_prompt",
    "grouped_order",
    "input_files",
    "local_files",
    "pad_share",
    "paired",
    "parse_row",
    "part_name",
    "project",
    "read_batches",
    "read_inputs",
    "read_manifest",
    "read_paces",
    "read_records",
    "read_rows",
    "reject_log",
    "render",
    "rollout_example",
    "sample_order",
    "to_line",
    "total",
    "whole_prompt",
    "write_pairs",
]
