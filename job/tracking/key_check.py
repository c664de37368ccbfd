"""Check whether W&B can be used online from here: a program, run in a process of its own.

Prints a JSON object: ``server`` and either ``user`` or a ``kind``: "none" (no key is configured)
or, with the ``problem``, "key" (the server rejects it) or "server" (it fails, or does not answer).
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request

TIMEOUT = 5.0  # seconds


def main() -> None:
    """Print the answer; what W&B prints goes to /dev/null, and it finds no terminal to ask on."""
    answers = os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    os.environ["WANDB_MODE"] = "online"  # W&B verifies no key while it is offline
    import wandb

    server = str(wandb.setup().settings.base_url).rstrip("/")
    json.dump({"server": server, **_check(server)}, answers)
    answers.flush()
    os._exit(0)


def _check(server: str) -> dict[str, str]:
    import wandb

    try:
        wandb.login(verify=False)  # without a key there is nothing to ask the server
        if problem := _server_problem(server):
            return {"kind": "server", "problem": problem}
        wandb.login(verify=True)
    except wandb.errors.AuthenticationError as error:
        return {"kind": "key", "problem": str(error)}
    except wandb.errors.UsageError:
        return {"kind": "none"}
    return {"user": wandb.setup()._get_username() or "unknown"}


def _server_problem(server: str) -> str:
    """Return why the server cannot be used, or "".

    Asked beforehand, since W&B raises one kind of error for a server that fails and for a key that
    is rejected.
    """
    try:
        urllib.request.urlopen(f"{server}/graphql", timeout=TIMEOUT).close()
    except urllib.error.HTTPError as error:  # a question without a key is not answered with 200
        return f"{server} answers with status {error.code}" if error.code >= 500 else ""
    except (OSError, ValueError) as error:  # URLError is an OSError
        return f"{server} cannot be reached: {getattr(error, 'reason', error)}"
    return ""


if __name__ == "__main__":
    main()
