"""The house: its public names, which way imports run, and examples that run."""

import ast
import doctest
import importlib
import inspect
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_ls

PACKAGE = pathlib.Path(jax_ls.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
ROOMS = sorted({path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES})

CONTRACT = {
    *["Target", "OneHot", "Uniform", "Dense", "Rows", "Sparse"],
    *["smooth", "smooth_labels", "smooth_binary_labels"],
    *["cross_entropy", "smoothed_cross_entropy", "kl_divergence", "sigmoid_cross_entropy", "with_label_smoothing"],
    *["focal_loss", "poly_loss", "logit_norm_loss", "bi_tempered_loss", "asymmetric_loss"],
    *["smoothed_ctc_loss", "mixing"],
    *["mean", "reduce"],
}

# The rooms of the house: modules of the core, and packages, each one room. A room may import those in its row.
CORE = "checks fences class_axis algebra targets"
MAY_IMPORT = {
    "checks": "",
    "fences": "",
    "running_sums": "fences",
    "class_axis": "checks fences",
    "algebra": "checks class_axis",
    "targets": "checks class_axis algebra",
    "tangents": "fences",
    "row_sums": "fences class_axis tangents",
    "term_sums": "fences class_axis row_sums tangents",
    "logits": f"{CORE} row_sums term_sums",
    "smoothing": CORE,
    "reductions": "checks class_axis",
    "losses": f"{CORE} logits smoothing reductions",
    "variants": f"{CORE} logits smoothing losses tangents",
    "sequences": f"{CORE} losses smoothing",
    "mixing": "checks class_axis targets",
    "linear": f"{CORE} row_sums logits smoothing losses reductions",
    "schedules": "checks",
    "priors": CORE,
    "values": CORE,
    "sweeps": "checks",
    "online": f"{CORE} logits reductions running_sums",
    "adaptive": f"{CORE} logits reductions",
    "penalties": f"{CORE} logits smoothing tangents",
    "noise": f"{CORE} logits smoothing",
    "calibration": f"{CORE} logits losses reductions running_sums",
    "preferences": f"{CORE} smoothing losses linear",
    "compat": f"{CORE} smoothing reductions losses",
    "plotting": f"{CORE} calibration sweeps",
    "nnx": f"{CORE} losses adaptive online calibration",
}

SUBMODULES = [name for name in jax_ls.__all__ if inspect.ismodule(getattr(jax_ls, name))]
OPTIONAL = ["nnx", "plotting"]


def public_names(module):
    namespace = vars(importlib.import_module(f"jax_ls.{module}"))
    return [f"{module}.{name}" for name in namespace["__all__"] if callable(namespace[name])]


PUBLIC = [name for name in jax_ls.__all__ if name not in SUBMODULES]
PUBLIC += [name for module in [*SUBMODULES, *OPTIONAL] for name in public_names(module)]


def named(path):
    """The thing of this name, of the package or a submodule."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(f"jax_ls.{module}") if module else jax_ls, name)


def dotted(path):
    """jax_ls/values/support.py -> values.support; jax_ls/values/__init__.py -> values."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = [dotted(path) for path in FILES]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from [node.module] if node.module != "jax_ls" else [f"jax_ls.{name.name}" for name in node.names]
            assert node.level == 0, "imports are absolute"
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def test_the_contract_is_public_and_nothing_private_is():
    assert set(jax_ls.__all__) >= CONTRACT
    assert list(jax_ls.__all__) == sorted(jax_ls.__all__)
    assert all(hasattr(jax_ls, name) for name in jax_ls.__all__)
    assert {name for name in vars(jax_ls) if not name.startswith("_")} <= {*jax_ls.__all__, *ROOMS}


def test_submodules_are_public():
    expected = {"adaptive", "calibration", "noise", "online", "penalties", "preferences", "priors", "schedules"}
    expected |= {"compat", "sweeps", "values"}
    assert set(SUBMODULES) >= expected
    for name in ("targets", "smoothing", "losses", "reductions"):
        module = importlib.import_module(f"jax_ls.{name}")
        assert any(getattr(module, public, None) is getattr(jax_ls, public) for public in jax_ls.__all__)


def test_dir_shows_what_users_may_type():
    assert {name for name in dir(jax_ls) if not name.startswith("_")} == {*jax_ls.__all__, *OPTIONAL}


def test_nnx_and_plotting_load_on_first_use():
    program = "import sys, jax_ls; print(*{'jax_ls.nnx', 'jax_ls.plotting', 'flax', 'matplotlib'} & set(sys.modules))"
    loaded = f"{program}; print(jax_ls.plotting.__name__, jax_ls.nnx.__name__)"
    run = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert run.stdout.split("\n") == ["", "jax_ls.plotting jax_ls.nnx", ""]


def test_without_flax_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "flax", None)
    monkeypatch.delitem(sys.modules, "jax_ls.nnx", raising=False)
    monkeypatch.delattr(jax_ls, "nnx", raising=False)
    with pytest.raises(ImportError, match=r'pip install "jax_ls\[flax\]"'):
        _ = jax_ls.nnx


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").exists()


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_imports_run_one_way(path):
    room = dotted(path).split(".")[0]
    used = {name.split(".")[1] for name in imports(path) if name.startswith("jax_ls.")}
    assert used <= {room, *MAY_IMPORT[room].split()}, f"{room} imports {used - set(MAY_IMPORT[room].split())}"


