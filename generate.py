"""Stage 1 of 4: a teacher model drafts an answer to every prompt, criticises it, revises it.

    python generate.py --task sycophancy                               # embedded 135M model, no GPU
    python generate.py --task safety --model Qwen/Qwen2.5-7B-Instruct   # a hub id or a local folder
    python generate.py --task safety --model NAME --api-base http://localhost:8000/v1    # a server

prompts/TASK.toml (all prompt text) and prompts/TASK.jsonl (instructions) -> runs/TASK/pairs.jsonl:
`rejected` is the draft, `chosen` the revision. The names imply no judgement; score.py judges.

The method is that of rDPO (arXiv 2402.08005) and of distilled self-critique (arXiv 2312.01957). One
departure: besides the papers' single conversation, a task has a second form, `fresh`, whose reviser
does not see the draft, because a small model copies a draft that it sees. In three of the four tasks
this form has no critique either. That is context distillation (arXiv 2112.00861).
"""

import re

from tqdm import tqdm

from prompts import CALLS, FOLDER, FORMS, fill, load_task, read_prompts
from prompts.chat import open_chat
from prompts.rows import BadInput, Rows, digest_of, make_parser, number, run
from prompts.tokens import was_cut_off


# ---- the method: draft, criticise, revise --------------------------------------------------------
def refine(rows, form, ask, seed_by="id"):
    """Preference pairs made from instructions, by the calls of the form; `error` where one failed.

    rows: instructions, as read_prompts gives them.
    form: {"draft": messages, "critique": messages, "revision": messages}, from the task file;
        some forms have no critique.
    ask: (conversations, keys) -> list of Reply. A key is what a conversation's random numbers depend
        on.
    seed_by: the field whose rows share random numbers, see load_task.
    """
    pairs = []
    for row in rows:
        facts = {"finish": {}, "prompt_tokens": {}, "completion_tokens": {}}  # of each call
        pairs.append({**row, "teacher": facts})
    texts = [{} for _ in rows]  # draft, critique and revision of each pair, as far as they are made

    for call in [call for call in CALLS if call in form]:
        pending = [i for i, pair in enumerate(pairs) if "error" not in pair]
        conversations = [fill(form[call], pairs[i], **texts[i]) for i in pending]
        keys = [(pairs[i][seed_by], call) for i in pending]
        for i, reply in zip(pending, ask(conversations, keys), strict=True):
            texts[i][call] = reply.text
            facts = pairs[i]["teacher"]
            facts["finish"][call] = reply.finish
            facts["prompt_tokens"][call] = reply.prompt_tokens
            facts["completion_tokens"][call] = reply.completion_tokens
            empty = not reply.text and call != "critique"  # a revision can do without a critique
            if empty or reply.finish not in ("stop", "length"):
                pairs[i]["error"] = f"{call}: no answer ({reply.finish})"

    for pair, text in zip(pairs, texts, strict=True):
        if "error" not in pair:
            pair["rejected"] = [{"role": "assistant", "content": text["draft"]}]
            if "critique" in text:
                pair["critique"] = text["critique"]
            pair["chosen"] = [{"role": "assistant", "content": text["revision"]}]
    return pairs


# ---- command line --------------------------------------------------------------------------------
def parse_args():
    parser = make_parser(__doc__)
    parser.set_defaults(task="sentiment")
    add = parser.add_argument
    # fmt: off
    add("--model", default="smollm2", help="teacher: 'smollm2' (the embedded model), a local folder, a hub id, or with --api-base the server's name of the model (default: %(default)s)")
    add("--prompts", metavar="FILE", help="instructions to use in place of prompts/TASK.jsonl: JSON lines with a prompt (text or messages) and perhaps a group, whose rows all go to training or all to the test (default group: the prompt)")
    add("--out", metavar="FILE", help="pairs to write (default: runs/TASK/pairs.jsonl)")
    add("--form", choices=FORMS, help="what the teacher sees when it criticises and revises: one growing conversation, as in the paper, or the texts of [fresh] in the task file (default: fresh for smollm2, else conversation)")
    add("--max-tokens", type=number(), default=200, help="maximum length of an answer, in tokens; a longer draft or revision is cut off, and its pair left out of training (default: %(default)s)")
    add("--temperature", type=number(0, kind=float), default=0.7, help="sampling temperature, 0 = greedy (default: %(default)s)")
    add("--top-p", type=number(1e-6, 1, float), default=0.95, help="sample from the likeliest tokens of this total probability; a model on this machine samples from its 256 likeliest at most (default: %(default)s)")
    add("--batch-size", type=number(), default=64, help="rows that are sampled and written together, without --api-base (default: %(default)s)")
    add("--dry-run", action="store_true", help="show the first call and an estimate of the tokens, without calling the model")
    # fmt: on
    return parser.parse_args()


