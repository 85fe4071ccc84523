"""The training loop: losses that do not depend on how work is cut up, schedules, resuming."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import CONFIG, ROOT, tiny_model, tiny_examples
from measure import SHAPES
from safetensors.torch import load_file

import train_sft
from data import Example, InputError, Tokenizer, deal, pack
from model import Llama, LlamaConfig, World, free_on_host
from processes import tiny_folder, without, write_records
from train_sft import batches, lr_at, make_optimizer, sft_loss, update

ARGS = ["--data", "toy/dev.json", "--lr", "1e-3", "--epochs", "2", "--batch-size", "10", "--limit", "32",
        "--dtype", "float32", "--device", "cpu"]
ALONE = World(torch.device("cpu"))


def run(out, *more):
    train_sft.main([*without(ARGS, more), "--out", str(out), *map(str, more)])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return rows[0], rows[1:], load_file(out / "model.safetensors")


def test_sft_loss_is_a_sum_over_the_count_of_the_whole_step():
    # two packs of one step: log-probabilities (-1 -2) and (-6); mean over 3 tokens is 3, not the mean of means
    parts = [sft_loss(torch.tensor([-1.0, -2.0]), 3), sft_loss(torch.tensor([-6.0]), 3)]
    assert sum(parts).item() == pytest.approx(3.0)
    assert sft_loss(torch.zeros(0), 3).item() == 0


def test_lr_is_half_a_cosine_from_the_peak_to_zero():
    # step 0 of 4: peak; step 2: half; after the last step it would be 0
    assert [lr_at(s, 4, 2.0) for s in (0, 2, 4)] == pytest.approx([2.0, 1.0, 0.0])
    assert lr_at(1, 4, 2.0) == pytest.approx(1 + math.cos(math.pi / 4))


def test_batches_are_a_function_of_seed_and_epoch_and_keep_the_short_last_one():
    first, again = list(batches(10, 4, 2, 7)), list(batches(10, 4, 2, 7))
    assert first == again and [len(b) for b in first] == [4, 4, 2, 4, 4, 2]
    assert sorted(sum(first[:3], [])) == list(range(10)) and first[:3] != first[3:]
    assert first != list(batches(10, 4, 2, 8))


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_deal_gives_every_pack_once_and_the_same_number_to_all(ranks):
    packs = pack(tiny_examples(shapes=[(n, (3,)) for n in (1, 30, 4, 9, 2, 25, 7)]), 30)
    hands = [deal(packs, rank, ranks) for rank in range(ranks)]
    assert len({len(h) for h in hands}) == 1
    dealt = [p for h in hands for p in h if len(p.rows)]
    assert {id(p) for p in dealt} == {id(p) for p in packs} and len(dealt) == len(packs)


def test_loss_and_update_do_not_depend_on_pack_size_or_sharing():
    results = []
    for max_tokens, share in ((10 ** 6, True), (30, True), (1, False)):
        model = tiny_model()
        optimizer, examples = make_optimizer(model, 1e-3), tiny_examples()
        count = sum(len(a) for e in examples for a in e.answers)
        loss = 0.0
        for p in pack(examples, max_tokens, share):
            part = sft_loss(model(p.tokens, p.end, p.rows, p.targets), count)
            part.backward()
            loss += part.item()
        norm = update(model, optimizer, 1e-3)
        results.append((loss, norm, torch.cat([p.detach().flatten() for p in model.parameters()])))
    for loss, norm, weights in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-12) and norm == pytest.approx(results[0][1], rel=1e-9)
        assert (weights - results[0][2]).abs().max() < 1e-9


def test_a_run_learns_and_logs_what_happened(tmp_path):
    header, rows, _ = run(tmp_path / "a", "--eval-data", "toy/dev.json")
    assert header["lr"] == 1e-3 and header["torch"] == torch.__version__
    assert [r["step"] for r in rows] == list(range(1, 9)) and rows[-1]["loss"] < rows[0]["loss"]
    assert rows[0]["lr"] == 1e-3 and rows[3]["eval_loss"] > rows[7]["eval_loss"]
    assert 0.5 < rows[3]["loss"] / rows[3]["eval_loss"] < 2                        # both are nats a token
    assert rows[0]["computed"] < rows[0]["tokens"] and rows[0]["loss_tokens"] < rows[0]["tokens"]
    want = {"step", "loss", "lr", "grad_norm", "tokens", "computed", "loss_tokens", "seconds", "tokens_per_second", "peak_memory"}
    assert want <= rows[0].keys()


def test_a_stopped_run_continues_to_the_same_end_bit_for_bit(tmp_path, monkeypatch):
    _, rows, weights = run(tmp_path / "whole")
    original = train_sft.update

    def stop_at_third(*args, count=[0]):
        count[0] += 1
        if count[0] == 3:
            signal.raise_signal(signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(train_sft, "update", stop_at_third)
    with pytest.raises(InputError, match="interrupted after step 3; .* --resume"):
        run(tmp_path / "stopped")
    monkeypatch.setattr(train_sft, "update", original)
    assert not (tmp_path / "stopped/model.safetensors").exists()
    for flag, value in (("--lr", 1e-5), ("--dtype", "float64"), ("--format", "raw")):
        with pytest.raises(InputError, match=f"its run has {flag[2:]} = .*, or choose another --out"):
            run(tmp_path / "stopped", "--resume", flag, value)
    monkeypatch.setenv("PATH", "/nowhere")                                         # no git: the commit is unknown
    with open(tmp_path / "stopped/metrics.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 0}\n{"step": 5, "lo')                      # as a kill would leave it
    _, again, same = run(tmp_path / "stopped", "--resume")
    assert [r["loss"] for r in again] == [r["loss"] for r in rows]
    assert all(torch.equal(a, b) for a, b in zip(weights.values(), same.values()))


def changed(path, change):
    """Rewrite a file of JSON lines, or of one JSON value, by a function of its value."""
    many = path.suffix == ".jsonl"
    value = [json.loads(line) for line in path.read_text().splitlines()] if many else json.loads(path.read_text())
    value = change(value) or value
    path.write_text("".join(json.dumps(line) + "\n" for line in value) if many else json.dumps(value))


def label(records):
    records[3]["output"] = "Request: unharmful"


def swap_words(raw):
    """Two tokens change places: the same text has other ids."""
    vocab = raw["model"]["vocab"]
    vocab["1"], vocab["2"] = vocab["2"], vocab["1"]


@pytest.mark.parametrize("file, change", [
    ("d.jsonl", label), ("d.jsonl", lambda records: records[::-1]), ("d.jsonl", lambda records: [{**r, "input": r["input"] + " "} for r in records]),
    ("d.jsonl", lambda records: [{**r, "instruction": "Rate.\n"} for r in records]), ("model/tokenizer.json", swap_words)])
def test_the_data_and_the_tokenizer_belong_to_a_run(tmp_path, capsys, file, change):
    tiny_folder(tmp_path / "model")
    arguments = ["--model", tmp_path / "model", "--data", write_records(tmp_path / "d.jsonl", 6), "--limit", 5, "--max-steps", 1]
    run(tmp_path / "a", *arguments)
    for same in (lambda value: None, lambda value: value):                         # written anew, but not changed
        changed(tmp_path / file, same)
        with pytest.raises(SystemExit) as ended:
            run(tmp_path / "a", *arguments, "--resume")
        assert not ended.value.code and "this run is finished" in capsys.readouterr().out
    changed(tmp_path / file, change)
    with pytest.raises(InputError, match=r"its run has data_hash .*= \d+, not \d+; give the same again, or choose another --out"):
        run(tmp_path / "a", *arguments, "--resume")


def test_the_schedule_belongs_to_a_run(tmp_path, monkeypatch):
    run(tmp_path / "a", "--max-steps", 1)
    with monkeypatch.context() as patched, pytest.raises(InputError, match="its run has schedule_hash .*= "):
        patched.setattr(train_sft, "lr_at", lambda step, steps, peak: 0.5 * peak)
        run(tmp_path / "a", "--max-steps", 1, "--resume")


def test_the_held_out_records_belong_to_a_run(tmp_path):
    held_out = write_records(tmp_path / "e.jsonl", 4)
    arguments = ["--max-steps", 1, "--eval-data", held_out]
    run(tmp_path / "a", *arguments)
    changed(held_out, label)
    with pytest.raises(InputError, match=r"its run has eval_hash \(of --eval-data\) = \d+, not \d+; give the same again"):
        run(tmp_path / "a", *arguments, "--resume")


def test_the_base_models_weights_belong_to_a_run(tmp_path, monkeypatch):
    run(tmp_path / "a", "--max-steps", 1)
    with monkeypatch.context() as patched, pytest.raises(InputError, match="its run has weights_hash .*= '.*', not 'new'"):
        patched.setattr(train_sft, "weights_hash", lambda folder: "new")
        run(tmp_path / "a", "--max-steps", 1, "--resume")


def test_a_file_where_a_checkpoint_goes_is_replaced_and_damaged_lines_of_the_log_are_not_kept(tmp_path):
    run(tmp_path / "a", "--max-steps", 3, "--save-every", 1)
    whole = [json.loads(line)["loss"] for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()[1:]]
    (tmp_path / "a/config.json").unlink()
    shutil.rmtree(tmp_path / "a/step-000002")
    (tmp_path / "a/step-000002").write_text("")
    log = tmp_path / "a/metrics.jsonl"
    for junk in ('ep": 3}', '{"step": 3}{"step": 4}', '{"x": 3}', '{"step": "2"}', "\0\0}"):
        log.write_text(log.read_text() + junk + "\n")
    run(tmp_path / "a", "--max-steps", 3, "--save-every", 1, "--resume")
    assert [json.loads(line)["loss"] for line in log.read_text().splitlines()[1:]] == whole


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_the_model_loads_ends_in_one_line(tmp_path, monkeypatch, request, number):
    before = signal.signal(number, signal.SIG_DFL)                                 # the tests may run under nohup
    request.addfinalizer(lambda: signal.signal(number, before))
    load = train_sft.load_for_training
    with monkeypatch.context() as patched, pytest.raises(InputError, match="interrupted before the first step") as error:
        patched.setattr(train_sft, "load_for_training", lambda *args: (signal.raise_signal(number), load(*args))[1])
        run(tmp_path / "a")
    assert "\n" not in str(error.value) and not (tmp_path / "a/metrics.jsonl").exists()
    run(tmp_path / "a", "--max-steps", 1)                                          # the same command begins again


def test_an_old_run_is_not_overwritten(tmp_path):
    run(tmp_path / "a", "--max-steps", 1)
    with pytest.raises(InputError, match="already holds a run"):
        run(tmp_path / "a")


@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_checkpoints_of_an_unknown_run_are_not_mixed_with_another(tmp_path, more):
    run(tmp_path / "a", "--max-steps", 4, "--save-every", 2)
    for name in ("metrics.jsonl", *train_sft.OF_MODELS):                           # tidied up by hand
        (tmp_path / "a" / name).unlink(missing_ok=True)
    with pytest.raises(InputError, match="already holds a run"):
        run(tmp_path / "a", *more)
    assert train_sft.checkpoints(tmp_path / "a")
    for name in ("chat_template.jinja", "model.safetensors", "tokenizer.json", "added_tokens.json"):
        folder = tmp_path / name                            # would be read in place of what is saved, or written over
        folder.mkdir()
        (folder / name).write_text("x")
        with pytest.raises(InputError, match="already holds a run"):
            run(folder, *more)
        assert (folder / name).read_text() == "x"


# bytes a weight: the model has 4, a checkpoint 12, and a new one is written beside those that are kept
@pytest.mark.parametrize("free, more", [(3.9, []), (27.9, ["--save-every", 2, "--keep", 1]), (15.9, ["--save-every", 4])])
def test_a_disk_without_room_is_said_before_training(tmp_path, monkeypatch, capsys, free, more):
    weights = train_sft.parameters(train_sft.LlamaConfig.from_json(ROOT / "toy/model/config.json"))
    steps = ["--max-steps", 5]                              # of which the second and fourth are saved, or the fourth alone
    for bytes_free in (free * weights, (free + 0.2) * weights):
        monkeypatch.setattr(train_sft.shutil, "disk_usage", lambda path: SimpleNamespace(free=bytes_free))
        if bytes_free == free * weights:
            with pytest.raises(InputError, match="what will be written needs 0.0 GiB, and 0.0 are free; make room"):
                run(tmp_path / "a", *steps, *more)
            assert not (tmp_path / "a/metrics.jsonl").exists()
        else:
            run(tmp_path / "a", *steps, *more)
            assert ("has no room for what Ctrl-C or SIGTERM would save" in capsys.readouterr().err) == (not more)


def test_records_that_teach_what_is_not_asked_or_not_read_are_counted(tmp_path, capsys):
    record = json.loads((ROOT / "toy/dev.json").read_text())[0]
    train_sft.warn_of_training("f", [record])
    assert capsys.readouterr().err == ""
    train_sft.warn_of_training("f", [record, {**record, "instruction": record["instruction"].strip()}, {**record, "output": "harmful"}])
    other, silent = capsys.readouterr().err.splitlines()
    assert other.startswith("1 records of f have another instruction")
    assert silent.startswith("1 records of f have an output in which no verdict")


def test_two_processes_do_not_write_into_one_folder(tmp_path):
    code = "import sys, time; from data import hold; hold(sys.argv[1]); hold(sys.argv[1]); print(flush=True); time.sleep(100)"
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "a"], stdout=subprocess.PIPE, cwd=ROOT) as other:
        other.stdout.readline()
        with pytest.raises(InputError, match="another process is writing there"):
            run(tmp_path / "a", "--max-steps", 1)
        with pytest.raises(InputError, match="another process is writing there"):
            run(tmp_path / "a", "--max-steps", 1)                                  # having asked is not having it
        assert not list((tmp_path / "a").iterdir())
        other.kill()                                                               # which frees it
    run(tmp_path / "a", "--max-steps", 1)
    assert (tmp_path / "a/config.json").exists()


def test_what_else_lies_in_the_folder_does_not_cost_the_run(tmp_path):
    (tmp_path / "a/.tmp.driveupload").mkdir(parents=True)                          # of a program that copies it elsewhere
    (tmp_path / "a/.tmpAbC123").mkdir()
    (tmp_path / "a/.tmp_notes").write_text("mine")
    (tmp_path / "a/.tmpXyZ789").write_text("of a kill")
    run(tmp_path / "a", "--max-steps", 1)
    assert (tmp_path / "a/config.json").exists() and not (tmp_path / "a/.tmpXyZ789").exists()
    assert (tmp_path / "a/.tmp_notes").exists() and (tmp_path / "a/.tmpAbC123").exists()


@pytest.mark.parametrize("log", ["", "[1]\n", '{"step": 1, "loss": 3.0}\n'])
def test_a_log_without_settings_is_no_run_to_go_on_with(tmp_path, log):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/metrics.jsonl").write_text(log)
    with pytest.raises(InputError, match="metrics.jsonl: does not begin with a run's settings"):
        run(tmp_path / "a", "--resume")


def test_a_log_whose_end_is_damaged_is_gone_on_with(tmp_path):
    run(tmp_path / "a", "--max-steps", 3, "--save-every", 2)
    (tmp_path / "a/config.json").unlink()
    log = tmp_path / "a/metrics.jsonl"
    log.write_bytes(log.read_bytes()[:-30] + b"\xff\xfe")
    run(tmp_path / "a", "--max-steps", 3, "--save-every", 2, "--resume")
    assert [json.loads(line).get("step") for line in log.read_text().splitlines()] == [None, 1, 2, 3]


@pytest.mark.parametrize("argument", ["--out", "--model"])
def test_a_folder_without_a_name_is_refused(capsys, argument):
    with pytest.raises(SystemExit):                                                # of a shell variable that is not set
        run("x", argument, "")
    assert f"argument {argument}: is empty" in capsys.readouterr().err


def test_a_run_does_not_go_on_with_another_config(tmp_path):
    shutil.copytree("toy/model", tmp_path / "model")
    run(tmp_path / "a", "--model", tmp_path / "model", "--max-steps", 1)
    config = tmp_path / "model/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rope_theta": 500.0}))
    (tmp_path / "a/config.json").unlink()
    with pytest.raises(InputError, match="its run has config_hash .*= "):
        run(tmp_path / "a", "--model", tmp_path / "model", "--max-steps", 1, "--resume")


def test_a_run_without_a_console_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    run(tmp_path / "a", "--max-steps", 2)
    assert (tmp_path / "a/config.json").exists()


@pytest.mark.parametrize("ends", ["pipe", "/dev/full"])
def test_a_run_whose_console_is_gone_goes_on(tmp_path, ends):
    command = [sys.executable, "train_sft.py", "--model", "toy/model", "--data", "toy/dev.json", "--limit", "4", "--max-steps", "2",
               "--batch-size", "2", "--dtype", "float32", "--device", "cpu", "--out", tmp_path / "a"]
    if ends == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(ends, os.O_WRONLY)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, cwd=ROOT, timeout=200)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"") and (tmp_path / "a/config.json").exists()


def test_the_dtype_that_was_chosen_belongs_to_a_run(tmp_path, monkeypatch):
    # on the next machine the default is another one
    run(tmp_path / "a", "--max-steps", 1)
    header = json.loads((tmp_path / "a/metrics.jsonl").read_text().splitlines()[0])
    monkeypatch.setattr(train_sft, "pick_dtype", lambda device, name=None: torch.bfloat16)
    (tmp_path / "a/config.json").unlink()
    with pytest.raises(InputError, match=f"dtype = {header['dtype']!r}, not 'bfloat16'"):
        run(tmp_path / "a", "--max-steps", 1, "--resume")


def test_an_unfinished_checkpoint_is_not_taken_for_a_whole_one(tmp_path):
    run(tmp_path / "a", "--max-steps", 4, "--save-every", 2)
    (tmp_path / "a/step-000003.tmp").mkdir()
    (tmp_path / "a/step-000004").mkdir()
    for copy in ("step-best", "step-000001-best", "step-000002 (copy)"):
        shutil.copytree(tmp_path / "a/step-000002", tmp_path / "a" / copy)
    assert [folder.name for folder in train_sft.checkpoints(tmp_path / "a")] == ["step-000002"]
    (tmp_path / "a/config.json").unlink()
    run(tmp_path / "a", "--max-steps", 4, "--save-every", 1, "--keep", 1, "--resume")
    assert not (tmp_path / "a/step-000003.tmp").exists() and (tmp_path / "a/step-best").exists()


@pytest.mark.parametrize("arguments, says", [
    (["--data", "nowhere.json"], "nowhere.json: cannot read"), (["--model", "nowhere"], "nowhere"),
    (["--max-length", "20"], "--max-length 20 is too short: no record fits"), (["--format", "chatml"], "im_end")])
def test_mistakes_end_in_one_clear_line(tmp_path, arguments, says):
    with pytest.raises(InputError, match=says) as error:
        run(tmp_path / "a", *arguments)
    assert "\n" not in str(error.value) and not (tmp_path / "a/model.safetensors").exists()


def test_a_run_that_does_not_fit_ends_before_weights_load(tmp_path, monkeypatch):
    monkeypatch.setattr("model.os.sysconf", lambda name: 4096 if name == "SC_PAGE_SIZE" else 1000)     # 4 MB
    monkeypatch.setattr("model.read_tensors", lambda path: pytest.fail("weights were read"))
    with pytest.raises(SystemExit, match="needs .* GiB, 0.0 are there: use --recompute"):
        train_sft.main(["--data", "toy/dev.json", "--out", str(tmp_path / "out"), "--device", "cpu"])


def test_memory_is_what_others_leave_what_a_container_may_hold_and_shared_by_ranks(monkeypatch):
    told = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   6000 kB\n", "/sys/fs/cgroup/memory.max": "max\n"}
    def read(path):
        if str(path) not in told:
            raise FileNotFoundError
        return told[str(path)]
    monkeypatch.setattr("model.os.sysconf", lambda name: 1024 if name == "SC_PAGE_SIZE" else 8000)
    monkeypatch.setattr("model.Path.read_text", read)
    assert free_on_host() == 6000 * 1024
    told["/sys/fs/cgroup/memory.max"] = "4096000\n"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_on_host() == 1024000
    told.clear()                                            # no Linux
    assert free_on_host() == 8000 * 1024 / 4


def test_memory_of_training_by_hand():
    # 1B in fp32: 16 bytes a parameter; its bf16 copy 2; the head's gradient 4 V D, the head as it is multiplied 2 V D
    c = LlamaConfig(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64,
                    num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True)
    N, VD = 1_235_814_400, 128256 * 2048
    passing = 4 * 8192 * 8192                                   # of the MLP; the logits of a part are fewer, 2 ** 25
    layer = 4 * 2048 + 2 * 2048 + 2 * 512 + 2 * 8192
    need = lambda *args: train_sft.training_bytes(c, 8192, torch.bfloat16, torch.float32, *args)
    assert need(1, False) == 16 * N + 4 * VD + 2 * (N + 8192 * 16 * layer + passing + VD) + 4e8
    assert need(4, False) == 4 * N + 4 * VD + 4 * VD + 2 * (N / 16 + 8192 * 16 * layer + passing + VD) + 4e8
    assert need(1, True) == 16 * N + 4 * VD + 2 * (N / 16 + 8192 * (16 * 2048 + layer) + passing + VD) + 4e8
    untied = replace(c, tie_word_embeddings=False)              # two matrices, of which each rank has all of both
    of_four = lambda config: train_sft.training_bytes(config, 8192, torch.bfloat16, torch.float32, 4, False)
    assert of_four(untied) - of_four(c) == 4 * VD + 4 * VD + 2 * VD / 16
    few = train_sft.training_bytes(c, 256, torch.bfloat16, torch.float32, 1, False)
    assert few == 16 * N + 4 * VD + 2 * (N + 256 * 16 * layer + 2 ** 25 + VD) + 4e8
    pair = Example([1] * 10, [[2] * 3, [2] * 4])
    assert [train_sft.tokens_of(pair, no_share) for no_share in (False, True)] == [17, 27]


def test_how_many_tokens_a_pack_has_by_default(monkeypatch):
    def tokens(shape, gigabytes, device="cuda", ranks=1, free=math.inf):
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (1e9 * min(free, gigabytes), 1e9 * gigabytes))
        c = SHAPES[shape]
        need = lambda T: train_sft.training_bytes(c, T, torch.bfloat16, torch.float32, ranks, False, 2 ** 29)
        return train_sft.default_max_tokens(train_sft.parameters(c), World(torch.device(device)), need)

    assert tokens("1b", 141) == tokens("1b", 80) == 32768 and tokens("3b", 141) == 16384
    assert tokens("8b", 141, ranks=4) == 16384 and tokens("8b", 80, ranks=4) == 8192       # 58 GB of activations, 29
    assert tokens("3b", 80) == tokens("1b", 24) == 8192                        # the others would not fit
    assert tokens("1b", 141, "cpu") == 8192
    assert tokens("1b", 80, free=48) == 16384                                  # somebody else's job has the rest


@pytest.mark.parametrize("given, want", [([], 8192), (["--max-tokens", 300], 300)])
def test_the_log_says_how_many_tokens_a_pack_has(tmp_path, given, want):
    header, _, _ = run(tmp_path / "a", "--max-steps", 1, *given)
    assert header["max_tokens"] == want


def test_a_checkpoint_holds_full_weights_of_a_model_stored_in_bf16(tmp_path):
    model = Llama.random(replace(CONFIG, torch_dtype="bfloat16"))
    optimizer = make_optimizer(model, 1e-3)
    train_sft.save(tmp_path / "step-000001", model, optimizer, 1, ALONE)
    saved = load_file(tmp_path / "step-000001/model.safetensors")
    assert all(saved[n].dtype == w.dtype and torch.equal(saved[n], w) for n, w in model.state_dict().items())


def test_weights_too_large_for_the_bases_dtype_are_stored_in_float32(tmp_path, capsys):
    model = Llama.random(replace(CONFIG, torch_dtype="float16"))
    model.model["norm"].weight.data[0] = 1e5
    train_sft.save_final(SimpleNamespace(out=tmp_path), model, Tokenizer.from_pretrained("toy/model"), ALONE)
    saved = load_file(tmp_path / "model.safetensors")["model.norm.weight"]
    assert saved.dtype == torch.float32 and saved[0] == 1e5 and "weights are too large for float16" in capsys.readouterr().err
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "float32"


def test_nohup_outlives_a_terminal_that_is_closed():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)                                # as nohup does
        interrupts = train_sft.Interrupts()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and signal.getsignal(signal.SIGTERM) == interrupts.notice
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_log_of_before_is_compared_by_its_names(tmp_path):
    run(tmp_path / "a", "--max-steps", 1)
    log = tmp_path / "a/metrics.jsonl"
    header, *rows = log.read_text().splitlines()
    old = json.loads(header)
    old["samples"], old["schedule"] = old.pop("examples"), old.pop("schedule_hash") + 1
    log.write_text("\n".join([json.dumps(old), *rows]) + "\n")
    with pytest.raises(InputError, match="schedule_hash .of batches and learning rates. = "):
        run(tmp_path / "a", "--max-steps", 1, "--resume")


def test_of_many_epochs_only_the_steps_that_are_made_are_laid_out(tmp_path):
    _, rows, _ = run(tmp_path / "a", "--epochs", 10 ** 9, "--max-steps", 2)
    assert len(rows) == 2


def test_resuming_restores_every_moment_in_the_memory_it_has(tmp_path):
    # a second copy of the moments, 8 bytes a parameter, would not fit where training just did
    model = tiny_model()
    optimizer = make_optimizer(model, 1e-3)
    for weight in model.parameters():
        weight.grad = torch.randn_like(weight)
    update(model, optimizer, 1e-3)
    train_sft.save(tmp_path / "step-000007", model, optimizer, 7, ALONE)
    held = lambda: [*model.parameters(), *(x for moments in optimizer.state.values() for x in moments.values())]
    want, places = [x.detach().clone() for x in held()], [x.data_ptr() for x in held()]
    with torch.no_grad():
        for x in held():
            x.add_(1)
    assert train_sft.resume(tmp_path / "step-000007", model, optimizer) == 7
    assert len(want) > 3 * len(list(model.parameters())) and all(map(torch.equal, held(), want))
    assert [x.data_ptr() for x in held()] == places


def test_update_clips_to_norm_1_and_steps_at_the_given_rate():
    # gradient (3, 4) has norm 5: clipped to (0.6, 0.8), times the rate 0.1
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.device, before = torch.device("cpu"), layer.weight.detach().clone()
    layer.weight.grad = torch.tensor([[3.0, 4.0]])
    assert update(layer, torch.optim.SGD(layer.parameters(), lr=9.0), 0.1) == pytest.approx(5)
    assert torch.allclose(before - layer.weight, torch.tensor([[0.06, 0.08]]), atol=1e-6) and layer.weight.grad is None
    layer.weight.grad, before = torch.tensor([[math.nan, 4.0]]), layer.weight.detach().clone()
    with pytest.raises(InputError, match="norm is nan: lower --lr"):
        update(layer, torch.optim.SGD(layer.parameters(), lr=9.0), 0.1)
    assert torch.equal(before, layer.weight)


def test_every_step_is_made_at_the_rate_that_is_logged(tmp_path, monkeypatch):
    used, update = [], train_sft.update
    monkeypatch.setattr(train_sft, "update", lambda *args: (used.append(args[2]), update(*args))[1])
    _, rows, _ = run(tmp_path / "a", "--batch-size", 16)
    assert used == [r["lr"] for r in rows] == [lr_at(step, 4, 1e-3) for step in range(4)]


def test_a_torch_that_cannot_shard_on_a_cpu_says_so(monkeypatch):
    monkeypatch.delattr(torch.cpu.Stream, "record_event", raising=False)
    with pytest.raises(InputError, match="cannot train on several ranks of a CPU: use one, or the torch of"):
        train_sft.check_can_shard(torch.device("cpu"))
