import datetime
import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from helpers import json_lines
from huggingface_hub import errors

from kdkit.config import UsageError
from kdkit.data.sources import EMBEDDED, documents_of, open_sources

# --- datasets: what is read


def read(small, dataset, part="train", **fields):
    """The documents of a part. Nothing is held out unless `held_out` is given."""
    fields = fields if fields.pop("held_out", False) else {"eval_dataset": "embedded", **fields}
    return list(documents_of(open_sources(small(dataset=str(dataset), **fields))[part == "eval"]))


def turn(role, content):
    return {"role": role, "content": content}


def texts(found):
    return sorted(document.text for document in found)


def test_text_json_lines_and_parquet_are_read(small, tmp_path):
    (tmp_path / "a.txt").write_text("first\n\nand more")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/b.txt").write_text("first\n\nand more")
    for name in ("a.txt", "texts"):
        assert texts(read(small, tmp_path / name)) == ["first\n\nand more"]  # a file is one sample
    lines = json_lines(tmp_path / "b.jsonl", {"text": "second"}, {"text": "third"})
    assert texts(read(small, lines)) == ["second", "third"]
    for name, body in (("c.parquet", ["fourth", "fifth"]), ("d.parquet", ["sixth"])):
        datasets.Dataset.from_dict({"body": body}).to_parquet(tmp_path / name)
    fields = {"text_column": "body", "eval_dataset": str(tmp_path / "d.parquet")}
    assert texts(read(small, tmp_path / "c.parquet", **fields)) == ["fifth", "fourth"]


def test_a_folder_of_save_to_disk_is_read_and_not_the_json_in_it(small, tmp_path):
    parts = {"train": ["one", "two"], "test": ["three"]}
    saved = datasets.DatasetDict({split: datasets.Dataset.from_dict({"text": found}) for split, found in parts.items()})
    saved.save_to_disk(tmp_path / "both")
    saved["train"].save_to_disk(tmp_path / "one")
    for name in ("both", "one"):
        assert texts(read(small, tmp_path / name)) == ["one", "two"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_is_read_with_its_splits(small, tmp_path, streaming):
    json_lines(tmp_path / "train.jsonl", {"text": "one"}, {"text": "two"})
    json_lines(tmp_path / "test.jsonl", {"text": "three"})
    assert texts(read(small, tmp_path, streaming=streaming)) == ["one", "two"]
    assert texts(read(small, tmp_path, "eval", eval_dataset=None, eval_split="test", streaming=streaming)) == ["three"]


@pytest.mark.parametrize("streaming", [False, True])
def test_held_out_samples_are_in_no_other_part_and_stay_when_rows_are_appended(small, tmp_path, streaming):
    file = json_lines(tmp_path / "a.jsonl", *({"text": f"sample {i}"} for i in range(300)))
    train, held_out = (read(small, file, part, held_out=True, streaming=streaming) for part in ("train", "eval"))
    assert 10 < len(held_out) < 50 and texts(train + held_out) == sorted(f"sample {i}" for i in range(300))
    longer = json_lines(tmp_path / "longer.jsonl", *({"text": f"sample {i}"} for i in range(400)))
    assert set(texts(held_out)) <= set(texts(read(small, longer, "eval", held_out=True)))
    rows = [document.row for document in train]
    assert (rows == sorted(rows)) == streaming  # a stream keeps its order
    assert train == read(small, file, held_out=True, streaming=streaming, seed=5)


def test_a_single_text_has_its_end_held_out_between_two_words(small, tmp_path):
    (tmp_path / "a.txt").write_text("one two three four five six seven eight nine ten")
    (train,), (held_out,) = (
        read(small, tmp_path / "a.txt", part, held_out=True, eval_fraction=0.2) for part in ("train", "eval")
    )
    assert (train.text, held_out.text) == ("one two three four five six seven ", "eight nine ten")


def test_the_embedded_text_has_two_splits_of_different_modules(small):
    for fields in ({}, {"eval_split": "test"}, {"eval_dataset": "embedded"}):
        train, test = open_sources(small(**fields))
        assert train.name.endswith("split train") and test.name.endswith("split test")
    train, test = (read(small, "embedded", part, eval_dataset=None) for part in ("train", "eval"))
    assert len(train) > 6000 and sum(len(document.text) for document in train) > 1_500_000
    assert 0.03 < len(test) / len(train) < 0.15
    assert not set(texts(train)) & set(texts(test))
    files = (str(EMBEDDED / f"{split}.parquet") for split in ("train", "test"))
    sources = [set(datasets.Dataset.from_parquet(file)["source"]) for file in files]
    assert "asyncio/locks.py" in sources[0] and not sources[0] & sources[1]


def linked(name, target):
    Path(name).symlink_to(target)
    return name


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        lambda: {"eval_split": "train"},
        lambda: {"eval_dataset": "a.jsonl"},
        lambda: {"eval_dataset": "./a.jsonl"},
        lambda: {"eval_dataset": str(Path("a.jsonl").absolute())},
        lambda: {"eval_dataset": linked("link.jsonl", "a.jsonl")},
        lambda: {"eval_dataset": shutil.copy("a.jsonl", "copy.jsonl")},
        lambda: {"dataset": ".", "eval_dataset": "a.jsonl"},
        lambda: {"eval_dataset": "."},
    ],
)
def test_training_data_as_evaluation_data_is_refused(small, tmp_path, monkeypatch, fields, streaming):
    monkeypatch.chdir(tmp_path)
    json_lines(tmp_path / "a.jsonl", {"text": "x"})
    with pytest.raises(UsageError, match="is also the training data"):  # before the training data is tokenised
        open_sources(small(**{"dataset": "a.jsonl", "streaming": streaming, **fields()}))


