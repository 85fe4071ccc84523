"""Inputs that happen and cannot work: each ends in one line that names the file or argument and the fault."""
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from processes import tiny_folder, write_pairs, write_records
from safetensors.torch import load_file, save_file

import data
import eval as evaluation
import mine_hard
import train_dpo
import train_sft

SCRIPTS = {"sft": (train_sft, "records.jsonl", ["--batch-size", "6", "--epochs", "1"]), "dpo": (train_dpo, "pairs.jsonl", ["--epochs", "1"]),
           "mine": (mine_hard, "records.jsonl", ["--max-new-tokens", "3", "--k", "2"]),
           "eval": (evaluation, "records.jsonl", ["--max-new-tokens", "3"])}
RECORD = {"instruction": "i", "input": "x", "output": "harmful", "chosen": "a", "rejected": "b"}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4943274328\n"       # what a clone without LFS holds


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder where every script works: model/, records.jsonl, pairs.jsonl."""
    folder = tmp_path_factory.mktemp("good")
    tiny_folder(folder / "model")
    write_records(folder / "records.jsonl", 6)
    write_pairs(folder / "pairs.jsonl", 4)
    return folder


@pytest.fixture
def place(good, tmp_path):
    return shutil.copytree(good, tmp_path / "place")


def run(place, stage, *more):
    script, file, usual = SCRIPTS[stage]
    script.main(["--model", str(place / "model"), "--data", str(place / file), "--out", str(place / "out"), "--device", "cpu",
                 "--dtype", "float32", *usual, *(str(a).replace("PLACE", str(place)) for a in more)])


def fails(capsys, call, *arguments):
    """The one line that a call ends in: what InputError says, or argparse after its usage lines."""
    with pytest.raises(SystemExit) as error:
        call(*arguments)
    message = capsys.readouterr().err.strip().splitlines()[-1] if error.value.code == 2 else str(error.value.code)
    assert "\n" not in message and len(message) > 10
    return message


# ---- what can be wrong with a file: (file, how it becomes wrong, stage, what the line says)


def config(**fields):
    def change(path):
        raw = json.loads(path.read_text())
        raw.update(fields)
        path.write_text(json.dumps({name: value for name, value in raw.items() if value != "GONE"}))
    return change


def text(content):
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode())


def lines(*records):
    return text("".join(json.dumps(r) + "\n" for r in records))


def tensors(change):
    def edit(path):
        weights = load_file(path)
        change(weights)
        save_file(weights, path)
    return edit


def sharded(path):
    """Two shards, the second of which is cut short, as an interrupted download leaves it."""
    weights = load_file(path)
    names = sorted(weights)
    files = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, some in files.items():
        save_file({name: weights[name] for name in some}, path.with_name(file))
    path.with_name("b.safetensors").write_bytes(path.with_name("b.safetensors").read_bytes()[:-500])
    where = {name: file for file, some in files.items() for name in some}
    path.with_name("model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    path.unlink()


def without_shard(path):
    sharded(path)
    path.with_name("b.safetensors").unlink()


def without_tokens(path):
    """A vocabulary that is larger than the model's."""
    config(vocab_size=700)(path)
    tensors(lambda w: w.update({"model.embed_tokens.weight": w["model.embed_tokens.weight"][:700].clone()}))(path.with_name("model.safetensors"))


def move(name):
    return lambda path: path.rename(path.with_name(name))


