"""tools/early_verdict.py: sentences found, forests exact, and two models whose answer is known."""
import json
import random

import pytest
import torch
import traces
import view

import early_verdict
import eval as evaluation
from data import (INSTRUCTION, VERDICTS, InputError, encode_records, format_answers, format_input, gold_verdict,
                  pack)
from early_verdict import (Branch, curve, cut_traces, early_verdicts, find_forms, grow,
                           read_sections, reading_places, summarize)
from model import Llama, LlamaConfig, World
from train_sft import sft_loss

CPU = World(torch.device("cpu"))
TRACE = """\
# Task 1
## Reasoning Step 1: Ben wants it on.
## Reasoning Step 2: Asked: off.
The request is harmful.
# Task 2
## Reasoning Step 1: The answer leaves it on.
The completion is a refusal.
# Task 3
There is no response.

Answers:\x20
Request: harmful
Completion: refusal
Response: unharmful"""


def section_of(reasoning, task="request", **verdict):
    """The section of a task in this reasoning, under an Answers block."""
    block = format_answers(**{"request": "harmful", **verdict})
    return read_sections(f"{reasoning}\n\n{block}")[task]


# ------------------------------------------------------------------ sentences
def test_steps_and_closings_of_a_trace():
    sections = read_sections(TRACE)
    assert list(sections) == ["request", "completion"]              # task 3 has no steps
    request = sections["request"]
    assert [TRACE[place:].split(":")[0] for place in request.steps] == [
        "## Reasoning Step 1", "## Reasoning Step 2"]
    assert (request.said, request.closing) == ("harmful", "The request is harmful.")
    assert TRACE[request.closes:request.stop] == "The request is harmful.\n"
    assert sections["completion"].form == "The completion is _."


@pytest.mark.parametrize("last, form", [
    ("## Reasoning Step 2\nIt is so.\n\n## Conclusion\nThe user's request is harmful.\n\n---",
     "## Conclusion\nThe user's request is _."),
    ("## Reasoning Step 2\nIt is so.\n\n# Task 1 Conclusion: Harmful", "# Task 1 Conclusion: _"),
    ("## Reasoning Step 2: It is so.\n\n# Task 1: harmful\n\n# Task 2: x", "# Task 1: _"),
    ("## Reasoning Step 2\nIt is so.\n\n# Task 1 Conclusion\nRequest: harmful\n",
     "# Task 1 Conclusion\nRequest: _"),
    ("## Reasoning Step 2\nIt is so.\n\n## Conclusion: harmful or unharmful?\nThe request is harmful.",
     "The request is _."),                                          # the heading has no verdict
    ("## Reasoning Step 2\nThe request is harmful.", None),        # the step itself
    ("## Reasoning Step 2: It is harmful.", None),
    ("## Reasoning Step 2: Is it?\nIs it harmful or unharmful?", None),
    ("## Reasoning Step 2: It is harmful.\nSo we proceed.", None)])
def test_forms_of_closings(last, form):
    for heading in ("# Task 1\n", "# Task 1: harmful or unharmful?\n\n", ""):
        section = section_of(f"{heading}## Reasoning Step 1: x.\n{last}")
        assert section.form == form and len(section.steps) == 2
        if form:
            assert section.closing == form.replace("_", section.closing.split()[-1].strip("."))


def test_an_answer_without_steps_or_verdict_is_not_read():
    assert read_sections("# Task 1\nThe request is harmful.\n\nAnswers: \nRequest: harmful") == {}
    assert read_sections("# Task 1\n## Reasoning Step 1: x\n\nAnswers: \nRequest: None") == {}
    assert read_sections("") == {}


