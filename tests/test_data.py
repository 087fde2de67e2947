import itertools
import json
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import datasets
import pytest
import torch
from helpers import another, with_another

from kdkit import data
from kdkit.config import FIELDS, DataFields, UsageError
from kdkit.data import (
    Document,
    Steps,
    batches,
    collate,
    count_tokens,
    pack,
    row_lengths,
    tokenize_documents,
)
from kdkit.data.__main__ import main, show_row
from kdkit.data.batches import cached_rows
from kdkit.losses import IGNORE_INDEX
from kdkit.models import ASSETS, BodyAndHead, load_teacher, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    from kdkit import DistillConfig

    return load_tokenizer(DistillConfig())


def documents(*texts):
    return [Document(f"d{i}", text) for i, text in enumerate(texts)]


# --- rows


def test_packing_keeps_every_row_whole_and_fills_the_room(tokenizer):
    rows = tokenize_documents(data.embedded_documents()[2000:2300], tokenizer, 128)
    packed = pack(rows, 128)
    assert all(len(row["input_ids"]) <= 128 for row in packed)
    assert count_tokens(packed) == count_tokens(rows)
    assert sum(len(row["input_ids"]) for row in packed) / (128 * len(packed)) > 0.95
    starts = sum(row["position_ids"].count(0) for row in packed)
    assert starts == len(rows)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_document_in_a_pack_has_the_hidden_states_of_it_alone(tokenizer, attention):
    model = load_teacher("embedded", torch.float32)
    model.set_attn_implementation(attention)
    texts = documents("import os\nimport sys", "class Lock: a primitive lock", "raise ValueError")
    rows = tokenize_documents(texts, tokenizer, 64)
    batch = collate(pack(rows, 64), tokenizer.pad_token_id, length=80)  # with padding at the end
    assert batch["input_ids"].shape == (1, 80)
    with torch.no_grad():
        packed = BodyAndHead(model)(batch, lambda hidden, head: hidden)[0]
        start = 0
        for row in sorted(rows, key=lambda row: -len(row["input_ids"])):
            alone = BodyAndHead(model)(collate([row], 0), lambda hidden, head: hidden)[0]
            torch.testing.assert_close(packed[start : start + len(alone)], alone, rtol=1e-4, atol=1e-5)
            start += len(alone)


# --- steps


def numbered_rows(count):
    lengths = [1 + i % 5 for i in range(count)]
    return [{"input_ids": [i] * n, "labels": [i] * n, "position_ids": list(range(n))} for i, n in enumerate(lengths)]


def steps_of(small, rows, *, micro, accumulation, ranks=1, **fields):
    config = small(batch_size=micro, gradient_accumulation_steps=accumulation, **fields)
    return [Steps(rows, config, 0, rank, ranks) for rank in range(ranks)]


def rows_seen(steps, step):
    """The numbers of the rows of a step that have labels."""
    batches = steps[step]
    return [labels[0].item() for batch in batches for labels in batch["labels"] if (labels != IGNORE_INDEX).any()]


@pytest.mark.parametrize("count", [16, 19, 33])
def test_a_step_is_the_same_rows_however_it_is_cut(small, count):
    rows = numbered_rows(count)
    (whole,) = steps_of(small, rows, micro=8, accumulation=1, max_steps=7)
    for micro, accumulation, ranks in ((1, 8, 1), (2, 4, 1), (4, 1, 2), (2, 2, 2), (1, 2, 4)):
        cut = steps_of(small, rows, micro=micro, accumulation=accumulation, ranks=ranks, max_steps=7)
        for step in range(len(whole)):
            seen = sorted(row for rank in cut for row in rows_seen(rank, step))
            assert seen == sorted(rows_seen(whole, step))
            assert len({len(rank[step]) for rank in cut}) == 1  # as many micro-batches on every rank


def test_an_epoch_has_each_row_once_and_another_order_than_the_last(small):
    rows = numbered_rows(19)
    (steps,) = steps_of(small, rows, micro=4, accumulation=2, max_steps=6)
    epochs = [[row for step in range(e * 3, e * 3 + 3) for row in steps.step_rows(step)] for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(19))
    assert epochs[0] != epochs[1]


def test_steps_can_be_asked_for_in_any_order(small):
    (steps,) = steps_of(small, numbered_rows(20), micro=4, accumulation=1, max_steps=12)
    forwards = [steps.step_rows(i) for i in range(12)]
    assert [steps.step_rows(i) for i in reversed(range(12))] == forwards[::-1]


