"""Small real stand-ins for the tests: an engine that 'generates' what it is told to, in this process."""

from __future__ import annotations

import asyncio
import difflib
import itertools
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from pathlib import Path

import msgspec

from loraplex.engine.invocation import last_place
from loraplex.engine.messages import StepReport, TokenEvent
from loraplex.errors import AlreadyExists, NotFound, Unavailable
from loraplex.types import (
    STALE_TEXT,
    AdapterInfo,
    AdapterState,
    Coverage,
    FinishReason,
    ModelInfo,
    OnConflict,
    Request,
    Residency,
    ResolvedAdapter,
    TokenLogprob,
    TopLogprob,
    UnloadMode,
    Usage,
)

EOS = 0
FAKE_MODEL = ModelInfo(
    model_id="fake",
    architecture="llama",
    dtype="float32",
    device="cpu",
    quantization="",
    tensor_parallel_size=1,
    vocab_size=300,
    max_model_len=256,
    eos_token_ids=(EOS,),
    sites=("q_proj", "v_proj"),
    backends={"lora": "reference", "attention": "reference"},
    max_num_seqs=8,
    max_num_batched_tokens=64,
    kv_page_size=16,
    kv_num_pages=64,
    adapter_memory_bytes=1 << 20,
    weight_bytes=1 << 10,
)


