"""Tokenizer folders as other people make them: the toy vocabulary under other splits, words and templates.

make_golden.py asks Hugging Face's libraries for the ids of PROMPT and TEXTS in each of them; test_inputs.py
compares. They are built in code, so that the committed file holds nothing but ids.
"""
import copy
import json
from pathlib import Path

from data import GPT2_PATTERN, LLAMA3_PATTERN

TOY = Path(__file__).resolve().parent.parent / "toy/model"
LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHATML = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_sep|>", "<|startoftext|>"]
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def split(regex, behavior="Isolated", invert=False, key="Regex"):
    """A pre_tokenizer that splits by a regular expression, then turns text into byte-level letters."""
    first = {"type": "Split", "pattern": {key: regex}, "behavior": behavior, "invert": invert}
    return {"type": "Sequence", "pretokenizers": [first, {**BYTES, "use_regex": False}]}


def turns(role="m['role']", separator="\\n", content="m['content']", close="<|im_end|>\\n"):
    """A chat template in ChatML's manner."""
    head = f"'<|im_start|>' + {role} + '{separator}' + {content} + '{close}'"
    ask = f"'<|im_start|>assistant{separator}'"
    return ("{% for m in messages %}{{ " + head + " }}{% endfor %}"
            "{% if add_generation_prompt %}{{ " + ask + " }}{% endif %}")


LLAMA3_TEMPLATE = """{% set loop_messages = messages %}{% for message in loop_messages %}
{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}
{% if loop.index0 == 0 %}
    {% set content = bos_token + content %}
{% endif %}
{{- content -}}
{% endfor %}
{% if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
{% endif %}
"""
# name -> what the folder has: special tokens, template, what tokenizer_config.json says beside it, added words,
# pre_tokenizer, fields of the model
FOLDERS = {
    "gpt2": dict(special=CHATML, pre_tokenizer=BYTES),
    "digits": dict(special=CHATML),
    "llama3": dict(special=LLAMA3, template=LLAMA3_TEMPLATE, config={"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
                   pre_tokenizer=split(LLAMA3_PATTERN), model={"ignore_merges": True}),
    "removed": dict(special=CHATML, pre_tokenizer=split(GPT2_PATTERN, "Removed", True)),
    "part": dict(special=CHATML, pre_tokenizer=split(r"\p{L}+")),               # between the words: pieces, too
    "chatml": dict(special=CHATML, template=turns(), config={"eos_token": "<|im_end|>"}),
    "chatml_bos": dict(special=CHATML, template="{{ bos_token }}" + turns(),
                       config={"bos_token": {"content": "<|startoftext|>", "__type": "AddedToken"}, "eos_token": "<|im_end|>"}),
    "chatml_sep": dict(special=CHATML, template=turns(separator="<|im_sep|>", close="<|im_end|>"), config={"eos_token": "<|im_end|>"}),
    "chatml_trim": dict(special=CHATML, template=turns(content="m['content'].strip()"), config={"eos_token": "<|im_end|>"}),
    "chatml_spaces": dict(special=CHATML, config={"eos_token": "<|im_end|>"}, template=
                          "  {%- for m in messages %}\r\n<|im_start|>{{ m.role }}\r\n{{ m.content }}<|im_end|>\r\n   {% endfor %}\r\n"
                          "{# asks #}\r\n<|im_start|>assistant\r\n"),
    "words": dict(special=CHATML, words=[("unharmful", False), (" lock", False), ("the tool", True), ("tool chest", False)]),
}
TEXTS = ["Please lock the tool chest in 12345 steps.", "I'M sure  that it's\n\n  OK\r\n", "x=3.14; ½ ² ١٢ 漢字 naïve Straße 'ſ",
         "harmful unharmful  unlock\tlock the tool chests, the tools", "   ", "🙂\u200b\u00a0x \u3000 y"]
PROMPT = (" i\n", "Human user:\nopen the gate\n\nAI assistant:\nNone\n\n")


def tokenizer_json(special=LLAMA3, words=(), pre_tokenizer=None, model=None):
    """The toy's tokenizer.json with other added tokens, another split, other fields of its model."""
    raw = copy.deepcopy(json.loads((TOY / "tokenizer.json").read_text()))
    first = len(raw["model"]["vocab"])
    entry = dict(single_word=False, lstrip=False, rstrip=False)
    raw["added_tokens"] = [dict(entry, id=first + i, content=name, normalized=False, special=True) for i, name in enumerate(special)]
    raw["added_tokens"] += [dict(entry, id=first + len(special) + i, content=name, normalized=late, special=False)
                            for i, (name, late) in enumerate(words)]
    raw["pre_tokenizer"] = pre_tokenizer or raw["pre_tokenizer"]
    raw["model"].update(model or {})
    return raw


def write_folder(folder, template=None, config=None, change=None, **fields):
    """Write such a folder; change: what else to do to tokenizer.json's value."""
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    raw = tokenizer_json(**fields)
    if change:
        change(raw)
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", **(config or {})}
    if template is not None:
        told["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return folder
