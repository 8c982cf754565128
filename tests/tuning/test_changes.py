"""What is named as the smallest change does fit, and less of it does not."""

from __future__ import annotations

import dataclasses
import re

from tuning_cases import preset

from mta_ds.tuning.changes import explain_nothing_fits, fits_at_all
from mta_ds.tuning.machine import GB, known_gpu
from mta_ds.tuning.search import search
from mta_ds.tuning.shapes import with_length, workload


def test_a_host_that_lacks_memory_is_named_beside_the_gpu(tmp_path) -> None:
    work = workload(preset(tmp_path, "70b-to-8b", "70b", "8b"))
    machine = dataclasses.replace(known_gpu("a10-24"), host_memory=64 * GB)
    line = explain_nothing_fits(work, machine, search(work, machine))
    assert "\n" not in line and "no plan fits 1 x a10-24 of 24 GB" in line
    # 98 GB of a checkpoint's copy on a host of 64: no GPU is large enough for that
    assert not fits_at_all(work, dataclasses.replace(machine, memory=1000 * GB))
    assert not re.search(r"GPUs of \d+ GB instead of 24(, or|$)", line)
    saved_at_once = dataclasses.replace(work, asynchronous_saves=False)
    size = re.search(r"GPUs of (\d+) GB instead of 24 and train.asynchronous_saves: false", line)
    assert size is not None
    for gigabytes, enough in ((int(size[1]), True), (int(size[1]) - 1, False)):
        assert fits_at_all(saved_at_once, dataclasses.replace(machine, memory=gigabytes * GB)) == enough
    ranks = re.search(r"(\d+) GPUs(?: on (\d+) nodes)? instead of 1", line)
    if ranks is not None:
        nodes = int(ranks[2] or 1)
        larger = dataclasses.replace(machine, num_nodes=nodes, gpus_per_node=int(ranks[1]) // nodes)
        assert fits_at_all(dataclasses.replace(work, batch_per_rank=1), larger)


def test_a_checkpoints_copy_is_what_there_is_no_room_for(tmp_path) -> None:
    work = workload(preset(tmp_path, "70b-to-8b", "70b", "8b"))
    machine = dataclasses.replace(known_gpu("h200-141"), memory=1000 * GB, host_memory=64 * GB)
    line = explain_nothing_fits(work, machine, search(work, machine))
    assert "smallest change: train.asynchronous_saves: false, or " in line
    assert re.search(r"or 1\d\d GB of memory in a node instead of 64$", line)


def test_the_longest_length_that_fits_is_named(tmp_path) -> None:
    config = preset(tmp_path, "gpt2-fdd-mta", "gpt2-xl", "gpt2", "data.max_length=65536", "train.micro_batch_size=1")
    work = workload(config)
    machine = dataclasses.replace(known_gpu("a10-24"), memory=8 * GB)
    line = explain_nothing_fits(work, machine, search(work, machine))
    length = int(line.split("data.max_length: ")[1].split()[0])
    assert fits_at_all(with_length(work, length), machine)
    assert not fits_at_all(with_length(work, length + 64), machine)
