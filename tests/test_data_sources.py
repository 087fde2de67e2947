import errno
from types import SimpleNamespace

import datasets
import pytest
from helpers import json_lines
from huggingface_hub import errors

from kdkit.config import UsageError
from kdkit.data.sources import EMBEDDED, documents_of, open_source

# --- datasets: what is read


def read(small, dataset, part="train", **fields):
    """The documents of a part. Nothing is held out unless `held_out` is given."""
    fields = fields if fields.pop("held_out", False) else {"eval_dataset": "embedded", **fields}
    return list(documents_of(open_source(small(dataset=str(dataset), **fields), part)))


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
    datasets.Dataset.from_dict({"body": ["fourth", "fifth"]}).to_parquet(tmp_path / "c.parquet")
    assert texts(read(small, tmp_path / "c.parquet", text_column="body")) == ["fifth", "fourth"]


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
        train, test = (open_source(small(**fields), part) for part in ("train", "eval"))
        assert train.name.endswith("split train") and test.name.endswith("split test")
    train, test = (read(small, "embedded", part, eval_dataset=None) for part in ("train", "eval"))
    assert len(train) > 6000 and sum(len(document.text) for document in train) > 1_500_000
    assert 0.03 < len(test) / len(train) < 0.15
    assert not set(texts(train)) & set(texts(test))
    files = (str(EMBEDDED / f"{split}.parquet") for split in ("train", "test"))
    sources = [set(datasets.Dataset.from_parquet(file)["source"]) for file in files]
    assert "asyncio/locks.py" in sources[0] and not sources[0] & sources[1]


@pytest.mark.parametrize("fields", [{"eval_split": "train"}, {"eval_dataset": "a.jsonl"}])
def test_training_data_as_evaluation_data_is_refused(small, tmp_path, monkeypatch, fields):
    monkeypatch.chdir(tmp_path)
    json_lines(tmp_path / "a.jsonl", {"text": "x"})
    with pytest.raises(UsageError, match="is also the training data"):
        read(small, "a.jsonl", held_out=True, **fields)


def test_a_stream_is_read_no_further_than_needed(small, tmp_path):
    file = json_lines(tmp_path / "a.jsonl", *({"text": f"sample {i}"} for i in range(300)))
    source, seen = open_source(small(dataset=str(file), eval_dataset="embedded", streaming=True), "train"), []
    documents = documents_of(source._replace(samples=(seen.append(row) or row for row in source.samples)))
    assert [next(documents).text for _ in range(5)] == [f"sample {i}" for i in range(5)] and len(seen) == 5


def test_conversations_are_read(small, tmp_path):
    messages = [turn("user", "hi"), turn("assistant", "ho")]
    file = json_lines(tmp_path / "a.jsonl", {"messages": messages, "text": "not this"})
    assert [d.messages for d in read(small, file)] == [messages]
    file = json_lines(tmp_path / "b.jsonl", {"prompt": "hi", "completion": "ho"})
    assert [(d.messages, d.learn_from) for d in read(small, file)] == [(messages, 1)]
    file = json_lines(tmp_path / "c.jsonl", {"prompt": [*messages, messages[0]], "completion": messages[1:]})
    assert [(d.messages, d.learn_from) for d in read(small, file)] == [(messages * 2, 3)]
    file = json_lines(tmp_path / "d.jsonl", {"messages": messages, "text": "this"})
    assert texts(read(small, file, messages_column=None)) == ["this"]


USER = '{"role": "user", "content": "hi"}'


@pytest.mark.parametrize(
    "name, content, named",
    [
        ("a.txt", "", ["a.txt", "no file with text"]),
        ("a.jsonl", "", ["a.jsonl", "no file with text"]),
        ("a.jsonl", "\n\n", ["a.jsonl"]),
        ("a.txt", b"caf\xe9 " * 9, ["a.txt", "utf-8", "position 3"]),
        ("a.jsonl", '{"text": "x"}\n{"text": ', ["a.jsonl", "JSON parse error", "in row 1"]),
        ("a.jsonl", '{"text": "x"}\n\n[1]', ["a.jsonl", "changed from object to array in row 1"]),
        ("a.jsonl", '{"body": "x"}', ["a.jsonl", "columns body", "--text_column (now text)"]),
        ("a.jsonl", '{"text": "x"}\n{"other": 1}', ["a.jsonl", "row 2", "'text'", "None"]),
        ("a.jsonl", '{"text": 3}', ["row 1", "'text'", "has 3"]),
        ("a.md", "x", ["a.md", "no file with text", ".jsonl"]),
        ("a.jsonl", f'{{"messages": [{USER}, {{"role": "gpt", "content": "x"}}]}}', ["row 1", "roles system", "'gpt'"]),
        (
            "a.jsonl",
            '{"messages": [{"from": "human", "value": "x"}]}',
            ["row 1", "expected a list of messages", "'from'"],
        ),
        ("a.jsonl", '{"messages": "hi"}', ["row 1", "'messages'", "has 'hi', expected"]),
        ("a.jsonl", '{"messages": [{"role": "user", "content": 3}]}', ["row 1", "'content': 3"]),
        ("a.jsonl", '{"prompt": 3, "completion": "x"}', ["row 1", "'prompt'", "has 3, expected"]),
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
    with pytest.raises(UsageError, match=r"a\.jsonl could not be loaded: JSON parse error.* in row 1"):
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
