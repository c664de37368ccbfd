"""Check whether W&B can be used online: a program that runs in a separate process.

Prints a JSON object with ``server`` and either ``user`` or a ``kind`` of failure. The kind is
"none" when no key is configured, "key" when the server rejects the key, and "server" when the
server fails or does not answer. The last two come with a ``problem``.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request

SERVER_TIMEOUT = 5.0  # seconds


def main() -> None:
    """Print the answer.

    The standard streams are /dev/null for W&B: its output is dropped and it cannot prompt.
    """
    answers = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.environ["WANDB_MODE"] = "online"  # W&B does not verify a key in offline mode
    import wandb

    server = str(wandb.setup().settings.base_url).rstrip("/")
    json.dump({"server": server, **_check(server)}, answers)
    answers.flush()
    os._exit(0)


def _check(server: str) -> dict[str, str]:
    import wandb

    try:
        wandb.login(verify=False)  # raises without a key; no request is sent
        if problem := _server_problem(server):
            return {"kind": "server", "problem": problem}
        wandb.login(verify=True)
    except wandb.errors.AuthenticationError as error:
        return {"kind": "key", "problem": str(error)}
    except wandb.errors.UsageError:
        return {"kind": "none"}
    return {"user": wandb.setup()._get_username() or "unknown"}


def _server_problem(server: str) -> str:
    """Return why the server cannot be used, or "" if it can.

    Called before the key is verified: W&B raises the same error for a failing server and for a
    rejected key.
    """
    try:
        urllib.request.urlopen(f"{server}/graphql", timeout=SERVER_TIMEOUT).close()
    except urllib.error.HTTPError as error:  # a request without a key gets no 200
        return f"{server} answers with status {error.code}" if error.code >= 500 else ""
    except (OSError, ValueError) as error:  # URLError is an OSError
        return f"{server} cannot be reached: {getattr(error, 'reason', error)}"
    return ""


if __name__ == "__main__":
    main()
