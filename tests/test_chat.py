"""Conversations: kinds of records, chat templates against transformers, what of them is trained on."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llama_ft.config import PACKAGE_DIR, TrainOn, UserError
from llama_ft.data.records import Record, as_record
from llama_ft.data.template import choose_template, encode_prompt
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.data.tokenizer_json import tokenizer_files
from llama_ft.decoding.chat import chat
from tests.helpers.chats import TEMPLATES, save_tokenizer, without_marks

TURNS = [
    {"role": "user", "content": "What is the plural of fox?"},
    {"role": "assistant", "content": "foxes"},
    {"role": "user", "content": "And of ox? 日本 "},
    {"role": "assistant", "content": "oxen,\n  it is said"},
]
SYSTEM = {"role": "system", "content": "You help."}
CONVERSATIONS = {"one turn": TURNS[:2], "two turns": TURNS, "with a system prompt": [SYSTEM, *TURNS]}
NO_SYSTEM = ("llama 2",)


@pytest.fixture(scope="module", params=TEMPLATES)
def template(request: pytest.FixtureRequest) -> str:
    return TEMPLATES[request.param]


@pytest.fixture(scope="module")
def folder(template, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    save_tokenizer(folder, template)
    return folder


def mask_of(sample) -> list[int]:
    return [int(any(first <= n < end for first, end in sample.spans)) for n in range(len(sample))]


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_ids_and_masks_are_transformers(folder, template, conversation):
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        conversation, return_assistant_tokens_mask=True, return_dict=True
    )
    tokenizer = Tokenizer(folder / "tokenizer.json")
    sample = choose_template("auto", tokenizer).sample(
        as_record({"messages": conversation}), tokenizer, TrainOn.assistant
    )
    assert list(sample.tokens) == theirs["input_ids"]
    assert mask_of(sample) == theirs["assistant_masks"]
    assert sample.n_targets == sum(theirs["assistant_masks"]) > 0


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_answers_are_found_where_the_template_marks_none(folder, template, conversation, tmp_path):
    tokenizer, record = Tokenizer(folder / "tokenizer.json"), as_record({"messages": conversation})
    (tmp_path / "bare.jinja").write_text(without_marks(template))
    marked, bare = choose_template("chat", tokenizer), choose_template(str(tmp_path / "bare.jinja"), tokenizer)
    for train_on in TrainOn:
        assert bare.sample(record, tokenizer, train_on) == marked.sample(record, tokenizer, train_on)


def test_a_prompt_is_transformers_generation_prompt(folder):
    theirs = AutoTokenizer.from_pretrained(folder)
    tokenizer = Tokenizer(folder / "tokenizer.json")
    template, record = choose_template("chat", tokenizer), as_record({"messages": TURNS})
    expected = theirs.apply_chat_template(TURNS[:-1], add_generation_prompt=True, return_dict=False)
    assert encode_prompt(template.prompt(record), tokenizer) == expected
    sample = template.sample(record, tokenizer, TrainOn.last)
    assert list(sample.tokens[: sample.spans[0][0]]) == expected


def test_what_is_trained_on(tmp_path):
    save_tokenizer(tmp_path, TEMPLATES["chatml"])
    tokenizer, record = Tokenizer(tmp_path / "tokenizer.json"), as_record({"messages": [SYSTEM, *TURNS]})
    template = choose_template("chat", tokenizer)
    texts = {}
    for train_on in TrainOn:
        sample = template.sample(record, tokenizer, train_on)
        names = [tokenizer.decode(list(sample.tokens[first:end])) for first, end in sample.spans]
        texts[train_on.name] = names
        assert all(sample.tokens[end - 1] == tokenizer.encode_chat("<|im_end|>")[0][0] for _, end in sample.spans) or (
            train_on is TrainOn.all
        )
    assert texts["assistant"] == ["foxes", "oxen,\n  it is said"]
    assert texts["last"] == ["oxen,\n  it is said"]
    assert texts["all"] == [
        "system\nYou help.\nuser\nWhat is the plural of fox?\nassistant\nfoxes\n"
        "user\nAnd of ox? 日本 \nassistant\noxen,\n  it is said\n"
    ]


SAME = [
    {"messages": TURNS[:2]},
    {"conversations": [{"from": "human", "value": TURNS[0]["content"]}, {"from": "gpt", "value": "foxes"}]},
    {"prompt": TURNS[0]["content"], "completion": "foxes"},
    {"prompt": TURNS[:1], "completion": TURNS[1:2]},
    {"prompt": TURNS[:1], "completion": "foxes"},
    {"instruction": TURNS[0]["content"], "input": "", "output": "foxes"},
    {"prompt": "ignored", "prompt_id": "7", "messages": TURNS[:2], "task": None},
]


@pytest.mark.parametrize("record", SAME, ids=[" ".join(record) for record in SAME])
def test_kinds_of_records_that_say_the_same_are_the_same(record):
    assert as_record(record) == Record(TURNS[0]["content"], "", "foxes")


def test_a_conversation_keeps_what_its_template_may_read():
    thinking = [TURNS[0], {"role": "assistant", "content": "foxes", "reasoning_content": "Hm."}]
    assert as_record({"messages": thinking}).messages == thinking
    assert as_record({"messages": TURNS}).messages == TURNS
    asked = Record("Sort.", "b a", "a b").messages
    assert [message["content"] for message in asked] == ["Sort.\n\nb a", "a b"]


def trained_texts(tokenizer: Tokenizer, template: str, record: Record, train_on: TrainOn) -> list[str]:
    sample = choose_template(template, tokenizer).sample(record, tokenizer, train_on)
    return [tokenizer.decode(list(sample.tokens[first:end])) for first, end in sample.spans]


def test_what_published_data_have_beside_texts(tmp_path):
    """System messages and tools of a record, weights, turns after the last answer or before the first question."""
    save_tokenizer(tmp_path, TEMPLATES["chatml"])
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    with_key = as_record(
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "Be."}
    )
    assert with_key.messages[0] == {"role": "system", "content": "Be."}
    assert as_record({"messages": [SYSTEM, *TURNS], "system": "Be."}).messages == [SYSTEM, *TURNS]
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "the plural of fox?"}]
    assert as_record({"messages": [{"role": "user", "content": parts}, TURNS[1]]}) == as_record({"messages": TURNS[:2]})
    assert as_record({"messages": TURNS[:3]}) == as_record({"messages": TURNS[:2]})
    called = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    assert as_record({"messages": [TURNS[0], called, TURNS[2], TURNS[3]]}).messages[1] == called | {"content": ""}
    light = as_record({"messages": [TURNS[0], TURNS[1] | {"weight": 0}, *TURNS[2:]]})
    for template in ("chat", without_marks_in(tmp_path, TEMPLATES["chatml"])):
        assert trained_texts(tokenizer, template, light, TrainOn.assistant) == ["oxen,\n  it is said"]
    greeted = as_record({"messages": [{"role": "assistant", "content": "Hello."}, *TURNS[:2]]})
    bare = without_marks_in(tmp_path, TEMPLATES["chatml with a system prompt of its own"])
    assert trained_texts(tokenizer, bare, greeted, TrainOn.assistant) == ["Hello.", "foxes"]
    tools = "{% if tools %}{{ tools | tojson }}{% endif %}" + TEMPLATES["chatml"]
    (tmp_path / "tools").write_text(tools)
    for given in ([{"name": "add"}], '[{"name": "add"}]'):
        prompt = choose_template(str(tmp_path / "tools"), tokenizer).prompt(
            as_record({"messages": TURNS, "tools": given})
        )
        assert prompt.startswith('[{"name": "add"}]<|im_start|>')


def without_marks_in(folder: Path, template: str) -> str:
    (folder / "bare.jinja").write_text(without_marks(template))
    return str(folder / "bare.jinja")


THINKING = (  # and tools that are called
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    "{% if m.tool_calls %}{{ '\n<tool>' + m.tool_calls[0].name + '</tool>' }}{% endif %}"
)


def test_a_template_that_leaves_out_earlier_reasoning(tmp_path):
    """As Qwen 3's: only the last answer is written with its (empty) reasoning."""
    save_tokenizer(tmp_path)
    reasoning = "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    text = without_marks(TEMPLATES["chatml"]).replace("{% if m.role == 'assistant' %}", f"{reasoning}{{% if true %}}")
    (tmp_path / "qwen.jinja").write_text(text)
    tokenizer, record = Tokenizer(tmp_path / "tokenizer.json"), as_record({"messages": TURNS})
    template = str(tmp_path / "qwen.jinja")
    found = trained_texts(tokenizer, template, record, TrainOn.assistant)
    assert found == ["foxes", "<think>\n\n</think>\n\noxen,\n  it is said"]
    answer = choose_template(template, tokenizer).answer(record, tokenizer)
    assert answer.strip() == "<think>\n\n</think>\n\noxen,\n  it is said"
    (tmp_path / "qwen.jinja").write_text(text.replace("{{ m.content }}", THINKING))
    thought = [TURNS[0], {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nfoxes\n"}, *TURNS[2:]]
    called = [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}, *TURNS[2:]]
    for messages, first in ((thought, "foxes\n"), (called, "\n<tool>f</tool>")):
        found = trained_texts(tokenizer, template, as_record({"messages": messages}), TrainOn.assistant)
        assert found == [first, "<think>\n\n</think>\n\noxen,\n  it is said"]


def test_what_a_perfect_answer_is(tmp_path):
    """Whatever the tokens are, of which one may hold the end of the prompt and the begin of the answer."""
    save_tokenizer(tmp_path)
    (tmp_path / "own.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    tokenizer, record = Tokenizer(tmp_path / "tokenizer.json"), Record("say", "", "no")
    assert choose_template(str(tmp_path / "own.jinja"), tokenizer).answer(record, tokenizer) == "no\n"
    assert choose_template("alpaca", tokenizer).answer(record, tokenizer) == "no"


BAD = {
    "no answer": ({"messages": TURNS[:1]}, "one of its messages after the first must be the assistant's"),
    "an answer alone": ({"messages": TURNS[1:3]}, "one of its messages after the first must be the assistant's"),
    "empty": ({"messages": []}, "one of its messages after the first must be the assistant's"),
    "tools no list": ({"messages": TURNS, "tools": {"name": "x"}}, "tools must be a list"),
    "no list": ({"messages": "Hello"}, "a conversation must be a list of messages"),
    "null": ({"messages": None}, "a conversation must be a list of messages"),
    "role": ({"messages": [{"role": "wizard", "content": "x"}, TURNS[1]]}, "message 1 has the role wizard; it must be"),
    "no content": ({"messages": [TURNS[0], {"role": "assistant"}]}, "the content of message 2 must be a text"),
    "a part list": ({"messages": [TURNS[0], {"role": "assistant", "content": [{}]}]}, "content of message 2 must be a"),
    "a text as message": ({"messages": [TURNS[0], "foxes"]}, "message 2 must be an object with role and content"),
    "half a prompt": (
        {"prompt": "x"},
        "instruction is missing; it has prompt, but records have messages",
    ),
    "completion null": ({"prompt": "x", "completion": None}, "completion is null or NaN"),
}


@pytest.mark.parametrize(("record", "reason"), BAD.values(), ids=BAD)
def test_a_bad_conversation_says_why(record, reason):
    with pytest.raises(ValueError, match=reason):
        as_record(record)


def test_templates_that_cannot_be_used(tmp_path):
    save_tokenizer(tmp_path, "{% for m in messages %}{{ raise_exception('roles must alternate') }}{% endfor %}")
    tokenizer, record = Tokenizer(tmp_path / "tokenizer.json"), as_record({"messages": TURNS})
    with pytest.raises(ValueError, match="the chat template rejects it: roles must alternate"):
        choose_template("chat", tokenizer).prompt(record)
    with pytest.raises(UserError, match=r"template chatty: there is no such file; .* auto, alpaca, chat, plain"):
        choose_template("chatty", tokenizer)
    (tmp_path / "broken.jinja").write_text("{% for m in messages %}")
    with pytest.raises(UserError, match=r"broken\.jinja cannot be read as a chat template"):
        choose_template(str(tmp_path / "broken.jinja"), tokenizer)
    (tmp_path / "escape.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(ValueError, match="unsafe"):
        choose_template(str(tmp_path / "escape.jinja"), tokenizer).prompt(record)
    for name, text, refused in (
        ("forgets", "{{ messages | length }}{{ messages[-1].content }}", "text: mark it by {% generation %}"),
        ("no template", "What a nice day.", "writes no answer"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=refused):
            choose_template(str(tmp_path / name), tokenizer).sample(record, tokenizer, TrainOn.assistant)
    for name in ("alpaca", "plain"):
        with pytest.raises(ValueError, match=f"template {name} has no place for earlier turns"):
            choose_template(name, tokenizer).prompt(record)


def test_auto_is_the_checkpoints_template_where_it_has_one(tmp_path):
    save_tokenizer(tmp_path)
    assert choose_template("auto", Tokenizer(tmp_path / "tokenizer.json")).name == "alpaca"
    with pytest.raises(UserError, match=r"template chat: tokenizer=.* has no chat template next to it; use alpaca"):
        choose_template("chat", Tokenizer(tmp_path / "tokenizer.json"))
    file = tmp_path / "tokenizer_config.json"
    said = json.loads(file.read_text())
    text = "{{ messages[0].content }}"
    for chat_template in (text, [{"name": "default", "template": text}]):
        file.write_text(json.dumps(said | {"chat_template": chat_template}))
        tokenizer = Tokenizer(tmp_path / "tokenizer.json")
        template = choose_template("auto", tokenizer)
        assert template.name == "chat"
        assert encode_prompt(template.prompt(Record("foxes", "", "")), tokenizer) == tokenizer.encode("foxes")


@pytest.mark.parametrize("style", ["llama 2", "mistral", "vicuna", "zephyr"])
def test_a_sentencepiece_model_reads_templates_as_transformers_does(tmp_path, style):
    file = tmp_path / "tokenizer.model"
    shutil.copy(PACKAGE_DIR / "model" / "tiny" / "tokenizer.model", file)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES[style])
    tokenizer, record = Tokenizer(file), as_record({"messages": TURNS})
    sample = choose_template("auto", tokenizer).sample(record, tokenizer, TrainOn.assistant)
    for name, content in tokenizer_files(file, llama_3_1=False).items():
        (tmp_path / name).write_text(json.dumps(content))
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        TURNS, return_assistant_tokens_mask=True, return_dict=True
    )
    assert list(sample.tokens) == theirs["input_ids"]
    assert mask_of(sample) == theirs["assistant_masks"]


# The commands


def saved_model(folder: Path) -> Path:
    """A small LLaMA with random weights and a chat template, as transformers saves it."""
    made = save_tokenizer(folder, TEMPLATES["chatml"])
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(made), max_position_embeddings=256, **sizes)).save_pretrained(folder)
    return folder


