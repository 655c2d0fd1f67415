"""The gate that every RPC goes through: counts who is inside, and is closed when the server ends."""

from threading import Condition
from typing import Any

from service.base.errors import ServerStoppingError
from service.rpc.call import Call
from service.rpc.interceptors.stages import Handler, Method


class Gate:
    """Lets RPCs in until it is closed."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._inside = 0
        self._is_closed = False

    def gate(self, proceed: Handler, _method: Method) -> Handler:
        """The stage of the pipeline. Raises ServerStoppingError once the gate is closed: nothing was done for the RPC,
        so that it may be repeated whatever it is.
        """
        changed = self._changed

        def run(request: Any, call: Call) -> Any:
            with changed:
                if self._is_closed:
                    raise ServerStoppingError
                self._inside += 1
            try:
                return proceed(request, call)
            finally:
                self._leave()

        return run

    def _leave(self) -> None:
        with self._changed:
            self._inside -= 1
            if self._is_closed:
                self._changed.notify_all()

    def close(self, *, patience: float) -> bool:
        """Let nobody in any more and wait up to `patience` seconds for those inside; whether all have left."""
        with self._changed:
            self._is_closed = True
            return self._changed.wait_for(lambda: not self._inside, timeout=patience)
