import dataclasses
import itertools
import multiprocessing
import os
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock
from helpers import json_lines
from tokenizers import normalizers

from kdkit import DistillConfig
from kdkit.config import DataFields, UsageError
from kdkit.data import Rows, Steps, batches, chat, collate, count_tokens, empty_row, load_rows, pack
from kdkit.data.__main__ import main
from kdkit.data.chat import make_rows
from kdkit.data.records import Document
from kdkit.data.sources import open_sources
from kdkit.losses import IGNORE_INDEX
from kdkit.models import BodyAndHead, load_teacher, load_tokenizer
from kdkit.running import files

CHATML = "{% for m in messages %}<|bos|>{{ m['role'] }}\n{{ m['content'] }}<|eos|>\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DistillConfig())


def rows_of(texts, tokenizer, max_length):
    documents = [Document(row, text) for row, text in enumerate(texts)]
    return Rows.of([row for rows, _ in make_rows(documents, tokenizer, max_length) for row in rows])


def words(path, count=200):
    return str(json_lines(path, *({"text": f"text number {i} " * (i % 7 + 1)} for i in range(count))))


def messages(*answers):
    return {"messages": [{"role": r, "content": c} for c in answers for r in ("user", "assistant")]}


@pytest.mark.parametrize("pack_tokens, filled", [(10**6, 0.9), (500, 0.85)])  # 500 are few rows to choose from
def test_packing_keeps_every_row_and_fills_the_rows(small, tokenizer, monkeypatch, pack_tokens, filled):
    monkeypatch.setattr(batches, "PACK_TOKENS", pack_tokens)
    monkeypatch.setattr(batches, "CACHE_VERSION", pack_tokens)  # not the rows of the other case
    config = small(max_train_tokens=20000, max_length=128, packing=False)
    rows, packed = (load_rows(dataclasses.replace(config, packing=p), tokenizer)[0] for p in (False, True))
    assert batches.row_lengths(packed).max() <= 128 and batches.row_lengths(packed).mean() > filled * 128

    def documents(rows):
        for row in rows:
            starts = [i for i, position in enumerate(row["position_ids"]) if position == 0]
            for start, end in zip(starts, [*starts[1:], len(row["position_ids"])], strict=True):
                yield row["input_ids"][start:end], row["labels"][start:end], row["position_ids"][start:end]

    assert sorted(documents(packed)) == sorted(documents(rows))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_document_in_a_packed_row_has_the_same_hidden_states_as_alone(tokenizer, attention):
    model = load_teacher("embedded", torch.float32)
    model.set_attn_implementation(attention)
    rows = rows_of(["import os\nimport sys", "class Lock: a primitive lock", "raise ValueError"], tokenizer, 64)
    batch = collate(pack(rows, 64), tokenizer.pad_token_id, length=80)  # with padding at the end
    assert batch["input_ids"].shape == (1, 80)
    with torch.no_grad():
        packed = BodyAndHead(model)(batch, lambda hidden, head: hidden)[0]
        start = 0
        for row in sorted(rows, key=lambda row: -len(row["input_ids"])):
            alone = BodyAndHead(model)(collate([row], 0), lambda hidden, head: hidden)[0]
            torch.testing.assert_close(packed[start : start + len(alone)], alone, rtol=1e-4, atol=1e-5)
            start += len(alone)


def test_rows_from_the_cache_behave_like_a_list(small, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "PACK_TOKENS", 500)
    rows, _ = load_rows(small(dataset=words(tmp_path / "a.jsonl"), packing=False), tokenizer)
    assert rows.table.column("labels").num_chunks > 3
    as_list = list(rows)
    assert rows[1::3] == as_list[1::3] and rows[-1] == as_list[-1] and len(rows) == len(as_list)
    with pytest.raises(IndexError):
        rows[len(rows)]
    for function in (batches.row_lengths, batches.loss_tokens):
        assert np.array_equal(function(rows), function(as_list))
    assert batches.loss_tokens(rows).tolist() == [
        sum(label != IGNORE_INDEX for label in row["labels"]) for row in as_list
    ]
    assert batches.loss_tokens(rows).sum() == count_tokens(rows) == count_tokens(as_list)
    assert batches.loss_tokens([]).tolist() == [] and count_tokens([]) == 0


