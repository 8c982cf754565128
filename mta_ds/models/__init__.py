"""The two models of a run: strict loading, ZeRO-3 partitions, key layers, the streaming teacher."""

import os

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

# DeepSpeed looks for an accelerator when it is first imported, and warns of every machine that has none.
if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from mta_ds.models.adapters import merged_folder
from mta_ds.models.body import CausalBody, count_parameters, decoder_layers, state_width, truncate
from mta_ds.models.chunked_mlp import chunk_mlps
from mta_ds.models.initialise import copy_tokenizer, cut_layers, random_student
from mta_ds.models.key_layers import KeyLayer, resolve_key_layers
from mta_ds.models.loading import (
    Dtype,
    StudentConfig,
    TeacherConfig,
    load_config,
    load_pretrained,
    load_tokenizer,
    output_head,
    quiet_transformers,
    resolve_model,
    vocabulary_size,
)
from mta_ds.models.lora import (
    LoraConfig,
    adapter_parameters,
    adapter_size,
    base_name,
    inject_adapters,
    plain_parameters,
    save_adapter,
)
from mta_ds.models.partitions import gathered
from mta_ds.models.positions import check_positions, positions_in_table
from mta_ds.models.teacher import PaddedBatch, StreamingTeacher, load_teacher, ragged
from mta_ds.models.verify import verify_weights
from mta_ds.models.whole import whole_copy
from mta_ds.models.zero import student_config, teacher_config

__all__ = [
    "CausalBody",
    "Dtype",
    "KeyLayer",
    "LoraConfig",
    "PaddedBatch",
    "StreamingTeacher",
    "StudentConfig",
    "TeacherConfig",
    "Tokenizer",
    "adapter_parameters",
    "adapter_size",
    "base_name",
    "check_positions",
    "chunk_mlps",
    "copy_tokenizer",
    "count_parameters",
    "cut_layers",
    "decoder_layers",
    "gathered",
    "inject_adapters",
    "load_config",
    "load_pretrained",
    "load_teacher",
    "load_tokenizer",
    "merged_folder",
    "output_head",
    "plain_parameters",
    "positions_in_table",
    "quiet_transformers",
    "ragged",
    "random_student",
    "resolve_key_layers",
    "resolve_model",
    "save_adapter",
    "state_width",
    "student_config",
    "teacher_config",
    "truncate",
    "verify_weights",
    "vocabulary_size",
    "whole_copy",
]
