"""Credentials are hidden, and nothing else is."""

import logging
import os

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mlflow_ssl.secret import HIDDEN, RedactingFormatter, is_secret_name, redact, redacted

TOKEN = "a1B2c3D4e5F6g7H8i9J0"


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in [name for name in os.environ if is_secret_name(name)]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    "name",
    [
        "password",
        "db_password",
        "PGPASSWORD",
        "MLFLOW_TRACKING_PASSWORD",
        "MLFLOW_TRACKING_TOKEN",
        "tracking.token",
        "HF_TOKEN",
        "hub/token",
        "passphrase",
        "client_secret",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_ACCESS_KEY_ID",
        "AWS_SESSION_TOKEN",
        "api_key",
        "apikey",
        "WANDB_API_KEY",
        "private-key",
        "AZURE_STORAGE_CONNECTION_STRING",
        "auth",
        "credentials",
        "GOOGLE_CREDENTIAL",
        "pwd",
    ],
)
def test_names_of_credentials_are_known(name):
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "num_tokens",
        "tokenizer",
        "model.token_size",
        "author",
        "authors",
        "keys",
        "key",
        "monkey",
        "state_key",
        "primary_key",
        "monitor",
        "compass",
        "bypass",
        "pwd_folder",
        "seed",
        "data_path",
    ],
)
def test_other_names_are_not(name):
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("http://me:hunter2@host:5000/x", f"http://{HIDDEN}@host:5000/x"),
        ("postgresql+psycopg2://me:p%40ss@db/mlflow", f"postgresql+psycopg2://{HIDDEN}@db/mlflow"),
        ("redis://:hunter2@host", f"redis://{HIDDEN}@host"),
        (f"https://{TOKEN}@github.com/a/b.git", f"https://{HIDDEN}@github.com/a/b.git"),
        (f"Authorization: Bearer {TOKEN}", f"Authorization: Bearer {HIDDEN}"),
        (f"authorization: basic {TOKEN}==", f"authorization: basic {HIDDEN}"),
        (f"ghp_{TOKEN}", HIDDEN),
        (f"github_pat_{TOKEN}", HIDDEN),
        (f"glpat-{TOKEN}", HIDDEN),
        (f"hf_{TOKEN}", HIDDEN),
        (f"sk-{TOKEN}", HIDDEN),
        (f"dapi{TOKEN}", HIDDEN),
        ("id AKIAIOSFODNN7EXAMPLE.", f"id {HIDDEN}."),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc-DEF_1", HIDDEN),
        ("s3://b/k?X-Amz-Signature=abc123&x=1", f"s3://b/k?X-Amz-Signature={HIDDEN}&x=1"),
        (
            "https://x.blob.core.windows.net/c?sv=1&sig=a%2Fb&se=2",
            f"https://x.blob.core.windows.net/c?sv=1&sig={HIDDEN}&se=2",
        ),
        ("AccountKey=abc/def==;End=1", f"AccountKey={HIDDEN};End=1"),
        ("+tracking.password=hunter2", f"+tracking.password={HIDDEN}"),
        ("+tracking.password='two words', x", f"+tracking.password={HIDDEN}, x"),
        ('api_key="abc"', f"api_key={HIDDEN}"),
        ("a http://u:1@h and http://v:2@g", f"a http://{HIDDEN}@h and http://{HIDDEN}@g"),
    ],
)
def test_shapes_of_credentials_are_hidden_where_they_stand(text, hidden):
    assert redact(text) == hidden
    assert redact(f"before {text} after") == f"before {hidden} after"


