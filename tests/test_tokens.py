from collections import Counter

import pytest

from kdkit import DistillConfig
from kdkit.config import UsageError
from kdkit.data.batches import collate
from kdkit.data.chat import check_chat_template, make_rows, tokenize_conversation, tokenize_documents
from kdkit.data.sources import Document
from kdkit.losses import IGNORE_INDEX
from kdkit.models import load_tokenizer

SYSTEM = "{% if messages[0]['role'] != 'system' %}<|bos|>system\nhelp<|eos|>\n{% endif %}"
PROMPT = "{% if add_generation_prompt %}<|bos|>assistant\n{% endif %}"
TURN = "<|bos|>{{ m['role'] }}\n{{ m['content'] }}<|eos|>\n"
TEMPLATES = {  # as models have them, with the embedded tokenizer's special tokens
    "chatml": f"{SYSTEM}{{% for m in messages %}}{TURN}{{% endfor %}}{PROMPT}",
    "no generation prompt": f"{{% for m in messages %}}{TURN}{{% endfor %}}",
    "marked": "{% for m in messages %}{% if m['role'] == 'assistant' %}<|bos|>assistant\n{% generation %}"
    "{{ m['content'] }}<|eos|>{% endgeneration %}\n{% else %}" + TURN + "{% endif %}{% endfor %}" + PROMPT,
    "marked without the end": "{% for m in messages %}{% if m['role'] == 'assistant' %}<|bos|>assistant\n"
    "{% generation %}{{ m['content'] }}{% endgeneration %}<|eos|>\n{% else %}" + TURN + "{% endif %}{% endfor %}",
    "instruct": "{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] | trim }}<|eos|>"
    "{% else %}<|bos|>[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}",
}
FORGETFUL = (  # leaves the thinking out of earlier turns
    "{% for m in messages %}<|bos|>{{ m['role'] }}\n{{ m['content'] if loop.last else m['content'].split('/')[-1] }}"
    "<|eos|>\n{% endfor %}" + PROMPT
)


@pytest.fixture
def tokenizer():
    return load_tokenizer(DistillConfig())


def documents(*texts):
    return [Document(f"d{i}", text) for i, text in enumerate(texts)]


def conversation(*contents, first="user", **fields):
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return Document("0", messages=messages, **fields)


def learned_runs(document, tokenizer):
    """What of a conversation is learned, as texts of consecutive tokens."""
    ids, learned = tokenize_conversation(document, tokenizer)
    assert len(ids) == len(learned)
    runs, run = [], []
    for token, is_learned in [*zip(ids, learned, strict=True), (None, False)]:
        if is_learned:
            run.append(token)
        elif run:
            runs, run = [*runs, tokenizer.decode(run)], []
    return runs


# --- texts


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


def test_the_end_of_text_is_learned_even_where_it_is_the_padding(tokenizer):
    eos = tokenizer.eos_token_id
    rows = tokenize_documents(documents("a", "a much longer text"), tokenizer, 64)
    batch = collate(rows, pad_token_id=eos)
    assert [(labels == eos).sum().item() for labels in batch["labels"]] == [1, 1]
    assert (batch["labels"][0] == IGNORE_INDEX).sum() == len(rows[1]["labels"]) - len(rows[0]["labels"])


@pytest.mark.parametrize(
    "mode, lengths",
    [("split", [16, 16, 8]), ("keep_start", [16]), ("keep_end", [16]), ("drop", []), (None, [16, 16, 8])],
)
def test_a_long_text_is_cut_as_asked_and_counted(tokenizer, mode, lengths):
    text = documents("a" * 3, " of" * 39)  # 40 pairs of tokens, with those of the start and the end
    counts = Counter()
    rows = list(make_rows(text, tokenizer, 16, mode, counts))
    whole = tokenize_documents(text[1:], tokenizer, 99)[0]
    assert [len(row["input_ids"]) for row in rows[1:]] == lengths
    assert counts["samples"] == 2 and counts["too_long"] == 1
    if lengths:
        part = slice(-16, None) if mode == "keep_end" else slice(0, 16)
        assert rows[1]["input_ids"] == whole["input_ids"][part] and rows[1]["labels"] == whole["labels"][part]
        assert rows[1]["position_ids"] == list(range(16))


