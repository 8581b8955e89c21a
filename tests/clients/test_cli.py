"""The command line: usage errors, configuration files, and every client command against a real server."""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from loraplex.cli import main
from loraplex.commands.adapters import source_to_send
from loraplex.commands.generate import parse_weighted_name
from loraplex.commands.settings import add_flags, build_config, parse_size
from loraplex.config import Config
from loraplex.errors import InvalidConfig, Unavailable
from loraplex.logs import JsonFormatter
from loraplex.text.pack import TextPack, pack_file
from loraplex.types import Coverage, OwnText, Probe, SamplingParams
from loraplex_client import Client
from tests.fakes import EOS, FakeEngine
from tests.rpc.serving import Served, ids_of, serving_thread


@pytest.fixture
def server() -> Iterator[Served]:
    engine = FakeEngine()
    engine.answer = lambda request: [*ids_of("the fox 🙂"), EOS]
    with serving_thread(engine) as served:
        yield served


def config_of(*argv: str) -> Config:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return build_config(parser.parse_args(argv))


def test_machines_come_from_flags_the_file_and_torchrun_in_this_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PET_NNODES", "4")
    monkeypatch.setenv("PET_NODE_RANK", "3")
    monkeypatch.setenv("PET_RDZV_ENDPOINT", "first:1")
    (file := tmp_path / "loraplex.toml").write_text('[nodes]\nnode_rank = 2\nrdzv_endpoint = "second:2"\n')
    nodes = config_of("--config", str(file), "--rdzv-endpoint", "third:3").nodes
    assert (nodes.nnodes, nodes.node_rank, nodes.rdzv_endpoint) == (4, 2, "third:3")
    monkeypatch.setenv("PET_NNODES", "1:4")
    with pytest.raises(InvalidConfig, match="PET_NNODES: '1:4' is not a whole number"):
        config_of()


