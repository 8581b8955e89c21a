"""``loraplex lint``: would these adapters load on that base, and what would they do? Needs no server."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from rich.console import Console
from rich.table import Table

from loraplex.commands.base_model import find_base_model
from loraplex.commands.progress import StageProgress
from loraplex.commands.settings import QUANTIZATIONS, parse_positive
from loraplex.commands.tables import mebibytes, print_table
from loraplex.config import AdaptersConfig, ModelConfig, default_cache_dir

if TYPE_CHECKING:  # these bring torch, which no other client command needs
    from loraplex.adapters.base_view import BaseView
    from loraplex.adapters.delta import AdapterDelta
    from loraplex.adapters.facts import AdapterFacts
    from loraplex.adapters.lint import LintReport
    from loraplex.adapters.reading.source import AdapterDir
    from loraplex.types import Probe


@dataclass(frozen=True, slots=True)
class _Base:
    """The base model as adapters are held against it; ``prove`` tries one out, where that is asked for."""

    model_id: str
    path: Path
    view: BaseView
    prove: Callable[[AdapterDelta], AdapterFacts]
    ranks: int = 1

    def checks(self, *, allow_templates: bool) -> Callable[[AdapterDir], AdapterFacts]:
        """All that a server does with an adapter before it is served."""
        from loraplex.adapters.cut import largest_part
        from loraplex.adapters.kinds.registry import find_kinds
        from loraplex.adapters.load import load_adapter
        from loraplex.adapters.text.base_text import BaseText
        from loraplex.adapters.text.own_text import OwnTexts
        from loraplex.models.generation_config import eos_token_ids

        kinds, max_bytes = find_kinds(), AdaptersConfig().max_adapter_bytes
        texts = OwnTexts(BaseText.read(self.path, eos_token_ids(self.path)), allow_templates=allow_templates)

        def check(directory: AdapterDir) -> AdapterFacts:
            found = load_adapter(directory, self.view, max_bytes=max_bytes, kinds=kinds, texts=texts)
            facts = self.prove(found)
            if self.ranks > 1:
                return replace(facts, nbytes=largest_part(found.sites, self.view.by_name(), self.ranks))
            return facts

        return check


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser("lint", help="check adapters against a base model, without a server")
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="an adapter's directory, or one that holds many")
    parser.add_argument("--model", required=True, metavar="demo|DIR|HUB_ID", help="the base model")
    parser.add_argument("--revision", default="", help="revision of a hub id")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="as served; auto is the checkpoint's",
    )
    parser.add_argument(
        "--load-format",
        default="auto",
        choices=("auto", "safetensors", "gguf", "dummy"),
        help="as served: weight files",
    )
    parser.add_argument(
        "--quantization", default="", choices=QUANTIZATIONS, help="as served: what the base is quantized to at load"
    )
    parser.add_argument(
        "--no-probe",
        action="store_true",
        help="do not run the base model: it is not loaded, only what is compared is; MiB are then those of "
        "tensors, not of their layout",
    )
    parser.add_argument(
        "--allow-adapter-templates", action="store_true", help="as the server's flag: chat templates of adapters count"
    )
    parser.add_argument(
        "--tensor-parallel-size",
        type=parse_positive,
        default=1,
        metavar="N",
        help="as served: would N ranks do, and how much of the adapter is on each (the sizes shown are then a rank's)",
    )
    parser.add_argument("--json", action="store_true", help="print a list of objects, one for each adapter")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what the adapters would do and why some are refused; 1 when any is."""
    from loraplex.adapters.lint import find_adapters, lint

    sources = [found for source in args.sources for found in find_adapters(source)]
    ranks = args.tensor_parallel_size
    config = ModelConfig(
        model=args.model,
        revision=args.revision,
        dtype=args.dtype,
        load_format=args.load_format,
        quantization=args.quantization,
        device="cpu",
        tensor_parallel_size=ranks,
    )
    with StageProgress(Console(stderr=True)) as progress, _base(config, progress, probe=not args.no_probe) as base:
        check = base.checks(allow_templates=args.allow_adapter_templates)
        reports: list[LintReport] = []
        for source in sources:
            progress.update("adapters", len(reports), len(sources))
            reports.append(lint(source, check))
    if args.json:
        print(msgspec.json.format(msgspec.json.encode([_object(report) for report in reports])).decode())
    elif len(reports) == 1 and reports[0].facts is not None:
        _print_one(base.model_id, reports[0].source, reports[0].facts)
    else:
        _print_all(base.model_id, reports)
    return 0 if all(report.ok for report in reports) else 1


@contextmanager
def _base(config: ModelConfig, progress: StageProgress, *, probe: bool) -> Iterator[_Base]:
    from loraplex.models.loader import plan_model

    found = find_base_model(config, Path(default_cache_dir()), progress.update)
    plan, ranks = plan_model(found.path, config), config.tensor_parallel_size
    plan.check_ranks(ranks)
    if not probe:
        from loraplex.adapters.packed import facts_of
        from loraplex.engine.proving import checkpoint_view

        with checkpoint_view(plan) as view:
            yield _Base(found.model_id, found.path, view, facts_of, ranks)
        return
    from loraplex.engine.proving import ProvingGround

    ground = ProvingGround(plan, lambda done, total: progress.update("weights", done, total))
    yield _Base(found.model_id, found.path, ground.base, ground.prove, ranks)


