"""``loraplex router``: build a router for a base model, try and score one on prompts. Needs no server."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
from rich.console import Console
from rich.table import Table

from loraplex.commands.base_model import find_base_model
from loraplex.commands.examples import Example, read_examples
from loraplex.commands.progress import StageProgress
from loraplex.commands.settings import parse_positive
from loraplex.commands.tables import print_table
from loraplex.config import AdaptersConfig, ModelConfig, default_cache_dir
from loraplex.errors import InvalidRequest
from loraplex.text.tokenizer import Tokenizer, load_tokenizer, read_backend

if TYPE_CHECKING:  # these bring torch, which no other client command needs
    from loraplex.adapters.delta import AdapterDelta
    from loraplex.adapters.routing.chooser import Chooser
    from loraplex.adapters.routing.files import RouterFile
    from loraplex.adapters.routing.load import RoutedBase

_FEATURES: Final = ("centroid", "arrow")

Prompts = dict[str, list[tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class _Base:
    """The base model as a router is made for it. Its layers are not loaded."""

    path: Path
    tokenizer: Tokenizer
    routed: RoutedBase

    def encode(self, examples: Mapping[str, Sequence[Example]]) -> Prompts:
        """Token ids as a server makes them."""

        async def encode_all() -> Prompts:
            return {name: [await self._encode(each) for each in some] for name, some in examples.items()}

        return asyncio.run(encode_all())

    async def _encode(self, example: Example) -> tuple[int, ...]:
        if example.messages:
            return await self.tokenizer.encode_chat(example.messages)
        return await self.tokenizer.encode(example.text)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser("router", help="build, try and score routers, which choose an adapter by the prompt")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    build = actions.add_parser("build", help="make a router in the new directory OUT")
    build.add_argument("out", type=Path, metavar="OUT")
    _add_base(build)
    build.add_argument(
        "--adapter",
        action="append",
        default=[],
        type=_named_path,
        metavar="NAME=DIR",
        help="an adapter that it may choose, under the name that it will be loaded as; repeats. Needed by arrow",
    )
    build.add_argument(
        "--examples",
        action="append",
        default=[],
        type=_named_path,
        metavar="NAME=FILE",
        help="prompts that are for NAME: a line each, or .jsonl with an object each, which has text or messages; "
        "repeats. Needed by centroid; they also set the temperature",
    )
    build.add_argument("--chat", action="store_true", help="lines of text are users' messages of a chat")
    build.add_argument("--feature", choices=_FEATURES, help="default: centroid where there are examples, else arrow")
    build.add_argument(
        "--prototypes", type=parse_positive, default=1, metavar="K", help="vectors of each adapter; default %(default)s"
    )
    build.add_argument("--temperature", type=float, default=0.0, help="default: the one that fits the examples best")
    build.add_argument(
        "--threshold", type=float, default=0.0, help="use the base below this probability; default %(default)g"
    )
    build.add_argument("--default", default="", metavar="NAME", help="use this adapter in place of the base then")
    build.set_defaults(run=run_build)
    trial = actions.add_parser("try", help="what a router chooses for PROMPT")
    trial.add_argument("router", metavar="ROUTER", help="its directory")
    trial.add_argument("prompt", metavar="PROMPT", help="the text, or - to read standard input")
    trial.add_argument("--chat", action="store_true", help="PROMPT is a user's message of a chat")
    trial.set_defaults(run=run_try)
    score = actions.add_parser("score", help="how often a router is right on prompts whose adapter is known")
    score.add_argument("router", metavar="ROUTER", help="its directory")
    score.add_argument(
        "--examples", action="append", required=True, type=_named_path, metavar="NAME=FILE", help="as of build; repeats"
    )
    score.add_argument("--chat", action="store_true", help="lines of text are users' messages of a chat")
    score.set_defaults(run=run_score)
    for parser in (trial, score):
        _add_base(parser)
        parser.add_argument("--json", action="store_true", help="print an object")


def _add_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="demo|DIR|HUB_ID", help="the base model")
    parser.add_argument("--revision", default="", help="revision of a hub id")


def _named_path(text: str) -> tuple[str, str]:
    name, separator, path = text.partition("=")
    if not separator or not name or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, path


def run_build(args: argparse.Namespace) -> int:
    """Make a router, and say how it does on its own examples."""
    wrong = _contradiction(args)
    if wrong:
        print(f"loraplex router build: {wrong}", file=sys.stderr)
        return 2
    from loraplex.adapters.routing.files import check_names, write_router

    if args.default:
        check_names([args.default])
    check_names(dict.fromkeys(name for name, _ in (args.examples if _feature(args) == "centroid" else args.adapter)))
    examples = _examples(args)
    with StageProgress(Console(stderr=True)) as progress, _base(args, progress) as base:
        progress.update("prompts", 0, 1)
        prompts = base.encode(examples)
        adapters = _read_adapters(args.adapter, base, progress)
        file = _router(args, adapters, prompts, base, progress)
        progress.update("table", 0, 1)
        chooser = _chooser(file, base)
        write_router(args.out, file)
    info = file.info
    print(
        f"{args.out}: a router among {len(info.adapters)} adapters, {info.feature}, temperature {info.temperature:.2g}"
    )
    if prompts:
        _print_accuracy(chooser, prompts, "its own examples")
    return 0


def run_try(args: argparse.Namespace) -> int:
    """Print what a router makes of a prompt."""
    text = sys.stdin.read() if args.prompt == "-" else args.prompt
    chooser, prompts = _opened(args, {"": [Example.of(text, chat=args.chat)]})
    _print_choice(chooser, prompts[""][0], as_json=args.json)
    return 0


def run_score(args: argparse.Namespace) -> int:
    """Print how often a router is right."""
    chooser, prompts = _opened(args, _examples(args))
    for name in prompts:
        if name not in chooser.info.adapters:
            known = ", ".join(chooser.info.adapters)
            raise InvalidRequest(f"--examples are for {name!r}; the router chooses among {known}")
    _print_accuracy(chooser, prompts, "these prompts", as_json=args.json)
    return 0


def _opened(args: argparse.Namespace, examples: Mapping[str, Sequence[Example]]) -> tuple[Chooser, Prompts]:
    """The router as a server would load it, and the examples' token ids."""
    from loraplex.adapters.reading.source import any_directory
    from loraplex.adapters.routing.load import load_router

    with StageProgress(Console(stderr=True)) as progress, _base(args, progress) as base:
        progress.update("table", 0, 1)
        facts = load_router(any_directory(args.router), base.routed, max_bytes=AdaptersConfig().max_adapter_bytes)
        assert facts.chooser is not None
        return facts.chooser, base.encode(examples)