def test_the_digest_of_rows_changes_with_content_and_order_only(tokenizer):
    rows = list(rows_of([f"number {i} " * (i % 9 + 1) for i in range(20)], tokenizer, 64))
    digests = {batches.rows_digest(other) for other in (rows, rows[1:], rows[::-1], [*rows[1:], rows[0]])}
    for key in rows[0]:
        changed = [{**row, key: [*row[key][:-1], row[key][-1] + 1]} for row in rows[:1]] + rows[1:]
        digests.add(batches.rows_digest(changed))
    joined = {key: rows[0][key] + rows[1][key] for key in rows[0]}
    digests.add(batches.rows_digest([joined, *rows[2:]]))
    assert len(digests) == 8 and batches.rows_digest(Rows.of(rows)) in digests


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
def test_a_step_has_the_same_rows_for_any_ranks_and_micro_batches(small, count):
    rows = numbered_rows(count)
    (complete,) = steps_of(small, rows, micro=8, accumulation=1, max_steps=7)
    for micro, accumulation, ranks in ((1, 8, 1), (2, 4, 1), (4, 1, 2), (2, 2, 2), (1, 2, 4)):
        cut = steps_of(small, rows, micro=micro, accumulation=accumulation, ranks=ranks, max_steps=7)
        for step in range(len(complete)):
            seen = sorted(row for rank in cut for row in rows_seen(rank, step))
            assert seen == sorted(rows_seen(complete, step))
            assert len({len(rank[step]) for rank in cut}) == 1  # as many micro-batches on every rank


def test_an_epoch_has_each_row_once_in_an_order_that_depends_on_the_epoch_only(small):
    (steps,) = steps_of(small, numbered_rows(19), micro=4, accumulation=2, max_steps=6)
    found = [steps.step_rows(step) for step in range(6)]
    epochs = [sum(found[:3], []), sum(found[3:], [])]  # noqa: RUF017
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(19)) and epochs[0] != epochs[1]
    assert [steps.step_rows(step) for step in reversed(range(6))] == found[::-1]


def test_the_number_of_steps_is_max_steps_or_follows_from_num_epochs(small):
    rows = numbered_rows(20)
    assert len(steps_of(small, rows, micro=4, accumulation=2, max_steps=None, num_epochs=2.5)[0]) == 8
    assert len(steps_of(small, rows, micro=4, accumulation=2, max_steps=5, num_epochs=2.5)[0]) == 5
    with pytest.raises(IndexError):
        steps_of(small, rows, micro=4, accumulation=2, max_steps=5)[0][5]


def test_prefetched_steps_are_the_steps_and_an_error_in_making_one_is_raised(small):
    (steps,) = steps_of(small, numbered_rows(9), micro=2, accumulation=2, max_steps=7)
    made = list(steps.prefetched(2))
    assert [batch["row_ids"] for step in made for batch in step] == [
        batch["row_ids"] for index in range(2, 7) for batch in steps[index]
    ]
    assert list(steps.prefetched(7)) == []
    steps.pad_token_id = None  # cannot be padded with
    with pytest.raises(RuntimeError, match="NoneType"):
        list(steps.prefetched(0))


@pytest.mark.parametrize("on_gpu", [False, True])
def test_batch_says_where_documents_start_and_which_tokens_are_in_the_loss(small, monkeypatch, on_gpu):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    rows = pack([{**row, "labels": [IGNORE_INDEX, *row["labels"][1:]]} for row in numbered_rows(40)], 70)
    steps = Steps(rows, small(batch_size=3, max_length=70), 0, on_gpu=on_gpu)
    for batch in (batch for index in range(len(steps)) for batch in steps[index]):
        length = batch["labels"].shape[1]
        assert not on_gpu or length in (64, 70)
        assert torch.equal(batch["labels"].flatten()[batch["valid"]], batch["labels"][batch["labels"] != IGNORE_INDEX])
        starts = batch["cu_seq_lens"].tolist()
        for start, end in itertools.pairwise(starts):
            assert batch["position_ids"].flatten()[start:end].tolist() == list(range(end - start))
        assert starts[0] == 0 and starts[-1] == batch["labels"].numel()
        assert batch["max_length"] == max(end - start for start, end in itertools.pairwise(starts))


def test_row_ids_are_the_rows_of_a_micro_batch_and_empty_for_padding(small):
    rows = numbered_rows(9)
    for rank in steps_of(small, rows, micro=2, accumulation=2, ranks=2, max_steps=2):
        for batch in (batch for step in range(2) for batch in rank[step]):
            expected = collate([rows[row] for row in batch["row_ids"]] or [empty_row(0)], 0)
            torch.testing.assert_close({key: batch[key] for key in expected}, expected, rtol=0, atol=0)
    assert [batch["row_ids"] for batch in rank[1]] == [[]]  # 8 of the 9 rows are in step 0; rank 1 has none in step 1


