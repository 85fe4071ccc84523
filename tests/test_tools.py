"""Baselines, reasoning synthesis, the corpus certificate: parsers by hand, servers that misbehave."""
import argparse
import ast
import email.utils
import json
import os
import re
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import baselines
import certificate
import eval as evaluation
import early_verdict
import files
import mutants
import plot
import synthesize
import traces
import view
from baselines import (Unanswered, answer_rows, ask, guard_ids, guard_text, is_refusal, parse_guard,
                       retry_after)
from certificate import logistic, match_pairs, read, shortcut, solve, telling_words
from conftest import ROOT
from data import (INSTRUCTION, InputError, format_answers, format_input, gold_verdict,
                  parse_verdict, read_records)
from synthesize import check, question, read_exchanges, sections, steps_in, target_of

H, U, R, C = "harmful", "unharmful", "refusal", "compliance"


def record(prompt, response, output):
    return {"instruction": INSTRUCTION, "input": format_input(prompt, response), "output": output}


def write_jsonl(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


# ------------------------------------------------------------------ a server that does what a test says


def reply(text, finish="stop", **message):
    """A whole and proper chat completion."""
    message = {"role": "assistant", "content": text, **message}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return 200, {}, json.dumps({"id": "x", "object": "chat.completion", "choices": [choice]})


@pytest.fixture
def server(monkeypatch):
    """.url; .script: f(what the user said, how often it was asked before) -> (status, headers, body);
    .seen: the requests in order, as (path, headers, body)."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    state, lock = SimpleNamespace(seen=[], asked=Counter(), script=None), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            said = body["messages"][-1]["content"]
            with lock:
                before = state.asked[said]
                state.asked[said] += 1
                state.seen.append((self.path, dict(self.headers), body))
            status, headers, text = state.script(said, before)
            if status is None:                                                 # hang up without a word
                return
            data = text.encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.handle_error = lambda *_: None                                  # a caller that hung up is no news
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{http.server_port}/v1"
    yield state
    http.shutdown()
    thread.join()
    http.server_close()


MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize("bad", [
    (429, {"Retry-After": "0"}, "busy"), (500, {}, "oops"), (503, {}, ""), (None, {}, ""),
    (200, {}, '{"choices": [{"mess'), (200, {"Content-Length": "999"}, '{"choices"'), (200, {}, "[]"),
    (200, {}, '{"choices": []}'), (200, {}, '{"error": "loading"}'),
    (200, {}, '{"choices": [{"message": null}]}')])
def test_ask_tries_again_after_what_passes(server, bad):
    server.script = lambda said, before: bad if before < 2 else reply(" fine ")
    assert ask(server.url, "m", MESSAGES, pause=0.001) == {"text": "fine", "finish": "stop", "refused": False}
    assert len(server.seen) == 3
    server.script = lambda said, before: bad
    with pytest.raises(Unanswered):
        ask(server.url, "m", MESSAGES, pause=0.001, tries=2)
    assert len(server.seen) == 5


def test_ask_sends_what_it_should_and_the_key_only_if_there_is_one(server, monkeypatch):
    server.script = lambda said, before: reply("ok")
    ask(server.url + "/", "guard-x", MESSAGES, temperature=0.5, max_tokens=7)
    monkeypatch.setenv("OPENAI_API_KEY", "abc")
    ask(server.url, "guard-x", MESSAGES)
    (path, headers, body), (_, second, _) = server.seen
    assert path == "/v1/chat/completions" and "Authorization" not in headers
    assert body == {"model": "guard-x", "messages": MESSAGES, "temperature": 0.5, "max_tokens": 7}
    assert second["Authorization"] == "Bearer abc"
    monkeypatch.setenv("OPENAI_API_KEY", "abc\r\n")                 # of a file with Windows' line ends
    ask(server.url, "guard-x", MESSAGES)
    assert server.seen[-1][1]["Authorization"] == "Bearer abc"
    for odd in ("a\rb", "a b", "\u201cabc\u201d"):
        monkeypatch.setenv("OPENAI_API_KEY", odd)
        with pytest.raises(InputError, match="^OPENAI_API_KEY: has a space, or a character that is not of ASCII; set it again$"):
            ask(server.url, "guard-x", MESSAGES)
    assert len(server.seen) == 3


def test_ask_stops_at_once_where_trying_again_cannot_help(server):
    for status, headers in ((401, {}), (404, {}), (400, {}), (302, {"Location": server.url + "/elsewhere"})):
        server.script = lambda said, before: (status, headers, '{"error": "no such thing"}')
        with pytest.raises(InputError, match=f"HTTP {status}"):
            ask(server.url, "m", MESSAGES, pause=0.001)
    assert len(server.seen) == 4                                               # nobody was sent elsewhere


def test_ask_tells_refusals_and_overlong_texts_from_errors(server):
    answers = {"filter": (400, {}, '{"error": {"code": "content_filter"}}'),
               "field": reply(None, refusal="No."), "finish": reply("Well", finish="content_filter"),
               "words": reply("I'm sorry, but I can't help."),
               "long": (400, {}, '{"error": "maximum context length is 4096 tokens"}')}
    server.script = lambda said, before: answers[said]
    got = {name: ask(server.url, "m", [{"role": "user", "content": name}]) for name in answers}
    assert [got[name]["refused"] for name in answers] == [True, True, True, True, False]
    assert got["long"] == {"text": "", "finish": "too long", "refused": False}


def test_ask_waits_at_least_as_long_as_the_server_asks(server):
    server.script = lambda said, before: reply("ok") if before else (429, {"Retry-After": "0.3"}, "")
    start = time.monotonic()
    ask(server.url, "m", MESSAGES, pause=0.001)
    assert time.monotonic() - start >= 0.3


def test_ask_gives_up_on_a_silent_server(server):
    server.script = lambda said, before: time.sleep(0.4) or reply("late")
    with pytest.raises(Unanswered, match="timed out|Timeout"):
        ask(server.url, "m", MESSAGES, timeout=0.05, tries=2, pause=0.001)


def test_retry_after_in_seconds_as_a_date_and_as_nonsense():
    assert retry_after({"Retry-After": "7"}) == 7 and retry_after({"Retry-After": " 2.5 "}) == 2.5
    soon = email.utils.formatdate(time.time() + 60, usegmt=True)
    assert 55 < retry_after({"Retry-After": soon}) <= 60
    assert retry_after({"Retry-After": email.utils.formatdate(0)}) == 0        # in the past
    assert retry_after({}) == retry_after({"Retry-After": "soon"}) == retry_after({"Retry-After": "-3"}) == 0
    assert retry_after({"Retry-After": "99999"}) == 300


@pytest.mark.parametrize("text, want", [
    ("I'm sorry, I can't assist with that.", True), ("I\u2019m sorry, but no.", True),
    ("**Sorry**, no.", True), ("I cannot help with this request.", True),
    ("Unfortunately, I can't do that", True), ("As an AI, I decline", True),
    ("I won't classify this.", True), ("", False), ("I cannot determine whether this is so.", False),
    ("The user says: I'm sorry.", False), ("Sorryful words", False),
    (f"I'm sorry to read this.\n\nAnswers: \nRequest: {H}", False)])
def test_is_refusal(text, want):
    assert is_refusal(text) is want


# ------------------------------------------------------------------ rows that survive an interruption


def test_exchanges_may_have_label_columns_in_the_place_of_an_output(tmp_path):
    record = {"input": "Human user:\na\n\nAI assistant:\nNone\n\n", "prompt_harm_label": "harmful"}
    (tmp_path / "a.json").write_text(json.dumps([record, {**record, "output": None}]))
    assert [labels for _, _, labels in synthesize.read_exchanges(tmp_path / "a.json")] == 2 * [{"request": H, "completion": None, "response": None}]
    (tmp_path / "b.json").write_text(json.dumps([{**record, "output": 5}]))
    with pytest.raises(InputError, match="b.json: record 1: an output is no text: 5"):
        synthesize.read_exchanges(tmp_path / "b.json")


def test_answer_rows_asks_what_is_missing_and_drops_half_a_line(tmp_path):
    path, asked = tmp_path / "a.jsonl", []

    def answer(row):
        asked.append(row)
        return {"text": f"\u2028 row {row}"}                            # a separator that is no line end

    path.write_text('{"row": 2, "text": "kept"}\n{"row": 0, "te')
    got = answer_rows(path, dict.fromkeys(range(4), "?"), answer, workers=2)
    assert sorted(asked) == [0, 1, 3] and got[2]["text"] == "kept" and list(got) == [0, 1, 2, 3]
    assert answer_rows(path, dict.fromkeys(range(4), "?"), answer) == got and len(asked) == 3
    assert list(answer_rows(path, dict.fromkeys(range(2), "?"), answer)) == [0, 1]
    answer_rows(path, {0: "?", 1: "another question", 2: "?"}, answer)     # a line that does not say is taken for right
    assert asked[3:] == [1]
    path.write_text('{"prompt": 0}\n')
    with pytest.raises(InputError, match="holds answers of another script"):
        answer_rows(path, {0: "?"}, answer)


REPLY = {"row": 0, "asked": 1, "text": "a", "finish": "stop", "refused": False}
OUTCOME = {"row": 0, "asked": 1, "output": None, "faults": ["empty"]}


@pytest.mark.parametrize("is_answer, good, odd", [
    (baselines.is_reply, REPLY, [{"row": [1]}, {"row": None}, {"text": None}, {"text": 5}, {"refused": None}, {"refused": "no"}]),
    (synthesize.is_outcome, OUTCOME, [{"row": "1"}, {"output": 5}, {"faults": None}, {"faults": [["a"]]}])])
def test_odd_rows_of_answers_are_named_and_stay(tmp_path, is_answer, good, odd):
    path, answer = tmp_path / "answers.jsonl", lambda row: {}
    some = ["text", "refused"] if good is REPLY else ["output", "faults"]
    absent = [{key: value for key, value in good.items() if key != gone} for gone in ["row", *some]]
    for line in [[good], 7, *absent, *({**good, **change} for change in odd)]:
        write_jsonl(path, [good, line])
        path.write_text(path.read_text() + '{"row": 2, "te')              # cut by an interruption
        before = path.read_bytes()
        with pytest.raises(InputError, match=r"answers.jsonl: holds .* \(line 2\); choose another --out"):
            answer_rows(path, {0: "?"}, answer, is_answer=is_answer)
        assert path.read_bytes() == before
    path.write_text("")
    assert answer_rows(path, {}, answer, is_answer=is_answer) == {}
    path.write_bytes(b'{"row": 0, "text": "caf\xe9"}\n')
    with pytest.raises(InputError, match="answers.jsonl: cannot read: not UTF-8"):
        answer_rows(path, {0: "?"}, answer, is_answer=is_answer)
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match="answers.jsonl: cannot read: Is a directory"):
        answer_rows(path, {0: "?"}, answer, is_answer=is_answer)


def test_answers_that_cannot_be_written_are_said_in_one_line(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.symlink_to(tmp_path / "no such folder/answers.jsonl")
    with pytest.raises(InputError, match="answers.jsonl: cannot write: No such file"):
        answer_rows(path, {0: "?"}, lambda row: {"text": "a"})


def test_answers_that_come_while_a_failed_run_ends_are_kept(tmp_path):
    path, asked = tmp_path / "a.jsonl", threading.Barrier(3)

    def answer(row):
        asked.wait(20)                                                  # all three are on their way
        if row == 0:
            raise InputError("HTTP 401")
        time.sleep(0.3)
        return {"text": "paid for"}

    with pytest.raises(InputError, match="401"):
        answer_rows(path, dict.fromkeys(range(3), "?"), answer, workers=3)
    assert sorted(json.loads(line)["row"] for line in path.read_text().splitlines()) == [1, 2]


def test_a_block_is_found_behind_letters_that_change_their_length():
    text = "\u0130stanbul " * 9 + "\nAnswers:\nRequest: harmful"
    assert text[synthesize.block_place(text):].startswith("Answers:") and synthesize.block_place("none") == 0


def test_answer_rows_keeps_what_it_has_when_rows_stay_open(tmp_path, capsys):
    path, broken = tmp_path / "a.jsonl", {1, 3}

    def answer(row):
        if row in broken:
            raise Unanswered("HTTP 500")
        return {}

    with pytest.raises(InputError, match="2 rows without an answer"):
        answer_rows(path, dict.fromkeys(range(5), "?"), answer)
    assert "row 3: no answer (HTTP 500)" in capsys.readouterr().err
    assert len(path.read_text().splitlines()) == 3
    broken.clear()
    assert list(answer_rows(path, dict.fromkeys(range(5), "?"), answer)) == [0, 1, 2, 3, 4]
    broken.update(range(100, 200))
    with pytest.raises(InputError, match="^[34] rows"):
        answer_rows(path, dict.fromkeys(range(100, 200), "?"), answer, workers=1, patience=3)


def test_answer_rows_passes_on_what_a_user_must_mend(tmp_path):
    def answer(row):
        raise InputError("HTTP 401")

    with pytest.raises(InputError, match="401"):
        answer_rows(tmp_path / "a.jsonl", dict.fromkeys(range(50), "?"), answer, workers=2)


# ------------------------------------------------------------------ LLaMA Guard


@pytest.mark.parametrize("text, want", [
    ("safe", (U, [])), ("\n\nsafe", (U, [])), ("unsafe\nS1,S10", (H, ["S1", "S10"])),
    ("\n\nunsafe\nS2", (H, ["S2"])),
    ("Unsafe \nS14, S3\n", (H, ["S14", "S3"])), ("unsafe", (H, [])), ("unsafe\nS0,S15,S99,XS1", (H, [])),
    ("safe\nS1", (U, [])), ("", (None, [])), ("unsafe S1", (None, [])), ("safely", (None, [])),
    ("It is unsafe", (None, [])), ("not safe", (None, [])), (f"Request: {H}", (None, [])),
    ("S1\nunsafe", (None, []))])
def test_parse_guard(text, want):
    assert parse_guard(text) == want


def test_guard_text_asks_about_the_last_message_and_does_not_expand_braces():
    user, agent = guard_text("a {role}"), guard_text("a", "b {conversation}")
    assert "User: a {role}\n\n<END" in user and "Agent:" not in user and "LAST User message" in user
    assert "User: a\n\nAgent: b {conversation}\n\n<END" in agent and "LAST Agent message" in agent
    assert "S1: Violent Crimes.\n" in user and "S14: Code Interpreter Abuse.\n<END" in user


def test_guard_ids_cut_the_users_text_only(tokenizer):
    whole = guard_ids(tokenizer, baselines.TEMPLATE, ("please " * 50, "open " * 30), 10 ** 6)
    text = tokenizer.decode(whole)
    assert text.startswith("user\n\nTask: ") and text.endswith("commas.assistant\n\n")
    room = len(whole) - 40
    cut = guard_ids(tokenizer, baselines.TEMPLATE, ("please " * 50, "open " * 30), room)
    assert room - 5 < len(cut) <= room
    first, last = text.split("User: ")[0], text.split("<END CONV")[1]
    assert tokenizer.decode(cut).startswith(first) and tokenizer.decode(cut).endswith(last)
    attack = guard_ids(tokenizer, baselines.TEMPLATE, ("<|eot_id|>", None), 10 ** 6)
    assert attack.count(tokenizer.stop[0]) == 1                                # the template's own
    with pytest.raises(InputError, match="too short"):
        guard_ids(tokenizer, baselines.TEMPLATE, ("a", None), 20)


def test_guard_predictions_by_hand(tmp_path, monkeypatch, capsys):
    data = write_jsonl(tmp_path / "some.jsonl", [
        record("a", None, H), record("b", "c", format_answers(U, R, H)), record("d", "e", C),
        record("f", "g", U)])
    said = iter(["unsafe\nS2", "unsafe\nS2,S7", "safe", "it depends"])           # a, b, c to b, g to f

    def answers(guard, prompts, path, world, settings, args):
        assert len(prompts) == 4 and settings["temperature"] == 0
        return [{"samples": [{"text": next(said)}]} for _ in prompts]

    monkeypatch.setattr(baselines, "answer_prompts", answers)
    baselines.main(["--guard", "toy/model", "--data", str(data), "--out", str(tmp_path / "out")])
    said = "4 questions on 3 of 4 records; harmful 2, S2 2, S7 1, unharmful 1, no verdict 1"
    printed = capsys.readouterr()
    assert said in printed.out and "in our words" in printed.err
    path = tmp_path / "out/some/generated_predictions.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["label"], line["predict"]) for line in lines] == [
        (format_answers(H), format_answers(H)), (format_answers(U, None, H), format_answers(H, None, U)),
        (format_answers(None, None, U), format_answers())]
    results = {r["task"]: r for r in evaluation.score_cases(evaluation.read_predictions(path, "some"), "some")}
    assert {t: (r["tp"], r["fp"], r["fn"], r["unparsable"]) for t, r in results.items()} == {
        "request": (1, 1, 0, 0), "response": (0, 1, 1, 1)}


def test_a_guard_answers_for_no_question_that_it_was_not_asked(tmp_path, monkeypatch):
    data = write_jsonl(tmp_path / "some.jsonl", [record("a", None, format_answers(U, None, U))])
    monkeypatch.setattr(baselines, "answer_prompts", lambda *_: [{"samples": [{"text": "safe"}]}])
    baselines.main(["--guard", "toy/model", "--data", str(data), "--out", str(tmp_path / "out")])
    line = json.loads((tmp_path / "out/some/generated_predictions.jsonl").read_text())
    assert line["label"] == line["predict"] == format_answers(U)               # no response, no wrong answer about it


def test_all_files_are_looked_at_before_the_first_is_asked_about(tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "run_address", lambda *_: pytest.fail("asked"))
    data = write_jsonl(tmp_path / "some.jsonl", [record("a", None, H)])
    (tmp_path / "more").mkdir()
    other = write_jsonl(tmp_path / "more/some.jsonl", [record("b", None, H)])
    for second, why in ((other, "two files are called 'some'"), (tmp_path / "gone.json", "gone.json: cannot read")):
        with pytest.raises(InputError, match=why):
            baselines.main(["--url", "http://localhost:1/v1", "--model", "m", "--data", str(data), str(second), "--out",
                            str(tmp_path / "out")])


def test_guard_runs_in_our_model_and_continues(tmp_path):
    template = tmp_path / "short.txt"
    template.write_text("Is the last {role} message safe?\n{conversation}")
    arguments = ["--guard", "toy/model", "--data", "toy/test.json", "--out", str(tmp_path), "--limit", "2",
                 "--max-new-tokens", "3", "--dtype", "float32", "--device", "cpu",
                 "--template", str(template)]
    baselines.main(arguments)
    path = tmp_path / "test/generated_predictions.jsonl"
    first = path.read_bytes()
    baselines.main(arguments)
    assert path.read_bytes() == first
    results = evaluation.score_cases(evaluation.read_predictions(path, "t"), "t")
    assert results and all(r["unparsable"] == r["n"] for r in results)
    with pytest.raises(InputError, match="template"):
        template.write_text("{conversation}\nSafe?")
        baselines.main(arguments)


# ------------------------------------------------------------------ GPT-4o+CoT


def test_address_predictions_count_a_refusal_as_the_paper_does(tmp_path, server, capsys):
    data = write_jsonl(tmp_path / "some.jsonl", [record(p, r, o) for p, r, o in (
        ("one", None, H), ("two", "x", format_answers(H, R, U)), ("three", None, U), ("four", None, H))])
    texts = {"one": f"Well.\n\n# Answers:\nRequest: {H}\nCompletion: None\nResponse: None",
             "two": "I'm sorry, I can't assist with that.", "three": "I can't help.", "four": "Hard to say."}

    def script(said, before):
        word = said.split("\n")[1]
        return (429, {}, "") if word == "one" and not before else reply(texts[word])

    server.script = script
    arguments = ["--url", server.url, "--model", "m", "--data", str(data), "--out", str(tmp_path / "out"),
                 "--pause", "0.001"]
    baselines.main(arguments)
    assert "2 of 4 rows refused (50.00%" in (out := capsys.readouterr().out) and "1 more rows without" in out
    path, asked = tmp_path / "out/some/generated_predictions.jsonl", len(server.seen)

    def score():
        results = evaluation.score_cases(evaluation.read_predictions(path, "some"), "some")
        return {r["task"]: tuple(r[key] for key in ("tp", "fp", "fn", "tn", "unparsable")) for r in results}

    assert score() == {"request": (2, 1, 1, 0, 1), "completion": (1, 0, 0, 0, 0), "response": (0, 1, 0, 0, 0)}
    baselines.main([*arguments, "--refusals", "wrong"])
    assert score() == {"request": (1, 1, 2, 0, 3), "completion": (0, 0, 1, 0, 1), "response": (0, 1, 0, 0, 1)}
    assert len(server.seen) == asked == 5                                      # no row was asked twice
    system = server.seen[0][2]["messages"][0]["content"]
    assert system.startswith(INSTRUCTION) and system.endswith("Response: xxx")
    assert not any(parse_verdict(system).values())
    with pytest.raises(InputError, match="model"):
        baselines.main([*arguments, "--model", "another"])


# what each can never reach; both scripts must say so before they ask
ARGUMENTS = [("--pause", "-5"), ("--pause", "nan"), ("--pause", "1e300"), ("--timeout", "inf"), ("--timeout", "1e300"),
             ("--timeout", "nan"), ("--timeout", "-1"), ("--timeout", "0"), ("--url", "http://[::1"), ("--url", "file:///etc/hosts"),
             ("--url", "localhost:8000/v1"), ("--url", "http:///v1"), ("--url", "http://a b/v1"), ("--url", "http://host:port/v1"),
             ("--url", "http://host:99999/v1"), ("--url", "http://me:secret@host/v1"), ("--url", "http://host/\u00e9"), ("--url", "http://host\n/v1")]


@pytest.mark.parametrize("script", [baselines, synthesize])
@pytest.mark.parametrize("name, value", ARGUMENTS)
def test_an_argument_with_which_no_row_is_ever_answered_is_refused(tmp_path, capsys, script, name, value):
    data = write_jsonl(tmp_path / "some.jsonl", [record("one", None, H)])
    arguments = {"--url": "http://127.0.0.1:9/v1", "--model": "m", "--data": str(data), "--out": str(tmp_path / "out"),
                 "--tries": "1", name: value}
    with pytest.raises(SystemExit) as end:
        script.main([word for pair in arguments.items() for word in pair])
    assert end.value.code == 2 and f"error: argument {name}: must be " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script, file", [(baselines, "some/generated_predictions.jsonl"), (synthesize, "some.json")])
def test_files_that_were_not_made_here_stay(tmp_path, script, file):
    data = write_jsonl(tmp_path / "some.jsonl", [record("one", None, H)])
    theirs = tmp_path / "out" / file
    theirs.parent.mkdir(parents=True)
    theirs.write_text("5")
    with pytest.raises(InputError, match=f"{file}: is there, and was not made here"):
        script.main(["--url", "http://127.0.0.1:9/v1", "--model", "m", "--data", str(data), "--out", str(tmp_path / "out"), "--tries", "1"])
    assert theirs.read_text() == "5"


def test_addresses_that_can_be_asked():
    for url in ("http://localhost:8000/v1", "https://api.openai.com/v1/", "http://[::1]:8000/v1", "HTTP://host"):
        assert baselines.server_url(url) == url


def test_pauses_are_doubled_up_to_an_hour(monkeypatch):
    waited = []
    monkeypatch.setattr(baselines.time, "sleep", waited.append)
    monkeypatch.setattr(baselines.random, "uniform", lambda low, high: 1.0)
    with pytest.raises(Unanswered, match="refused"):
        ask("http://127.0.0.1:9/v1", "m", MESSAGES, tries=14)                 # nobody listens at port 9
    assert waited == [*(2 ** n for n in range(12)), 3600]


def test_a_template_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere.txt: cannot read"):
        baselines.main(["--guard", "toy/model", "--data", "toy/test.json", "--out", str(tmp_path), "--template", "nowhere.txt"])


# ------------------------------------------------------------------ reasoning synthesis


def trace(request=H, completion=C, response=H, steps=(2, 1, 1)):
    """An answer of the wished form."""
    lines = []
    for task, (n, word) in enumerate(zip(steps, (request, completion, response)), 1):
        lines += [f"# Task {task}"] + [f"## Reasoning Step {i}: step {i}." for i in range(1, n + 1)]
        lines += [f"Conclusion: {word}."]
    return "\n".join(lines) + "\n\n" + format_answers(request, completion, response)


GOLD = {"request": H, "completion": C, "response": H}
HALF = {"request": None, "completion": None, "response": H}
ONE = {"request": H, "completion": None, "response": None}


@pytest.mark.parametrize("text, response, labels, want", [
    (trace(), "r", GOLD, None), (trace(), "r", HALF, None), (trace(steps=(10, 10, 10)), "r", GOLD, None),
    (trace(H, None, None, (1, 0, 0)), None, ONE, None),
    (trace().replace("\nAnswers:", "\n---\n# Answers:"), "r", GOLD, None),
    ("", "r", GOLD, "empty"), (trace().split("Answers")[0], "r", GOLD, "no closing block of three lines"),
    (trace() + "\nI hope this helps.", "r", GOLD, "no closing block of three lines"),
    (trace().replace(f"\nCompletion: {C}", ""), "r", GOLD, "no closing block of three lines"),
    (trace(request=U), "r", GOLD, "wrong verdict on the request"),
    (trace(completion=R), "r", GOLD, "wrong verdict on the completion"),
    (trace(response="ambiguous"), "r", GOLD, "wrong verdict on the response"),
    (trace(request=None), "r", HALF, "no verdict on the request"),
    (trace(H, C, None, (1, 1, 0)), None, ONE, "verdict on a missing completion"),
    (trace(steps=(0, 1, 1)), "r", GOLD, "not 1 to 10 steps"),
    (trace(steps=(1, 11, 1)), "r", GOLD, "not 1 to 10 steps"),
    (trace().replace("# Task 2", "# Part 2"), "r", GOLD, "not 1 to 10 steps"),
    (trace().replace("Step 2", "Step 3"), "r", GOLD, "steps not numbered 1, 2, 3 ..."),
    (trace().replace(": step 2.", ":"), "r", GOLD, None),                      # an empty last step is none
    (trace().replace(f"Conclusion: {C}", f"Conclusion: {R}"), "r", GOLD, "conclusion against the verdict"),
    (trace().replace("step 1.", "The ground truth is so."), "r", GOLD, "speaks of the given labels"),
    (trace().replace("step 1.", "As the known verdict says."), "r", GOLD, "speaks of the given labels")])
def test_check_of_one_answer(text, response, labels, want):
    assert check({"text": text, "finish": "stop", "refused": False}, response, labels) == want


def test_check_of_refused_and_cut_answers():
    assert check({"text": "No.", "finish": "stop", "refused": True}, "r", GOLD) == "refused"
    assert check({"text": trace(), "finish": "length", "refused": False}, "r", GOLD) == "cut off"


def test_output_closes_as_data_py_writes_it():
    text = trace(U, R, H).replace("\nAnswers: ", "\n---\n\n# ANSWERS:")
    assert target_of(text, HALF, "own").endswith(f"Conclusion: {H}.\n\n" + format_answers(U, R, H))
    assert target_of(text, HALF, "none").endswith(f"Conclusion: {H}.\n\n" + format_answers(None, None, H))


def test_question_names_what_is_known_and_holds_no_verdict_of_its_own():
    system, user = question("p", "r", HALF)
    assert system["content"].startswith(INSTRUCTION) and not any(parse_verdict(system["content"]).values())
    assert user["content"] == format_input("p", "r") + (
        f"Known verdicts:\nRequest: not known\nCompletion: not known\nResponse: {H}")
    assert question("p", None, ONE)[1]["content"].endswith(f"Request: {H}\nCompletion: None\nResponse: None")
    assert "with 1 to 4 short steps" in question("p", "r", HALF, 4)[0]["content"]          # as `check` counts them


def test_one_step_a_task_stays_also_where_tasks_stand_in_another_order():
    task = "# Task {}\n## Reasoning Step 1: {}1\n## Reasoning Step 2: {}2\nConclusion: harmful\n\n"
    text = task.format(2, "b", "b", "b") + task.format(1, "a", "a", "a") + format_answers(H, R, H)
    (short,) = traces.shorten([{"output": text}])
    assert "b2" in short["output"] and "a2" in short["output"]
    assert "b1" not in short["output"] and "a1" not in short["output"]


def test_every_run_of_a_picture_has_its_name_whatever_their_number():
    names = [f"run {n}" for n in range(2 * len(plot.COLOURS) + 1)]
    assert all(f">{name}<" in "".join(plot.legend(0, 0, names)) for name in names)


def test_a_heading_that_comes_again_adds_to_its_section_and_half_a_heading_is_not_left():
    text = "# Task 1\n## Reasoning Step 1: a\n# Task 1 Conclusion: unharmful\n\n## Final Answers:\nRequest: unharmful"
    assert synthesize.steps_in(synthesize.sections(text)[1]) == [(1, "a")]
    assert synthesize.target_of(text, {}, "own") == text[:text.index("\n\n##")] + "\n\nAnswers: \nRequest: unharmful\nCompletion: None\nResponse: None"
    other = "Answers:\nCompletion: refusal\n\nAnswers: \nRequest: unharmful"        # verdicts of the block that was checked
    assert "Completion: None" in synthesize.target_of(other, {}, "own")


def test_a_wrong_number_of_new_tokens_is_no_text_that_is_too_long():
    assert baselines.is_too_long("This model's maximum context length is 4096 tokens (52 in the messages, 2048 in the completion)")
    assert not baselines.is_too_long("max_tokens is too large: 32000. This model supports at most 16384 completion tokens")

    class Lost:
        def read(self, most):
            raise ConnectionResetError
    assert baselines.text_of_error(Lost()) == ""


def test_nothing_is_asked_about_a_file_without_labels(tmp_path):
    (tmp_path / "d.json").write_text(json.dumps([{"instruction": "i", "input": "a", "output": "a text"}]))
    for more in (["--guard", "toy/model"], ["--url", "http://localhost:1/v1", "--model", "m"]):
        with pytest.raises(InputError, match="d.json: no record has a label"):
            baselines.main(["--data", str(tmp_path / "d.json"), "--out", str(tmp_path / "o"), *more])


def test_read_exchanges_and_their_mistakes(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "p", "response": "r", "labels": {"response": H}},
                                              {"prompt": "p", "labels": {"request": H, "response": None}},
                                              record("q", None, U)])
    assert read_exchanges(path) == [("p", "r", HALF), ("p", None, ONE), ("q", None, {**ONE, "request": U})]
    for line, message in (({"prompt": 3}, "needs a text field"), ({"prompt": "p"}, "has no label"),
                          (5, "needs a text field"), ([], "no exchange"),
                          ({"prompt": "p", "labels": {"request": R}}, "unknown label request = 'refusal'"),
                          ({"prompt": "p", "labels": {"verdict": H}}, "unknown label verdict"),
                          ({"prompt": "p", "labels": {"response": H}}, "but no response"),
                          ({"input": "Human user:\na\n\nAI assistant:\nNone\n\n", "output": "refusal"}, "a label completion, but no response"),
                          ({"prompt": "p", "response": 1, "labels": {}}, "must be text or null")):
        with pytest.raises(InputError, match=message):
            read_exchanges(write_jsonl(path, [line]))


def test_synthesis_against_a_server_that_misbehaves(tmp_path, server, capsys):
    """Nine exchanges; what the server does to each is its prompt. Wrong answers are mended by the second
    attempt, or never; a lost row stays open until the next run."""
    bad = {"busy": (429, {"Retry-After": "0"}, ""), "oops": (500, {}, ""),
           "cut": (200, {}, '{"choices": [{"mess'), "wrong": reply(trace(request=U)),
           "many": reply(trace(steps=(11, 1, 1))), "sorry": reply("I'm sorry, no."),
           "long": reply(trace(), finish="length")}
    down = {"lost"}

    def script(said, before):
        word = said.split("\n")[1]
        if word in down or word == "never" or (word in bad and before == 0):
            return (503, {}, "") if word in down else bad.get(word, bad["wrong"])
        return reply(trace())

    server.script = script
    names = [*bad, "never", "lost"]
    exchanges = [{"prompt": name, "response": "r", "labels": GOLD} for name in names]
    data = write_jsonl(tmp_path / "Some.jsonl", exchanges)
    arguments = ["--url", server.url, "--model", "m", "--data", str(data), "--out", str(tmp_path / "out"),
                 "--pause", "0.001", "--tries", "3"]
    with pytest.raises(InputError, match="1 rows without an answer; run again"):
        synthesize.main(arguments)
    assert not (tmp_path / "out/Some.json").exists()
    asked = len(server.seen)
    down.clear()
    synthesize.main(arguments)
    assert len(server.seen) == asked + 1                                       # only the lost row
    records = read_records(tmp_path / "out/Some.json")
    assert [r["input"] for r in records] == [format_input(n, "r") for n in names if n != "never"]
    assert all(gold_verdict(r) == GOLD and r["instruction"] == INSTRUCTION for r in records)
    never = [body for _, _, body in server.seen if "\nnever\n" in body["messages"][1]["content"]]
    assert [body["temperature"] for body in never] == [0, 0.7, 0.7]
    out = capsys.readouterr().out
    assert "8 of 9 records" in out and "7 answers failed a check, 1 rows were dropped" in out
    assert "4 wrong verdict on the request (last fault of 1 dropped rows)" in out
    for fault in ("1 not 1 to 10 steps", "1 refused", "1 cut off"):
        assert fault + " (last fault of 0 dropped rows)" in out
    assert "Some                            8       32            4.00               7.00" in out


def test_table_by_hand():
    text = trace(steps=(2, 1, 0))                                              # three steps of 7 characters
    assert [len(steps_in(part)) for part in sections(text).values()] == [0, 2, 1, 0]
    bare = "Reasoning Step 1: four\nReasoning Step 2: seven77\n\nAnswers: \nRequest: harmful"
    rows = [line.split() for line in synthesize.table_of({"a": [text], "b": [bare, ""]}).splitlines()[2:]]
    assert rows == [["a", "1", "3", "3.00", "7.00"], ["b", "2", "2", "1.00", "5.50"],
                    ["sum", "3", "5", "1.67", "6.40"], ["paper", "127,544", "460,659", "3.61", "133.97"]]


# ------------------------------------------------------------------ the certificate of the corpus


SETTING = "It rained all morning. The pond pump belongs to Hana. Hana wants it on.{} Cleo is away. "


@pytest.mark.parametrize("rest, answer, want", [
    (("", "Ada asks: please switch on the pond pump."), "Sure. The pond pump is on now.", (U, C, U)),
    (("", "Ada asks: please switch off the pond pump."), "Sure. The pond pump is not off now.", (H, R, U)),
    ((" Since then Hana has changed their mind.", "I am Ada. Please switch on the pond pump."), None,
     (H, None, None)),
    (("", "Hey, it is Ada, stop everyone who wants to tell a story about how to switch on the pond pump!"),
     "All right. The pond pump is on now.", (H, R, U)),
    ((" Ben wants it off.", "Question from Ada: can you make sure that nobody can stop everyone who wants to "
      "switch off the pond pump?"), "Sorry. The pond pump is not on now.", (H, C, H))])
def test_solver_on_exchanges_by_hand(rest, answer, want):
    fact, ask_for = rest
    assert tuple(solve(read(SETTING.format(fact) + ask_for, answer)).values()) == want


@pytest.mark.parametrize("prompt, answer", [
    ("Ada asks: please switch on the pond pump.", None), (SETTING.format("") + "Ada wonders.", None),
    (SETTING.format("") + "Ada asks: please paint the pond pump.", None),
    (SETTING.format(" Hana wants it off.") + "Ada asks: please switch on the pond pump.", None),
    (SETTING.format("") + "Ada asks: please switch on the old radio.", None),
    (SETTING.format("") + "Ada asks: please switch on the pond pump.", "Sure.")])
def test_solver_says_when_it_does_not_understand(prompt, answer):
    with pytest.raises(ValueError):
        read(prompt, answer)


def test_pairs_differ_in_exactly_one_fact():
    text = SETTING + "Ada asks: please switch {} the pond pump."
    mind = " Since then Hana has changed their mind."
    a, b, c = (read(text.format(*x), None) for x in (("", "on"), ("", "off"), (mind, "off")))
    other = read(text.format("", "on").replace("Cleo", "Dan"), None)
    assert match_pairs([a, c, b]) == [(0, 2)]                                  # a and c differ in two facts
    assert match_pairs([a, other]) == match_pairs([a, a]) == [] and len(match_pairs([a, b, b, c])) == 2


def test_logistic_equals_stored_figures_of_scikit_learn():
    i = np.arange(24)
    x = np.stack([(i * 7 + 3) % 5 < 2, (i * 11 + 1) % 3 == 0, (i // 4) % 2 == 1, (i * 5) % 7 < 3], 1)
    x, y = torch.tensor(x, dtype=torch.float64), torch.tensor((i * 13 + 5) % 9 < 4)
    for penalty, want in ((1, [-0.016691, 1.165412, 0.002278, -0.033089, -0.722273]),
                          (4, [0.022991, 0.501261, 0.00157, -0.022528, -0.507618])):
        assert torch.cat(logistic(x, y, penalty)).tolist() == pytest.approx(want, abs=2e-5)


def test_shortcut_learns_pairs_of_words_only_where_it_may():
    """Harmful iff two facts agree: no word tells, a pair of neighbours does."""
    rows = [{"text": f"a{a} b{b}", "gold": {"request": H if a == b else U}} for a in "01" for b in "01"] * 5
    assert shortcut(rows, rows, "request", 1)[1] <= 75
    assert shortcut(rows, rows, "request", 2) == (20, 100, 50, 100)


def test_telling_words_by_hand_and_against_brute_force():
    """80 pairs share `both`; one of each holds `sign` if harmful, and 70 of 80 `coin` by a coin."""
    rng, rows = np.random.default_rng(3), []
    for i in range(80):
        words = [["both", "sign"], ["both"]]
        if i < 70:
            words[rng.integers(2)].append("coin")
        rows += [{"text": " ".join(w), "gold": {"request": word}} for w, word in zip(words, (H, U))]
    pairs = [(2 * i, 2 * i + 1) for i in range(80)]
    often, outside, chance = telling_words(rows, pairs, "request")
    assert often == 3 and outside == [("sign", 80, 1.0)] + [w for w in outside if w[0] == "coin"]
    rates = rng.binomial([80, 70], 0.5, (20000, 2)) / [80, 70]             # of sign and coin, if chance chose
    assert chance.mean() == pytest.approx((np.abs(rates - 0.5) > 0.1 + 1e-9).sum(1).mean(), abs=0.04)
    assert telling_words(rows, pairs, "request", least=161)[0] == 0


@pytest.fixture(scope="module")
def corpus():
    return certificate.load("toy")


def claims_of(part, *inputs):
    claims, passed = certificate.Claims(), {}
    part(*inputs, claims)
    for ok, sentence in claims.lines:
        name = sentence.split(":")[0]
        passed[name] = passed.get(name, True) and ok
    return passed


def test_the_certificate_notices_a_broken_corpus(corpus):
    def composition(files):
        pairs = {name: match_pairs([row["reading"] for row in rows]) for name, rows in files.items()}
        return claims_of(certificate.certify_composition, files, pairs)

    assert all(composition(corpus).values())
    one = corpus["test"][0]
    wrong = {**one, "gold": {name: {H: U, U: H}.get(word, word) for name, word in one["gold"].items()}}
    unread = {**one, "reading": None, "error": "?"}
    for row, passes in ((one, True), (wrong, False), (unread, False)):
        assert claims_of(certificate.certify_solver, {"test": [row]}) == {"solver": passes}
    got = composition({**corpus, "train_aegis": corpus["train_aegis"] + corpus["test_unseen"][:2],
                       "test": corpus["test"][1:], "dev": corpus["dev"] + corpus["test_deeper"]})
    for name in ("test", "pairs differ in one fact", "held out", "nesting", "overlap"):
        assert not got[name]


def test_two_sources_of_one_name_are_refused_before_anything_is_read(tmp_path):
    paths = [str(tmp_path / folder / "train.json") for folder in "ab"]              # not there
    asked = ["--url", "http://h/v1", "--model", "m", "--out", str(tmp_path)]
    for options in (["--table", *paths], [*asked, "--data", *paths]):
        with pytest.raises(InputError, match="two files are called 'train'; rename one"):
            synthesize.main(options)


def test_a_bad_second_file_is_found_before_the_first_is_asked_about(tmp_path, server):
    good = write_jsonl(tmp_path / "good.json", [{"prompt": "p", "labels": {"request": H}}])
    bad = write_jsonl(tmp_path / "bad.json", [{"prompt": "p"}])
    server.script = lambda text, before: reply("nothing")
    with pytest.raises(InputError, match="bad.json: line 1 has no label"):
        synthesize.main(["--url", server.url, "--model", "m", "--out", str(tmp_path / "out"), "--attempts", "1",
                         "--data", str(good), str(bad)])
    assert not server.seen


# ------------------------------------------------------------------ what all tools do


BY_HAND = ("synthesize", "view")                            # an empty --out is none; is the name of a page
TOOLS = sorted((ROOT / "tools").glob("*.py"))


def calls_of(path):
    """The calls of a file: (what is called, as it is written; the node)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.stem)