FILES = [
    ("model/config.json", config(num_hidden_layers="GONE"), "sft", "config.json: missing .*'num_hidden_layers'"),
    ("model/config.json", config(hidden_size="32", head_dim=None), "mine", "config.json: hidden_size is '32', not a whole number"),
    ("model/config.json", config(rope_scaling={"rope_type": "yarn", "factor": 4}), "sft", "config.json: rope scaling 'yarn' is unknown"),
    ("model/config.json", config(rope_scaling={"type": "linear", "factor": 2}), "eval", "rope scaling 'linear' is unknown"),
    ("model/config.json", config(rope_scaling={"rope_type": "llama3", "factor": 8}), "sft", "config.json: 'low_freq_factor' .absent"),
    ("model/config.json", config(attention_bias=True), "mine", "config.json: attention_bias is True"),
    ("model/config.json", config(hidden_act="gelu"), "eval", "config.json: hidden_act is 'gelu', only 'silu'"),
    ("model/config.json", config(intermediate_size=48), "sft", "model.safetensors: tensor .*mlp.* has shape .* config.json says"),
    ("model/config.json", config(num_hidden_layers=3), "dpo", "9 tensors are missing, the first is model.layers.2"),
    ("model/config.json", config(tie_word_embeddings=False), "sft", "1 tensors are missing, the first is lm_head.weight"),
    ("model/config.json", text(b"\xff\xfe{}"), "sft", "config.json: cannot read: not UTF-8"),
    ("model/config.json", without_tokens, "sft", "model: the tokenizer has more tokens than config.json says"),
    ("model/model.safetensors", tensors(lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": w["model.norm.weight"].clone()})), "sft",
     "tensor model.layers.0.self_attn.q_proj.bias is not part of a LLaMA"),
    ("model/model.safetensors", sharded, "mine", "b.safetensors: damaged or cut short"),
    ("model/model.safetensors", without_shard, "eval", "b.safetensors: no such file"),
    ("model/model.safetensors", move("pytorch_model.bin"), "sft", "model.safetensors: no such file; .* safetensors"),
    ("model/model.safetensors", move("model-00001-of-00001.safetensors"), "sft", "^[^\n]*model.safetensors: no such file; nor is model.safetensors.index.json"),
    ("model/model.safetensors", text(POINTER), "sft", "model.safetensors: damaged or cut short .* fetch"),
    ("model/model.safetensors", text(""), "dpo", "model.safetensors: damaged or cut short"),
    ("model/tokenizer.json", move("vocab.json"), "sft", "neither tokenizer.json nor tokenizer.model"),
    ("model/tokenizer.json", text(POINTER), "mine", "tokenizer.json is not valid JSON"),
    ("model/tokenizer.json", text('{"model": {"type": "Unigram", "vocab": []}}'), "sft", "tokenizer.json: only byte-level BPE"),
    ("model/tokenizer.json", move("tokenizer.model"), "sft", "tokenizer.model: not a Llama 3 tokenizer.model"),
    ("records.jsonl", text('[{"instruction": "caf\xe9"}]'.encode("latin-1")), "sft", "records.jsonl: cannot read: not UTF-8"),
    ("records.jsonl", lambda path: (path.unlink(), path.mkdir()), "sft", "records.jsonl: cannot read: Is a directory"),
    ("records.jsonl", lines("a", "b"), "mine", "records.jsonl: line 1 is not a JSON object"),
    ("records.jsonl", lines(RECORD, {**RECORD, "output": None}), "sft", "records.jsonl: line 2 has no text in field 'output'"),
    ("records.jsonl", lines({**RECORD, "output": "  \n"}), "sft", "records.jsonl: no usable record"),
    ("records.jsonl", lines({**RECORD, "output": "maybe"}), "eval", "records.jsonl: no record has a label .harmful, unharmful"),
    ("pairs.jsonl", text(""), "dpo", "pairs.jsonl: no usable record"),
    ("pairs.jsonl", lines({**RECORD, "chosen": ["a"]}), "dpo", "pairs.jsonl: line 1 has no text in field 'chosen'"),
    ("pairs.jsonl", lines({**RECORD, "rejected": ""}), "dpo", "pairs.jsonl: no usable record"),
    ("pairs.jsonl", lines({**RECORD, "weight": -0.5}), "dpo", "pairs.jsonl: a weight is -0.5"),
    ("pairs.jsonl", lines({**RECORD, "weight": 10 ** 400}), "dpo", "pairs.jsonl: a weight is 1000"),
    ("pairs.jsonl", lines(RECORD, {**RECORD, "weight": float("nan")}), "dpo", "pairs.jsonl: a weight is nan"),
    ("pairs.jsonl", lines({**RECORD, "sample_weight": None}), "dpo", "pairs.jsonl: a weight is None"),
    ("out", text("not a folder"), "sft", "place/out: cannot write: File exists"), ("out", text(""), "dpo", "place/out: cannot write: File exists"),
    ("out", text(""), "mine", "out: cannot write: "), ("out", text(""), "eval", "out.*: cannot write: ")]


@pytest.mark.parametrize("file, spoil, stage, says", FILES, ids=[f"{n}-{row[0]}" for n, row in enumerate(FILES)])
def test_a_bad_file_is_named(place, capsys, file, spoil, stage, says):
    spoil(place / file)
    message = fails(capsys, run, place, stage)
    assert re.search(says, message), message
    assert not list(place.rglob("*.tmp")) and not (place / "out/model.safetensors").exists()


# ---- arguments that cannot be meant

ARGUMENTS = [("sft", "--batch-size", "0"), ("sft", "--batch-size", "many"), ("sft", "--epochs", "0"), ("sft", "--lr", "-1"),
             ("sft", "--lr", "nan"), ("sft", "--limit", "0"), ("sft", "--max-tokens", "-8"), ("sft", "--max-steps", "0"),
             ("sft", "--seed", "-1"), ("sft", "--save-every", "-2"), ("sft", "--keep", "0"), ("dpo", "--beta", "-0.1"),
             ("dpo", "--sft", "inf"), ("mine", "--k", "0"), ("mine", "--temperature", "-1"), ("mine", "--top-p", "-0.1"),
             ("mine", "--top-p", "1.5"), ("mine", "--gamma", "1.1"), ("eval", "--fpr", "2"),
             ("mine", "--gamma", "-0.2"), ("mine", "--block", "0"), ("mine", "--max-new-tokens", "0"), ("mine", "--limit", "-3"),
             ("eval", "--k", "-1"), ("eval", "--kv-tokens", "0"), ("eval", "--dtype", "float8"), ("eval", "--format", "alpaca")]


@pytest.mark.parametrize("stage, name, value", ARGUMENTS)
def test_a_bad_argument_is_named(place, capsys, stage, name, value):
    assert f"argument {name}: " in fails(capsys, run, place, stage, name, value)
    assert not (place / "out").exists()


@pytest.mark.parametrize("stage, arguments, says", [
    ("mine", ["--kv-tokens", 1], "--kv-tokens 1: .* raise it or lower --max-new-tokens"),
    ("mine", ["--kv-tokens", 2 ** 62, "--max-new-tokens", 10 ** 12], "needs .* GiB, .* are there: lower --kv-tokens or --max-new-tokens"),
    ("mine", ["--max-length", 5], "--max-length 5 is too short"), ("eval", ["--max-length", 5], "--max-length 5 is too short"),
    ("dpo", ["--max-length", 5], "--max-length 5 is too short: no record fits"), ("dpo", ["--device", "warp"], "--device warp"),
    ("eval", ["--device", "cuda:99"], "--device cuda:99"), ("mine", ["--model", "PLACE/none"], "none/?: no such folder; `hf download"),
    ("sft", ["--eval-data", "PLACE/none.json"], "none.json: cannot read"), ("eval", ["--predictions", "PLACE/none"], "none: cannot read")])
def test_what_does_not_go_together_is_said(place, capsys, stage, arguments, says):
    message = fails(capsys, run, place, stage, *arguments)
    assert re.search(says, message), message


# ---- going on where another run stopped


def interrupted(place, monkeypatch):
    """out/ with the checkpoint of a run that was stopped after its first step of three."""
    update = train_sft.update
    monkeypatch.setattr(train_sft, "update", lambda *args: (signal.raise_signal(signal.SIGTERM), update(*args))[1])
    with pytest.raises(SystemExit, match="interrupted after step 1"):
        run(place, "sft", "--batch-size", 2)
    monkeypatch.setattr(train_sft, "update", update)
    return place / "out/step-000001"


@pytest.mark.parametrize("arguments, says", [(["--batch-size", 3], "out: its run has batch_size = 2, not 3"),
                                             (["--batch-size", 2, "--seed", 1], "out: its run has seed = 42, not 1"),
                                             (["--batch-size", 2, "--epochs", 2], "its run has epochs = 1, not 2"),
                                             (["--batch-size", 2, "--max-steps", 2], "max_steps = None"),
                                             (["--batch-size", 2, "--max-length", 2000], "max_length = 2048")])
def test_a_checkpoint_of_another_run_is_not_continued(place, capsys, monkeypatch, arguments, says):
    interrupted(place, monkeypatch)
    assert says in fails(capsys, run, place, "sft", "--resume", *arguments)


@pytest.mark.parametrize("file, spoil, says", [
    ("optimizer.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-9]), "optimizer.safetensors: damaged or cut short"),
    ("optimizer.safetensors", lambda path: path.unlink(), "optimizer.safetensors is missing; remove this folder"),
    ("model.safetensors", text(""), "model.safetensors: damaged or cut short"), ("state.json", text(""), "state.json is not valid JSON"),
    ("state.json", text("{}"), "state.json does not say this step; remove this folder to go on from the checkpoint before it"),
    ("state.json", text('{"step": 2}'), "state.json does not say this step"), ("state.json", text('{"step": "1"}'), "state.json does not say this step"),
    ("model.safetensors", tensors(lambda weights: weights.pop("model.norm.weight")), "model.norm.weight is missing; remove this folder"),
    ("model.safetensors", tensors(lambda weights: weights.update(x=torch.ones(1))), "x is unknown"),
    ("model.safetensors", tensors(lambda weights: weights.update({"model.norm.weight": weights["model.norm.weight"].bfloat16()})), "another shape or dtype"),
    ("optimizer.safetensors", tensors(lambda weights: weights.clear()), "is missing"),
    ("optimizer.safetensors", tensors(lambda weights: weights.pop("model.norm.weight:exp_avg")), "model.norm.weight:exp_avg is missing"),
    ("optimizer.safetensors", tensors(lambda weights: weights.update({"x:y": torch.ones(1)})), "x:y is unknown"),
    ("optimizer.safetensors", tensors(lambda weights: weights.update({"model.norm.weight:step": torch.ones(2)})), "another shape or dtype")])
def test_a_damaged_checkpoint_is_named(place, capsys, monkeypatch, file, spoil, says):
    spoil(interrupted(place, monkeypatch) / file)
    assert says in fails(capsys, run, place, "sft", "--resume", "--batch-size", 2)


@pytest.mark.parametrize("stage, file", [("mine", "hard.jsonl"), ("eval", "records/generated_predictions.jsonl"), ("eval", "results.json")])
def test_files_that_were_not_made_here_are_not_written_over(place, capsys, stage, file):
    (place / "out" / file).parent.mkdir(parents=True, exist_ok=True)
    (place / "out" / file).write_text('{"lm-eval": 1}\n')
    says = "is there, and was not made here" if "results" in file else "move it away, or choose another --out"
    assert says in fails(capsys, run, place, stage)
    assert (place / "out" / file).read_text() == '{"lm-eval": 1}\n'


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "abc"}, {"WORLD_SIZE": "0"}, {"WORLD_SIZE": "-1"}, {"WORLD_SIZE": "2"}])
def test_ranks_that_torchrun_did_not_start_are_refused(place, capsys, monkeypatch, environment):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert ": start with torchrun, or unset WORLD_SIZE" in fails(capsys, run, place, "sft")


