"""Words to overrides, and the exits."""

import subprocess
import sys

import pytest

from mlflow_ssl.cli import main, to_overrides
from mlflow_ssl.config import compose_config
from mlflow_ssl.errors import InputError


@pytest.mark.parametrize(
    ("words", "overrides"),
    [
        (["--experiment", "byol"], ["experiment=byol"]),
        (["--data_path", "", "--overrides", ""], []),
        (["--trainer.max_epochs", "5"], ["trainer.max_epochs=5"]),
        (["--trainer.max_epochs=5"], ["trainer.max_epochs=5"]),
        (["--overrides", '+a=1 ~b "c=two words"'], ["+a=1", "~b", "c=two words"]),
        (["--core.tag", "two words"], ["core.tag=two words"]),
        (["--core.tag", "[x,y]"], ["core.tag=[x,y]"]),
        (["trainer=lightning_cpu", "", "+x=1"], ["trainer=lightning_cpu", "+x=1"]),
    ],
)
def test_words_become_overrides(words, overrides):
    assert to_overrides(words) == overrides


@pytest.mark.parametrize(
    "path", ["/a/b c", "/a/(1), b=2", "/it's", "C:\\pictures\\", "/a\\'b", "/ünï/{x}", "/a,b", "[1,2]", "null"]
)
def test_a_data_path_may_hold_anything(path):
    config = compose_config(to_overrides(["--data_path", path]))
    assert config.datamodule.data_path == path


@pytest.mark.parametrize(("value", "read"), [("[x,y]", ["x", "y"]), ("1e-3", 1e-3), ("false", False), ("a, b", "a, b")])
def test_other_values_are_read_as_hydra_reads_them(value, read):
    assert compose_config(to_overrides(["--core.tag", value])).core.tag == read


def test_a_key_without_a_value_is_refused():
    with pytest.raises(InputError, match="--seed must have a value"):
        to_overrides(["--seed"])


def test_an_open_quote_is_refused():
    with pytest.raises(InputError, match="overrides must be words as a shell reads them: No closing quotation"):
        to_overrides(["--overrides", "'a"])


def test_help_names_the_experiments(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert "\n  byol\n" in printed
    assert "\n  base/ssl/byol\n" in printed


@pytest.mark.parametrize("words", [["--help"], ["experiment=nonsense"]])
def test_help_and_mistakes_answer_without_importing_torch_or_mlflow(words):
    code = (
        "import sys; from mlflow_ssl.cli import main; main(sys.argv[1:]); "
        "sys.exit(sum(name in sys.modules for name in ('torch', 'mlflow', 'pytorch_lightning', 'timm')))"
    )
    assert subprocess.run([sys.executable, "-c", code, *words], capture_output=True, check=False).returncode == 0
