import itertools

import pytest

from kdkit import DistillConfig
from kdkit.config import UsageError
from kdkit.data import collate
from kdkit.data.chat import make_rows, tokenize_conversations
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
THINKING = (  # writes an empty thought before each answer, which is not in the generation prompt
    "{% for m in messages %}<|bos|>{{ m['role'] }}\n{{ '(hm)' if m['role'] == 'assistant' }}{{ m['content'] }}<|eos|>\n"
    "{% endfor %}"
)
FORGETFUL = (  # leaves the thinking out of earlier turns
    "{% for m in messages %}<|bos|>{{ m['role'] }}\n{{ m['content'] if loop.last else m['content'].split('/')[-1] }}"
    "<|eos|>\n{% endfor %}" + PROMPT
)


@pytest.fixture
def tokenizer():
    return load_tokenizer(DistillConfig())


def texts(*contents):
    return [Document(row, text) for row, text in enumerate(contents)]


def chat(*contents, first="user", **fields):
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return Document(0, messages=messages, **fields)


def rows_of(documents, *arguments):
    """All rows, with lists for arrays."""
    made = [row for rows, _ in make_rows(documents, *arguments) for row in rows]
    return [{key: values.tolist() for key, values in row.items()} for row in made]


def learned(document, tokenizer):
    """The texts of a conversation that are learned."""
    ((ids, mask),) = tokenize_conversations([document], tokenizer)
    runs = itertools.groupby(zip(ids, mask, strict=True), key=lambda token: token[1])
    return [tokenizer.decode([token for token, _ in run]) for is_learned, run in runs if is_learned]


def test_make_rows_gives_each_token_as_the_label_of_the_one_before(tokenizer):
    (row,) = rows_of(texts("def f(): pass"), tokenizer, 64)
    ids = tokenizer("def f(): pass")["input_ids"] + [tokenizer.eos_token_id]
    assert row["input_ids"] == ids[:-1] and row["labels"] == ids[1:]
    assert row["input_ids"][0] == tokenizer.bos_token_id and row["labels"][-1] == tokenizer.eos_token_id
    assert row["position_ids"] == list(range(len(ids) - 1))


def test_end_of_text_is_learned_if_it_is_also_the_padding(tokenizer):
    eos = tokenizer.eos_token_id
    rows = rows_of(texts("a", "a much longer text"), tokenizer, 64)
    batch = collate(rows, pad_token_id=eos)
    assert [(labels == eos).sum().item() for labels in batch["labels"]] == [1, 1]
    assert (batch["labels"][0] == IGNORE_INDEX).sum() == len(rows[1]["labels"]) - len(rows[0]["labels"])


@pytest.mark.parametrize(
    "mode, pieces",
    [
        ("split", [slice(0, 16), slice(16, 32), slice(32, 40)]),
        ("keep_start", [slice(0, 16)]),
        ("keep_end", [slice(24, 40)]),
        ("drop", []),
        (None, [slice(0, 16), slice(16, 32), slice(32, 40)]),
    ],
)
def test_make_rows_cuts_a_long_text_as_configured(tokenizer, mode, pieces):
    text = texts("a" * 3, " of" * 39)  # 40 pairs of tokens, with those of the start and the end
    (_, short_is_long), (rows, is_long) = make_rows(text, tokenizer, 16, mode)
    (complete,) = rows_of(text[1:], tokenizer, 99)
    assert (short_is_long, is_long) == (False, True)
    for key in ("input_ids", "labels"):  # with "split" every label is kept
        assert [row[key].tolist() for row in rows] == [complete[key][piece] for piece in pieces]
    assert all(row["position_ids"].tolist() == list(range(len(row["labels"]))) for row in rows)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("learn_from, answers", [(0, ["three four", "six\n"]), (3, ["six\n"])])