def test_a_room_knows_only_rooms_above_it():
    rooms = list(MAY_IMPORT)
    assert sorted(rooms) == ROOMS
    for place, room in enumerate(rooms):
        assert set(MAY_IMPORT[room].split()) <= set(rooms[:place])


def test_no_room_for_everything():
    assert not {"utils", "util", "misc", "common", "helpers", "_src"} & {path.stem for path in FILES}


# Read through their callers: no name of theirs is for users.
INTERNAL = {"checks", "class_axis", "fences"}


@pytest.mark.parametrize("module", [name for name in MODULES if name not in INTERNAL and "._" not in name])
def test_public_modules_list_their_names(module):
    module = importlib.import_module(f"jax_ls.{module}")
    assert list(module.__all__) == sorted(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize("package", sorted({path.parent for path in FILES} - {PACKAGE}), ids=dotted)
def test_a_package_offers_names_of_its_own_files(package):
    """What users type is `jax_ls.package.name`; the file says what is inside."""
    files = [importlib.import_module(f"jax_ls.{dotted(path)}") for path in package.glob("[a-z]*.py")]
    names = {name: getattr(file, name) for file in files for name in file.__all__}
    offered = importlib.import_module(f"jax_ls.{dotted(package)}")
    assert all(names[name] is getattr(offered, name) for name in offered.__all__)


@pytest.mark.parametrize("module", ["__init__", *MODULES])
def test_modules_say_what_they_are(module):
    assert importlib.import_module("jax_ls" if module == "__init__" else f"jax_ls.{module}").__doc__


SECTIONS = {"function": ("Args:", "Returns:", "Example:"), "class": ("Example:",)}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_documented(name):
    thing = named(name)
    assert len(thing.__doc__.splitlines()) <= 40
    for section in SECTIONS["class" if isinstance(thing, type) else "function"]:
        assert section in thing.__doc__, f"{name} has no {section}"


class Examples(doctest.DocTestFinder):
    """Finds the examples of wrapped functions too, whose globals are those of another module."""

    def _from_module(self, module, thing):
        return super()._from_module(module, inspect.unwrap(thing) if callable(thing) else thing)


class ToSixDigits(doctest.OutputChecker):
    """The text must be the same, numbers within what float32 holds: XLA rounds the last digit as it likes."""

    number = re.compile(r"-?\d+\.\d*(?:e[+-]?\d+)?")

    def check_output(self, want, got, optionflags):
        texts = [" ".join(self.number.sub("#", text).split()) for text in (want, got)]
        numbers = [[float(x) for x in self.number.findall(text)] for text in (want, got)]
        return texts[0] == texts[1] and np.allclose(*numbers, rtol=2e-6, atol=1e-9)


def examples(thing, name, recurse=False):
    """In a namespace of what a user has imported: the public names, jax, jnp, np and optax."""
    namespace = {public: getattr(jax_ls, public) for public in jax_ls.__all__}
    namespace |= {"jax_ls": jax_ls, "jax": jax, "jnp": jnp, "np": np, "optax": optax}
    return Examples(recurse=recurse).find(thing, name, globs=namespace)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_an_example(name):
    assert sum(len(test.examples) for test in examples(named(name), name)) > 0


WITH_EXAMPLES = [name for name, path in zip(MODULES, FILES, strict=True) if ">>> " in path.read_text()]


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_run(module):
    """All of a file in one test, those of methods too, for they share what is compiled; the report has their names."""
    report = []
    for test in examples(importlib.import_module(f"jax_ls.{module}"), module, recurse=True):
        doctest.DocTestRunner(checker=ToSixDigits(), verbose=False).run(test, out=report.append)
    assert not report, "".join(report)


def test_the_checker_of_examples_sees_a_wrong_digit():
    same = ToSixDigits().check_output
    assert same("[0.6327, 1.8341]", "[0.63269997, 1.8341]", 0)
    assert not same("[0.6327, 1.8341]", "[0.6328, 1.8341]", 0)
    assert not same("[3.0]", "[3.0, 1.0]", 0)
    assert not same("Array(True)", "Array(False)", 0)


def public_callables():
    for module in MODULES:
        for name, thing in vars(importlib.import_module(f"jax_ls.{module}")).items():
            own = getattr(thing, "__module__", None) == f"jax_ls.{module}"
            if own and callable(thing) and not name.startswith("_"):
                yield pytest.param(thing, id=f"{module}.{name}")


@pytest.mark.parametrize("thing", list(public_callables()))
def test_everything_without_an_underscore_has_a_docstring(thing):
    assert thing.__doc__
    assert not thing.__doc__.startswith(f"{thing.__name__}("), "a dataclass wrote its own"


SHARED = {"where", "class_where", "axis", "class_axis_name"}
LABELLED = SHARED | {"ignore_index", "z_loss"}

# What one loss has, all losses have. Each row lacks what its module says that it lacks, and why.
OPTIONS = {
    "cross_entropy": LABELLED | {"class_weights"},
    "kl_divergence": LABELLED | {"class_weights"},
    "smoothed_cross_entropy": LABELLED
    | {"class_weights", "prior", "spread", "batch_axis_name", "reduction", "relative", "return_parts"},
    "linear_cross_entropy": (
        LABELLED | {"class_weights", "prior", "spread", "batch_axis_name", "relative", "return_parts"}
    )
    - {"axis"},
    "sigmoid_cross_entropy": {"where", "ignore_index", "class_weights"},
    **{f"noise.{name}": LABELLED for name in ("forward_correction", "backward_correction", "label_relaxation")},
    "noise.bootstrap": LABELLED,
    **{
        f"penalties.{name}": SHARED
        for name in ("confidence_penalty", "jensen", "max_suppression", "margin", "conditional", "z_loss")
    },
    **{f"adaptive.{name}": SHARED for name in ("confidence", "uncertainty", "margin", "entropy")},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_what_one_loss_has_all_losses_have(name):
    parameters = inspect.signature(named(name)).parameters
    assert OPTIONS[name] <= set(parameters), f"{name} lacks {OPTIONS[name] - set(parameters)}"
    assert all(parameters[option].kind is inspect.Parameter.KEYWORD_ONLY for option in OPTIONS[name])