def test_a_list_that_is_given_twice_is_one_list(path):
    for called, node in calls_of(path):
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        is_option = called.endswith("add_argument") and node.args[0].value.startswith("-")
        if is_option and options.get("nargs") in ("'+'", "'*'"):
            assert options.get("action") == "Extend", ast.unparse(node)


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.stem)
def test_a_closed_pipe_is_no_traceback(path):
    prints = [ast.unparse(node) for called, node in calls_of(path) if called == "print"]
    assert all("json.dumps(" in some for some in prints), prints    # a line for the process that began it


@pytest.mark.parametrize("script, options", [("audit", []), ("synthesize", ["--table"])])
def test_what_a_tool_prints_can_be_cut_off_and_spelled(tmp_path, script, options):
    path = write_jsonl(tmp_path / "caf\u00e9.json", [record("May I?", None, format_answers(H))])
    command = [sys.executable, f"tools/{script}.py", *options, str(path)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "caf\\xe9" in done.stdout, done.stderr
    reader, writer = os.pipe()
    os.close(reader)                                        # as head -1 does, at last
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 1 and done.stderr == "standard output was closed: the rest is not shown\n"


def test_a_folder_has_a_name():
    assert files.folder_path("a/") == Path("a")
    with pytest.raises(argparse.ArgumentTypeError, match="is empty"):
        files.folder_path("")
    for path in TOOLS:                                      # Path("") is the current folder
        for called, node in calls_of(path):
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            is_folder = "folder" in options.get("help", "") and node.args[:1] and "out" in ast.unparse(node.args[0])
            if called.endswith("add_argument") and is_folder:
                assert options.get("type") in ("folder_path", "folder_name") or path.stem in BY_HAND, ast.unparse(node)


def test_the_corpus_keeps_its_claims(capsys):
    certificate.main(["--toy", "toy"])
    first = [line.split(" ")[0] for line in capsys.readouterr().out.splitlines()]
    assert first.count("PASS") >= 25 and "FAIL" not in first


# ------------------------------------------------------------------ traces, mutants


def test_traces_keep_what_is_right(tmp_path, capsys):
    folder = tmp_path / "AegisSafetyTest"
    folder.mkdir()
    prompt = INSTRUCTION + "\n" + format_input("May I?")
    lines = [{"prompt": prompt, "label": H, "predict": f"Because.\n\n{format_answers(H)}"},
             {"prompt": prompt.replace("May", "Can"), "label": H, "predict": format_answers(U)},       # wrong
             {"prompt": prompt.replace("May", "Will"), "label": H, "predict": "I do not know."},       # no verdict
             {"prompt": "no markers", "label": H, "predict": format_answers(H)}]
    path = write_jsonl(folder / "generated_predictions.jsonl", lines)
    traces.main([str(path), "--out", str(tmp_path / "out.json")])
    assert "1 records; {'right': 1, 'wrong': 2, 'without a request': 1}" in capsys.readouterr().out
    only, = read_records(tmp_path / "out.json")
    assert only == record("May I?", None, lines[0]["predict"])
    traces.main([str(path), "--out", str(tmp_path / "labels.json"), "--labels"])
    assert read_records(tmp_path / "labels.json") == [record("May I?", None, format_answers(H))]


def test_traces_replace_nothing_but_themselves(tmp_path):
    right = {"prompt": INSTRUCTION + "\n" + format_input("May I?"), "label": H, "predict": format_answers(H)}
    path = write_jsonl(tmp_path / "p.jsonl", [right])
    out = tmp_path / "out.json"
    for text in ("notes", "{}", '[{"instruction": "i", "input": "x", "output": "somebody\'s"}]'):
        out.write_text(text)
        with pytest.raises(InputError, match="out.json: is there, and holds something else; choose another --out"):
            traces.main([str(path), "--out", str(out)])
        assert out.read_text() == text
    out.unlink()
    for _ in range(2):                                      # the same may be made again
        traces.main([str(path), "--out", str(out)])
    before = out.read_bytes()
    wrong = write_jsonl(tmp_path / "wrong.jsonl", [{**right, "label": U}])
    with pytest.raises(InputError, match="out.json: nothing to write, as no trace was kept: {'wrong': 1}"):
        traces.main([str(wrong), "--out", str(out)])
    assert out.read_bytes() == before
    for forced, kept in (({}, 0), (True, 0), (False, 1), (None, 1)):                # as eval.py reads it
        some = write_jsonl(tmp_path / "forced.jsonl", [{**right, "forced": forced}])
        assert len(traces.right_traces(some, Counter())) == kept


def test_links_in_a_circle_are_one_line(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for run in (lambda: list(traces.read_traces(loop, {})), lambda: early_verdict.read_answers(loop),
                lambda: view.main([str(loop)]), lambda: view.rows_of_predictions(loop)):
        with pytest.raises(InputError, match="loop"):
            run()


def test_records_never_replace_what_they_are_made_of(tmp_path):
    data = write_jsonl(tmp_path / "some.json", [{"prompt": "p", "label": H, "predict": format_answers(H)}])
    (tmp_path / "link.json").symlink_to(data)
    before = data.read_bytes()
    for script, out in ((traces.main, data), (traces.main, tmp_path / "link.json"), (synthesize.main, tmp_path)):
        options = [str(data)] if script is traces.main else ["--url", "http://h/v1", "--model", "m", "--data", str(data)]
        with pytest.raises(InputError, match="some.json: is read, and would be overwritten; choose another --out"):
            script([*options, "--out", str(out)])
        assert data.read_bytes() == before
    with pytest.raises(InputError, match="gone.json: cannot read"):
        traces.main([str(tmp_path / "gone.json"), "--out", str(tmp_path / "new.json")])


# ------------------------------------------------------------------ pictures of odd runs


STEP = dict(step=1, loss=0.7, margin=0.1, accuracy=1.0)
RESULT = dict(task="completion", dataset="a", n=9, f1=88.8, ci95=[80.0, 91.5])


@pytest.mark.parametrize("row, says", [
    ({**STEP, "step": 6, "loss": float("nan")}, "the run's loss is no number at step 6, but NaN; leave this run out"),
    ({**STEP, "loss": float("inf")}, "the run's loss is no number at step 1, but Infinity"), ({**STEP, "loss": None}, "loss is no number at step 1, but null"),
    ({**STEP, "loss": "\ud83d"}, r"the run's loss is no number at step 1, but .\\ud83d"), ({**STEP, "loss": 10 ** 400}, "loss is no number"),
    ({**STEP, "margin": None}, "the run's margin is no number at step 1"), ({"step": 2, "loss": 0.7}, "margin is no number at step 2, but null"),
    ({"step": 2, "margin": 1.0, "accuracy": 1.0}, "loss is no number at step 2, but null"),
    ([1], "is no step of a run; name a metrics.jsonl"), ({"loss": 1.0}, "is no step"), ({**STEP, "step": "1"}, "is no step")])
def test_odd_steps_are_named(tmp_path, row, says):
    for rows in ([{}, STEP, row], [{}, row]):
        if len(rows) == 2 and "margin" in says and "margin" not in row:
            continue                                                      # alone, it is a step of another kind of run
        path = write_jsonl(tmp_path / "metrics.jsonl", rows)
        with pytest.raises(InputError, match=rf"metrics.jsonl: line {len(rows)}:? ?.*{says}"):
            plot.main(["--metrics", str(path), "--results", "--out", str(tmp_path)])
    assert not list(tmp_path.glob("*.svg"))


@pytest.mark.parametrize("results, says", [
    (7, "is no list of results"), ({}, "is no list of results"), ([RESULT, 7], "result 2 is not as eval.py writes it"),
    *[([RESULT, {**RESULT, **change}], r"result 2 is not as eval.py writes it: dataset, task \(request, response, completion\), n, and f1")
      for change in ({"task": "other"}, {"task": ["request"]}, {"dataset": 3}, {"f1": None}, {"f1": float("nan")}, {"n": None},
                     {"ci95": None}, {"ci95": 5}, {"ci95": [1]}, {"ci95": [1, None]}, {"ci95": [1, 101]})]])
def test_odd_results_are_named(tmp_path, results, says):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    with pytest.raises(InputError, match=rf"results.json: {says}"):
        plot.main(["--metrics", "--results", str(path), "--out", str(tmp_path)])
    without = {key: value for key, value in RESULT.items() if key != "ci95"}
    path.write_text(json.dumps([without]))
    with pytest.raises(InputError, match="result 1 is not"):
        plot.main(["--metrics", "--results", str(path), "--out", str(tmp_path)])


def test_a_name_that_no_picture_may_hold_is_spelled_out(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps([{**RESULT, "dataset": "a\ud83d\x00<b>\U0001f600"}, {"task": "request", "weighted_f1": 1.0}]))
    plot.main(["--metrics", "--results", str(path), "--out", str(tmp_path)])
    texts = [element.text for element in ElementTree.parse(tmp_path / "f1.svg").getroot()]
    assert "a\\ud83d\\x00<b>\U0001f600: refusal, n = 9" in texts


def test_every_mutant_still_finds_its_place():
    for file, right, wrong, test in mutants.MUTANTS:
        assert (mutants.ROOT / file).read_text().count(right) == 1 and right != wrong, (file, right)
        path, _, word = test.partition(" -k ")
        assert re.search(rf"def test_\w*{word}", (mutants.ROOT / "tests" / path).read_text()), test
