"""The console command, and configs and manifests by name from any folder."""

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import cdp
from cdp.errors import ConfigError
from pipelines import command, packaged
from pipelines.invocation import format_command
from pipelines.packaged import find_config, find_manifest

ROOT = Path(__file__).parents[1]


def test_help_lists_every_command(capsys):
    assert command.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert "usage: cdp COMMAND" in printed
    assert all(f"\n  {name} " in printed for name in command.COMMANDS)


def test_no_command_and_an_unknown_one_are_mistakes(capsys):
    assert command.main([]) == 2
    assert command.main(["walk"]) == 2
    assert "no command 'walk'; choose one of: demo, run, check, review" in capsys.readouterr().err


def test_the_version_is_printed(capsys):
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out == f"cdp {cdp.__version__}\n"


@pytest.mark.parametrize("name", command.COMMANDS)
def test_every_command_has_options_and_help(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/cdp", name])
    with pytest.raises(SystemExit) as ended:
        command.main([name, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: cdp ")


def test_a_command_takes_the_arguments_and_gives_the_exit_code(monkeypatch):
    for name, (module, before, _) in command.COMMANDS.items():
        given = []
        monkeypatch.setattr(
            import_module(module), "main", lambda a, into=given: into.append(a) or 7
        )
        assert command.main([name, "--some", "option"]) == 7
        assert given == [[*before, "--some", "option"]]


def test_an_interrupted_command_is_one_message_and_130(monkeypatch, capsys):
    def interrupt(arguments):
        raise KeyboardInterrupt

    for name, (module, _, _) in command.COMMANDS.items():
        monkeypatch.setattr(import_module(module), "main", interrupt)
        assert command.main([name]) == 130
        assert capsys.readouterr().err == f"\ninterrupted: cdp {name} did not end\n"
    monkeypatch.setattr(command, "import_module", interrupt)
    assert command.main(["check"]) == 130


def test_the_script_of_the_package_is_this_command():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
    assert scripts == {"cdp": "pipelines.command:main"}


def test_help_and_version_import_no_library():
    code = (
        "import sys; from pipelines import command; command.main(['--help']); "
        "print([m for m in ('numpy', 'torch', 'pyarrow', 'dask') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("\n[]\n")


@pytest.mark.parametrize(
    ("started", "expected"),
    [
        ("/home/ada/.venv/bin/cdp", "cdp run --stage all 'a b'"),
        ("/src/pipelines/run.py", "python -m pipelines.run --stage all 'a b'"),
        ("", "python -m pipelines.run --stage all 'a b'"),
    ],
)
def test_a_command_is_named_as_the_user_started(monkeypatch, started, expected):
    monkeypatch.setattr(sys, "argv", [started])
    assert format_command("run", "--stage", "all", "a b") == expected


@pytest.mark.torch
def test_a_failure_names_the_command_that_resumes(monkeypatch, tiny, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/cdp"])
    arguments = ["--config", str(tiny), "--runs-dir", str(tmp_path), "--stage", "knn"]
    assert command.main(["run", *arguments]) == 1
    assert "has not published" in capsys.readouterr().err
    given = [*arguments[:4], "--scheduler", "tcp://127.0.0.1:9"]
    assert command.main(["run", *given]) == 1
    assert f"to resume once that is fixed: cdp run {' '.join(given)}" in capsys.readouterr().err


# ----------------------------------------------------------------------------------- by name


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, text="{}"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_the_package_holds_the_configs_and_manifests_of_the_repository():
    for folder in (packaged.CONFIGS, packaged.MANIFESTS):
        names = sorted(path.stem for path in (ROOT / folder).glob("*.yaml"))
        assert names == packaged.list_packaged(folder)
        for name in names:
            text = (packaged.PACKAGE / folder / f"{name}.yaml").read_text("utf-8")
            assert text == (ROOT / folder / f"{name}.yaml").read_text("utf-8")


def test_a_name_is_found_from_any_folder(elsewhere):
    for name in packaged.list_packaged(packaged.CONFIGS):
        config = find_config(name)
        assert config.stem == name
        data = yaml.safe_load(config.read_text("utf-8"))["data"]
        assert find_manifest(data, config).is_file()
    assert find_manifest("synthetic").is_file()


def test_what_lies_in_the_working_folder_wins(elsewhere):
    write(elsewhere / "configs" / "default.yaml")
    assert find_config("default").resolve() == elsewhere / "configs" / "default.yaml"
    write(elsewhere / "default")
    assert find_config("default").resolve() == elsewhere / "default"
    write(elsewhere / "data_manifests" / "synthetic.yaml")
    expected = elsewhere / "data_manifests" / "synthetic.yaml"
    assert find_manifest("synthetic").resolve() == expected


def test_a_manifest_is_found_beside_its_config(elsewhere, tmp_path_factory):
    project = tmp_path_factory.mktemp("project")
    config = write(project / "configs" / "mine.yaml")
    mine = write(project / "data_manifests" / "mine.yaml")
    assert find_manifest("mine", config) == mine
    assert find_manifest("data_manifests/mine.yaml", config) == mine
    assert find_manifest("synthetic", config).parent == packaged.PACKAGE / packaged.MANIFESTS
    near = write(project / "configs" / "near.yaml")
    assert find_manifest("near.yaml", config) == near
    with pytest.raises(ConfigError, match=f"no file far.yaml in .*: .*{project / 'configs'}, "):
        find_manifest("far.yaml", config)


def test_a_path_is_taken_as_it_is(elsewhere):
    mine = write(elsewhere / "mine.yaml")
    assert find_config(mine) == mine
    assert find_config("configs/default.yaml") == Path("configs/default.yaml")


def test_an_unknown_name_lists_the_known_ones(elsewhere):
    with pytest.raises(ConfigError, match=r"no configs/nothing\.yaml .* default, .*lfw"):
        find_config("nothing")
    with pytest.raises(ConfigError, match=r"no data_manifests/nothing\.yaml .* synthetic"):
        find_manifest("nothing")


def test_the_default_run_is_planned_in_any_folder(elsewhere, capsys):
    assert command.main(["run", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("ingest    run   not published yet")


def test_settings_may_stand_before_and_after_options(elsewhere, capsys):
    assert command.main(["run", "seed=1", "--dry-run", "knn.k=15"]) == 0
    assert capsys.readouterr().out.startswith("ingest    run   not published yet")
