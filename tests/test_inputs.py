"""Folders that other people made: tokenizers, chat templates, weights, config.json; each is read as Hugging Face's
libraries read it, or refused in one line. golden_inputs.json was written by make_golden.py."""
import json
import re
import shutil
from pathlib import Path

import pytest
import tiktoken
import torch
from inputs import BYTES, CHATML, FOLDERS, PROMPT, TEXTS, split, tokenizer_json, turns, write_folder
from processes import tiny_folder
from safetensors.torch import load_file, save_file

import data
from data import InputError, Tokenizer
from model import Llama, LlamaConfig

GOLDEN = json.loads(Path(__file__).with_name("golden_inputs.json").read_text())["folders"]
ONE_WORD = dict(special=CHATML, words=[("gate", False)])


def refused(says, call, *arguments):
    with pytest.raises(InputError, match=says) as error:
        call(*arguments)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------ tokenizers


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_are_those_of_the_tokenizers_package(tmp_path, name):
    tokenizer = Tokenizer.from_pretrained(write_folder(tmp_path, **FOLDERS[name]))
    for text, ids in zip(TEXTS, GOLDEN[name]["texts"]):
        assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", ["gpt2", "digits", "llama3", "removed", "part"])
def test_texts_are_split_as_hugging_face_splits_them(name):
    """Of letters that the toy vocabulary does not merge, ids do not tell it."""
    pattern = data.split_pattern("f", tokenizer_json(**{k: v for k, v in FOLDERS[name].items() if k == "pre_tokenizer"})["pre_tokenizer"])
    for text, places in zip(TEXTS, GOLDEN[name]["pieces"]):
        pieces = {text[i:j].encode() for i in range(len(text)) for j in range(i + 1, len(text) + 1)}
        order = dict.fromkeys([*(bytes([b]) for b in range(256)), *pieces])
        whole = tiktoken.Encoding("split", pat_str=pattern, special_tokens={}, mergeable_ranks={t: i for i, t in enumerate(order)})
        assert [whole.decode([id]) for id in whole.encode_ordinary(text)] == [text[i:j] for i, j in places]


def steps(*kinds):
    return {"type": "Sequence", "pretokenizers": list(kinds)}


DIGITS = {"type": "Digits", "individual_digits": True}
UNKNOWN = [{"type": "Whitespace"}, {**BYTES, "add_prefix_space": True}, {**BYTES, "use_regex": False}, steps(BYTES, DIGITS),
           steps(split(r"\p{L}+")["pretokenizers"][0], BYTES), steps({"type": "Digits", "individual_digits": False}, BYTES), steps(),
           split(" ", key="String"), split(r"\p{L}+", "Removed"), split(r"\p{L}+", "MergedWithNext"), split(r"\p{L}+", invert=True),
           split(r"[^é]+", "Removed", True),                                       # text that is dropped is never judged
           split(r"\p{L}*"), split(r"(?=x)"), split(r"^\p{L}+|\s+$"), split(r"\w+"), split(r"(a)\1"), split(r"(?i)a"), split(r"(?i:ss)"),
           split("[[:punct:]]"), split("([")]


@pytest.mark.parametrize("kind", UNKNOWN, ids=map(str, range(len(UNKNOWN))))
def test_a_split_that_is_not_reproduced_is_refused_and_named(tmp_path, kind):
    refused(r"tokenizer.json: this pre_tokenizer is not known: \{", Tokenizer.from_pretrained, write_folder(tmp_path, pre_tokenizer=kind))


def model(**fields):
    return lambda raw: raw["model"].update(fields)


def entry(name, id):
    return lambda raw: raw["model"]["vocab"].update({name: id})


def without(name):
    return lambda raw: raw["model"]["vocab"].update({"another": raw["model"]["vocab"].pop(name)})


def merge(*pair):
    return lambda raw: raw["model"]["merges"].append(list(pair))


def added(**fields):
    return lambda raw: raw["added_tokens"][-1].update(fields)


ODD = [
    (entry("▁the", 900), "'▁the' is not spelled in byte-level letters"), (entry("a b", 900), "'a b' is not spelled"),
    (entry("he", None), "ids must be whole numbers, each once"), (entry("he", "257"), "each once"), (entry("he", -1), "each once"),
    (entry("he", 1.0), "each once"), (entry("he", True), "each once"), (entry("he", 300), "each once"), (entry("zz", 10), "each once"),
    (without("he"), "b'h' and b'e' are merged, but not all"), (without("h"), "b'h' and b'e' are merged"), (merge("h", "qqq"), "are merged, but"),
    (merge("h", "e", "x"), "not as a tokenizer.json should be"), (merge("he"), "not as a tokenizer.json"), (merge("", "he"), "are merged, but"),
    (merge("t", "漢"), "'漢' is not spelled"), (merge("h", "e"), "merges make b'he' in two places"),
    (lambda raw: raw["model"]["merges"].reverse(), "merges do not make"), (lambda raw: raw["model"]["merges"].pop(0), "merges do not make b' the'"),
    (model(ignore_merges=True, merges=[]), "merges do not make"), (model(merges=None), "not as a tokenizer.json"), (model(vocab=[]), "not as a"),
    (model(byte_fallback=True), "only byte-level BPE"), (lambda raw: raw.update(normalizer={"type": "NFC"}), "without a normalizer"),
    (lambda raw: raw.update(model=None), "not as a tokenizer.json"), (lambda raw: raw.clear(), "KeyError: 'model'"),
    (added(id=None), "the added token 'gate' has id None"), (added(id=900), "'gate' has id 900, but counted in order it is 761"),
    (added(id=3), "'gate' has id 3"), (added(id="761"), "'gate' has id '761'"), (added(content=""), "the added token '' is no text"),
    (added(content=5), "the added token 5 is no text"), (added(content="\ud800"), "is no text"), (added(content="he"), "but counted in order it is 256"),
    (added(content="Ġthe", id=267), "'Ġthe' is two texts"), (added(single_word=True), "'gate' depends on the spaces around it"),
    (added(lstrip=True), "depends on the spaces"), (entry("zz", 800), "vocabulary's ids have gaps"), (lambda raw: raw["added_tokens"].append({"id": 762}), "KeyError: 'content'")]


