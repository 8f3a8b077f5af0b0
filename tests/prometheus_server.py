"""A real Prometheus that scrapes one endpoint, for the tests: `PROMETHEUS` says where one is, see `.ci/prometheus`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import socket
from typing import Any, TypeVar

from tests.support import HANG_SECONDS

T = TypeVar("T")
SCRAPES = """
global: {{scrape_interval: 250ms, scrape_timeout: 250ms}}
scrape_configs:
  - job_name: job
    metrics_path: {path}
    static_configs: [{{targets: ["{host}"]}}]
"""
PROMETHEUS = os.environ.get("PROMETHEUS") or shutil.which("prometheus")
WHY_NOT = "there is no Prometheus: make metrics fetches one, or PROMETHEUS says where one is"


def free_port() -> int:
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def until(ask: Callable[[], T | None], what: Callable[[], str]) -> T:
    """What `ask` gives at last, within the bound."""
    end, pause = time.monotonic() + HANG_SECONDS, threading.Event()
    while (found := ask()) is None:
        assert time.monotonic() < end, what()
        pause.wait(0.1)
    return found


class Server:
    """Asks a Prometheus."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/api/v1/"

    def get(self, path: str, **query: str) -> Any:
        url = f"{self._url}{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=HANG_SECONDS) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{query}: {error.read().decode()}") from error

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Every series that an expression gives now."""
        result: list[dict[str, Any]] = self.get("query", query=expression)["result"]
        return result

    def is_ready(self) -> bool | None:
        try:
            return any(target["health"] == "up" for target in self.get("targets")["activeTargets"]) or None
        except (OSError, AssertionError):
            return None


@contextmanager
def prometheus_of(url: str, folder: Path) -> Iterator[Server]:
    """One that scrapes `url` meanwhile, and has done so."""
    assert PROMETHEUS is not None
    where = urllib.parse.urlsplit(url)
    settings = folder / "prometheus.yml"
    settings.write_text(SCRAPES.format(host=where.netloc, path=where.path), "utf-8")
    port = free_port()
    said = (folder / "prometheus.log").open("w+")
    process = subprocess.Popen(
        [
            PROMETHEUS,
            f"--config.file={settings}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=said,
        stderr=subprocess.STDOUT,
    )
    try:
        server = Server(port)
        until(server.is_ready, lambda: (folder / "prometheus.log").read_text("utf-8")[-3000:])
        yield server
    finally:
        process.terminate()
        process.wait(HANG_SECONDS)
        said.close()
