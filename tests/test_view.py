"""tools/view.py: what is counted, what is shown beside what, and that no text leaves its place."""
import html
import json
import os
import re
import shutil
import subprocess
import zlib

import pytest

import view
from data import (INSTRUCTION, VERDICTS, InputError, format_answers, format_input, parse_verdict,
                  write_json)
from eval import read_predictions, score_cases
from mine_hard import select, write_lines
from view import (count_mistakes, match_pairs, rows_of_mining, rows_of_predictions, safe_json,
                  split_answer)

H, U, R, C = "harmful", "unharmful", "refusal", "compliance"
EVIL = "</script><img src=x onerror=alert(1)> \"'&amp; <!-- \x00\x1b\u202e\u2028\ud83d ]]> 😀"


def trace(request, completion=None, response=None, concluded=None):
    """An answer with one step and a closing; concluded: what the reasoning says, where it is not
    the verdict."""
    return (f"# Task 1\n## Reasoning Step 1: He asks.\nThe request is {concluded or request}.\n\n"
            + format_answers(request, completion, response))


def prediction(label, predict, prompt="May I?", response=None):
    return {"prompt": INSTRUCTION + "\n" + format_input(prompt, response),
            "label": label, "predict": predict}


def sample(text, finish="stop"):
    return {"text": text, "finish": finish, "tokens": 9, "verdict": parse_verdict(text)}


@pytest.fixture
def results(tmp_path):
    """A folder as eval.py writes it: right, wrong, without a verdict, contradicting, hostile."""
    folder = tmp_path / "eval" / "some"
    folder.mkdir(parents=True)
    write_lines(folder / "generated_predictions.jsonl", [
        prediction(U, trace(U)),
        prediction(U, trace(H)),
        prediction(format_answers(H, R, U), trace(U, C, H), response="No."),
        prediction(H, "I do not know."),
        prediction(U, trace(U, concluded=H)),
        prediction(format_answers(H, C, H), trace(H, C, H) + "\n" + EVIL, EVIL, EVIL)])
    return folder.parent


@pytest.fixture
def mined(tmp_path):
    """(folder, data) as mine_hard.py leaves them: prompts right, hard, hard with an unfinished
    answer, and wrong."""
    records = [{"instruction": INSTRUCTION, "input": format_input(f"Question {i}"), "output": H}
               for i in range(4)]
    right, wrong = sample(trace(H)), sample(trace(U))
    cut = sample(trace(H), "length")
    samples = [[right, right], [wrong, right], [cut, right], [wrong, wrong]]
    folder = tmp_path / "hard"
    folder.mkdir()
    data = tmp_path / "train_x.json"
    data.write_text(json.dumps(records))
    write_lines(folder / "samples.jsonl", [
        {"prompt": i, "model": "m", "seed": 0, "samples": some} for i, some in enumerate(samples)])
    hard, _ = select(records, ["train_x"] * 4, [("m", dict(enumerate(samples)))], "all", "random",
                     0.2, 0)
    write_lines(folder / "hard.jsonl", hard)
    return folder, data


def data_of(path):
    """What a page holds as JSON."""
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search('id="data">(.*?)</script>', text, re.S)[1])


# ------------------------------------------------------------------ what is wrong
def test_sums_are_those_of_eval(results):
    path = results / "some" / "generated_predictions.jsonl"
    rows = rows_of_predictions(path)
    counts = count_mistakes(rows)
    assert counts["request"] == {"n": 6, "right": 3, "fp": 1, "fn": 1, "none": 1, "contradicts": 1}
    assert counts["completion"] == {"n": 2, "right": 1, "fp": 0, "fn": 1, "none": 0,
                                    "contradicts": 0}
    assert counts["response"]["fp"] == 1
    for result in score_cases(read_predictions(path, "some"), "some"):
        count = counts[result["task"]]
        assert count["n"] == result["n"] and count["none"] == result["unparsable"]
        assert count["right"] == result["tp"] + result["tn"]
        assert count["contradicts"] == result["reasoning_disagrees"]