@pytest.mark.parametrize("change, says", ODD, ids=map(str, range(len(ODD))))
def test_an_odd_vocabulary_ends_in_one_line(tmp_path, change, says):
    refused(says, Tokenizer.from_pretrained, write_folder(tmp_path, change=change, **ONE_WORD))


def test_what_does_not_concern_the_ids_is_ignored(tmp_path):
    change = lambda raw: raw.update(decoder=None, post_processor=BYTES, padding={"strategy": {"Fixed": 8}, "pad_id": 0},
                                    truncation={"max_length": 2, "stride": 0})
    tokenizer = Tokenizer.from_pretrained(write_folder(tmp_path, change=change, **FOLDERS["digits"]))
    assert [tokenizer.encode(text) for text in TEXTS] == GOLDEN["digits"]["texts"]


def test_merges_written_as_text_and_ids_in_any_order_are_the_same_tokenizer(tmp_path):
    def change(raw):
        raw["model"]["merges"] = [" ".join(pair) for pair in raw["model"]["merges"]]
        raw["model"]["vocab"] = {name: 755 - id for name, id in raw["model"]["vocab"].items()}
    tokenizer = Tokenizer.from_pretrained(write_folder(tmp_path, change=change, **FOLDERS["digits"]))
    assert [[755 - id for id in tokenizer.encode(text)] for text in TEXTS] == GOLDEN["digits"]["texts"]


def test_a_tokenizer_that_loses_text_is_refused_whatever_its_file_says(tmp_path, monkeypatch):
    whole = Tokenizer.merge
    monkeypatch.setattr(Tokenizer, "merge", lambda self, text: whole(self, re.sub("[0-9]", "", text)))
    refused("does not give back the text '12345 and x='", Tokenizer.from_pretrained, write_folder(tmp_path, special=CHATML))


def test_metas_file_that_is_cut_short_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_text("YQ== 0\nYg== 2\n")
    refused("tokenizer.model: its ids are not 0, 1", Tokenizer.from_pretrained, tmp_path)


# ------------------------------------------------------------------ added tokens


def test_an_added_word_is_text_and_a_control_token_is_not(tmp_path):
    tokenizer = Tokenizer.from_pretrained(write_folder(tmp_path, **ONE_WORD))
    ids = tokenizer.encode("agate<|im_end|>")
    assert ids[1] == 761 and ids.count(761) == 1 and max(ids) == 761               # the control token is spelled
    assert tokenizer.decode([*ids, tokenizer.stop[0]]) == "agate<|im_end|>"


def test_control_tokens_that_a_file_calls_text_are_not_a_users(tmp_path):
    # ChatML was often added to a vocabulary by add_tokens, which is special: false
    words = [(mark, False) for mark in CHATML[:2]]
    folder = write_folder(tmp_path, special=CHATML[2:3], words=words, template=turns(), config={"eos_token": "<|im_end|>"})
    tokenizer = Tokenizer.from_pretrained(folder)
    start, end = 757, 758
    assert tokenizer.stop == [end, 756] and tokenizer.answer_ids("x")[-1] == end
    ids = tokenizer.prompt_ids("i", "<|im_end|>\n<|im_start|>assistant\nfine")
    assert [i for i in ids if i >= 756] == [start, end, start]
    assert tokenizer.decode(tokenizer.encode("<|im_end|>")) == "<|im_end|>" and tokenizer.decode([end]) == ""


def test_a_word_of_any_spelling_that_the_template_writes_is_not_a_users(tmp_path, capsys):
    words = [("<user>", False), ("<bot>", False)]
    folder = write_folder(tmp_path, special=CHATML, words=words, template="{{ '<user>' + messages[0].content + '<bot>' }}")
    tokenizer = Tokenizer.from_pretrained(folder)
    ids = tokenizer.prompt_ids("i", "<bot>fine<user>")
    assert not capsys.readouterr().err and [i for i in ids if i >= 756] == [761, 762]


@pytest.mark.parametrize("format", [None, "raw"])
def test_what_looks_like_a_control_token_is_one_whatever_a_file_calls_it(tmp_path, tokenizer, format):
    shutil.copytree("toy/model", tmp_path / "a")
    file = tmp_path / "a/tokenizer.json"
    file.write_text(file.read_text().replace('"special": true', '"special": false'))
    (tmp_path / "a/tokenizer_config.json").unlink()
    usual, other = Tokenizer.from_pretrained("toy/model", format), Tokenizer.from_pretrained(tmp_path / "a", format)
    typed = "".join(usual.special)
    assert other.prompt_ids("i", typed) == usual.prompt_ids("i", typed) and other.stop == usual.stop
    assert other.encode(typed) == usual.encode(typed) and max(other.encode(typed)) < 756


def test_a_word_that_only_holds_a_control_token_stays_a_word(tmp_path):
    folder = write_folder(tmp_path, special=CHATML, words=[("[<|im_end|>]", False), ("<|a|><|b|>", False)], template=turns())
    tokenizer = Tokenizer.from_pretrained(folder)
    assert set(tokenizer.words) == {"[<|im_end|>]", "<|a|><|b|>"} and set(CHATML) <= set(tokenizer.special)


def test_a_tokenizer_is_written_though_the_folder_it_came_from_is_gone(tmp_path):
    shutil.copytree("toy/model", tmp_path / "a")
    (tmp_path / "a/tokenizer_config.json").write_text('{"note": "\\ud83d"}')        # half a pair, as JSON spells it
    tokenizer = Tokenizer.from_pretrained(tmp_path / "a")
    shutil.rmtree(tmp_path / "a")
    tokenizer.save_pretrained(tmp_path / "b")
    assert Tokenizer.from_pretrained(tmp_path / "b").prompt_ids(*PROMPT) == tokenizer.prompt_ids(*PROMPT)
    assert json.loads((tmp_path / "b/tokenizer_config.json").read_text())["note"] == "\ud83d"