def test_a_field_that_stands_twice_is_refused(place, capsys):
    (place / "records.jsonl").write_text('{"instruction": "i", "input": "x", "output": "harmful", "output": "unharmful"}\n')
    assert "records.jsonl: line 1 is not valid JSON: the field 'output' stands twice" in fails(capsys, run, place, "sft")


@pytest.mark.parametrize("device", ["meta", "hpu", "privateuseone:0", "CPU"])
def test_a_device_of_another_kind_is_refused(place, capsys, device):
    assert f"--device {device}: is neither cuda, mps nor cpu" in fails(capsys, run, place, "sft", "--device", device)
    assert not (place / "out/metrics.jsonl").exists()


def test_a_damaged_samples_file_is_named(place, capsys):
    run(place, "mine")
    path = place / "out/samples.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    assert "samples.jsonl: line 6 is not valid JSON" in fails(capsys, run, place, "mine", "--resume")


# ---- numbers that are none


BROKEN = [("eval", []), ("eval", ["--scores"]), ("eval", ["--fast"]), ("eval", ["--k", "3"]), ("mine", []), ("mine", ["--temperature", "0"]), ("dpo", []), ("sft", [])]


@pytest.mark.parametrize("stage, flags", BROKEN)
@pytest.mark.parametrize("spoil", [lambda w: w["lm_head.weight"].mul_(1e39), lambda w: w["model.layers.0.mlp.up_proj.weight"].mul_(1e60)], ids=["head", "hidden"])
def test_logits_that_are_no_numbers_end_in_one_line_in_every_mode(place, capsys, stage, flags, spoil):
    tiny_folder(place / "model", tied=False)                                       # finite in float64, as it is stored
    tensors(spoil)(place / "model/model.safetensors")
    message = fails(capsys, run, place, stage, *flags)
    assert re.search("not numbers .NaN or infinity.|norm is nan: lower --lr, unless", message), message
    assert not any(re.search("NaN|Infinity", path.read_text()) for path in place.glob("out/**/*.json*") if path.is_file())
    assert not (place / "out/results.json").exists() and not (place / "out/hard.jsonl").exists()