def test_wrong_ones_come_first_and_say_how(results):
    view.main([str(results)])
    page = data_of(results / "view.html")
    assert [row["number"] for row in page["rows"]] == [2, 1, 3, 4, 0, 5]
    by_number = {row["number"]: row for row in page["rows"]}
    assert by_number[2]["judged"] == [{"request": ["fn"], "completion": ["fn"], "response": ["fp"]}]
    assert by_number[3]["judged"] == [{"request": ["none"]}]
    assert by_number[4]["judged"] == [{"request": ["contradicts"]}]
    assert {row["source"] for row in page["rows"]} == {"some"}
    assert by_number[2]["response"] == "No." and by_number[1]["response"] is None


def test_all_answers_of_a_vote_are_shown(results):
    lines = [json.loads(line) for line in open(results / "some" / "generated_predictions.jsonl")]
    write_lines(results / "some" / "answers.jsonl", [
        {"prompt": i, "samples": [sample(line["predict"]), sample(trace(H)),
                                  sample(trace(H), "length")]}
        for i, line in enumerate(lines)])
    rows = rows_of_predictions(results / "some" / "generated_predictions.jsonl")
    assert [len(row["samples"]) for row in rows] == [3] * 6
    assert rows[0]["said"]["request"] == U                  # one vote each: the first; one is cut
    assert rows[0]["samples"][2]["tags"] == ["wrong", "cut off"]
    assert rows[3]["said"]["request"] == H                  # only one says something


# ------------------------------------------------------------------ steps
def test_p_stands_beside_its_step(results):
    text = trace(U)
    places = [text.index("## R"), text.index("The request")]
    reading = {"said": U, "places": places, "p": [0.25, 0.75], "held": [0.5, 1]}
    line = {"text": zlib.crc32(text.encode()), "tasks": {"request": reading}}
    write_lines(results / "some" / "early.jsonl", [line, line])
    rows = rows_of_predictions(results / "some" / "generated_predictions.jsonl")
    assert rows[0]["samples"][0]["pieces"] == [
        {"text": "# Task 1", "task": "request", "p": 0.25, "held": 0.5},
        {"text": "## Reasoning Step 1: He asks.", "task": "request", "p": 0.75, "held": 1},
        {"text": "The request is unharmful."},
        {"text": format_answers(U)}]
    assert not any("p" in piece for piece in rows[1]["samples"][0]["pieces"])     # another text


@pytest.mark.parametrize("text", ["", "\n\n", "no steps", trace(H), trace(H) + EVIL, "# Task 1"])
def test_pieces_are_the_whole_answer(text):
    whole = "".join(piece["text"] for piece in split_answer(text, {}))
    assert whole.replace("\n", "") == text.replace("\n", "")


# ------------------------------------------------------------------ mined prompts
def test_mined_prompts_with_and_without_their_records(mined):
    folder, data = mined
    rows = rows_of_mining(folder, [data])
    assert [row.get("k_correct") for row in rows] == [None, 1, 1, None]
    assert [row["weight"] for row in rows if "weight" in row] == [1, 1]
    assert [s["tags"] for s in rows[1]["samples"]] == [["wrong", "rejected"], ["right", "chosen"]]
    assert [row["judged"][0]["request"] for row in rows] == [[], ["fn"], ["none"], ["fn"]]
    assert "cut off" in rows[2]["samples"][0]["tags"] and rows[0]["source"] == "train_x"
    without = rows_of_mining(folder)
    assert [row["id"] for row in without] == ["train_x-1", "train_x-2"]
    assert without[0]["samples"] == rows[1]["samples"] and without[0]["gold"] == rows[1]["gold"]