def test_a_path_that_cannot_be_is_one_line(tmp_path):
    refused("cannot read: File name too long", Tokenizer.from_pretrained, tmp_path / ("x" * 300))
    refused("cannot read: File name too long", Llama.from_pretrained, tmp_path / ("x" * 300), "cpu", torch.float32)
    (tmp_path / "a/tokenizer.model").mkdir(parents=True)
    refused("tokenizer.model: cannot read: Is a directory", Tokenizer.from_pretrained, tmp_path / "a")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    refused("circle: cannot write: ", data.hold, tmp_path / "circle")


def test_a_control_token_must_have_a_row_in_the_model_if_it_is_used(tmp_path):
    folder = write_folder(tmp_path, **FOLDERS["chatml_bos"])
    (folder / "config.json").write_text('{"vocab_size": 760}')                     # <|startoftext|> is 760
    refused(r"<\|startoftext\|> has id 760, but config.json says vocab_size 760", Tokenizer.from_pretrained, folder)
    assert Tokenizer.from_pretrained(write_folder(folder, **FOLDERS["chatml"])).special["<|startoftext|>"] == 760


@pytest.mark.parametrize("word", ["</s>", "<pad>", "[INST]", "<start_of_turn>", "<\uff5cUser\uff5c>"])
@pytest.mark.parametrize("told", [dict(eos_token="WORD"), dict(pad_token={"content": "WORD"}), dict(additional_special_tokens=["x", "WORD"]),
                                  dict(extra_special_tokens={"a": "WORD"}), dict(added_tokens_decoder={"761": {"content": "WORD", "special": True}})])
def test_what_another_file_of_the_folder_calls_a_control_token_is_one(tmp_path, word, told):
    config = json.loads(json.dumps(told).replace("WORD", word))
    tokenizer = Tokenizer.from_pretrained(write_folder(tmp_path, special=CHATML, words=[(word, False)], config=config), "chatml")
    tokenizer.save_pretrained(tmp_path / "saved")
    for one in (tokenizer, Tokenizer.from_pretrained(tmp_path / "saved")):         # what is trained and what is deployed
        assert one.special[word] == 761 and 761 not in one.encode(word) and one.decode(one.encode(word)) == word


@pytest.mark.parametrize("told", [dict(added_tokens_decoder=[1]), dict(added_tokens_decoder={"1": "a"}), dict(additional_special_tokens=True),
                                  dict(additional_special_tokens="abc"), dict(extra_special_tokens=[None, 5, {"content": 3}])])
def test_odd_lists_of_control_tokens_name_none(tmp_path, told):
    tokenizer = Tokenizer.from_pretrained(write_folder(tmp_path, special=CHATML, words=[("gate", False)], config=told), "chatml")
    assert tokenizer.encode("gate") == [761]


def test_a_template_that_is_not_followed_still_names_control_tokens(tmp_path, capsys):
    unknown = "{{ '[INST]' + messages[0].content|replace('a', 'b') + '[/INST]' }}"
    words = [("[INST]", False), ("<think>", False)]
    tokenizer = Tokenizer.from_pretrained(write_folder(tmp_path, special=CHATML, words=words, template=unknown + "<think>"))
    assert "not known" in line_said(capsys)
    assert 761 not in tokenizer.encode("[INST]") and tokenizer.encode("<think>") == [762]      # an ordinary word stays one


def test_a_control_token_of_the_template_must_be_in_the_vocabulary(tmp_path):
    folder = write_folder(tmp_path, special=["<|begin_of_text|>", "<|eot_id|>"])
    refused(r"the vocabulary has no control token <\|(end|start)_header_id\|>; try another --format", Tokenizer.from_pretrained, folder, "llama3")


@pytest.mark.parametrize("special, says", [(True, "are merged, but not all"), (False, "its control token ## is an ordinary token as well")])
def test_a_control_token_that_a_user_could_type_is_refused(tmp_path, special, says):
    def change(raw):                                                               # an id that two characters have as they stand
        entry = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
        raw["added_tokens"].append(dict(entry, id=raw["model"]["vocab"]["##"], content="##", special=special))
    folder = write_folder(tmp_path, special=CHATML, template="{% for m in messages %}## {{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}## assistant\n", change=change)
    refused(says, Tokenizer.from_pretrained, folder)


@pytest.mark.parametrize("field", ["lstrip", "rstrip", "single_word"])
def test_a_control_token_that_swallows_spaces_must_not_be_used(tmp_path, field):
    def change(which):
        return lambda raw: raw["added_tokens"][which].update({field: True})
    refused(r"control token <\|im_end\|> depends on the spaces", Tokenizer.from_pretrained, write_folder(tmp_path, change=change(1), **FOLDERS["chatml"]))
    assert Tokenizer.from_pretrained(write_folder(tmp_path, change=change(4), **FOLDERS["chatml"])).stop == [757, 758]


def told(*entries):
    """added_tokens_decoder of a tokenizer_config.json, by the entries' ids."""
    flags = dict(lstrip=False, rstrip=False, single_word=False, normalized=False, special=False)
    return {"added_tokens_decoder": {str(entry.pop("id")): {**flags, **entry} for entry in entries}}


def test_added_tokens_that_another_file_tells_otherwise_are_refused(tmp_path):
    """transformers takes both files' word for them, so that its ids would be others."""
    same = told(dict(id=761, content="gate"), dict(id=757, content="<|im_end|>", special=True))
    folder = write_folder(tmp_path, **ONE_WORD, config=same, template=turns())
    assert Tokenizer.from_pretrained(folder).encode("gate") == [761]
    for flag in ("lstrip", "rstrip", "single_word", "normalized"):
        write_folder(tmp_path, **ONE_WORD, config=told({"id": 761, "content": "gate", flag: True}))
        refused(f"the added token 'gate' of tokenizer_config.json .* has another {flag} in", Tokenizer.from_pretrained, folder)
    write_folder(tmp_path, **ONE_WORD, config=told(dict(id=762, content="door")))
    refused("the added token 'door' of .* is not in tokenizer.json", Tokenizer.from_pretrained, folder)
    write_folder(tmp_path, **ONE_WORD, config=told(dict(id=762, content="<door>", special=True)))   # a user's is plain text
    assert Tokenizer.from_pretrained(folder).encode("gate") == [761]
    write_folder(tmp_path, **ONE_WORD, config=told(dict(id=757, content="<|im_end|>", rstrip=True, special=True)))
    refused(r"<\|im_end\|> depends on the spaces", Tokenizer.from_pretrained, folder)
    write_folder(tmp_path, **ONE_WORD)
    (tmp_path / "added_tokens.json").write_text('{"door": 762}')
    refused("the added token 'door' of .* is not in tokenizer.json", Tokenizer.from_pretrained, folder)


