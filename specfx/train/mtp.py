"""`specfx train mtp`: a next-n (MTP) head for a frozen target, on a CPU in minutes or on a GPU with many more tokens.

The recipe is FastMTP's (2025: self-distillation of one layer that is used recursively), from scratch and small:

1. **Answers.** The target answers prompts greedily (`specfx.train.data`): what it writes is what the head will have to draft.
2. **Look-up.** One forward of the target over each text keeps its hidden states and most probable tokens (`specfx.train.lookup`).
3. **Start.** The head's layer is a copy of the target's last; least squares set `eh_proj` so that it gets nearly the input it knows.
   Or it is a trained head, which more or other data are to make better (`--start`).
4. **Training.** K tokens are drafted from every position, each step fed with the one before (`specfx.train.loss`, `.loop`).
5. **Evaluation.** Acceptance by depth on texts from prompts that were left out (`specfx.train.evaluate`).

The folder `--out` then holds the head (`model.safetensors`, for ``specfx.speculate(model, "mtp", head=OUT)``), the draft vocabulary, and
`training.json` and `training.png` with recipe, curves and evaluation; meanwhile, a checkpoint for `--resume`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specfx.errors import HeadError, OptionError
from specfx.train import plot

if TYPE_CHECKING:
    from specfx.drafters.mtp_head import MtpHead
    from specfx.train.data import Text
    from specfx.train.loop import Recipe

CHECKPOINT_SECONDS = 300.0
RECORD = "training.json"
_HEAD = "model.safetensors"
_CURVE_POINTS = 400
_GPU_BATCH_TOKENS = 16384


def run(
    *,
    model: str,
    data: str,
    prompts: str | None,
    exclude: str | None,
    out: str,
    steps: int,
    epochs: float | None,
    minutes: float | None,
    lr: float,
    batch_tokens: int | None,
    seed: int,
    device: str | None,
    dtype: str,
    threads: int | None,
    draft_vocab: int,
    max_new_tokens: int,
    max_prompt_tokens: int,
    resume: bool,
    start: str | None = None,
) -> int:
    """The command. Whatever is wrong with its arguments is an `OptionError`, `HeadError` or `ModelFileError` before any work."""
    import torch

    from specfx import models
    from specfx.bench.prompts import read_prompts
    from specfx.bench.report import set_threads
    from specfx.train.data import read_texts, runs_of, shares_a_run, split, usable, write_answers
    from specfx.train.loop import Recipe

    folder = _prepare(Path(out), resume)
    runs = runs_of(exclude) if exclude is not None else frozenset[str]()
    if prompts is None:
        read_texts(data)  # a broken file is told of before the model is loaded
    place = _device(device)
    on_gpu = place.type != "cpu"
    recipe = Recipe(steps=steps, minutes=minutes, lr=lr, seed=seed)
    recipe = replace(recipe, epochs=recipe.epochs if epochs is None else epochs, negatives=None if on_gpu else recipe.negatives)
    recipe = replace(recipe, batch_tokens=batch_tokens or (_GPU_BATCH_TOKENS if on_gpu else recipe.batch_tokens))
    if not plot.available():
        print("no plot will be made: matplotlib is not installed (pip install 'specfx[train]')", file=sys.stderr, flush=True)
    set_threads(threads)
    tokenizer: Any = models.load_tokenizer(model) if prompts is not None or runs else None
    questions = read_prompts(prompts, tokenizer, max_prompt_tokens=max_prompt_tokens) if prompts is not None else []
    questions = [q for q in questions if not runs or not shares_a_run(tokenizer.decode(q.tokens), runs)]
    target = models.load(model, getattr(torch, dtype))[0].to(place).requires_grad_(False)
    head = new_head(target) if start is None else trained_head(target, start)
    if questions:
        written = write_answers(target, questions, data, max_new_tokens)
        print(f"{written} new answer tokens in {data}", flush=True)
    longest = min(recipe.batch_tokens, getattr(target.config, "max_position_embeddings", None) or recipe.batch_tokens)
    all_texts = read_texts(data)
    kept = [text for text in all_texts if not runs or not shares_a_run(tokenizer.decode(text.prompt), runs)]
    if runs:
        print(f"{len(all_texts) - len(kept)} of {len(all_texts)} texts answer prompts of {exclude} and are left out", flush=True)
    texts, held_out = split(usable(kept, longest, target.get_input_embeddings().num_embeddings))
    for name, side in (("to train on", texts), ("to hold out", held_out)):
        if not side:
            raise OptionError(f"data={data!r}: of its texts none is left {name}; give some 100 prompts or more")
    train_head(Job(model, target, head, folder, recipe, tuple(texts), tuple(held_out), draft_vocab, resume, start))
    return 0


@dataclass(frozen=True)
class Job:
    """All that a training run needs. name: what the target is called in the records; head: on the target's device, fresh or, if `start`
    says what it is called, trained."""

    name: str
    target: Any
    head: MtpHead
    folder: Path
    recipe: Recipe
    texts: Sequence[Text]
    held_out: Sequence[Text]
    draft_vocab: int
    resume: bool = False
    start: str | None = None


def train_head(job: Job) -> dict[str, Any]:
    """Train, evaluate and write all files; returns what `training.json` holds."""
    from specfx.train.lookup import Lookup, Projection
    from specfx.train.loop import Trainer, read_checkpoint, train

    target, recipe, folder = job.target, job.recipe, job.folder
    about = {"model": job.name, "dtype": str(target.dtype).removeprefix("torch."), "texts": len(job.texts), "data": _digest(job.texts)}
    about |= {} if job.start is None else {"start": job.start}
    checkpoint = read_checkpoint(folder, recipe, about) if job.resume else None
    lookups: list[Lookup] = []
    try:
        for name, texts in (("train", job.texts), ("held out", job.held_out)):
            where = folder if name == "train" else None
            lookups.append(Lookup(texts, job.head.hidden_size, target.dtype, where))
            projection = Projection(job.head, target.get_input_embeddings()) if name == "train" and job.start is None else None
            _fill(lookups[-1], target, recipe.batch_tokens, projection, name)
            if projection is not None:
                projection.fit()
        lookup, held_out = lookups
        print(f"{len(lookup.texts)} texts with {lookup.output_tokens} answer tokens; held out: {len(held_out.texts)}", flush=True)
        before = _evaluated("before training", job, held_out)
        trainer = Trainer(job.head, target, lookup, recipe)
        if checkpoint is not None:
            trainer.load(checkpoint)
            print(f"resumed at step {trainer.step}, after {trainer.seconds:.0f} s", flush=True)
        train(trainer, folder, about, CHECKPOINT_SECONDS)
        head = trainer.finish()
        after = _evaluated("after training", job, held_out)
        tokens = sum(entry["tokens"] for entry in trainer.curves)
        results = {
            "target": about,
            "recipe": asdict(recipe),
            "data": {"texts": len(lookup.texts), "output_tokens": lookup.output_tokens, "held_out_texts": len(held_out.texts)},
            "training": {"steps": trainer.step, "seconds": trainer.seconds, "tokens_per_second": tokens / max(trainer.seconds, 1e-9)},
            "evaluation": {"before": before, "after": after},
            **_write_vocabulary(job, head, held_out),
            "curves": thinned(trainer.curves, _CURVE_POINTS),
        }
        _write(job, head, results, trainer.curves)
        return results
    finally:
        for opened in lookups:
            opened.close()


def new_head(target: Any) -> MtpHead:
    """A fresh head for `target`, tried out once. Raises `HeadError`."""
    from specfx.drafters.mtp_head import MtpHead

    head = MtpHead.from_target(target)
    head.try_out(target)
    return head


def trained_head(target: Any, start: str) -> MtpHead:
    """The head `start` of `target`, to be trained further. Raises `HeadError`, also for heads of several layers or of another family than
    what this command makes."""
    from specfx.drafters.mtp_families import PLAIN, find_head
    from specfx.drafters.mtp_head import load_head

    found = find_head(target, start)
    if found.family is not PLAIN:
        raise HeadError(f"start={start!r}: a head of the family {found.family.name}; only heads of `specfx train mtp` are trained further")
    head = load_head(start, target)
    if len(head.chain) > 1:
        raise HeadError(f"start={start!r}: a head of {len(head.chain)} layers; only one layer is trained")
    head.try_out(target)
    return head


def thinned(curves: list[dict[str, Any]], points: int) -> list[dict[str, Any]]:
    """Means over runs of neighbouring steps, at most `points` of them; step, seconds and lr are the last ones' of each run."""
    if not curves:
        return []
    size = -(-len(curves) // points)
    result = []
    for start in range(0, len(curves), size):
        part = curves[start : start + size]
        means = {key: [sum(c) / len(c) for c in zip(*(entry[key] for entry in part), strict=False)] for key in ("loss", "accepted")}
        rounded = {key: [round(value, 4) for value in values] for key, values in means.items()}
        result.append({**{key: part[-1][key] for key in ("step", "seconds", "lr")}, **rounded})
    return result


def _evaluated(title: str, job: Job, held_out: Any, vocabulary: Any = None) -> dict[str, Any]:
    """Print the acceptance on held-out texts, and return it as plain values."""
    from specfx.train.evaluate import as_table, evaluate

    results = evaluate(job.head, job.target, held_out, job.recipe.steps, job.recipe.batch_tokens, vocabulary)
    print(f"\n{title}\n{as_table(results)}\n", flush=True)
    return {name: acceptance.record() for name, acceptance in results.items()}


def _write_vocabulary(job: Job, head: MtpHead, held_out: Any) -> dict[str, Any]:
    """Choose the draft vocabulary, write it, and tell how much of held-out text it holds and what it costs in acceptance."""
    from specfx.drafters.mtp_files import save_draft_vocab
    from specfx.train import vocabulary
    from specfx.train.data import end_tokens

    if not job.draft_vocab:
        return {}
    chosen = vocabulary.select(job.texts, job.draft_vocab, end_tokens(job.target))
    save_draft_vocab(chosen, job.folder)
    covered = vocabulary.coverage(chosen, job.held_out)
    print(f"draft vocabulary: {len(chosen)} tokens, which are {100 * covered:.2f} % of the held-out ones", flush=True)
    after = _evaluated("with the draft vocabulary alone", job, held_out, chosen)
    return {"draft_vocab": {"tokens": len(chosen), "coverage": covered, "evaluation": after}}


def _write(job: Job, head: MtpHead, results: dict[str, Any], curves: list[dict[str, Any]]) -> None:
    """The head, the record and the plot; the checkpoint goes last."""
    from specfx.bench.report import write_json
    from specfx.drafters.mtp_head import save_head
    from specfx.train.evaluate import ALL

    before, after = (results["evaluation"][when][ALL] for when in ("before", "after"))
    metadata = {key: json.dumps(results[key]) for key in ("target", "recipe", "data")}
    save_head(head, job.folder, {**metadata, "held_out": json.dumps(after), "trained_by": "specfx train mtp"})
    write_json(job.folder / RECORD, results)
    if plot.available():
        plot.write_plot(job.folder, curves, before["by_depth"], after["by_depth"])
    (job.folder / "checkpoint.pt").unlink(missing_ok=True)
    print(f"wrote {', '.join(sorted(file.name for file in job.folder.iterdir()))} in {job.folder}", flush=True)


def _fill(lookup: Any, target: Any, batch_tokens: int, projection: Any, name: str) -> None:
    from tqdm import tqdm

    with tqdm(total=lookup.starts[-1], desc=f"look-up, {name}", unit="token", unit_scale=True, mininterval=2.0) as bar:
        lookup.fill(target, batch_tokens, projection, bar.update)


def _prepare(folder: Path, resume: bool) -> Path:
    """The out folder, made and proven writable. Raises `OptionError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as e:
        raise OptionError(f"out={str(folder)!r}: can't be written ({e.strerror or e}); give a folder of yours") from e
    if (folder / _HEAD).exists():
        raise OptionError(f"out={str(folder)!r}: holds a finished head already; give another folder, or delete that one")
    if (folder / "checkpoint.pt").exists() and not resume:
        raise OptionError(f"out={str(folder)!r}: holds the checkpoint of a run that did not end; give --resume, or another folder")
    return folder


def _device(name: str | None) -> Any:
    """The device to train on: a GPU if there is one. Raises `OptionError`."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with suppress(RuntimeError):
        device = torch.device(name)
        torch.zeros(1, device=device)
        return device
    raise OptionError(f"device={name!r}: torch can't use it here; give cpu, or cuda where there is one")


def _digest(texts: Sequence[Text]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for text in texts:
        digest.update(json.dumps([text.prompt, text.output]).encode())
    return digest.hexdigest()