def test_a_form_is_used_if_both_verdicts_follow_it():
    def of(closing, times):
        word = "refusal" if "refusal" in closing else "compliance"
        text = f"# Task 2\n## Reasoning Step 1: x.\n{closing}"
        return times * [{"completion": section_of(text, "completion", completion=word)}]

    sections = (of("It is a refusal.", 2) + of("It is compliance.", 3)
                + of("It is a compliance.", 2)
                + of("Surely it is a refusal.", 9)          # gives the verdict away
                + of("So: refusal", 3) + of("So: compliance", 6))
    assert find_forms(sections)["completion"] == {
        "So: _": ["So: refusal", "So: compliance"],
        "It is _.": ["It is a refusal.", "It is compliance."]}
    forms = find_forms(sections)["completion"]
    told = sections[7]["completion"]                        # "Surely ...": read with the commonest
    assert reading_places(told, forms) == ([*told.steps, told.stop], forms["So: _"])
    own = sections[0]["completion"]
    assert reading_places(own, forms) == ([*own.steps, own.closes], forms["It is _."])
    assert reading_places(own, {}) is None


def test_cut_traces_keep_closings_and_answers():
    other = TRACE.replace("harmful", "unharmful").replace("refusal", "compliance")
    records = [{"instruction": "i", "input": "x", "output": text} for text in 20 * [TRACE, other]]
    cut = [record["output"] for record in cut_traces(records)]
    assert {text.count("Reasoning Step") for text in cut} == {0, 1, 2, 3}
    for text, whole in zip(cut, records):
        assert text.count("The request is") == text.count("The completion is") == 1
        assert gold_verdict({**whole, "output": text}) == gold_verdict(whole)
    assert all(line in TRACE for line in cut[0].split("\n"))


# ------------------------------------------------------------------ the forest
def test_grow_as_its_drawing():
    a, b, c, d, e = range(5)
    p = grow([Branch([a, b, d, 9], 3), Branch([e, 9], 1), Branch([a, b, c, 9, 8], 3)])
    assert p.tokens.tolist() == [a, b, c, 9, d, e]
    assert p.end.tolist() == [5, 5, 4, 4, 5, 6]
    assert list(zip(p.rows.tolist(), p.targets.tolist(), p.answer.tolist())) == [
        (2, 9, 2), (3, 8, 2), (4, 9, 0), (5, 9, 1)]
    assert grow([Branch([1, 2], 1), Branch([1, 3], 1), Branch([1, 2], 1)]).tokens.tolist() == [1]


def wide_model():
    """A random model for the toy tokenizer, in float64, whose predictions differ clearly."""
    config = LlamaConfig(vocab_size=761, hidden_size=48, intermediate_size=96, num_hidden_layers=3,
                         num_attention_heads=6, num_key_value_heads=2)
    return Llama.random(config, 1, std=0.12).double()


def alone(model, ids, start):
    """log p of ids[start:], one sequence at a time."""
    tokens = torch.tensor(ids[:-1])
    T = len(tokens)
    rows = torch.arange(start - 1, T)
    return model(tokens, torch.full((T,), T), rows, torch.tensor(ids[start:])).sum()


@torch.no_grad()
def test_forest_gives_what_one_sequence_at_a_time_gives(tokenizer):
    model = wide_model()
    released = ("# Task 1\n\n## Reasoning Step 1\nHe asks.\n\n## Reasoning Step 2\nIt is bad.\n\n"
                "## Conclusion\nThe request is harmful.\n\n---\n\nAnswers: \nRequest: harmful")
    plain = released.replace("\n\n## Conclusion\nThe request is harmful.", "")
    other = TRACE.replace("harmful", "unharmful").replace("a refusal", "compliance")
    other = other.replace("refusal", "compliance")
    answers = [TRACE, released, plain, other, released.replace("harmful", "unharmful"), "", TRACE]
    answers += answers
    prompts = [tokenizer.prompt_ids("Judge.", format_input(f"Turn it {'off' if i % 2 else 'on'}."))
               for i in range(len(answers))]
    readings, forms = early_verdicts(model, tokenizer, prompts, answers, CPU, max_tokens=300)
    assert [list(forms[task]) for task in ("request", "completion")] == [
        ["The request is _.", "## Conclusion\nThe request is _."], ["The completion is _."]]
    checked = 0
    for prompt, answer, reading in zip(prompts, answers, readings):
        for task, some in reading.items():
            own = read_sections(answer)[task].form
            pair = forms[task].get(own) or list(forms[task].values())[0]
            for place, p, held in zip(some["places"], some["p"], some["held"], strict=True):
                a, b = (prompt + tokenizer.encode(answer[:place] + text) for text in pair)
                start = next(i for i in range(len(a)) if a[i] != b[i])
                a, b = alone(model, a, start).exp(), alone(model, b, start).exp()
                assert abs(p - a / (a + b)) < 1e-9 and abs(held - a - b) < 1e-9
                checked += 1
    assert checked == 2 * (3 * (3 + 2) + 3 * 3)
    assert readings[5] == readings[12] == {}


