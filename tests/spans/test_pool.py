"""Workers for real: the bundled parser in processes of their own, killed and orphaned."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch

from mta_ds.errors import UserError
from mta_ds.spans import parse as parse_module
from mta_ds.spans import pool as pool_module
from mta_ds.spans import rows as rows_module
from mta_ds.spans.merge import status
from mta_ds.spans.parse import ParseConfig, merge_only, parse
from mta_ds.spans.parser import load_parser
from mta_ds.spans.pool import ParserPool, UnitParser, open_pool
from mta_ds.spans.rows import Field, batches, parse_fields

TEXTS = ["The old man reads a book. It rains, and she stays.", "A cat sat on the mat!", "\0 \u200b x", ""]


def fields(n: int) -> list[Field]:
    return [Field(f"r{i}", "text", f"{TEXTS[i % len(TEXTS)]} Number {i} goes home.") for i in range(n)]


@pytest.fixture(scope="module")
def pool():
    with ParserPool(None, 2) as pool:
        yield pool


def test_rows_are_those_of_this_process_in_the_order_of_units(pool: ParserPool) -> None:
    units = [fields(60)[i : i + 7] for i in range(0, 60, 7)]
    parser = load_parser(None)
    for unit, parsed in zip(units, pool.map(iter(units)), strict=True):
        expected = parse_fields(unit, parser)
        assert parsed.table.equals(expected.table) and parsed.counts == expected.counts


def test_tickets_are_asked_for_in_any_order(pool: ParserPool) -> None:
    units = [fields(12)[i : i + 3] for i in range(0, 12, 3)]
    tickets = [pool.submit(unit) for unit in units]
    for ticket, unit in reversed(list(zip(tickets, units, strict=True))):
        assert pool.result(ticket).table["record_id"].to_pylist() == [field.record_id for field in unit]


def test_map_reads_only_a_few_units_ahead(pool: ParserPool) -> None:
    taken = 0

    def units():
        nonlocal taken
        for field in fields(200):
            taken += 1
            yield [field]

    results = pool.map(units())
    next(results)
    assert taken < 40
    assert sum(1 for _ in results) == 199


def test_a_ticket_is_good_once(pool: ParserPool) -> None:
    ticket = pool.submit(fields(1))
    pool.result(ticket)
    for wrong in (ticket, ticket + 1, -1):
        with pytest.raises(ValueError, match=f"ticket must be one whose rows are not taken yet: {wrong} is not"):
            pool.result(wrong)


def test_results_that_nobody_takes_are_dropped(pool: ParserPool) -> None:
    results = pool.map([field] for field in fields(20))
    next(results)
    results.close()
    assert pool.result(pool.submit(fields(2))).table.num_rows == 2
    assert not pool._results and not pool._open


def test_a_killed_worker_is_one_clear_line() -> None:
    with ParserPool(None, 2) as pool:
        os.kill(pool._workers[0].process.pid, signal.SIGKILL)
        with pytest.raises(UserError, match=r"a parser worker ended by signal 9; .*fewer --workers"):
            list(pool.map([field] for field in fields(20)))


def test_signals_to_the_whole_group_are_the_parents_to_handle(pool: ParserPool) -> None:
    """From the first moment on, while a worker is still importing."""
    with ParserPool("none", 1) as young:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            for worker in (*young._workers, *pool._workers):
                assert worker.process.pid is not None
                os.kill(worker.process.pid, number)
        assert young.result(young.submit(fields(2))).table.num_rows == 2
        assert pool.result(pool.submit(fields(2))).table.num_rows == 2


def test_the_first_worker_of_a_process_holds_signals_back_too() -> None:
    code = (
        "from mta_ds.spans.pool import ParserPool\n"
        "if __name__ == '__main__':\n"
        "    with ParserPool('none', 1) as pool:\n"
        "        print(open(f'/proc/{pool._workers[0].process.pid}/status').read())\n"
    )
    told = subprocess.run([sys.executable, "-c", code], timeout=300, capture_output=True, text=True, check=True).stdout
    (blocked,) = (int(line.split()[1], 16) for line in told.splitlines() if line.startswith("SigBlk:"))
    assert all(blocked >> (number - 1) & 1 for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))


def test_a_parent_that_fails_ends_with_its_workers() -> None:
    code = (
        "from mta_ds.spans.pool import ParserPool\n"
        "if __name__ == '__main__':\n"
        "    pool = ParserPool('none', 1)\n"
        "    pool.result(pool.submit([]))\n"
        "    raise ValueError\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=300, stderr=subprocess.DEVNULL).returncode == 1


def test_a_parser_that_cannot_be_loaded_is_the_workers_own_line(tmp_path: Path) -> None:
    with ParserPool(str(tmp_path / "none"), 1) as pool, pytest.raises(UserError, match="no such file or folder"):
        pool.result(pool.submit(fields(1)))


def test_a_worker_that_ended_still_tells_why(tmp_path: Path) -> None:
    with ParserPool(str(tmp_path / "none"), 1) as pool:
        pool._workers[0].process.join()
        with pytest.raises(UserError, match="no such file or folder"):
            pool.submit(fields(1))
    with ParserPool("none", 1) as pool:
        pool._workers[0].process.kill()
        pool._workers[0].process.join()
        with pytest.raises(UserError, match="a parser worker ended by signal 9"):
            pool.submit(fields(1))


def test_what_fails_in_a_worker_is_told_whatever_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """An OSError too, which means elsewhere that nobody is there any more to tell."""

    def load(*_: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(pool_module, "load_parser", load)
    (told,) = pool_module._answers(SimpleQueue(), None, "cpu")
    assert isinstance(told, str) and told.endswith("OSError: the disk is gone\n")


def test_few_compiled_products_are_kept_by_who_parses_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")  # the user's
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    with pool_module.lean_memory():
        assert (os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"], os.environ["LRU_CACHE_CAPACITY"]) == ("32", "7")
    assert "ONEDNN_PRIMITIVE_CACHE_CAPACITY" not in os.environ and os.environ["LRU_CACHE_CAPACITY"] == "7"


def test_memory_is_given_back_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed = []
    monkeypatch.setattr(pool_module, "_trim", trimmed.append)
    parse_unit = UnitParser(load_parser("none"))
    assert [parse_unit(fields(1)).table.num_rows for _ in range(17)] == [1] * 17
    assert len(trimmed) == 2


def test_no_worker_outlives_a_parent_that_was_killed() -> None:
    code = (
        "import time\nfrom mta_ds.spans.pool import ParserPool\n"
        "if __name__ == '__main__':\n"
        "    pool = ParserPool('none', 2)\n"
        "    print(*(worker.process.pid for worker in pool._workers), flush=True)\n"
        "    time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 300
    while any(Path(f"/proc/{pid}").exists() and _state(pid) != "Z" for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


@pytest.mark.parametrize("num_shards", [2, 8])
def test_bytes_do_not_depend_on_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_shards: int) -> None:
    """Of shards that are long enough for workers each, and of such that are only together."""
    monkeypatch.setattr(rows_module, "FIELDS_AT_ONCE", 5)
    source = tmp_path / "a.jsonl"
    lines = [json.dumps({"id": field.record_id, "text": field.text}) for field in fields(80)]
    source.write_text("\n".join([*lines, "bad"]) + "\n")
    stores = []
    for workers in (1, 3):
        output = tmp_path / str(workers)
        config = ParseConfig(inputs=(str(source),), output=output, num_shards=num_shards, workers=workers)
        parse(config.model_copy(update={"max_reject_share": 0.5}))
        stores.append({path.name: path.read_bytes() for path in output.iterdir() if path.is_file()})
    assert stores[0] == stores[1]


def test_a_gpu_has_one_worker_and_a_cpu_one_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    for device, workers, expected in (("cpu", None, 3), ("cuda", None, 1), ("cuda", 2, 2)):
        with open_pool(load_parser("none"), "none", workers, device) as pool:
            assert pool._num_workers == expected


def test_workers_start_for_many_short_inputs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the shards of one task are: what this process has parsed alone adds up over them."""
    started = []

    class Pool(ParserPool):
        def __init__(self, spec: str | None, num_workers: int, device: str) -> None:
            started.append((num_workers, device))
            super().__init__(spec, num_workers, device)

    monkeypatch.setattr(pool_module, "ParserPool", Pool)
    units = [[field] for field in fields(6)]
    with open_pool(load_parser("none"), "none", 2) as pool:
        for first, expected in ((0, []), (2, []), (4, [(2, "cpu")])):
            found = [parsed.table["record_id"].to_pylist() for parsed in pool.map(units[first : first + 2])]
            assert found == [[f"r{first}"], [f"r{first + 1}"]] and started == expected


