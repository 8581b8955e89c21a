"""The generated gRPC code is that of the committed .proto files."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_generated_stubs_are_fresh(tmp_path: Path) -> None:
    if importlib.util.find_spec("grpc_tools") is None:
        pytest.skip("grpcio-tools is not installed")
    stubs = ROOT / "proto" / "loraplex_proto" / "v1"
    made_with = re.search(r"GRPC_GENERATED_VERSION = '([\d.]+)'", (stubs / "generation_pb2_grpc.py").read_text())
    assert made_with is not None
    if importlib.metadata.version("grpcio-tools") != made_with.group(1):
        pytest.skip(f"grpcio-tools {made_with.group(1)}, which made the committed stubs, is not installed")
    outputs = [f"--{kind}={tmp_path}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    sources = sorted(str(path) for path in stubs.glob("*.proto"))
    command = [sys.executable, "-W", "ignore", "-m", "grpc_tools.protoc", "-I", str(ROOT / "proto"), *outputs, *sources]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    fresh = {path.name: path.read_bytes() for path in (tmp_path / "loraplex_proto" / "v1").iterdir()}
    committed = {path.name: path.read_bytes() for path in stubs.glob("*_pb2*")}
    stale = sorted(name for name in fresh.keys() | committed.keys() if fresh.get(name) != committed.get(name))
    assert not stale, f"run `make proto`: {', '.join(stale)}"