def test_epochs_or_steps(small):
    rows = numbered_rows(20)
    assert len(steps_of(small, rows, micro=4, accumulation=2, max_steps=None, num_epochs=2.5)[0]) == 8
    assert len(steps_of(small, rows, micro=4, accumulation=2, max_steps=5, num_epochs=2.5)[0]) == 5
    with pytest.raises(IndexError):
        steps_of(small, rows, micro=4, accumulation=2, max_steps=5)[0][5]


def test_the_useful_share_is_what_the_batches_hold(small):
    rows = numbered_rows(19)
    ranks = steps_of(small, rows, micro=3, accumulation=2, ranks=2, max_steps=2)
    labels = [batch["labels"] for rank in ranks for step in range(2) for batch in rank[step]]
    filled = [batch for batch in labels if (batch != IGNORE_INDEX).any()]
    share = sum((batch != IGNORE_INDEX).sum().item() for batch in filled) / sum(batch.numel() for batch in filled)
    assert ranks[0].useful_share() == pytest.approx(share)


# --- a run's data


def test_limits_are_kept_and_the_text_does_not_change_with_the_seed(small, tokenizer):
    train, held_out = data.load_rows(small(max_train_tokens=2000, max_eval_tokens=500, seed=1), tokenizer)
    assert 2000 <= sum(len(r["input_ids"]) for r in train) < 2064
    assert 500 <= sum(len(r["input_ids"]) for r in held_out) < 564
    assert data.load_rows(small(max_train_tokens=2000, max_eval_tokens=500, seed=2), tokenizer) == (train, held_out)


def json_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_a_text_too_small_to_hold_some_out_is_named(small, tokenizer, tmp_path):
    file = json_lines(tmp_path / "two.jsonl", {"text": "a b"}, {"text": "c d"})
    with pytest.raises(UsageError, match=r"two\.jsonl, split train, leaves no held-out sample.*eval_split"):
        data.load_rows(small(dataset=file, eval_fraction=0.01), tokenizer)


def chat(*answers):
    return {"messages": [{"role": r, "content": c} for c in answers for r in ("user", "assistant")]}


CHATML = "{% for m in messages %}<|bos|>{{ m['role'] }}\n{{ m['content'] }}<|eos|>\n{% endfor %}"


def test_conversations_become_rows_and_eval_data_is_another_split(small, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHATML)
    json_lines(tmp_path / "train.jsonl", *(chat(f"answer {i}", "more") for i in range(9)))
    json_lines(tmp_path / "test.jsonl", chat("held out"))
    train, held_out = data.load_rows(small(dataset=str(tmp_path), eval_split="test"), tokenizer)
    assert train.counts["samples"] == 9 and held_out.counts["samples"] == 1
    labels = [label for label in held_out[0]["labels"] if label != IGNORE_INDEX]
    assert tokenizer.decode(labels) == "held out<|eos|>"
    assert count_tokens(train) == sum(label != IGNORE_INDEX for row in train for label in row["labels"])


@pytest.mark.parametrize("fields", [{"eval_split": "test"}, {"eval_dataset": "embedded"}])
def test_what_is_trained_on_is_not_evaluated_on(small, tokenizer, tmp_path, fields):
    with pytest.raises(UsageError, match="is what is trained on"):
        data.load_rows(small(**fields), tokenizer)
    file = json_lines(tmp_path / "a.jsonl", {"text": "x"})
    with pytest.raises(UsageError, match="is what is trained on"):
        data.load_rows(small(dataset=file, eval_split="train"), tokenizer)


@pytest.mark.parametrize("records", [[{"messages": [{"role": "user", "content": "hi"}]}] * 40, [{"text": ""}] * 40])
def test_a_dataset_with_nothing_to_learn_is_named(small, tokenizer, tmp_path, monkeypatch, records):
    monkeypatch.setattr(tokenizer, "chat_template", CHATML)
    monkeypatch.setattr(tokenizer.backend_tokenizer, "post_processor", None)
    file = json_lines(tmp_path / "a.jsonl", *records)
    with pytest.raises(UsageError, match=r"a\.jsonl, split train, has nothing to learn: of \d+ samples \d+"):
        data.load_rows(small(dataset=file), tokenizer)


def test_conversations_for_a_tokenizer_without_a_template_are_refused(small, tokenizer, tmp_path):
    with pytest.raises(UsageError, match=r"a\.jsonl.*has conversations.*no chat template"):
        data.load_rows(small(dataset=json_lines(tmp_path / "a.jsonl", chat("x"))), tokenizer)