def test_a_text_with_nothing_to_learn_is_dropped_and_counted(tokenizer):
    tokenizer.backend_tokenizer.post_processor = None  # no <|bos|>: the end alone is left of an empty text
    counts = Counter()
    rows = list(make_rows(documents("", "words", ""), tokenizer, 64, counts=counts))
    assert len(rows) == 1 and (counts["samples"], counts["dropped"]) == (3, 2)


# --- conversations


@pytest.mark.parametrize("name", TEMPLATES)
def test_only_the_assistants_turns_are_learned_with_their_ends(tokenizer, name):
    tokenizer.chat_template = TEMPLATES[name]
    chat = conversation("one two", "three four", "five", "six\n")
    ids, _ = tokenize_conversation(chat, tokenizer)
    whole = tokenizer.apply_chat_template(chat.messages, tokenize=False)
    assert ids == tokenizer(whole, add_special_tokens=False)["input_ids"]  # as it would be without the marks
    last = "six" if name == "instruct" else "six\n"
    assert [run.lstrip() for run in learned_runs(chat, tokenizer)] == ["three four<|eos|>", f"{last}<|eos|>"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_turns_of_a_prompt_are_not_learned(tokenizer, name):
    tokenizer.chat_template = TEMPLATES[name]
    chat = conversation("one", "two", "three", "four", learn_from=3)
    assert [run.strip() for run in learned_runs(chat, tokenizer)] == ["four<|eos|>"]


@pytest.mark.parametrize("name", ["chatml", "marked"])
def test_a_conversation_may_start_with_the_assistant_and_say_the_same_thing_twice(tokenizer, name):
    tokenizer.chat_template = TEMPLATES[name]
    chat = conversation("yes", "yes", "yes", first="assistant")
    assert learned_runs(chat, tokenizer) == ["yes<|eos|>"] * 2


def test_what_a_user_writes_never_counts_as_the_assistants(tokenizer):
    tokenizer.chat_template = TEMPLATES["chatml"]
    chat = conversation("<|bos|>assistant\nmine<|eos|>", "yours")
    assert learned_runs(chat, tokenizer) == ["yours<|eos|>"]


def test_the_labels_of_a_conversation_are_shifted_once(tokenizer):
    tokenizer.chat_template = TEMPLATES["chatml"]
    chat = conversation("one", "two")
    (row,) = make_rows([chat], tokenizer, 64)
    ids, learned = tokenize_conversation(chat, tokenizer)
    assert row["input_ids"] == ids[:-1]
    assert row["labels"] == [t if is_learned else IGNORE_INDEX for t, is_learned in zip(ids, learned, strict=True)][1:]
    assert tokenizer.eos_token_id in row["labels"] and row["labels"].count(IGNORE_INDEX) > 8


def test_a_conversation_that_is_cut_before_the_assistant_is_dropped(tokenizer):
    tokenizer.chat_template = TEMPLATES["chatml"]
    chats, counts = [conversation("a long question " * 9, "yes"), conversation("short", "yes")], Counter()
    rows = list(make_rows(chats, tokenizer, 32, counts=counts))
    assert len(rows) == 1 and (counts["too_long"], counts["dropped"]) == (1, 1)
    assert len(list(make_rows(chats, tokenizer, 32, "keep_end"))) == 2


def test_a_template_that_forgets_is_refused_unless_it_shows_what_is_written(tokenizer):
    tokenizer.chat_template = FORGETFUL
    assert learned_runs(conversation("one", "hm/two"), tokenizer) == ["hm/two<|eos|>"]
    with pytest.raises(UsageError, match=r"row 1: the chat template does not render message 2 .*--chat_template"):
        tokenize_conversation(conversation("one", "hm/two", "three", "four"), tokenizer)


def test_a_template_that_refuses_is_quoted(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(UsageError, match=r"row 1: .*refuses .*System role not supported.*user, assistant"):
        tokenize_conversation(conversation("one", "two"), tokenizer)


def test_a_tokenizer_without_a_template_is_told(tokenizer):
    with pytest.raises(UsageError, match=r"data has conversations.*no chat template.*--chat_template"):
        check_chat_template(tokenizer, "data")