def test_parsers_that_know_no_gpu_have_a_worker_a_core_beside_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = []

    def opened(*arguments):
        devices.append(arguments[-1])
        return open_pool(*arguments)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(parse_module, "open_pool", opened)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "One."}))
    parse(ParseConfig(inputs=(str(tmp_path / "a.jsonl"),), output=tmp_path / "s", parser="none"))
    assert devices == ["cpu"]


def test_on_a_gpu_another_process_parses_what_is_not_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that this one reads and writes in the meantime."""
    started = []

    class Pool(ParserPool):
        def __init__(self, spec: str | None, num_workers: int, device: str) -> None:
            started.append((num_workers, device))
            super().__init__(spec, num_workers, "cpu")

    monkeypatch.setattr(pool_module, "ParserPool", Pool)
    units = [[field] for field in fields(3)]
    for number, workers in ((1, []), (3, [(1, "cuda")])):
        with open_pool(load_parser("none"), "none", None, "cuda") as pool:
            assert [parsed.table.num_rows for parsed in pool.map(iter(units[:number]))] == [1] * number
        assert started == workers


def test_status_and_merge(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"id": f.record_id, "text": f.text}) + "\n" for f in fields(9)))
    config = ParseConfig(inputs=(str(source),), output=tmp_path / "s", num_shards=3, parser="none")
    with pytest.raises(UserError, match="no span store"):
        status(config.output)
    parse(config, 1)
    assert "2 of 3 parts are missing: 0,2" in status(config.output)
    with pytest.raises(UserError, match=r"2 of 3 parts are missing: 0,2; nothing to merge yet"):
        merge_only(config)
    parse(config, 0)
    parse(config, 2)
    (config.output / "manifest.json").unlink()
    assert "all 3 parts are there\nno manifest yet" in status(config.output)
    assert merge_only(config).counts.records == 9
    assert "the manifest is written" in status(config.output)


def test_units_of_work_are_cut_by_texts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "FIELDS_AT_ONCE", 4)
    monkeypatch.setattr(rows_module, "CHARS_AT_ONCE", 100)
    units = list(batches([Field("a", "text", "x" * n) for n in (10, 10, 10, 10, 60, 60, 200, 1)]))
    assert [len(unit) for unit in units] == [4, 2, 1, 1]