def _feature(args: argparse.Namespace) -> str:
    feature: str = args.feature or ("centroid" if args.examples else "arrow")
    return feature


def _contradiction(args: argparse.Namespace) -> str:
    """What the flags say that cannot be built; empty: nothing."""
    adapters, examples = [name for name, _ in args.adapter], {name for name, _ in args.examples}
    twice = next((name for index, name in enumerate(adapters) if name in adapters[:index]), None)
    if twice is not None:
        return f"--adapter {twice} is given twice"
    if _feature(args) == "arrow":
        if not adapters:
            return "feature arrow reads the adapters themselves: name them by --adapter NAME=DIR"
        strange = sorted(examples - set(adapters))
        return f"--examples are for {', '.join(strange)}, which no --adapter names" if strange else ""
    if not examples:
        return "feature centroid learns from prompts: name some by --examples NAME=FILE"
    silent = [name for name in adapters if name not in examples]
    return f"--adapter {silent[0]} has no --examples, from which feature centroid learns" if silent else ""


def _examples(args: argparse.Namespace) -> dict[str, list[Example]]:
    """By name; several files of one name are joined."""
    found: dict[str, list[Example]] = {}
    for name, path in args.examples:
        found.setdefault(name, []).extend(read_examples(Path(path), chat=args.chat))
    return found


@contextmanager
def _base(args: argparse.Namespace, progress: StageProgress) -> Iterator[_Base]:
    from loraplex.adapters.routing.load import RoutedBase
    from loraplex.adapters.routing.vocabulary import vocabulary_digest
    from loraplex.engine.proving import checkpoint_view
    from loraplex.models.loader import plan_model

    config = ModelConfig(model=args.model, revision=args.revision, device="cpu")
    found = find_base_model(config, Path(default_cache_dir()), progress.update)
    with checkpoint_view(plan_model(found.path, config)) as view:
        is_directory = found.path.is_dir()  # a GGUF file as it is has no tokenizer files
        backend = read_backend(found.path) if is_directory else None
        yield _Base(found.path, load_tokenizer(found.path), RoutedBase(view, lambda: vocabulary_digest(backend)))