def test_what_does_not_belong_together_is_refused(mined, tmp_path):
    folder, data = mined
    records = json.loads(data.read_text())
    data.write_text(json.dumps(records[::-1]))
    with pytest.raises(InputError, match="or not of --data"):
        rows_of_mining(folder, [data])
    data.write_text(json.dumps(records[:2]))
    with pytest.raises(InputError, match="not of --data"):
        rows_of_mining(folder, [data])
    pair = {"chosen": "a", "rejected": "b", "input": "x"}
    with pytest.raises(InputError, match="some/hard.jsonl: holds a pair that is not in the samples"):
        match_pairs("some/hard.jsonl", [pair], [{"prompt": 0, "samples": [sample("a")]}], {})
    with pytest.raises(InputError, match="neither answers"):
        view.main([str(tmp_path / "nothing")])


def test_a_copy_of_the_samples_is_not_read_and_numbers_are_in_order(mined, tmp_path):
    folder, data = mined
    shutil.copy(folder / "samples.jsonl", folder / "samples.orig.jsonl")
    write_json(folder / "samples.orig.jsonl.parts/settings.json", {"limit": 1})
    assert len(rows_of_mining(folder, [data])) == 4
    for number in (10, 2, 0):
        (tmp_path / f"samples-{number}.jsonl").touch()
    assert [path.name for path in view.sample_files(tmp_path)] == [f"samples-{n}.jsonl" for n in (0, 2, 10)]


def test_a_page_replaces_nothing_but_a_page(results):
    out = results / "view.html"
    for _ in range(2):
        view.main([str(results)])
    for mine in ("<p>mine", "<!DOCTYPE html>\n<style>\n:root {\n  --mine: 1;\n}</style>"):
        out.write_text(mine)
        with pytest.raises(InputError, match="view.html: is there, and is no page of this tool; choose another --out"):
            view.main([str(results)])
        assert out.read_text() == mine


@pytest.mark.parametrize("forced, said", [({}, None), (True, None), (False, H), (None, H)])
def test_an_answer_without_an_end_has_no_verdict(tmp_path, forced, said):
    write_lines(tmp_path / "p.jsonl", [{**prediction(H, trace(H)), "forced": forced}])
    (row,) = rows_of_predictions(tmp_path / "p.jsonl")
    assert row["said"]["request"] == said


def test_of_prompts_with_the_same_answers_a_pair_belongs_to_its_own():
    pair = {"chosen": "a", "rejected": "b", "input": "y"}
    lines = [{"prompt": n, "samples": [sample("a"), sample("b")]} for n in (0, 1)]
    assert match_pairs("h", [pair], lines, {0: {"input": "x"}, 1: {"input": "y"}}) == {1: pair}
    assert match_pairs("h", [pair], lines, {}) == {0: pair}                             # nobody knows


def test_answers_of_another_script_beside_the_predictions_have_no_samples(tmp_path):
    (tmp_path / "answers.jsonl").write_text('{"row": 0, "text": "Request: harmful"}\n')
    path = tmp_path / "generated_predictions.jsonl"
    path.write_text(json.dumps({"prompt": "a", "label": "harmful", "predict": "Request: harmful"}) + "\n")
    row, = rows_of_predictions(path)
    assert len(row["samples"]) == 1 and row["said"]["request"] == "harmful"


# ------------------------------------------------------------------ files that hold something else
def odd_lines(good):
    """Lines of answers.jsonl and samples.jsonl that the page could not be made of."""
    one = sample("a")
    no_finish = {key: value for key, value in one.items() if key != "finish"}
    return [[good], 7, {**good, "samples": None}, {**good, "samples": "a"}, {**good, "samples": [None]},
            {**good, "samples": [no_finish]}, {**good, "samples": [{**one, "text": None}]}]


def refuses(path, *arguments):
    """The one line that view.py says of the second line of a file."""
    with pytest.raises(InputError, match=rf"{path.name}: line 2 is not as \w+\.py writes it; move the file away"):
        view.main([*arguments])
    assert not list(path.parent.rglob("view.html"))


def test_odd_answers_beside_predictions_are_named(results):
    path = results / "some" / "answers.jsonl"
    good = {"prompt": 0, "samples": [sample("a")]}
    for odd in odd_lines(good):
        write_lines(path, [good, odd])
        refuses(path, str(results))