def show_plan(rows, form, max_tokens):
    """--dry-run: prints the first call, and the tokens of all calls with the longest answers."""
    longest = 4 * max_tokens * "?"  # a token has about 4 characters
    calls = [
        fill(form[call], row, draft=longest, critique=longest)
        for row in rows
        for call in CALLS
        if call in form
    ]
    for message in calls[0]:
        print(f"[{message['role']}] {message['content']}")
    characters = sum(len(message["content"]) for call in calls for message in call)
    most = len(calls) * max_tokens
    prompts = characters // 4
    print(f"{len(calls):,} calls, about {prompts:,} prompt and {most:,} completion tokens at most")


def show_pair(rows):
    """Prints the first whole pair, to be read before the next stage."""
    made = [row for row in rows if not row.get("error")]
    for row in made[:1]:
        draft, revision = row["rejected"][0]["content"], row["chosen"][0]["content"]
        texts = {"draft": draft, "critique": row.get("critique"), "revision": revision}
        for message in row["prompt"]:
            print(f"[{message['role']}] {message['content']}")
        for name, text in texts.items():
            if text is not None:
                print(f"[{name}] {text}")


def summary(rows, max_tokens):
    """The last line: pairs made, failed and cut off, and the error that occurs most often."""
    cut, errors = 0, {}  # errors that differ in numbers alone are one kind: {kind: errors}
    for row in rows:
        if row.get("error"):
            kind = re.sub(r"\w*\d\w*", "#", row["error"])
            errors.setdefault(kind, []).append(row["error"])
        else:
            cut += was_cut_off(row)

    failed = sum(map(len, errors.values()))
    made = len(rows) - failed
    text = f"{made} pairs, {made - cut} of them complete, {failed} failed"
    if failed:
        most = max(errors.values(), key=len)
        text += f"; {len(most)} of them: {most[0]}"
    if cut:
        text += f"; {cut} were cut off at {max_tokens} tokens and are left out of training: "
        text += "raise --max-tokens"
    return text


def main():
    args = parse_args()
    task = load_task(args.task)
    path = args.prompts or FOLDER / f"{args.task}.jsonl"
    source = read_prompts(path, args.task, *task["columns"])
    rows = source[: args.limit]
    form_name = args.form or ("fresh" if args.model == "smollm2" else "conversation")
    if form_name not in task:
        where = f"prompts/{args.task}.toml: no [{form_name}]"
        raise BadInput(f"{where}; write it, or pass another --form")
    form = task[form_name]
    if args.dry_run:
        return show_plan(rows, form, args.max_tokens)

    out = args.out or f"runs/{args.task}/pairs.jsonl"
    sampling = {"max_tokens": args.max_tokens, "temperature": args.temperature, "top_p": args.top_p}
    teacher = open_chat(args.model, args, f"{out}.calls", **sampling)
    prompt_text = digest_of([form, task["seed_by"]])
    settings = {**teacher.settings, "form": form_name, "prompt_text": prompt_text}
    output = Rows(out, args.overwrite)
    output.resume("teacher", settings, source)
    who = f"task {args.task}, {args.model} ({form_name})"
    kept = len(teacher.call_log.rows)
    print(f"{who}: {len(rows)} instructions, {len(output.done)} done ({kept} calls kept) -> {out}")

    batches = output.batches(rows, None if args.api_base else args.batch_size)
    for batch in tqdm(batches, unit="batch", disable=not batches):
        pairs = refine(batch, form, teacher.ask, task["seed_by"])
        for pair in pairs:
            pair["teacher"] |= settings
        output.add(*pairs)

    rows = output.finish(source)
    show_pair(rows)
    print(f"{out}: {summary(rows, args.max_tokens)}")
    raise SystemExit(1 if any(row.get("error") for row in rows) else 0)


if __name__ == "__main__":
    run(main)