def test_what_was_cut_and_dropped_is_told(small, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHATML)
    records = [chat("word " * 60), chat("short"), {"messages": [{"role": "user", "content": "hi"}]}]
    config = small(dataset=json_lines(tmp_path / "a.jsonl", *records), eval_dataset="embedded", max_train_tokens=None)
    rows, _ = data.load_rows(config, tokenizer)
    columns, long, dropped = data.describe_rows(rows, config)
    assert columns == "conversations of column messages"
    assert long.startswith("1 of 3 samples have over 64 tokens") and "keep_start" in long
    assert dropped == "2 of 3 samples are left out: nothing in them to learn"  # the long one's answer was cut off


UNIT = re.compile(r"unit\d{4}")


def units(tokenizer, rows):
    """The numbered words of rows, each of which stands in one document, or at one place of the only document."""
    return {unit for row in rows for unit in UNIT.findall(tokenizer.decode(row["input_ids"]))}


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
@pytest.mark.parametrize("packing", [True, False])
def test_training_and_held_out_rows_of_a_file_share_no_document(small, tokenizer, tmp_path, kind, packing):
    names = [f"unit{i:04d}" for i in range(300)]
    if kind == "jsonl":
        file = json_lines(tmp_path / "a.jsonl", *({"text": f"{name} and more words. " * 8} for name in names))
    else:
        file = str(tmp_path / "a.txt")
        Path(file).write_text("\n".join(names))
    config = small(dataset=file, packing=packing, max_train_tokens=None, max_eval_tokens=None)
    train, held_out = (units(tokenizer, rows) for rows in data.load_rows(config, tokenizer))
    assert not train & held_out
    assert len(train) > 200 and 10 < len(held_out) < 60 and len(train | held_out) > 250  # a cut may hide a word


def test_training_and_held_out_rows_of_the_embedded_text_share_no_source(small, tokenizer):
    sources = {}
    for document in data.embedded_documents():  # each starts with the name of what it documents
        sources.setdefault(document.text.split("\n")[0], set()).add(document.source)
    fields = dict(packing=False, truncation_mode="keep_start", max_train_tokens=40000, max_eval_tokens=20000)
    train, held_out = (
        {source for row in rows for source in sources[decode(tokenizer, row).split("\n")[0]]}
        for rows in data.load_rows(small(**fields), tokenizer)
    )
    assert not train & held_out and len(train) > 200 and len(held_out) > 20


def decode(tokenizer, row):
    return tokenizer.decode(row["input_ids"], skip_special_tokens=True)


# --- the cache


# The fields of data make other rows, and so does the teacher, whose tokenizer is used.
MAKE_NO_OTHER_ROWS = FIELDS.keys() - {field.name for field in fields(DataFields)} - {"teacher_model"} | {"num_proc"}
CONFIGS = """---
configs:
- {config_name: default, data_files: [{split: train, path: a.jsonl}, {split: test, path: b.jsonl}]}
- {config_name: other, data_files: [{split: train, path: b.jsonl}, {split: test, path: a.jsonl}]}
---
"""


def corpus(folder, name, count):
    """A folder of two files, each with texts, conversations, and prompts with completions, all of them twice."""

    def record(words, x):
        return {f"text{x}": words, f"messages{x}": chat(words, "more")["messages"], f"prompt{x}": f"{words}?",
                f"completion{x}": words}  # fmt: skip

    folder.mkdir()
    (folder / "README.md").write_text(CONFIGS)
    for file in ("a", "b"):
        texts = [f"{name} {file} {i} " * (i % 7 + 1) for i in range(count)]
        json_lines(folder / f"{file}.jsonl", *({**record(text, ""), **record(f"2 {text}", "2")} for text in texts))
    return str(folder)


