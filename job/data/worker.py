"""What the server of loader processes imports first: they start with torch and the data code.

They are forked from that server, never from the job: gloo's and autograd's threads may hold a lock
of Python's at that instant, and the fork of a process would then wait for it for ever (seen with
two processes and CPython 3.11, in _PyThreadState_DeleteExcept). Python 3.14 does so by default.
"""

from __future__ import annotations

from job.data.loader import prepare_worker

prepare_worker()