def run_in(folder: Path, module: str, *arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"llama_ft.{module}", *arguments]
    done = subprocess.run(command, cwd=folder, input=text, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr + done.stdout
    return done


@pytest.mark.process
def test_an_instruct_model_is_trained_and_asked_in_its_own_template(tmp_path):
    source = ("model=from_checkpoint", f"checkpoint={saved_model(tmp_path / 'model')}")
    records = [{"messages": messages} for messages in CONVERSATIONS.values()]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    options = ("optim=lora", "tracker=disabled", "training.epochs=2", "hydra.run.dir=run")
    done = run_in(tmp_path, "train", *source, "data.path=chat.jsonl", *options)
    assert ", template chat" in done.stdout
    assert json.loads((tmp_path / "run" / "result.json").read_text())["template"] == "chat"
    asked = [{"messages": [SYSTEM, TURNS[0]]}, {"instruction": TURNS[0]["content"]}]
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    options = ("system=You help.", "decoding.max_new_tokens=4", "prompts=asked.json")
    answers = [
        json.loads(line)["answer"] for line in run_in(tmp_path, "generate", *source, *options).stdout.splitlines()
    ]
    assert answers[0] == answers[1]
    talk = ("interactive=true", "adapter=run", "decoding.max_new_tokens=4")
    said = run_in(tmp_path, "generate", *source, *talk, text="One.\nTwo.\n/system Be kind.\nThree.\n").stderr
    assert "template: chat" in said
    assert "a conversation; /help shows commands" in said
    for choice, refused in (("alpaca", "has no place for earlier turns"), ("nowhere", "there is no such file")):
        done = subprocess.run(
            [sys.executable, "-m", "llama_ft.evaluate", *source, "data.path=chat.jsonl", f"data.template={choice}"],
            cwd=tmp_path, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 2
        assert refused in done.stderr.splitlines()[-1]


@pytest.mark.process
def test_a_template_of_ones_own_travels_with_what_it_trained(tmp_path):
    """With the adapter or the weights, into what is exported, wherever the file lay."""
    model, own = saved_model(tmp_path / "model"), TEMPLATES["tulu"]
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "mine.jinja").write_text(own)
    (tmp_path / "sub" / "chat.jsonl").write_text(json.dumps({"messages": TURNS}))
    options = ("data.path=chat.jsonl", "data.template=mine.jinja", "tracker=disabled")
    run_in(tmp_path / "sub", "train", f"checkpoint={model}", *options, "optim=lora", "hydra.run.dir=../lora")
    run_in(tmp_path / "sub", "train", f"checkpoint={model}", *options, "hydra.run.dir=../full")
    (tmp_path / "sub" / "mine.jinja").unlink()
    few = "decoding.max_new_tokens=2"
    said = run_in(tmp_path, "generate", f"checkpoint={model}", "adapter=lora", "instruction=a", few).stderr
    assert "template: lora/chat_template.jinja" in said
    said = run_in(tmp_path, "generate", "checkpoint=full", "instruction=a", few).stderr
    assert "template: full/chat_template.jinja" in said
    for name, arguments in {
        "merged": (f"checkpoint={model}", "adapter=lora", "to=hf"),
        "exported": ("checkpoint=full", "to=hf"),
        "meta": (f"checkpoint={model}", "adapter=lora", "to=meta"),
    }.items():
        run_in(tmp_path, "convert", *arguments, f"output={name}")
        assert (tmp_path / name / "chat_template.jinja").read_text() == own
    ends = [Tokenizer(folder / "tokenizer.json", str(folder)).end_ids for folder in (model, tmp_path / "full")]
    assert ends[0] == ends[1]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert theirs.apply_chat_template(TURNS, tokenize=False) == without_generation(own, TURNS, model)


def without_generation(template: str, messages: list[dict[str, str]], model: Path) -> str:
    return AutoTokenizer.from_pretrained(model).apply_chat_template(messages, chat_template=template, tokenize=False)


def test_a_dialogue_remembers_what_was_said_until_it_begins_anew(tmp_path):
    save_tokenizer(tmp_path, TEMPLATES["chatml"])
    template = choose_template("chat", Tokenizer(tmp_path / "tokenizer.json"))
    lines, prompts, said = iter(["One.", "/input ox", "Two?", "/system Be kind.", "Three."]), list[str](), list[str]()

    def answer(prompt: str) -> str:
        prompts.append(prompt)
        return "Yes."

    def read_line() -> str:
        if (line := next(lines, None)) is None:
            raise EOFError
        return line

    chat(answer, pytest.fail, read_line, said.append, template, "You help.")
    turn = "<|im_start|>{}\n{}<|im_end|>\n".format
    begun = turn("system", "You help.") + turn("user", "One.")
    ask = "<|im_start|>assistant\n"
    assert prompts == [
        begun + ask,
        begun + turn("assistant", "Yes.") + turn("user", "Two?\n\nox") + ask,
        turn("system", "Be kind.") + turn("user", "Three.") + ask,
    ]
    said.clear()
    lines = iter(["/system Be kind."])
    chat(answer, pytest.fail, read_line, said.append)
    assert said[1] == "error: template alpaca has no place for a system message"
