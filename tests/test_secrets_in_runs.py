"""No credential of the environment, the tracking address or a word reaches anything that a run leaves behind."""

import mlflow
import pytest
from servers import running_server
from training import train

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.slow]

ENVIRONMENT = {
    "MLFLOW_TRACKING_PASSWORD": "correct-horse-battery",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCY",
    "HF_TOKEN": "hf_abcdefghijklmnopqrstuvwx",
    "DATABASE_URL": "postgresql://me:tr0ub4dor@host/db",
}
USER, PASSWORD = "jane", "s3cr3t-of-the-address"
WORD = "ghp_0123456789abcdefghijklmnopqrstuvwxyz"
SECRETS = [*ENVIRONMENT.values(), "tr0ub4dor", PASSWORD, WORD]


@pytest.fixture(scope="module")
def server(tmp_path_factory, migrated_store):
    with running_server(tmp_path_factory.mktemp("server"), migrated_store) as server:
        yield server


def assert_clean(content, where):
    for secret in SECRETS:
        assert secret.encode() not in content, f"{secret} in {where}"


def test_a_run_leaves_no_credential_anywhere(server, image_folder, tmp_path, monkeypatch, capfdbinary):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    uri = server.uri.replace("://", f"://{USER}:{PASSWORD}@")
    words = [f"tracking.uri={uri}", f"core.tag={WORD}", "core.name=secrets"]
    try:
        assert train(image_folder({"a": 20, "b": 20}), *words) == 0
    finally:
        mlflow.set_tracking_uri(None)
    printed = capfdbinary.readouterr()
    assert_clean(printed.out, "stdout")
    assert_clean(printed.err, "stderr")

    experiment = server.client.get_experiment_by_name("secrets")
    (run,) = server.client.search_runs([experiment.experiment_id])
    assert run.data.params["core.tag"] == "***"
    assert_clean(repr(run.to_dictionary()).encode(), "the run")
    kept = [file for file in (tmp_path / "here").rglob("*") if file.is_file()]
    sent = [file for file in (server.folder / "files").rglob("*") if file.is_file()]
    for name in ("main.log", "config_resolved.yaml", "overrides.yaml"):
        assert [file for file in sent if file.name == name], name
    assert [file for file in kept if file.name == "run.json"]
    for file in [*kept, *sent, server.folder / "mlflow.db"]:
        assert_clean(file.read_bytes(), file)