class FakeEngine:
    """Answers the EngineHandle protocol. Set its attributes to script what it does.

    ``answer`` maps a request to its tokens; a trailing EOS finishes it STOP, max_tokens LENGTH.
    """

    def __init__(self, model: ModelInfo = FAKE_MODEL) -> None:
        self.model = model
        self.alive = True
        self.text_spool = Path("no-text-is-spooled")
        self.answer: Callable[[Request], Iterable[int]] = _count_up
        self.step_s = 0.0
        self.tokens_per_event = 1
        self.fail_after: tuple[int, Exception] | None = None
        self.requests: list[Request] = []
        self.running: set[str] = set()
        #: what happens just before a request is looked at
        self.on_submit: Callable[[Request], None] = lambda request: None
        #: what a loaded adapter is known to be
        self.dress: Callable[[AdapterInfo], AdapterInfo] = lambda info: info
        self.aborted: list[str] = []
        self.aborted_at: dict[str, float] = {}
        self._adapters: dict[str, AdapterInfo] = {}
        self._watchers: list[asyncio.Queue[AdapterInfo]] = []
        self._on_report: list[Callable[[StepReport], None]] = []
        self._on_load: list[Callable[[float], None]] = []
        self._on_adapter: list[Callable[[AdapterInfo], None]] = []
        self._on_death: list[Callable[[str], None]] = []
        self._on_restart: list[tuple[Callable[[str], None], Callable[[], None]]] = []

    async def generate(self, request: Request) -> AsyncGenerator[TokenEvent]:
        if not self.alive:
            raise Unavailable("the engine is gone")
        self.requests.append(request)
        self.on_submit(request)
        self.running.add(request.request_id)
        finished = False
        try:
            for event in self._events(request):
                await asyncio.sleep(self.step_s)
                if not self.alive:
                    finished = True
                    raise Unavailable("the engine is gone")
                if self.fail_after is not None and self.fail_after[0] <= 0:
                    finished = True
                    raise self.fail_after[1]
                if self.fail_after is not None:
                    self.fail_after = (self.fail_after[0] - 1, self.fail_after[1])
                finished = event.terminal
                yield event
        finally:
            self.running.discard(request.request_id)
            if not finished:
                self.aborted.append(request.request_id)
                self.aborted_at[request.request_id] = time.monotonic()

    async def load_adapter(self, name: str, source: str, pinned: bool, on_conflict: OnConflict) -> AdapterInfo:
        await asyncio.sleep(self.step_s)
        if name in self._adapters and on_conflict is OnConflict.FAIL:
            raise AlreadyExists(f"adapter {name!r} is loaded; unload it, or ask for REPLACE", field="name")
        generation = self._adapters[name].generation + 1 if name in self._adapters else 1
        info = AdapterInfo(
            name=name,
            uid=f"uid-{name}-{generation}",
            kind="lora",
            state=AdapterState.READY,
            source=source,
            max_rank=8,
            num_parameters=128,
            bytes=512,
            coverage=Coverage({"q_proj": 2}, {"q_proj": 8}),
            residency=Residency.DEVICE,
            pinned=pinned,
            loaded_at=1_700_000_000.5,
            generation=generation,
        )
        info = self._adapters[name] = self.dress(info)
        self._changed(info)
        for callback in self._on_load:
            callback(0.25)
        return info

    def put(self, info: AdapterInfo) -> None:
        """An adapter is what ``info`` says, from now on."""
        self._adapters[info.name] = info
        self._changed(info)

    async def unload_adapter(self, name: str, mode: UnloadMode) -> AdapterInfo:
        info = await self.get_adapter(name)
        del self._adapters[name]
        gone = AdapterInfo(
            name=name, uid=info.uid, state=AdapterState.UNLOADED, source=info.source, generation=info.generation
        )
        self._changed(gone)
        return gone

    async def pin_adapter(self, name: str, pinned: bool) -> AdapterInfo:
        info = self._adapters[name] = msgspec.structs.replace(await self.get_adapter(name), pinned=pinned)
        self._changed(info)
        return info

    async def list_adapters(self) -> list[AdapterInfo]:
        return [self._adapters[name] for name in sorted(self._adapters)]

    async def get_adapter(self, name: str) -> AdapterInfo:
        self._require(name)
        return self._adapters[name]

    async def watch_adapters(self) -> AsyncGenerator[AdapterInfo]:
        queue: asyncio.Queue[AdapterInfo] = asyncio.Queue()
        self._watchers.append(queue)
        try:
            for info in await self.list_adapters():
                yield info
            while True:
                yield await queue.get()
        finally:
            self._watchers.remove(queue)

    def on_report(self, callback: Callable[[StepReport], None]) -> None:
        self._on_report.append(callback)

    def on_load(self, callback: Callable[[float], None]) -> None:
        self._on_load.append(callback)

    def on_adapter(self, callback: Callable[[AdapterInfo], None]) -> None:
        self._on_adapter.append(callback)

    def on_death(self, callback: Callable[[str], None]) -> None:
        self._on_death.append(callback)

    def on_restart(self, down: Callable[[str], None], up: Callable[[], None]) -> None:
        self._on_restart.append((down, up))

    def restart(self, reason: str) -> Callable[[], None]:
        """Be gone for a while, until what is returned is called."""
        for down, _ in self._on_restart:
            down(reason)

        def come_up() -> None:
            for _, up in self._on_restart:
                up()

        return come_up

    def report(self, report: StepReport) -> None:
        """Tell the front end of a step."""
        for callback in self._on_report:
            callback(report)

    def die(self, reason: str) -> None:
        """Be gone, as when the process was killed."""
        self.alive = False
        for callback in self._on_death:
            callback(reason)

    def _require(self, name: str) -> None:
        if name not in self._adapters:
            near = difflib.get_close_matches(name, self._adapters, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise NotFound(f"adapter {name!r} is not loaded{hint}", field="adapters.name")

    def _changed(self, info: AdapterInfo) -> None:
        for callback in self._on_adapter:
            callback(info)
        for queue in self._watchers:
            queue.put_nowait(info)

    def _invoked(self, name: str, request: Request) -> bool:
        invocation = self._adapters[name].invocation_tokens
        return not invocation or last_place(request.prompt_token_ids, invocation) is not None

    def _events(self, request: Request) -> Iterator[TokenEvent]:
        for ref in request.adapters:
            self._require(ref.name)
        texts = [text for ref in request.adapters if (text := self._adapters[ref.name].text) is not None]
        if request.text_digest != "".join({text.digest for text in texts}):
            raise Unavailable("its text was made for another version", field=STALE_TEXT, retry_after_s=0.05)
        eos = next((t.eos_token_ids for t in texts if t.eos_token_ids is not None), self.model.eos_token_ids)
        adapters = tuple(
            ResolvedAdapter(ref.name, self._adapters[ref.name].uid, ref.weight, self._invoked(ref.name, request))
            for ref in request.adapters
        )
        options = request.output
        prompt_logprobs = tuple(_logprob(t, 0) for t in request.prompt_token_ids) if options.prompt_logprobs else ()
        stop_ids = {*request.stop.stop_token_ids, *(() if request.stop.ignore_eos else eos)}
        answer = itertools.islice(iter(self.answer(request)), request.stop.max_tokens)
        num_tokens = 0
        finish: FinishReason | None = None
        while finish is None:
            group: list[int] = []
            while len(group) < self.tokens_per_event and finish is None:
                token = next(answer, None)
                if token is None:
                    finish = FinishReason.LENGTH
                    break
                group.append(token)
                if token in stop_ids:
                    finish = FinishReason.STOP
            first, num_tokens = num_tokens == 0, num_tokens + len(group)
            yield TokenEvent(
                ticket=1,
                token_ids=tuple(group),
                logprobs=tuple(_logprob(token, options.logprobs) for token in group) if options.logprobs else (),
                prompt_logprobs=prompt_logprobs if first else (),
                adapters=adapters if first else (),
                finish=finish,
                usage=Usage(len(request.prompt_token_ids), 2, num_tokens, 0.001, 0.002, 0.003) if finish else None,
            )


def _count_up(request: Request) -> Iterator[int]:
    """Deterministic, and different for different adapters: counts up from the prompt's sum."""
    start = sum(request.prompt_token_ids) + sum(map(ord, "".join(ref.name for ref in request.adapters)))
    return (1 + (start + index) % 250 for index in itertools.count())


def _logprob(token: int, num_top: int) -> TokenLogprob:
    return TokenLogprob(token, -0.5, tuple(TopLogprob((token + i) % 300, -0.5 - i) for i in range(num_top)))
