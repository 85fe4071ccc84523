"""The whole road in a minute: from the prompt to the DPO loss, by the five functions of day one.

    python course/day_one.py        writes out/day_one anew

Two losses are drawn. A stand-in gives the answers that a trained model would take minutes for: the
record's own trace, or the same with its verdicts turned round.
"""
import argparse
import json
import math
import os
import random
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from exercises import BY_NAME, DAY_ONE, find, is_blank, parse  # noqa: E402

import train_dpo  # noqa: E402
import train_sft  # noqa: E402
from data import VERDICTS, format_input, gold_verdict, parse_verdict  # noqa: E402
from data import read_records, split_input  # noqa: E402
from mine_hard import judge, sample_weights  # noqa: E402

COMMON = ["--dtype", "float32", "--device", "cpu", "--seed", "1"]


def answers_to(record, rng, k=4):
    """k answers: so many of them wrong as a die says."""
    block = record["output"].rindex("Answers:")
    wrong_block = record["output"][block:]
    for words in set(VERDICTS.values()):
        for a, b in (words, words[::-1]):
            wrong_block = wrong_block.replace(f" {a}\n", f" #{b}\n").replace(f" {a}", f" #{b}")
    wrong = record["output"][:block] + wrong_block.replace("#", "")
    wrong_ones = rng.randrange(k + 1)
    return [record["output"]] * (k - wrong_ones) + [wrong] * wrong_ones


def mine(records, rng):
    """Lines of hard.jsonl, as mine_hard.py makes them: judged, paired, weighed."""
    pairs = []
    for record in records:
        gold = gold_verdict(record)
        answers = answers_to(record, rng)
        right = [judge(parse_verdict(text), gold) for text in answers]
        if True in right and False in right:
            pairs.append({
                "instruction": record["instruction"], "input": record["input"],
                "chosen": answers[right.index(True)], "rejected": answers[right.index(False)],
                "k_correct": right.count(True), "k_incorrect": right.count(False)})
    weights = sample_weights([p["k_incorrect"] - p["k_correct"] for p in pairs], 0.2)
    return [{**pair, "weight": weight} for pair, weight in zip(pairs, weights)]


def draw(title, losses):
    """A bar a step."""
    print(f"\n{title}")
    for step, loss in enumerate(losses, 1):
        print(f"  step {step:3}  {loss:8.4f}  {'#' * round(50 * loss / max(losses))}")


def not_written():
    """Which of the five functions are blank, or in a file with a mistake in syntax."""
    blanks = []
    for name in DAY_ONE:
        tree = parse((ROOT / BY_NAME[name].file).read_text(encoding="utf-8"))
        node = tree and find(tree, name)
        if node is None or is_blank(node):
            blanks.append(name)
    return blanks


def figures_of(folder, name):
    """A figure of every step."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()[1:]
    return [json.loads(line)[name] for line in lines]


def clear(out):
    """An empty folder: what an earlier run left there goes, and where anything else is, this ends.
    A run writes records.json first, and it goes last: sft or dpo without it are somebody's."""
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    others = names - {"records.json", "sft", "hard.jsonl", "dpo"}
    if out.exists() and not out.is_dir() or others or names and "records.json" not in names:
        sys.exit(f"{out}: holds what this did not write; choose another --out")
    for name in sorted(names, key=lambda name: name == "records.json"):
        if (out / name).is_dir() and not (out / name).is_symlink():
            shutil.rmtree(out / name)
        else:
            (out / name).unlink()
    out.mkdir(parents=True, exist_ok=True)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", default="out/day_one", help="folder that is written anew")
    p.add_argument("--limit", type=int, default=48, help="of the records")
    args = p.parse_args(argv)
    os.chdir(ROOT)
    blanks = not_written()
    if blanks:
        print(f"not written yet: {', '.join(blanks)}; python course/check.py {blanks[0]}")
        return 1
    out = Path(args.out)
    clear(out)
    records = read_records("toy/train_wildguard.json")[:args.limit]
    for record in records:
        record["input"] = format_input(*split_input(record["input"]))
    (out / "records.json").write_text(json.dumps(records))
    train_sft.main(["--data", str(out / "records.json"), "--out", str(out / "sft"), "--lr", "2e-3",
                    "--epochs", "6", "--batch-size", "16", *COMMON])
    hard = mine(records, random.Random(0))
    (out / "hard.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in hard))
    train_dpo.main(["--model", str(out / "sft"), "--data", str(out / "hard.jsonl"),
                    "--out", str(out / "dpo"), "--lr", "3e-4", "--epochs", "10",
                    "--batch-size", "64", "--beta", "0.1", "--sft", "0", *COMMON])
    sft = figures_of(out / "sft", "loss")
    dpo = figures_of(out / "dpo", "loss")
    accuracy = figures_of(out / "dpo", "accuracy")[-1]
    draw("R-SFT, -log p of an answer token (your format_input, sft_loss)", sft)
    draw("HS-DPO (your judge, sample_weights, dpo_loss)", dpo)
    alpha = sum(pair["weight"] for pair in hard) / len(hard)
    fell = sft[-1] < 0.6 * sft[0] and dpo[-1] < 0.7 * dpo[0]
    print(f"\n{len(records)} records, {len(hard)} hard; mean(alpha) ln 2 over all of them is "
          f"{alpha * math.log(2):.4f}")
    if not fell:
        print("a loss does not fall as it should: whose fault is it?")
    elif accuracy < 0.5:
        print(f"both losses fall, but at the end only {accuracy:.2f} of the pairs have a margin "
              "above 0:\nit learns to prefer what was rejected; look at the signs in dpo_loss")
    else:
        print(f"both losses fall; at the end {accuracy:.2f} of the pairs have a margin above 0")
    return 0 if fell and accuracy >= 0.5 else 1


if __name__ == "__main__":
    sys.exit(main())
