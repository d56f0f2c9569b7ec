"""What all example scripts share: --help, Ctrl-C, whole files, one process for each --out."""

from __future__ import annotations

import ast
import importlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

for package in ("flax", "orbax.checkpoint", "gymnasium", "mlxtend", "matplotlib", "tqdm"):
    pytest.importorskip(package)

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
STUDIES = EXAMPLES / "studies"
for folder in (EXAMPLES, STUDIES):
    sys.path.insert(0, str(folder))

files, flags = (importlib.import_module(name) for name in ("files", "flags"))
checkpoints = importlib.import_module("checkpoints")

SCRIPTS = sorted(
    path for folder in (EXAMPLES, STUDIES) for path in folder.glob("*.py") if "\ndef main(" in path.read_text()
)


def test_every_script_helps_with_examples_that_name_it(capsys):
    """All in this process. A script alone takes seconds to import JAX."""
    assert len(SCRIPTS) == 11
    for path in SCRIPTS:
        script = importlib.import_module(path.stem)
        with pytest.raises(SystemExit, match="0"):
            script.main(["--help"])
        printed = capsys.readouterr()
        assert printed.err == ""
        assert "--out" in printed.out
        if path.stem != "mnist":
            assert f"python {path.relative_to(EXAMPLES.parent)} " in " ".join(printed.out.split()), path
        assert f"python {path.relative_to(EXAMPLES.parent)}" in script.__doc__


def test_scripts_import_only_public_names_of_the_library():
    """`jax_ls`, or a module of it that has no underscore and that `jax_ls` or a package re-exports."""
    public = {"jax_ls", "jax_ls.nnx", "jax_ls.plotting"} | {
        f"jax_ls.{name}" for name in importlib.import_module("jax_ls").__all__
    }
    for path in [*EXAMPLES.glob("*.py"), *STUDIES.glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "jax_ls":
                assert node.module in public, (path.name, node.module)
                module = importlib.import_module(node.module)
                names = {alias.name for alias in node.names}
                assert names <= {*module.__all__, "nnx", "plotting"}, (path.name, names)


def test_every_script_watches_for_ctrl_c_before_it_imports_anything_slow():
    for path in SCRIPTS:
        body = ast.parse(path.read_text()).body
        (first,) = [i for i, node in enumerate(body) if isinstance(node, ast.If)][:1]
        imported = {alias.name for node in body[:first] if isinstance(node, ast.Import) for alias in node.names}
        assert imported <= {"os", "signal", "interrupts"}, path.name
        assert "interrupts.end_in_one_line()" in ast.unparse(body[first]) or "signal.signal" in ast.unparse(body[first])


WAITS = """
import interrupts
interrupts.end_in_one_line()
import ctypes, flags
parser = flags.OneLineParser(prog="script.py")
with parser.reporting("; finished trainings stay in --out new"):
    print("ready", flush=True)
    ctypes.CDLL(None).sleep(600)
"""


def test_ctrl_c_ends_a_call_that_does_not_come_back_to_python(tmp_path):
    (tmp_path / "script.py").write_text(WAITS)
    process = subprocess.Popen(
        [sys.executable, "-W", "error", str(tmp_path / "script.py")],
        env=os.environ | {"PYTHONPATH": str(STUDIES)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert error == "\nscript.py: interrupted; finished trainings stay in --out new\n"
    assert process.returncode == 130


def test_ctrl_c_ends_a_study_while_it_computes(tmp_path):
    """In the middle of XLA's work an exception ended some of these processes in a segmentation fault."""
    command = [sys.executable, "-W", "error", str(STUDIES / "noisy_digits.py"), "--seeds", "1", "--epochs", "100000"]
    path = os.pathsep.join(filter(None, (str(EXAMPLES.parent), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [*command, "--train", "200", "--out", str(tmp_path / "new")],
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    # The directory is made after the imports, before the training.
    while not (tmp_path / "new").exists():
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == (
        "",
        f"\nnoisy_digits.py: interrupted; finished trainings stay in --out {tmp_path / 'new'}\n",
    )
    assert process.returncode == 130


@pytest.mark.parametrize("module", [files, checkpoints])
def test_a_file_is_replaced_whole_or_not_at_all(module, tmp_path):
    path = tmp_path / "figures.json"
    path.write_text("before")

    def fails():
        with module.replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(module.InputError, match=r"cannot write .*figures.json: No space left on device"):
        fails()
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("figures.json", "before")]
    with module.replacing(path) as temporary:
        temporary.write_text("after")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("figures.json", "after")]


HOLDS = """
import sys, pathlib
{imports}
with {claim}:
    print("mine", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("imports", "claim", "claim_here"),
    [
        ("import files", "files.claimed(pathlib.Path(sys.argv[1]))", files.claimed),
        (
            "import checkpoints",
            "checkpoints.RunDirectory(pathlib.Path(sys.argv[1]), {}, False)",
            lambda path: checkpoints.RunDirectory(path, {}, False),
        ),
    ],
    ids=["studies", "language_model"],
)
def test_a_second_process_with_the_same_out_is_refused(imports, claim, claim_here, tmp_path):
    program = textwrap.dedent(HOLDS).format(imports=imports, claim=claim)
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(EXAMPLES), str(STUDIES), os.environ.get("PYTHONPATH", "")])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout.readline() == "mine\n"
    with pytest.raises((flags.InputError, checkpoints.InputError), match="another process is writing to --out"):
        claim_here(tmp_path).__enter__()
    # However the other one ends, the directory is free.
    other.kill()
    other.communicate()
    with claim_here(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
