"""Routers, which choose a request's adapter by its prompt: what the server says of them and of their choices."""

from __future__ import annotations

from dataclasses import dataclass

from loraplex_proto.v1 import adapters_pb2, generation_pb2


@dataclass(frozen=True, slots=True)
class Candidate:
    """An adapter that a router may choose, and how probable it finds it."""

    name: str
    probability: float


@dataclass(frozen=True, slots=True)
class Routing:
    """What a router made of a request. ``adapter``: the name it chose; empty: the base model.

    ``candidates``: the best two, best first. The first was chosen, unless it is below the router's threshold.
    """

    router: str
    router_uid: str
    adapter: str
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class Router:
    """What an adapter of kind "router" is: it chooses for requests that name ``auto:NAME``.

    ``feature``: what it looks at, "centroid" or "arrow". ``num_prototypes``: vectors of each of its ``adapters``. Below
    ``threshold`` it chooses ``default_adapter``; empty: the base model.
    """

    feature: str
    adapters: tuple[str, ...]
    num_prototypes: tuple[int, ...]
    temperature: float
    threshold: float
    default_adapter: str


def routing(pb: generation_pb2.Routing) -> Routing:
    """Read a Routing."""
    candidates = tuple(Candidate(each.name, each.probability) for each in pb.candidates)
    return Routing(pb.router, pb.router_uid, pb.adapter, candidates)


def router(pb: adapters_pb2.Router) -> Router:
    """Read a Router."""
    return Router(
        feature=pb.feature,
        adapters=tuple(pb.adapters),
        num_prototypes=tuple(pb.num_prototypes),
        temperature=pb.temperature,
        threshold=pb.threshold,
        default_adapter=pb.default_adapter,
    )