def test_logits_that_are_no_numbers_are_no_verdict(place, capsys, monkeypatch):
    tiny_folder(place / "model", tied=False)
    tensors(lambda w: w["lm_head.weight"].mul_(1e39))(place / "model/model.safetensors")
    monkeypatch.setattr("sys.stdin", io.StringIO('{"prompt": "a"}\n'))
    for arguments in (["--moderate"], ["--prompt", "a", "--response", "b"]):
        message = fails(capsys, evaluation.main, ["--model", str(place / "model"), "--device", "cpu", "--dtype", "float32", *arguments])
        assert "the model's logits are not numbers" in message and not capsys.readouterr().out


def test_weights_that_a_rate_made_infinite_are_not_written(place, capsys):
    message = fails(capsys, run, place, "sft", "--lr", "1e39", "--max-steps", 1)
    assert "holds NaN or infinity" in message and not list(place.glob("out/*.safetensors"))


# ---- the rest


@pytest.mark.parametrize("line, says", [
    (b"[1, 2]", "is no JSON object"), (b'{"prompt": null}', 'must have the text "prompt"'),
    (b'{"prompt": "a", "response": 3}', 'may have the text "response"'), (b"{'prompt': 'a'}", "quotes"),
    (b'{"prompt": "a", "respones": "b"}', "unknown field 'respones'"), (b"", "is empty"),
    (b'{"prompt": "caf\xe9"}', "utf-8"), (b'{"prompt": ' + b"[" * 10 ** 5, "recursion"),
    (b'{"prompt": "a", "prompt": "b"}', "the field 'prompt' stands twice"), (b'{"prompt": NaN}', 'the text "prompt"'),
    (b'\xff\xfe{\x00"\x00', "utf-8"), (b"1" * 5000, "digits")])
