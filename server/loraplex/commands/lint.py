"""``loraplex lint``: would these adapters load on that base, and what would they do? Needs no server."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from rich.console import Console
from rich.table import Table

from loraplex.commands.base_model import find_base_model
from loraplex.commands.progress import StageProgress
from loraplex.config import AdaptersConfig, ModelConfig, default_cache_dir

if TYPE_CHECKING:  # these bring torch, which no other client command needs
    import torch

    from loraplex.adapters.base_view import BaseView
    from loraplex.adapters.delta import AdapterDelta
    from loraplex.adapters.facts import AdapterFacts
    from loraplex.adapters.lint import LintReport
    from loraplex.adapters.source import AdapterDir
    from loraplex.models.spec import DecoderSpec
    from loraplex.quant.base import WeightReader


@dataclass(frozen=True, slots=True)
class _Base:
    """The base model as adapters are held against it; ``prove`` tries one out, where that is asked for."""

    model_id: str
    path: Path
    view: BaseView
    prove: Callable[[AdapterDelta], AdapterFacts]

    def checks(self, *, allow_templates: bool) -> Callable[[AdapterDir], AdapterFacts]:
        """All that a server does with an adapter before it is served."""
        from loraplex.adapters.base_text import BaseText
        from loraplex.adapters.kinds.registry import find_kinds
        from loraplex.adapters.load import load_adapter
        from loraplex.adapters.own_text import OwnTexts
        from loraplex.models.generation_config import eos_token_ids

        kinds, max_bytes = find_kinds(), AdaptersConfig().max_adapter_bytes
        texts = OwnTexts(BaseText.read(self.path, eos_token_ids(self.path)), allow_templates=allow_templates)

        def check(directory: AdapterDir) -> AdapterFacts:
            return self.prove(load_adapter(directory, self.view, max_bytes=max_bytes, kinds=kinds, texts=texts))

        return check


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser("lint", help="check adapters against a base model, without a server")
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="an adapter's directory, or one that holds many")
    parser.add_argument("--model", required=True, metavar="demo|DIR|HUB_ID", help="the base model")
    parser.add_argument("--revision", default="", help="revision of a hub id")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument(
        "--no-probe", action="store_true", help="do not run the base model: it is not loaded, only what is compared is"
    )
    parser.add_argument(
        "--allow-adapter-templates", action="store_true", help="as the server's flag: chat templates of adapters count"
    )
    parser.add_argument("--json", action="store_true", help="print a list of objects, one for each adapter")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what the adapters would do and why some are refused; 1 when any is."""
    from loraplex.adapters.lint import find_adapters, lint

    sources = [found for source in args.sources for found in find_adapters(source)]
    config = ModelConfig(model=args.model, revision=args.revision, dtype=args.dtype, device="cpu")
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
    plan = plan_model(found.path, config)
    if not probe:
        from loraplex.adapters.packed import facts_of

        with plan.source.open(plan.path, plan.spec, plan.placement) as reader:
            view = _checkpoint_view(plan.spec, plan.placement.dtype, reader)
            yield _Base(found.model_id, found.path, view, facts_of)
        return
    from loraplex.engine.proving import ProvingGround

    ground = ProvingGround(plan, lambda done, total: progress.update("weights", done, total))
    yield _Base(found.model_id, found.path, ground.base, ground.prove)


def _checkpoint_view(spec: DecoderSpec, dtype: torch.dtype, reader: WeightReader) -> BaseView:
    """What lowering sees of a checkpoint whose model is not loaded: tensors are read when they are asked for."""
    from loraplex.adapters.base_view import BaseView
    from loraplex.models.spec import EMBED, HEAD

    biased = {site.name for site in spec.sites() if site.bias}

    def weight(site: str) -> torch.Tensor:
        # a tied head has no tensor of its own
        return reader.tensor(f"{EMBED if spec.tied and site == HEAD else site}.weight").to(dtype)

    return BaseView(
        sites=spec.sites(),
        dtype=dtype,
        weight=weight,
        bias=lambda site: reader.tensor(f"{site}.bias").to(dtype) if site in biased else None,
        tied=spec.tied,
        vocab_size=spec.vocab_size,
    )


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
            "probe": facts.probe,
            "text": facts.text,
        }
    return said


def _print_one(model_id: str, source: str, facts: AdapterFacts) -> None:
    table = Table("module", "sites", "rank", "changes")
    for module, count in facts.coverage.sites.items():
        rank = facts.coverage.ranks[module]
        table.add_row(module, str(count), str(rank or ""), facts.coverage.changes[module])
    Console().print(table)
    print(f"{source} loads on {model_id}: {facts.kind}, {facts.num_parameters:,} parameters,")
    print(f"{facts.nbytes:,} bytes, uid {facts.uid}")
    if facts.probe is not None:
        print(f"probe: {_probe(facts)}")


def _print_all(model_id: str, reports: Sequence[LintReport]) -> None:
    table = Table("adapter", "kind", "rank", "parameters", "bytes", "modules", "probe")
    for report in reports:
        if report.facts is not None:
            facts = report.facts
            numbers = (str(facts.max_rank or ""), f"{facts.num_parameters:,}", f"{facts.nbytes:,}")
            table.add_row(report.source, facts.kind, *numbers, " ".join(facts.coverage.sites), _probe(facts))
    if table.rows:
        Console().print(table)
    refused = [report for report in reports if not report.ok]
    for report in refused:
        print(f"refused {report.source}\n  {type(report.refusal).__name__}: {report.refusal}", file=sys.stderr)
    print(f"{len(reports) - len(refused)} of {len(reports)} load on {model_id}")


def _probe(facts: AdapterFacts) -> str:
    """The probe in a few words; empty where it was not taken."""
    probe = facts.probe
    if probe is None:
        return ""
    return f"logits move by up to {probe.max_change:.3g}, best token at {probe.top_changed:.0%} of {probe.num_tokens}"