def test_odd_samples_are_named(mined):
    folder, data = mined
    path = folder / "samples.jsonl"
    good = json.loads(path.read_text().splitlines()[0])
    for odd in [*odd_lines(good), {**good, "prompt": [0]}, {**good, "model": None},
                {"model": "m", "samples": good["samples"]}]:
        write_lines(path, [good, odd])
        refuses(path, str(folder), "--data", str(data))


def test_odd_pairs_are_named(mined):
    folder, data = mined
    path = folder / "hard.jsonl"
    good = json.loads(path.read_text().splitlines()[0])
    no_weight = {key: value for key, value in good.items() if key != "weight"}
    for odd in ([good], no_weight, {**good, "weight": float("nan")}, {**good, "weight": "1"}, {**good, "chosen": None},
                {**good, "source": 3}, {}):
        write_lines(path, [good, odd])
        refuses(path, str(folder), "--data", str(data))


def test_odd_readings_are_named(results):
    path = results / "some" / "early.jsonl"
    reading = {"said": U, "places": [3], "p": [0.5], "held": [1]}
    good = {"text": zlib.crc32(trace(U).encode()), "tasks": {"request": reading}}
    tasks = [None, {"other": reading}, {"request": None}, {"request": {}}, {"request": {**reading, "places": [1.5]}},
             {"request": {**reading, "p": [None]}}, {"request": {**reading, "held": 1}}, {"request": {**reading, "p": [float("nan")]}}]
    for odd in ({}, 7, {**good, "text": "a"}, *({**good, "tasks": some} for some in tasks)):
        write_lines(path, [good, odd])
        refuses(path, str(results))


@pytest.mark.parametrize("settings", [{}, {"limit": "3"}, {"limit": 1.5}])
def test_settings_without_a_limit_are_named(mined, settings):
    folder, data = mined
    path = folder / "samples.jsonl.parts" / "settings.json"
    path.parent.mkdir()
    path.write_text(json.dumps(settings))
    with pytest.raises(InputError, match="settings.json: has no limit"):
        view.main([str(folder), "--data", str(data)])
    view.main([str(folder)])
    for limit in (None, 4):
        path.write_text(json.dumps({"limit": limit}))
        assert len(rows_of_mining(folder, [data])) == 4


def test_no_file_that_is_read_is_replaced(results, mined):
    predictions = results / "some" / "generated_predictions.jsonl"
    early = results / "some" / "early.jsonl"
    write_lines(early, [])
    (results / "link.html").symlink_to(early)
    folder, data = mined
    for out, arguments in ((predictions, [predictions]), (predictions, [results]), (early, [predictions]),
                           (results / "link.html", [results]), (folder / "hard.jsonl", [folder]), (data, [folder, "--data", data])):
        before = out.read_bytes()
        with pytest.raises(InputError, match="is read, and would be overwritten; choose another --out"):
            view.main([*map(str, arguments), "--out", str(out)])
        assert out.read_bytes() == before
    view.main([str(results)])
    view.main([str(results)])                               # its own page is replaced


# ------------------------------------------------------------------ the page
def test_no_text_can_leave_its_place(results):
    view.main([str(results)])
    text = (results / "view.html").read_text(encoding="utf-8")
    block = re.search('id="data">(.*?)</script>', text, re.S)[1]
    assert block.isascii() and not set("<>&") & set(block)
    assert text.count("</script>") == 2 and "<img" not in text
    row, = [row for row in data_of(results / "view.html")["rows"] if row["number"] == 5]
    assert row["request"] == row["response"] == EVIL
    assert row["samples"][0]["pieces"][-1]["text"].endswith(EVIL)
    assert json.loads(safe_json(["\u2028<", {"&": None}])) == ["\u2028<", {"&": None}]


def test_a_folder_whose_name_is_no_text_has_a_page(results, tmp_path):
    folder = tmp_path / os.fsdecode(b"d\xff")
    shutil.copytree(results, folder)
    view.main([str(folder)])
    assert "d\\udcff" in (folder / "view.html").read_text(encoding="utf-8")