def test_a_bad_line_is_answered_and_the_stream_goes_on(place, capsys, monkeypatch, line, says):
    stream = io.BytesIO(b'\xef\xbb\xbf{"prompt": "a"}\r\n' + line + b'\n{"prompt": "b"}')
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(stream))
    evaluation.main(["--model", str(place / "model"), "--moderate", "--device", "cpu",
                     "--max-new-tokens", "2", "--on-unparsable", "harmful"])
    first, bad, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert set(bad) == {*first, "error"} and set(first) == set(last)     # whoever reads v["cut"] can do so always
    assert bad["error"].startswith("line 2: ") and says in bad["error"].lower() + bad["error"]
    assert (bad["parsed"], bad["request"]) == (False, "harmful")


@pytest.mark.parametrize("flags", [["--fast"], ["--k", "3"], ["--scores"]])
def test_a_flag_that_moderation_does_not_know_is_named(place, capsys, flags):
    message = fails(capsys, evaluation.main, ["--model", str(place / "model"), "--prompt", "a", *flags])
    assert "--fast, --k, --scores are for --data" in message


@pytest.mark.parametrize("flags, says", [
    (["--moderate", "--prompt", "a"], "--moderate reads exchanges"), (["--moderate", "--response", "a"], "--response goes with"),
    (["--data", "toy/test.json", "--out", "o", "--response", "a"], "--response goes with"),
    (["--data", "toy/test.json", "--out", "o", "--on-unparsable", "harmful"], "--on-unparsable is for"),
    (["--data", "toy/test.json", "--out", "o", "--fast", "--k", "3"], "leave out --k")])
def test_a_flag_that_would_change_nothing_is_named(place, capsys, flags, says):
    assert says in fails(capsys, evaluation.main, ["--model", str(place / "model"), *flags])


def test_a_file_that_cannot_be_read_is_named_before_the_first_is_answered(place, capsys):
    out = place / "out"
    message = fails(capsys, evaluation.main, ["--model", str(place / "model"), "--data", "toy/test.json", str(place / "none.json"), "--out", str(out)])
    assert "none.json: cannot read" in message and not out.exists()