def test_rows_of_other_fields_are_never_taken_from_the_cache(small, tokenizer, tmp_path, monkeypatch):
    """With a cache that holds the rows of other settings, every setting has the rows that it has with an empty one."""
    values = {
        "dataset": corpus(tmp_path / "other", "other", 300), "eval_dataset": str(tmp_path / "other"),
        "dataset_config": "other", "dataset_split": "test", "eval_split": "test", "text_column": "text2",
        "messages_column": "messages2", "prompt_column": "prompt2", "completion_column": "completion2",
        "chat_template": str(tmp_path / "other.jinja"), "teacher_model": str(tmp_path / "tokenizer"),
        "truncation_mode": "keep_end", "max_train_tokens": 1500, "max_eval_tokens": 200, "max_length": 32,
    }  # fmt: skip
    (tmp_path / "one.jinja").write_text(CHATML)
    (tmp_path / "other.jinja").write_text(CHATML.replace("|>{{", "|>the {{"))
    monkeypatch.setattr(tokenizer.backend_tokenizer, "post_processor", None)  # no <|bos|>
    tokenizer.save_pretrained(shutil.copytree(ASSETS / "embedded_teacher", tmp_path / "tokenizer"))
    base = small(dataset=corpus(tmp_path / "one", "one", 300), chat_template=str(tmp_path / "one.jinja"))
    kinds = {
        "texts": replace(base, messages_column=None, prompt_column=None),
        "conversations": base,
        "prompts": replace(base, messages_column=None),
    }

    def rows_of(config, cache):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / cache)
        return [list(rows) for rows in data.load_rows(config, load_tokenizer(config))]

    makes_others = set()
    for kind, config in kinds.items():
        expected = rows_of(config, "warm")
        for name in FIELDS:
            if name not in MAKE_NO_OTHER_ROWS:
                changed = replace(config, **{name: values.get(name, another(config, name))})
                cold = rows_of(changed, f"cold {kind} {name}")
                assert rows_of(changed, "warm") == cold, (kind, name)
                makes_others |= {name} if cold != expected else set()
        assert rows_of(config, "warm") == expected
    assert makes_others == set(FIELDS) - MAKE_NO_OTHER_ROWS
    config = replace(kinds["texts"], packing=False, targets_dir="stored")
    expected = rows_of(config, "all others")
    assert rows_of(with_another(config, *MAKE_NO_OTHER_ROWS), "all others again") == expected


def words(path, count=200):
    return json_lines(path, *({"text": f"text number {i} " * (i % 7 + 1)} for i in range(count)))


def test_a_dataset_is_tokenised_once_by_whoever_comes_first(small, tokenizer, tmp_path, monkeypatch):
    calls, make = [], batches.make_rows
    monkeypatch.setattr(batches, "make_rows", lambda *args: calls.append(1) or time.sleep(0.2) or make(*args))
    config = small(dataset=words(tmp_path / "a.jsonl"))
    with ThreadPoolExecutor(2) as pool:  # two ranks, and then another run
        found = list(pool.map(lambda rank: data.load_rows(config, tokenizer), range(2)))
    found.append(data.load_rows(config, tokenizer))
    assert len(calls) == 2  # the training rows and the held-out ones
    assert [list(train) for train, _ in found] == [list(found[0][0])] * 3
    assert all(train.counts == found[0][0].counts for train, _ in found)


@pytest.mark.parametrize("changed", ["content", "tokenizer", "max_length", "packing", "seed"])
def test_other_content_or_settings_are_tokenised_again(small, tokenizer, tmp_path, monkeypatch, changed):
    file = words(tmp_path / "a.jsonl")
    before, _ = data.load_rows(small(dataset=file), tokenizer)
    fields = {"max_length": {"max_length": 32}, "packing": {"packing": False}, "seed": {"seed": 7}}.get(changed, {})
    if changed == "content":
        words(tmp_path / "a.jsonl", 100)
    if changed == "tokenizer":
        monkeypatch.setattr(tokenizer.backend_tokenizer, "post_processor", None)  # no <|bos|>
    after, _ = data.load_rows(small(dataset=file, **fields), tokenizer)
    assert (list(after) == list(before)) == (changed == "seed")


def test_the_cache_is_arrow_and_nothing_that_runs_code(small, tokenizer, tmp_path):
    rows, _ = data.load_rows(small(dataset=words(tmp_path / "a.jsonl")), tokenizer)
    (file,) = rows.dataset.cache_files
    assert {path.suffix for path in Path(file["filename"]).parent.iterdir()} <= {".arrow", ".json", ".lock"}


def test_a_cache_with_no_room_is_named_and_leaves_nothing_that_looks_whole(small, tokenizer, tmp_path):
    config = small(dataset=words(tmp_path / "a.jsonl"))
    (written,) = data.load_rows(config, tokenizer)[0].dataset.cache_files
    file = Path(written["filename"])
    file.unlink()
    file.with_suffix(".writing").symlink_to("/dev/full")
    with pytest.raises(UsageError, match=r"does not fit on the disk of .*HF_HOME"):
        data.load_rows(config, tokenizer)
    assert not file.exists()
    file.with_suffix(".writing").unlink()
    assert data.load_rows(config, tokenizer)[0]