def test_a_tokenizer_class_that_changes_ids_is_not_written(tmp_path):
    other = {"tokenizer_class": "GPT2Tokenizer"}
    Tokenizer.from_pretrained(write_folder(tmp_path / "a", special=CHATML, config=other)).save_pretrained(tmp_path / "b")
    assert json.loads((tmp_path / "b/tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    other["add_prefix_space"] = True
    refused("adds a space before every text", Tokenizer.from_pretrained, write_folder(tmp_path / "a", special=CHATML, config=other, pre_tokenizer=BYTES))


@pytest.mark.parametrize("splitter", [{"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]}, BYTES])
def test_a_space_before_every_text_is_refused_whatever_splits_it(tmp_path, splitter):
    config = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}
    refused("adds a space before every text", Tokenizer.from_pretrained, write_folder(tmp_path, special=CHATML, config=config, pre_tokenizer=splitter))


def test_a_field_that_spells_control_tokens_as_text_is_not_written(tmp_path):
    Tokenizer.from_pretrained(write_folder(tmp_path / "a", turns(), special=CHATML, config={"split_special_tokens": True})).save_pretrained(tmp_path / "b")
    assert "split_special_tokens" not in json.loads((tmp_path / "b/tokenizer_config.json").read_text())


def test_what_the_folders_library_writes_before_plain_text_is_written(tmp_path):
    """Of a base model without a chat template, which may spell its start as it likes."""
    def begin(raw, processor=None):
        single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        raw["post_processor"] = processor or {"type": "TemplateProcessing", "single": single}

    def nested(raw):
        begin(raw)
        raw["post_processor"] = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, raw["post_processor"]]}

    def word(raw):
        begin(raw)
        raw["added_tokens"][0]["special"] = False

    two = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": name}} for name in ("<s>", "</s>")] + [{"Sequence": {"id": "A"}}]}
    none = {"type": "TemplateProcessing", "single": []}
    for change, start in ((begin, [756]), (nested, [756]), (word, [756]), (None, []), (lambda raw: begin(raw, {"type": "ByteLevel"}), []),
                          (lambda raw: begin(raw, two), [756, 757]), (lambda raw: begin(raw, none), [])):
        tokenizer = Tokenizer.from_pretrained(write_folder(tmp_path / "a", special=["<s>", "</s>"], config={"eos_token": "</s>"}, change=change))
        assert tokenizer.prompt_ids("i", "x") == start + tokenizer.encode("i\nx")
        tokenizer.save_pretrained(tmp_path / "b")
        assert Tokenizer.from_pretrained(tmp_path / "b").prompt_ids("i", "x") == start + tokenizer.encode("i\nx")


@pytest.mark.parametrize("pattern", [r"\<\/?\p{L}+\>|\p{L}+|\p{N}|[^\p{L}\p{N}]", r" ?[^\s\p{L}\p{N}\<\>]+|\<|\>| ?\p{L}+|\p{N}|\s+"])
def test_an_escape_that_two_engines_read_differently_is_refused(tmp_path, pattern):
    splitter = {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}, {**BYTES, "use_regex": False}]}
    refused("this pre_tokenizer is not known", Tokenizer.from_pretrained, write_folder(tmp_path, special=CHATML, pre_tokenizer=splitter))


# ------------------------------------------------------------------ end marks


PHI = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>", "<|eos|>"]
TURN = "{%% for m in messages %%}<|{{ m.role }}|>\n{{ %s }}<|end|>\n{%% endfor %%}{%% if add_generation_prompt %%}<|assistant|>\n{%% endif %%}"


@pytest.mark.parametrize("special, template, config, stop", [
    (PHI, TURN % "m.content", {}, ["<|end|>", "<|endoftext|>"]),                   # what closes an assistant's turn
    (PHI, TURN % "m.content", {"eos_token": "<|eos|>"}, ["<|end|>", "<|endoftext|>", "<|eos|>"]),      # and what generation_config.json names
    (PHI, TURN % "m.content if m.role == 'user' else m.content.split('x')", {"eos_token": "<|eos|>"}, ["<|eos|>", "<|endoftext|>"]),
    (PHI, "<|user|>\n{{ messages[0].content }}<|assistant|>\n", {"eos_token": "<|end|>"}, ["<|end|>", "<|endoftext|>"]),
    (PHI[1:], TURN % "m.content", {}, ["<|end|>"]),
    (PHI, "{{ bos_token }}" + (TURN % "m.content").replace("<|end|>", "{{ bos_token if m.role == 'assistant' else '' }}"), {"bos_token": "<|end|>"}, ["<|end|>", "<|endoftext|>"]),
    (PHI, (TURN % "m.content").replace("{% if add_generation_prompt %}", "{% if true %}"), {}, ["<|end|>", "<|endoftext|>"]),
    (PHI, (TURN % "m.content").replace("<|end|>", "").replace("add_generation_prompt", "true"), {}, ["<|endoftext|>"]),      # it always asks for more
    (PHI, "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}<|user|>{{ m.content }}<|assistant|>{% else %}{{ m.content }}{% endif %}{% endfor %}",
     {"bos_token": "<|end|>", "eos_token": "<|eos|>"}, ["<|eos|>", "<|endoftext|>"]),       # it opens each turn of the user's
    (PHI, (TURN % "m.content").replace("<|end|>", "{% if m.role == 'user' or loop.nextitem %}<|end|>{% endif %}"), {}, ["<|end|>", "<|endoftext|>"]),
    (PHI, (TURN % "m.content").replace("<|end|>", "{% if m.role == 'user' or loop.previtem.role == 'user' %}<|end|>{% endif %}"), {}, ["<|end|>", "<|endoftext|>"]),
    (PHI, (TURN % "m.content").replace("{% endif %}", "{% else %}{{ raise_exception('x') }}{% endif %}"), {"eos_token": "<|eos|>"}, ["<|end|>", "<|endoftext|>"]),
    (["<|end|>", "<|endoftext|>"], None, {"eos_token": ["<|end|>"]}, ["<|endoftext|>"]),
    (["<s>", "</s>"], None, {"eos_token": {"content": "</s>"}}, ["</s>"]),
    (["<|end|>", "<|im_end|>", "<|im_start|>"], turns(), {"eos_token": "<|end|>"}, ["<|im_end|>"])])
