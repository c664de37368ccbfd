"""Module that the server of loader processes imports: torch and the data code.

Loader processes are forked from that server, never from the job. During a fork, a
thread of gloo or autograd may hold a lock of the interpreter, for which the child would wait
forever (seen with two processes and CPython 3.11, in _PyThreadState_DeleteExcept). Python 3.14
forks from a server by default.
"""

from __future__ import annotations

from job.data.loader import prepare_worker

prepare_worker()
