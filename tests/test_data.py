import json
import sysconfig

import pytest
import torch

from kdkit import data
from kdkit.config import UsageError
from kdkit.data import (
    Document,
    Steps,
    collate,
    count_tokens,
    local_documents,
    pack,
    split_documents,
    tokenize_documents,
)
from kdkit.losses import IGNORE_INDEX
from kdkit.models import BodyAndHead, load_teacher, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    from kdkit import DistillConfig

    return load_tokenizer(DistillConfig())


def documents(*texts):
    return [Document(f"d{i}", text) for i, text in enumerate(texts)]


# --- documents


def test_the_embedded_text_is_real_and_the_same_each_time():
    found = data.embedded_documents()
    assert found == data.embedded_documents.__wrapped__()
    assert len(found) > 4000 and sum(len(d.text) for d in found) > 1_500_000
    assert any("Acquire" in d.text and d.source == "asyncio/locks.py" for d in found)


def test_no_source_is_in_both_parts_and_the_split_does_not_depend_on_the_others():
    found = data.embedded_documents()
    train, held_out = split_documents(found, 0.08)
    assert len(train) + len(held_out) == len(found)
    assert not {d.source for d in train} & {d.source for d in held_out}
    assert not {d.text for d in train} & {d.text for d in held_out}
    assert split_documents(found[:1000], 0.08)[1] == [d for d in found[:1000] if d in set(held_out)]


def test_a_python_without_sources_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UsageError, match=r"sources.*--dataset"):
        data.embedded_documents.__wrapped__()


def test_a_single_document_has_its_end_held_out():
    (train,), (held_out,) = split_documents([Document("d", "one two three four five six seven eight nine ten")], 0.2)
    assert train.text + held_out.text == "one two three four five six seven eight nine ten"
    assert held_out.text == "eight nine ten"


def test_text_and_json_lines_are_read(tmp_path):
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "second"}) + "\n\n" + json.dumps({"text": "third"}) + "\n")
    assert [d.text for d in local_documents(tmp_path, "text")] == ["first", "second", "third"]


@pytest.mark.parametrize(
    "name, content, named",
    [
        ("a.txt", "", ["a.txt", "no text"]),
        ("a.txt", "  \n", ["a.txt", "no text"]),
        ("a.txt", b"\xff\xfe\x00", ["a.txt", "UTF-8"]),
        ("a.jsonl", '{"text": "x"}\n{"text": ', ["a.jsonl", "line 2", "not JSON"]),
        ("a.jsonl", '{"body": "x"}', ["line 1", "'text'", "body", "--text_column"]),
        ("a.jsonl", "[1]", ["line 1", "list"]),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, named):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError) as error:
        local_documents(file, "text")
    assert all(word in str(error.value) for word in named), str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"nothing\.txt does not exist"):
        local_documents(tmp_path / "nothing.txt", "text")


# --- rows


def test_each_token_is_the_label_of_the_one_before(tokenizer):
    (row,) = tokenize_documents(documents("def f(): pass"), tokenizer, 64)
    ids = tokenizer("def f(): pass")["input_ids"] + [tokenizer.eos_token_id]
    assert row["input_ids"] == ids[:-1] and row["labels"] == ids[1:]
    assert row["input_ids"][0] == tokenizer.bos_token_id and row["labels"][-1] == tokenizer.eos_token_id
    assert row["position_ids"] == list(range(len(ids) - 1))


def test_cutting_a_document_loses_no_label(tokenizer):
    (whole,) = tokenize_documents(documents("words and words " * 20), tokenizer, 1000)
    pieces = tokenize_documents(documents("words and words " * 20), tokenizer, 16)
    assert len(pieces) > 3 and all(len(piece["input_ids"]) <= 16 for piece in pieces)
    for key in ("input_ids", "labels"):
        assert [x for piece in pieces for x in piece[key]] == whole[key]


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


def test_the_end_of_text_is_learned_even_where_it_is_the_padding(tokenizer):
    eos = tokenizer.eos_token_id
    rows = tokenize_documents(documents("a", "a much longer text"), tokenizer, 64)
    batch = collate(rows, pad_token_id=eos)
    assert [(labels == eos).sum().item() for labels in batch["labels"]] == [1, 1]
    assert (batch["labels"][0] == IGNORE_INDEX).sum() == len(rows[1]["labels"]) - len(rows[0]["labels"])


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


# --- a run's data


def test_limits_are_kept_and_the_text_does_not_change_with_the_seed(small, tokenizer):
    train, held_out = data.load_rows(small(max_train_tokens=2000, max_eval_tokens=500, seed=1), tokenizer)
    assert 2000 <= sum(len(r["input_ids"]) for r in train) < 2064
    assert 500 <= sum(len(r["input_ids"]) for r in held_out) < 564
    assert data.load_rows(small(max_train_tokens=2000, max_eval_tokens=500, seed=2), tokenizer) == (train, held_out)


def test_a_text_too_small_to_hold_some_out_is_named(small, tokenizer, tmp_path):
    (tmp_path / "two.jsonl").write_text('{"text": "a b"}\n{"text": "c d"}\n')
    with pytest.raises(UsageError, match=r"two\.jsonl leaves no held-out text"):
        data.load_rows(small(dataset=str(tmp_path / "two.jsonl"), eval_fraction=0.01), tokenizer)