def test_an_answer_ends_as_the_folder_says(tmp_path, capsys, special, template, config, stop):
    folder = write_folder(tmp_path / "a", template, special=special, config=config)
    if "<|eos|>" in stop[1:]:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 756 + special.index("<|eos|>")}))
    before = Tokenizer.from_pretrained(folder)
    before.save_pretrained(tmp_path / "b")
    for tokenizer in (before, Tokenizer.from_pretrained(tmp_path / "b")):
        assert tokenizer.stop == [tokenizer.special[mark] for mark in stop] and tokenizer.answer_ids("")[-1] == tokenizer.stop[0]
    assert not capsys.readouterr().err


def test_generation_config_can_end_an_answer_at_an_added_word_but_not_at_text(tmp_path, capsys):
    folder = write_folder(tmp_path, template=turns(), special=CHATML, words=[("</end>", False)])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [757, 761]}))
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.stop == [757, 758, 761] and tokenizer.decode([761]) == "" and 761 not in tokenizer.encode("</end>")
    assert not capsys.readouterr().err
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [757, 5]}))
    assert Tokenizer.from_pretrained(folder).stop == [757, 758]
    assert "generation_config.json ends answers at 5, the id of ordinary text: not followed" in line_said(capsys)


def test_where_nothing_ends_an_answer_that_is_said(tmp_path):
    refused("has no control token <.im_end.>, and no eos_token that is one; try", Tokenizer.from_pretrained, write_folder(tmp_path, special=["<s>", "</s>"]))


# ------------------------------------------------------------------ chat templates


def line_said(capsys):
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said


@pytest.mark.parametrize("name", [name for name, fields in FOLDERS.items() if "template" in fields])
def test_the_prompt_is_that_of_the_folders_own_template(tmp_path, capsys, name):
    folder = write_folder(tmp_path / "a", **FOLDERS[name])
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.prompt_ids(*PROMPT) == GOLDEN[name]["prompt"] and not capsys.readouterr().err
    tokenizer.save_pretrained(tmp_path / "b")                                      # and of what is made of it
    assert Tokenizer.from_pretrained(tmp_path / "b").prompt_ids(*PROMPT) == GOLDEN[name]["prompt"]


@pytest.mark.parametrize("template, says", [("{% for m in messages %}{% for k in m %}{{ k }}{% endfor %}{% endfor %}", "role"), ("{% " * 60_000, "no %} after {%"),
                                            (" " * 60_000 + "{{ messages", "no }} after {{")])
def test_a_template_that_is_odd_or_endless_is_told_of(tmp_path, capsys, template, says):
    folder = write_folder(tmp_path, template, special=CHATML)
    Tokenizer.from_pretrained(folder)
    assert says in line_said(capsys)


@pytest.mark.parametrize("pattern", [r"\p{L}{1,99999999999}|.", "(" * 3000 + "a" + ")" * 3000])
def test_a_pattern_that_no_engine_takes_is_not_known(pattern):
    assert not data.is_read_alike(pattern)


def test_a_template_is_found_wherever_it_may_stand(tmp_path, capsys):
    folder = write_folder(tmp_path, special=CHATML, config={"bos_token": None})
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "{{ bos_token }}" + turns()}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    (folder / "special_tokens_map.json").write_text('{"bos_token": "<|startoftext|>"}')
    assert Tokenizer.from_pretrained(folder).prompt_ids(*PROMPT) == GOLDEN["chatml_bos"]["prompt"]
    (folder / "chat_template.jinja").write_text(turns(separator="<|im_sep|>", close="<|im_end|>") + "\n")
    assert Tokenizer.from_pretrained(folder).prompt_ids(*PROMPT) == GOLDEN["chatml_sep"]["prompt"]       # it comes first
    assert not capsys.readouterr().err


@pytest.mark.parametrize("config", [{}, {"eos_token": "<|startoftext|>"}])
def test_what_is_written_makes_the_same_prompt_whatever_its_template_names(tmp_path, capsys, config):
    """Tokens named in another file, and an eos_token that is not the end mark: what we write has one of ours."""
    folder = write_folder(tmp_path / "a", "\n{{ bos_token }}" + turns(close="' + eos_token + '" if "eos_token" in config else "<|im_end|>"),
                          special=CHATML, config=config)
    (folder / "special_tokens_map.json").write_text('{"bos_token": {"content": "<|startoftext|>"}}')
    before = Tokenizer.from_pretrained(folder)
    before.save_pretrained(tmp_path / "b")
    after = Tokenizer.from_pretrained(tmp_path / "b")
    assert not capsys.readouterr().err and before.before.startswith("\n<|startoftext|>")
    assert (after.before, after.after, after.trim) == (before.before, before.after, before.trim)
    assert ("<|startoftext|><|im_start|>assistant" in after.after.replace("\n", "")) == ("eos_token" in config)
    after.save_pretrained(tmp_path / "c")                                          # and of what is made of that
    assert Tokenizer.from_pretrained(tmp_path / "c").before == before.before


@pytest.mark.parametrize("use, says", [("{{ eos_token }}", ""), ("{% if eos_token is defined %}<|im_sep|>{% endif %}", ""), ("{{ cls_token if cls_token else '' }}", "cls_token"),
                                       ("{# no bos_token #}{{ eos_token }}", "")])