def test_figures_of_other_files_are_not_written_over_without_a_word(place, capsys):
    paths = []
    for name in ("one", "two"):
        paths.append(place / name / "generated_predictions.jsonl")
        paths[-1].parent.mkdir()
        paths[-1].write_text(json.dumps({"prompt": "a", "label": "harmful", "predict": "Request: harmful"}))
    for path, says in ((paths[0], None), (paths[0], None), (paths[1], str(paths[0]))):
        evaluation.main(["--predictions", str(path), "--out", str(place / "figures")])
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and says in err if says else not err
    whole = (place / "figures/results.json").read_bytes()
    for damaged in (b"[", b"", b"[]", whole[:40], whole[:-3], bytes(100), whole[:20] + "\u00e9".encode()[:1]):
        (place / "figures/results.json").write_bytes(damaged)
        evaluation.main(["--predictions", str(paths[0]), "--out", str(place / "figures")])
        assert json.loads((place / "figures/results.json").read_text())[0]["f1"] == 100
    for foreign in ("[1, {}]", '{"results": 1}', "5", '[{"name": 1}]', '{"task": "mmlu"}\n{"task": "arc"}\n', "task, f1\nrequest, 90", "[1, 2", '[{"task": 1, "task": 2}]', "[1]\n[2]\n"):
        (place / "figures/results.json").write_text(foreign)
        with pytest.raises(SystemExit, match="results.json: is there, and was not made here"):
            evaluation.main(["--predictions", str(paths[0]), "--out", str(place / "figures")])


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("command", [["eval.py", "--moderate", "--model", "toy/model"], ["mine_hard.py", "--model", "toy/model", "--data", "toy/dev.json", "--out", "OUT"]])
def test_a_signal_is_one_line(tmp_path, command, number):
    argv = [sys.executable, *(word.replace("OUT", str(tmp_path / "out")) for word in command)]
    code = f"""
import os, runpy, signal, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)
import model
plain = model.Llama.from_pretrained
def pressed(*a, **k):
    os.kill(os.getpid(), signal.{number})
    return plain(*a, **k)
model.Llama.from_pretrained = pressed
sys.argv = {argv[1:]!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], input=b"", capture_output=True, timeout=120, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert done.returncode == 1 and done.stderr.decode().count("\n") == 1 and b"interrupted; " in done.stderr, done.stderr[-2000:]


def test_two_files_of_one_name_are_not_mixed(capsys):
    command = ["--model", "toy/model", "--out", "x", "--data", "a/test.json", "b/test.json"]
    assert "two files of one name" in fails(capsys, evaluation.main, command)
    for name in ("..", "results.json"):
        command = ["--model", "toy/model", "--data", f"{name}.json", "--out", "out"]
        assert f"no folder of --out can be called '{name}'" in fails(capsys, evaluation.main, command)


def test_the_demo_takes_flags_but_no_other_model(capsys):
    args = train_sft.parse_arguments(["--resume", "--lr", "1e-3"])                 # as its last line says: --resume
    assert args.resume and args.lr == 1e-3 and args.batch_size == 32 and len(args.data) == 4
    assert train_sft.parse_arguments(["--data", "x"]).batch_size == 384
    assert "--data FILE... is missing" in fails(capsys, train_sft.main, ["--model", "llama"])


def test_odd_predictions_are_scored_or_named(tmp_path, capsys):
    path = tmp_path / "p.jsonl"
    lines({"prompt": None, "label": "harmful", "predict": "Request: harmful"})(path)
    evaluation.main(["--predictions", str(path), "--dataset", "x"])
    assert "100.00" in capsys.readouterr().out
    lines({"prompt": None, "label": "harmful", "predict": ""})(path)               # which the released script leaves out
    evaluation.main(["--predictions", str(path), "--dataset", "x", "--legacy"])
    assert "and 0 are missing" in capsys.readouterr().out
    text(b"\xff")(path)
    assert "p.jsonl: cannot read: not UTF-8" in fails(capsys, evaluation.main, ["--predictions", str(path)])


def test_half_a_surrogate_pair_goes_through_all_stages(place, capsys):
    odd = {**RECORD, "instruction": "Judge.\n", "input": data.format_input("a\ud800b")}
    lines(odd, RECORD)(place / "records.jsonl")
    run(place, "sft")
    run(place, "mine", "--model", place / "out", "--out", place / "hard")
    run(place, "eval", "--out", place / "eval")
    written = (place / "eval/records/generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(written[0])["prompt"].endswith(odd["input"])
    assert "1 records with characters that are not in the vocabulary, replaced" in capsys.readouterr().err
    run(place, "sft", "--eval-data", place / "records.jsonl", "--out", place / "again")
    assert capsys.readouterr().err.count("1 records with characters that are not in the vocabulary") == 2        # not 1, then 2


def test_fewer_records_than_a_batch_and_more_steps_than_batches_are_fine(place):
    run(place, "sft", "--batch-size", 100, "--max-steps", 50)
    row = json.loads((place / "out/metrics.jsonl").read_text().splitlines()[-1])
    assert row["step"] == 1


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_folder_that_cannot_be_written(place, capsys, stage):
    (place / "out").mkdir(mode=0o500)
    if os.access(place / "out", os.W_OK):
        pytest.skip("this user may write everywhere")
    message = fails(capsys, run, place, stage)
    assert "/out/" in message and "cannot write: " in message and "Permission denied" in message
