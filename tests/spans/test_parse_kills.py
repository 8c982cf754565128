"""The parse stage killed at any moment, and by several tasks at once: the same bytes in the end."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from span_cases import PROCESSES, RightBranching, make_records, parts_of, start_parse, start_until_rename, write_rows

from mta_ds.spans import parse as module
from mta_ds.spans import rows as rows_module
from mta_ds.spans.log import read_paces
from mta_ds.spans.parse import ParseConfig, parse
from mta_ds.spans.parser import Parse, Sentence
from mta_ds.spans.store import SpanStore


def _undo(store: Path, part: int) -> None:
    """As if a part, and so the manifest, had not been made."""
    for path in (*store.glob(f"part-{part:05d}-*"), store / "manifest.json"):
        path.unlink(missing_ok=True)


def test_killed_twenty_times_at_random_moments_then_resumed_gives_the_same_bytes(
    tmp_path: Path, parser: RightBranching, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "FIELDS_AT_ONCE", 4)
    source = write_rows(tmp_path / "a.jsonl", [*make_records(30), "bad\n"])
    config = ParseConfig(inputs=(source,), output=tmp_path / "s", num_shards=3, max_reject_share=0.5)
    parse(config.model_copy(update={"output": tmp_path / "whole"}))
    chance = random.Random(7)
    num_killed = 0
    while num_killed < 20:
        child = start_parse(config, None, delay=0.005, killed_after=chance.uniform(0.0, 0.25))
        child.join()
        num_killed += child.exitcode == -signal.SIGKILL
        if child.exitcode == 0:  # it was faster: make it work again, or only merge
            _undo(config.output, chance.randrange(4))
    parse(config)
    assert parts_of(tmp_path / "s") == parts_of(tmp_path / "whole")
    assert [pace.records[-1] for pace in read_paces(tmp_path / "s", 3)] == [11, 10, 10]


def test_killed_while_several_workers_parse_then_resumed_gives_the_same_bytes(tmp_path: Path) -> None:
    """Each round ends as soon as another part is there: in the next one, in whatever the workers do by then."""
    rows = [{"id": f"r{i}", "text": f"Here is number {i}, or more. " * 120} for i in range(120)]
    source = write_rows(tmp_path / "a.jsonl", rows)
    config = ParseConfig(inputs=(source,), output=tmp_path / "s", num_shards=3, parser="none", workers=2)
    for index in range(2):
        child = PROCESSES.Process(target=parse, args=(config,))
        child.start()
        while not (config.output / f"part-{index:05d}-of-00003.json").is_file():
            assert child.exitcode is None
            time.sleep(0.01)
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
    alone = config.model_copy(update={"workers": 1})
    parse(alone)
    whole = alone.model_copy(update={"output": tmp_path / "whole"})
    parse(whole)
    assert parts_of(config.output) == parts_of(whole.output)


@pytest.mark.parametrize("before", [True, False])
def test_killed_around_every_rename_the_manifests_too(tmp_path: Path, parser: RightBranching, before: bool) -> None:
    source = write_rows(tmp_path / "a.jsonl", [*make_records(4), "bad\n"])
    config = ParseConfig(inputs=(source,), output=tmp_path / "whole", num_shards=2, max_reject_share=0.5)
    parse(config)
    with_manifest = set()
    for number in range(1, 100):
        config = config.model_copy(update={"output": tmp_path / str(number)})
        child = start_until_rename(config, number, before)
        child.join()
        with_manifest.add((config.output / "manifest.json").is_file())
        parse(config)
        assert parts_of(config.output) == parts_of(tmp_path / "whole")
        if child.exitcode == 0:
            break
    assert number > 9 and with_manifest == {True, False}


def test_two_tasks_on_each_shard_do_no_harm(tmp_path: Path, parser: RightBranching) -> None:
    source = write_rows(tmp_path / "a.jsonl", make_records(10))
    config = ParseConfig(inputs=(source,), output=tmp_path / "s", num_shards=2)
    children = [start_parse(config, index, delay=0.05) for index in (0, 0, 1, 1)]
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0, 0]
    assert (config.output / "manifest.json").is_file()  # whoever was last
    parse(config.model_copy(update={"output": tmp_path / "whole"}))
    assert parts_of(tmp_path / "s") == parts_of(tmp_path / "whole")


def test_the_first_to_finish_a_part_stays_whatever_another_makes_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One parser on two types of CPU, whose sums differ in their last digits: a few trees are others."""

    class Late(RightBranching):
        """While it parses, a task like its own begins and ends."""

        def parse(self, sentences: Sequence[Sentence]) -> list[Parse]:
            if not first:
                monkeypatch.setattr(module, "load_parser", lambda spec, device: RightBranching())
                first.extend([parse(config), parts_of(config.output)])
            return [Parse(("Y",) * len(sentence.words), ()) for sentence in sentences]

    first: list[object] = []
    source = write_rows(tmp_path / "a.jsonl", [*make_records(6), "bad\n"])
    config = ParseConfig(inputs=(source,), output=tmp_path / "s", max_reject_share=0.5, workers=1)
    monkeypatch.setattr(module, "load_parser", lambda spec, device: Late())
    assert parse(config) == first[0] is not None
    assert parts_of(config.output) == first[1]
    assert not list(config.output.glob(".*"))
    SpanStore.open(config.output, verify=True)