def test_a_token_that_no_file_tells_is_none_in_what_is_written_too(tmp_path, capsys, use, says):
    """What we write tells an eos_token: the prompt that was trained must not begin to have one."""
    before = Tokenizer.from_pretrained(write_folder(tmp_path / "a", turns() + use, special=CHATML))
    said = line_said(capsys)
    assert f"names {says or 'eos_token'}, which no file tells: taken for nothing" in said
    assert before.prompt_ids(*PROMPT) == GOLDEN["chatml"]["prompt"]
    for here, there in ("ab", "bc"):
        Tokenizer.from_pretrained(tmp_path / here).save_pretrained(tmp_path / there)
    capsys.readouterr()
    assert Tokenizer.from_pretrained(tmp_path / "c").prompt_ids(*PROMPT) == GOLDEN["chatml"]["prompt"]
    assert not capsys.readouterr().err                                             # it was said once


@pytest.mark.parametrize("config", [{"cls_token": "<|im_sep|>"}, {"extra_special_tokens": {"cls_token": "<|im_sep|>"}}, {"turn_token": "<|im_sep|>"},
                                    {"extra_special_tokens": {"turn": "<|im_sep|>", "<|im_end|>": "<|im_end|>"}}])
def test_a_template_may_name_any_token_that_the_folder_names(tmp_path, capsys, config):
    name, = re.findall("turn_token|turn|cls_token", str(config))
    folder = write_folder(tmp_path / "a", turns(separator="' + %s + '" % name, close="<|im_end|>"), special=CHATML, config=config)
    Tokenizer.from_pretrained(folder).save_pretrained(tmp_path / "b")
    for some in (folder, tmp_path / "b"):
        assert Tokenizer.from_pretrained(some).prompt_ids(*PROMPT) == GOLDEN["chatml_sep"]["prompt"] and not capsys.readouterr().err


@pytest.mark.parametrize("config, by_map, end", [
    ({}, "<|endoftext|>", "<|endoftext|>"), ({}, None, "<|im_end|>"), ({"added_tokens_decoder": {}}, "<|endoftext|>", "<|im_sep|>")])
def test_of_two_files_that_name_a_token_the_one_counts_that_counts_in_transformers(tmp_path, config, by_map, end):
    folder = write_folder(tmp_path, turns(close="' + eos_token + '"), special=CHATML, config={"eos_token": "<|im_sep|>", **config})
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": by_map}))
    assert Tokenizer.from_pretrained(folder).end_mark == end


@pytest.mark.parametrize("named", [{"sep_token": "[gate]"}, {"additional_special_tokens": ["[gate]"]}])
def test_what_any_file_names_is_a_control_token_whichever_file_counts(tmp_path, named):
    folder = write_folder(tmp_path, turns(), special=CHATML, words=[("[gate]", False)], config={"added_tokens_decoder": {}})
    assert 761 in Tokenizer.from_pretrained(folder).encode("[gate]")
    (folder / "special_tokens_map.json").write_text(json.dumps(named))
    assert 761 not in Tokenizer.from_pretrained(folder).encode("[gate]")                # a user's is plain text


OTHERS = [
    ("{{ '<|im_start|>system\\nBe good.<|im_end|>\\n' }}" + turns(), "writes '<.im_start.>system"), (turns(role="'human'"), "writes .*human"),
    (turns(content="m['content'] + m['content']"), "writes .*REQUESTREQUEST"), ("{# <|im_start|> #}", "writes ''"), ("{{ messages[1].content }}" + turns(), "messages.1"),
    (turns(content="m['content'][:9]"), "depends on the user's text"), (turns(content="(m['content'] if 'x' in m['content'] else '')"), "depends on"),
    (turns(content="m['content'].rstrip()"), r"rstrip\(\)"), (turns(content="m['content']|upper"), "upper"), ("{{ raise_exception('no') }}" + turns(), "raise_ex"),
    ("{% macro f() %}{% endmacro %}" + turns(), "macro"), ("{% if true %}" + turns() + "<|im_start|>", "no endif"), ("{{ bos_token + '' }}" + turns(), "bos_token"),
    ("{{ none }}" + turns(), "writes 'None"), ("{% for t in 5 %}{% endfor %}" + turns(), "not iterable"), ("{% if 1 % 0 %}{% endif %}" + turns(), "1 % 0"),
    ("{% if messages[0] | length %}X{% endif %}" + turns(), "length"), ("{% %}" + turns(), "{% %}"), ("{% if true %}" * 2000 + "{% endif %}" * 2000 + turns(), "recursion"), ("\ufeff" + turns(), "ufeff")]


@pytest.mark.parametrize("template, says", OTHERS, ids=map(str, range(len(OTHERS))))
def test_another_prompt_than_the_templates_is_said_in_one_line(tmp_path, capsys, template, says):
    tokenizer = Tokenizer.from_pretrained(write_folder(tmp_path, template, special=CHATML))
    said = line_said(capsys)
    assert re.search(says, said) and "our prompts are '<|im_start|>user\\nREQUEST<|im_end|>" in said, said
    assert tokenizer.prompt_ids(*PROMPT) == GOLDEN["chatml"]["prompt"]
    Tokenizer.from_pretrained(tmp_path, "chatml")                                  # --format: the user knows
    assert not capsys.readouterr().err


def test_jinja_is_read_as_transformers_reads_it(tmp_path, capsys):
    # each of these leaves ChatML as it is; golden ids of it are above
    for before, after in (("{% set x = 'a' if messages[0].tool_calls else '' %}", "{{ x }}"), ("{{ nothing }}", ""), ("{% if tools is defined and tools %}T{% endif %}", ""),
                          ("{% for m in messages %}{% set x = 'in the loop' %}{% endfor %}", "{{ x }}"), ("{#- says 'no' -#}\n", "\n"),
                          ("{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('x') }}{% endif %}{% endfor %}", ""),
                          ("{% for m in messages %}{% if loop.length != 1 or not loop.last %}X{% endif %}{% endfor %}", ""),
                          ("{% for m in messages %}{% if loop.previtem or loop.nextitem is defined %}X{% endif %}{% endfor %}", ""),
                          ("{% for m in messages %}{% for n in messages %}{% if loop.depth0 != 0 or loop.depth != 1 %}X{% endif %}{% endfor %}{% endfor %}", ""),
                          ("{% if raise_exception is not defined or strftime_now is not defined %}X{% endif %}", ""),
                          ("{% if messages[0].role == 'system' %}S{% elif messages[0]['role'] is not string %}X{% else %}{% endif %}", ""),
                          ("{% if messages[0].role == 'user' %}{% elif messages[0].tools | length > 0 %}X{% endif %}", "")):
        tokenizer = Tokenizer.from_pretrained(write_folder(tmp_path, before + turns() + after, special=CHATML))
        assert tokenizer.prompt_ids(*PROMPT) == GOLDEN["chatml"]["prompt"] and not capsys.readouterr().err, before


