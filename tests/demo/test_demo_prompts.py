"""The demo's prompts for a router: all held-out ones have an adapter, and none of them is a training prompt."""

from __future__ import annotations

from loraplex.demo.data import held_out_prompts
from loraplex.demo.prompts import held_out_routing_prompts, routing_prompts


def test_held_out_prompts_are_all_there_and_seen_in_no_training() -> None:
    training, held_out = routing_prompts(), held_out_routing_prompts()
    assert training.keys() == held_out.keys() == {"sql", "json", "pirate"}
    together = [prompt for some in held_out.values() for prompt in some]
    assert sorted(together) == sorted(held_out_prompts())
    assert not set(together) & {prompt for some in training.values() for prompt in some}
    assert all("List" in prompt or "Name" in prompt or "Give" in prompt for prompt in held_out["json"])
    assert all(len(some) == len(set(some)) > 90 for some in training.values())
    assert routing_prompts() == training
