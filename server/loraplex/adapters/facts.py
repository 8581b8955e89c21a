"""What is known of a loaded adapter beside its tensors: what the registry keeps and users see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from loraplex.types import Coverage, OwnText, Probe


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """One adapter's facts. ``nbytes`` is what it takes of the adapter memory when it is there alone; ``vocab_size``,
    ``invocation_tokens``, ``exclusive``, ``identity`` and ``telling_tokens`` are those of ``AdapterDelta``."""

    uid: str
    kind: str
    max_rank: int
    num_parameters: int
    nbytes: int
    coverage: Coverage
    vocab_size: int = 0
    invocation_tokens: tuple[int, ...] = ()
    exclusive: Mapping[str, str] = field(default_factory=dict)
    identity: bool = False
    telling_tokens: tuple[int, ...] = ()
    #: it has rows of its own at some site, though a rank of several may hold none of them
    own_rows: bool = False
    #: how it changes the logits of a fixed prompt; None until it was tried
    probe: Probe | None = None
    #: the tokenizer, template and generation settings that it ships; None: those of the base
    text: OwnText | None = None
    #: it ships a chat template that the server does not allow
    template_unused: bool = False
    #: the invocation tokens as text
    invocation_text: str = ""