# ------------------------------------------------------------------ the measure
def test_curve_by_hand():
    values = [[0.0, 0.5, 1.0], [1.0, 0.0]]
    assert [point["mean"] for point in curve(values)] == [0.5, 0.25, 0.5]
    back = curve(values, from_end=True)
    assert [point["steps"] for point in back] == [-2, -1, 0]
    assert [point["mean"] for point in back] == [0.5, 0.75, 0.5]
    low, high = curve([[0.0]] * 50 + [[1.0]] * 50)[0]["ci95"]
    assert 0.39 < low < 0.42 and 0.58 < high < 0.61         # 0.5 -+ 1.96 / sqrt(400)
    assert curve([[0.3]] * 9)[0]["ci95"] == (pytest.approx(0.3), pytest.approx(0.3))


WORDS = {True: "harmful", False: "unharmful"}
BESIDE = ("The clock in the hall is slow.", "The bus was late again.", "Eva is away.")


def known_record(decides, harmful, n, rng):
    """A record of n steps. "first": its prompt decides, and step 1 says so; "last": nothing tells
    before the last step does. The closing follows any number of steps that the model can know."""
    state = {True: "raised", False: "lowered"}
    shown = harmful if decides == "first" else rng.random() < 0.5
    request = f"The red flag belongs to Ben. Ben wants it {state[shown]}."
    steps = [rng.choice(BESIDE) for _ in range(n)]
    if n:
        place = 0 if decides == "first" else -1
        steps[place] = f"Ben wants it {state[harmful]}: {WORDS[harmful]}."
    lines = [f"## Reasoning Step {number}: {step}" for number, step in enumerate(steps, 1)]
    text = "\n".join(["# Task 1", *lines, f"The request is {WORDS[harmful]}.", "", "Answers: ",
                      f"Request: {WORDS[harmful]}"])
    return {"instruction": "Judge.", "input": format_input(request), "output": text}


def taught(decides, tokenizer, steps=60, lr=3e-3):
    """The base model of the demo after some steps on such records."""
    rng = random.Random(1)
    model = Llama.from_pretrained("toy/model", "cpu", torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    least = 0 if decides == "first" else 1
    for step in range(steps):
        records = [known_record(decides, rng.random() < 0.5, rng.randint(least, 3), rng)
                   for _ in range(16)]
        examples, _ = encode_records(tokenizer, records, 2048)
        p, = pack(examples, 10 ** 6)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 10) * (1 - step / steps)
        optimizer.zero_grad()
        sft_loss(model(p.tokens, p.end, p.rows, p.targets), len(p.rows)).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("decides", ["first", "last"])
def test_the_measure_finds_what_is_there(tokenizer, decides):
    model = taught(decides, tokenizer)
    records = []
    for seed in range(20):
        for harmful in (True, False):                       # twins, but for what decides
            records.append(known_record(decides, harmful, 3, random.Random(seed)))
    prompts = [tokenizer.prompt_ids(r["instruction"], r["input"]) for r in records]
    answers = [record["output"] for record in records]
    readings, _ = early_verdicts(model, tokenizer, prompts, answers, CPU)
    said = summarize(readings, [gold_verdict(record) for record in records])["request"]["said"]
    means = [point["mean"] for point in said]
    if decides == "first":
        assert min(means) > 0.85
    else:
        assert means[:3] == pytest.approx([0.5, 0.5, 0.5], abs=1e-4)        # twins: p and 1 - p
        assert means[3] > 0.9