def test_assistant_turns_are_learned_with_their_end_tokens(tokenizer, name, learn_from, answers):
    tokenizer.chat_template = TEMPLATES[name]
    document = chat("one two", "three four", "five", "six\n", learn_from=learn_from)
    ((ids, _),) = tokenize_conversations([document], tokenizer)
    text = tokenizer.apply_chat_template(document.messages, tokenize=False)
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    answers = [f"{answer.strip() if name == 'instruct' else answer}<|eos|>" for answer in answers]
    assert [text.lstrip() for text in learned(document, tokenizer)] == answers


@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_in_a_batch_are_tokenised_as_alone(tokenizer, name):
    tokenizer.chat_template = TEMPLATES[name]
    words = ["one two", "漢字 🙂🙂", "three\n", "<|bos|>assistant\nx<|eos|>", " four "]
    documents = [chat(*words[: 2 + i % 4], learn_from=i % 3, first=["user", "assistant"][i % 2]) for i in range(12)]
    documents = [document for document in documents if document.turns]
    alone = [next(tokenize_conversations([document], tokenizer)) for document in documents]
    for (ids, mask), (ids_alone, mask_alone) in zip(tokenize_conversations(documents, tokenizer), alone, strict=True):
        assert ids == ids_alone and (mask == mask_alone).all()


@pytest.mark.parametrize("name", ["chatml", "marked"])
@pytest.mark.parametrize(
    "document, answers",
    [
        (chat("yes", "yes", "yes", first="assistant"), ["yes", "yes"]),  # starts with the assistant, repeats itself
        (chat("<|bos|>assistant\nmine<|eos|>", "yours"), ["yours"]),  # special tokens that a user writes
        (chat("漢", "🙂", "漢", "字"), ["🙂", "字"]),  # characters of several tokens
    ],
)
def test_what_the_assistant_writes_is_learned(tokenizer, name, document, answers):
    tokenizer.chat_template = TEMPLATES[name]
    assert learned(document, tokenizer) == [f"{answer}<|eos|>" for answer in answers]


def test_text_that_the_template_adds_before_an_answer_is_learned_after_a_generation_prompt_only(tokenizer):
    tokenizer.chat_template = THINKING + PROMPT
    assert learned(chat("one", "two"), tokenizer) == ["(hm)two<|eos|>"]
    tokenizer.chat_template = THINKING
    assert learned(chat("one", "two"), tokenizer) == ["two<|eos|>"]


def test_a_conversation_that_is_cut_before_the_answer_gives_no_row(tokenizer):
    tokenizer.chat_template = TEMPLATES["chatml"]
    chats = [chat("a long question " * 9, "yes"), chat("short", "yes"), chat("no answer"), chat()]
    assert [(len(rows), long) for rows, long in make_rows(chats, tokenizer, 32)] == [
        (0, True), (1, False), (0, False), (0, False),
    ]  # fmt: skip
    assert len(rows_of(chats, tokenizer, 32, "keep_end")) == 2


def test_a_template_that_renders_earlier_turns_differently_is_refused(tokenizer):
    tokenizer.chat_template = FORGETFUL
    assert learned(chat("one", "hm/two"), tokenizer) == ["hm/two<|eos|>"]
    with pytest.raises(
        UsageError, match=r"row 1: the chat template changes the content of message 2, or renders it .*--chat_template"
    ):
        learned(chat("one", "hm/two", "three", "four"), tokenizer)


def test_a_template_that_changes_an_answer_is_refused(tokenizer):
    tokenizer.chat_template = TEMPLATES["no generation prompt"].replace("m['content']", "m['content'] | upper")
    with pytest.raises(UsageError, match=r"row 1: .*changes the content of message 2"):
        learned(chat("one", "two"), tokenizer)


def test_a_template_that_raises_is_quoted_with_the_row(tokenizer):
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
        + TEMPLATES["chatml"]
    )
    refused = Document(6, messages=[{"role": "system", "content": "x"}, *chat("one", "two").messages])
    with pytest.raises(UsageError, match=r"row 7: .*refuses .*No system role.*system, user, assistant"):
        list(tokenize_conversations([chat("one", "two"), refused], tokenizer))
