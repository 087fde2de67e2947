import itertools

import pytest

from kdkit import DistillConfig
from kdkit.config import UsageError
from kdkit.data import collate
from kdkit.data.chat import make_rows, tokenize_conversations
from kdkit.data.records import Document
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


def chat(*contents, first="user", learn_from=0, **fields):
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= learn_from]
    return Document(0, messages=messages, turns=turns, **fields)


def rows_of(documents, *arguments):
    """All rows, with lists for arrays."""
    made = [row for rows, _ in make_rows(documents, *arguments) for row in rows]
    return [{key: values.tolist() for key, values in row.items()} for row in made]


def samples_of(document, tokenizer, *options):
    """The samples (token ids, which are learned) of a conversation."""
    ((samples, _),) = tokenize_conversations([document], tokenizer, *options)
    return samples


def learned(document, tokenizer, *options):
    """The texts of a conversation that are learned."""
    found = []
    for ids, mask in samples_of(document, tokenizer, *options):
        runs = itertools.groupby(zip(ids, mask, strict=True), key=lambda token: token[1])
        found += [tokenizer.decode([token for token, _ in run]) for is_learned, run in runs if is_learned]
    return found


def remarks_on(document, tokenizer):
    ((_, remarks),) = tokenize_conversations([document], tokenizer)
    return remarks


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


@pytest.mark.parametrize("starts_with_bos", [True, False])
@pytest.mark.parametrize("mode", ["split", "keep_start", "keep_end", "drop", None])
def test_make_rows_cuts_a_long_text_as_configured(tokenizer, mode, starts_with_bos):
    if not starts_with_bos:
        tokenizer.backend_tokenizer.post_processor = None
    text = texts("a" * 3, " of" * 39)  # about 40 pairs of tokens, with those of the start and the end
    (_, short_has), (rows, remarks) = make_rows(text, tokenizer, 16, mode)
    (complete,) = rows_of(text[1:], tokenizer, 99)
    assert (short_has, remarks) == (set(), {"too_long"})
    rows = [{key: values.tolist() for key, values in row.items()} for row in rows]
    assert all(len(row["labels"]) == len(row["input_ids"]) <= 16 for row in rows)
    assert all(row["position_ids"] == list(range(len(row["labels"]))) for row in rows)
    bos, pairs = tokenizer.bos_token_id, list(zip(complete["input_ids"], complete["labels"], strict=True))
    kept = [pair for row in rows for pair in zip(row["input_ids"], row["labels"], strict=True)]
    if starts_with_bos:  # each piece starts with it, and it has a label only at the start of the text
        assert all(row["input_ids"][0] == bos and bos not in row["input_ids"][1:] for row in rows)
        kept = [pair for pair in kept if pair != (bos, IGNORE_INDEX)]
    room = 16 - starts_with_bos
    expected = {"split": pairs, None: pairs, "keep_start": pairs[:16], "keep_end": pairs[-room:], "drop": []}
    assert kept == expected[mode]  # with "split" every label is kept, once
    assert len(rows) == {"split": 3, None: 3, "drop": 0}.get(mode, 1)


def test_a_text_that_has_the_bos_itself_gets_no_second_one(tokenizer):
    assert rows_of(texts("<|bos|>one two"), tokenizer, 64) == rows_of(texts("one two"), tokenizer, 64)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("learn_from, answers", [(0, ["three four", "six\n"]), (3, ["six\n"])])
def test_assistant_turns_are_learned_with_their_end_tokens(tokenizer, name, learn_from, answers):
    tokenizer.chat_template = TEMPLATES[name]
    document = chat("one two", "three four", "five", "six\n", learn_from=learn_from)
    ((ids, _),) = samples_of(document, tokenizer)
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
    for document, (samples, remarks) in zip(documents, tokenize_conversations(documents, tokenizer), strict=True):
        assert remarks == remarks_on(document, tokenizer)
        for (ids, mask), (ids_alone, mask_alone) in zip(samples, samples_of(document, tokenizer), strict=True):
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
    assert [(len(rows), remarks) for rows, remarks in make_rows(chats, tokenizer, 32)] == [
        (0, {"too_long"}), (1, set()), (0, set()), (0, set()),
    ]  # fmt: skip
    assert len(rows_of(chats, tokenizer, 32, "keep_end")) == 2


