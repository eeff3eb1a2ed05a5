"""README, scripts and code say the same thing."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_short_enough_to_read():
    assert README.count("\n") < 250


def test_every_named_path_exists():
    named = set(
        re.findall(
            r"`((?:llava|training_scripts|recap_scripts|quality_evaluation|training_data_annotation|model_weight|tests)/[\w./-]*)`",
            README,
        )
    )
    assert len(named) > 15
    for name in named:
        if name.startswith("model_weight/") and name != "model_weight/README.md":
            continue  # what the user puts or trains there
        assert (ROOT / name).exists(), name


def test_every_script_is_in_the_readme():
    for folder in ("training_scripts", "recap_scripts", "quality_evaluation/scripts", "training_data_annotation"):
        for script in (ROOT / folder).glob("*.sh"):
            assert script.name in README, script


def test_every_module_command_exists():
    for module in re.findall(r"python -m ([\w.]+)", README):
        if module.split(".")[0] in ("llava", "quality_evaluation", "training_data_annotation"):
            assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module


def test_variables_of_the_readme_and_of_the_scripts_are_the_same():
    scripts = "\n".join(path.read_text() for path in ROOT.rglob("*.sh") if ".venv" not in path.parts)
    read = set(re.findall(r"\$\{([A-Z][A-Z_]+)[:?\-+}]", scripts))
    read |= set(re.findall(r"^rename_variable ([A-Z_]+)", scripts, re.MULTILINE))
    internal = {"BASH_SOURCE", "LAUNCH_VARIABLES", "CONDA_PREFIX", "VIRTUAL_ENV", "PWD"} | {
        name for name in read if name.startswith("SLURM_")
    }
    table = README[README.index("## Variables") :]
    table = table[: table.index("\n## ")]
    listed = set(re.findall(r"`([A-Z][A-Z_]+)`", table))
    assert read - internal - listed == set(), "read by a script, not in the README"
    environment = {"OPENAI_API_KEY"}  # read by the client itself
    assert listed - read - environment == set(), "in the README, read by no script"
