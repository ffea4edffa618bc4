"""Faults in the server. Its tests need the extra `serve` and OpenAI's client."""

from __future__ import annotations

from ..mutant import Mutant
from .python import within

SERVING = within("server/test_serving.py")
CLIENTS = within("server/test_serving_clients.py")

MUTANTS = [
    Mutant(
        "server: a key's beginning is enough",
        "flashu_ext/server/gate.py",
        "hmac.compare_digest(given[0], self._key)",
        "self._key.startswith(given[0])",
        SERVING("keys"),
    ),
    Mutant(
        "server: metrics need no key",
        "flashu_ext/server/gate.py",
        'OPEN = ("/health",)',
        'OPEN = ("/health", "/metrics")',
        SERVING("keys"),
    ),
    Mutant(
        "server: what is given up goes on",
        "flashu_ext/server/worker.py",
        "            if future.cancel() or not future.done():\n                self._many.cancel(index)\n",
        "            future.cancel()\n",
        CLIENTS("image_whose_client_vanishes"),
    ),
    Mutant(
        "server: one kind after the other",
        "flashu_ext/server/worker.py",
        "busy = [each for each in self._workers if each.busy]",
        "busy = [each for each in self._workers if each.busy][:1]",
        within("server/test_model_thread.py")("by_turns"),
    ),
    Mutant(
        "server: wrong requests are refused as fast as they come",
        "flashu_ext/server/app.py",
        "        await asyncio.sleep(request.app.state.service.refusals.delay())\n",
        "        request.app.state.service.refusals.delay()\n",
        within("server/test_model_thread.py")("holds_them_back"),
    ),
    Mutant(
        "server: refusals of long ago count",
        "flashu_ext/server/errors.py",
        "self._recent * math.exp(self._at - now) + 1",
        "self._recent + 1",
        within("server/test_model_thread.py")("held_back"),
    ),
    Mutant(
        "server: the event loop gives way to nobody",
        "flashu_ext/server/run.py",
        "os.nice(GIVES_WAY)",
        "os.nice(0)",
        within("server/test_serve_command.py")("gives_way"),
    ),
    Mutant(
        "server: one more may wait",
        "flashu_ext/server/worker.py",
        "> self._most:",
        "> self._most + 1:",
        CLIENTS("too_many"),
    ),
    Mutant(
        "server: a failed step is the client's mistake",
        "flashu_ext/server/worker.py",
        'RuntimeError(f"a step failed: {error}")',
        "error",
        CLIENTS("step_that_fails"),
    ),
    Mutant(
        "server: sizes are height by width",
        "flashu_ext/server/arguments.py",
        "    return height, width\n",
        "    return width, height\n",
        SERVING("width_by_height"),
    ),
    Mutant(
        "server: unknown arguments are ignored",
        "flashu_ext/server/arguments.py",
        "        if unknown is not None:\n",
        "        if unknown is self:\n",
        SERVING("requests_are_named"),
    ),
    Mutant(
        "server: true is 1",
        "flashu_ext/server/arguments.py",
        " and isinstance(value, bool) == isinstance(other, bool)",
        "",
        SERVING("requests_are_named"),
    ),
    Mutant(
        "server: images of a request have one seed",
        "flashu_ext/server/app.py",
        "asked.seed + index",
        "asked.seed",
        SERVING("images_are_those"),
    ),
    Mutant(
        "server: an answer that was cut off has ended",
        "flashu_ext/server/app.py",
        '"stop" if ended else "length"',
        '"stop"',
        SERVING("tokens_are_counted"),
    ),
    Mutant(
        "server: bodies count for ever",
        "flashu_ext/server/bodies.py",
        "            self._held -= size\n",
        "            pass\n",
        CLIENTS("bounded or left"),
    ),
    Mutant(
        "server: long bodies are read",
        "flashu_ext/server/bodies.py",
        "if size + len(chunk) > limits.body_bytes:",
        "if size > limits.bodies_bytes:",
        CLIENTS("bounded"),
    ),
    Mutant(
        "server: heads may take for ever",
        "flashu_ext/server/protocol.py",
        "call_later(self.read_seconds, self.transport.abort)",
        "call_later(1e6, self.transport.abort)",
        CLIENTS("slow_heads"),
    ),
    Mutant(
        "server: replies may wait for ever",
        "flashu_ext/server/protocol.py",
        "        super().pause_writing()\n        self._await_taken()\n",
        "        super().pause_writing()\n",
        CLIENTS("takes_nothing"),
    ),
    Mutant(
        "server: what is no HTTP leaves its request behind",
        "flashu_ext/server/protocol.py",
        "            self.cycle.disconnected = True\n",
        "",
        CLIENTS("no_http"),
    ),
    Mutant(
        "server: adapters are not asked for",
        "flashu_ext/server/app.py",
        "return None if model == self.name else model",
        "return None",
        SERVING("adapter"),
    ),
    Mutant(
        "many: what was cancelled is remembered for ever",
        "flashu_ext/models/many.py",
        "self._cancelled & {index for index, _ in self._added}",
        "self._cancelled",
        CLIENTS("image_whose_client_vanishes"),
    ),
]