@pytest.mark.parametrize(
    ("text", "size"), [("2GiB", 2 << 30), ("512MB", 512_000_000), ("1048576", 1 << 20), ("1.5 kib", 1536), ("7b", 7)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ([], "COMMAND"),
        (["fly"], "fly"),
        (["serve", "--kv-cache-memory", "2 bananas"], "'2 bananas' is not a size; write a number and a unit"),
        (["serve", "--adapter-memory", "-1GiB"], "adapter-memory"),
        (["serve", "--port", "70000"], "70000 is not a port"),
        (["serve", "--max-num-seqs", "0"], "0 is too small"),
        (["serve", "--threads", "two"], "'two' is not a whole number"),
        (["serve", "--threads", "100000"], "100000 is too many; allowed are 0 (one per core) to 1024"),
        (["serve", "--drain-seconds", "nan"], "'nan' is not a number of seconds"),
        (["serve", "--dtype", "int3"], "invalid choice: 'int3'"),
        (["serve", "--quantization", "nf3"], "invalid choice: 'nf3' (choose from 'none', 'nf4', 'fp4', 'int8', 'fp8')"),
        (["serve", "--adapter", "fr"], "'fr' is not NAME=SOURCE"),
        (["serve", "--nonsense"], "--nonsense"),
        (["generate"], "PROMPT"),
        (["adapters", "pin"], "NAME"),
        (["generate", "--max-tokens", "-1", "x"], "'-1' is not a whole number of 0 or more"),
        (["generate", "--seed", "-1", "x"], "'-1' is not a whole number of 0 or more"),
        (["adapters"], "ACTION"),
        (["adapters", "load", "x"], "SOURCE"),
    ],
)
def test_usage_errors_exit_2(argv: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert part in capsys.readouterr().err


@pytest.mark.parametrize(
    ("toml", "part"),
    [
        ("[server]\nprot = 1\n", "unknown field `prot`"),
        ("[sever]\nport = 1\n", "unknown field `sever`"),
        ('[server]\nport = "x"\n', "$.server.port"),
        ("[engine]\nmax_num_seqs = 0\n", ">= 1 - at `$.engine.max_num_seqs"),
        ("[server]\nmetrics_port = 70000\n", "<= 65535 - at `$.server.metrics_port"),
        ("[server]\ndrain_s = nan\n", "$.server.drain_s"),
        ('[server]\nlog_level = "loud"\n', "Invalid enum value 'loud' - at `$.server.log_level`"),
        ("server = 3\n", "Expected `object`, got `int` - at `$.server`"),
        ('[engine]\nkv_cache_memory = "lots"\n', "engine.kv_cache_memory: 'lots' is not a size"),
        ("[server\n", "not valid TOML"),
    ],
)
def test_configuration_file_errors_exit_2_and_name_file_and_key(
    toml: str, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "server.toml"
    file.write_text(toml)
    assert main(["serve", "--config", str(file)]) == 2
    message = capsys.readouterr().err
    assert part in message
    assert "server.toml" in message
    assert main(["serve", "--config", str(tmp_path / "none.toml")]) == 2


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text(
        '[server]\nport = 1\nhost = "0.0.0.0"\n[engine]\nkv_cache_memory = "2MiB"\nprefix_cache = false\n'
        '[adapters.preload]\nfr = "/fr"\n'
    )
    config = config_of("--config", str(file), "--port", "2", "--adapter-dir", "/a", "--adapter-dir", "/b")
    assert (config.server.port, config.server.host) == (2, "0.0.0.0")
    assert (config.engine.kv_cache_memory, config.engine.prefix_cache) == (2 << 20, False)
    assert config.adapters.preload == (("fr", "/fr"),)
    assert config.adapters.adapter_dirs == ("/a", "/b")
    assert config_of("--adapter", "x=/y=z").adapters.preload == (("x", "/y=z"),)
    assert not config_of("--no-reflection").server.reflection
    assert config_of().model == Config().model


def test_generate_streams_to_the_terminal(server: Served, capsys: pytest.CaptureFixture[str]) -> None:
    address = server.app.address
    assert main(["adapters", "load", "--server", address, "fr", "/a/fr"]) == 0
    argv = ["generate", "--server", address, "--adapter", "fr:0.5", "--max-tokens", "20", "--chat", "hello"]
    assert main(argv) == 0
    assert capsys.readouterr().out.endswith("the fox 🙂\n")
    request = server.engine.requests[-1]
    assert [(ref.name, ref.weight) for ref in request.adapters] == [("fr", 0.5)]
    assert list(request.prompt_token_ids) == ids_of("user: hello\nassistant:")


@pytest.mark.parametrize(
    ("text", "pair"), [("fr", ("fr", 1.0)), ("fr:-0.5", ("fr", -0.5)), ("a:b", ("a:b", 1.0)), ("a:b:2", ("a:b", 2.0))]
)
def test_weighted_names(text: str, pair: tuple[str, float]) -> None:
    assert parse_weighted_name(text) == pair


def test_adapter_commands_and_info(server: Served, capsys: pytest.CaptureFixture[str]) -> None:
    address = ["--server", server.app.address]
    assert main(["adapters", "load", *address, "fr", "/a/fr", "--pinned"]) == 0
    assert main(["adapters", "list", *address]) == 0
    assert main(["adapters", "show", *address, "fr"]) == 0
    assert main(["adapters", "unload", *address, "fr"]) == 0
    assert main(["info", *address]) == 0
    out = capsys.readouterr().out
    for part in ("fr", "ready", "lora", "device, pinned", "uid-fr-1", "fr unloaded", "fake", "llama", "reference"):
        assert part in out


def test_pin_and_unpin(server: Served, capsys: pytest.CaptureFixture[str]) -> None:
    address = ["--server", server.app.address]
    assert main(["adapters", "load", *address, "fr", "/a/fr"]) == 0
    for word, where in (("pin", "device, pinned"), ("unpin", "device")):
        assert main(["adapters", word, *address, "fr"]) == 0
        assert capsys.readouterr().out.endswith(f"fr {word}ned\n")
        assert main(["adapters", "list", *address]) == 0
        cells = [cell.strip() for cell in capsys.readouterr().out.split("│")]
        assert where in cells
    assert main(["adapters", "pin", *address, "nope"]) == 1
    assert "'nope' is not loaded" in capsys.readouterr().err


def test_an_update_says_how_it_is_kept(server: Served, capsys: pytest.CaptureFixture[str]) -> None:
    address = ["--server", server.app.address]
    assert main(["adapters", "load", *address, "fr", "/a/fr"]) == 0
    assert "merged" not in capsys.readouterr().out
    assert main(["adapters", "update", *address, "fr", "--resident", "merged"]) == 0
    assert "MiB, for requests that use it alone" in capsys.readouterr().out
    assert main(["adapters", "list", *address]) == 0
    assert "device, merged" in [cell.strip() for cell in capsys.readouterr().out.split("│")]
    assert main(["adapters", "update", *address, "fr", "--resident", "auto"]) == 0
    assert "merged" not in capsys.readouterr().out


def test_a_list_is_whole_where_nobody_looks_and_says_what_to_do_when_empty(
    server: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    address = ["--server", server.app.address]
    assert main(["adapters", "list", *address]) == 0
    assert "no adapters on" in capsys.readouterr().out
    source = "/a/" + "long-" * 40 + "name"
    assert main(["adapters", "load", *address, "fr", source]) == 0
    capsys.readouterr()
    assert main(["adapters", "list", *address]) == 0
    assert any("fr" in line and source in line for line in capsys.readouterr().out.splitlines())


def test_a_list_as_json_has_all_that_is_known(server: Served, capsys: pytest.CaptureFixture[str]) -> None:
    address = ["--server", server.app.address]
    assert main(["adapters", "list", "--json", *address]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert main(["adapters", "load", *address, "fr", "/a/fr", "--pinned"]) == 0
    capsys.readouterr()
    assert main(["adapters", "list", "--json", *address]) == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert (listed["name"], listed["state"], listed["pinned"], listed["ranks"]) == ("fr", "ready", True, {"q_proj": 8})
    assert listed["loaded_at"].startswith("2023-11-14T22:13:20.5")
    assert listed["last_used_at"] is None


def test_watch_tells_a_pin_from_a_load(
    server: Served, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    address = ["--server", server.app.address]
    for word in (["load", "fr", "/a/fr"], ["pin", "fr"]):
        assert main(["adapters", *word, *address]) == 0
    with Client(server.app.address) as client:
        events = iter(client.list_adapters())
    monkeypatch.setattr(Client, "watch_adapters", lambda self: events)
    capsys.readouterr()
    assert main(["adapters", "watch", *address]) == 0
    assert capsys.readouterr().out == "fr ready kind=lora uid=uid-fr-1 pinned\n"


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--adapter", "fr", "--adapter", "fr:0.5"], "--adapter fr is given twice; give it once, as fr:WEIGHT"),
        (["--adapter-sampling", "--temperature", "0", "--seed", "1"], "does not go with --temperature, --seed"),
    ],
)
def test_generate_refuses_what_cannot_be_sent(
    server: Served, capsys: pytest.CaptureFixture[str], flags: list[str], part: str
) -> None:
    assert main(["generate", "--server", server.app.address, *flags, "x"]) == 2
    assert part in capsys.readouterr().err
    assert not server.engine.requests


def test_generate_leaves_sampling_to_the_adapter_when_asked_to(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.text_spool = tmp_path
    pack_file(tmp_path, "d").write_bytes(TextPack().encode())
    engine.dress = lambda info: msgspec.structs.replace(
        info, text=OwnText("d", sampling=SamplingParams(temperature=0.7, top_k=3))
    )
    drawn = []
    with serving_thread(engine) as served:
        address = ["--server", served.app.address]
        assert main(["adapters", "load", *address, "fr", "/a/fr"]) == 0
        for flags in ([], ["--adapter-sampling"]):
            assert main(["generate", *address, "--adapter", "fr", *flags, "x"]) == 0
            sampling = engine.requests[-1].sampling
            drawn.append((sampling.temperature, sampling.top_k))
    assert drawn == [(0.0, 0), (pytest.approx(0.7), 3)]


def test_show_says_what_an_adapter_changes(server: Served, capsys: pytest.CaptureFixture[str]) -> None:
    server.engine.dress = lambda info: msgspec.structs.replace(
        info,
        coverage=Coverage({"q_proj": 2, "norm": 1}, {"q_proj": 8}, {"q_proj": "low rank", "norm": "own weight"}),
        probe=Probe(1.5, 0.25, 12),
        invocation_tokens=(7, 9),
        invocation_text=" go",
        template_unused=True,
        text=OwnText("d", tokenizer=True, eos_token_ids=(2,), sampling=SamplingParams(temperature=0.7, top_k=1)),
    )
    assert main(["adapters", "load", "--server", server.app.address, "act", "/a/act"]) == 0
    lines = [line.split("│") for line in capsys.readouterr().out.splitlines()]
    cells = [tuple(cell.strip() for cell in line[1:-1]) for line in lines if len(line) > 2]
    assert ("probe", "logits move by up to 1.5; another best next token at 25% of 12 positions") in cells
    assert ("invoked by", "7 9: ' go'") in cells
    unused = "its chat template is not used (the server runs without --allow-adapter-templates)"
    assert ("tokenizer", f"its own, 300 tokens; {unused}") in cells
    assert ("defaults", "temperature 0.7, top_k 1, ends at 2") in cells
    assert ("q_proj", "2", "8", "low rank") in cells
    assert ("norm", "1", "", "own weight") in cells


def test_generate_says_when_an_adapter_was_not_invoked(server: Served, capsys: pytest.CaptureFixture[str]) -> None:
    server.engine.dress = lambda info: msgspec.structs.replace(info, invocation_tokens=tuple(ids_of(" fox")))
    address = ["--server", server.app.address]
    assert main(["adapters", "load", *address, "act", "/a/act"]) == 0
    assert main(["generate", *address, "--adapter", "act", "a fox runs"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["generate", *address, "--adapter", "act", "a dog runs"]) == 0
    assert "adapter 'act' changed nothing" in capsys.readouterr().err


def test_failures_are_one_line_and_exit_1(server: Served, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "show", "--server", server.app.address, "nope"]) == 1
    assert capsys.readouterr().err == "loraplex: adapter 'nope' is not loaded\n"
    assert main(["generate", "--server", "127.0.0.1:1", "--timeout", "5", "x"]) == 1
    told = "no server answers at 127.0.0.1:1; start one with `loraplex serve`, or name another with --server"
    assert capsys.readouterr().err == f"loraplex: {told}\n"


def test_a_source_of_this_machine_goes_to_a_server_of_this_machine_by_its_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fr").mkdir()
    monkeypatch.chdir(tmp_path)
    for server in ("127.0.0.1:50051", "localhost:1", "[::1]:50051"):
        assert source_to_send("fr", server) == str(tmp_path / "fr")
        assert source_to_send("not-here", server) == "not-here"
        assert source_to_send("hf://org/repo", server) == "hf://org/repo"
    assert source_to_send("fr", "gpu-3.example:50051") == "fr"


def test_serve_fails_with_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplex.commands.serve.set_up_logging", lambda log_format, level: None)
    free = ["--port", "0", "--metrics-port", "0"]
    assert main(["serve", *free, "--model", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"loraplex: model directory {tmp_path} has no config.json\n"
    assert main(["serve", *free, "--model", str(tmp_path / "none")]) == 1
    assert "no such directory" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve", "--port", port, "--metrics-port", "0", "--model", str(tmp_path)]) == 1
        assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err
        assert main(["serve", "--port", "0", "--metrics-port", port, "--model", str(tmp_path)]) == 1
        assert f"metrics port: cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


def test_json_logs_are_one_object_a_line() -> None:
    record = logging.LogRecord("loraplex.x", logging.WARNING, __file__, 1, "a %s\nb", ("é",), None)
    line = JsonFormatter().format(record)
    assert "\n" not in line
    entry = json.loads(line)
    assert (entry["level"], entry["logger"], entry["message"]) == ("warning", "loraplex.x", "a é\nb")


def test_ctrl_c_while_the_command_is_still_being_imported_is_quiet() -> None:
    code = "import sys, loraplex.cli; sys.exit(bool({'grpc', 'rich', 'loraplex.commands.serve'} & set(sys.modules)))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=env, timeout=60, check=False).returncode == 0


def test_an_answer_that_is_cut_short_ends_its_line(server: Served, capsys: pytest.CaptureFixture[str]) -> None:
    server.engine.fail_after = (2, Unavailable("the engine is gone"))
    assert main(["generate", "--server", server.app.address, "x"]) == 1
    told = capsys.readouterr()
    assert len(told.out) > 1
    assert told.out.endswith("\n")
    assert told.err == "loraplex: the engine is gone\n"
