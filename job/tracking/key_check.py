"""Whether W&B can be used online from here; as a process of its own, see job.tracking.process.

Prints a JSON object: ``server`` and either ``user`` or a ``kind``: "none" (no key is
configured) or, with the ``problem``, "key" (it is wrong), "server" (it does not answer, or fails).
"""

from __future__ import annotations

import base64
import json
import netrc
import os
import re
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

TIMEOUT = 5.0  # seconds
KEY = re.compile(r"([^-]+-)?[\w-]{40,}|[\w-]+\.[\w-]+\.[\w-]+")  # as wandb has it; or a web token
QUERY = json.dumps({"query": "query Viewer { viewer { username } }"}).encode()


def main() -> None:
    """Look for a key, at its form, and whether the server takes it."""
    answers = os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    import wandb

    server = str(wandb.setup().settings.base_url).rstrip("/")
    json.dump({"server": server, **_check(server)}, answers)
    answers.flush()
    os._exit(0)


def _check(server: str) -> dict[str, Any]:
    import wandb

    key = os.environ.get("WANDB_API_KEY") or _netrc_key(server)
    if not key:
        if wandb.login(prompt=False, verify=False):
            return {"user": "as W&B knows it"}  # by other means, as an identity token
        return {"kind": "none"}
    if not KEY.fullmatch(key):
        problem = (
            f"the API key of {len(key)} characters is invalid: it has at least 40, of A-Z, 0-9"
        )
        return {"kind": "key", "problem": problem}
    request = urllib.request.Request(f"{server}/graphql", QUERY)
    request.add_header("Content-Type", "application/json")
    name_and_key = base64.b64encode(f"api:{key}".encode()).decode()
    request.add_header("Authorization", f"Basic {name_and_key}")
    rejected = {"kind": "key", "problem": f"{server} does not take the API key"}
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            viewer = (json.load(response).get("data") or {}).get("viewer")
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return rejected
        return {"kind": "server", "problem": f"{server} answers with status {error.code}"}
    except (OSError, ValueError, AttributeError) as error:  # URLError is an OSError
        why = getattr(error, "reason", error)
        return {"kind": "server", "problem": f"{server} cannot be reached: {why}"}
    return {"user": viewer["username"]} if viewer else rejected


def _netrc_key(server: str) -> str | None:
    for name in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        path = os.path.expanduser(name or "")  # noqa: PTH111
        try:
            found = netrc.netrc(path).authenticators(urlsplit(server).netloc)
        except (OSError, netrc.NetrcParseError):
            continue
        if found:
            return found[2]
    return None


if __name__ == "__main__":
    main()