def load_until_killed(config, tokenizer, folder, moment):
    """Load rows in a child process, killed before its given opening for writing, or renaming, in a folder; whether it
    was."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    count = 0

    def kill(event, arguments):
        nonlocal count
        writes = event == "os.rename" or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if writes and str(arguments[0]).startswith(str(folder)):
            count += 1
            if count > moment:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        signal.alarm(60)  # seconds after which it hangs
        sys.addaudithook(kill)
        data.load_rows(config, tokenizer)
    finally:
        os._exit(0)


def test_rows_after_a_kill_at_any_moment_are_those_without_a_kill(small, tokenizer, tmp_path, monkeypatch):
    cache, prepared, config = tmp_path / "cache", tmp_path / "prepared", small(dataset=words(tmp_path / "a.jsonl"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    data.load_rows(replace(config, max_length=32), tokenizer)  # so that the dataset is there, and its rows are not
    shutil.copytree(cache, prepared)
    expected = [list(rows) for rows in data.load_rows(config, tokenizer)]
    for moment in itertools.count():
        shutil.rmtree(cache)
        shutil.copytree(prepared, cache)
        killed = load_until_killed(config, tokenizer, cache, moment)
        rows = data.load_rows(config, tokenizer)
        assert [list(part) for part in rows] == expected, moment
        assert [count_tokens(part) for part in rows] == [count_tokens(part) for part in expected], moment
        if not killed:
            break
    assert moment > 5  # of training and held-out rows each: the rows, their counts, a renaming


def test_rows_from_a_file_are_a_sequence_like_a_list(small, tokenizer, tmp_path):
    rows, _ = data.load_rows(small(dataset=words(tmp_path / "a.jsonl"), packing=False), tokenizer)
    as_list = list(rows)
    assert rows[1::3] == as_list[1::3] and rows[-1] == as_list[-1] and len(rows) == len(as_list)
    assert row_lengths(rows) == row_lengths(as_list) and count_tokens(rows) == count_tokens(as_list)
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_packing_in_parts_keeps_every_token(tokenizer, monkeypatch):
    rows = tokenize_documents(documents(*(f"number {i} " * (i % 9 + 1) for i in range(200))), tokenizer, 64)
    monkeypatch.setattr(batches, "PACK_TOKENS", 500)
    packed = list(batches._pack_in_parts(iter(rows), 64))
    assert len(packed) > len(pack(rows, 64)) * 0.95 and all(len(row["input_ids"]) <= 64 for row in packed)
    ids = sorted(i for row in rows for i in row["input_ids"])
    assert sorted(i for row in packed for i in row["input_ids"]) == ids


# --- a look


def test_a_row_is_shown_with_what_is_in_the_loss(small, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHATML)
    file = json_lines(tmp_path / "a.jsonl", chat("one"), chat("two"))
    (row,), _ = data.load_rows(small(dataset=file, eval_dataset="embedded", max_train_tokens=None), tokenizer)
    plain = show_row(row, tokenizer, colour=False)
    for word in ("one", "two"):
        assert f"<|bos|>user\n{word}<|eos|>\n<|bos|>assistant\n[{word}<|eos|>]" in plain
    assert plain.count("\n---\n") == 1
    coloured = show_row(row, tokenizer)
    assert "\033[32m<|eos|>\033[0m" in coloured and "\033[90m<|eos|>\033[0m" in coloured
    for escape in ("\033[32m", "\033[90m", "\033[0m"):
        coloured = coloured.replace(escape, "")
    assert coloured == plain.replace("[", "").replace("]", "")


def test_samples_are_printed_by_the_module(small, capsys, tmp_path):
    main(["--dataset", json_lines(tmp_path / "a.jsonl", *[{"text": "abc"}] * 60), "--max_length", "64"])
    printed = capsys.readouterr().out
    assert "tokens in the loss" in printed and "<|bos|>[abc<|eos|>]" in printed
    with pytest.raises(SystemExit, match=r"kdkit: dataset nothing\.txt does not exist"):
        main(["--dataset", "nothing.txt"])


def test_a_long_cache_has_every_row(tmp_path):
    """Rows are written a thousand at a time; none is lost between."""
    rows = [{"input_ids": [i], "labels": [i + 1], "position_ids": [0]} for i in range(2501)]
    kept = cached_rows(tmp_path / "rows.arrow", lambda: rows, Counter(), "text")
    assert [row["input_ids"] for row in kept] == [[i] for i in range(2501)]