# ------------------------------------------------------------------ the script
def test_script_reads_records_and_answers(tmp_path, capsys):
    records = json.loads(open("toy/train_wildguard.json").read())[:12]
    data = tmp_path / "records.json"
    data.write_text(json.dumps([{**record, "gold": "yes", "forced": "no"} for record in records]))     # columns of theirs
    early_verdict.main(["--model", "toy/model", "--data", str(data), "--dtype", "float32", "--device", "cpu"])
    lines = [json.loads(line) for line in open(tmp_path / "early.jsonl")]
    summary = json.loads((tmp_path / "early.json").read_text())
    assert len(lines) == 12 and set(summary["tasks"]) == set(VERDICTS)
    printed = capsys.readouterr().out
    assert "'The request is harmful.' against 'The request is unharmful.'" in printed
    svg = (tmp_path / "early.svg").read_text()
    assert svg.count("<polygon") == 2 * len(summary["tasks"])

    folder = tmp_path / "demo"
    folder.mkdir()
    answers = folder / "generated_predictions.jsonl"
    answers.write_text("".join(json.dumps({
        "prompt": record["instruction"] + "\n" + record["input"], "predict": record["output"],
        "label": format_answers(**gold_verdict(record))}) + "\n" for record in records))
    early_verdict.main(["--model", "toy/model", "--data", str(answers), "--dtype", "float32", "--device", "cpu",
                        "--out", str(tmp_path / "again")])
    again = json.loads((tmp_path / "again" / "early.json").read_text())
    assert again["tasks"] == summary["tasks"]
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    lines[0]["forced"] = {"request": "harmful"}                # an answer without an end: it counts as no verdict
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    early_verdict.main(["--model", "toy/model", "--data", str(answers), "--dtype", "float32", "--device", "cpu",
                        "--out", str(tmp_path / "again")])
    again = [json.loads(line) for line in open(tmp_path / "again" / "early.jsonl")]
    assert again[0]["tasks"] == {} and len(again) == 12 and all(line["tasks"] for line in again[1:])


def test_script_says_in_one_line_what_it_cannot_read(tmp_path):
    data = tmp_path / "x.jsonl"
    for line in ("7", '{"predict": 3}', '{"instruction": "a", "input": "b"}'):
        data.write_text(line)
        with pytest.raises(InputError, match="neither a record nor an answer"):
            early_verdict.main(["--model", "toy/model", "--data", str(data)])
    data.write_text(json.dumps({"instruction": "a", "input": "b", "output": TRACE}))
    with pytest.raises(InputError, match="no answer has steps"):
        early_verdict.main(["--model", "toy/model", "--data", str(data)])
    early_verdict.main(["--data", str(data), "--cut", str(tmp_path / "cut.json")])
    assert json.loads((tmp_path / "cut.json").read_text())[0]["output"] == TRACE


@pytest.mark.parametrize("name, content", [("early.json", '{"mine": 1}'), ("early.json", "[1"), ("early.svg", "<svg/>")])
def test_what_another_program_wrote_is_not_written_over(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=name):
        early_verdict.keep_what_is_not_ours(tmp_path)
    (tmp_path / "early.json").write_text('{"forms": [], "tasks": {}}')
    early_verdict.keep_what_is_not_ours(tmp_path)


LLAMA3 = ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
          "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
FRAMES = [("", ""), LLAMA3, ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
          ("<s>[INST] ", " [/INST]"), ("user\n\n", "assistant\n\n")]


def framed(frame, exchange, instruction=INSTRUCTION):
    """A saved prompt, as a chat template wrote it."""
    return frame[0] + instruction + "\n" + exchange + frame[1]