@pytest.mark.parametrize(
    "train, held_out, overlap",
    [
        ("train", "train[:50%]", True),
        ("train[:60%]", "train[50%:]", True),
        ("train[:50%]", "train[50%:]", False),
        ("train[:150]", "train[100:]", True),
        ("train[:150]", "train[70%:]", True),
        ("train[:100]", "train[-100:]", False),
        ("train+test", "test", True),
        ("train", "test", False),
    ],
)
def test_splits_that_overlap_are_refused(small, tmp_path, train, held_out, overlap):
    for split, count in (("train", 200), ("test", 20)):
        json_lines(tmp_path / f"{split}.jsonl", *({"text": f"{split} {i}"} for i in range(count)))
    fields = {"dataset": str(tmp_path), "dataset_split": train, "eval_split": held_out}
    if overlap:
        with pytest.raises(UsageError, match="is also the training data"):
            open_sources(small(**fields))
    else:
        found = [texts(documents_of(source)) for source in open_sources(small(**fields))]
        assert found[0] and found[1] and not set(found[0]) & set(found[1])


def test_a_slice_of_a_longer_file_is_no_slice_of_the_evaluation_file(small, tmp_path):
    long = json_lines(tmp_path / "long.jsonl", *({"text": f"a {i}"} for i in range(200)))
    short = json_lines(tmp_path / "short.jsonl", *({"text": f"b {i}"} for i in range(20)))
    fields = {
        "dataset": str(long),
        "dataset_split": "train[100:150]",
        "eval_dataset": str(short),
        "eval_split": "train",
    }
    assert [len(list(documents_of(source))) for source in open_sources(small(**fields))] == [50, 20]
    with pytest.raises(UsageError, match=r"eval_dataset .*short\.jsonl .*test.*--dataset_split"):
        open_sources(small(**{**fields, "eval_split": "test"}))


def test_a_stream_is_read_no_further_than_needed(small, tmp_path):
    file = json_lines(tmp_path / "a.jsonl", *({"text": f"sample {i}"} for i in range(300)))
    source, seen = open_sources(small(dataset=str(file), eval_dataset="embedded", streaming=True))[0], []
    documents = documents_of(source._replace(samples=(seen.append(row) or row for row in source.samples)))
    assert [next(documents).text for _ in range(5)] == [f"sample {i}" for i in range(5)] and len(seen) == 5


def test_conversations_are_read(small, tmp_path):
    messages = [turn("user", "hi"), turn("assistant", "ho")]
    file = json_lines(tmp_path / "a.jsonl", {"messages": messages, "text": "not this"})
    assert [d.messages for d in read(small, file)] == [messages]
    file = json_lines(tmp_path / "b.jsonl", {"prompt": "hi", "completion": "ho"})
    assert [(d.messages, d.turns) for d in read(small, file)] == [(messages, [1])]
    file = json_lines(tmp_path / "c.jsonl", {"prompt": [*messages, messages[0]], "completion": messages[1:]})
    assert [(d.messages, d.turns) for d in read(small, file)] == [(messages * 2, [3])]
    file = json_lines(tmp_path / "d.jsonl", {"messages": messages, "text": "this"})
    assert texts(read(small, file, messages_column=None)) == ["this"]


