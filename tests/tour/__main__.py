"""`make tour`: the tours, each with a client freshly installed, against one service on a tiny checkpoint
that takes images.

Needs PyPI, and npm for Node's client; what is missing is said, and is a failure.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fixtures.service import running_service, service_settings
from tests.seeing import SEEING
from wicore.queue.embedded import EmbeddedValkey

TOURS = Path(__file__).parent
PYTHON = {
    "openai": "openai_python.py",
    "openai==2.8.1": "openai_python.py",  # of November 2025, a year older
    "litellm": "litellm_python.py",
    "langchain-openai": "langchain_python.py",
}
"""What to install, and the tour to run with it."""


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="wicore-") as name:
        folder = Path(name)
        valkey = EmbeddedValkey(folder / "valkey")
        valkey.start()
        try:
            settings = service_settings(valkey.url, "tour", model__path=str(SEEING), model__name="tiny")
            with running_service(settings):
                to = [f"http://127.0.0.1:{settings.api.port}/v1", "tiny"]
                failed = [what for what in PYTHON if not python_tour(folder, what, to)]
                failed += [] if node_tour(folder, to) else ["openai for node"]
        finally:
            valkey.stop()
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def python_tour(folder: Path, what: str, to: list[str]) -> bool:
    """Install `what` into an environment of its own, and run its tour there."""
    print(f"\n== {what}", flush=True)
    environment = folder / f"venv-{what}"
    install = [environment / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check", what]
    return (
        succeeds([sys.executable, "-m", "venv", environment], folder)
        and succeeds(install, folder)
        and succeeds([environment / "bin" / "python", TOURS / PYTHON[what], *to], folder)
    )


def node_tour(folder: Path, to: list[str]) -> bool:
    print("\n== openai for node", flush=True)
    (folder / "package.json").write_text("{}")
    return succeeds(["npm", "install", "--no-audit", "--no-fund", "--silent", "openai"], folder) and succeeds(
        ["node", TOURS / "openai_node.mjs", *to], folder
    )


def succeeds(command: list[str | Path], folder: Path) -> bool:
    try:
        return subprocess.run(command, cwd=folder, check=False).returncode == 0
    except FileNotFoundError:
        print(f"{command[0]} is not installed")
        return False


if __name__ == "__main__":
    main()