@pytest.mark.parametrize(
    "template", [FORGETFUL, f"{TEMPLATES['chatml']}{{% if not add_generation_prompt %}}<|eos|>{{% endif %}}"]
)
def test_each_turn_is_a_sample_as_in_generation_if_a_template_renders_earlier_turns_differently(tokenizer, template):
    tokenizer.chat_template = template
    document = chat("one", "hm/two", "three", "ho/four")
    samples = samples_of(document, tokenizer)
    assert len(samples) == 2 and remarks_on(document, tokenizer) == {"per_turn"}
    for (ids, mask), turn in zip(samples, document.turns, strict=True):
        prompt = tokenizer.apply_chat_template(document.messages[:turn], tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(ids[: int(mask.argmax())]) == prompt  # what the teacher sees when it answers
        answer = tokenizer.decode([token for token, is_learned in zip(ids, mask, strict=True) if is_learned])
        assert answer.startswith(document.messages[turn]["content"] + "<|eos|>")
    assert sum(len(rows) for rows, _ in make_rows([document], tokenizer, 64)) == 2
    assert remarks_on(chat("one", "hm/two"), tokenizer) == set()


def test_a_prompt_that_the_template_does_not_repeat_before_the_answer_is_refused(tokenizer):
    tokenizer.chat_template = TEMPLATES["chatml"].replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    with pytest.raises(UsageError, match=r"row 1: .*writes 'two.* in message 2, not '<think>two'.*FILE"):
        learned(chat("one", "two"), tokenizer)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("turns", [[1], [3], [1, 3]])
def test_only_the_turns_to_learn_are_learned(tokenizer, name, turns):
    tokenizer.chat_template = TEMPLATES[name]
    document = chat("one", "bad", "three", "good")._replace(turns=turns)
    expected = [f"{document.messages[turn]['content']}<|eos|>" for turn in turns]
    assert [text.strip() for text in learned(document, tokenizer)] == expected


def test_turns_that_marks_cannot_tell_apart_are_refused(tokenizer):
    tokenizer.chat_template = TEMPLATES["marked without the end"]
    document = chat("one", "", "three", "good")
    assert learned(document, tokenizer) == ["<|eos|>", "good<|eos|>"]
    assert learned(document._replace(turns=[3]), tokenizer) == ["good<|eos|>"]  # an empty turn has a mark, too
    tokenizer.chat_template = tokenizer.chat_template.replace("== 'assistant'", "== 'assistant' and m['content']")
    assert learned(document, tokenizer) == ["good<|eos|>"]
    with pytest.raises(UsageError, match=r"row 1: .*marks 1 turns of 2"):
        learned(document._replace(turns=[1]), tokenizer)


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
TOOLS = "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}"


@pytest.mark.parametrize("name", TEMPLATES)
def test_tools_and_options_reach_every_rendering(tokenizer, name):
    tokenizer.chat_template = TOOLS + "{{ style }}" + TEMPLATES[name]
    document = chat("one", "two", "three", "four", tools=[TOOL])
    ((ids, _),) = samples_of(document, tokenizer, {"style": "brief"})
    assert tokenizer.decode(ids).startswith("weatherbrief")
    assert [text.strip() for text in learned(document, tokenizer, {"style": "brief"})] == ["two<|eos|>", "four<|eos|>"]
    for option in ("stile", "messages", "add_generation_prompt"):
        with pytest.raises(UsageError, match=f"does not read '{option}' of chat_template_options"):
            learned(document, tokenizer, {option: 1})


def with_fields(**fields):
    document = chat("one", fields.pop("content", "two"))
    document.messages[1].update(fields)
    return document


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "document, is_hidden",
    [
        (with_fields(), False),
        (with_fields(content=" two\n\n three "), False),
        (with_fields(reasoning_content="let me see"), True),
        (with_fields(thinking="let me see"), True),
        (with_fields(tool_calls=[{"function": {"name": "weather", "arguments": {}}}]), True),
        (chat("one", "two", tools=[TOOL]), True),
    ],
)
def test_what_the_template_does_not_show_is_remarked(tokenizer, name, document, is_hidden):
    tokenizer.chat_template = TEMPLATES[name]
    assert remarks_on(document, tokenizer) == ({"hidden"} if is_hidden else set())


def test_an_answer_that_the_template_changes_is_remarked(tokenizer):
    for change in ("m['content'].split('</think>')[-1]", "m['content'] | upper"):
        tokenizer.chat_template = TEMPLATES["chatml"].replace("m['content']", change)
        assert remarks_on(chat("ONE", "<think>hm</think>two"), tokenizer) == {"hidden"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_turn_without_an_end_token_is_remarked(tokenizer, name):
    tokenizer.chat_template = TEMPLATES[name].replace("<|eos|>", "")
    assert remarks_on(chat("one", "two"), tokenizer) == {"endless"}


def test_several_templates_without_a_default_are_refused(tokenizer):
    tokenizer.chat_template = {"rag": TEMPLATES["chatml"], "tool_use": TOOLS + TEMPLATES["chatml"]}
    with pytest.raises(UsageError, match=r"no default specified.*--chat_template FILE"):
        learned(chat("one", "two"), tokenizer)
    assert learned(chat("one", "two", tools=[TOOL]), tokenizer) == ["two<|eos|>"]


def test_a_template_that_changes_an_answer_is_refused(tokenizer):
    tokenizer.chat_template = TEMPLATES["no generation prompt"].replace("m['content']", "m['content'] | upper")
    with pytest.raises(UsageError, match=r"row 1: .*writes '.*TWO.* in message 2, not 'two'"):
        learned(chat("one", "two"), tokenizer)


def test_a_template_that_raises_is_quoted_with_the_row(tokenizer):
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
        + TEMPLATES["chatml"]
    )
    refused = Document(6, messages=[{"role": "system", "content": "x"}, *chat("one", "two").messages], turns=[2])
    with pytest.raises(UsageError, match=r"row 7: .*does not fit the roles system, user, assistant .*No system role"):
        list(tokenize_conversations([chat("one", "two"), refused], tokenizer))