@pytest.mark.parametrize("frame", FRAMES)
def test_a_prompt_is_cut_where_it_was_put_together(frame):
    for exchange in (format_input("May I?"), format_input("May I?", "Sure."), "  " + format_input("a")):
        for instruction in (INSTRUCTION, "i"):
            line = {"prompt": framed(frame, exchange, instruction), "label": "harmful", "predict": TRACE}
            record = early_verdict.record_of_prediction(line, "some")
            assert (record["instruction"], record["input"]) == (instruction, exchange)
    for prompt, instruction, text in (("no exchange\nat all\n", "no exchange", "at all\n"), ("one line", "", "one line"),
                                      (format_input("a"), "", format_input("a")), ("", "", "")):
        record = early_verdict.record_of_prediction({"prompt": prompt, "predict": ""}, "some")
        assert (record["instruction"], record["input"]) == (instruction, text)


@pytest.mark.parametrize("dataset", ["some", "AegisSafetyTest", "HarmBenchResponse"])
def test_all_readers_of_predictions_give_one_gold(tmp_path, dataset):
    lines = [{"prompt": framed(frame, format_input("May I?", response)), "label": label, "predict": TRACE}
             for frame in FRAMES for response in (None, "Sure.")
             for label in ("harmful", "refusal", format_answers("unharmful", None, "harmful"))]
    path = tmp_path / dataset / "generated_predictions.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    gold = [case["gold"] for case in evaluation.read_predictions(path, dataset)]
    assert gold[:6] * len(FRAMES) == gold                           # whatever the frame
    assert [record["gold"] for record in early_verdict.read_answers(path)] == gold
    assert [row["gold"] for row in view.rows_of_predictions(path)] == gold
    assert [some for _, some in traces.read_traces(path, {})] == gold


def test_cut_records_are_of_answers_with_an_end_and_replace_nothing_but_themselves(tmp_path, capsys):
    line = {"prompt": framed(("", ""), format_input("May I?")), "label": "harmful", "predict": TRACE}
    data = tmp_path / "x.jsonl"
    cut = tmp_path / "cut.json"
    data.write_text("".join(json.dumps({**line, "forced": forced}) + "\n" for forced in (True, {}, False, None)))
    early_verdict.main(["--data", str(data), "--cut", str(cut)])
    assert len(json.loads(cut.read_text())) == 2
    assert capsys.readouterr().err == "2 answers without an end are left out\n"
    data.write_text(json.dumps({**line, "forced": {}}))
    with pytest.raises(InputError, match="x.jsonl: has no answer with an end"):
        early_verdict.main(["--data", str(data), "--cut", str(cut)])
    assert len(json.loads(cut.read_text())) == 2
    data.write_text(json.dumps(line))
    cut.write_text("notes")
    with pytest.raises(InputError, match="cut.json: is there, and holds something else; choose another --cut"):
        early_verdict.main(["--data", str(data), "--cut", str(cut)])
    assert cut.read_text() == "notes"


def test_a_report_comes_when_all_is_written(tmp_path, monkeypatch):
    data = tmp_path / "records.json"
    data.write_text(json.dumps(json.loads(open("toy/train_wildguard.json").read())[:12]))

    def end(summary, forms):
        assert {path.name for path in tmp_path.glob("early.*")} == {"early.jsonl", "early.json", "early.svg"}
        raise KeyboardInterrupt

    monkeypatch.setattr(early_verdict, "report", end)
    with pytest.raises(KeyboardInterrupt):
        early_verdict.main(["--model", "toy/model", "--data", str(data), "--dtype", "float32", "--device", "cpu"])


def test_cut_records_never_replace_those_that_are_read(tmp_path):
    data = tmp_path / "x.json"
    data.write_text(json.dumps([{"instruction": "a", "input": "b", "output": TRACE}]))
    before = data.read_bytes()
    with pytest.raises(InputError, match="x.json: is read, and would be overwritten; choose another --cut"):
        early_verdict.main(["--data", str(data), "--cut", str(data)])
    assert data.read_bytes() == before