def _read_adapters(named: Sequence[tuple[str, str]], base: _Base, progress: StageProgress) -> dict[str, AdapterDelta]:
    """Lowered, as a server would; one with text of its own is refused, as a router could not choose it."""
    from loraplex.adapters.kinds.registry import find_kinds
    from loraplex.adapters.load import load_adapter
    from loraplex.adapters.reading.source import any_directory
    from loraplex.adapters.text.base_text import BaseText
    from loraplex.adapters.text.own_text import OwnTexts
    from loraplex.models.generation_config import eos_token_ids

    if not named:
        return {}
    texts = OwnTexts(BaseText.read(base.path, eos_token_ids(base.path)), allow_templates=True)
    kinds, max_bytes, found = find_kinds(), AdaptersConfig().max_adapter_bytes, {}
    for done, (name, path) in enumerate(named):
        progress.update("adapters", done, len(named))
        delta = load_adapter(any_directory(path), base.routed.view, max_bytes=max_bytes, kinds=kinds, texts=texts)
        if delta.text is not None:
            raise InvalidRequest(
                f"adapter {name!r} ({path}) ships a tokenizer, chat template or generation settings of its own: a "
                "router cannot choose it, for it sees prompts as the base's tokens"
            )
        found[name] = delta
    return found


def _router(
    args: argparse.Namespace,
    adapters: Mapping[str, AdapterDelta],
    prompts: Prompts,
    base: _Base,
    progress: StageProgress,
) -> RouterFile:
    from loraplex.adapters.routing.build import Wanted, arrow_router, centroid_router

    wanted = Wanted(args.prototypes, args.temperature, args.threshold, args.default)
    if _feature(args) == "arrow":
        return arrow_router(adapters, prompts, wanted, base.routed, progress.update)
    return centroid_router(prompts, wanted, base.routed, progress.update)


def _chooser(file: RouterFile, base: _Base) -> Chooser:
    from loraplex.adapters.routing.load import chooser_of

    return chooser_of(file, base.routed, "the new router", max_bytes=AdaptersConfig().max_adapter_bytes)


def _print_choice(chooser: Chooser, token_ids: Sequence[int], *, as_json: bool) -> None:
    probabilities = dict(zip(chooser.info.adapters, chooser.probabilities(token_ids).tolist(), strict=True))
    chosen, _ = chooser.choose(token_ids)
    ranked = sorted(probabilities.items(), key=lambda item: -item[1])
    if as_json:
        print(msgspec.json.encode({"chosen": chosen or None, "probabilities": dict(ranked)}).decode())
        return
    table = Table("adapter", "probability")
    for name, probability in ranked:
        table.add_row(name, f"{probability:.4f}")
    print_table(table)
    print(f"chosen: {chosen or 'the base model'}")


def _print_accuracy(chooser: Chooser, prompts: Prompts, what: str, *, as_json: bool = False) -> None:
    """How often each adapter's prompts are given to it, and to which they are given else."""
    chosen = {name: [chooser.choose(ids)[0] for ids in some] for name, some in prompts.items()}
    right = {name: sum(each == name for each in some) for name, some in chosen.items()}
    total = sum(map(len, chosen.values()))
    if as_json:
        counts = {name: {c or "": some.count(c) for c in dict.fromkeys(some)} for name, some in chosen.items()}
        print(msgspec.json.encode({"right": sum(right.values()), "prompts": total, "chosen": counts}).decode())
        return
    table = Table("prompts for", "number", "right", "given to")
    for name, some in chosen.items():
        given = ", ".join(f"{each or 'base'} {some.count(each)}" for each in sorted(set(some)))
        table.add_row(name, str(len(some)), f"{right[name] / len(some):.0%}", given)
    print_table(table)
    print(f"right on {sum(right.values())} of {what}' {total}: {sum(right.values()) / total:.0%}")