def test_the_useful_share_is_what_the_batches_hold(small):
    rows = numbered_rows(19)
    ranks = steps_of(small, rows, micro=3, accumulation=2, ranks=2, max_steps=2)
    labels = [batch["labels"] for rank in ranks for step in range(2) for batch in rank[step]]
    filled = [batch for batch in labels if (batch != IGNORE_INDEX).any()]
    share = sum((batch != IGNORE_INDEX).sum().item() for batch in filled) / sum(batch.numel() for batch in filled)
    assert ranks[0].useful_share() == pytest.approx(share)


def test_limits_are_reached_by_less_than_a_row_and_the_text_does_not_depend_on_the_seed(small, tokenizer):
    train, held_out = load_rows(small(max_train_tokens=2000, max_eval_tokens=500, seed=1), tokenizer)
    assert 2000 <= batches.row_lengths(train).sum() < 2064 and 500 <= batches.row_lengths(held_out).sum() < 564
    again = load_rows(small(max_train_tokens=2000, max_eval_tokens=500, seed=2), tokenizer)
    assert [list(rows) for rows in again] == [list(train), list(held_out)]


@pytest.mark.parametrize("dataset", ["embedded", "a.jsonl"])
def test_training_and_held_out_rows_have_no_document_in_common(small, tokenizer, tmp_path, monkeypatch, dataset):
    monkeypatch.chdir(tmp_path)
    json_lines(tmp_path / "a.jsonl", *({"text": f"sample {i}"} for i in range(300)))
    config = small(dataset=dataset, packing=False, max_length=512, max_train_tokens=None, max_eval_tokens=None)
    train, held_out = ({tuple(row["labels"]) for row in rows} for rows in load_rows(config, tokenizer))
    assert held_out and not train & held_out


@pytest.mark.parametrize(
    "records, fields, message",
    [
        ([{"messages": [{"role": "user", "content": "hi"}]}] * 40, {}, "nothing to learn .3. .*; 3. are left out"),
        ([{"text": ""}] * 40, {}, "nothing to learn .3. .*; 3. are left out"),
        ([{"text": "a b"}] * 2, {"eval_fraction": 0.01}, r"nothing to evaluate on .0 texts.*\(now 0\.01\)"),
    ],
)
def test_data_without_a_row_is_refused(small, tokenizer, tmp_path, monkeypatch, records, fields, message):
    monkeypatch.setattr(tokenizer, "chat_template", CHATML)
    monkeypatch.setattr(tokenizer.backend_tokenizer, "post_processor", None)
    file = json_lines(tmp_path / "a.jsonl", *records)
    with pytest.raises(UsageError, match=rf"a\.jsonl, split train has {message}"):
        load_rows(small(dataset=str(file), **fields), tokenizer)


def test_conversations_for_a_tokenizer_without_a_template_are_refused(small, tokenizer, tmp_path):
    with pytest.raises(UsageError, match=r"a\.jsonl.*has conversations.*no fast tokenizer with a chat template"):
        load_rows(small(dataset=str(json_lines(tmp_path / "a.jsonl", messages("x")))), tokenizer)
    file = str(json_lines(tmp_path / "b.jsonl", *[{"instruction": "a", "output": f"b {i}"} for i in range(40)]))
    with pytest.raises(UsageError, match="--text_column output --messages_column null --prompt_column null"):
        load_rows(small(dataset=file), tokenizer)
    learn = {"text_column": "output", "messages_column": None, "prompt_column": None}
    assert load_rows(small(dataset=file, **learn), tokenizer)[0].counts["kind"].startswith("texts of column output")


def test_what_was_cut_and_left_out_is_described(small, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHATML)
    records = [messages("word " * 60), messages("short"), {"messages": [{"role": "user", "content": "hi"}]}]
    config = small(
        dataset=str(json_lines(tmp_path / "a.jsonl", *records)), eval_dataset="embedded", max_train_tokens=None
    )
    line = batches.describe_rows(load_rows(config, tokenizer)[0], config)
    assert line.startswith("3 conversations of column messages: 1 have over 64 tokens") and "keep_start" in line
    assert "2 are left out" in line  # the long one's answer was cut off
    assert "raise max_length" not in line
    records[1:] = records[:1] * 2
    path = json_lines(tmp_path / "long.jsonl", *({**each, "id": i} for i, each in enumerate(records)))
    config = dataclasses.replace(config, dataset=str(path), truncation_mode="keep_end")
    line = batches.describe_rows(load_rows(config, tokenizer)[0], config)
    assert "3 have over 64 tokens (keep_end; these are most of them: raise max_length)" in line