def _object(report: LintReport) -> dict[str, object]:
    """One adapter for ``--json``."""
    said: dict[str, object] = {"source": report.source, "ok": report.ok}
    if report.refusal is not None:
        refusal = report.refusal
        said["error"] = {"class": type(refusal).__name__, "message": str(refusal), "field": refusal.field}
    if report.facts is not None:
        facts = report.facts
        modules = {
            module: {"sites": count, "rank": facts.coverage.ranks[module], "changes": facts.coverage.changes[module]}
            for module, count in facts.coverage.sites.items()
        }
        said |= {
            "uid": facts.uid,
            "kind": facts.kind,
            "max_rank": facts.max_rank,
            "num_parameters": facts.num_parameters,
            "bytes": facts.nbytes,
            "modules": modules,
            "vocab_size": facts.vocab_size or None,
            "invocation_tokens": facts.invocation_tokens,
            "invocation_text": facts.invocation_text,
            "probe": facts.probe,
            "text": facts.text,
            "template_unused": facts.template_unused,
        }
    return said


def _print_one(model_id: str, source: str, facts: AdapterFacts) -> None:
    table = Table("module", "sites", "rank", "changes")
    for module, count in facts.coverage.sites.items():
        rank = facts.coverage.ranks[module]
        table.add_row(module, str(count), str(rank or ""), facts.coverage.changes[module])
    print_table(table)
    print(f"{source} loads on {model_id}: {facts.kind}, {facts.num_parameters:,} parameters, ", end="")
    print(f"{mebibytes(facts.nbytes)} MiB")
    print(f"uid: {facts.uid}")
    own = _own_text(facts)
    if own:
        print(f"text: its own {', '.join(own)}")
    if facts.template_unused:
        print("text: its chat template is not used; that is what --allow-adapter-templates is for")
    if facts.vocab_size:
        print(f"vocabulary: {facts.vocab_size:,} tokens, its own")
    if facts.invocation_tokens:
        tokens = " ".join(map(str, facts.invocation_tokens))
        text = f" ({facts.invocation_text!r})" if facts.invocation_text else ""
        print(f"invoked by: tokens {tokens}{text} in the prompt; the base answers up to there")
    if facts.probe is not None:
        print(f"probe: {_probe(facts.probe)}")


def _own_text(facts: AdapterFacts) -> list[str]:
    """What it ships of text, and a server would use."""
    text = facts.text
    if text is None:
        return []
    parts = {
        "tokenizer": text.tokenizer,
        "chat template": text.chat_template,
        "end tokens": text.eos_token_ids is not None,
        "sampling": text.sampling is not None,
    }
    return [name for name, there in parts.items() if there]


def _print_all(model_id: str, reports: Sequence[LintReport]) -> None:
    table = Table()
    table.add_column("adapter", overflow="fold")
    table.add_column("kind", no_wrap=True)
    for label in ("rank", "MiB"):
        table.add_column(label, no_wrap=True, justify="right")
    table.add_column("modules", overflow="fold")
    tried = any(report.facts is not None and report.facts.probe is not None for report in reports)
    for label in ("logits", "top-1") if tried else ():
        table.add_column(label, no_wrap=True, justify="right")
    names = _short_names([report.source for report in reports])
    for report, name in zip(reports, names, strict=True):
        if report.facts is not None:
            facts = report.facts
            modules = " ".join(module.removesuffix("_proj") for module in facts.coverage.sites)
            numbers = (str(facts.max_rank or ""), mebibytes(facts.nbytes))
            moves = () if facts.probe is None else (_by(facts.probe), f"{facts.probe.top_changed:.0%}")
            table.add_row(name, facts.kind, *numbers, modules, *moves)
    if table.rows:
        print_table(table)
    refused = [report for report in reports if not report.ok]
    for report in refused:
        print(f"refused {report.source}\n  {type(report.refusal).__name__}: {report.refusal}", file=sys.stderr)
    if tried:
        print("logits: how far one moves at most; top-1: positions of the probe with another best next token")
    print(f"{len(reports) - len(refused)} of {len(reports)} load on {model_id}")


def _short_names(sources: Sequence[str]) -> list[str]:
    """What tells the sources apart: their paths below the directory that they share."""
    if len(sources) < 2:
        return [Path(source).name for source in sources]
    shared = os.path.commonpath([str(Path(source).parent) for source in sources])
    return [os.path.relpath(source, shared) for source in sources]


def _by(probe: Probe) -> str:
    return f"{probe.max_change:.3g}"


def _probe(probe: Probe) -> str:
    share = f"{probe.top_changed:.0%} of {probe.num_tokens} positions"
    return f"logits move by {_by(probe)} at most; the best next token is another one at {share}"