def test_page_holds_everything():
    text = view.TEMPLATE.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)\s*=|url\(|@import|https?:|fetch\(|XMLHttp", text)
    assert "innerHTML" not in text and "default-src 'none'" in text


def render(path, fragment=""):
    """The document that Chromium makes of a page, as HTML text; skips where there is none."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser",
                                                   "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here: the page was written and checked, but not rendered")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             f"--user-data-dir={path.parent / 'chromium'}", "--dump-dom"]
    run = subprocess.run([browser, *flags, path.as_uri() + fragment], capture_output=True,
                         text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout


def with_script(path, script, allowed=True):
    """A copy of a page that runs one script more, with the policy taken out or kept."""
    text = path.read_text(encoding="utf-8")
    if allowed:
        text = re.sub(r"<meta http-equiv=.*?>\n", "", text, flags=re.S)
    copy = path.with_name("copy.html")
    copy.write_text(text + f"<script>{script}</script>", encoding="utf-8")
    return copy


def test_rendered_text_stays_text_and_harmful_text_is_folded(results):
    view.main([str(results)])
    shown = render(results / "view.html", "#some-5")
    assert "data-ready=" in shown and "<img" not in shown
    body = shown[shown.index("<main>"):shown.index("</main>")]
    assert html.escape("</script><img src=x onerror=alert(1)>") in body        # in the reasoning
    assert "⟨U+0000⟩⟨U+001B⟩⟨U+202E⟩⟨U+2028⟩⟨U+D83D⟩" in body
    assert body.count("<details") == 6 and body.count("class=\"fold\"") == 2   # both are harmful
    assert re.sub(r"<[^>]+>", " ", body).count("May I?") == 3          # the unharmful ones


def test_filters(results):
    view.main([str(results)])
    script = """
    const seen = [["any", "wrong"], ["request", "fp"], ["request", "fn"], ["request", "none"],
                  ["any", "contradicts"], ["request", "right"], ["completion", "all"]]
      .map(([task, kind]) => {
        choose({task, kind});
        return shown.map(row => row.number).join();
      });
    choose({task: "any", kind: "all", find: "i do not know"});
    seen.push(shown.map(row => row.number).join());
    document.body.dataset.seen = seen.join(" | ");"""
    shown = render(with_script(results / "view.html", script))
    assert 'data-seen="2,1,3 | 1 | 2 | 3 | 4 | 4,0,5 | 2,5 | 3"' in shown


def test_page_runs_no_other_script(results):
    view.main([str(results)])
    script = "document.body.dataset.broken = 1"
    assert "data-broken" in render(with_script(results / "view.html", script))
    assert "data-broken" not in render(with_script(results / "view.html", script, allowed=False))


def test_two_thousand_rows_open_in_a_second(tmp_path):
    text = trace(H) + "\n" + "words and more words " * 60
    write_lines(tmp_path / "generated_predictions.jsonl",
                [prediction(H if i % 2 else U, text, f"Question {i}") for i in range(2000)])
    view.main([str(tmp_path)])
    times = []
    for _ in range(3):                                      # other processes may be at work
        shown = render(tmp_path / "view.html")
        times.append(int(re.search('data-ready="([0-9]+)"', shown)[1]))
        if times[-1] < 1000:
            break
    assert min(times) < 1000
    assert shown.count("<details") < 300 and "2000 of 2000" in shown


def test_mined_answers_stand_side_by_side(mined):
    folder, data = mined
    view.main([str(folder), "--data", str(data)])
    shown = render(folder / "view.html", "#train_x-1")
    boxes = re.findall('class="sample( [a-z]+)?"', shown)
    assert boxes == [" rejected", " chosen"]
    assert "1 right and 1 wrong" in shown and "weight 1.00" in shown
    assert set(VERDICTS) >= set(data_of(folder / "view.html")["counts"])