def test_what_the_template_does_to_conversations_is_described(small, tokenizer, tmp_path, monkeypatch):
    reasoned = {"messages": [*messages("short")["messages"]]}
    reasoned["messages"][1]["reasoning_content"] = "hm"
    records = [messages("one"), reasoned, messages("two", "three")]
    fields = {"dataset": str(json_lines(tmp_path / "a.jsonl", *records)), "eval_dataset": "embedded"}
    config = small(chat_template_options={"end": False}, max_train_tokens=None, **fields)
    template = (
        CHATML.replace("<|eos|>\n", "{{ eos_token if end }}\n")
        + "{{ '' if end or add_generation_prompt else messages | length }}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    line = batches.describe_rows(load_rows(config, tokenizer)[0], config)
    for words in (
        "1 of 3: the chat template does not show all",
        "3 of 3: a turn of the assistant has no token that ends",
    ):
        assert words in line
    assert "1 of 3: a sample for each turn" in line
    config = dataclasses.replace(config, chat_template_options={"end": True})  # other rows, not those of the cache
    line = batches.describe_rows(load_rows(config, tokenizer)[0], config)
    assert " of 3: " in line and "no token that ends" not in line and "for each turn" not in line


@pytest.mark.parametrize("fields", [{}, {"streaming": True}, {"max_train_tokens": 4000}])
def test_several_processes_give_the_same_rows_as_one(small, tokenizer, tmp_path, monkeypatch, fields):
    fields = {"dataset": words(tmp_path / "a.jsonl", 1500), "max_train_tokens": 10**9, **fields}
    one, _ = load_rows(small(num_proc=1, **fields), tokenizer)
    monkeypatch.setattr(batches, "CACHE_VERSION", "other")
    monkeypatch.setattr(chat, "BLOCKS_ALONE", 1)
    two, _ = load_rows(small(num_proc=2, **fields), tokenizer)
    assert batches.rows_digest(one) == batches.rows_digest(two) and one.counts == two.counts


def test_a_mistake_found_in_another_process_is_one_line(small, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(chat, "BLOCKS_ALONE", 1)
    refuse = "{% if messages[0].content == 'x' %}{{ raise_exception('no x') }}{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", CHATML + refuse)
    file = json_lines(tmp_path / "a.jsonl", *[messages("words")] * 1500, messages("x"))
    config = small(dataset=str(file), eval_dataset="embedded", num_proc=2, streaming=True, max_train_tokens=10**9)
    with pytest.raises(UsageError, match=r"row 1501: the chat template does not fit") as error:
        load_rows(config, tokenizer)
    assert "\n" not in str(error.value)


def test_every_field_of_the_data_changes_the_cache_and_evaluation_fields_only_the_held_out_rows(small, tokenizer):
    config = small(max_train_tokens=100)
    sources = [source._replace(held_out=None) for source in open_sources(config)]
    before = [batches.cache_folder(source, config, tokenizer) for source in sources]
    for field in dataclasses.fields(DataFields):
        other = False if field.name == "packing" else "other"  # None and True give the same rows
        changed = SimpleNamespace(**{**vars(config), field.name: other})
        after = [batches.cache_folder(source, changed, tokenizer) for source in sources]
        free, for_evaluation = field.metadata.get("may_change"), field.name.startswith(("eval_", "max_eval_"))
        assert (after[0] != before[0], after[1] != before[1]) == (not free and not for_evaluation, not free), field
    train = sources[0]
    for other in (train._replace(held_out=0.08), train._replace(held_out=0.1), train._replace(fingerprint="x")):
        assert batches.cache_folder(other, config, tokenizer) not in before


CHANGES = {
    "post_processor": lambda t: setattr(t.backend_tokenizer, "post_processor", None),
    "normalizer": lambda t: setattr(t.backend_tokenizer, "normalizer", normalizers.Lowercase()),
    "added_token": lambda t: t.add_tokens(["import"]),
    "special_token": lambda t: t.add_special_tokens({"extra_special_tokens": ["import"]}),
    "bos_token": lambda t: setattr(t, "bos_token", "<|pad|>"),
    "eos_token": lambda t: setattr(t, "eos_token", "<|pad|>"),
    "add_bos_token": lambda t: setattr(t, "add_bos_token", False),
    "add_eos_token": lambda t: setattr(t, "add_eos_token", True),
    "split_special_tokens": lambda t: setattr(t, "split_special_tokens", True),
    "chat_template": lambda t: setattr(t, "chat_template", CHATML),
    "chat_templates": lambda t: setattr(t, "chat_template", {"default": CHATML, "tool_use": "x"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_tokenizer_changes_the_cache_and_a_call_of_it_does_not(small, change):
    tokenizer, config = load_tokenizer(DistillConfig()), small()
    source, _ = open_sources(config)
    before = batches.cache_folder(source, config, tokenizer)
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=2)
    tokenizer.padding_side = "left"
    assert batches.cache_folder(source, config, tokenizer) == before
    CHANGES[change](tokenizer)
    assert batches.cache_folder(source, config, tokenizer) != before


def test_the_first_process_makes_the_rows_and_the_others_wait(small, tokenizer, tmp_path, monkeypatch):
    fork, make = multiprocessing.get_context("fork"), batches.tokenize
    calls, found = fork.Value("i", 0), fork.SimpleQueue()

    def counted(*arguments):
        with calls.get_lock():
            calls.value += 1
        time.sleep(0.2)  # the other process asks for the rows while they are made
        return make(*arguments)

    def load():
        train, _ = load_rows(config, tokenizer)
        found.put((batches.rows_digest(train), train.counts))

    monkeypatch.setattr(batches, "tokenize", counted)
    config = small(dataset=words(tmp_path / "a.jsonl"))
    ranks = [fork.Process(target=load) for _ in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    load()  # another run
    first, second, third = (found.get() for _ in range(3))
    assert first == second == third and calls.value == 2  # the training rows and the held-out ones
    words(tmp_path / "a.jsonl", 100)  # other content
    load()
    assert found.get() != first and calls.value == 4


@pytest.mark.parametrize("where, name", [(batches, "pack"), (batches, "publish"), (files, "remove")])
def test_a_kill_leaves_no_incomplete_cache_and_no_lock(small, tokenizer, tmp_path, monkeypatch, where, name):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    config = small(dataset=words(tmp_path / "a.jsonl", 1500), max_train_tokens=None, num_proc=2)

    def kill(*arguments):
        if name == "pack" and not multiprocessing.active_children():
            return pack(*arguments)  # to be killed while other processes tokenise
        os.kill(os.getpid(), signal.SIGKILL)

    def killed():
        monkeypatch.setattr(chat, "BLOCKS_ALONE", 1)
        monkeypatch.setattr(batches, "PACK_TOKENS", 100)
        monkeypatch.setattr(where, name, kill)
        load_rows(config, tokenizer)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join()
    (lock,) = (tmp_path / "cache/kdkit").glob("*.lock")
    assert process.exitcode == -signal.SIGKILL and not lock.with_suffix("").exists()
    with FileLock(lock, timeout=30):
        pass
    rows, _ = load_rows(config, tokenizer)
    assert rows.counts["samples"] > 1000 and rows.counts["tokens"] == batches.loss_tokens(rows).sum()


def test_a_full_disk_is_named_and_leaves_no_file(small, tokenizer, tmp_path, monkeypatch):
    config = small(dataset=words(tmp_path / "a.jsonl"))
    folder = batches.cache_folder(open_sources(config)[0], config, tokenizer)
    temporary = folder.with_name(f".writing_{folder.name}")
    temporary.mkdir(parents=True)
    (temporary / "rows.arrow").symlink_to("/dev/full")
    with pytest.raises(UsageError, match=r"the cache .* cannot be written .*No space left.*HF_HOME"):
        load_rows(config, tokenizer)
    assert not folder.exists() and not temporary.exists()
    assert load_rows(config, tokenizer)[0]
    assert {path.suffix for path in folder.iterdir()} == {".arrow", ".json"}  # nothing that runs code


def test_the_command_prints_the_data_and_its_first_rows_with_the_loss_marked(small, tokenizer, capsys, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text(CHATML)
    file = json_lines(tmp_path / "a.jsonl", messages("one"), messages("two"))
    main(["--dataset", str(file), "--eval_dataset", "embedded", "--chat_template", str(template)])
    printed = capsys.readouterr().out
    assert "2 conversations" in printed and "tokens in the loss" in printed and printed.count("\n---\n") == 1
    for word in ("one", "two"):
        assert f"<|bos|>user\n{word}<|eos|>\n<|bos|>assistant\n[{word}<|eos|>]" in printed
    with pytest.raises(SystemExit, match=r"kdkit: dataset nothing\.txt does not exist"):
        main(["--dataset", "nothing.txt"])