ORDINARY = [
    "/data/users@lab/images:v2/a.png",
    "C:\\Users\\me\\images",
    "me@example.org",
    "mail me@example.org: see http://host:5000/#/experiments/1",
    "http://127.0.0.1:5000/#/experiments/1/runs/0123456789abcdef0123456789abcdef?workflowType=machine_learning",
    "sqlite:////home/me/mlflow.db",
    "git@github.com:owner/repository.git",
    "ssh://git@github.com/owner/repository.git",
    "models:/digits@champion",
    "s3://bucket/folder/key",
    "trainer.max_epochs=5",
    "callbacks.model_checkpoint.monitor=val_acc",
    "0123456789abcdef0123456789abcdef",
    "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "vit_base_patch16_clip_224.openai_ft_in12k_in1k",
    "task-sk-learn",
    "basic block",
    "bearer of news",
    "timm/resnet50.a1_in1k",
]


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_texts_come_back_as_they_were(text):
    assert redact(text) == text


@given(st.text(alphabet=st.characters(exclude_characters="=:", codec="utf-8"), max_size=15))
@example("")
@example("num_tokens 5")
def test_short_texts_without_addresses_and_assignments_come_back_as_they_were(text):
    assert redact(text) == text


def test_redacting_again_changes_nothing():
    text = f"http://me:hunter2@host password=abc hf_{TOKEN}"
    assert redact(redact(text)) == redact(text) != text


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_PASSWORD", "MY_TOKEN", "AWS_SECRET_ACCESS_KEY"])
def test_the_values_of_secret_environment_variables_are_hidden_anywhere(monkeypatch, name):
    monkeypatch.setenv(name, "correct horse")
    assert redact("it said: <correct horse>") == f"it said: <{HIDDEN}>"


def test_of_two_environment_values_the_longer_one_is_hidden_whole(monkeypatch):
    monkeypatch.setenv("A_TOKEN", "12345678")
    monkeypatch.setenv("B_TOKEN", "12345678-and-more")
    assert redact("x 12345678-and-more y 12345678") == f"x {HIDDEN} y {HIDDEN}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PWD", "/home/me/images"),
        ("MY_TOKEN", "true"),
        ("MY_TOKEN", ""),
        ("HOME", "somewhere-else"),
        ("AUTHOR", "Ada Lovelace"),
    ],
)
def test_other_environment_values_are_not(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert redact(f"it said: <{value}>") == f"it said: <{value}>"


def test_a_config_is_redacted_at_any_depth_and_nowhere_else():
    config = {
        "core": {"seed": 42, "name": "mine", "output_dir": "/out/me@lab"},
        "tracking": {"uri": "http://me:hunter2@host", "password": "hunter2", "wait": 0.5},
        "callbacks": [{"api_key": "abc", "every": 1}, "http://me:hunter2@host"],
        "hub": {"token": ["one", "two"], "nothing": None, "empty": ""},
        "backbone": {"class_token": True, "num_tokens": 5, "token": None},
    }
    assert redacted(config) == {
        "core": {"seed": 42, "name": "mine", "output_dir": "/out/me@lab"},
        "tracking": {"uri": f"http://{HIDDEN}@host", "password": HIDDEN, "wait": 0.5},
        "callbacks": [{"api_key": HIDDEN, "every": 1}, f"http://{HIDDEN}@host"],
        "hub": {"token": [HIDDEN, HIDDEN], "nothing": None, "empty": ""},
        "backbone": {"class_token": True, "num_tokens": 5, "token": None},
    }
    assert config["tracking"]["password"] == "hunter2"  # the config itself is as it was


def formatted(message, *args, exc_info=None):
    record = logging.LogRecord("a", logging.INFO, "f.py", 1, message, args, exc_info)
    return RedactingFormatter("%(levelname)s %(message)s").format(record)


def test_a_log_line_is_redacted_when_it_is_put_together():
    assert formatted("see %s", "http://me:hunter2@host") == f"INFO see http://{HIDDEN}@host"
    assert formatted("%s%s@host", "http://me:", "hunter2") == f"INFO http://{HIDDEN}@host"


def test_a_traceback_in_a_log_is_redacted():
    words = "http://me:hunter2@host is down"
    with pytest.raises(ConnectionError) as caught:
        raise ConnectionError(words)
    line = formatted("failed", exc_info=caught._excinfo)
    assert "Traceback" in line
    assert line.endswith(f"ConnectionError: http://{HIDDEN}@host is down")
    assert "hunter2" not in line
