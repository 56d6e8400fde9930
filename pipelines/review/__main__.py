"""The review command: `cdp review --run runs/x` serves a page to correct clusters.

The contract:
- It listens on loopback unless `--host` names another address. The URL contains a token; without it
  every response is 404. Requests with another Host or from another page are rejected.
- No request opens a file: pages, faces and clusters are served from memory, so no path can lead out
  of the run.
- Each decision is fsynced to `corrections.jsonl` before the browser gets its response; the next run
  applies it. See `pipelines.decisions`.
"""

from __future__ import annotations

import argparse
import asyncio
import getpass
import hmac
import ipaddress
import json
import re
import secrets
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from tornado.httpserver import HTTPServer
from tornado.web import Application, HTTPError, RequestHandler

from cdp.errors import CdpError, ConfigError, DataError
from pipelines.decisions import FILE_NAME, GROUPS, ContradictionError
from pipelines.invocation import format_command
from pipelines.pages import read_page, render
from pipelines.results import open_run
from pipelines.review.session import ReviewSession

ASSETS = {
    "page.css": "text/css",
    "review.css": "text/css",
    "faces.js": "text/javascript",
    "review.js": "text/javascript",
}
POLICY = (
    "default-src 'none'; img-src 'self' data:; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
OLD_KEY = (
    "This address has no key, or one of an earlier start. Open the address that the command "
    "printed last"
)
BODY_LIMIT = 4 << 20
"""Most bytes of one request; a decision lists images by sample id."""


class _Handler(RequestHandler):
    """The base of all handlers: checks of token, host and origin, security headers."""

    def initialize(self, session: ReviewSession, token: str, hosts: frozenset[str]) -> None:
        self.session, self.token, self.hosts = session, token, hosts

    def set_default_headers(self) -> None:
        self.set_header("Content-Security-Policy", POLICY)
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Referrer-Policy", "no-referrer")
        self.set_header("Cross-Origin-Resource-Policy", "same-origin")
        self.set_header("Cache-Control", "no-store")
        self.clear_header("Server")

    def prepare(self) -> None:
        # Against DNS rebinding: a foreign name that resolves to this machine is rejected.
        host = self.request.headers.get("Host", "")
        if host.lower() not in self.hosts:
            raise HTTPError(403)
        given = self.path_args[0] if self.path_args else ""
        if not hmac.compare_digest(str(given).encode(), self.token.encode()):
            raise HTTPError(404, reason=OLD_KEY)
        site = self.request.headers.get("Sec-Fetch-Site", "none")
        if site not in ("none", "same-origin"):
            raise HTTPError(403)
        if self.request.method == "POST":
            self._require_own_page(host)

    def _require_own_page(self, host: str) -> None:
        if self.request.headers.get("Origin") != f"http://{host}":
            raise HTTPError(403)
        kind = self.request.headers.get("Content-Type", "").partition(";")[0].strip()
        if kind != "application/json":
            raise HTTPError(415)

    def write_error(self, status_code: int, **given: Any) -> None:
        error = given.get("exc_info", (None, None))[1]
        known = isinstance(error, CdpError)
        if self._reason == OLD_KEY and "text/html" in self.request.headers.get("Accept", ""):
            self.set_header("Content-Type", "text/plain; charset=utf-8")
            self.finish(f"{OLD_KEY}.\n")
            return
        self.set_header("Content-Type", "application/json; charset=utf-8")
        self.finish(json.dumps(_describe_error(error) if known else {"error": self._reason}))

    def log_exception(self, kind: Any, value: Any, trace: Any) -> None:
        if not isinstance(value, CdpError | HTTPError):
            super().log_exception(kind, value, trace)

    def answer(self, value: Any) -> None:
        self.set_header("Content-Type", "application/json; charset=utf-8")
        self.finish(json.dumps(value))

    def body(self) -> dict[str, Any]:
        try:
            value = json.loads(self.request.body)
        except (ValueError, RecursionError):
            raise HTTPError(400, reason="not JSON") from None
        if not isinstance(value, dict):
            raise HTTPError(400, reason="expected an object")
        return value


class _Index(_Handler):
    def get(self, _token: str) -> None:
        self.finish(render("review.html", run=self.session.run.directory.name))


class _Asset(_Handler):
    def get(self, _token: str, name: str) -> None:
        if name not in ASSETS:
            raise HTTPError(404)
        self.set_header("Content-Type", f"{ASSETS[name]}; charset=utf-8")
        self.finish(read_page(name))


class _Face(_Handler):
    def get(self, _token: str, sample: str) -> None:
        self.send(self.session.find_picture(int(sample)))

    def send(self, picture: bytes | None) -> None:
        """A picture, or 404."""
        if picture is None:
            raise HTTPError(404)
        self.set_header("Content-Type", "image/webp")
        self.set_header("Cache-Control", "private, max-age=3600")
        self.finish(picture)


class _RejectedFace(_Face):
    def get(self, _token: str, number: str) -> None:
        self.send(self.session.rejected.pictures.get(int(number)))


class _Question(_Handler):
    """The next question, and the progress of the review."""

    def get(self, _token: str) -> None:
        session = self.session
        session.refresh()
        questions = session.questions
        first = session.describe_question(questions[0]) if questions else None
        self.answer({"question": first, "progress": session.describe_progress()})


class _Skip(_Handler):
    """Skips the question that a page shows, by its name: another page may show another one."""

    def post(self, _token: str) -> None:
        name = self.body().get("name")
        try:
            self.session.skip(name if isinstance(name, list) else [])
        except CdpError as error:
            self.set_status(400)
            self.answer(_describe_error(error))
            return
        self.answer({})


class _Clusters(_Handler):
    def get(self, _token: str) -> None:
        self.session.refresh()
        order = self.get_query_argument("order", "size")
        offset = self.get_query_argument("offset", "0")
        if order not in ("size", "doubt") or not offset.isdigit():
            raise HTTPError(400)
        text = self.get_query_argument("text", "")
        sizes = re.fullmatch(r"([0-9]{1,9})-([0-9]{1,9})", self.get_query_argument("sizes", ""))
        self.answer(
            self.session.list_clusters(
                order=order,
                text=text,
                sizes=None if sizes is None else (int(sizes[1]), int(sizes[2])),
                offset=int(offset),
            )
        )


class _Neighbours(_Handler):
    def get(self, _token: str, sample: str) -> None:
        self.session.refresh()
        self.answer({"neighbours": self.session.describe_neighbours(int(sample))})


class _LeftOut(_Handler):
    """One page of the images without a label, or of the rejected files."""

    def get(self, _token: str, which: str) -> None:
        self.session.refresh()
        offset = self.get_query_argument("offset", "0")
        if not offset.isdigit():
            raise HTTPError(400)
        kind, text = (self.get_query_argument(name, "") for name in ("kind", "text"))
        if which == "rejected":
            self.answer(self.session.rejected.list_page(kind, text, int(offset)))
        else:
            self.answer(self.session.list_unlabelled(kind=kind, text=text, offset=int(offset)))


class _Cluster(_Handler):
    def get(self, _token: str, label: str) -> None:
        self.session.refresh()
        try:
            self.answer(self.session.describe_cluster(int(label)))
        except CdpError as error:
            self.set_status(404)
            self.answer(_describe_error(error))


class _Parts(_Handler):
    """A stricter cut of the images that a page names."""

    def post(self, _token: str) -> None:
        self.session.refresh()
        try:
            (ids,) = _parse_groups([self.body().get("ids")])
            self.answer(self.session.propose_parts(ids))
        except CdpError as error:
            self.set_status(400)
            self.answer(_describe_error(error))


class _Decisions(_Handler):
    def get(self, _token: str) -> None:
        self.session.refresh()
        self.answer({"decisions": self.session.list_decisions()})

    def post(self, _token: str) -> None:
        value = self.body()
        session = self.session
        session.refresh()
        try:
            if isinstance(value.get("who"), str):
                session.name_reviewer(value["who"])
            if value.get("action") == "parts":
                made = session.split_parts(_parse_groups(value.get("groups")))
                self.answer({"numbers": [each.number for each in made], "action": "parts"})
                return
            if value.get("action") == "undo":
                if type(value.get("number")) is not int:
                    raise HTTPError(400, reason="expected the number of a decision")
                decision = session.undo(value["number"])
            elif value.get("action") in GROUPS:
                identity = value.get("identity")
                if identity is not None and not isinstance(identity, str):
                    raise HTTPError(400, reason="expected the name of a person")
                groups = _parse_groups(value.get("groups"))
                decision = session.decide(value["action"], groups, identity)
            else:
                raise HTTPError(400, reason="no such action")
        except CdpError as error:
            self.set_status(409 if isinstance(error, ContradictionError) else 400)
            self.answer(_describe_error(error))
            return
        self.answer({"number": decision.number, "action": decision.action})


def _parse_groups(value: Any) -> list[list[int]]:
    """Groups of sample ids as a page sends them; DataError for anything else."""
    if not isinstance(value, list) or not all(
        isinstance(group, list) and all(type(each) is int for each in group) for group in value
    ):
        raise DataError("expected groups as lists of sample ids")
    return value


def _describe_error(error: Exception) -> dict[str, Any]:
    """An error as JSON for the page."""
    return {"error": str(error), "number": getattr(error, "number", None)}


def make_application(session: ReviewSession, token: str, hosts: frozenset[str]) -> Application:
    """The routes; every one begins with the token."""
    given = {"session": session, "token": token, "hosts": hosts}
    start = r"/([A-Za-z0-9_-]+)"
    return Application(
        [
            (rf"{start}/", _Index, given),
            (rf"{start}/asset/([a-z.]+)", _Asset, given),
            (rf"{start}/face/([0-9]{{1,18}})", _Face, given),
            (rf"{start}/rejected/([0-9]{{1,18}})", _RejectedFace, given),
            (rf"{start}/neighbours/([0-9]{{1,18}})", _Neighbours, given),
            (rf"{start}/left-out/(unlabelled|rejected)", _LeftOut, given),
            (rf"{start}/question", _Question, given),
            (rf"{start}/skip", _Skip, given),
            (rf"{start}/clusters", _Clusters, given),
            (rf"{start}/cluster/([0-9]{{1,18}})", _Cluster, given),
            (rf"{start}/parts", _Parts, given),
            (rf"{start}/decisions", _Decisions, given),
        ],
        default_handler_class=_Handler,
        default_handler_args=given,
        log_function=lambda handler: None,  # the URLs contain the token
    )


# --------------------------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    """The options, each with what it does."""
    parser = argparse.ArgumentParser(
        prog=format_command("review"),
        description="Review and correct the clusters of a run in a browser.",
    )
    add = parser.add_argument
    add("--run", type=Path, required=True, metavar="DIR", help="a finished run, e.g. runs/default")
    add("--reviewer", metavar="NAME", help="recorded with each decision (default: the login name)")
    add("--port", type=int, default=0, metavar="N", help="default: any free port")
    add("--host", default="127.0.0.1", metavar="ADDRESS",
        help="default: 127.0.0.1, this machine only")  # fmt: skip
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Serve until interrupted; return the exit code."""
    options = build_parser().parse_args(arguments)
    try:
        reviewer = options.reviewer or _find_user()
        session = ReviewSession(open_run(options.run), reviewer)
        asyncio.run(_serve(session, options.host, options.port))
    except CdpError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    made = len(session.decisions)
    print(f"\n{made} decisions are kept in {options.run / FILE_NAME}. To apply them:")
    print(f"    {session.run.compose_command()}")
    return 0


def _find_user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "somebody"


async def _serve(session: ReviewSession, host: str, port: int) -> None:
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port: expected a number from 0 to 65535, got {port}")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error}. Choose another --port, or leave it out"
        ) from error
    listening.setblocking(False)
    port = listening.getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    names = {shown, "127.0.0.1", "localhost", "[::1]"}
    hosts = frozenset(f"{name}:{port}" for name in names)
    token = secrets.token_urlsafe(24)
    server = HTTPServer(make_application(session, token, hosts), max_body_size=BODY_LIMIT)
    server.add_socket(listening)
    if not _is_loopback(host):
        print(f"warning: {host} can be reached from other machines; keep the address below secret")
    print(f"review of {session.run.directory} at\n    http://{shown}:{port}/{token}/", flush=True)
    print("Ctrl-C ends it; every decision is saved as it is made.", flush=True)
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    await stopped.wait()
    server.stop()
    await server.close_all_connections()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    sys.exit(main())