@pytest.mark.parametrize("file, text, says", [
    ("tokenizer_config.json", "[1]", "tokenizer_config.json: is not a JSON object"), ("tokenizer_config.json", "{", "not valid JSON"),
    ("tokenizer_config.json", '{"chat_template": 5}', "neither a text nor a list"), ("tokenizer_config.json", '{"chat_template": [{"name": "default"}]}', "neither a text"),
    ("tokenizer_config.json", '{"chat_template": "x", "bos_token": 5}', "bos_token is 5, which is no text"), ("special_tokens_map.json", "[]", "is not a JSON object"),
    ("config.json", "[]", "config.json: is not a JSON object"), ("config.json", '{"vocab_size": "761"}', "must be whole numbers"),
    ("config.json", '{"vocab_size": 761, "max_position_embeddings": null}', "must be whole numbers"),
    ("config.json", '{"vocab_size": 761, "max_position_embeddings": 1%s}' % ("0" * 400), "must be whole numbers below 2.31")])
def test_odd_files_beside_the_tokenizer_are_named(tmp_path, file, text, says):
    (write_folder(tmp_path, special=CHATML) / file).write_text(text)
    refused(says, Tokenizer.from_pretrained, tmp_path)


# ------------------------------------------------------------------ weights


EMBEDDING, HEAD, QUERY = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tied"))


def logits(folder):
    model = Llama.from_pretrained(folder, "cpu", torch.float64)
    tokens = torch.arange(30) * 7
    return (model(tokens, torch.full((30,), 30)) @ model.head.T).detach()


def tensors(**change):
    """Rewrite the file's tensors: name with __ for . -> function of all tensors, or None to drop it."""
    def edit(folder):
        weights = load_file(folder / "model.safetensors")
        for name, make in change.items():
            if make is None:
                del weights[name.replace("__", ".")]
            else:
                weights[name.replace("__", ".")] = make(weights).clone()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return edit


def config(**fields):
    def edit(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return edit


def shards(index=lambda where: where, keep=False, **more):
    """Two shards and an index; more: tensors of a third one."""
    def edit(folder):
        weights = load_file(folder / "model.safetensors")
        names = sorted(weights)
        files = {"a.safetensors": names[:7], "b.safetensors": names[7:]}
        for file, some in files.items():
            save_file({name: weights[name] for name in some}, folder / file)
        where = {name: file for file, some in files.items() for name in some}
        if more:
            save_file({name.replace("__", "."): make(weights) for name, make in more.items()}, folder / "c.safetensors")
            where["x"] = "c.safetensors"
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index(where)}))
        if not keep:
            (folder / "model.safetensors").unlink()
    return edit


def embedding(weights):
    return weights[EMBEDDING]


INVERSE = dict(model__rotary_emb__inv_freq=lambda w: torch.rand(4), model__layers__1__self_attn__rotary_emb__cos_cached=lambda w: torch.rand(9, 4))
SAME = [lambda folder: tensors(model__embed_tokens__weight=None)(tensors(lm_head__weight=embedding)(folder) or folder), tensors(lm_head__weight=embedding),
        tensors(**INVERSE), shards(), config(quantization_config=None), config(torch_dtype="torch.bfloat16"), config(torch_dtype="half"),
        config(torch_dtype=None, dtype="bfloat16"), config(rope_scaling={"rope_type": "default"}), config(rope_parameters={"rope_theta": 10000.0, "rope_type": "default"})]
OTHER_WEIGHTS = [
    (tensors(lm_head__weight=lambda w: w[EMBEDDING] + 1), "says tie_word_embeddings, but model.embed_tokens.weight and lm_head.weight differ"),
    (tensors(lm_head__weight=lambda w: torch.cat([w[EMBEDDING], w[EMBEDDING][:7]])), "lm_head.weight has shape .768, 32., config.json says .761, 32."),
    (tensors(model__embed_tokens__weight=lambda w: torch.zeros(768, 32)), "embed_tokens.weight has shape"), (config(tie_word_embeddings=False), "the first is lm_head.weight"),
    (tensors(model__norm__weight=lambda w: torch.tensor(1.0)), r"norm.weight has shape \[\]"), (tensors(scale=lambda w: torch.tensor(1.0)), "tensor scale is not part"),
    *[(tensors(model__layers__0__self_attn__q_proj__weight=lambda w, to=to: w[QUERY].to(to)), f"q_proj.weight is {str(to)[6:]}; quantized")
      for to in (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32, torch.bool)],
    (tensors(model__layers__0__self_attn__q_proj__weight=lambda w: torch.zeros(512, 1, dtype=torch.uint8)), "q_proj.weight has shape"),
    (config(quantization_config={"load_in_8bit": False}), "has a quantization_config"), (config(quantization_config="awq"), "has a quantization_config"),
    (tensors(model__layers__1__mlp__up_proj__weight=lambda w: w["model.layers.1.mlp.up_proj.weight"] * float("inf")), "up_proj.weight holds NaN or infinity"),
    (shards(model__norm__weight=lambda w: w["model.norm.weight"]), "c.safetensors: tensor model.norm.weight is in another file, too"),
    (shards(index=lambda where: {**where, "x": "c.safetensors"}), "c.safetensors: no such file"), (shards(index=lambda where: {}), "has no weight_map"),
    *[(shards(index=lambda where, name=name: {**where, "x": name}), "is no safetensors file of this folder")
      for name in ("../a.safetensors", "/a.safetensors", "sub/a.safetensors", "a.bin", "", 5, None, ["a.safetensors"])],
    (shards(index=list), "has no weight_map"), (lambda folder: [shards()(folder), (folder / "model.safetensors.index.json").write_text("[]")], "index.json: is not a JSON object")]