def tool_call(**arguments):
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


@pytest.mark.parametrize("streaming", [False, True])
def test_json_lines_are_read_as_they_are(small, tmp_path, streaming):
    # Arrow would make dates and floats of these, in the order of the keys of the first row
    calls = [tool_call(date="2025-01-01", n=1), tool_call(n=1.5, date="2025-01-02"), tool_call(n=2, b={"c": []})]
    rows = [{"messages": [turn("user", "hi"), call], "other": i if i % 2 else "text"} for i, call in enumerate(calls)]
    (tmp_path / "a").mkdir()
    json_lines(tmp_path / "a/a.jsonl", *rows[:2])
    json_lines(
        tmp_path / "a/b.jsonl", {**rows[2], "more": 1}, {"messages": [turn("user", "x"), turn("assistant", "y")]}
    )
    found = {repr(document.messages[1]) for document in read(small, tmp_path / "a", streaming=streaming)}
    assert found == {repr(message) for message in [*calls, turn("assistant", "y")]}


def test_null_that_arrow_adds_is_removed_at_any_depth(small, tmp_path):
    calls = [tool_call(city="Oslo"), tool_call(day=None, at={"x": 1}), tool_call(at={"y": [{"z": 2}, {"w": 3}]})]
    tools = [[{"name": "f", "parameters": {name: {"enum": ["a"]}}}] for name in ("city", "day", "at")]
    rows = [{"messages": [turn("user", "hi"), call], "tools": tool} for call, tool in zip(calls, tools, strict=True)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    found = sorted(read(small, tmp_path / "a.parquet"), key=lambda document: document.row)
    del calls[1]["tool_calls"][0]["function"]["arguments"]["day"]
    assert [document.messages[1] for document in found] == calls and [document.tools for document in found] == tools
    dates = [{"messages": [turn("user", "hi"), tool_call(at=datetime.datetime(2025, 1, 1))]}]
    datasets.Dataset.from_list(dates).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(UsageError, match=r"row 1 has .*datetime.* was text before Arrow read it"):
        read(small, tmp_path / "b.parquet")


def test_tools_and_arguments_may_be_json_in_a_text(small, tmp_path):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"x": {"default": "null"}}}}]
    call = tool_call(x=[1, "é"])
    as_text = {**call, "tool_calls": [{"function": {"name": "f", "arguments": json.dumps({"x": [1, "é"]})}}]}
    file = json_lines(tmp_path / "a.jsonl", {"messages": [turn("user", "hi"), as_text], "tools": json.dumps(tools)})
    (document,) = read(small, file)
    assert document.tools == tools
    assert document.messages[1]["tool_calls"][0]["function"] == call["tool_calls"][0]["function"]
    file = json_lines(tmp_path / "b.jsonl", {"messages": [turn("user", "hi")]}, {"messages": [], "tools": tools})
    assert {document.row: document.tools for document in read(small, file)} == {0: None, 1: tools}  # not in row 1


