"""Which text a request's adapters bring: waits for loads, follows replacements, shares and bounds what is open."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest

from loraplex.errors import InvalidRequest, Unavailable
from loraplex.text.adapter_text import AdapterTexts
from loraplex.text.pack import TextPack, pack_file
from loraplex.types import AdapterInfo, AdapterState, OwnText, SamplingParams
from tests.fakes import EOS, FAKE_MODEL
from tests.rpc.serving import make_tokenizer

BASE = make_tokenizer()


def ready(name: str, digest: str = "", *, generation: int = 1, vocab_size: int = 0, **own: object) -> AdapterInfo:
    text = OwnText(digest, **own) if digest else None  # type: ignore[arg-type]
    return AdapterInfo(
        name, f"uid-{name}-{generation}", state=AdapterState.READY, generation=generation, text=text,
        vocab_size=vocab_size,
    )  # fmt: skip


def state(name: str, state: AdapterState, generation: int = 0) -> AdapterInfo:
    return AdapterInfo(name, state=state, generation=generation)


def spooled(spool: Path, digest: str) -> None:
    pack_file(spool, digest).write_bytes(TextPack(chat_template=f"<{digest}>").encode())


def run(spool: Path, use: Callable[[AdapterTexts], Coroutine[None, None, None]]) -> None:
    async def body() -> None:
        texts = AdapterTexts(BASE, FAKE_MODEL, spool)
        try:
            await use(texts)
        finally:
            texts.close()

    asyncio.run(asyncio.wait_for(body(), 30))


def test_base_and_adapters_without_text_use_the_base_s(tmp_path: Path) -> None:
    async def use(texts: AdapterTexts) -> None:
        texts.changed(ready("a", vocab_size=333))
        for names, vocab_size in (([], 300), (["a"], 333), (["nobody"], 300)):
            text = await texts.of(names)
            assert text.tokenizer is BASE
            assert (text.digest, text.vocab_size, text.eos_token_ids) == ("", vocab_size, (EOS,))

    run(tmp_path, use)


def test_an_adapter_s_own_text(tmp_path: Path) -> None:
    sampling = SamplingParams(temperature=0.5)

    async def use(texts: AdapterTexts) -> None:
        spooled(tmp_path, "d")
        texts.changed(ready("a", "d", eos_token_ids=(7,), sampling=sampling))
        texts.changed(ready("b", "d"))
        texts.changed(ready("plain"))
        text = await texts.of(["a"])
        assert (text.digest, text.eos_token_ids, text.sampling) == ("d", (7,), sampling)
        assert await text.tokenizer.encode_chat([("user", "x")]) == await BASE.encode("<d>")
        assert (await texts.of(["b"])).tokenizer is text.tokenizer, "equal text was opened twice"
        both = await texts.of(["a", "plain"])
        assert (both.digest, both.sampling) == ("d", None)

    run(tmp_path, use)


def test_different_texts_have_no_sum(tmp_path: Path) -> None:
    async def use(texts: AdapterTexts) -> None:
        texts.changed(ready("a", "d"))
        texts.changed(ready("b", "e"))
        with pytest.raises(InvalidRequest, match="'a', 'b' ship different tokenizers") as caught:
            await texts.of(["a", "b"])
        assert caught.value.field == "adapters"

    run(tmp_path, use)


def test_a_first_load_is_waited_for_and_a_replacement_is_not(tmp_path: Path) -> None:
    async def use(texts: AdapterTexts) -> None:
        spooled(tmp_path, "d")
        spooled(tmp_path, "e")
        texts.changed(state("a", AdapterState.LOADING))
        waiting = [asyncio.create_task(texts.of(["a"])) for _ in range(3)]
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in waiting)
        waiting.pop().cancel()
        texts.changed(ready("a", "d"))
        assert [(await task).digest for task in waiting] == ["d", "d"]
        texts.changed(state("a", AdapterState.LOADING))
        assert (await texts.of(["a"])).digest == "d"
        texts.changed(state("a", AdapterState.FAILED))
        assert (await texts.of(["a"])).digest == "d", "a failed replacement took the version away"
        texts.changed(state("a", AdapterState.LOADING))
        texts.changed(ready("a", "e", generation=2))
        texts.changed(state("a", AdapterState.UNLOADED, generation=1))  # the old version's end comes late
        assert (await texts.of(["a"])).digest == "e"
        texts.changed(state("a", AdapterState.DRAINING, generation=2))
        assert (await texts.of(["a"])).digest == ""

    run(tmp_path, use)


@pytest.mark.parametrize("how", ["fails", "engine ends"])
def test_a_load_that_comes_to_nothing_is_waited_for_no_longer(tmp_path: Path, how: str) -> None:
    async def use(texts: AdapterTexts) -> None:
        texts.changed(state("a", AdapterState.LOADING))
        waiting = asyncio.create_task(texts.of(["a"]))
        await asyncio.sleep(0)
        if how == "fails":
            texts.changed(state("a", AdapterState.FAILED))
        else:
            texts.engine_ended()
        assert (await waiting).digest == ""

    run(tmp_path, use)


def test_a_file_that_went_with_its_version(tmp_path: Path) -> None:
    async def use(texts: AdapterTexts) -> None:
        spooled(tmp_path, "e")
        texts.changed(ready("a", "gone"))
        asking = asyncio.create_task(texts.of(["a"]))
        await asyncio.sleep(0.05)
        texts.changed(ready("a", "e", generation=2))
        assert (await asking).digest == "e"
        texts.changed(ready("b", "gone"))
        with pytest.raises(Unavailable, match="text of 'b' went away"):
            await texts.of(["b"])

    run(tmp_path, use)


def test_what_is_open_is_bounded_and_opened_again(tmp_path: Path) -> None:
    async def use(texts: AdapterTexts) -> None:
        for index in range(100):
            spooled(tmp_path, f"d{index}")
            texts.changed(ready(f"a{index}", f"d{index}"))
        found = await asyncio.gather(*(texts.of([f"a{index}"]) for index in range(100)))
        for index, text in enumerate(found):
            assert await text.tokenizer.encode_chat([("user", "x")]) == await BASE.encode(f"<d{index}>")
        assert len(texts._open) == 64
        again = await texts.of(["a0"])
        assert again.tokenizer is not found[0].tokenizer
        assert (await texts.of(["a99"])).tokenizer is found[99].tokenizer

    run(tmp_path, use)