@pytest.fixture
def folder(tied, tmp_path):
    for path in tied.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize("change", SAME, ids=map(str, range(len(SAME))))
def test_the_same_weights_in_another_dress_are_read(tied, folder, capsys, change):
    change(folder)
    assert torch.equal(logits(folder), logits(tied)) and not capsys.readouterr().err


def test_a_loaded_model_does_not_change_with_its_file(folder):
    model = Llama.from_pretrained(folder, "cpu", torch.float64)
    before = [weight.clone() for weight in model.parameters()]
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(-4096, 2)                                     # in place: the same file on disk
        file.write(bytes(4096))
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize("change, says", OTHER_WEIGHTS, ids=map(str, range(len(OTHER_WEIGHTS))))
def test_weights_that_are_not_those_of_the_config_are_refused(folder, change, says):
    change(folder)
    refused(says, Llama.from_pretrained, folder, "cpu", torch.float64)


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "adapter_model.safetensors", "consolidated.00.safetensors"])
def test_weights_beside_those_that_are_read_are_named(tied, folder, capsys, name):
    save_file({"x": torch.zeros(1)}, folder / name)
    assert torch.equal(logits(folder), logits(tied))
    said = line_said(capsys)
    assert "two sets of weights; model.safetensors is read" in said and name in said


def test_one_file_is_read_and_not_the_shards_of_an_index(tied, folder, capsys):
    shards(keep=True, model__norm__weight=lambda w: torch.zeros(32))(folder)
    assert torch.equal(logits(folder), logits(tied)) and "and not 3 more: a.safetensors, b.s" in line_said(capsys)


NUMBERS = [
    ("hidden_size", [32.0, "32", True, 0, -32, 10 ** 18, None, float("nan")], "hidden_size is .*, not a whole number"),
    ("num_hidden_layers", [2.0, 0, 10 ** 9], "num_hidden_layers is .*, not a whole number from 1 to 1000"),
    ("num_attention_heads", [0, -4, None, "4", 4.0], "num_attention_heads is .*, not a whole number"),
    ("num_key_value_heads", [3, 8], "heads must be a multiple"), ("head_dim", [7, 8.0, -8, "8"], "head_dim"),
    ("rms_norm_eps", ["1e-5", None, -1, 0, True, float("nan"), 10 ** 400], "rms_norm_eps is .*, not a number above 0"),
    ("rope_theta", [0, -1, None, "x", float("inf")], "rope_theta is .*, not a number above 0"), ("max_position_embeddings", [0, -1, 10 ** 400], "max_position_embeddings is"),
    ("tie_word_embeddings", ["false", 1], "tie_word_embeddings is .*, neither true nor false"),
    ("torch_dtype", ["int8", "float8_e4m3fn", "bf16", "auto", 5, "Float32"], "dtype '.*' is unknown"), ("dtype", ["int4"], "dtype 'int4' is unknown"),
    ("rope_scaling", [{"factor": 2}, {"rope_type": "dynamic"}, [1], "llama3"], "rope scaling .* is unknown"),
    ("rope_parameters", [{"full_attention": {"rope_type": "default"}}, {"rope_theta": "x"}], "rope"),
    ("rope_scaling", [dict(rope_type="llama3", factor=factor, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=64)
                      for factor in (0, -8, float("nan"), True, "8")], "factor is .*, not a number above 0"),
    ("rope_scaling", [dict(rope_type="llama3", factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=most) for most in (0, -5)],
     "original_max_position_embeddings is .*, not a number above 0"),
    ("rope_scaling", [dict(rope_type="llama3", factor=8, low_freq_factor=low, high_freq_factor=4, original_max_position_embeddings=64) for low in (4, 5)],
     "low_freq_factor is not below high_freq_factor"),
    ("rope_scaling", [dict(rope_type="llama3", factor=5e-324, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=64)],
     "turns by angles that are no numbers"),
    ("rope_parameters", [{"rope_type": "default", "rope_theta": 77.0}], r"rope_theta is 10000.0 and 77.0"),
    ("rope_parameters", [{"rope_type": "default", "partial_rotary_factor": 0.5}], "partial_rotary_factor is 0.5, only 1.0 is known")]


@pytest.mark.parametrize("name, value, says", [(name, value, says) for name, values, says in NUMBERS for value in values])
def test_fields_of_config_json_that_cannot_be_meant(folder, name, value, says):
    config(**{name: value})(folder)
    refused(says, Llama.from_pretrained, folder, "cpu", torch.float64)


@pytest.mark.parametrize("name", ["hidden_size", "num_attention_heads"])
def test_of_sizes_from_which_the_width_of_a_head_follows_the_wrong_one_is_named(folder, name):
    for value in (0, None, "4"):
        config(head_dim=None, **{name: value})(folder)
        refused(f"{name} is .*, not a whole number", LlamaConfig.from_json, folder / "config.json")


LLAMA3 = dict(rope_type="llama3", factor=32, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=64)


def test_two_spellings_of_rope_must_agree(folder):
    config(rope_theta=5e5, rope_scaling=LLAMA3, rope_parameters={**LLAMA3, "rope_theta": 5e5})(folder)
    both = LlamaConfig.from_json(folder / "config.json")
    assert both.rope_theta == 5e5 and both.rope_scaling["factor"] == 32
    for other in ({"rope_type": "default", "rope_theta": 5e5}, {**LLAMA3, "rope_theta": 1e4}):
        config(rope_parameters=other)(folder)
        refused("rope_parameters and rope_scaling say two different things|rope_theta is 500000.0 and 10000.0", LlamaConfig.from_json, folder / "config.json")


def test_an_epsilon_that_is_not_told_is_that_of_transformers(folder):
    path = folder / "config.json"
    told = json.loads(path.read_text())
    del told["rms_norm_eps"]
    path.write_text(json.dumps(told))
    assert LlamaConfig.from_json(path).rms_norm_eps == 1e-6


def test_weights_that_are_no_numbers_are_not_written(tmp_path, model):
    model.model["norm"].weight.data[3] = 1e5
    refused("not written, as model.norm.weight holds NaN or infinity in torch.float16", model.save_pretrained, tmp_path, torch.float16)
    assert not list(tmp_path.iterdir())