@pytest.mark.parametrize("flag", ["weight", "train", "training", "loss"])
def test_a_turn_that_is_not_to_be_learned_is_context(small, tmp_path, flag):
    messages = [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")]
    for off, on in ((0, 1), (False, True), (0.0, 1.0), (0, None)):
        flagged = [{**messages[0], flag: off}, {**messages[1], flag: off}, messages[2], {**messages[3], flag: on}]
        (document,) = read(small, json_lines(tmp_path / "a.jsonl", {"messages": flagged}))
        assert document.messages == messages and document.turns == [3]
    for message in ({**messages[1], flag: 0.5}, {**messages[1], flag: "no"}, {**messages[0], flag: 1}):
        with pytest.raises(UsageError, match=rf"row 1 has .*{flag}.*, expected weight, .* only if the assistant"):
            read(small, json_lines(tmp_path / "a.jsonl", {"messages": [message]}))


def test_sharegpt_is_read(small, tmp_path):
    said = [("human", "a"), ("gpt", "b"), ("tool", "1"), ("assistant", "b"), ("user", "c")]
    conversation = [{"from": role, "value": value} for role, value in said]
    conversation += [{"from": "gpt", "value": "d", "weight": 0}]
    row = {"id": 7, "system": "be brief", "conversations": conversation, "tools": "[]"}
    source, _ = open_sources(small(dataset=str(json_lines(tmp_path / "a.jsonl", row)), eval_dataset="embedded"))
    (document,) = documents_of(source)
    roles = ["system", "user", "assistant", "tool", "assistant", "user", "assistant"]
    assert [message["role"] for message in document.messages] == roles and document.turns == [2, 4]
    assert [message["content"] for message in document.messages] == ["be brief", "a", "b", "1", "b", "c", "d"]
    for word in ("ShareGPT", "conversations", "tools", "system", "not read: id"):
        assert word in source.reading
    for role, value in (("bing", "x"), ("function_call", "{}"), ("human", None)):
        row = {"conversations": [{"from": role, "value": value}]}
        with pytest.raises(UsageError, match=f"row 1 has .*'{role}'"):
            read(small, json_lines(tmp_path / "b.jsonl", row))


def test_alpaca_is_read(small, tmp_path):
    rows = [{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Hi", "output": "Ho"}]
    rows += [{"instruction": "Hi", "input": "", "output": "Ho", "system": "be brief"}]
    file = json_lines(tmp_path / "a.jsonl", *rows)
    source, _ = open_sources(small(dataset=str(file), eval_dataset="embedded"))
    assert "Alpaca conversations of column instruction and output and input" in source.reading
    found = {document.row: (document.messages, document.turns) for document in documents_of(source)}
    assert found[0] == ([turn("user", "Add.\n\n1 2"), turn("assistant", "3")], [1])
    assert found[1] == ([turn("user", "Hi"), turn("assistant", "Ho")], [1])
    assert found[2][0][0] == turn("system", "be brief")  # a column that row 1 does not have
    with pytest.raises(UsageError, match="row 1 has None in column 'instruction'"):
        read(small, json_lines(tmp_path / "b.jsonl", {"instruction": None, "input": "x", "output": "y"}))


@pytest.mark.parametrize("streaming", [False, True])
def test_words_that_pandas_takes_for_missing_values_or_numbers_stay_text(small, tmp_path, streaming):
    words = ["None", "NA", "null", "nan", "007", "1.0", "1e5", "true", "a, b", "2025-01-01"]
    (tmp_path / "a.csv").write_text("text,n\n" + "".join(f'"{word}",1\n' for word in words))
    assert texts(read(small, tmp_path / "a.csv", streaming=streaming)) == sorted(words)
    (tmp_path / "b.csv").write_text("text\n007\n1.50\n")  # a column of numbers only
    assert texts(read(small, tmp_path / "b.csv", streaming=streaming)) == ["007", "1.50"]


def test_marks_and_line_ends_are_no_text(small, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    (tmp_path / "A.JSONL").write_bytes(b'\xef\xbb\xbf{"text": "one\\ntwo"}\r\n\r\n')
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbftext\r\n"one\ntwo"\r\n')
    for name in ("a.txt", "A.JSONL", "a.csv"):
        assert texts(read(small, tmp_path / name)) == ["one\ntwo"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
def test_a_file_that_is_not_utf8_is_named_with_the_position(small, tmp_path, name, encoding, streaming):
    lines = ["text", "two", "café"]
    if "json" in name:
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in lines]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_bytes("\n".join([*lines, ""]).encode(encoding))
    with pytest.raises(UsageError, match=rf"data/{name} is not UTF-8 .*position .*iconv") as error:
        read(small, tmp_path / "data", streaming=streaming)
    assert "\n" not in str(error.value)


def test_a_stream_that_breaks_late_is_one_line(small, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "x"}\n' * 800_000 + b'{"text": "caf\xe9"}\n')
    with pytest.raises(UsageError, match=r"a\.jsonl is not UTF-8 .*position 11200013"):
        for _ in documents_of(open_sources(small(dataset=str(file), eval_dataset="embedded", streaming=True))[0]):
            pass


USER = '{"role": "user", "content": "hi"}'


@pytest.mark.parametrize(
    "name, content, named",
    [
        ("a.txt", "", ["a.txt", "no file with text"]),
        ("a.jsonl", "", ["a.jsonl", "no file with text"]),
        ("a.jsonl", "\n\n", ["a.jsonl"]),
        ("a.txt", b"caf\xe9 " * 9, ["a.txt", "is not UTF-8", "position 3"]),
        ("a.jsonl", '{"text": "x"}\n{"text": ', ["a.jsonl", "row 2 is not valid JSON", '{"text": ']),
        ("a.jsonl", '{"text": "x"}\n\n[1]', ["a.jsonl", "row 3 has", "[1]", "expected a JSON object"]),
        ("a.jsonl", '{"body": "x"}', ["a.jsonl", "columns body", "--text_column (now text)"]),
        ("a.jsonl", '{"text": "x"}\n{"other": 1}', ["a.jsonl", "row 2", "'text'", "None"]),
        ("a.jsonl", '{"text": "x"}\n{"text": "half \\ud83d"}', ["a.jsonl", "row 2 is not valid JSON", "ud83d"]),
        ("a.csv", "text\nhello, world\n", ["a.csv", "row 1 has more fields than the header"]),
        ("a.csv", "id,text\n1\n2,x\n", ["a.csv", "row 1 has None"]),
        ("a.csv", 'id,text\n1,""\n2,x\n', ["a.csv", "row 1 has None"]),
        ("a.jsonl", '{"messages": [], "tools": "x"}', ["row 1", "expected JSON, not 'x'"]),
        ("a.jsonl", '{"messages": [], "tools": {"a": 1}}', ["row 1", "'tools'", "expected a list of definitions"]),
        ("a.jsonl", '{"text": 3}', ["row 1", "'text'", "has 3"]),
        ("a.md", "x", ["a.md", "no file with text", ".jsonl"]),
        ("a.jsonl", f'{{"messages": [{USER}, {{"role": "gpt", "content": "x"}}]}}', ["row 1", "roles system", "'gpt'"]),
        (
            "a.jsonl",
            '{"messages": [{"from": "narrator", "value": "x"}]}',
            ["row 1", "expected a list of messages", "'from'"],
        ),
        ("a.jsonl", '{"messages": "hi"}', ["row 1 expected JSON, not 'hi'"]),
        ("a.jsonl", '{"messages": [{"role": "user", "content": 3}]}', ["row 1", "'content': 3"]),
        ("a.jsonl", '{"prompt": 3, "completion": "x"}', ["row 1 has 3 in column 'prompt', expected"]),
        ("a.parquet", "PAR1", ["a.parquet"]),
    ],
)
def test_what_cannot_be_read_is_named(small, tmp_path, name, content, named):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError) as error:
        read(small, file)
    assert all(word in str(error.value) for word in named), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["nothing.txt", "no/such/folder", "./nothing", "/nothing"])
def test_a_missing_file_is_named(small, name):
    with pytest.raises(UsageError, match=f"dataset {name} does not exist"):
        read(small, name)


def test_a_folder_of_several_kinds_or_of_none_is_named(small, tmp_path):
    with pytest.raises(UsageError, match=r"has no file with text.*\.txt"):
        read(small, tmp_path)
    (tmp_path / "a.txt").write_text("x")
    json_lines(tmp_path / "b.jsonl", {"text": "x"})
    with pytest.raises(UsageError, match=r"several kinds \(json, text\)"):
        read(small, tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_split_that_is_not_there_or_empty_or_broken_is_named(small, tmp_path, streaming):
    file = json_lines(tmp_path / "a.jsonl", {"text": "x"})
    with pytest.raises(UsageError, match=r"a\.jsonl.*train.*--dataset_split"):
        read(small, file, dataset_split="test", streaming=streaming)
    file.write_text('{"text": "x"}\n{"text": ')
    with pytest.raises(UsageError, match=r"a\.jsonl.* row 2 is not valid JSON"):
        read(small, file, streaming=streaming)
    datasets.Dataset.from_dict({"text": []}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=r"a\.parquet.* (is empty|corresponds to no data)"):
        read(small, tmp_path / "a.parquet", streaming=streaming)


@pytest.mark.parametrize(
    "cause, said",
    [
        ("GatedRepoError", "is gated: ask for access at https://huggingface.co/datasets/some/data.*hf auth login"),
        ("RepositoryNotFoundError", "is neither a local path nor on the hub"),
        ("RevisionNotFoundError", "has no such revision"),
        (ConnectionError("refused\nagain"), r"could not be loaded: .*HF_HUB_OFFLINE is set"),
        (OSError(errno.ENOSPC, "No space left on device"), r"does not fit on the disk of .*HF_HOME"),
    ],
)
def test_what_the_hub_or_the_disk_refuses_is_told_in_one_line(small, monkeypatch, cause, said):
    def refuse(*_, **__):
        if isinstance(cause, Exception):
            raise cause
        response = SimpleNamespace(status_code=401, headers={}, request=None, url="", text="")
        raise getattr(errors, cause)("401 Client Error", response=response)

    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.hf_hub_download", refuse)
    with pytest.raises(UsageError, match=f"dataset some/data@v9 {said}") as error:
        read(small, "some/data@v9")
    assert "\n" not in str(error.value)
