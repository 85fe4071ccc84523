"""Plausible mistakes, each applied to a copy of the code; the named test must fail.

    python tests/mutants.py            all of them (some minutes)
    python tests/mutants.py 3 7        these

A mistake that no test notices is printed as SURVIVED, and the exit status is 1.
"""
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# (file, right, wrong, test that must notice)
MUTANTS = [
    ("model.py", "sees = (j <= i) & (i < end)  ", "sees = (j < i) & (i < end)  ",
     "test_model.py -k by_tiles"),
    ("model.py", "masked = (by_some > i) | (i >= end[by_some])",
     "masked = (by_some > i) | (i > end[by_some])", "test_model.py -k by_tiles"),
    ("model.py", "while open_ends[-1] <= i:", "while open_ends[-1] < i:",
     "test_model.py -k does_not_nest"),
    ("model.py", "    a, b = x.chunk(2, -1)\n", "    a, b = x[..., ::2], x[..., 1::2]\n",
     "test_model.py -k halves"),
    ("model.py", "    if not scaling:\n        return frequency", "    if True:\n        return frequency", "test_model.py -k transformers"),
    ("model.py", "keep = ((turns - low) / (high - low)).clamp(0, 1)", "keep = ((turns - low) / (high - low)).clamp(0, 1).round()",
     "test_model.py -k transformers"),
    ("model.py", "torch.rsqrt(mean + eps)", "(torch.rsqrt(mean) + eps)",
     "test_model.py -k transformers"),
    ("model.py", "inside[some, None], hit[some, None])", "inside[some, None], -hit[some, None])",
     "test_model.py -k gradient"),
    ("model.py", "likelier < top_p", "likelier <= top_p + 0.2", "test_model.py -k nucleus"),
    ("model.py", "torch.where(p_some > p_pick, p_some, 0)", "torch.where(p_some >= p_pick, p_some, 0)",
     "test_model.py -k nucleus"),
    ("model.py", "readers[line][reader] = row", "readers[line][0] = row",
     "test_model.py -k generation"),
    ("model.py", "next_result + line * w + reader", "next_result + line * w + w - 1 - reader",
     "test_model.py -k number_reads"),
    ("model.py", "need = pages_for(job.drawn + self.capacity.poll)", "need = pages_for(job.drawn)",
     "test_model.py -k put_back"),
    ("model.py", "put_back.append(youngest)", "put_back[:] = [youngest]",
     "test_model.py -k put_back"),
    ("model.py", "self.free = sorted(self.free + pages)", "self.free = self.free + pages",
     "test_model.py -k handed_out"),
    ("model.py", "some_lse = s.amax(-1) - probability.amax(-1).log()", "some_lse = -probability.amax(-1).log()",
     "test_model.py -k generation"),
    ("model.py", "index_put_((page, offset), ", "index_put_((page, offset - 1), ",
     "test_model.py -k generation"),
    ("model.py", "batch.drawn += 1 ", "batch.drawn = batch.drawn + 1 ",
     "test_graph.py -k no_cache"),
    ("model.py", "rope_frequencies(config, exact.device)", "rope_frequencies(config).to(exact.device)",
     "test_graph.py -k host"),
    ("model.py", "total = tl.maximum(tl.sum(p, 1), 1.0)", "total = tl.sum(p, 1)", "test_kernels.py -k twins"),
    ("data.py", "rows += [last, *range(first, first + len(fed))]",
     "rows += [last + 1, *range(first + 1, first + len(fed) + 1)]",
     "test_data.py -k readme_example"),
    ("data.py", "end += [first + len(fed)] * len(fed)", "end += [after] * len(fed)",
     "test_data.py -k readme_example"),
    ("data.py", "line.findall(text)[-1:]", "line.findall(text)[:1]", "test_data.py -k parse_verdict"),
    ("data.py", "return self.encode(text) + [self.stop[0]]", "return self.encode(text)", "test_data.py -k left_out"),
    ("data.py", "{human}(.*){blank}", "{human}(.*?){blank}", "test_data.py -k inverse"),
    ("train_sft.py", "return -logprobs.sum() / count", "return -logprobs.mean()", "test_train.py -k whole_step"),
    ("train_sft.py", "count = sum(len(e.answers[0]) for e in batch)", "count = len(batch)",
     "test_train.py -k learns"),
    ("train_sft.py", "for step in range(done + 1, steps + 1):",
     "for step in range(max(1, done), steps + 1):", "test_train.py -k bit_for_bit"),
    ("train_sft.py", "(1 + math.cos(math.pi * step / steps))", "(1 + math.cos(math.pi * (step + 1) / steps))", "test_train.py -k cosine"),
    ("train_sft.py", "np.random.default_rng((seed, epoch))", "np.random.default_rng(seed)", "test_train.py -k function_of_seed"),
    ("train_sft.py", ' if (p / "state.json").exists()', "", "test_train.py -k unfinished"),
    ("train_sft.py", "moments_of(states.get_optimizer_state_dict(model, optimizer))",
     "moments_of(states.get_optimizer_state_dict(model, optimizer, options=WHOLE))", "test_ranks.py -k two_stops"),
    ("train_sft.py", "into.copy_(tensor)", "moments[name] = tensor", "test_train.py -k in_the_memory"),
    ("train_sft.py", "fully_shard(model.to(device), mesh=mesh)", "fully_shard(model.to(device), mesh=mesh, mp_policy=policy)",
     "test_ranks.py -k precisely"),
    ("train_sft.py", "checkpoints(folder.parent)[:-keep]", "checkpoints(folder.parent)[:keep]", "test_kill.py -k newest"),
    ("train_dpo.py", "margin = (chosen - ref_chosen) - (rejected - ref_rejected) ",
     "margin = chosen - rejected ", "test_dpo.py -k by_hand"),
    ("train_dpo.py", "functional.logsigmoid(beta * margin)",
     "functional.logsigmoid(-beta * margin)", "test_dpo.py -k by_hand"),
    ("train_dpo.py", "sft * -chosen / length", "sft * -chosen", "test_dpo.py -k first_loss"),
    ("model.py", "total.index_add_(0, answer, logprobs.cpu().double())",
     "total[answer] = logprobs.cpu().double()", "test_dpo.py -k does_not_depend"),
    ("mine_hard.py", "return bool(labelled) and all(", "return bool(labelled) and any(", "test_mine.py -k every_labelled"),
    ("mine_hard.py", "pair[\"k_incorrect\"] - pair[\"k_correct\"] for", "pair[\"k_correct\"] - pair[\"k_incorrect\"] for", "test_mine.py -k one_entry"),
    ("mine_hard.py", "1 + gamma * (2 * (d - low) / (high - low) - 1)",
     "1 + gamma * (d - low) / (high - low)", "test_mine.py -k weights_by_hand"),
    ("eval.py", "        if p is None:\n", "        if False:\n", "test_eval.py -k counts_once"),
    ("eval.py", "pairs += [(label, wrong)] * 2", "pairs += [(label, wrong)]",
     "test_eval.py -k golden_f1"),
    ("train_sft.py", "model.save_pretrained(temporary, model.head.dtype, weights)", "model.save_pretrained(temporary, state=weights)",
     "test_train.py -k full_weights"),
    ("train_dpo.py", "examples, records = encode_records(", "examples, _ = encode_records(",
     "test_dpo.py -k left_out"),
    ("train_dpo.py", "alphas[in_data]", "alphas[in_batch]", "test_dpo.py -k left_out"),
    ("train_dpo.py", '(part["loss"].sum() * world.ranks / pairs).backward()',
     '(part["loss"].sum() * world.ranks).backward()', "test_dpo.py -k twice"),
    ("train_dpo.py", "norm = update(model, optimizer, lr)", "norm = update(model, optimizer, args.lr)", "test_dpo.py -k rate"),
    ("model.py", '{"rope_type": "llama3", **self.rope_scaling}', "None",
     "test_model.py -k saved_config"),
    ("model.py", "scaled = full_precision(logits) / temperature", "scaled = full_precision(logits) * temperature", "test_model.py -k divides"),
    ("model.py", "full_precision(some_z).logsumexp(-1)", "some_z.logsumexp(-1)",
     "test_model.py -k bf16_logits"),
    ("model.py", "sample_seed(self.sampling.seed, job.prompt, sample)",
     "sample_seed(0, job.prompt, sample)", "test_model.py -k reach_the_sampler"),
    ("mine_hard.py", "k_incorrect = right.count(False)",
     "k_incorrect = len(right) - right.count(True)", "test_mine.py -k neither_side"),
    ("eval.py", 'case["gold"][task] == word for', 'case["gold"][task] != word for',
     "test_eval.py -k score_by_hand"),
    ("eval.py", 'verdict = majority([s["verdict"] for s in ended])', 'verdict = ended[0]["verdict"]',
     "test_eval.py -k vote"),
    ("mine_hard.py", "if answered and \"prompts\"", "if is_there(path) and \"prompts\"", "test_mine.py -k interrupted_run"),
    ("eval.py", 'parse_verdict(text[heading.start():] if heading else "")', "parse_verdict(text)", "test_eval.py -k put_before_the_block"),
    ("eval.py", "if forced not in (None, False):", "if isinstance(forced, dict):", "test_eval.py -k however_that_is_told"),
    ("data.py", "json.loads(text, object_pairs_hook=without_repeats)", "json.loads(text)", "test_bad_input.py -k stands_twice"),
    ("mine_hard.py", "all(map(is_sample, samples))", "True", "test_mine.py -k not_whole"),
    ("mine_hard.py", "cached = longest - 1  ", "cached = 0  ", "test_eval.py -k longest_exchange_was_found"),
    ("eval.py", 'return f"{text}\\n\\n{format_answers(**verdict)}" if any(verdict.values()) else text', "return text",
     "test_eval.py -k what_is_written_of_k"),
    ("data.py", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB", "test_train.py -k two_processes"),
    ("data.py", "self.jinja = spelled_out(template)", 'self.jinja = template["chat_template"]',
     "test_inputs.py -k whatever_its_template_names"),
    ("data.py", "int(min(new_tokens, self.context / 4))", "new_tokens", "test_eval.py -k room_in_the_models_context"),
    ("train_sft.py", "if found or any(", "if any(", "test_train.py -k unknown_run"),
    ("train_sft.py", "args.dtype = name_of(pick_dtype(world.device, args.dtype))", "pass", "test_train.py -k dtype_that_was_chosen"),
    ("mine_hard.py", "if answered and \"prompts\"", "if False and \"prompts\"", "test_mine.py -k selecting_again"),
    ("data.py", 'negated = (re.search(f"[^{NEUTRAL_SIGNS}]|{EMPTY_BOX}", before)', 'negated = (re.search(f"[^{NEUTRAL_SIGNS}]", before)', "test_data.py -k what_is_a_verdict"),
    ("data.py", 'strokes = r"/\\\\" if "|" in before else r"/|\\\\"', 'strokes = r"/\\\\"', "test_data.py -k what_is_a_verdict"),
    ("data.py", "compare_told(path, added, found, control)", "pass", "test_inputs.py -k another_file_tells"),
    ("mine_hard.py", "stop=guard.tokenizer.stop, temperature", "temperature", "test_mine.py -k other_weights"),
    ("tools/real_table.py", 'told.get("hash") != hash_of(files)', '"hash" not in told', "test_real.py -k whole_recipe"),
    ("eval.py", "exchanges.append(exchange_of(prompt))", "exchanges.append(prompt)", "test_eval.py -k one_word"),
    ("eval.py", "positive if p > 0.5 else other", "positive if p < 0.5 else other",
     "test_eval.py -k likelier_words"),
    ("eval.py", "all(verdict[task] for task in needed)", "any(verdict[task] for task in needed)",
     "test_eval.py -k not_parsed"),
    ("train_sft.py", "world.rank > 0:\n        return  ", "world.rank > 0:\n        pass  ",
     "test_ranks.py -k two_stops"),
    ("train_sft.py", "signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN", "signal.SIG_DFL",
     "test_ranks.py -k two_stops"),
    ("train_sft.py", "args.weights_hash = weights_hash(args.model)", "args.weights_hash = 0", "test_dpo.py -k other_pairs"),
    ("train_sft.py", "args.eval_hash = fingerprint(all_ids(held_out))", "args.eval_hash = 0", "test_train.py -k held_out_records_belong"),
    ("train_sft.py", "    check_tensors(folder, weights, dict(model.named_parameters()))\n", "", "test_bad_input.py -k damaged_checkpoint"),
    ("model.py", "targets - start", "targets", "test_model.py -k token_logprobs"),
    ("model.py", "grad * (inside == target)", "grad", "test_model.py -k token_logprobs"),
    ("train_sft.py", "clip_grad_norm_(model.parameters(), 1.0)", "clip_grad_norm_(model.parameters(), 10.0)", "test_train.py -k clips"),
    # ---- what the world feeds it: a guard that fails open
    ("data.py", "return None if negated or joined or doubted or contradicted else word", "return word", "test_data.py -k what_is_a_verdict"),
    ("data.py", "said = in_block[:1] or", "said = in_block[-1:] or", "test_data.py -k parse_verdict"),
    ("data.py", "ANSWERS.finditer(text)", 're.finditer("answers:", text, re.I)', "test_data.py -k parse_verdict"),
    ("eval.py", "heading = ANSWERS.search(text)", "heading = answers_heading(text)", "test_eval.py -k own_block"),
    ("eval.py", "if len(words) == 1:", "if words:", "test_eval.py -k take_it_back"),
    ("eval.py", "({word}){marks}\"", "({word}).*\"", "test_eval.py -k take_it_back"),
    ("eval.py", 'if verdict["forced"] or verdict[task] is None or cuts[number]:', "if verdict[task] is None or cuts[number]:", "test_eval.py -k every_line"),
    ("eval.py", '"parsed": not forced and all(', '"parsed": all(', "test_eval.py -k missing_verdict"),
    ("eval.py", 'case["verdict"] = dict.fromkeys(VERDICTS)', "pass", "test_eval.py -k without_end"),
    ("eval.py", "results[numbers[number]] = verdict", "results[number] = verdict", "test_eval.py -k every_line"),
    ("model.py", "self.owned = {slot: [moved.get(page, page) for page in own]", "_ = {slot: [moved.get(page, page) for page in own]",
     "test_model.py -k compact"),
    ("model.py", "            v[new] = v[old]\n", "", "test_model.py -k compact"),
    # numbers that are none
    ("model.py", "self.broken |= ~logits.amax().isfinite()", "pass", "test_bad_input.py -k no_numbers"),
    ("model.py", "    if not total.isfinite().all():", "    if False:", "test_bad_input.py -k no_numbers"),
    ("model.py", "if not tensor.isfinite().all():", "if False:", "test_inputs.py -k refused"),
    # text dropped by the tokenizer, other ids, a user's text as a control token
    ("data.py", 'return rf"(?:{pattern})|(?:(?!{pattern})[\\s\\S])+"', "return pattern", "test_inputs.py -k tokenizers_package"),
    ("data.py", "keeps_matches and covers(pattern)", "keeps_matches", "test_inputs.py -k not_reproduced"),
    ("data.py", "        check_round_trip(tokenizer)\n", "", "test_inputs.py -k loses_text"),
    ("data.py", "yield from split_at(self.words.keys() & self.late, piece)", "yield piece", "test_inputs.py -k tokenizers_package"),
    ("data.py", "known = len(token) == 1 or last_merge(token, ranks) in listed", "known = True", "test_inputs.py -k odd_vocabulary"),
    ("data.py", "self.special[piece] = self.words.pop(piece)", "self.special[piece] = self.words[piece]", "test_inputs.py -k any_spelling"),
    ("data.py", "if id >= self.size:", "if id > self.size:", "test_inputs.py -k row_in_the_model"),
    ("data.py", "self.trim = trims_start", "self.trim = False", "test_inputs.py -k own_template"),
    ("data.py", "if isinstance(value, str) and REQUEST in value:", "if False:", "test_inputs.py -k said_in_one_line"),
    # other weights
    ("model.py", "if not torch.equal(found.setdefault(EMBEDDING, head), head):", "if not len(found.setdefault(EMBEDDING, head)):", "test_inputs.py -k refused"),
    ("model.py", "    if is_there(whole):\n", "    if not is_there(index):\n", "test_inputs.py -k shards_of_an_index"),
    # labels, and a record in another format
    ("data.py", "return value is None or value != value or", "return value is None or", "test_data.py -k column_counts"),
    ("data.py", "    between = text[exchange.end(1):exchange.start(2)]", "    between = ASSISTANT", "test_data.py -k markers_stay"),
    ("mine_hard.py", "if unlabelled == len(golds):", "if False:", "test_mine.py -k without_labels"),
    # resuming with other data; equal samples of one prompt; pairs that are equal as they are encoded; signals
    ("train_sft.py", "args.data_hash = fingerprint([*all_ids(examples), alphas])", "args.data_hash = 0", "test_train.py -k belong_to_a_run"),
    ("train_sft.py", "fingerprint([*all_ids(examples), alphas])", "fingerprint(all_ids(examples))", "test_dpo.py -k weights_belong"),
    ("train_sft.py", "args.schedule_hash = fingerprint([*schedule, rates])", "args.schedule_hash = 0", "test_train.py -k schedule_belongs"),
    ("model.py", "return hash32(seed, sample, *prompt)", "return hash32(seed, *prompt)", "test_mine.py -k drawn_apart"),
    ("train_dpo.py", "if chosen != rejected:", 'if record["chosen"] != record["rejected"]:', "test_dpo.py -k equal_answers"),
    ("train_sft.py", "if not self.after_step:", "if False:", "test_train.py -k signal"),
    # a remark among the verdicts, text that was not read, answers that are lost or of another config, what lies in --out
    ("data.py", "    if sys.stderr is not None:\n", "    if True:\n", "test_eval.py -k remarks"),
    ("data.py", 'if entry.get("special") or CONTROL.fullmatch(str(name)) or', 'if entry.get("special") or', "test_inputs.py -k looks_like_a_control"),
    ("data.py", "self.files = {name: read_bytes(folder / name)", "self.files = {name: b''", "test_inputs.py -k came_from_is_gone"),
    ("mine_hard.py", "lossy.append(tokenizer.lost > 0)", "lossy.append(False)", "test_eval.py -k cannot_spell"),
    ("mine_hard.py", "if not are_answers(lines, 0, count, k):", "if False:", "test_mine.py -k lost_some"),
    ("mine_hard.py", "    return len(lines) == count and all(is_answered(", "    return all(is_answered(", "test_mine.py -k lost_some"),
    ("eval.py", "is_made and (is_reasoned if args.fast else is_fast)", "is_made and is_reasoned and args.fast", "test_eval.py -k one_kind"),
    ("train_sft.py", 're.fullmatch(r"step-\\d+", p.name)]', 'p.suffix != ".tmp"]', "test_train.py -k unfinished_checkpoint"),
    ("mine_hard.py", ', "config_hash": config_hash(self.folder)}', "}", "test_mine.py -k other_weights"),
    ("train_sft.py", "        if left.is_file():\n", "        if True:\n", "test_train.py -k what_else_lies"),
    ("model.py", "if readings[0] != readings[-1]:", "if False:", "test_inputs.py -k must_agree"),
    ("model.py", "        if sample not in own:  ", "        if True:  ", "test_model.py -k yielded_once"),
    ("model.py", "tensor.to(device, dtype, copy=True)", "tensor.to(device, dtype)", "test_inputs.py -k does_not_change"),
    ("eval.py", '"p_harmful": {}, "reasoning": "", "cut": True,', "", "test_bad_input.py -k stream_goes_on"),
    ("data.py", "return exchange[:-len(frame[0])] + ", "return exchange or ", "test_data.py -k chat_template"),
    ("data.py", "if frame and not (has_marks or has_roles or re.search(MARK, frame[0])):", "if False:", "test_data.py -k looks_like_a_frame"),
    ("data.py", 'config["additional_special_tokens"] = others', "pass", "test_inputs.py -k another_file"),
    ("data.py", r'r"(?<!\r)\r?\n")', r'r"\n")', "test_data.py -k markers_with"),
    ("data.py", r'r"(?<!\r)\r?\n")', r'r"\r?\n")', "test_data.py -k markers_with"),
    ("data.py", "if not frame and has_marks:", "if False:", "test_data.py -k trimmed"),
    ("data.py", "if not frame and has_roles:", "if False:", "test_data.py -k trimmed"),
    ("data.py", "if id in tokenizer.encode(word):", "if False:", "test_inputs.py -k could_type"),
    ("mine_hard.py", "if world.rank == 0 and not answered:", "if False:", "test_mine.py -k longest_prompt"),
    ("mine_hard.py", "            check_room(guard, longest", "            (guard, longest", "test_mine.py -k longest_prompt"),
    ("mine_hard.py", 'line["samples"] = as_read_today(line["samples"])', "pass", "test_mine.py -k parser_of_today"),
    ("mine_hard.py", "    if world.rank == 0:\n        hold(out)\n", "", "test_mine.py -k two_miners"),
    ("eval.py", "            if name not in TIMES:", "            if True:", "test_eval.py -k neither_probabilities"),
    ("eval.py", "    elif resumed:\n        keep_", "    elif False:\n        keep_", "test_eval.py -k neither_probabilities"),
    ("eval.py", "islice(parse_records(path), limit)", "parse_records(path)", "test_eval.py -k predictions_are_limited"),
    ("model.py", "    return str(Path(text))", "    return text", "test_mine.py -k slash"),
    ("data.py", "(?:[^\\w\\n]|\\d{1,9}(?!\\w)|[a-z]\\))*", "[^\\w\\n]*", "test_data.py -k numbered"),
    ("data.py", "CONTROL.fullmatch(str(name)) or name in control", "CONTROL.fullmatch(str(name))", "test_inputs.py -k another_file"),
    ("data.py", "if isinstance(size, int) and len(tokens)", "if False and len(tokens)", "test_data.py -k metas"),
    ("data.py", "position = (torch.arange(T) - closed)", "position = torch.arange(T)", "test_data.py -k positions"),
    ("tools/real.py", "if code or told:", "if code:", "test_real.py -k all_the_same"),
    ("tools/real.py", "any(other != known for other in out.iterdir())", "True", "test_real.py -k whole_recipe"),
    ("tools/real.py", "    check_tests(args)\n    missing", "    missing", "test_real.py -k whole_recipe"),
    ("tools/real_table.py", "if read_object(folder / \"test.json\") != asked:", "if False:", "test_real.py -k whole_recipe"),
    ("train_dpo.py", "ids[start:])) < len(block)", "ids[start:])) <= len(block)", "test_dpo.py -k answers_block"),
    # a response that is empty, a template's own end mark, texts that were cut, answers that were moved away
    ("data.py", 'rf"(?:{newline}|\\Z)"', "newline", "test_data.py -k end_is_missing"),
    ("data.py", "                if evaluate(condition, names):", "                if all([evaluate(c, names) for c, _ in branches]):", "test_inputs.py -k jinja_is_read"),
    ("data.py", "end = self.closing_mark(template) or template", "end = template", "test_inputs.py -k answer_ends"),
    ("data.py", "others += [id for id in self.special.values() if id in told]", "pass", "test_inputs.py -k answer_ends"),
    ("eval.py", "verdict[task] is None or cuts[number]:", "verdict[task] is None:", "test_eval.py -k let_pass"),
    ("eval.py", "is_made = has_answers(answers) or is_there(predictions)", "is_made = has_answers(answers)", "test_eval.py -k one_kind"),
    ("mine_hard.py", "answered = has_answers(path) or is_there(result)", "answered = has_answers(path)", "test_mine.py -k moved_away"),
    ("mine_hard.py", "    if others:\n", "    if False:\n", "test_mine.py -k moved_away"),
    ("mine_hard.py", "    except InputError:                                      # absent", "    except ZeroDivisionError:                               # absent", "test_mine.py -k lost_some"),
    ("mine_hard.py", 'and sample["finish"] in ("stop", "length")', "", "test_mine.py -k lost_some"),
    ("model.py", "if raw.get(\"rope_theta\") not in (None, theta):", "if False:", "test_inputs.py -k cannot_be_meant"),
    ("model.py", "temperature < NEARLY_ZERO", "temperature == 0", "test_model.py -k near_zero"),
    ("model.py", 'bounds.append(int(Path("/sys/fs/cgroup/memory.max").read_text()) / ranks)', "pass", "test_train.py -k container"),
    ("train_sft.py", "left = old.rename(f\"{old}.tmp\")", "left = old", "test_kill.py -k newest"),
    ("train_sft.py", "first_line = file.readline().decode(\"utf-8-sig\")", "first_line = file.read().decode().splitlines()[0]", "test_train.py -k end_is_damaged"),
]


def caught(file, right, wrong, test):
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "out", "__pycache__"))
        text = (copy / file).read_text()
        assert text.count(right) == 1, f"{file}: {text.count(right)} places read {right!r}"
        (copy / file).write_text(text.replace(right, wrong))
        path, *select = test.split()
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", f"tests/{path}", *select], cwd=copy, capture_output=True, text=True)
        assert done.returncode in (0, 1), done.stdout[-2000:]                      # 5: the named test does not exist
        return done.returncode == 1


def main(chosen):
    survived = 0
    for number, mutant in enumerate(MUTANTS):
        if not chosen or number in chosen:
            ok = caught(*mutant)
            survived += not ok
            wrong = (mutant[2].strip() or "(nothing)").splitlines()[0][:70]
            print(f"{number:3} {'caught  ' if ok else 'SURVIVED'} {mutant[0]:13} {wrong}", flush=True)
    print(f"{len(chosen) or len(MUTANTS)} mistakes, {survived} survived")
    return survived > 0


if __name__ == "__main__":
    sys.exit(main([int(x) for x in sys.argv[1:]]))
